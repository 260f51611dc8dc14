"""`ldm verify`: do pictures regenerate from their own metadata?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.commands.batch import Opener
from ldm.commands.options import AsJson, Loras, Model, Words, named, opens_model, weighted


@opens_model()
def verify(
    model: Model,
    path: Annotated[Path, typer.Argument(metavar="IMAGE|DIR", show_default=False)],
    image: Annotated[Path | None, typer.Option(help="The picture that it began from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="What of that was redrawn.")] = None,
    lora: Loras = None,
    embedding: Words = None,
    as_json: AsJson = False,
) -> None:
    """Draw a picture, or all in a folder, again from its metadata, and compare: status 0 where all are equal, else 1.

    Equal is within 1 of 255 in each pixel (8 in a JPEG). Where the weights, the autoencoder, an adapter or an embedding
    are others, that is said instead. The model, what was said of it and the dtype are those of the first picture,
    unless they are given; only what lies on this machine is opened for a picture's word.
    """
    files = pictures(path)
    from ldm.images import read_mask, read_picture
    from ldm.jobs.verify import read_claim, verify

    claim = next(claims(files), None) if path.is_dir() else read_claim(path)
    if claim is None:
        raise ValueError(f"{path}: no picture of ldm in it")
    model = recorded(model, claim.record, claim.file)
    given = None if image is None else read_picture(image), None if mask is None else read_mask(mask)
    pipe = Opener(model, tuple(map(weighted, lora or [])), tuple(map(named, embedding or [])))()
    verdicts = []
    for verdict in verify(files, pipe, *given):
        verdicts.append(verdict.equal)
        if as_json:
            print(json.dumps({**verdict._asdict(), "file": str(verdict.file)}), flush=True)
        else:
            print(f"{'ok  ' if verdict.equal else 'FAIL'} {verdict.file}: {verdict.said}", flush=True)
    raise typer.Exit(0 if all(verdicts) else 1)


def recorded(model: Model, record: Mapping[str, Any], file: Path) -> Model:
    """The options of a model, those not given as a picture's record has them; ValueError where a file is not here."""
    load = record.get("load")
    said: dict[str, Any] = dict(load) if isinstance(load, dict) else {}
    said |= {"model": said.get("path"), "dtype": record.get("dtype")}
    usual = Model()
    taken = {
        field.name: said[field.name]
        for field in fields(Model)
        if said.get(field.name) is not None and getattr(model, field.name) == getattr(usual, field.name)
    }
    for name in ("model", "vae"):
        if name in taken and not Path(str(taken[name])).expanduser().exists():
            raise ValueError(f"{file}: drawn with {taken[name]}, which is not here: give it by --{name}")
    return replace(model, **taken)


def pictures(path: Path) -> list[Path]:
    """The picture file at a path, or all below a folder but hidden ones, a gallery's thumbnails and contact sheets."""
    from ldm.jobs.outputs import OUTPUTS

    if not path.exists():
        raise ValueError(f"{path}: No such file or directory")
    if not path.is_dir():
        return [path]
    suffixes = {f".{output.suffix}" for output in OUTPUTS.values()} | {".jpeg"}
    below = (file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    return sorted(file for file in below if not derived(file, path))


def derived(file: Path, root: Path) -> bool:
    """Is a file below a folder hidden, or what a job makes of its pictures?"""
    from ldm.jobs.gallery import THUMBS
    from ldm.jobs.grids import GRIDS

    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return True
    above = [folder for folder in file.parents if folder.is_relative_to(root)]
    return any(folder.name in (THUMBS, GRIDS) and (folder.parent / "job.json").exists() for folder in above)


def claims(files: list[Path]) -> Iterator:
    """What those of the files say that say anything."""
    from ldm.jobs.verify import read_claim

    for file in files:
        try:
            yield read_claim(file)
        except ValueError:
            continue
