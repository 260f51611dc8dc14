"""The two layouts of a model on disk: a directory of diffusers and a single file; and files of one component.

A directory has a folder for each component, and an index that names their classes. A single file (CompVis' LDM,
Stability's SGM) has no configuration: its tensors tell its family.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import detect, keys
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily, build_from_config, get_config_number
from ldm.checkpoints.networks import (
    TEXT_ENCODERS,
    ModelSpec,
    ResolvedConfig,
    UNetProbe,
    WeightFile,
    match_weight_files,
    select_weights,
)
from ldm.checkpoints.schedule import (
    DIFFUSERS_PREDICTION_TYPES,
    DIFFUSERS_SCHEDULERS,
    PREDICTION_TYPES,
    family_scheduler_config,
    load_scheduler_config,
    parse_scheduler_config,
)
from ldm.checkpoints.tensors import PICKLE_MESSAGE, PICKLE_SUFFIXES, SafetensorsFile, open_safetensors
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SPACINGS
from ldm.errors import choose, error_text
from ldm.files import read_json
from ldm.nn import text_encoders
from ldm.nn.unet import UNetConfig
from ldm.nn.vae import get_vae_config, vae_scale_factor

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
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
LOSS_PREFIX = "loss."  # of the training loss's tensors in an autoencoder's own file


def read_directory(folder: Path, options: LoadOptions = LoadOptions()) -> ModelSpec:
    """The model in a folder; ValueError in one line names the file and what is missing, unknown or not supported.

    `options.variant` chooses `diffusion_pytorch_model.fp16.safetensors` and the like; by default the plain weights are
    read, or the only ones.
    """
    index = read_model_index(folder)
    pipeline = FAMILIES[_pipeline_family(index)]
    if "controlnet" in index:
        warnings.warn(f"{folder}: its ControlNet is not read", stacklevel=2)
    networks, groups = {}, []
    for name in pipeline.configs:
        networks[name], files = read_component(folder / name, name, options.variant)
        groups.append(files)
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
        _text_encoder_factories(pipeline, tokenizers, FAMILIES[family] if family else pipeline),
        lambda probe: ResolvedConfig(schedule, family, unet, {**read_json(scheduler_path), **overrides}),
        {
            **pipeline.generation_defaults,
            **PIPELINE_DEFAULTS.get(index["_class_name"], {}),
            **read_generation_config(folder),
        },
        index.get("force_zeros_for_empty_prompt", pipeline.force_zeros_for_empty_prompt),
    )


def _text_encoder_factories(
    family: ModelFamily, tokenizers: Mapping[str, text_encoders.CLIPTokenizer], source_family: ModelFamily
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
    return network, match_weight_files(name, network, open_weight_files(folder, WEIGHT_FILE_STEMS[name], variant))


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

    ValueError where there are none of that variant, and where several variants and no plain weights are there.
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
    key = variant or ("" if "" in variants or len(variants) != 1 else next(iter(variants)))
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


def load_matching_tokenizer(folder: Path, config: Any) -> text_encoders.CLIPTokenizer:
    """The tokenizer in a folder, for a text encoder of that configuration."""
    tokenizer = load_checked_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{folder}: {len(tokenizer)} tokens, and the text encoder knows {config.vocab_size}")
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return tokenizer


def load_checked_tokenizer(folder: Path) -> text_encoders.CLIPTokenizer:
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
        return text_encoders.load_clip_tokenizer(folder)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{folder}: not a tokenizer of CLIP ({' '.join(str(error).split())})") from None


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The settings that generation_config.json recommends, where there is one."""
    path = folder / GENERATION_CONFIG_NAME
    return build_from_config(path, _check_generation_config) if path.is_file() else {}


def _check_generation_config(config: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Mapping[str, Any]] = {"sampler": SAMPLERS, "spacing": SPACINGS}
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
    """Of all files of a repository those that `read_directory` opens."""
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
    return chosen


def select_component_files(names: Iterable[str], component: str, variant: str | None = None) -> list[str]:
    """Of the names in a component's folder those that `read_component` opens."""
    return ["config.json", *choose_weight_files(names, WEIGHT_FILE_STEMS[component], variant)]


def read_single_file(path: Path, options: LoadOptions = LoadOptions()) -> ModelSpec:
    """The model in a file (diffusers' `from_single_file`), with the configurations of its family.

    The tensors tell the family, or `options.family` does.

    If the file has no autoencoder, the spec lacks its weights. ValueError names the file and what is missing, unknown
    or of another shape.
    """
    file = open_safetensors(path)
    tensors = file.meta_tensors()
    user_options = {"family": options.family, "prediction": options.prediction}
    try:
        detect.detect_prediction(tensors, file.metadata, **user_options)  # refuses contradictions
        family = FAMILIES[options.family or detect.detect_families(tensors)[0]]
        mappings = keys.map_single_file_keys(_add_missing_vae(tensors, family), family, options.ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def resolve(probe: UNetProbe) -> ResolvedConfig:
        try:
            detection = detect.detect_model(
                tensors,
                file.metadata,
                lambda: probe(parse_scheduler_config(family.scheduler).sde),
                **user_options,
                zero_snr=options.zero_snr,
            )
            sibling = FAMILIES[detection.family]  # with the same tensors, but maybe another native size
            config = family_scheduler_config(sibling, detection.prediction, detection.zero_snr)
            unet_config = UNetConfig.from_dict(sibling.unet)
            return ResolvedConfig(parse_scheduler_config(config), detection.family, unet_config, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    tokenizers = {n: text_encoders.build_clip_tokenizer(spec.pad_token_id) for n, spec in family.text_encoders.items()}
    return ModelSpec(
        {component: keys.build_meta_network(component, config) for component, config in family.configs.items()},
        ((WeightFile(file, {name: mapping for name, mapping in mappings.items() if name in tensors}),),),
        _text_encoder_factories(family, tokenizers, family),
        resolve,
        family.generation_defaults,
        family.force_zeros_for_empty_prompt,
    )


def _add_missing_vae(tensors: Mapping[str, Tensor], family: ModelFamily) -> dict[str, Tensor]:
    """The tensors, and a missing autoencoder's on the meta device; ValueError if another network is missing."""
    prefixes = {"unet": keys.UNET_PREFIX, "vae": keys.VAE_PREFIX}
    prefixes |= {name: spec.prefix for name, spec in family.text_encoders.items()}
    missing = [n for n, prefix in prefixes.items() if not any(name.startswith(prefix) for name in tensors)]
    for component in missing:
        if component != "vae":
            raise ValueError(f"no {component} in it (nothing begins with {prefixes[component]})")
    return {**_original_tensors(family, missing), **tensors}


def _original_tensors(family: ModelFamily, components: Container[str]) -> dict[str, Tensor]:
    """The tensors of some components in a family's single file, on the meta device."""
    return {m.original_key: m.original_tensor for m in keys.build_key_mappings(family) if m.component in components}


def replace_vae(model: ModelSpec, source: Path) -> ModelSpec:
    """The model with the autoencoder of a folder or file instead, which must have latents of the same shape.

    A folder has its own configuration, a file the model's; a file's names are those of diffusers or of LDM, with or
    without the prefix `first_stage_model.`
    """
    network, files = _read_vae(source, get_vae_config(model.networks["vae"]))
    expected, actual = (
        f"{a.config.latent_channels} channels at scale factor {vae_scale_factor(a)}"
        for a in (model.networks["vae"], network)
    )
    if expected != actual:
        raise ValueError(f"{source}: its latents have {actual}, the model's {expected}")
    groups = (select_weights(group, model.networks.keys() - {"vae"}) for group in model.shard_groups)
    return replace(
        model, networks={**model.networks, "vae": network}, shard_groups=(*(group for group in groups if group), files)
    )


def _read_vae(source: Path, config: Mapping[str, Any]) -> tuple[Any, tuple[WeightFile, ...]]:
    if source.is_dir():
        whole = not (source / "config.json").is_file() and (source / "vae").is_dir()
        return read_component(source / "vae" if whole else source, "vae")
    file = open_safetensors(source)
    network = keys.build_meta_network("vae", config)
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in file.tensor_infos):
        return network, match_weight_files("vae", network, [file])
    names = {
        keys.VAE_PREFIX + name.removeprefix(keys.VAE_PREFIX): name
        for name in file.tensor_infos
        if not name.startswith((LOSS_PREFIX, keys.EMA_PREFIX))
    }
    family, tensors = replace(FAMILIES["sd1"], vae=config), file.meta_tensors()
    others = _original_tensors(family, family.configs.keys() - {"vae"})
    try:
        mappings = keys.map_single_file_keys(others | {key: tensors[name] for key, name in names.items()}, family)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return network, (WeightFile(file, {name: mappings[key] for key, name in names.items() if key in mappings}),)
