"""What is wrong with captions that are there: cut, broken, or saying nothing about their pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath

from ldm.data.samples import PICTURES, Fault, Sample
from ldm.nn.prompts import Words, divided
from ldm.nn.text import CLIPTokenizer, spelled

TAGS = "a|b|i|u|p|br|div|em|strong|span|font|img|li|ul|ol|h[1-6]|table|tr|td|script|style"
MARKUP = re.compile(rf"</?(?:{TAGS})\b[^<>]*>|&(?:[a-z]{{2,8}}|#\d{{1,6}});|https?://", re.IGNORECASE)
CAMERA = re.compile(r"(?:img|dsc[nf]?|pxl|mvi|screenshot)[ _-]?\d\S*", re.IGNORECASE)
EMPTY_WORDS = {"none", "null", "nan", "n/a", "na", "todo", "tbd", "untitled", "unknown", "caption", "no caption"}
FEW = 4  # pictures of one class: fewer show its places rather than itself


def caption_faults(samples: Sequence[Sample], prompt: str | None) -> Iterator[Fault]:
    """The faults of the captions of samples; `prompt` is the one that the recipe gives to pictures without any."""
    for sample in samples:
        for kind, check in CHECKS.items():
            if what := check(sample.caption, PurePosixPath(sample.key).stem):
                yield Fault(kind, sample.key, what)
    yield from _alike(samples, prompt)
    yield from _few(samples, prompt)


def reading_faults(samples: Sequence[Sample], tokenizer: CLIPTokenizer, words: Words) -> Iterator[Fault]:
    """What is wrong with captions as a model reads them: too long, not to be spelled, without the words it learns.

    `words` are the new ones, with the ids of their vectors.
    """
    room = tokenizer.model_max_length
    for sample in samples:
        try:
            length = token_count(sample.caption, tokenizer, words)
        except ValueError as error:
            yield Fault("unspellable", sample.key, str(error).removeprefix("prompt: "))
            continue
        if length > room:
            yield Fault("cut caption", sample.key, f"{length} tokens, of which {room} are read")
        if words and all(isinstance(stretch, str) for stretch in divided(sample.caption, words)):
            yield Fault("no new word", sample.key, f"does not say {' or '.join(words)}: nothing is learnt from it")


def token_count(caption: str, tokenizer: CLIPTokenizer, words: Words) -> int:
    """How many tokens a caption is, with its beginning and end; ValueError for what cannot be spelled."""
    return 2 + sum(len(spelled(tokenizer, s) if isinstance(s, str) else s) for s in divided(caption, words))


def file_name(caption: str, stem: str) -> str | None:
    """Is it the name of a file?"""
    named = PurePosixPath(caption).suffix.lower() in PICTURES or CAMERA.fullmatch(caption)
    same = caption == stem and re.search(r"[\d_]", stem)
    return f"{caption!r} is the name of a file" if named or same else None


def markup(caption: str, stem: str) -> str | None:
    """Does it hold HTML or an address?"""
    found = MARKUP.search(caption)
    return f"holds {found[0][:40]!r}" if found else None


def mojibake(caption: str, stem: str) -> str | None:
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


def wordless(caption: str, stem: str) -> str | None:
    """Does it stand for a caption that is not there?"""
    plain = caption.strip(" .,_-<>[]()").casefold()
    says = plain not in EMPTY_WORDS and any(
        c.isalnum() or ord(c) > 0xFFFF for c in caption
    )  # or a drawing, as emoji are
    return None if says else f"{caption!r} says nothing"


def several_lines(caption: str, stem: str) -> str | None:
    """Is it more than one line, of which other trainers read the first?"""
    lines = len(caption.splitlines())
    return f"{lines} lines: all are read, as one caption" if lines > 1 else None


CHECKS: dict[str, Callable[[str, str], str | None]] = {
    "file name": file_name,
    "markup": markup,
    "mojibake": mojibake,
    "says nothing": wordless,
    "several lines": several_lines,
}


def _alike(samples: Sequence[Sample], prompt: str | None) -> Iterator[Fault]:
    """One caption for all pictures that the recipe did not ask for."""
    told = {sample.caption for sample in samples}
    if len(samples) > 1 and len(told) == 1 and told != {prompt} and not any(map(class_of, samples)):
        yield Fault("one caption", "captions", f"all {len(samples)} are {samples[0].caption!r}")


def _few(samples: Sequence[Sample], prompt: str | None) -> Iterator[Fault]:
    """Classes of DreamBooth with too few pictures: kohya's folders, and what has the recipe's one prompt."""
    classes: dict[str, int] = {}
    for sample in samples:
        name = class_of(sample) or (prompt if sample.caption == prompt else None)
        if name:
            classes[name] = classes.get(name, 0) + 1
    for name, count in classes.items():
        if count < FEW:
            yield Fault("few pictures", name, f"{count} of this class; {FEW} or more show it from more sides")


def class_of(sample: Sample) -> str | None:
    """The folder `<repeats>_<class tokens>` of a sample whose caption is its class tokens."""
    folder = sample.key.partition(":")[2] or sample.key
    name = folder.split("/")[0]
    repeats, _, tokens = name.partition("_")
    return name if "/" in folder and repeats.isdigit() and tokens.strip() == sample.caption else None
