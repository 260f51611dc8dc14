"""Recipes of trainings: YAML files as typed, frozen objects; an unknown or repeated key is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ldm.errors import error_text, suggest


class FrozenConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SceneDataConfig(FrozenConfig):
    """Scenes composed of the sprites that `scripts/build_dataset.py` makes."""

    sprites: Path
    size: int = 128
    concepts: Path | None = None  # a file of concept names, one per line; None: all
    latents: int = Field(0, ge=0)  # scenes whose latents are cached (objective diffusion only)


class ImageDataConfig(FrozenConfig):
    """A captioned image dataset; options are named as in diffusers' scripts, otherwise as in kohya's."""

    train_data_dir: Annotated[tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)]
    image_column: str | None = None  # None: file_name in a metadata file, image in a saved dataset
    caption_column: str = "text"
    mask_column: str = "mask"
    masks: Literal["none", "file", "alpha"] = "none"  # of the loss: <stem>.mask.png or the column, or alpha
    instance_prompt: str | None = None  # the caption of images without one
    resolution: int = Field(512, gt=0)  # images have about its square in pixels
    min_bucket_reso: int | None = Field(None, gt=0)  # the shortest side; None: half the resolution
    max_bucket_reso: int | None = Field(None, gt=0)  # the longest side; None: twice the resolution
    bucket_reso_steps: int = Field(64, gt=0)
    bucket_no_upscale: bool = False
    center_crop: bool = False  # else random crops, whose latents are not cached
    random_flip: bool = False
    shuffle_caption: bool = False  # shuffle the tags of a caption
    caption_separator: str = Field(",", min_length=1)  # between tags
    keep_tokens: int = Field(0, ge=0)  # the number of first tags that are not shuffled


class AutoencoderObjective(FrozenConfig):
    """The KL autoencoder: L1 + squared error + image gradients + a small KL to N(0, I)."""

    kind: Literal["autoencoder"]
    model: dict[str, Any]  # diffusers' AutoencoderKL configuration
    crop: int | None = Field(None, gt=0)  # side of random crops in pixels; None: whole images
    squared_weight: float = 2.0
    gradient_weight: float = 0.5
    kl_weight: float = 3e-4


class ClipObjective(FrozenConfig):
    """CLIP's contrastive training of a text and an image encoder."""

    kind: Literal["clip"]
    vocab_size: int
    context_length: int
    text: dict[str, Any]  # transformers' CLIPTextConfig, without the vocabulary
    vision: dict[str, Any]  # transformers' CLIPVisionConfig
    projection_dim: int


class ScoreMatchingObjective(FrozenConfig):
    """Options of all trainings by denoising score matching."""

    weighting: str = "uniform"  # of ldm.diffusion.objective.WEIGHTINGS: min_snr is diffusers' snr_gamma = 5
    times: str = "stratified"  # timestep sampling, of ldm.diffusion.objective.TIME_SAMPLERS
    caption_dropout: float = Field(0.1, ge=0, le=1)
    noise_offset: float = Field(0, ge=0)  # standard deviation of noise that is constant in a channel (Guttenberg 2023)
    input_perturbation: float = Field(0, ge=0)  # standard deviation of noise in the input only (Ning et al. 2023)
    attention: str = "sdpa"


class DiffusionObjective(ScoreMatchingObjective):
    """A latent U-Net trained on scenes."""

    kind: Literal["diffusion"]
    vae: Path
    text: Path  # the folder above tokenizer/ and text_encoder/
    unet: dict[str, Any] | Path  # diffusers' UNet2DConditionModel configuration, or a folder of initial weights
    prediction: str = "v"
    schedule: str = "squaredcos_cap_v2"
    rescale_betas_zero_snr: bool = False  # the last step is pure noise (Lin et al. 2024)


class FinetuneObjective(ScoreMatchingObjective):
    """Fine-tuning of a pretrained model, whose prediction and schedule stay as they are, on an image dataset."""

    kind: Literal["tune"]
    pretrained_model_name_or_path: str | None = None  # a folder, a single file or a hub repository; None: picto
    revision: str | None = None
    variant: str | None = None
    method: Literal["full", "lora", "textual_inversion"] = "lora"
    frozen_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of frozen weights; trainable ones are float32
    train_text_encoder: bool = False
    rank: int = Field(8, gt=0)
    alpha: float | None = Field(None, gt=0)  # None: the rank, for a scale of 1
    dora: bool = False
    targets: tuple[str, ...] = ("attention",)  # of ldm.adapters.lora_training
    prior_preservation: bool = False  # train on the model's own images of a class too (Ruiz et al. 2023)
    class_prompt: str | None = None
    num_class_images: int = Field(24, gt=0)
    prior_loss_weight: float = Field(1.0, ge=0)
    placeholder_token: str | None = None  # the new token, as it occurs in captions (Gal et al. 2022)
    initializer_token: str | None = None  # a known token whose vectors are the initial ones
    num_vectors: int = Field(1, gt=0)
    validation_data_dir: Path | None = None  # held-out images, read as the others are

    @model_validator(mode="after")
    def _check_required_fields(self) -> FinetuneObjective:
        required = ["class_prompt"] if self.prior_preservation else []
        if self.method == "textual_inversion":
            required += ["initializer_token", "placeholder_token"]
            if self.train_text_encoder:
                raise ValueError("train_text_encoder: textual inversion trains the embeddings of one token only")
        for name in required:
            if not getattr(self, name):
                raise ValueError(f"{name} is needed")
        return self


def _data_tag(values: Any) -> str:
    has_sprites = isinstance(values, dict) and "sprites" in values
    return "scenes" if has_sprites or isinstance(values, SceneDataConfig) else "folder"


DataConfig = Annotated[
    Annotated[SceneDataConfig, Tag("scenes")] | Annotated[ImageDataConfig, Tag("folder")], Discriminator(_data_tag)
]
Objective = AutoencoderObjective | ClipObjective | DiffusionObjective | FinetuneObjective
# YAML reads no as false
MixedPrecision = Annotated[Literal["auto", "no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)]


class Recipe(FrozenConfig):
    """One training; options are named as in diffusers' scripts.

    `train_batch_size` is the whole batch of an optimizer step, over all processes and accumulation steps.
    """

    objective: Annotated[Objective, Field(discriminator="kind")]
    data: DataConfig
    output_dir: Path
    seed: int = Field(0, ge=0)
    max_train_steps: int = Field(gt=0)
    train_batch_size: int = Field(gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    learning_rate: float = Field(gt=0)
    lr_scheduler: str = "wsd"  # of ldm.train.optimizers
    lr_warmup_steps: int = Field(0, ge=0)
    lr_decay: float = Field(0.33, ge=0, le=1)  # wsd: the last fraction of the steps, in which the rate decays to 0
    optimizer: str = "adamw"  # of ldm.train.optimizers
    optimizer_options: dict[str, Any] = {}  # more arguments of its class
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = Field(0.999, ge=0, lt=1)
    posthoc_steps: int = Field(0, ge=0)  # interval of snapshots for post-hoc EMA; 0: none
    posthoc_dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of the snapshots
    mixed_precision: MixedPrecision = "auto"  # auto: bf16 where the hardware supports it
    dataloader_num_workers: int = Field(1, ge=0)
    checkpointing_steps: int = Field(500, gt=0)
    checkpoints_total_limit: int = Field(2, gt=0)
    resume_changed_data: bool = False  # go on from a checkpoint of other images or captions
    logging_steps: int = Field(20, gt=0)
    report_to: tuple[str, ...] = ("tensorboard",)  # accelerate's trackers, beside log.jsonl
    validation_steps: int = Field(500, gt=0)
    validation_prompts: tuple[str, ...] = ()
    validation_guidance: float = 2.5

    @property
    def scene_data(self) -> SceneDataConfig:
        """The data of a training on scenes; ValueError where it is an image dataset."""
        if isinstance(self.data, SceneDataConfig):
            return self.data
        raise ValueError(f"data: objective {self.objective.kind} is trained on scenes: give sprites")

    @property
    def image_data(self) -> ImageDataConfig:
        """The data of a training on an image dataset; ValueError where it is scenes."""
        if isinstance(self.data, ImageDataConfig):
            return self.data
        raise ValueError(f"data: objective {self.objective.kind} is trained on images: give train_data_dir")


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error and `1e-4` is a number (YAML 1.1 wants `1.0e-4`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key must be a string")
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, name: str = "") -> Any:
    """The value of a YAML text; ValueError, in one line after `name`, for bad syntax or a repeated key."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.path=value` overrides; ValueError names the file and the key."""
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error_text(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of options")
    for item in overrides:
        _apply_override(values, item)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_format_validation_error(error)}") from None


def _apply_override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: expected key.path=value")
    *parents, last = key.split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {name!r} is not a group of options")
    values[last] = parse_yaml(text, f"--set {override}")


def _format_validation_error(error: ValidationError) -> str:
    """The first error in one line, with the nearest valid name of an unknown key."""
    fault = error.errors()[0]
    tags = {"autoencoder", "clip", "diffusion", "tune", "scenes", "folder"}
    place = [str(p) for p in fault["loc"] if p not in tags]
    if fault["type"] != "extra_forbidden":
        return f"{'.'.join(place)}: {fault['msg']}"
    models: tuple[type[BaseModel], ...] = (Recipe, SceneDataConfig, ImageDataConfig, *get_args(Objective))
    names = sorted({name for model in models for name in model.model_fields})
    return f"{'.'.join(place)}: unknown option{suggest(place[-1], names)}"
