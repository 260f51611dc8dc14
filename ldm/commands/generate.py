"""`ldm generate`: images from prompts."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.options import (
    CountOption,
    JsonOption,
    ModelOptions,
    RequestOptions,
    StrictOption,
    apply_strictness,
    check_out_folder,
    check_range,
    expand_options,
    load_pipeline_and_request,
    parse_embedding,
)
from ldm.commands.progress import UnsupportedSyntaxReport, print_notices, show_progress
from ldm.errors import print_message
from ldm.files import FileHashes
from ldm.pipeline.request import RANDOM_SEED, draw_seed

if TYPE_CHECKING:
    from ldm.jobs.wildcards import PromptTemplate
    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.request import Request

IMAGE_NAME_PATTERN = re.compile(r"(\d{4,7})-.*-\d+\.png")


@expand_options
def generate(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", show_default=False)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="The same as PROMPT; may be repeated.")] = None,
    options: RequestOptions,
    count: CountOption = 1,
    batch_size: Annotated[int, typer.Option(help="Images that are generated at a time.")] = 8,
    model: ModelOptions,
    expand: Annotated[str, typer.Option(help="Wildcards: one (for each seed) or none.")] = "one",
    strict: StrictOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNG files, or one .png file.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Generate images from prompts, and print the names of the PNG files.

    PROMPT - reads one prompt per line from standard input; {red|blue} and __name__ (of the folder wildcards) vary with
    the seed, as in `ldm batch`. Prompts are weighted as in AUTOMATIC1111's web UI: (more), [less], (so much:1.3);
    BREAK begins a new chunk.
    Options may be spelled as in diffusers or the web UI: --negative-prompt, --num-inference-steps, --cfg-scale, ...
    """
    apply_strictness(strict)
    words = [*(prompts or []), *(prompt or [])]
    stdin = lambda: [line for line in read_stdin_prompts() if line.strip()]
    texts = [text for word in words for text in (stdin() if word == "-" else [word])]
    if not texts and options.negative_prompt is not None:
        texts = [""]
    if not texts:
        raise ValueError('PROMPT: one is needed ("" is an empty one), or --negative')
    check_range("--count", count, 1, 100_000)
    check_range("--batch-size", batch_size, 1, 100_000)
    is_file = out.suffix.lower() == ".png" and not out.is_dir()
    folder = out.parent if is_file else out
    if is_file and len(texts) * count > 1:
        raise ValueError(f"--out {out}: is one file, for {len(texts) * count} images: give a folder")
    check_out_folder(folder, make=False)
    if expand not in ("one", "none"):
        raise ValueError(f"--expand {expand!r}: choose from one, none")
    templates = parse_templates(texts, expand, strict)
    pipe, request = load_pipeline_and_request(model, options, batch_size=batch_size)
    given = {embedding.token for embedding in map(parse_embedding, model.embedding or [])}
    for token, embedding in pipe.prompt_encoder.embeddings.items():
        if token not in given:
            print_message("note", f"{embedding.path}: its token is {token}")
    seeds = [draw_seed() if request.seed == RANDOM_SEED else request.seed for _ in texts]
    requests = [
        pipe.resolve(replace(request, prompt=template(0, seed + k), seed=seed + k))
        for template, seed in zip(templates, seeds, strict=True)
        for k in range(count)
    ]
    if isinstance(pipe.model.weight_hashes, FileHashes):
        pipe.model.weight_hashes.prefetch()  # for the metadata, beside the first steps
    unsupported = UnsupportedSyntaxReport()
    for request in requests:
        unsupported.collect(request)
    unsupported.print_warning(strict)
    check_out_folder(folder)
    files = generate_images(pipe, model.display_name, requests, folder, out.name if is_file else None)
    if as_json:
        records = [{"file": str(file), **r.to_record()} for file, r in zip(files, requests, strict=True)]
        print(json.dumps({"images": records}))
    else:
        print(*files, sep="\n")


def read_stdin_prompts() -> list[str]:
    """The lines of standard input; ValueError where they are not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError("standard input: not UTF-8") from None


def parse_templates(texts: Sequence[str], expand: str, strict: bool | None = None) -> list[PromptTemplate]:
    """Prompts with their wildcards, whose files lie in `wildcards`; ValueError for what cannot be parsed.

    `expand` "none" keeps them as text.
    """
    from ldm.jobs.wildcard_files import WildcardManager
    from ldm.jobs.wildcards import PromptTemplate

    manager = WildcardManager(Path("wildcards").absolute())
    templates = [PromptTemplate(text, (text,) if expand == "none" else manager(text)) for text in texts]
    print_notices(dict.fromkeys(manager.notices, ()), strict)
    return templates


def generate_images(
    pipe: Pipeline, model_name: str, requests: Sequence[Request], out: Path, name: str | None = None
) -> list[Path]:
    """Write each image once it is finished, with progress on stderr; the files in the order of the requests.

    `name` is that of a single image, which replaces a file. If another run has taken a name meanwhile, the remaining
    images get numbers after all that exist.
    """
    from ldm.files import rename_noreplace
    from ldm.metadata import save_png

    first, files, done = next_image_number(out), dict[int, Path](), 0.0
    names = [name] if name else make_image_names(requests, first)
    rename = os.replace if name else rename_noreplace
    with show_progress() as update:

        def on_progress(progress_delta: float) -> None:
            nonlocal done
            done += progress_delta
            update("sampling", done, len(requests))

        for k, image in pipe.stream(requests, on_progress):
            while k not in files:
                try:
                    save_png(image, out / names[k], pipe.metadata(requests[k], model_name), rename)
                    files[k] = out / names[k]
                except FileExistsError:
                    first = max(first + 1, next_image_number(out))
                    names = make_image_names(requests, first)
    return [files[k] for k in range(len(requests))]


def next_image_number(out: Path) -> int:
    """The number after the highest of a folder's images, so that none is overwritten."""
    numbers = (int(match[1]) for path in out.iterdir() if (match := IMAGE_NAME_PATTERN.fullmatch(path.name)))
    return max(numbers, default=-1) + 1


def make_image_names(requests: Sequence[Request], first: int = 0) -> list[str]:
    """A file name for each request: its number, words of its prompt, its seed; safe for any prompt."""
    words = (re.sub(r"[^a-z0-9]+", "-", r.prompt.lower()).strip("-")[:60].rstrip("-") or "image" for r in requests)
    digits = max(4, len(str(first + len(requests))))
    return [f"{k:0{digits}d}-{w}-{r.seed}.png" for k, (w, r) in enumerate(zip(words, requests, strict=True), first)]
