"""What commands share: the options that choose a model, and how results are said."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
MODEL: dict[str, Any] = {
    "model": Annotated[str, typer.Option(help="Folder, .safetensors file or hub id.", show_default="the one shipped")],
    "revision": Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")],
    "variant": Annotated[str | None, typer.Option(help="fp16, ...: which of a folder's weights.")],
    "family": Annotated[str | None, typer.Option(help="sd1, sd2-v, sdxl, ...: instead of what the file says.")],
    "prediction": Annotated[str | None, typer.Option(help="eps, v or x0: instead of what the file says.")],
    "zero_snr": Annotated[bool | None, typer.Option(help="Zero terminal SNR: instead of what the file says.")],
    "ema": Annotated[bool, typer.Option("--ema", help="The moving average in a single file.")],
    "vae": Annotated[str | None, typer.Option(help="Folder or file of another VAE.")],
    "device": Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")],
    "dtype": Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")],
}


@dataclass(frozen=True)
class Model:
    """The options that choose a model; `model` "" is the one shipped."""

    model: str = ""
    revision: str | None = None
    variant: str | None = None
    family: str | None = None
    prediction: str | None = None
    zero_snr: bool | None = None
    ema: bool = False
    vae: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    @property
    def name(self) -> str:
        """What pictures call it."""
        return Path(self.model).stem if self.model.endswith(".safetensors") else Path(self.model or "picto").name

    def open(self, batch_size: int = 8) -> Pipeline:
        """Load it."""
        from ldm.pipeline import PICTO, Pipeline

        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        return Pipeline.from_pretrained(self.model or PICTO, batch_size=batch_size, **options)


def opens_model(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose parameter `model` is filled from the options of `MODEL`; `defaults` are the command's own."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        usual = Model(**defaults)
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "model"]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(usual, name), annotation=annotation)
            for name, annotation in MODEL.items()
        ]

        @wraps(command)
        def run(**values: Any) -> None:
            model = Model(**{name: values.pop(name) for name in MODEL})
            command(**values, model=model)

        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return run

    return decorate


def within(name: str, value: float | None, low: float, high: float) -> None:
    """ValueError where a number is given that is not from `low` to `high`."""
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} {value}: must be from {low:g} to {high:g}")


def writable(folder: Path) -> None:
    """Make the folder; ValueError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: not writable")


def report(record: Mapping[str, object], as_json: bool) -> None:
    """Print a record as one JSON object, or as a table with lists below each other."""
    if as_json:
        return print(json.dumps(record))
    for name, value in record.items():
        for part in value if isinstance(value, list) else [value]:
            print(f"{name.replace('_', ' '):26} {f'{part:.4g}' if isinstance(part, float) else part}")
