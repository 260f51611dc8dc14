"""What commands share: the options that choose a model, and how results are said."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ldm import files
from ldm.checkpoints.families import LoadOptions

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline


LoraWeight = float | tuple[float, float]  # of an adapter, or its two: of the U-Net and of the text encoders
LORA_WEIGHT_PATTERN = re.compile(
    r"(.+):([-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf|nan))", re.DOTALL
)  # FILE:WEIGHT
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME=]FILE[:WEIGHT[:TEXT_WEIGHT]]", help="Adapter, or a hub id; may be repeated."),
]
EmbeddingOption = Annotated[
    list[str] | None, typer.Option(metavar="[TOKEN=]FILE", help="Textual inversion; may be repeated.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
WeightVariantOption = Annotated[str | None, typer.Option(help="fp16, ...: which of a folder's weights.")]
MODEL_OPTIONS: dict[str, Any] = {
    "model": Annotated[str, typer.Option(help="Folder, .safetensors file or hub id.", show_default="the one shipped")],
    "revision": RevisionOption,
    "variant": WeightVariantOption,
    "family": Annotated[str | None, typer.Option(help="sd1, sd2-v, sdxl, ...: instead of what the file says.")],
    "prediction": Annotated[str | None, typer.Option(help="eps, v or x0: instead of what the file says.")],
    "zero_snr": Annotated[bool | None, typer.Option(help="Zero terminal SNR: instead of what the file says.")],
    "ema": Annotated[bool, typer.Option("--ema", help="The moving average in a single file.")],
    "vae": Annotated[str | None, typer.Option(help="Folder, file or hub id of another VAE.")],
    "device": Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")],
    "dtype": Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")],
}


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The options that choose a model and where it runs; `model` "" is picto."""

    model: str = ""
    device: str = "auto"
    dtype: str = "auto"

    @property
    def display_name(self) -> str:
        """What pictures call it."""
        return Path(self.model).stem if self.model.endswith(".safetensors") else Path(self.model or "picto").name

    def cli_args(self) -> list[str]:
        """The options that choose it again, on any device."""
        said = []
        for name in MODEL_OPTIONS:
            option, value = f"--{name.replace('_', '-')}", getattr(self, name)
            if value == getattr(ModelOptions, name) or name == "device":
                continue
            said += [option, str(value)] if not isinstance(value, bool) else [option if value else f"--no-{option[2:]}"]
        return said

    def load_pipeline(self, batch_size: int = 8) -> Pipeline:
        """Load it."""
        from ldm.checkpoints.formats import PICTO_PATH
        from ldm.pipeline.pipeline import Pipeline

        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        return Pipeline.from_pretrained(self.model or PICTO_PATH, batch_size=batch_size, **options)


def with_model_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter `model` is filled from the options of `MODEL_OPTIONS`; `defaults` are the command's own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        usual = ModelOptions(**defaults)
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "model"]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(usual, name), annotation=annotation)
            for name, annotation in MODEL_OPTIONS.items()
        ]

        @wraps(command)
        def run(**values: Any) -> None:
            model = ModelOptions(**{name: values.pop(name) for name in MODEL_OPTIONS})
            command(**values, model=model)

        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return run

    return decorate


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """ValueError where a number is given that is not from `low` to `high`."""
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} {value}: must be from {low:g} to {high:g}")


def check_out_folder(folder: Path, make: bool = True) -> None:
    """Make the folder of --out, or see whether it could be made; ValueError where nothing can be written to it."""
    try:
        (files.ensure_writable_dir if make else files.check_creatable_dir)(folder)
    except ValueError as error:
        raise ValueError(f"--out {error}") from None


class LoraSpec(NamedTuple):
    """An option --lora, as `Pipeline.load_lora_weights` takes it."""

    source: str
    weight: LoraWeight = 1.0
    name: str | None = None

    def to_option(self) -> str:
        """The option's value."""
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        return ("" if self.name is None else f"{self.name}=") + ":".join([self.source, *map(str, weights)])


class EmbeddingSpec(NamedTuple):
    """An option --embedding, as `Pipeline.load_textual_inversion` takes it."""

    source: str
    token: str | None = None

    def to_option(self) -> str:
        """The option's value."""
        return self.source if self.token is None else f"{self.token}={self.source}"


def parse_lora(option: str) -> LoraSpec:
    """[NAME=]FILE[:WEIGHT[:TEXT_WEIGHT]] in its parts; a colon before what is no number is the file's own."""
    numbers: list[float] = []
    source = option
    while len(numbers) < 2 and (match := LORA_WEIGHT_PATTERN.fullmatch(source)):
        source, numbers = match[1], [float(match[2]), *numbers]
    name, source = split_name(source)
    return LoraSpec(source, (numbers[0], numbers[1]) if len(numbers) == 2 else [*numbers, 1.0][0], name)


def parse_embedding(option: str) -> EmbeddingSpec:
    """[TOKEN=]FILE in its parts."""
    token, source = split_name(option)
    return EmbeddingSpec(source, token)


def split_name(option: str) -> tuple[str | None, str]:
    """[NAME=]FILE in its parts; an equals sign in the name of a file that is there is its own."""
    name, _, file = option.partition("=")
    return (None, option) if not file or Path(option).expanduser().exists() else (name, file)


def print_record(record: Mapping[str, object], as_json: bool) -> None:
    """Print a record as one JSON object, or as a table with lists below each other."""
    if as_json:
        return print(json.dumps(record))
    for name, value in record.items():
        for part in value if isinstance(value, list | tuple) else [value]:
            print(f"{name.replace('_', ' '):26} {f'{part:.4g}' if isinstance(part, float) else part}")
