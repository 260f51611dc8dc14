"""`ldm generate`: prompts to PNG files."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.options import (
    EmbeddingOption,
    JsonOption,
    LoraOption,
    ModelOptions,
    check_out_folder,
    check_range,
    parse_embedding,
    parse_lora,
    with_model_options,
)
from ldm.commands.unsupported_syntax import UnsupportedSyntaxReport

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.request import Request


IMAGE_NAME_PATTERN = re.compile(r"(\d{4,7})-.*-\d+\.png")


@with_model_options()
def generate(
    model: ModelOptions,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", show_default=False)] = None,
    negative: Annotated[str | None, typer.Option(help="What the pictures shall not show.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the default is the model's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="dpmpp_2m, unipc, ddim, ...: `ldm info` lists all.")] = None,
    spacing: Annotated[str | None, typer.Option(help="trailing, karras, ...: `ldm info` lists all.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_rescale: Annotated[float, typer.Option(help="Share of the rescaled output: 0 to 1.")] = 0.0,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Guide in these sigma/alpha alone.")
    ] = None,
    eta: Annotated[float, typer.Option(help="Share of fresh noise in DDIM's steps.")] = 0.0,
    clip_skip: Annotated[
        int | None, typer.Option(help="Layer of the text encoder, from its end: 1 is the last, 2 the one before.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Picture k of a prompt uses seed + k.")] = 0,
    count: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    width: Annotated[int | None, typer.Option(help="Pixels; the default is the image's or the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the default is the image's or the model's.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to begin from.")] = None,
    mask: Annotated[Path | None, typer.Option(help="What of the image to redraw: white, or holes.")] = None,
    strength: Annotated[float | None, typer.Option(help="Share of the steps that change the image.")] = None,
    upscale: Annotated[float | None, typer.Option(help="Draw again this much larger, from the picture.")] = None,
    upscale_strength: Annotated[float, typer.Option(help="Strength of that second pass.")] = 0.5,
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at a time.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Draw prompts to PNG files, whose names are printed.

    Words weigh as in AUTOMATIC1111's web UI: (more), [less], (so much:1.3); BREAK begins a new chunk.
    """
    texts = [prompt for prompt in prompts or [] if prompt.strip()]
    if not texts:
        raise ValueError("PROMPT: at least one that is not blank is needed")
    check_range("--count", count, 1, 100_000)
    check_range("--batch-size", batch_size, 1, 100_000)
    adapters, embeddings = (
        [parse_lora(word) for word in lora or []],
        [parse_embedding(word) for word in embedding or []],
    )
    check_out_folder(out, make=False)
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.timesteps import SPACINGS
    from ldm.errors import choose
    from ldm.image_io import read_image, read_mask
    from ldm.pipeline.request import Request

    for table, name, option in ((SAMPLERS, sampler, "sampler"), (SPACINGS, spacing, "spacing")):
        if name is not None:
            choose(table, name, option)

    begun = None if image is None else read_image(image)
    redrawn = None if mask is None else read_mask(mask)
    pipe = model.load_pipeline(batch_size)
    for adapter in adapters:
        pipe.load_lora_weights(*adapter)
    for word in embeddings:
        token = pipe.load_textual_inversion(*word)
        if word.token is None:
            print(f"{word.source}: its word is {token}", file=sys.stderr)
    settings = Request(
        prompt="",
        negative_prompt=negative,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        spacing=spacing,
        eta=eta,
        guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval and (guidance_interval[0], none_if_infinite(guidance_interval[1])),
        clip_skip=None if clip_skip is None else pipe.convert_clip_skip(clip_skip),
        image=begun,
        mask=redrawn,
        strength=strength,
        upscale=upscale,
        upscale_strength=upscale_strength,
    )
    requests = [pipe.resolve(replace(settings, prompt=text, seed=seed + k)) for text in texts for k in range(count)]
    check_out_folder(out)
    unread = UnsupportedSyntaxReport()
    for request in requests:
        unread.collect(request)
    unread.print_warning()
    files = generate_images(pipe, model.display_name, requests, out)
    for file in files if not as_json else ():
        print(file)
    if as_json:
        records = [{"file": str(file), **r.to_record()} for file, r in zip(files, requests, strict=True)]
        print(json.dumps({"images": records}))


def none_if_infinite(value: float) -> float | None:
    """None for infinity, which JSON does not have."""
    return value if value < math.inf else None


def generate_images(pipe: Pipeline, model_name: str, requests: Sequence[Request], out: Path) -> list[Path]:
    """Write each picture once it is finished, with progress on stderr; the files in the order of the requests.

    Where another run has taken a name meanwhile, the pictures that are left are numbered anew, after all there are.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ldm.files import rename_noreplace
    from ldm.metadata import save_png

    first, files = next_image_number(out), dict[int, Path]()
    numbered = make_image_names(requests, first)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing", total=len(requests))
        for k, picture in pipe.stream(requests, lambda share: bar.advance(task, share)):
            while k not in files:
                path = out / numbered[k]
                try:
                    save_png(picture, path, pipe.metadata(requests[k], model_name), rename_noreplace)
                    files[k] = path
                except FileExistsError:
                    first = max(first + 1, next_image_number(out))
                    numbered = make_image_names(requests, first)
    return [files[k] for k in range(len(requests))]


def next_image_number(out: Path) -> int:
    """The number after the highest of the pictures in a folder, so that none is written over."""
    return max(
        (int(match[1]) + 1 for path in out.iterdir() if (match := IMAGE_NAME_PATTERN.fullmatch(path.name))), default=0
    )


def make_image_names(requests: Sequence[Request], first: int = 0) -> list[str]:
    """A file name for each request: its number, words of its prompt, its seed; safe whatever the prompt says."""
    words = (re.sub(r"[^a-z0-9]+", "-", r.prompt.lower()).strip("-")[:60].rstrip("-") or "picture" for r in requests)
    digits = max(4, len(str(first + len(requests))))
    return [f"{k:0{digits}d}-{w}-{r.seed}.png" for k, (w, r) in enumerate(zip(words, requests, strict=True), first)]
