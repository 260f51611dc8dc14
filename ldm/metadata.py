"""Image files with metadata: the text of AUTOMATIC1111's web UI, PNG texts and EXIF."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, TiffTags, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ldm.errors import error_text
from ldm.files import atomic_write, read_regular_file
from ldm.sampler_names import A1111_SAMPLERS, A1111_SPACINGS

MIN_INFOTEXT_PAIRS = 3  # a last line of fewer belongs to the prompts
NEGATIVE_PREFIX = "Negative prompt:"


def create_infotext(
    settings: Mapping[str, Any],
    model_name: str,
    model_hash: str,
    version: str,
    vae: tuple[str, str] | None = None,
    loras: Mapping[str, str] | None = None,
    embeddings: Mapping[str, str] | None = None,
) -> str:
    """The text "parameters" that the web UI writes into its PNGs and other tools read, from a request's record.

    `vae` is the name and hash of an autoencoder that replaces the model's own; `loras` and `embeddings` are hashes by
    name. What is None is left out. `clip_skip` counts layers as the web UI does, from the last, 1.
    """
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"{NEGATIVE_PREFIX} {settings['negative_prompt']}")
    upscale, skip = settings["upscale"], settings["clip_skip"]
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": A1111_SAMPLERS.get(settings["sampler"], settings["sampler"]),
        "Schedule type": A1111_SPACINGS.get(settings["spacing"], settings["spacing"]),
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": model_hash[:10],
        "Model": model_name,
        "VAE hash": vae and vae[1][:10],
        "VAE": vae and vae[0],
        "Denoising strength": settings["upscale_strength"] if upscale else settings["strength"],
        "Clip skip": skip or None,
        "RNG": "CPU",
        "Hires upscale": upscale,
        "Hires upscaler": "Lanczos" if upscale else None,
        "Lora hashes": format_hashes(loras),
        "TI hashes": format_hashes(embeddings),
        "Version": f"ldm {version}",
    }
    pairs = (f"{name}: {quote(str(value))}" for name, value in fields.items() if value is not None)
    return "\n".join([*lines, ", ".join(pairs)])


def format_hashes(digests: Mapping[str, str] | None) -> str | None:
    """The first digits of hashes, by name, as one value."""
    return ", ".join(f"{name}: {digits[:12]}" for name, digits in digests.items()) if digests else None


def parse_generation_parameters(text: str) -> dict[str, str]:
    """The values of an infotext by its own names, with "Prompt" and "Negative prompt", by the web UI's rules.

    Lines are stripped; a last line of fewer than three pairs belongs to the prompts. The format cannot express a prompt
    with a line that begins with "Negative prompt:".
    """
    *lines, last = text.strip().split("\n")
    pairs = list(split_pairs(last))
    if len(pairs) < MIN_INFOTEXT_PAIRS:
        lines, pairs = [*lines, last], []
    lines = [line.strip() for line in lines]
    start = next((k for k, line in enumerate(lines) if line.startswith(NEGATIVE_PREFIX)), len(lines))
    negative = [line.removeprefix(NEGATIVE_PREFIX).strip() for line in lines[start:]]
    prompts = {"Prompt": "\n".join(lines[:start]), NEGATIVE_PREFIX[:-1]: "\n".join(negative)}
    return {**prompts, **{name: unquote(value) for name, value in pairs}}


def split_pairs(line: str) -> Iterator[tuple[str, str]]:
    """The `name: value` pairs of a line: it is split at commas outside of JSON strings, which stand for whole values.

    A name has two characters or more: letters, digits, blanks and _ - /. Parts without a name are passed over.
    """
    start = 0
    while start < len(line):
        end = find_or_end(line, ",", start)
        name, colon, _ = line[start:end].partition(":")
        value = min(start + len(name) + 1, len(line))
        while value < len(line) and line[value].isspace():
            value += 1
        if colon and line.startswith('"', value):
            end = json_string_end(line, value) or end
        if colon and is_infotext_name(name.strip()):
            yield name.strip(), line[value:end].strip()
        start = end + 1


def is_infotext_name(name: str) -> bool:
    first, rest = name[:1], name[1:]
    return bool(rest) and is_word(first) and all(is_word(c) or c in " -/" for c in rest)


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def json_string_end(line: str, start: int) -> int | None:
    """The index of the comma, or of the line's end, after the JSON string that begins at `start`; None if none does."""
    try:
        _, end = json.JSONDecoder().raw_decode(line, start)
    except ValueError:
        return None
    comma = find_or_end(line, ",", end)
    return None if line[end:comma].strip() else comma


def find_or_end(text: str, part: str, start: int) -> int:
    return len(text) if (k := text.find(part, start)) < 0 else k


def quote(value: str) -> str:
    """A value as the web UI writes it: in JSON's quotes where a comma, colon, newline or quote would be misread."""
    ambiguous = any(c in value for c in ",:\n") or value.startswith('"')
    return json.dumps(value, ensure_ascii=False) if ambiguous else value


def unquote(value: str) -> str:
    """A value as the web UI reads it."""
    try:
        return json.loads(value) if value[:1] == value[-1:] == '"' else value
    except json.JSONDecodeError:
        return value


def save_png(
    image: Image.Image, path: Path, texts: Mapping[str, str], rename: Callable[[Path, Path], object] = os.replace
) -> None:
    """Publish a PNG with texts in it (iTXt, UTF-8); the same image and texts give the same bytes."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    with atomic_write(path, rename) as draft:
        image.save(draft, "PNG", pnginfo=info)


# EXIF 2.32: the tags of the Exif IFD, of ExifVersion and UserComment in it, and of ImageDescription.
EXIF_IFD, EXIF_VERSION, EXIF_USER_COMMENT, EXIF_IMAGE_DESCRIPTION = 0x8769, 0x9000, 0x9286, 0x010E
TIFF_HEADER = b"MM\0*\0\0\0\x08"  # big-endian, the first directory follows
USER_COMMENT_UNICODE = b"UNICODE\0"  # a UserComment in UTF-16, big-endian, as the web UI writes it


class ImageFormat(NamedTuple):
    """A file format of generated images: its suffix, and options of Pillow's encoder."""

    suffix: str
    options: dict[str, Any]


IMAGE_FORMATS = {
    "png": ImageFormat("png", {}),
    "webp": ImageFormat("webp", {"lossless": True}),
    "jpeg": ImageFormat("jpg", {"quality": 95, "subsampling": 0}),
}


def save_image(
    image: Image.Image,
    path: Path,
    texts: Mapping[str, str],
    image_format: str,
    rename: Callable[[Path, Path], object] = os.replace,
) -> None:
    """Publish an image in one of `IMAGE_FORMATS` with texts, in a PNG as `save_png` writes them, else in its EXIF.

    ValueError where a JPEG's texts are longer than the 64 KiB that its EXIF may have.
    """
    if image_format == "png":
        return save_png(image, path, texts, rename)
    with atomic_write(path, rename) as draft:
        image.save(draft, image_format, exif=build_exif(texts), **IMAGE_FORMATS[image_format].options)


def build_exif(texts: Mapping[str, str]) -> bytes:
    """`parameters` as the UserComment that the web UI writes; `ldm`, which is ASCII, as the image's description.

    A UserComment is of type UNDEFINED (EXIF 2.32, section 4.6.5), which Pillow's `Image.Exif` cannot express.
    """
    comment = USER_COMMENT_UNICODE + texts["parameters"].encode("utf-16-be", "surrogatepass")
    main, sub = ImageFileDirectory_v2(prefix=b"MM"), ImageFileDirectory_v2(prefix=b"MM")
    sub.tagtype |= {EXIF_VERSION: TiffTags.UNDEFINED, EXIF_USER_COMMENT: TiffTags.UNDEFINED}
    sub[EXIF_VERSION], sub[EXIF_USER_COMMENT] = b"0232", comment
    main.tagtype |= {EXIF_IMAGE_DESCRIPTION: TiffTags.ASCII, EXIF_IFD: TiffTags.LONG}
    main[EXIF_IMAGE_DESCRIPTION], main[EXIF_IFD] = texts["ldm"], 0
    start = len(TIFF_HEADER) + len(main.tobytes(len(TIFF_HEADER)))
    main[EXIF_IFD] = start
    return b"Exif\0\0" + TIFF_HEADER + main.tobytes(len(TIFF_HEADER)) + sub.tobytes(start)


def read_image_and_metadata(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """The image (RGB) and the texts of a file in any of `IMAGE_FORMATS`; ValueError where it cannot be decoded."""
    try:
        data = read_regular_file(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error_text(error)}") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            texts = {**read_exif_texts(image.getexif()), **getattr(image, "text", {})}
            return image.convert("RGB"), texts
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image") from None
    except Exception:  # Pillow's readers raise what they like
        raise ValueError(f"{path}: a truncated or damaged image") from None


def read_exif_texts(exif: Image.Exif) -> dict[str, str]:
    """The texts in EXIF: ours, A1111's and Fooocus' `parameters`, and what ComfyUI writes as "prompt:{...}"."""
    comment = exif.get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT) or exif.get(EXIF_USER_COMMENT, b"")  # the latter Fooocus'
    texts = {"parameters": decode_user_comment(comment) if isinstance(comment, bytes) else str(comment)}
    values = [value for value in exif.values() if isinstance(value, str)]
    texts |= {key: rest for key, colon, rest in (v.partition(":") for v in values) if key in ("prompt", "workflow")}
    description = exif.get(EXIF_IMAGE_DESCRIPTION)
    texts["ldm"] = description if isinstance(description, str) and description.startswith("{") else ""
    return {key: text for key, text in texts.items() if text}


def decode_user_comment(comment: bytes) -> str:
    """The text of a UserComment: 8 bytes name its encoding (EXIF 2.32, table 9), which some tools leave out.

    UTF-16 is in either order of bytes: that whose high bytes hold more zeros.
    """
    code, text = comment[:8], comment[8:]
    if code == USER_COMMENT_UNICODE:
        is_little = text[1::2].count(0) > text[::2].count(0)
        return text.decode("utf-16-le" if is_little else "utf-16-be", "replace").rstrip("\0")
    return (text if code in (b"ASCII\0\0\0", bytes(8)) else comment).decode("utf-8", "replace").strip("\0")


def recompress_jpeg(image: Image.Image) -> Image.Image:
    """An image after JPEG compression as `save_image` does it."""
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **IMAGE_FORMATS["jpeg"].options)
    with Image.open(buffer) as decoded:
        return decoded.convert("RGB")
