"""Options that commands share: of a model, of an image, and of what is printed."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ldm import files
from ldm.checkpoints.families import LoadOptions
from ldm.commands.defaults import ConfigOption
from ldm.errors import InputWarning, printable
from ldm.pipeline.request import IMAGE_COUNT, REQUEST_FIELDS, FieldSpec, Request, parse_interval

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

LoraWeight = float | tuple[float, float]  # of an adapter, or its two: of the U-Net and of the text encoders
LORA_WEIGHT_PATTERN = re.compile(r"(.+):([-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf|nan))", re.DOTALL)
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
StrictOption = Annotated[
    bool | None,
    typer.Option("--strict/--lenient", help="Refuse what would be left out or changed, or leave out what is broken."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
WeightVariantOption = Annotated[str | None, typer.Option(help="Weight variant of a folder: fp16, ...")]
LOAD_OPTIONS: dict[str, Any] = {
    "revision": RevisionOption,
    "variant": WeightVariantOption,
    "family": Annotated[str | None, typer.Option(help="sd1, sd2-v, sdxl, ...: overrides what the file says.")],
    "prediction": Annotated[str | None, typer.Option(help="eps, v or x0: overrides what the file says.")],
    "zero_snr": Annotated[bool | None, typer.Option(help="Zero terminal SNR: overrides what the file says.")],
    "ema": Annotated[bool, typer.Option("--ema", help="Use the EMA weights.")],
}
MODEL_OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str, typer.Option("--model", "-m", help="Folder, .safetensors file or hub id.", show_default="picto")
    ],
    "lora": Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE[:WEIGHT[:TEXT_WEIGHT]]", help="LoRA file or hub id; may be repeated."),
    ],
    "embedding": Annotated[
        list[str] | None, typer.Option(metavar="[TOKEN=]FILE", help="Textual inversion; may be repeated.")
    ],
    "vae": Annotated[str | None, typer.Option(help="Folder, file or hub id of another VAE.")],
    **LOAD_OPTIONS,
    "vae_tiling": Annotated[
        bool, typer.Option("--vae-tiling", help="Decode and encode in strips: the same image in bounded memory.")
    ],
    "device": Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, xpu, ...")],
    "dtype": Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")],
}
OPTION_TYPES = {"str": str, "int": int, "float": float, "tuple[float,": tuple[float, float], "Image.Image": Path}


def _request_option(annotation: str, default: Any, spec: FieldSpec) -> Any:
    kind: Any = OPTION_TYPES[annotation.split(" ")[0]]
    names = [f"--{spec.option.replace('_', '-')}", *([spec.short] if spec.short else [])]
    metavar = "LOW HIGH" if annotation.startswith("tuple") else None
    return Annotated[kind | None if default is None else kind, typer.Option(*names, help=spec.help, metavar=metavar)]


REQUEST_OPTIONS: dict[str, Any] = {
    f.name: _request_option(str(f.type), f.default, REQUEST_FIELDS[f.name])
    for f in fields(Request)
    if f.name in REQUEST_FIELDS and REQUEST_FIELDS[f.name].help
}
CountOption = Annotated[int, typer.Option(help=IMAGE_COUNT.help)]
OPTION_ALIASES = {  # spellings of diffusers, of AUTOMATIC1111's web UI and of other command lines: ours
    **{
        alias.replace("_", "-"): spec.option.replace("_", "-")
        for name, spec in {**REQUEST_FIELDS, "count": IMAGE_COUNT}.items()
        for alias in (name, *spec.aliases)
    },
    **dict.fromkeys(("output", "outdir", "output-dir", "output-path"), "out"),
    **dict.fromkeys(("ckpt", "checkpoint", "model-path", "pretrained-model-name-or-path"), "model"),
    **dict.fromkeys(("ddim-steps", "inference-steps", "sampling-steps"), "steps"),
    **dict.fromkeys(("images-per-prompt", "n-samples", "batch-count", "num-samples"), "count"),
    **dict.fromkeys(("init-img", "init-image", "image-path", "input-image", "image-seeds"), "image"),
    **dict.fromkeys(("mask-path", "mask-img", "inpaint-mask"), "mask"),
    **dict.fromkeys(("denoise", "denoising", "image-seed-strengths", "img2img-strength"), "strength"),
    **dict.fromkeys(("hr-scale", "hires-upscale", "hires-scale", "highres-fix-scale"), "upscale"),
    **dict.fromkeys(("hires-denoising-strength", "hr-denoising-strength", "highres-fix-strength"), "upscale-strength"),
    **dict.fromkeys(("vae-path", "vae-model"), "vae"),
    **dict.fromkeys(("loras", "lora-path", "network-weights"), "lora"),
    **dict.fromkeys(("lora-model-dir", "loras-dir"), "lora-dir"),
    **dict.fromkeys(
        ("embeddings", "textual-inversion", "textual-inversions", "textual-inversion-embeddings"), "embedding"
    ),
    **dict.fromkeys(("sampling-method", "sample-method"), "sampler"),
    **dict.fromkeys(("schedule", "schedule-type"), "spacing"),
    **dict.fromkeys(("prompts-file", "prompt-file"), "from-file"),
    **dict.fromkeys(("torch-dtype", "precision", "type"), "dtype"),
    "scale": "guidance",
    "prompts": "prompt",
    "output-format": "format",
    "filename-pattern": "name-pattern",
}


def normalize_option(name: str) -> str:
    """An option's name by our spelling: underscores are dashes, and what others call it is accepted."""
    name = name.replace("_", "-")
    return OPTION_ALIASES.get(name, name)


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The options that choose a model, with its adapters, and where it runs; `model` "" is picto."""

    model: str = ""
    lora: list[str] | None = None
    embedding: list[str] | None = None
    vae_tiling: bool = False
    device: str = "auto"
    dtype: str = "auto"

    @property
    def display_name(self) -> str:
        """The name of the model in metadata."""
        return Path(self.model).stem if self.model.endswith(".safetensors") else Path(self.model or "picto").name

    def cli_args(self) -> list[str]:
        """The options that choose the same model again, on any device."""
        args: list[str] = []
        for name in MODEL_OPTIONS:
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value == getattr(ModelOptions, name) or name == "device":
                continue
            if isinstance(value, bool):
                args.append(option if value else f"--no-{option[2:]}")
            else:
                args += [part for one in (value if isinstance(value, list) else [value]) for part in (option, str(one))]
        return args

    def with_absolute_paths(self) -> ModelOptions:
        """The same model from any working directory."""
        loras = [s._replace(source=make_path_absolute(s.source)) for s in map(parse_lora, self.lora or [])]
        tokens = [s._replace(source=make_path_absolute(s.source)) for s in map(parse_embedding, self.embedding or [])]
        return replace(
            self,
            model=make_path_absolute(self.model),
            vae=self.vae and make_path_absolute(str(self.vae)),
            lora=[spec.to_option() for spec in loras] or None,
            embedding=[spec.to_option() for spec in tokens] or None,
        )

    def load_pipeline(self, device: str | None = None, batch_size: int = 8) -> Pipeline:
        """The model with its adapters and embeddings, in any process; `device` overrides the option."""
        from ldm.checkpoints.formats import PICTO_PATH
        from ldm.pipeline.pipeline import Pipeline

        load = {f.name: getattr(self, f.name) for f in fields(LoadOptions)}
        pipe = Pipeline.from_pretrained(
            self.model or PICTO_PATH, device=device or self.device, dtype=self.dtype, batch_size=batch_size, **load
        )
        for adapter in map(parse_lora, self.lora or []):
            pipe.load_lora_weights(*adapter)
        for embedding in map(parse_embedding, self.embedding or []):
            pipe.load_textual_inversion(*embedding)
        if self.vae_tiling:
            pipe.enable_vae_tiling()
        return pipe


class RequestOptions(SimpleNamespace):
    """The values of `REQUEST_OPTIONS`, by the fields of `Request`."""

    def __init__(self, **values: Any) -> None:
        defaults = {f.name: f.default for f in fields(Request) if f.name in REQUEST_OPTIONS}
        super().__init__(**{**defaults, **values})


OPTION_GROUPS = {ModelOptions: MODEL_OPTIONS, LoadOptions: LOAD_OPTIONS, RequestOptions: REQUEST_OPTIONS}


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """A typer command whose parameters of type `ModelOptions`, `LoadOptions` and `RequestOptions` become their options.

    A default of such a parameter holds the defaults of its options. `--config` is an option of all these commands.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for p in inspect.signature(command, eval_str=True).parameters.values():
        options = OPTION_GROUPS.get(p.annotation) if isinstance(p.annotation, type) else None
        if options is None:
            parameters.append(p)
            continue
        groups[p.name] = p.annotation, options
        defaults = vars(p.annotation() if p.default is p.empty else p.default)
        parameters += [p.replace(name=name, default=defaults[name], annotation=a) for name, a in options.items()]

    parameters.append(
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigOption)
    )

    @wraps(command)
    def run(config: str | None = None, **values: Any) -> None:
        for name, (group, options) in groups.items():
            values[name] = group(**{option: values.pop(option) for option in options})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def load_pipeline_and_request(
    model: ModelOptions, options: RequestOptions, device: str | None = None, batch_size: int = 8
) -> tuple[Pipeline, Request]:
    """The model, and a request of the options without a prompt; what needs no model is checked first."""
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.timesteps import SPACINGS
    from ldm.errors import choose
    from ldm.image_io import read_image, read_mask
    from ldm.sampler_names import resolve_sampler_names

    values = resolve_sampler_names(vars(options))
    readers = {"image": read_image, "mask": read_mask, "guidance_interval": parse_interval}
    values |= {name: read(values[name]) for name, read in readers.items() if values[name] is not None}
    if values["sampler"] is not None:
        choose(SAMPLERS, values["sampler"], "sampler")
    if values["spacing"] is not None:
        choose(SPACINGS, values["spacing"], "spacing")
    pipe = model.load_pipeline(device, batch_size)
    if values["clip_skip"] is not None:
        values["clip_skip"] = pipe.convert_clip_skip(values["clip_skip"])
    return pipe, Request("", **values)


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """ValueError where a number is given that is not from `low` to `high`."""
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} {value}: must be from {low:g} to {high:g}")


def check_out_folder(folder: Path, make: bool = True) -> None:
    """Make the folder of --out, or check that it could be made; ValueError where nothing can be written to it."""
    try:
        (files.ensure_writable_dir if make else files.check_creatable_dir)(folder)
    except ValueError as error:
        raise ValueError(f"--out {error}") from None


def make_path_absolute(source: str) -> str:
    """A path that is the same from any working directory; a hub id, and "" for picto, stay."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def apply_strictness(strict: bool | None) -> None:
    """Make an `InputWarning` an error where a command is strict, else a line."""
    warnings.simplefilter("error" if strict else "default", InputWarning)


class LoraSpec(NamedTuple):
    """A value of --lora, as `Pipeline.load_lora_weights` takes it."""

    source: str
    weight: LoraWeight = 1.0
    name: str | None = None

    def to_option(self) -> str:
        """The option's value."""
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        return ("" if self.name is None else f"{self.name}=") + ":".join([self.source, *map(str, weights)])


class EmbeddingSpec(NamedTuple):
    """A value of --embedding, as `Pipeline.load_textual_inversion` takes it."""

    source: str
    token: str | None = None

    def to_option(self) -> str:
        """The option's value."""
        return self.source if self.token is None else f"{self.token}={self.source}"


def parse_lora(option: str) -> LoraSpec:
    """The parts of [NAME=]FILE[:WEIGHT[:TEXT_WEIGHT]]; a colon before what is no number belongs to the file's name."""
    numbers: list[float] = []
    source = option
    while len(numbers) < 2 and (match := LORA_WEIGHT_PATTERN.fullmatch(source)):
        source, numbers = match[1], [float(match[2]), *numbers]
    name, source = split_name(source)
    return LoraSpec(source, (numbers[0], numbers[1]) if len(numbers) == 2 else [*numbers, 1.0][0], name)


def parse_embedding(option: str) -> EmbeddingSpec:
    """The parts of [TOKEN=]FILE."""
    token, source = split_name(option)
    return EmbeddingSpec(source, token)


def split_name(option: str) -> tuple[str | None, str]:
    """The parts of [NAME=]FILE; an equals sign in the name of an existing file belongs to it."""
    name, _, file = option.partition("=")
    return (None, option) if not file or Path(option).expanduser().exists() else (name, file)


def print_record(record: Mapping[str, object], as_json: bool) -> None:
    """Print a record as one JSON object, or as a table with lists below each other."""
    if as_json:
        return print(json.dumps(record))
    for name, value in record.items():
        for part in value if isinstance(value, list | tuple) else [value]:
            text = f"{part:.4g}" if isinstance(part, float) else printable(part)
            print(f"{name.replace('_', ' '):26} {text}")
