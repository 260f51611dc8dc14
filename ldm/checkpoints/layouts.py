"""A model as a directory of diffusers: a folder for each component, and an index that names their classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoints import keys
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily, build_from_config, get_config_number
from ldm.checkpoints.networks import (
    TEXT_ENCODERS,
    ModelSpec,
    ResolvedConfig,
    WeightFile,
    match_weight_files,
)
from ldm.checkpoints.schedule import (
    DIFFUSERS_PREDICTION_TYPES,
    DIFFUSERS_SCHEDULERS,
    PREDICTION_TYPES,
    load_scheduler_config,
)
from ldm.checkpoints.tensors import PICKLE_MESSAGE, PICKLE_SUFFIXES, SafetensorsFile, dequantize, open_safetensors
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import FINAL_SIGMAS_TYPES, SPACINGS
from ldm.errors import choose, error_text, warn_of_input
from ldm.files import read_json
from ldm.nn import text_encoders
from ldm.nn.tokenizer import CLIPTokenizer, load_clip_tokenizer
from ldm.nn.unet import UNetConfig

MODEL_INDEX_NAME, GENERATION_CONFIG_NAME = "model_index.json", "generation_config.json"
PIPELINE_TASKS = [
    f"{control}{task}Pipeline"
    for control in ("", "ControlNet", "ControlNetUnion", "PAG", "ControlNetPAG", "ControlNetXS")
    for task in ("", "Img2Img", "Inpaint")
]
PIPELINE_FAMILIES = {  # classes of diffusers, and a family that encodes text and guides by default as they do
    **{f"StableDiffusion{task}": "sd1" for task in PIPELINE_TASKS},
    **{f"StableDiffusionXL{task}": "sdxl" for task in PIPELINE_TASKS},
    **{f"LatentConsistencyModel{task}": "sd1" for task in ("Pipeline", "Img2ImgPipeline")},
    "DiffusionPipeline": "sd1",  # any: "sdxl" where there is a second text encoder
}
PIPELINE_DEFAULTS = {  # of classes with other settings than the family's
    f"LatentConsistencyModel{task}": {"num_inference_steps": 4, "guidance_scale": 8.5}
    for task in ("Pipeline", "Img2ImgPipeline")
}
TOKENIZER_FOLDERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
COMPONENT_CLASSES = {  # library and classes of each component that is read
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",)),
    "scheduler": ("diffusers", tuple(DIFFUSERS_SCHEDULERS)),
    **dict.fromkeys(TOKENIZER_FOLDERS.values(), ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))),
}
IGNORED_COMPONENT_CLASSES = {  # of components that are not read, whatever the library
    "safety_checker": ("StableDiffusionSafetyChecker",),
    "feature_extractor": ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorPil"),
    "image_encoder": ("CLIPVisionModelWithProjection",),  # for image prompts
    "controlnet": ("ControlNetModel", "ControlNetUnionModel", "ControlNetXSAdapter", "MultiControlNetModel"),
}
MODEL_INDEX_FLAGS = {  # supported values of flags in the index
    "force_zeros_for_empty_prompt": (True, False),
    "requires_safety_checker": (True, False, None),
    "requires_aesthetics_score": (False, None),  # True is SDXL's refiner
    "add_watermarker": (True, False, None),
}
WEIGHT_FILE_STEMS = {  # by component
    **dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model"),
    **dict.fromkeys(TEXT_ENCODERS, "model"),
}
MIN_PROMPT_TOKENS = 3  # BOS, one token, EOS
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


def read_directory(folder: Path, options: LoadOptions = LoadOptions()) -> ModelSpec:
    """The model in a folder; ValueError in one line names the file and what is missing, unknown or not supported.

    `options.variant` chooses `diffusion_pytorch_model.fp16.safetensors` and the like; by default the plain weights are
    read, or the only ones.
    """
    index = read_model_index(folder)
    pipeline = FAMILIES[_pipeline_family(index)]
    if "controlnet" in index:
        warn_of_input(f"{folder}: its ControlNet is not read")
    networks, groups = {}, []
    for name in pipeline.configs:
        networks[name], files = read_component(folder / name, name, options.variant)
        groups.append(files)
    if options.variant:
        _note_other_variants(folder, dict(zip(networks, groups, strict=True)), options.variant)
    overrides: dict[str, Any] = {"_class_name": index["scheduler"][1]}
    if options.prediction is not None:
        overrides["prediction_type"] = choose(DIFFUSERS_PREDICTION_TYPES, options.prediction, "prediction")
    if options.zero_snr is not None:
        overrides["rescale_betas_zero_snr"] = options.zero_snr
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    schedule = load_scheduler_config(scheduler_path, **overrides)
    unet = networks["unet"].config
    family = find_family_by_unet(unet, schedule.prediction)
    tokenizers = {
        name: load_matching_tokenizer(folder / TOKENIZER_FOLDERS[name], networks[name].config)
        for name in pipeline.text_encoders
    }
    return ModelSpec(
        networks,
        tuple(groups),
        text_encoder_factories(pipeline, tokenizers, FAMILIES[family] if family else pipeline),
        lambda probe: ResolvedConfig(schedule, family, unet, {**read_json(scheduler_path), **overrides}),
        {
            **pipeline.generation_defaults,
            **PIPELINE_DEFAULTS.get(index["_class_name"], {}),
            **read_generation_config(folder),
        },
        index.get("force_zeros_for_empty_prompt", pipeline.force_zeros_for_empty_prompt),
    )


def _note_other_variants(folder: Path, files: Mapping[str, Sequence[WeightFile]], variant: str) -> None:
    """A warning that names the components without weights of a variant; ValueError if none has any."""
    names = {component: [file.path.name for file, _ in group] for component, group in files.items()}
    others = [component for component, group in names.items() if not any(_is_variant(n, variant) for n in group)]
    if len(others) == len(files):
        raise ValueError(f"{folder}: no weights of variant {variant!r}")
    if others:
        warn_of_input(f"{folder}: no variant {variant} of {', '.join(others)}: read as they are")


def _is_variant(name: str, variant: str) -> bool:
    return re.search(rf"[.]{re.escape(variant)}[.-]", name) is not None


def text_encoder_factories(
    family: ModelFamily, tokenizers: Mapping[str, CLIPTokenizer], source_family: ModelFamily
) -> Mapping[str, Callable[[Any], text_encoders.TextEncoder]]:
    """Factories of a family's text encoders; the layers that were dropped are those of `source_family`."""
    factories = {}
    for name, spec in family.text_encoders.items():
        factories[name] = partial(
            text_encoders.TextEncoder,
            tokenizer=tokenizers[name],
            layer_idx=spec.layer_idx,
            final_norm=spec.final_norm,
            with_projection=spec.with_projection,
            num_dropped_layers=source_family.text_encoders.get(name, spec).num_dropped_layers,
        )
    return factories


def read_component(folder: Path, name: str, variant: str | None = None) -> tuple[Any, tuple[WeightFile, ...]]:
    """The network of a component on the meta device, from its folder, and its files, compared with it."""
    network = build_from_config(folder / "config.json", partial(keys.build_meta_network, name))
    files = open_weight_files(folder, WEIGHT_FILE_STEMS[name], variant)
    return network, match_weight_files(name, network, map(dequantize, files))


def read_model_index(folder: Path) -> dict[str, Any]:
    """model_index.json; ValueError for a class that is not supported, so that no code is run."""
    path = folder / MODEL_INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: not a model (no {MODEL_INDEX_NAME})")
    index = read_json(path)
    try:
        choose(PIPELINE_FAMILIES, index.get("_class_name", ""), "_class_name")
        family = FAMILIES[_pipeline_family(index)]
        for name, value in index.items():
            if not name.startswith("_"):
                _check_index_entry(name, value)
        for name in (*family.configs, "scheduler", *(TOKENIZER_FOLDERS[encoder] for encoder in family.text_encoders)):
            if index.get(name, [None])[0] is None:
                raise ValueError(f"no {name}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return index


def _pipeline_family(index: Mapping[str, Any]) -> str:
    """A family that encodes text and guides as the pipeline of an index."""
    has_second_encoder = index["_class_name"] == "DiffusionPipeline" and index.get("text_encoder_2", [None])[0]
    return "sdxl" if has_second_encoder else PIPELINE_FAMILIES[index["_class_name"]]


def _check_index_entry(name: str, value: Any) -> None:
    """ValueError for a member of the index that is not supported."""
    if name in MODEL_INDEX_FLAGS:
        if value not in MODEL_INDEX_FLAGS[name]:
            raise ValueError(f"{name} = {value!r} is not supported")
        return
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"unknown field {name} = {value!r}")
    library, kind = value
    own_library, classes = COMPONENT_CLASSES.get(name, (library, IGNORED_COMPONENT_CLASSES.get(name, ())))
    if kind is not None and (library != own_library or kind not in classes):
        raise ValueError(f"{name} is {library}.{kind}, which is not supported")


def open_weight_files(folder: Path, stem: str, variant: str | None = None) -> list[SafetensorsFile]:
    """The weights in a folder: one file, or the shards that an index names; ValueError names what does not fit."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise ValueError(f"{folder}: {error_text(error)}") from None
    try:
        chosen = choose_weight_files(names, stem, variant)
    except ValueError as error:
        raise ValueError(f"{folder}/{error}") from None
    if not chosen[0].endswith(".json"):
        return [open_safetensors(folder / chosen[0])]
    return build_from_config(folder / chosen[0], lambda index: open_shards(folder, index.get("weight_map")))


def choose_weight_files(names: Iterable[str], stem: str, variant: str | None = None) -> list[str]:
    """Of the names in a folder those of its weights: one file, or an index and its shards.

    Where there are none of that variant, they are the plain ones, or the only ones. ValueError where several variants
    and no plain weights are there.
    """
    pattern = re.compile(
        rf"{stem}(?:\.(\w+))?(?P<shard>-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors(?P<index>\.index(?:\.(\w+))?\.json)?"
    )
    variants: dict[str, list[str]] = defaultdict(list)  # by variant; an index first
    pickles = []
    for name in sorted(names):
        if match := pattern.fullmatch(name):
            variant_files = variants[next(filter(None, match.group(1, 3, 5)), "")]
            variant_files.insert(0 if match["index"] else len(variant_files), name)
        elif name.startswith(stem) and name.endswith(PICKLE_SUFFIXES):
            pickles.append(name)
    if pickles and not variants:
        raise ValueError(f"{pickles[0]}: {PICKLE_MESSAGE.format(what='a pickle')}")
    plain = "" if "" in variants or len(variants) != 1 else next(iter(variants))
    key = variant if variant and (variant in variants or plain not in variants) else plain
    if key not in variants:
        known = ", ".join(name or "the plain one" for name in variants) or "none"
        raise ValueError(f"{stem}.{f'{key}.' if key else ''}safetensors: no such file; variants here: {known}")
    files = variants[key]
    if whole := [name for name in files if not re.search(r"-\d{5}-of-|\.index\.", name)]:
        return whole[:1]
    if not files[0].endswith(".json"):
        raise ValueError(f"{files[0]}: a shard without {stem}.safetensors.index.json")
    return files


def open_shards(folder: Path, weight_map: Any) -> list[SafetensorsFile]:
    """The files of an index; ValueError unless each holds exactly the tensors that the index lists for it."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("no weight_map")
    names: dict[str, set[str]] = defaultdict(set)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{tensor} is in {name!r}, which is no file of this folder")
        names[name].add(tensor)
    files = []
    for name, tensors in sorted(names.items()):
        file = open_safetensors(folder / name)
        if missing := sorted(tensors - file.tensor_infos.keys()):
            raise ValueError(f"{name} lacks {missing[0]}, which the index lists")
        if unknown := sorted(file.tensor_infos.keys() - tensors):
            raise ValueError(f"{name} holds {unknown[0]}, which the index does not list")
        files.append(file)
    return files


def load_matching_tokenizer(folder: Path, config: Any) -> CLIPTokenizer:
    """The tokenizer in a folder, for a text encoder of that configuration."""
    tokenizer = load_checked_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{folder}: {len(tokenizer)} tokens, and the text encoder knows {config.vocab_size}")
    token, last = max(tokenizer.vocab.items(), key=lambda item: item[1])
    if last >= config.vocab_size:
        raise ValueError(f"{folder}: {token!r:.60} has id {last}, and the text encoder knows {config.vocab_size}")
    length = tokenizer.model_max_length
    if type(length) not in (int, float) or not min(length, config.max_position_embeddings) >= MIN_PROMPT_TOKENS:
        limits = f"model_max_length {length!r:.60} with max_position_embeddings {config.max_position_embeddings}"
        raise ValueError(f"{folder}: {limits}: a number, at least {MIN_PROMPT_TOKENS}, is needed")
    tokenizer.model_max_length = int(min(length, config.max_position_embeddings))
    return tokenizer


def load_checked_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from a folder with vocab.json and merges.txt, or with tokenizer.json alone."""
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: no such file")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file() and name.endswith(".json"):
            content = read_json(folder / name)
            if name == "tokenizer_config.json" and content.get("auto_map"):
                raise ValueError(f"{folder / name}: auto_map names code, which is not run")
    try:
        return load_clip_tokenizer(folder)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        reason = error_text(error) if isinstance(error, OSError | ValueError) else repr(error)
        raise ValueError(f"{folder}: not a tokenizer of CLIP ({' '.join(reason.split())})") from None


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The settings that generation_config.json recommends, where there is one."""
    path = folder / GENERATION_CONFIG_NAME
    return build_from_config(path, _check_generation_config) if path.is_file() else {}


def _check_generation_config(config: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Mapping[str, Any]] = {
        "sampler": SAMPLERS,
        "spacing": SPACINGS,
        "final_sigmas_type": dict.fromkeys(FINAL_SIGMAS_TYPES),
    }
    for name, value in config.items():
        if name in tables:
            choose(tables[name], value, name)
        elif name in ("num_inference_steps", "guidance_scale"):
            get_config_number(config, name, 0)
        else:
            raise ValueError(f"unknown field {name} = {value!r}")
    return config


def find_family_by_unet(unet: UNetConfig, prediction: Prediction) -> str | None:
    """The family with a U-Net of that configuration, native size apart, and that prediction; None if there is none."""
    for name, family in FAMILIES.items():
        expected = UNetConfig.from_dict(family.unet)
        same = replace(unet, sample_size=expected.sample_size, upcast_attention=expected.upcast_attention) == expected
        if same and PREDICTIONS[PREDICTION_TYPES[family.scheduler["prediction_type"]]] is prediction:
            return name
    return None


def select_model_files(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of all files of a repository those that `read_directory` opens; ValueError where none is of the variant."""
    files = defaultdict(list)
    for path in names:
        folder, _, name = path.rpartition("/")
        files[folder].append(name)
    chosen = [name for name in files[""] if name in (MODEL_INDEX_NAME, GENERATION_CONFIG_NAME)]
    chosen += [f"scheduler/{name}" for name in files["scheduler"] if name == "scheduler_config.json"]
    for folder in TOKENIZER_FOLDERS.values():
        chosen += [f"{folder}/{name}" for name in files[folder] if name in TOKENIZER_FILES]
    for component in WEIGHT_FILE_STEMS:
        if component in files:
            chosen += [f"{component}/{n}" for n in select_component_files(files[component], component, variant)]
    if variant and not any(_is_variant(name, variant) for name in chosen):
        raise ValueError(f"no weights of variant {variant!r}")
    return chosen


def select_component_files(names: Iterable[str], component: str, variant: str | None = None) -> list[str]:
    """Of the names in a component's folder those that `read_component` opens."""
    return ["config.json", *choose_weight_files(names, WEIGHT_FILE_STEMS[component], variant)]
