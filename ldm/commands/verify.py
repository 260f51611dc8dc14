"""`ldm verify`: do images regenerate from their own metadata?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.options import JsonOption, ModelOptions, expand_options

if TYPE_CHECKING:
    from ldm.jobs.verify import RecordedImage
    from ldm.pipeline.pipeline import Pipeline


@expand_options
def verify(
    *,
    path: Annotated[Path, typer.Argument(metavar="IMAGE|DIR", show_default=False)],
    image: Annotated[Path | None, typer.Option(help="Initial image (img2img).")] = None,
    mask: Annotated[Path | None, typer.Option(help="Inpainting mask.")] = None,
    model: ModelOptions,
    as_json: JsonOption = False,
) -> None:
    """Regenerate an image, or all in a folder, from its metadata, and compare: status 0 if all are equal, else 1.

    Equal is within 1 of 255 in each pixel (8 in a JPEG). Where the weights, the VAE, an adapter or an embedding differ,
    the output says so. The model is picto unless given, whatever the metadata name; its options, such as --prediction,
    and the dtype are those of the first image's metadata unless given.
    """
    files = find_image_files(path)
    from ldm.errors import one_line, printable
    from ldm.image_io import read_image, read_mask
    from ldm.jobs.verify import read_recorded_image, verify_images

    original = next(iter_recorded_images(files), None) if path.is_dir() else read_recorded_image(path)
    if original is None:
        raise ValueError(f"{path}: no image of ldm in it")
    pipe = load_recorded_model(model, original)
    inputs = None if image is None else read_image(image), None if mask is None else read_mask(mask)
    all_equal = True
    for result in verify_images(files, pipe, *inputs):
        all_equal &= result.equal
        if as_json:
            print(json.dumps({**result._asdict(), "file": str(result.file)}), flush=True)
        else:
            print("ok  " if result.equal else "FAIL", f"{printable(result.file)}: {one_line(result.said)}", flush=True)
    raise typer.Exit(0 if all_equal else 1)


def load_recorded_model(model: ModelOptions, original: RecordedImage) -> Pipeline:
    """The model of the options, those not given as an image's record has them where the model can be read so.

    ValueError where no model is given and the image was generated with another one than picto.
    """
    record = original.record
    recorded = {**record.load.model_dump(), "dtype": record.dtype}
    restored = {
        name: value
        for name, value in recorded.items()
        if value is not None and getattr(model, name) == getattr(ModelOptions, name)
    }
    try:
        pipe = replace(model, **restored).load_pipeline()
    except ValueError:  # of a model that is read otherwise
        pipe = model.load_pipeline()
    if not model.model and (digest := record.weights.get("unet")) != pipe.model.weight_hashes["unet"]:
        raise ValueError(
            f"{original.file}: generated with {record.model}, U-Net {str(digest)[:10]}: give it by --model"
        )
    return pipe


def find_image_files(path: Path) -> list[Path]:
    """The image file at a path, or all below a folder but hidden ones, a gallery's thumbnails and contact sheets."""
    from ldm.jobs.manifest import check_job_folder
    from ldm.metadata import IMAGE_FORMATS

    if not path.exists():
        raise ValueError(f"{path}: No such file or directory")
    if not path.is_dir():
        return [path]
    if (path / "job.json").exists():
        check_job_folder(path)
    suffixes = {f".{output.suffix}" for output in IMAGE_FORMATS.values()} | {".jpeg"}
    below = (file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    return sorted(file for file in below if not is_hidden_or_derived(file, path))


def is_hidden_or_derived(file: Path, root: Path) -> bool:
    """Is a file below a folder hidden, or derived from a job's images?"""
    from ldm.jobs.contact_sheets import GRID_FOLDER
    from ldm.jobs.gallery import THUMBNAIL_FOLDER

    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return True
    above = [folder for folder in file.parents if folder.is_relative_to(root)]
    return any(
        folder.name in (THUMBNAIL_FOLDER, GRID_FOLDER) and (folder.parent / "job.json").exists() for folder in above
    )


def iter_recorded_images(files: list[Path]) -> Iterator:
    """The images and records of those files that have a record."""
    from ldm.jobs.verify import read_recorded_image

    for file in files:
        try:
            yield read_recorded_image(file)
        except ValueError:
            continue
