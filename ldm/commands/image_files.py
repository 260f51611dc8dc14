"""Files of generated images: their names by a pattern, their format, and the preview of one that is being generated."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import suggest

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.request import Request
    from ldm.pipeline.scheduler import StepEnd

DEFAULT_PATTERN = "{number}-{prompt}-{seed}"
FORMAT_OF_SUFFIX = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
OTHER_SUFFIXES = ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic", ".jp2", ".svg", ".pdf", ".mp4"
FIELD_PATTERN = re.compile(r"\{(\w*)\}|\[(\w*)\]")  # the latter is the web UI's
NAME_FIELDS: dict[str, Callable[[Request], object]] = {
    "prompt": lambda r: slug(r.prompt) or "image",
    "negative": lambda r: slug(r.negative_prompt or ""),
    "seed": lambda r: r.seed,
    "steps": lambda r: r.num_inference_steps,
    "guidance": lambda r: f"{r.guidance_scale:g}",
    "sampler": lambda r: r.sampler,
    "spacing": lambda r: r.spacing,
    "width": lambda r: r.width,
    "height": lambda r: r.height,
}
RUN_FIELDS = "number", "model", "date", "time"  # of no request
FIELD_ALIASES = {
    "cfg": "guidance",
    "guidance_scale": "guidance",
    "num_inference_steps": "steps",
    "scheduler": "spacing",
    "sampler_name": "sampler",
    "negative_prompt": "negative",
    "model_name": "model",
    **dict.fromkeys(("index", "generation_number", "batch_number"), "number"),
    **dict.fromkeys(("prompt_spaces", "prompt_words", "prompt_no_styles"), "prompt"),
}
MAX_NAME_BYTES = 200
PREVIEW_INTERVAL, PREVIEW_SHARE = 1.0, 0.1  # seconds between two previews; the most of the time that they may take


def slug(text: str) -> str:
    """Words of a prompt, safe in any file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].rstrip("-")


@dataclass(frozen=True)
class ImageFiles:
    """Where images are written: a folder, the pattern of their names there or one file's name, and a format.

    Fields of a pattern stand in braces, or in brackets as in the web UI.
    """

    folder: Path
    image_format: str = "png"
    pattern: str = DEFAULT_PATTERN
    name: str = ""  # of one image, which replaces a file
    model: str = ""

    @classmethod
    def from_options(cls, out: Path, image_format: str | None, pattern: str | None, model: str) -> ImageFiles:
        """ValueError names the option that is wrong."""
        from ldm.errors import choose
        from ldm.metadata import IMAGE_FORMATS

        own = FORMAT_OF_SUFFIX.get(out.suffix.lower()) if not out.is_dir() else None
        if own is None and out.suffix.lower() in OTHER_SUFFIXES and not out.is_dir():
            raise ValueError(f"--out {out}: images are written as png, webp or jpeg, or to a folder")
        image_format = {"jpg": "jpeg"}.get(image_format or "", image_format) or own or "png"
        choose(IMAGE_FORMATS, image_format, "--format")
        if own is None:
            return cls(out, image_format, parse_name_pattern(pattern or DEFAULT_PATTERN), "", model)
        if own != image_format or pattern:
            raise ValueError(f"--out {out}: is one file: {'--name-pattern' if pattern else '--format'} needs a folder")
        return cls(out.parent, image_format, name=out.name, model=model)

    def check_count(self, images: int) -> None:
        """ValueError for several images in one file."""
        if self.name and images > 1:
            raise ValueError(f"--out {self.folder / self.name}: is one file, for {images} images: give a folder")

    def make_names(self, requests: Sequence[Request]) -> list[str]:
        """A file name for each request, none of which is another's or a file's."""
        if self.name:
            return [self.name]
        suffix = {"jpeg": ".jpg"}.get(self.image_format, f".{self.image_format}")
        first, taken = self.next_number(), {path.name for path in self.folder.iterdir()}
        digits = max(4, len(str(first + len(requests))))
        now = time.strftime("%Y-%m-%d %H-%M-%S").split(" ")
        names, copies = list[str](), dict[str, Iterator[int]]()
        for k, request in enumerate(requests, first):
            run = dict(zip(RUN_FIELDS, (f"{k:0{digits}d}", self.model, *now), strict=True))
            stem = format_name(self.pattern, request, run)
            stem = name = stem.encode(errors="ignore")[:MAX_NAME_BYTES].decode(errors="ignore")
            while f"{name}{suffix}" in taken:
                name = f"{stem}-{next(copies.setdefault(stem, count(2)))}"
            name += suffix
            taken.add(name)
            names.append(name)
        return names

    def next_number(self) -> int:
        """The number after the highest of a folder's images, so that none is overwritten."""
        parts = FIELD_PATTERN.split(self.pattern)[::3]
        fields = [match[1] for match in FIELD_PATTERN.finditer(self.pattern)]
        groups = [r"(\d{4,7})" if name == "number" else ".*" for name in fields]
        if r"(\d{4,7})" not in groups:
            return 0
        groups = [g if g == ".*" or g not in groups[:k] else r"\d{4,7}" for k, g in enumerate(groups)]
        stem = "".join(re.escape(part) + group for part, group in zip(parts, [*groups, ""], strict=True))
        regex = re.compile(stem + r"\.(?:png|jpe?g|webp)", re.DOTALL)
        numbers = (int(match[1]) for path in self.folder.iterdir() if (match := regex.fullmatch(path.name)))
        return max(numbers, default=-1) + 1

    def write(self, requests: Sequence[Request], pipe: Pipeline, images: Any) -> list[Path]:
        """Write (index, image) as they come; the files in the order of the requests.

        If another run has taken a name meanwhile, the remaining images get other names.
        """
        from ldm.files import rename_noreplace
        from ldm.metadata import save_image

        names, files = self.make_names(requests), dict[int, Path]()
        rename = os.replace if self.name else rename_noreplace
        for k, image in images:
            texts = pipe.metadata(requests[k], self.model)
            while k not in files:
                try:
                    save_image(image, self.folder / names[k], texts, self.image_format, rename)
                    files[k] = self.folder / names[k]
                except FileExistsError:
                    names = self.make_names(requests)
        return [files[k] for k in range(len(requests))]


def format_name(pattern: str, request: Request, run: Mapping[str, str]) -> str:
    """A name by a pattern, in whose fields stands nothing that names of files cannot hold."""

    def text(match: re.Match[str]) -> str:
        value = run[match[1]] if match[1] in run else NAME_FIELDS[match[1]](request)
        return re.sub(r"[^\w.+-]+", "-", str(value))

    return FIELD_PATTERN.sub(text, pattern)


def parse_name_pattern(pattern: str) -> str:
    """A pattern with its fields by our names, in braces; ValueError for an unknown one, and for what is no name."""
    known = {*NAME_FIELDS, *RUN_FIELDS}

    def rename(match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        if (name := FIELD_ALIASES.get(name, name)) not in known:
            fields = ", ".join(f"{{{field}}}" for field in (*NAME_FIELDS, *RUN_FIELDS))
            raise ValueError(f"--name-pattern: {match[0]}{suggest(name, known)} (fields are {fields})")
        return f"{{{name}}}"

    renamed = FIELD_PATTERN.sub(rename, pattern)
    rest = FIELD_PATTERN.sub("x", renamed)
    if not rest.strip(". ") or rest.startswith(".") or re.search(r'[/\\\0<>:"|?*{}\x00-\x1f]', rest):
        raise ValueError(f"--name-pattern {pattern!r:.80}: is no name of a file; a folder is given by --out")
    return renamed


@dataclass
class Preview:
    """A file that shows an image while it is sampled: the network's estimate of the clean image, decoded.

    At most once in `PREVIEW_INTERVAL`, and in `PREVIEW_SHARE` of the time.
    """

    path: Path
    pipe: Pipeline
    next_time: float = field(default=0.0, init=False)

    @staticmethod
    def check_path(path: Path | None) -> None:
        """ValueError where no image can be written there."""
        from ldm.files import check_creatable_dir

        if path is not None and (path.suffix.lower() not in FORMAT_OF_SUFFIX or path.is_dir()):
            raise ValueError(f"--preview {path}: must be a file that ends in {', '.join(FORMAT_OF_SUFFIX)}")
        if path is not None:
            try:
                check_creatable_dir(path.parent)
            except ValueError as error:
                raise ValueError(f"--preview {error}") from None

    def __call__(self, step: StepEnd) -> None:
        if time.monotonic() < self.next_time:
            return
        from ldm.image_io import to_pil

        start = time.monotonic()
        (image,) = to_pil(self.pipe.batch_scheduler.batched_decode(step.x0[:1]))
        self.write(image)
        seconds = time.monotonic() - start
        self.next_time = time.monotonic() + max(PREVIEW_INTERVAL, seconds / PREVIEW_SHARE)

    def write(self, image: Image.Image) -> None:
        """Replace the file as a whole."""
        from ldm.files import atomic_write

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as draft:
            image.save(draft, FORMAT_OF_SUFFIX[self.path.suffix.lower()])
