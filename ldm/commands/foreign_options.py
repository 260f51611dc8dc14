"""Other programs' options on the command line of `ldm generate` and `batch`: ours, without effect, or what to write.

A1111's launcher and API, kohya's gen_img.py, CompVis' txt2img.py, stable-diffusion.cpp and dgenerate. What is spelled
otherwise and means the same is in `ldm.commands.options.OPTION_ALIASES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ldm.errors import print_message

COMMANDS = "generate", "batch", "txt2img", "img2img"


class WithoutEffect(NamedTuple):
    """An option that is accepted, with the number of its values; a reason is said."""

    reason: str = ""
    values: int = 0


ATTENTION = WithoutEffect("torch's attention needs no memory for its matrix")
MEMORY = WithoutEffect("calls of the networks become smaller where memory runs out")
NO_SERVER = "`ldm generate` starts no server; it writes files"
FOREIGN_OPTIONS: dict[str, tuple[str, ...] | WithoutEffect | str] = {  # a text says what to write instead
    "W": ("--width",),
    "H": ("--height",),
    "fp16": ("--dtype", "float16"),
    "half": ("--dtype", "float16"),
    "bf16": ("--dtype", "bfloat16"),
    "no-half": ("--dtype", "float32"),
    "full-precision": ("--dtype", "float32"),
    "cpu": ("--device", "cpu"),
    "use-cpu": ("--device", "cpu"),
    "plms": ("--sampler", "plms"),
    "ddim": ("--sampler", "ddim"),
    "dpm-solver": ("--sampler", "dpmpp_2m"),
    "karras": ("--spacing", "karras"),
    "v-parameterization": ("--prediction", "v"),
    "zero-terminal-snr": ("--zero-snr",),
    "enable-hr": ("--upscale", "2"),
    "hires-fix": ("--upscale", "2"),
    **dict.fromkeys(
        ("xformers", "diffusers-xformers", "sdpa", "opt-sdp-attention", "opt-split-attention", "flash-attention"),
        ATTENTION,
    ),
    **dict.fromkeys(("medvram", "lowvram", "medvram-sdxl", "vae-slicing", "model-cpu-offload", "vae-on-cpu"), MEMORY),
    "no-half-vae": WithoutEffect("a VAE that needs float32 is run in it"),
    "network-module": WithoutEffect("a file tells its kind", 1),
    "max-embeddings-multiples": WithoutEffect("prompts may be of any length", 1),
    "model-type": WithoutEffect("the files tell what a model is", 1),
    "v2": WithoutEffect("the files tell what a model is"),
    "sdxl": WithoutEffect("the files tell what a model is"),
    **dict.fromkeys(
        (
            *("skip-grid", "skip-save", "no-preview", "sequential-file-name", "opt-channels-last", "do-not-save-grid"),
            *("safety-checker", "no-safety-checker", "disable-safe-unpickle", "use-safetensors", "no-progress-bar"),
        ),
        WithoutEffect(),
    ),
    "network-mul": "--lora FILE:WEIGHT",
    "lora-weight": "--lora FILE:WEIGHT",
    "lora-scale": "--lora FILE:WEIGHT",
    "seeds-from": "--from-file FILE",
    "gen-seeds": "--seed -1 --count N",
    "guidance-scales": "--guidance N, or `ldm batch` with a file of prompts",
    "clip-skips": "--clip-skip N, or `ldm batch` with a file of prompts",
    "output-size": "--width W --height H",
    "size": "--width W --height H",
    "resolution": "--width W --height H",
    "aspect-ratio": "--width W --height H",
    "hires-steps": "--upscale-strength, whose share of --steps are run",
    "hr-second-pass-steps": "--upscale-strength, whose share of --steps are run",
    "hires-upscaler": "--upscale FACTOR alone: images are resized by Lanczos",
    "hr-upscaler": "--upscale FACTOR alone: images are resized by Lanczos",
    "highres-fix-steps": "--upscale-strength, whose share of --steps are run",
    "subseed": "another --seed: variations of one are not supported",
    "subseed-strength": "another --seed: variations of one are not supported",
    "variation-seed": "another --seed: variations of one are not supported",
    "controlnet": "--image FILE --strength S: ControlNet is not supported",
    "control-nets": "--image FILE --strength S: ControlNet is not supported",
    "refiner": "--upscale 1.5: SDXL's refiner is not supported",
    "sdxl-refiner": "--upscale 1.5: SDXL's refiner is not supported",
    "styles": "their words in the prompt",
    "tiling": "nothing: seamless images are not supported",
    "seamless": "nothing: seamless images are not supported",
    "restore-faces": "nothing: faces are not restored",
    "embeddings-dir": "--embedding FILE",
    "ckpt-dir": "--model FILE",
    **dict.fromkeys(("api", "listen", "port", "share", "nowebui", "autolaunch"), f"nothing: {NO_SERVER}"),
}


def translate_words(words: Sequence[str]) -> list[str]:
    """A command line with other programs' options in our words; ValueError says what to write in place of one.

    Words after -- are no options. A reason of what has no effect is a line on stderr.
    """
    if not words or words[0] not in COMMANDS:
        return list(words)
    end = words.index("--") if "--" in words else len(words)
    return [words[0], *_translate(words[1:end]), *words[end:]]


def _translate(words: Sequence[str]) -> Iterator[str]:
    following = iter(words)
    for word in following:
        name, equals, value = word.removeprefix("--").replace("_", "-").partition("=")
        rule = FOREIGN_OPTIONS.get(name) if word.startswith("--") else None
        value = word.partition("=")[2]
        if rule is None:
            yield word
        elif isinstance(rule, str):
            raise ValueError(f"--{name}: not an option here; write {rule}")
        elif isinstance(rule, WithoutEffect):
            for _ in range(0 if equals else rule.values):
                next(following, None)
            if rule.reason:
                print_message("note", f"--{name}: without effect: {rule.reason}")
        else:
            yield from rule
            yield from [value] if equals else []
