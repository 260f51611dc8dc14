"""Recipes: YAML files read into typed, frozen records; an unknown or repeated key is refused by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator


class FrozenConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SceneDataConfig(FrozenConfig):
    """Scenes composed from the sprites of `scripts/build_dataset.py`."""

    sprites: Path
    size: int = 128
    concepts: Path | None = None  # a file of concept names, one a line; None: all
    latents: int = Field(0, ge=0)  # scenes encoded beforehand and visited again and again (diffusion only)


class ImageDataConfig(FrozenConfig):
    """People's own captioned pictures; names are those of diffusers' scripts, and kohya's where those have none."""

    train_data_dir: Annotated[tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)]
    image_column: str | None = None  # None: file_name in a metadata file, image in a saved data set
    caption_column: str = "text"
    mask_column: str = "mask"
    masks: Literal["none", "file", "alpha"] = "none"  # where the loss counts: <stem>.mask.png or the column, or alpha
    instance_prompt: str | None = None  # the caption of pictures that have none
    resolution: int = Field(512, gt=0)  # pictures have about its square in pixels
    min_bucket_reso: int | None = Field(None, gt=0)  # the shortest side; None: half the resolution
    max_bucket_reso: int | None = Field(None, gt=0)  # the longest side; None: twice the resolution
    bucket_reso_steps: int = Field(64, gt=0)
    bucket_no_upscale: bool = False
    center_crop: bool = False  # else at random, which leaves no latents to be cached
    random_flip: bool = False
    shuffle_caption: bool = False  # shuffle the caption's tags,
    caption_separator: str = Field(",", min_length=1)  # which this separates,
    keep_tokens: int = Field(0, ge=0)  # but for the first few


class AutoencoderObjective(FrozenConfig):
    """The KL autoencoder: L1 + squared error + image gradients + a small KL to N(0, I)."""

    kind: Literal["autoencoder"]
    model: dict[str, Any]  # diffusers' AutoencoderKL configuration
    crop: int | None = Field(None, gt=0)  # pixels a side of the random crops trained on; None: whole pictures
    squared_weight: float = 2.0
    gradient_weight: float = 0.5
    kl_weight: float = 3e-4


class ClipObjective(FrozenConfig):
    """Text and image towers, trained to find one another."""

    kind: Literal["clip"]
    vocab_size: int
    context_length: int
    text: dict[str, Any]  # transformers' CLIPTextConfig, less the vocabulary
    vision: dict[str, Any]  # transformers' CLIPVisionConfig
    projection_dim: int


class ScoreMatchingObjective(FrozenConfig):
    """What all trainings of a score have in common."""

    weighting: str = "uniform"
    times: str = "stratified"
    caption_dropout: float = Field(0.1, ge=0, le=1)
    noise_offset: float = Field(0, ge=0)  # deviation of what is added to a whole channel's noise (Guttenberg 2023)
    input_perturbation: float = Field(0, ge=0)  # of the noise that the network sees (Ning et al. 2023)
    attention: str = "sdpa"


class DiffusionObjective(ScoreMatchingObjective):
    """The latent U-Net."""

    kind: Literal["diffusion"]
    vae: Path
    text: Path
    unet: dict[str, Any] | Path  # diffusers' UNet2DConditionModel configuration, or a folder of one to begin with
    prediction: str = "v"
    schedule: str = "squaredcos_cap_v2"
    rescale_betas_zero_snr: bool = False  # end in pure noise (Lin et al. 2024)


class FinetuneObjective(ScoreMatchingObjective):
    """A pretrained model, or a part of it, on people's own pictures; prediction and schedule are the model's own."""

    kind: Literal["tune"]
    pretrained_model_name_or_path: str | None = None  # a folder, a single file or a hub repository; None: picto
    revision: str | None = None
    variant: str | None = None
    method: Literal["full", "lora", "textual_inversion"] = "lora"
    frozen_dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of all that does not learn; the rest is float32
    train_text_encoder: bool = False
    rank: int = Field(8, gt=0)
    alpha: float | None = Field(None, gt=0)  # None: the rank, for a scale of 1
    dora: bool = False
    targets: tuple[str, ...] = ("attention",)  # of ldm.nn.lora_train
    prior_preservation: bool = False  # learn the model's own pictures of a class as well (Ruiz et al. 2023)
    class_prompt: str | None = None
    num_class_images: int = Field(24, gt=0)
    prior_loss_weight: float = Field(1.0, ge=0)
    placeholder_token: str | None = None  # the new word, as captions have it (Gal et al. 2022)
    initializer_token: str | None = None  # a known word to begin with
    num_vectors: int = Field(1, gt=0)
    validation_data_dir: Path | None = None  # held-out pictures, read as the others are

    @model_validator(mode="after")
    def _check_required_fields(self) -> FinetuneObjective:
        needed = {"class_prompt"} if self.prior_preservation else set()
        if self.method == "textual_inversion":
            needed |= {"placeholder_token", "initializer_token"}
            if self.train_text_encoder:
                raise ValueError("train_text_encoder: textual inversion learns a word alone")
        if missing := sorted(name for name in needed if not getattr(self, name)):
            raise ValueError(f"{missing[0]} is needed")
        return self


def _data_tag(values: Any) -> str:
    return (
        "scenes"
        if isinstance(values, SceneDataConfig) or (isinstance(values, dict) and "sprites" in values)
        else "folder"
    )


DataConfig = Annotated[
    Annotated[SceneDataConfig, Tag("scenes")] | Annotated[ImageDataConfig, Tag("folder")], Discriminator(_data_tag)
]


# YAML reads no as false
MixedPrecision = Annotated[Literal["auto", "no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)]


class Recipe(FrozenConfig):
    """One training: what is learnt, from which data, and how long; option names are those of diffusers' scripts.

    `train_batch_size` is the whole batch of one optimizer step, however many processes and accumulated parts share it.
    """

    objective: Annotated[
        AutoencoderObjective | ClipObjective | DiffusionObjective | FinetuneObjective, Field(discriminator="kind")
    ]
    data: DataConfig
    output_dir: Path
    seed: int = Field(0, ge=0)
    max_train_steps: int = Field(gt=0)
    train_batch_size: int = Field(gt=0)
    gradient_accumulation_steps: int = Field(1, gt=0)
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass, not kept
    learning_rate: float = Field(gt=0)
    lr_scheduler: str = "wsd"  # of ldm.train.schedules
    lr_warmup_steps: int = Field(0, ge=0)
    lr_decay: float = Field(0.33, ge=0, le=1)  # wsd: the share of the steps, at the end, in which the rate falls to 0
    optimizer: str = "adamw"  # of ldm.train.optimizers
    optimizer_options: dict[str, Any] = {}  # arguments of its own, by its library's names
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = Field(0.999, ge=0, lt=1)
    posthoc_steps: int = Field(0, ge=0)  # between snapshots of two power-function averages; 0: none
    posthoc_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    mixed_precision: MixedPrecision = "auto"  # auto: bf16 where the device multiplies it
    dataloader_num_workers: int = Field(1, ge=0)
    checkpointing_steps: int = Field(500, gt=0)
    checkpoints_total_limit: int = Field(2, gt=0)
    logging_steps: int = Field(20, gt=0)
    report_to: tuple[str, ...] = ("tensorboard",)  # accelerate's trackers, beside log.jsonl
    validation_steps: int = Field(500, gt=0)
    validation_prompts: tuple[str, ...] = ()
    validation_guidance: float = 2.5

    @property
    def scene_data(self) -> SceneDataConfig:
        """The data of a training on scenes; ValueError where it is people's own pictures."""
        if isinstance(self.data, SceneDataConfig):
            return self.data
        raise ValueError(f"data: objective {self.objective.kind} learns from scenes: give sprites")

    @property
    def image_data(self) -> ImageDataConfig:
        """The data of a training on people's own pictures; ValueError where it is scenes."""
        if isinstance(self.data, ImageDataConfig):
            return self.data
        raise ValueError(f"data: objective {self.objective.kind} learns from pictures: give train_data_dir")


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error and `1e-4` is a number (YAML 1.1 wants `1.0e-4`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key must be a word")
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.path=value` overrides; ValueError names the file and the key."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
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
    try:
        values[last] = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--set {override}: {' '.join(str(error).split())}") from None


def _format_validation_error(error: ValidationError) -> str:
    """The first fault in one line, with the nearest valid name of an unknown key."""
    fault = error.errors()[0]
    tags = {"autoencoder", "clip", "diffusion", "tune", "scenes", "folder"}
    place = [str(p) for p in fault["loc"] if p not in tags]
    if fault["type"] != "extra_forbidden":
        return f"{'.'.join(place)}: {fault['msg']}"
    models = (
        Recipe,
        SceneDataConfig,
        ImageDataConfig,
        AutoencoderObjective,
        ClipObjective,
        DiffusionObjective,
        FinetuneObjective,
    )
    close = difflib.get_close_matches(place[-1], {name for m in models for name in m.model_fields}, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{'.'.join(place)}: unknown option{hint}"
