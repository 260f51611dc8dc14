"""The settings in an image's metadata, whichever tool made it: ours, A1111, Forge, Fooocus, ComfyUI or InvokeAI.

A1111's text: modules/infotext_utils.py; InvokeAI's `invokeai_metadata`, and `sd-metadata` and `Dream` of its versions
before 3; Fooocus' modules/meta_parser.py; ComfyUI's graph: `ldm.jobs.comfy_graph`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.adapters.lora_tags import LoraTag
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SPACINGS
from ldm.errors import error_text
from ldm.jobs.comfy_graph import escape_brackets, read_comfy_settings
from ldm.jobs.schema import FieldValues, parse_field, short_repr
from ldm.jobs.verify import MAX_RECORD_LENGTH, parse_generation_record
from ldm.metadata import parse_generation_parameters, read_image_and_metadata
from ldm.pipeline.request import REQUEST_FIELDS, parse_float, parse_int
from ldm.sampler_names import resolve_sampler_names

MAX_PROMPT_LENGTH = 100_000  # characters
MAX_LORA_WEIGHT = 1000
MAX_NOTE_LENGTH = 60  # characters of what is named as not taken over


class ImageSettings(NamedTuple):
    """What an image was made with; `lost` says in words what of it cannot be taken over.

    `values` are those of a prompt file's record: fields of `Request`, and `a1111_clip_skip`.
    """

    tool: str
    values: FieldValues
    model: str = ""
    loras: tuple[LoraTag, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """The prompt, with the adapters as tags."""
        return "".join([self.values.get("prompt", ""), *map(str, self.loras)])


Reader = Callable[[Any], ImageSettings]


def read_image_settings(path: Path) -> ImageSettings:
    """The settings of an image file; ValueError where there are none in it, or they cannot be read."""
    _, texts = read_image_and_metadata(path)
    for key, read in READERS.items():
        if text := texts.get(key):
            try:
                if len(text) > MAX_RECORD_LENGTH:
                    raise ValueError(f"longer than {MAX_RECORD_LENGTH} characters")
                return check_values(read(text))
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else error_text(error)
                raise ValueError(f"{path}: its metadata {key!r}: {reason}") from None
    names = f" (it has {', '.join(map(short_repr, list(texts)[:5]))})" if texts else ""
    raise ValueError(f"{path}: no settings of an image generator in it{names}")


def check_values(settings: ImageSettings) -> ImageSettings:
    """Settings with values of their types and samplers of ours; what is none is among the lost."""
    values, lost = dict[str, Any](), list(settings.lost)
    for name, value in settings.values.items():
        if value in (None, "") and name != "prompt":
            continue
        try:
            field = "clip_skip" if name == "a1111_clip_skip" else name
            parsed = parse_int(value) if name == "seed" else parse_field(field, name, value)
            spec = REQUEST_FIELDS[field]
            if isinstance(parsed, int | float) and not spec.low <= parsed <= spec.high:  # also refuses NaN
                raise ValueError(f"{name} {parsed:.6g}: must be from {spec.low} to {spec.high}")
            values[name] = parsed
        except ValueError as error:
            lost.append(error_text(error))
    values = resolve_sampler_names(values)
    for name, table in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if values.get(name) not in (None, *table):
            lost.append(f"{name} {short_repr(values.pop(name))}, which is not one of ours")
    for name in ("prompt", "negative_prompt"):
        if len(values.get(name, "")) > MAX_PROMPT_LENGTH:
            raise ValueError(f"a prompt of {len(values[name])} characters: at most {MAX_PROMPT_LENGTH} are read")
    values = {name: value for name, value in values.items() if value is not None}
    if "image" in values:
        lost.append(f"the initial image {short_repr(values.pop('image'))}: give it by --image")
    elif "strength" in values:
        lost.append("the initial image: give it by --image")
    return settings._replace(values=values, lost=tuple(dict.fromkeys(lost)))


def load_json(text: str) -> Any:
    """The value of a JSON text as Python writes it; NaN, which ComfyUI's holds, is None."""
    digits = lambda number: int(number) if len(number) < 40 else float(number)
    return json.loads(text, parse_constant=lambda name: None, parse_int=digits)


def load_object(text: str) -> dict[str, Any]:
    """The JSON object in a text; ValueError for anything else."""
    values = load_json(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def list_lost(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the named settings that are there and neither empty nor off, as "name value"."""
    found = {name: values[name] for name in names if values.get(name) not in (None, "", 0, False, [], {}, "None")}
    return [
        f"{name} {short_repr(value) if not isinstance(value, str) else value[:MAX_NOTE_LENGTH]}"
        for name, value in found.items()
    ]


def read_own(text: str) -> ImageSettings:
    """Our own record."""
    record = parse_generation_record(text)
    values = {name: value for name, value in record.request.items() if name in REQUEST_FIELDS}
    lost = [f"{name}, of Python alone" for name in record.request.keys() - REQUEST_FIELDS.keys()]
    lost += [f"the tensors {', '.join(record.tensors)}"] if record.tensors else []
    lost += [f"the inpainting {name}: give it by --mask" for name in ("mask",) if values.pop(name, None)]
    lost += [f"embedding {token}: give it by --embedding" for token in record.embeddings]
    if values.get("image"):
        values["image"] = str(values["image"]["sha256"])[:10]
    loras = tuple(make_lora(a.name, *(a.weight if isinstance(a.weight, list) else [a.weight])) for a in record.adapters)
    return ImageSettings("ldm", values, record.model, loras, tuple(lost))


# Fields of A1111's text: ours; what is written about the model and files, or changes nothing; samplers' own spacings.
A1111_FIELDS = {
    "Prompt": "prompt",
    "Negative prompt": "negative_prompt",
    "Steps": "num_inference_steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Clip skip": "a1111_clip_skip",
    "Hires upscale": "upscale",
}
A1111_SILENT = {
    *("Model", "Model hash", "Version", "Hashes", "Lora hashes", "TI hashes", "VAE hash", "Base model hash", "RNG"),
    *("Sampler", "Schedule type", "Scheduler", "Size", "Size-1", "Size-2", "Denoising strength", "Hires resize"),
    *("User", "Created Date", "Civitai resources", "Civitai metadata", "Performance", "Metadata scheme"),
    *("Raw prompt", "Raw negative prompt", "Lora weights", "Diffusion in Low Bits"),
}
A1111_SPACING_NAMES = {"uniform": "linspace"}  # its "Uniform" is k-diffusion's, our uniform is in time
AUTOMATIC_SPACINGS = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2", "dpm_2_ancestral"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
}
TIMESTEP_SAMPLERS = "ddim", "plms", "unipc"  # of CompVis' code, on DDIM's timesteps


def read_a1111(text: str) -> ImageSettings:
    """A1111's text, which Forge and Fooocus write too; JSON is Fooocus' own scheme."""
    if text.lstrip().startswith("{"):
        return read_fooocus(load_object(text))
    given = parse_generation_parameters(text)
    values: FieldValues = {ours: given[theirs] for theirs, ours in A1111_FIELDS.items() if theirs in given}
    values |= dict(zip(("width", "height"), given.get("Size", "").split("x"), strict=False))
    values |= a1111_sampler(given)
    lost = list_lost(given, [name for name in given if name not in {*A1111_FIELDS, *A1111_SILENT}])
    lost = [text for text in lost if text != f"VAE {FOOOCUS_VAE}"]
    hires = [name for name in given if name.startswith("Hires")]
    if (strength := given.get("Denoising strength")) is not None:
        values["upscale_strength" if hires else "strength"] = strength
    if "upscale" not in values and (size := re.fullmatch(r"(\d{1,5})x\d{1,5}", given.get("Hires resize", ""))):
        values["upscale"] = int(size[1]) / max(1, int(values["width"])) if values.get("width", "").isdecimal() else None
    version = given.get("Version", "")
    tool = next((n for n, mark in (("Fooocus", "Fooocus"), ("ldm", "ldm ")) if version.startswith(mark)), "A1111")
    tool = "Forge" if tool == "A1111" and (version.startswith("f") or "Diffusion in Low Bits" in given) else tool
    if tool in ("A1111", "Forge") and given.get("RNG") != "CPU" and len(given) > 2:
        lost.append(f"the noise, which is that of {given.get('RNG', 'GPU')}, not of the CPU: another image")
    loras = [make_lora(*row.rsplit(": ", 1)) for row in given.get("Lora weights", "").split(", ") if ": " in row]
    if tool == "Fooocus":  # of which the prompt is the one that styles have expanded
        raw = (("prompt", "Raw prompt"), ("negative_prompt", "Raw negative prompt"))
        values |= {name: given[key] for name, key in raw if key in given}
    return ImageSettings(tool, values, given.get("Model", ""), tuple(loras), tuple(lost))


def a1111_sampler(given: Mapping[str, str]) -> dict[str, Any]:
    """The sampler and spacing of A1111's text; where it names no schedule, those that it uses then."""
    schedule = given.get("Schedule type", given.get("Scheduler"))
    spacing = A1111_SPACING_NAMES.get((schedule or "").lower(), schedule)
    names = resolve_sampler_names({"sampler": given.get("Sampler"), "spacing": spacing})
    if names["spacing"] is None and names["sampler"] in SAMPLERS:
        plain = "leading" if names["sampler"] in TIMESTEP_SAMPLERS else "linspace"
        table = AUTOMATIC_SPACINGS if schedule else {}  # older versions name every other spacing with the sampler
        names["spacing"] = table.get(names["sampler"], plain)
    return names


FOOOCUS_FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
    "sampler": "sampler",
    "scheduler": "spacing",
    "clip_skip": "a1111_clip_skip",
}
FOOOCUS_VAE = "Default (model)"
FOOOCUS_LOST = "styles", "sharpness", "adm_guidance", "refiner_model", "prompt_expansion", "freeu", "adaptive_cfg"


def read_fooocus(given: Mapping[str, Any]) -> ImageSettings:
    """Fooocus' own scheme, or what is no JSON of it."""
    if "sampler" not in given or "prompt" not in given:
        raise ValueError("JSON of no tool that is known")
    values: FieldValues = {ours: given[theirs] for theirs, ours in FOOOCUS_FIELDS.items() if theirs in given}
    sides = re.findall(r"\d{1,5}", str(given.get("resolution", ""))[:100])
    values |= dict(zip(("width", "height"), sides[:2], strict=False))
    rows = given.get("loras")
    loras = (
        [make_lora(*row[:2]) for row in rows if isinstance(row, list) and len(row) > 1]
        if isinstance(rows, list)
        else []
    )
    lost = list_lost({**given, "styles": None if given.get("styles") == "[]" else given.get("styles")}, FOOOCUS_LOST)
    if given.get("vae") not in (None, FOOOCUS_VAE):
        lost.append(f"vae {short_repr(given['vae'])}: give it by --vae")
    return ImageSettings("Fooocus", values, str(given.get("base_model", "")), tuple(loras), tuple(lost))


def make_lora(name: Any, weight: Any = 1.0, text_weight: Any = None) -> LoraTag:
    """A tag of the file's name without folders and suffix; ValueError where a weight is no number."""
    stem = PurePosixPath(str(name).replace("\\", "/")).name.removesuffix(".safetensors")
    numbers = [None if w is None else parse_float(w) for w in (weight, text_weight)]
    if not all(number is None or abs(number) < MAX_LORA_WEIGHT for number in numbers):
        raise ValueError(f"the weight {weight!r:.20} of {stem[:MAX_NOTE_LENGTH]}")
    return LoraTag(re.sub(r"[<>:]", "_", stem), 1.0 if numbers[0] is None else numbers[0], numbers[1])


INVOKE_FIELDS = {
    "positive_prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "cfg_rescale_multiplier": "guidance_rescale",
    "seed": "seed",
    "scheduler": "sampler",
    "width": "width",
    "height": "height",
    "clip_skip": "clip_skip",  # layers that are left out, as in diffusers
}
INVOKE_SAMPLERS = {"dpmpp_3m": "dpmpp_3m_published"}  # diffusers' third order
INVOKE_LOST = (
    *("controlnets", "ipAdapters", "t2iAdapters", "refiner_model", "seamless_x", "seamless_y", "hrf_enabled"),
    *("positive_style_prompt", "negative_style_prompt", "regions", "canvas_v2_metadata"),
)


def read_invoke(text: str) -> ImageSettings:
    """`invokeai_metadata`, of InvokeAI from version 3 on."""
    given = load_object(text)
    if "positive_prompt" not in given:
        raise ValueError("no prompt in it")
    values: FieldValues = {ours: given[theirs] for theirs, ours in INVOKE_FIELDS.items() if theirs in given}
    return finish_invoke(
        given, values, [f"{name} {short_repr(given[name])}" for name in INVOKE_LOST if given.get(name)]
    )


def finish_invoke(given: Mapping[str, Any], values: FieldValues, lost: list[str]) -> ImageSettings:
    """Values of InvokeAI's, with prompts in our grammar, the model, adapters, and an initial image."""
    for name in ("prompt", "negative_prompt"):
        if isinstance(values.get(name), str):
            values[name], unread = translate_compel(values[name])
            lost += unread
    if isinstance(sampler := values.get("sampler"), str):
        values["sampler"] = INVOKE_SAMPLERS.get(sampler, sampler)
    mode = re.search(r"img2img|inpaint|outpaint", str(given.get("generation_mode", ""))[:100])
    if (image := given.get("init_image", given.get("init_image_path"))) or mode:
        values |= {"image": str(image or ""), "strength": given.get("strength")}
    if given.get("rand_device") not in (None, "cpu"):
        lost.append(f"the noise, which is that of {short_repr(given['rand_device'])}, not of the CPU: another image")
    loras = []
    for row in given.get("loras") or []:
        model = (row.get("model") or row.get("lora")) if isinstance(row, dict) else None
        if isinstance(model, dict):
            loras.append(make_lora(model.get("name", model.get("model_name", "")), row.get("weight", 1.0)))
    model = given.get("model") or given.get("model_weights") or ""
    model = model.get("name", model.get("model_name", "")) if isinstance(model, dict) else model
    if vae := given.get("vae"):
        lost.append(f"vae {short_repr(vae.get('name') if isinstance(vae, dict) else vae)}: give it by --vae")
    return ImageSettings("InvokeAI", values, str(model), tuple(loras), tuple(lost))


OLD_INVOKE_FIELDS = {**INVOKE_FIELDS, "sampler": "sampler", "sampler_name": "sampler"}
OLD_INVOKE_LOST = "variations", "perlin", "threshold", "seamless", "hires_fix", "postprocessing", "facetool"


def read_old_invoke(text: str) -> ImageSettings:
    """`sd-metadata`, of InvokeAI before version 3: negative prompts stand in [brackets] of the prompt."""
    record = load_object(text)
    given = record.get("image")
    if not isinstance(given, dict):
        raise ValueError("no image in it")
    values: FieldValues = {ours: given[theirs] for theirs, ours in OLD_INVOKE_FIELDS.items() if theirs in given}
    prompts = given.get("prompt")
    prompts = prompts if isinstance(prompts, list) else [{"prompt": prompts}]
    texts = [row["prompt"] for row in prompts if isinstance(row, dict) and isinstance(row.get("prompt"), str)]
    lost = [f"{name} {short_repr(given[name])}" for name in OLD_INVOKE_LOST if given.get(name)]
    lost += [f"{len(texts) - 1} more prompts, which are blended"] if len(texts) > 1 else []
    values |= split_brackets(next(iter(texts), ""))
    return finish_invoke({**given, "model": record.get("model_weights", record.get("model", ""))}, values, lost)


DREAM_OPTIONS = {
    "s": "num_inference_steps",
    "S": "seed",
    "W": "width",
    "H": "height",
    "C": "guidance_scale",
    "A": "sampler",
}


def read_dream(text: str) -> ImageSettings:
    """`Dream`, the command line of InvokeAI before version 3: "a prompt" -s50 -S1 -W512 -H512 -C7.5 -A k_lms."""
    if len(text) > MAX_PROMPT_LENGTH:  # shlex takes quadratic time
        raise ValueError(f"longer than {MAX_PROMPT_LENGTH} characters")
    words = shlex.split(text)
    values: FieldValues = split_brackets(words[0] if words else "")
    line, lost = iter(words[1:]), list[str]()
    for word in line:
        if (name := DREAM_OPTIONS.get(word[1:2])) and word.startswith("-") and not word.startswith("--"):
            values[name] = word[2:] or next(line, "")
        else:
            lost.append(word[:MAX_NOTE_LENGTH])
    return finish_invoke({}, values, [f"the options {' '.join(lost)[:MAX_NOTE_LENGTH]}"] if lost else [])


def split_brackets(text: str) -> dict[str, str]:
    """The prompt and, of what stands in [brackets], the negative prompt, as InvokeAI before version 3 has them."""
    negative = re.findall(r"\[([^\[\]]*)\]", text)
    return {"prompt": re.sub(r"\[[^\[\]]*\]", "", text).strip(), "negative_prompt": ", ".join(negative)}


COMPEL_TOKEN = re.compile(r"\\.|\(|\)(\++|-+|\d*\.?\d+)?|[^\s()\\,.;:+-]+(\++|-+)(?=[\s,.;:)]|$)|[^\\()\s]+|\s+|\\")
COMPEL_CALLS = re.compile(r"\.(?:and|blend|swap)\(")


def translate_compel(text: str) -> tuple[str, list[str]]:
    """A prompt in InvokeAI's syntax (compel's) in ours, and the syntax in it that we do not have.

    word+ is (word:1.1), word-- (word:0.81), (two words)1.3 (two words:1.3); (text) alone has no weight, [ ] are text.
    """
    if len(text) > MAX_PROMPT_LENGTH:
        raise ValueError(f"a prompt of {len(text)} characters: at most {MAX_PROMPT_LENGTH} are read")
    lost = [f"the syntax {call}...)" for call in dict.fromkeys(COMPEL_CALLS.findall(text))]
    groups: list[list[str]] = [[]]
    for match in COMPEL_TOKEN.finditer(text):
        token, after, suffix = match[0], match[1], match[2]
        if token == "(" and len(groups) < 30:
            groups.append([])
        elif token[0] == ")" and len(groups) > 1:
            inner = "".join(groups.pop())
            groups[-1].append(inner if compel_weight(after) == 1 else f"({inner}:{compel_weight(after):g})")
        elif suffix:
            groups[-1].append(f"({escape_brackets(token.removesuffix(suffix))}:{compel_weight(suffix):g})")
        else:
            groups[-1].append(rf"\{token}" if token in ("(", ")") else escape_brackets(token))
    return r"\(".join("".join(group) for group in groups), lost  # what is not closed is text


def compel_weight(suffix: str | None) -> float:
    """compel's weight of a suffix: 1.1 for each +, 0.9 for each -, or the number."""
    if not suffix:
        return 1.0
    return 1.1 ** len(suffix) if suffix[0] == "+" else 0.9 ** len(suffix) if suffix[0] == "-" else float(suffix)


def read_comfy(text: str) -> ImageSettings:
    """ComfyUI's graph."""
    values, loras, model, lost = read_comfy_settings(load_json(text))
    return ImageSettings("ComfyUI", values, model, tuple(make_lora(*lora) for lora in loras), tuple(lost))


READERS: dict[str, Reader] = {  # by the key of an image's text, the first that is there
    "ldm": read_own,
    "invokeai_metadata": read_invoke,
    "sd-metadata": read_old_invoke,
    "Dream": read_dream,
    "parameters": read_a1111,
    "prompt": read_comfy,
}
