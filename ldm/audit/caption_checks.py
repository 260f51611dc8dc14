"""Checks of captions: truncated, garbled, or without content."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from ldm.data.folders import split_key
from ldm.data.sources import READABLE_IMAGE_SUFFIXES, DatasetIssue, ImageSample
from ldm.nn.prompts import PlaceholderTokens, split_on_tokens
from ldm.nn.text_encoders import tokenize_with_placeholders
from ldm.nn.tokenizer import CLIPTokenizer

HTML_TAGS = "a|b|i|u|p|br|div|em|strong|span|font|img|li|ul|ol|h[1-6]|table|tr|td|script|style"
MARKUP_PATTERN = re.compile(rf"</?(?:{HTML_TAGS})\b[^<>]*>|&(?:[a-z]{{2,8}}|#\d{{1,6}});|https?://", re.IGNORECASE)
CAMERA_FILE_PATTERN = re.compile(r"(?:img|dsc[nf]?|pxl|mvi|screenshot)[ _-]?\d\S*", re.IGNORECASE)
# fmt: off
PLACEHOLDER_CAPTIONS = {"none", "null", "nan", "n/a", "na", "todo", "tbd", "untitled", "unknown", "caption",
                        "no caption"}
# fmt: on
MIN_CLASS_IMAGES = 4  # from fewer images of a class a model learns their backgrounds


def check_captions(samples: Sequence[ImageSample], instance_prompt: str | None) -> Iterator[DatasetIssue]:
    """Issues of captions; `instance_prompt` is the recipe's for images that have none."""
    for sample in (sample for sample in samples if sample.caption):
        for kind, check in CAPTION_CHECKS.items():
            if what := check(sample.caption, PurePosixPath(sample.key).stem):
                yield DatasetIssue(kind, sample.key, what)
    yield from _check_shared_caption(samples, instance_prompt)
    yield from _check_class_sizes(samples, instance_prompt)


def check_tokenization(
    samples: Sequence[ImageSample], tokenizer: CLIPTokenizer, placeholder_tokens: PlaceholderTokens
) -> Iterator[DatasetIssue]:
    """Issues of captions as token ids: too long, not tokenizable, or without the placeholder tokens to be learned."""
    max_length = tokenizer.model_max_length
    for sample in samples:
        try:
            length = count_tokens(sample.caption, tokenizer, placeholder_tokens)
        except ValueError as error:
            yield DatasetIssue("untokenizable", sample.key, str(error).removeprefix("prompt: "))
            continue
        if length > max_length:
            yield DatasetIssue("truncated caption", sample.key, f"{length} tokens, of which {max_length} are used")
        if placeholder_tokens and all(isinstance(s, str) for s in split_on_tokens(sample.caption, placeholder_tokens)):
            what = f"does not contain {' or '.join(placeholder_tokens)}: nothing is learned from it"
            yield DatasetIssue("no placeholder token", sample.key, what)


def count_tokens(caption: str, tokenizer: CLIPTokenizer, placeholder_tokens: PlaceholderTokens) -> int:
    """A caption's tokens, with those of start and end. ValueError for characters that the vocabulary lacks."""
    return 2 + len(tokenize_with_placeholders(tokenizer, caption, placeholder_tokens))


def _detect_file_name(caption: str, stem: str) -> str | None:
    named = PurePosixPath(caption).suffix.lower() in READABLE_IMAGE_SUFFIXES or CAMERA_FILE_PATTERN.fullmatch(caption)
    same = caption == stem and re.search(r"[\d_]", stem)
    return f"{caption!r} is the name of a file" if named or same else None


def _detect_markup(caption: str, stem: str) -> str | None:
    match = MARKUP_PATTERN.search(caption)
    return f"contains {match[0][:40]!r}" if match else None


def _detect_mojibake(caption: str, stem: str) -> str | None:
    broken = [c for c in caption if c == "\ufffd" or (unicodedata.category(c) == "Cc" and c not in "\t\r\n")]
    if broken:
        return f"contains {broken[0]!r}"
    for encoding in ("cp1252", "latin-1"):
        try:
            meant = caption.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        return f"{caption[:40]!r} seems to mean {meant[:40]!r}" if meant != caption else None
    return None


def _detect_placeholder_caption(caption: str, stem: str) -> str | None:
    plain = caption.strip(" .,_-<>[]()").casefold()
    has_content = plain not in PLACEHOLDER_CAPTIONS and any(c.isalnum() or ord(c) > 0xFFFF for c in caption)
    return None if has_content else f"{caption!r} describes nothing"


def _detect_multiple_lines(caption: str, stem: str) -> str | None:
    lines = len(caption.splitlines())
    return f"{lines} lines: all are used, as one caption" if lines > 1 else None


CAPTION_CHECKS: dict[str, Callable[[str, str], str | None]] = {
    "file name": _detect_file_name,
    "markup": _detect_markup,
    "mojibake": _detect_mojibake,
    "placeholder caption": _detect_placeholder_caption,
    "multiple lines": _detect_multiple_lines,
}


def _check_shared_caption(samples: Sequence[ImageSample], instance_prompt: str | None) -> Iterator[DatasetIssue]:
    """One caption for all images that is neither the instance prompt nor class tokens."""
    captions = {sample.caption for sample in samples}
    shared = len(samples) > 1 and len(captions) == 1 and captions != {instance_prompt}
    if shared and not any(map(kohya_class_folder, samples)):
        yield DatasetIssue("one caption", "captions", f"all {len(samples)} are {samples[0].caption!r}")


def _check_class_sizes(samples: Sequence[ImageSample], instance_prompt: str | None) -> Iterator[DatasetIssue]:
    """DreamBooth classes of too few images: kohya's folders, and the images of the instance prompt."""
    names = (kohya_class_folder(s) or (instance_prompt if s.caption == instance_prompt else None) for s in samples)
    for name, count in Counter(filter(None, names)).items():
        if count < MIN_CLASS_IMAGES:
            yield DatasetIssue("few images", name, f"{count} of this class; {MIN_CLASS_IMAGES} or more are better")


def kohya_class_folder(sample: ImageSample) -> str | None:
    """The folder `<repeats>_<class tokens>` of a sample whose caption is its class tokens."""
    name, slash, _ = split_key(sample.key)[1].partition("/")
    repeats, _, tokens = name.partition("_")
    return name if slash and repeats.isdigit() and tokens.strip() == sample.caption else None
