"""What is wrong with captions that are there: cut, broken, or saying nothing about their pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from ldm.data.sources import READABLE_IMAGE_SUFFIXES, DatasetIssue, ImageSample
from ldm.nn.prompts import PlaceholderTokens, split_on_tokens
from ldm.nn.text_encoders import CLIPTokenizer, tokenize

HTML_TAGS = "a|b|i|u|p|br|div|em|strong|span|font|img|li|ul|ol|h[1-6]|table|tr|td|script|style"
MARKUP_PATTERN = re.compile(rf"</?(?:{HTML_TAGS})\b[^<>]*>|&(?:[a-z]{{2,8}}|#\d{{1,6}});|https?://", re.IGNORECASE)
CAMERA_FILE_PATTERN = re.compile(r"(?:img|dsc[nf]?|pxl|mvi|screenshot)[ _-]?\d\S*", re.IGNORECASE)
PLACEHOLDER_CAPTIONS = {
    "none",
    "null",
    "nan",
    "n/a",
    "na",
    "todo",
    "tbd",
    "untitled",
    "unknown",
    "caption",
    "no caption",
}
MIN_CLASS_IMAGES = 4  # pictures of one class: fewer show its places rather than itself


def check_captions(samples: Sequence[ImageSample], instance_prompt: str | None) -> Iterator[DatasetIssue]:
    """The faults of the captions of samples; `parse_nonblank_text` is the one that the recipe gives to pictures without any."""
    for sample in samples:
        for kind, check in CAPTION_CHECKS.items():
            if what := check(sample.caption, PurePosixPath(sample.key).stem):
                yield DatasetIssue(kind, sample.key, what)
    yield from _check_shared_caption(samples, instance_prompt)
    yield from _check_class_sizes(samples, instance_prompt)


def check_tokenization(
    samples: Sequence[ImageSample], tokenizer: CLIPTokenizer, placeholder_tokens: PlaceholderTokens
) -> Iterator[DatasetIssue]:
    """What is wrong with captions as a model reads them: too long, not to be spelled, without the words it learns.

    `words` are the new ones, with the ids of their vectors.
    """
    room = tokenizer.model_max_length
    for sample in samples:
        try:
            length = count_tokens(sample.caption, tokenizer, placeholder_tokens)
        except ValueError as error:
            yield DatasetIssue("unspellable", sample.key, str(error).removeprefix("prompt: "))
            continue
        if length > room:
            yield DatasetIssue("cut caption", sample.key, f"{length} tokens, of which {room} are read")
        if placeholder_tokens and all(
            isinstance(stretch, str) for stretch in split_on_tokens(sample.caption, placeholder_tokens)
        ):
            yield DatasetIssue(
                "no new word", sample.key, f"does not say {' or '.join(placeholder_tokens)}: nothing is learnt from it"
            )


def count_tokens(caption: str, tokenizer: CLIPTokenizer, placeholder_tokens: PlaceholderTokens) -> int:
    """How many tokens a caption is, with its beginning and end; ValueError for what cannot be spelled."""
    return 2 + sum(
        len(tokenize(tokenizer, s) if isinstance(s, str) else s) for s in split_on_tokens(caption, placeholder_tokens)
    )


def detect_file_name(caption: str, stem: str) -> str | None:
    """Is it the name of a file?"""
    named = PurePosixPath(caption).suffix.lower() in READABLE_IMAGE_SUFFIXES or CAMERA_FILE_PATTERN.fullmatch(caption)
    same = caption == stem and re.search(r"[\d_]", stem)
    return f"{caption!r} is the name of a file" if named or same else None


def detect_markup(caption: str, stem: str) -> str | None:
    """Does it hold HTML or an address?"""
    found = MARKUP_PATTERN.search(caption)
    return f"holds {found[0][:40]!r}" if found else None


def detect_mojibake(caption: str, stem: str) -> str | None:
    """Was UTF-8 read as another encoding, or could a character not be read?"""
    broken = [c for c in caption if c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\t\r\n")]
    if broken:
        return f"holds {broken[0]!r}"
    for encoding in ("cp1252", "latin-1"):
        try:
            meant = caption.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        return f"{caption[:40]!r} seems to mean {meant[:40]!r}" if meant != caption else None
    return None


def detect_placeholder_caption(caption: str, stem: str) -> str | None:
    """Does it stand for a caption that is not there?"""
    plain = caption.strip(" .,_-<>[]()").casefold()
    says = plain not in PLACEHOLDER_CAPTIONS and any(
        c.isalnum() or ord(c) > 0xFFFF for c in caption
    )  # or a drawing, as emoji are
    return None if says else f"{caption!r} says nothing"


def detect_multiple_lines(caption: str, stem: str) -> str | None:
    """Is it more than one line, of which other trainers read the first?"""
    lines = len(caption.splitlines())
    return f"{lines} lines: all are read, as one caption" if lines > 1 else None


CAPTION_CHECKS: dict[str, Callable[[str, str], str | None]] = {
    "file name": detect_file_name,
    "markup": detect_markup,
    "mojibake": detect_mojibake,
    "says nothing": detect_placeholder_caption,
    "several lines": detect_multiple_lines,
}


def _check_shared_caption(samples: Sequence[ImageSample], instance_prompt: str | None) -> Iterator[DatasetIssue]:
    """One caption for all pictures that the recipe did not ask for."""
    told = {sample.caption for sample in samples}
    if len(samples) > 1 and len(told) == 1 and told != {instance_prompt} and not any(map(kohya_class_folder, samples)):
        yield DatasetIssue("one caption", "captions", f"all {len(samples)} are {samples[0].caption!r}")


def _check_class_sizes(samples: Sequence[ImageSample], instance_prompt: str | None) -> Iterator[DatasetIssue]:
    """Classes of DreamBooth with too few pictures: kohya's folders, and what has the recipe's one prompt."""
    classes: dict[str, int] = {}
    for sample in samples:
        name = kohya_class_folder(sample) or (instance_prompt if sample.caption == instance_prompt else None)
        if name:
            classes[name] = classes.get(name, 0) + 1
    for name, count in classes.items():
        if count < MIN_CLASS_IMAGES:
            yield DatasetIssue(
                "few pictures", name, f"{count} of this class; {MIN_CLASS_IMAGES} or more show it from more sides"
            )


def kohya_class_folder(sample: ImageSample) -> str | None:
    """The folder `<repeats>_<class tokens>` of a sample whose caption is its class tokens."""
    folder = sample.key.partition(":")[2] or sample.key
    name = folder.split("/")[0]
    repeats, _, tokens = name.partition("_")
    return name if "/" in folder and repeats.isdigit() and tokens.strip() == sample.caption else None
