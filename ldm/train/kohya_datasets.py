"""kohya's data sets as a recipe's: TOML files ([general], [[datasets]], [[datasets.subsets]]), and folders."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config import parse_resolution
from ldm.errors import error_text
from ldm.pipeline.compat import Automatic, Missing, Ours
from ldm.train.command_lines import Argument, Given, Translation, arguments, from_values, read, translate_arguments

COLORS = "prepare recoloured copies of the images"
WHOLE = "data."  # before the options that all subsets share; SUBSET: before those of one folder
SUBSET = "subset."


def read_side(text: str) -> int:
    """A resolution, "512" or "width,height", as the side of a square of that area."""
    side = parse_resolution(text)
    if not isinstance(side, int) or side < 1:
        raise ValueError("a number of pixels, or width,height")
    return side


DATASET_ARGUMENTS: dict[str, Argument] = {  # of the command line and of TOML files
    "resolution": Argument(Ours("data.resolution", read_side)),
    **{name: Argument(Ours(f"data.{name}", int)) for name in ("bucket_reso_steps",)},
    **arguments("min_bucket_reso max_bucket_reso", read(int)),
    "enable_bucket": Argument(read(bool), 0),
    "random_crop": Argument(read(bool), 0),
    "bucket_no_upscale": Argument(Ours("data.bucket_no_upscale", bool), 0),
    "alpha_mask": Argument(Ours("data.masks", lambda _: "alpha"), 0),
    **{name: Argument(Ours(f"subset.{name}", bool), 0) for name in ("shuffle_caption",)},
    **{name: Argument(Ours(f"subset.{name}")) for name in ("caption_prefix", "caption_suffix", "caption_separator")},
    **{name: Argument(Ours(f"subset.{name}")) for name in ("caption_extension", "keep_tokens_separator")},
    "caption_extention": Argument(Ours("subset.caption_extension")),  # kohya's old spelling
    "keep_tokens": Argument(Ours("subset.keep_tokens", int)),
    "flip_aug": Argument(Ours("subset.random_flip", bool), 0),
    "caption_dropout_rate": Argument(Ours("subset.caption_dropout", float)),
    "caption_tag_dropout_rate": Argument(Ours("subset.caption_tag_dropout", float)),
    **arguments("cache_info skip_cache_check", Automatic("images are known by their content"), 0),
    **arguments("color_aug", Missing(COLORS), 0),
    **arguments("face_crop_aug_range", Missing("crop the images before")),
    **arguments("resize_interpolation", Missing("leave it out: images are resized by lanczos"), 1, ("lanczos",)),
    **arguments("secondary_separator", Missing("write tags that belong together without the caption's separator")),
    **arguments("enable_wildcard", Missing("write one caption for each image; metadata may list several"), 0),
    **arguments("token_warmup_step", Missing("leave it out: all tags are trained from the first step")),
    **arguments("token_warmup_min", Automatic("of token_warmup_step")),
    **arguments("caption_dropout_every_n_epochs", Missing("write caption_dropout_rate")),
    **arguments("validation_split", Missing("put held-out images into a folder: objective.validation_data_dir")),
    **arguments("validation_seed", Automatic("of validation_split")),
}
TOML_ARGUMENTS: dict[str, Argument] = {  # names that TOML files have beside these
    **DATASET_ARGUMENTS,
    "batch_size": Argument(read(int)),
    "num_repeats": Argument(Ours("subset.repeats", int)),
    "class_tokens": Argument(Ours("subset.instance_prompt")),
    "is_reg": Argument(Ours("subset.is_reg", bool), 0),
    "image_dir": Argument(read()),
    "metadata_file": Argument(Ours("subset.metadata_file")),
    **arguments("network_multiplier", Missing("leave it out"), 1, ("1.0", "1")),
    **arguments("custom_attributes", Automatic("kept for other programs")),
    **arguments("conditioning_data_dir", Missing("masks lie beside the images, as name.mask.png: data.masks: file")),
}
DEFAULTS = {"resolution": "512", "caption_extension": ".caption", "min_bucket_reso": "256", "max_bucket_reso": "1024"}
OWN_FIELDS = ("repeats", "is_reg", "metadata_file", "caption_dropout")  # of a subset alone, or not of the data


def read_dataset_config(path: Path, given: Given) -> Iterator[dict[str, Any]]:
    """What each subset of a TOML file is given, its own options before its dataset's, [general]'s and `given`.

    ValueError names the file, the table and the key.
    """
    document = load_toml(path)
    if unknown := document.keys() - {"general", "datasets"}:
        raise ValueError(f"{path}: {min(unknown)}: only [general] and [[datasets]] are known")
    general = _read_table(document.get("general", {}), f"{path}: [general]")
    datasets = document.get("datasets", [])
    if not isinstance(datasets, list) or not datasets:
        raise ValueError(f"{path}: no [[datasets]] in it")
    for k, dataset in enumerate(datasets, 1):
        where = f"{path}: datasets {k}"
        subsets = dataset.pop("subsets", []) if isinstance(dataset, dict) else None
        if not isinstance(subsets, list) or not subsets:
            raise ValueError(f"{where}: no [[datasets.subsets]] in it")
        shared = {**given, **general, **_read_table(dataset, where)}
        for n, subset in enumerate(subsets, 1):
            own = _read_table(subset, f"{where}, subset {n}")
            if "image_dir" not in own:
                raise ValueError(f"{where}, subset {n}: image_dir is needed")
            yield {**shared, **own}


def load_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ValueError in one line after its name."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error_text(error)}") from None


def _read_table(table: Any, where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: a table of options is needed")
    false = {key: False for key, value in table.items() if value is False}  # which takes back what is true above
    return {**from_values(table, TOML_ARGUMENTS, where), **false}


def list_folder_subsets(
    train_data_dir: str, reg_data_dir: str | None, metadata_file: str | None, repeats: int | None, given: Given
) -> Iterator[dict[str, Any]]:
    """What the folders of a command line are given, as of a TOML file."""
    own: dict[str, Any] = {} if metadata_file is None else {"metadata_file": metadata_file}
    own |= {} if repeats is None else {"num_repeats": str(repeats)}
    yield {**given, **own, "image_dir": train_data_dir}
    if reg_data_dir:
        yield {**given, "image_dir": reg_data_dir, "is_reg": True}


def combine_subsets(subsets: Sequence[Mapping[str, Any]]) -> tuple[Translation, int | None]:
    """The data of a recipe, and the batch size, if the subsets say one.

    What all folders have in common becomes the data's own. ValueError for what only one dataset as a whole can have
    here, such as the resolution, where it differs.
    """
    parts = []
    for subset in subsets:
        given = {name: value for name, value in {**DEFAULTS, **subset}.items() if value is not False}
        parts.append(translate_arguments(given, TOML_ARGUMENTS))
    whole = [_whole_options(part) for part in parts]
    for name in {name for options in whole for name in options}:
        values = list(dict.fromkeys(str(options.get(name)) for options in whole))
        if len(values) > 1:
            plain = name.removeprefix(WHOLE)
            raise ValueError(f"{plain}: {' and '.join(values)}: one for all datasets: train them one after another")
    rows = [
        {name.removeprefix(SUBSET): value for name, value in part.options.items() if name.startswith(SUBSET)}
        for part in parts
    ]
    options = {**whole[0], "data.train_data_dir": [part.values["image_dir"] for part in parts]}
    options |= _hoist(rows)
    if any(rows):
        options["data.subsets"] = rows
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    batch = options.pop("batch_size", None)
    return Translation(options, {}, notes), batch


def _whole_options(part: Translation) -> dict[str, Any]:
    """The options that all subsets share, by dotted name, of one subset; kohya's images are cropped to one size."""
    values = part.values
    options = {name: value for name, value in part.options.items() if name.startswith(WHOLE)}
    side = options["data.resolution"]
    bounds = {"min": side, "max": side}
    if values.get("enable_bucket"):
        bounds = {"min": min(side, values["min_bucket_reso"]), "max": max(side, values["max_bucket_reso"])}
    options |= {f"data.{end}_bucket_reso": value for end, value in bounds.items()}
    if not values.get("enable_bucket"):
        options["data.bucket_reso_steps"] = next(step for step in (64, 32, 16, 8, side) if side % step == 0)
    return {**options, "data.center_crop": not values.get("random_crop"), "batch_size": values.get("batch_size")}


def _hoist(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Take the options that all subsets have in common out of them."""
    options = {}
    for name in list(rows[0]):
        values = [row.get(name) for row in rows]
        if any(value != values[0] for value in values) or name in OWN_FIELDS[:-1]:
            continue
        for row in rows:
            row.pop(name)
        options[f"objective.{name}" if name in OWN_FIELDS else f"data.{name}"] = values[0]
    return options
