"""Recipes of trainings: YAML files as typed, frozen objects; an unknown or repeated key is an error that names it."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from ldm.errors import error_text, suggest

MAX_RESOLUTION = 16384  # of images and buckets, in pixels
MAX_STEPS = 10**9
MAX_REPEATS = 1000  # of an image: above this, the number in a folder's name is likely a year or a count


class FrozenConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse_resolution(value: Any) -> Any:
    """kohya's "width,height", `512x512` or a list as the side of the square of that area, rounded up."""
    if isinstance(value, str):
        value = [part.strip() for part in re.split("[,x]", value.strip(" ()[]").lower())]
    if isinstance(value, list | tuple) and 0 < len(value) <= 2 and all(re.fullmatch(r"\d{1,6}", str(v)) for v in value):
        width, height = int(value[0]), int(value[-1])
        return width if width == height else math.ceil(math.sqrt(width * height))
    return value


def _parse_name(value: Any) -> Any:
    """A name as the tables have it: `AdamW`, `constant-with-warmup`, `Cosine` in small letters, with underscores."""
    return value.strip().lower().replace("-", "_") if isinstance(value, str) else value


def _parse_suffix(value: Any) -> Any:
    """A suffix in small letters with its dot, as kohya's tools take `txt`."""
    return "." + value.strip().lower().removeprefix(".") if isinstance(value, str) and value.strip(" .") else value


CaptionSuffix = Annotated[str, BeforeValidator(_parse_suffix), Field(pattern=r"^\.[\w.-]+$")]
OptionName = Annotated[str, BeforeValidator(_parse_name)]


class SceneDataConfig(FrozenConfig):
    """Scenes composed of the sprites that `scripts/build_dataset.py` makes."""

    sprites: Path
    size: int = 128
    concepts: Path | None = None  # a file of concept names, one per line; None: all
    latents: int = Field(0, ge=0)  # scenes whose latents are cached (objective diffusion only)


class SubsetConfig(FrozenConfig):
    """What differs in one folder of a dataset, kohya's subset; None: as in the whole dataset."""

    repeats: int | None = Field(None, gt=0, le=MAX_REPEATS)  # of each image; None: by the folder's name, or 1
    is_reg: bool = False  # regularization images of the class: their loss is weighted by prior_loss_weight
    metadata_file: Path | None = None  # the table of the folder's images, wherever it lies
    instance_prompt: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_extension: CaptionSuffix | None = None
    caption_dropout: float | None = Field(None, ge=0, le=1)  # None: the objective's
    caption_tag_dropout: float | None = Field(None, ge=0, le=1)
    shuffle_caption: bool | None = None
    caption_separator: str | None = Field(None, min_length=1)
    keep_tokens: int | None = Field(None, ge=0)
    keep_tokens_separator: str | None = None
    random_flip: bool | None = None


class ImageDataConfig(FrozenConfig):
    """A captioned image dataset; options are named as in diffusers' scripts, otherwise as in kohya's."""

    train_data_dir: Annotated[tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | Path) else v)]
    image_column: str | None = None  # None: file_name in a metadata file, image in a saved dataset
    caption_column: str = "text"
    mask_column: str = "mask"
    masks: Literal["none", "file", "alpha"] = "none"  # of the loss: <stem>.mask.png or the column, or alpha
    subsets: tuple[SubsetConfig, ...] = ()  # of each folder of train_data_dir, in their order, or none
    instance_prompt: str | None = None  # the caption of images without one
    caption_prefix: str = ""  # before every caption
    caption_suffix: str = ""  # after it
    # images have about its square in pixels; also "width,height"
    resolution: Annotated[int, BeforeValidator(parse_resolution)] = Field(512, gt=0, le=MAX_RESOLUTION)
    min_bucket_reso: int | None = Field(None, gt=0, le=MAX_RESOLUTION)  # the shortest side; None: half the resolution
    max_bucket_reso: int | None = Field(None, gt=0, le=2 * MAX_RESOLUTION)  # the longest; None: twice the resolution
    bucket_reso_steps: int = Field(64, gt=0, le=MAX_RESOLUTION)
    bucket_no_upscale: bool = False
    center_crop: bool = False  # else random crops, whose latents are not cached
    random_flip: bool = False
    shuffle_caption: bool = False  # shuffle the tags of a caption
    caption_separator: str = Field(",", min_length=1)  # between tags
    keep_tokens: int = Field(0, ge=0)  # the number of first tags that are neither shuffled nor dropped
    keep_tokens_separator: str = ""  # a text in captions, as "|||": what is before it, or after a second one, is kept
    caption_tag_dropout: float = Field(0, ge=0, le=1)  # the probability of dropping a tag
    caption_extension: CaptionSuffix = ".txt"  # the one that counts, of several
    skip_broken: bool = False  # train without the images that cannot be read or used; all are decoded before
    strict: bool = False  # refuse what is otherwise left out with a notice: stray files, rows without an image, ...

    @model_validator(mode="after")
    def _check_subsets(self) -> ImageDataConfig:
        if self.subsets and len(self.subsets) != len(self.train_data_dir):
            raise ValueError(f"subsets: {len(self.subsets)} for {len(self.train_data_dir)} folders of train_data_dir")
        return self

    def subset(self, k: int) -> SubsetConfig:
        """What differs in the k-th folder."""
        return self.subsets[k] if k < len(self.subsets) else SubsetConfig.model_validate({})

    def for_folder(self, k: int) -> ImageDataConfig:
        """The options of the k-th folder."""
        own = {name: value for name, value in self.subset(k) if value is not None and name in type(self).model_fields}
        return self.model_copy(update=own) if own else self


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
    snr_gamma: float | None = Field(None, gt=0)  # min-SNR weighting with this gamma (Hang et al. 2023): 5 is usual
    times: str = "stratified"  # timestep sampling, of ldm.diffusion.objective.TIME_SAMPLERS
    caption_dropout: float = Field(0.1, ge=0, le=1)
    noise_offset: float = Field(0, ge=0)  # standard deviation of noise that is constant in a channel (Guttenberg 2023)
    input_perturbation: float = Field(0, ge=0)  # standard deviation of noise in the input only (Ning et al. 2023)
    attention: str = "sdpa"

    @model_validator(mode="after")
    def _check_weighting(self) -> ScoreMatchingObjective:
        if self.snr_gamma is not None and self.weighting not in ("uniform", "min_snr"):
            raise ValueError(f"snr_gamma is of min_snr: it does not go with weighting {self.weighting!r}")
        return self


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
    pretrained_vae_model_name_or_path: str | None = None  # another VAE: a folder, a file or a hub repository
    clip_skip: int | None = Field(None, gt=0)  # as kohya counts: 1 is CLIP's last layer; None: the model's own
    rank: int = Field(8, gt=0)
    alpha: float | None = Field(None, gt=0)  # None: the rank, for a scale of 1
    dora: bool = False
    targets: tuple[str, ...] = ("attention",)  # of ldm.adapters.lora_training
    prior_preservation: bool = False  # train on the model's own images of a class too (Ruiz et al. 2023)
    class_prompt: str | None = None
    class_data_dir: Path | None = None  # images of the class; what lacks of num_class_images is generated
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


class ModelCardConfig(FrozenConfig):
    """What the author says about an export: for its README.md and its header; what is None is not written."""

    title: str | None = None  # None: the name of output_dir
    author: str | None = None
    description: str | None = None
    license: str | None = None  # the hub's identifier, as "openrail"
    trigger_phrase: str | None = None  # None: the placeholder token or the instance prompt
    tags: tuple[str, ...] = ()
    date: datetime.date | None = None  # None: the day on which the training began


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
    seed: int = Field(0, ge=0, lt=2**64)
    max_train_steps: int = Field(0, ge=0, le=MAX_STEPS)  # 0: by num_train_epochs
    num_train_epochs: int | None = Field(None, gt=0, le=MAX_STEPS)  # passes over an image dataset
    train_batch_size: int = Field(gt=0, le=1_000_000)
    gradient_accumulation_steps: int = Field(1, gt=0)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    learning_rate: float = Field(gt=0)
    text_encoder_lr: float | None = Field(None, gt=0)  # of text encoders that are trained; None: learning_rate
    lr_scheduler: OptionName = "wsd"  # of ldm.train.optimizers
    lr_warmup_steps: int = Field(0, ge=0, le=MAX_STEPS)
    lr_num_cycles: int = Field(1, gt=0, le=MAX_STEPS)  # cosine_with_restarts: cosines one after another
    lr_power: float = Field(1.0, gt=0)  # polynomial
    lr_decay: float = Field(0.33, ge=0, le=1)  # wsd: the last fraction of the steps, in which the rate decays to 0
    optimizer: OptionName = "adamw"  # of ldm.train.optimizers
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
    tracker_project_name: str | None = None  # None: the name of output_dir
    hub_model_id: str | None = None  # the hub's repository that the export is uploaded to
    hub_private_repo: bool = False  # where it is made
    validation_steps: int = Field(500, gt=0)
    validation_prompts: tuple[str, ...] = ()
    validation_guidance: float = Field(2.5, ge=0, le=1000)
    card: ModelCardConfig = ModelCardConfig()

    @model_validator(mode="after")
    def _check_length(self) -> Recipe:
        if not self.max_train_steps and self.num_train_epochs is None:
            raise ValueError("max_train_steps or num_train_epochs is needed")
        return self

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
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        # beside its own errors, PyYAML's constructors raise what int(), a table or a pattern's match raise
        what = (
            error_text(error) if isinstance(error, yaml.YAMLError | ValueError) else "a value is not of its tag's type"
        )
        raise ValueError(f"{name}: {what}") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `key.path=value` overrides; ValueError names the file and the key."""
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error_text(error)}") from None
    return build_recipe(values, overrides, str(path))


def build_recipe(values: Any, overrides: Sequence[str] = (), name: str = "recipe") -> Recipe:
    """The recipe of nested options, with `key.path=value` overrides; ValueError names the key after `name`."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected a mapping of options")
    for item in overrides:
        _apply_override(values, item)
    try:
        return Recipe.model_validate(_move_to_groups(values))
    except ValidationError as error:
        raise ValueError(f"{name}: {_format_validation_error(error)}") from None


def _move_to_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a flat recipe, as those of diffusers' and kohya's tools are, in their groups."""
    groups: dict[str, type[BaseModel]] = {"objective": FinetuneObjective, "data": ImageDataConfig}
    moved = dict(values)
    for group, model in groups.items():
        own = {name: moved[name] for name in model.model_fields if name in moved and name not in Recipe.model_fields}
        inner = moved.get(group, {})
        if own and isinstance(inner, dict) and not own.keys() & inner.keys():
            moved = {name: value for name, value in moved.items() if name not in own} | {group: {**inner, **own}}
    return moved


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
        return ": ".join(filter(None, [".".join(place), fault["msg"].removeprefix("Value error, ")]))
    models: tuple[type[BaseModel], ...] = (Recipe, SceneDataConfig, ImageDataConfig, *get_args(Objective))
    names = sorted({name for model in models for name in model.model_fields})
    return f"{'.'.join(place)}: unknown option{suggest(place[-1], names)}"
