"""`ldm generate`: images from prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.commands.image_files import ImageFiles, Preview
from ldm.commands.options import (
    REQUEST_OPTIONS,
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
from ldm.pipeline.request import RANDOM_SEED, Request, draw_seed

if TYPE_CHECKING:
    from ldm.adapters.lora_tags import LoraTag, TaggedAdapters
    from ldm.jobs.image_settings import ImageSettings
    from ldm.jobs.wildcards import PromptTemplate
    from ldm.pipeline.pipeline import Pipeline

EXPANSIONS = "one", "none"
CONVERTED_FIELDS = "clip_skip", "image", "mask"  # options that are no values of a request


@expand_options
def generate(
    context: typer.Context,
    *,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", show_default=False)] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="The same as PROMPT; may be repeated.")
    ] = None,
    from_file: Annotated[Path | None, typer.Option(help="Prompts of a file, as `ldm batch` reads them.")] = None,
    from_image: Annotated[
        Path | None, typer.Option("--from", metavar="IMAGE", help="Settings of an image's metadata, of any tool.")
    ] = None,
    options: RequestOptions,
    count: CountOption = 1,
    batch_size: Annotated[int, typer.Option(help="Images that are generated at a time.")] = 8,
    model: ModelOptions,
    lora_dir: Annotated[
        Path | None, typer.Option(help="Folder of the LoRAs that <lora:name:0.8> in prompts names.")
    ] = None,
    expand: Annotated[str, typer.Option(help="Wildcards: one (for each seed) or none.")] = "one",
    wildcards: Annotated[Path, typer.Option(help="Folder of wildcard files.")] = Path("wildcards"),
    strict: StrictOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the images, or one file.")] = Path("out"),
    format: Annotated[str | None, typer.Option(help="png, webp (lossless) or jpeg; default: --out's, or png.")] = None,
    name_pattern: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Names of files; default: {number}-{prompt}-{seed}.")
    ] = None,
    preview: Annotated[Path | None, typer.Option(metavar="FILE", help="Image file that shows the sampling.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Generate images from prompts, and print the names of their files.

    PROMPT - reads prompts from standard input, one per line with options, as `ldm batch` does; {red|blue} and __name__
    (of the folder wildcards) vary with the seed. Prompts are weighted as in AUTOMATIC1111's web UI: (more), [less],
    (so much:1.3); BREAK begins a new chunk.
    Options may be spelled as in diffusers or the web UI: --negative-prompt, --num-inference-steps, --cfg-scale, ...
    """
    apply_strictness(strict)
    check_range("--count", count, 1, 100_000)
    check_range("--batch-size", batch_size, 1, 100_000)
    files = ImageFiles.from_options(out, format, name_pattern, model.display_name)
    check_out_folder(files.folder, make=False)
    Preview.check_path(preview)
    texts, settings = [*(prompts or []), *(prompt or [])], None
    if from_image is not None:
        settings = apply_image_settings(from_image, options, find_given_options(context), model, strict)
    literal = settings.prompt if settings and not (texts or from_file) else None
    inputs = PromptInputs(texts, from_file, literal, count, expand, wildcards, strict)
    inputs.check(options.negative_prompt is not None, files)
    run = GenerationRun.load(model, options, settings, batch_size, lora_dir, files, preview)
    requests = run.resolve(inputs.iter_requests(run), strict)
    check_out_folder(files.folder)
    written = run.write(requests)
    if as_json:
        records = [{"file": str(file), **r.to_record()} for file, (r, _) in zip(written, requests, strict=True)]
        print(json.dumps({"images": records}))
    else:
        print(*written, sep="\n")


def find_given_options(context: typer.Context) -> set[str]:
    """The fields of a request whose options are on the command line, not a default of a file."""
    sources = {name: context.get_parameter_source(name) for name in REQUEST_OPTIONS}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def apply_image_settings(
    path: Path, options: RequestOptions, given: set[str], model: ModelOptions, strict: bool | None
) -> ImageSettings:
    """Set the options that are not given to an image's settings, and print in a line what of these is lost."""
    from ldm.jobs.image_settings import read_image_settings

    settings = read_image_settings(path)
    values = {name: value for name, value in settings.values.items() if name not in given}
    if options.image is None:
        values.pop("strength", None)
    if "a1111_clip_skip" in values and "clip_skip" not in given:
        options.clip_skip = values["a1111_clip_skip"]
    for name in (values.keys() & REQUEST_OPTIONS.keys()) - set(CONVERTED_FIELDS):
        setattr(options, name, values[name])
    inputs = {"--image": options.image, "--mask": options.mask, "--vae": model.vae, "--embedding": model.embedding}
    lost = [text for text in settings.lost if not any(value and name in text for name, value in inputs.items())]
    if settings.model and settings.model != model.display_name and not model.model:
        lost.append(f"the model {settings.model!r:.80}: give it by --model")
    if lost:
        print_notices({f"settings of {settings.tool} that are not taken over: {'; '.join(lost)}": [str(path)]}, strict)
    return settings


@dataclass(frozen=True)
class PromptInputs:
    """The prompts of a command line: texts, of which "-" is standard input, a file, and the literal one of an image."""

    texts: Sequence[str]
    file: Path | None
    literal: str | None
    count: int
    expand: str
    wildcards: Path
    strict: bool | None

    def check(self, has_negative: bool, files: ImageFiles) -> None:
        """ValueError for no prompt, and for what needs no model to be wrong."""
        if not self.texts and self.file is None and self.literal is None and not has_negative:
            raise ValueError('PROMPT: one is needed ("" is an empty one), or --negative, --from-file or --from')
        if self.expand not in EXPANSIONS:
            raise ValueError(f"--expand {self.expand!r}: choose from {', '.join(EXPANSIONS)}")
        files.check_count(len(self.texts or [""]) * self.count)
        _ = self.templates

    @cached_property
    def templates(self) -> list[PromptTemplate | None]:
        """The texts with their wildcards, which `expand` "none" keeps as text; None for standard input."""
        from ldm.jobs.wildcard_files import WildcardManager
        from ldm.jobs.wildcards import PromptTemplate

        manager = WildcardManager(self.wildcards.absolute())
        texts = list(self.texts) or ([""] if self.literal is None and self.file is None else [])
        parsed = [
            None if text == "-" else PromptTemplate(text, (text,) if self.expand == "none" else manager(text))
            for text in texts
        ]
        literal = [] if self.literal is None else [PromptTemplate(self.literal, (self.literal,))]
        print_notices(dict.fromkeys(manager.notices, ()), self.strict)
        return [*parsed, *literal]

    def iter_requests(self, run: GenerationRun) -> Iterator[Request]:
        """The requests of all prompts in their order, a file's last; not resolved."""
        for template in self.templates:
            if template is None:
                yield from self.read_file("-", run)
                continue
            seed = draw_seed() if run.defaults.seed == RANDOM_SEED else run.defaults.seed
            for k in range(self.count):
                yield replace(run.defaults, prompt=template(0, seed + k), seed=seed + k)
        if self.file is not None:
            yield from self.read_file(self.file, run)

    def read_file(self, file: Path | str, run: GenerationRun) -> Iterator[Request]:
        """The requests of a file of prompts; ValueError names its lines that are wrong."""
        from ldm.jobs.source import open_prompt_source

        source = open_prompt_source(
            file,
            run.defaults,
            count=self.count,
            wildcards=self.wildcards if file == "-" else None,
            expand=self.expand,
            convert_clip_skip=run.pipe.convert_clip_skip,
            lenient=self.strict is False,
            random_key=(draw_seed(),),
        )
        source.validate(run.pipe.resolve)
        print_notices(source.notices, self.strict)
        for entry in source:
            yield entry.request


@dataclass(frozen=True)
class GenerationRun:
    """A run of the command: the model with its adapters, what its requests have in common, and where images go."""

    pipe: Pipeline
    defaults: Request
    adapters: TaggedAdapters
    files: ImageFiles
    preview: Preview | None

    @classmethod
    def load(
        cls,
        model: ModelOptions,
        options: RequestOptions,
        settings: ImageSettings | None,
        batch_size: int,
        lora_dir: Path | None,
        files: ImageFiles,
        preview: Path | None,
    ) -> GenerationRun:
        """Load the model; the fields of an image's settings that are no options are the requests' too."""
        from ldm.adapters.lora_tags import TaggedAdapters

        pipe, request = load_pipeline_and_request(model, options, batch_size=batch_size)
        for name, value in (settings.values if settings else {}).items():
            if name == "clip_skip" and options.clip_skip is None:
                request = replace(request, clip_skip=value)
            elif name not in REQUEST_OPTIONS and name in vars(request) and name not in ("prompt", "seed"):
                request = replace(request, **{name: value})
        given = {embedding.token for embedding in map(parse_embedding, model.embedding or [])}
        for token, embedding in pipe.prompt_encoder.embeddings.items():
            if token not in given:
                print_message("note", f"{embedding.path}: its token is {token}")
        shown = None if preview is None else Preview(preview, pipe)
        return cls(pipe, request, TaggedAdapters(pipe, lora_dir), files, shown)

    def resolve(self, requests: Iterator[Request], strict: bool | None) -> list[tuple[Request, tuple[LoraTag, ...]]]:
        """Resolved requests, their prompts without the tags of adapters, and these; a warning for other syntax."""
        from ldm.adapters.lora_tags import split_lora_tags

        resolved, unknown, unsupported = [], dict[str, None](), UnsupportedSyntaxReport()
        for request in requests:
            text, tags = split_lora_tags(request.prompt)
            missing = self.adapters.load(tags)
            unknown |= dict.fromkeys(map(str, missing))
            resolved.append(
                (self.pipe.resolve(replace(request, prompt=text)), tuple(t for t in tags if t not in missing))
            )
            unsupported.collect(resolved[-1][0])
        if unknown:
            where = (
                f"not in {self.adapters.folder}" if self.adapters.folder else "give --lora-dir FOLDER, or --lora FILE"
            )
            print_notices({f"{', '.join(unknown)}: left out: {where}": ()}, strict)
        unsupported.print_warning(strict)
        self.files.check_count(len(resolved))
        return resolved

    def write(self, requests: Sequence[tuple[Request, tuple[LoraTag, ...]]]) -> list[Path]:
        """Write each image once it is finished, with progress on stderr; the files in the order of the requests."""
        if isinstance(self.pipe.model.weight_hashes, FileHashes):
            self.pipe.model.weight_hashes.prefetch()  # for the metadata, beside the first steps
        done = 0.0
        with show_progress() as update:

            def on_progress(progress_delta: float) -> None:
                nonlocal done
                done += progress_delta
                update("sampling", done, len(requests))

            return self.files.write([r for r, _ in requests], self.pipe, self.stream(requests, on_progress))

    def stream(
        self, requests: Sequence[tuple[Request, tuple[LoraTag, ...]]], on_progress: Callable[[float], None]
    ) -> Iterator[tuple[int, Any]]:
        """(index, image) as they finish; consecutive requests with the same adapters are sampled together."""
        for tags, group in groupby(enumerate(requests), key=lambda item: item[1][1]):
            self.adapters.apply(tags)
            members = [(k, request) for k, (request, _) in group]
            for j, image in self.pipe.stream([request for _, request in members], on_progress, self.preview):
                if self.preview:
                    self.preview.write(image)
                yield members[j][0], image
