"""`ldm verify`: do pictures regenerate from their own metadata?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.commands.batch import PipelineLoader
from ldm.commands.options import (
    EmbeddingOption,
    JsonOption,
    LoraOption,
    ModelOptions,
    parse_embedding,
    parse_lora,
    with_model_options,
)


@with_model_options()
def verify(
    model: ModelOptions,
    path: Annotated[Path, typer.Argument(metavar="IMAGE|DIR", show_default=False)],
    image: Annotated[Path | None, typer.Option(help="The picture that it began from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="What of that was redrawn.")] = None,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw a picture, or all in a folder, again from its metadata, and compare: status 0 where all are equal, else 1.

    Equal is within 1 of 255 in each pixel (8 in a JPEG). Where the weights, the autoencoder, an adapter or an embedding
    are others, that is said instead. The model, what was said of it and the dtype are those of the first picture,
    unless they are given; only what lies on this machine is opened for a picture's word.
    """
    files = find_image_files(path)
    from ldm.image_io import read_image, read_mask
    from ldm.jobs.verify import read_recorded_image, verify_images

    claim = next(iter_recorded_images(files), None) if path.is_dir() else read_recorded_image(path)
    if claim is None:
        raise ValueError(f"{path}: no picture of ldm in it")
    model = restore_model_options(model, claim.record, claim.file)
    given = None if image is None else read_image(image), None if mask is None else read_mask(mask)
    pipe = PipelineLoader(model, tuple(map(parse_lora, lora or [])), tuple(map(parse_embedding, embedding or [])))()
    verdicts = []
    for verdict in verify_images(files, pipe, *given):
        verdicts.append(verdict.equal)
        if as_json:
            print(json.dumps({**verdict._asdict(), "file": str(verdict.file)}), flush=True)
        else:
            print(f"{'ok  ' if verdict.equal else 'FAIL'} {verdict.file}: {verdict.said}", flush=True)
    raise typer.Exit(0 if all(verdicts) else 1)


def restore_model_options(model: ModelOptions, record: Mapping[str, Any], file: Path) -> ModelOptions:
    """The options of a model, those not given as a picture's record has them; ValueError where a file is not here."""
    load = record.get("load")
    said: dict[str, Any] = dict(load) if isinstance(load, dict) else {}
    said |= {"model": said.get("path"), "dtype": record.get("dtype")}
    usual = ModelOptions()
    taken = {
        field.name: said[field.name]
        for field in fields(ModelOptions)
        if said.get(field.name) is not None and getattr(model, field.name) == getattr(usual, field.name)
    }
    for name in ("model", "vae"):
        if name in taken and not Path(str(taken[name])).expanduser().exists():
            raise ValueError(f"{file}: drawn with {taken[name]}, which is not here: give it by --{name}")
    return replace(model, **taken)


def find_image_files(path: Path) -> list[Path]:
    """The picture file at a path, or all below a folder but hidden ones, a gallery's thumbnails and contact sheets."""
    from ldm.metadata import IMAGE_FORMATS

    if not path.exists():
        raise ValueError(f"{path}: No such file or directory")
    if not path.is_dir():
        return [path]
    suffixes = {f".{output.suffix}" for output in IMAGE_FORMATS.values()} | {".jpeg"}
    below = (file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    return sorted(file for file in below if not is_hidden_or_derived(file, path))


def is_hidden_or_derived(file: Path, root: Path) -> bool:
    """Is a file below a folder hidden, or what a job makes of its pictures?"""
    from ldm.jobs.contact_sheets import GRID_FOLDER
    from ldm.jobs.gallery import THUMBNAIL_FOLDER

    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return True
    above = [folder for folder in file.parents if folder.is_relative_to(root)]
    return any(
        folder.name in (THUMBNAIL_FOLDER, GRID_FOLDER) and (folder.parent / "job.json").exists() for folder in above
    )


def iter_recorded_images(files: list[Path]) -> Iterator:
    """What those of the files say that say anything."""
    from ldm.jobs.verify import read_recorded_image

    for file in files:
        try:
            yield read_recorded_image(file)
        except ValueError:
            continue
