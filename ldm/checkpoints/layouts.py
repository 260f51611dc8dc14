"""diffusers' directory layout: a folder for each component, and an index that names their classes.

One file for a whole model, in its makers' layout (CompVis' LDM, Stability's SGM), and files of an autoencoder."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ldm.checkpoints import detect, keys
from ldm.checkpoints.configs import build_from_config, get_config_number
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily
from ldm.checkpoints.networks import (
    TEXT_ENCODERS,
    ModelSpec,
    ResolvedConfig,
    UNetProbe,
    WeightFile,
    build_meta_network,
    match_weight_files,
)
from ldm.checkpoints.schedule import (
    DIFFUSERS_PREDICTION_TYPES,
    DIFFUSERS_SCHEDULERS,
    PREDICTION_TYPES,
    load_scheduler_config,
    parse_scheduler_config,
)
from ldm.checkpoints.tensors import PICKLE_MESSAGE, SafetensorsFile, open_safetensors
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SPACINGS
from ldm.errors import choose
from ldm.files import read_json
from ldm.nn import text_encoders
from ldm.nn.unet import UNetConfig
from ldm.nn.vae import get_vae_config, vae_scale_factor

MODEL_INDEX_NAME, GENERATION_CONFIG_NAME = "model_index.json", "generation_config.json"


class PipelineSpec(NamedTuple):
    """A pipeline of diffusers: the text towers that it has, how it reads them, and its default guidance."""

    text_encoders: tuple[str, ...] = TEXT_ENCODERS[:1]
    layer_idx: int = -1
    final_norm: bool = True
    guidance_scale: float = 7.5
    force_zeros_for_empty_prompt: bool = False


SD_PIPELINE_SPEC, SDXL_PIPELINE_SPEC = (
    PipelineSpec(),
    PipelineSpec(TEXT_ENCODERS, layer_idx=-2, final_norm=False, guidance_scale=5.0, force_zeros_for_empty_prompt=True),
)
DIFFUSERS_PIPELINES = {
    "StableDiffusionPipeline": SD_PIPELINE_SPEC,
    "StableDiffusionImg2ImgPipeline": SD_PIPELINE_SPEC,
    "StableDiffusionInpaintPipeline": SD_PIPELINE_SPEC,
    "StableDiffusionXLPipeline": SDXL_PIPELINE_SPEC,
    "StableDiffusionXLImg2ImgPipeline": SDXL_PIPELINE_SPEC,
    "StableDiffusionXLInpaintPipeline": SDXL_PIPELINE_SPEC,
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
IGNORED_COMPONENTS = {  # components that are not read: their classes, and why
    "safety_checker": (("StableDiffusionSafetyChecker",), "judges pictures, draws none"),
    "feature_extractor": (("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorPil"), "its eye"),
    "image_encoder": (("CLIPVisionModelWithProjection",), "of pictures as prompts"),
}
MODEL_INDEX_FLAGS = {  # of the index: the values that are understood
    "force_zeros_for_empty_prompt": (True, False),
    "requires_safety_checker": (True, False, None),
    "requires_aesthetics_score": (False, None),  # True is SDXL's refiner
    "add_watermarker": (True, False, None),
}
WEIGHT_FILE_STEMS = {  # the beginning of a file of weights, by folder
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
DEFAULT_NUM_INFERENCE_STEPS = 50  # diffusers' default


def read_directory(folder: Path, options: LoadOptions = LoadOptions()) -> ModelSpec:
    """The model in a folder; ValueError in one line names the file and what is missing, unknown or not supported.

    `options.variant` chooses `diffusion_pytorch_model.fp16.safetensors` and the like; by default the plain weights are
    read, or the only ones.
    """
    index = read_model_index(folder)
    kind = DIFFUSERS_PIPELINES[index["_class_name"]]
    networks, groups = {}, []
    for name in ("unet", "vae", *kind.text_encoders):
        networks[name], files = read_component(folder / name, name, options.variant)
        groups.append(files)
    overrides: dict[str, Any] = {"_class_name": index["scheduler"][1]}
    if options.prediction is not None:
        overrides["prediction_type"] = choose(DIFFUSERS_PREDICTION_TYPES, options.prediction, "prediction")
    if options.zero_snr is not None:
        overrides["rescale_betas_zero_snr"] = options.zero_snr
    schedule = load_scheduler_config(folder / "scheduler" / "scheduler_config.json", **overrides)
    unet = networks["unet"].config
    family = find_family_by_unet(unet, schedule.prediction)
    return ModelSpec(
        networks,
        tuple(groups),
        {name: _text_encoder_factory(folder, name, kind, networks[name].config, family) for name in kind.text_encoders},
        lambda probe: ResolvedConfig(schedule, family, unet),
        {
            "num_inference_steps": DEFAULT_NUM_INFERENCE_STEPS,
            "guidance_scale": kind.guidance_scale,
            **read_generation_config(folder),
        },
        index.get("force_zeros_for_empty_prompt", kind.force_zeros_for_empty_prompt),
    )


def _text_encoder_factory(
    folder: Path, name: str, pipeline: PipelineSpec, config: Any, family: str | None
) -> Callable[[Any], text_encoders.TextEncoder]:
    """How the pipeline reads a text encoder."""
    return partial(
        text_encoders.TextEncoder,
        tokenizer=load_matching_tokenizer(folder / TOKENIZER_FOLDERS[name], config),
        layer_idx=pipeline.layer_idx,
        final_norm=pipeline.final_norm,
        with_projection=name == TEXT_ENCODERS[1],
        num_dropped_layers=FAMILIES[family].text_encoders[name].num_dropped_layers if family else 0,
    )


def read_component(folder: Path, name: str, variant: str | None = None) -> tuple[Any, tuple[WeightFile, ...]]:
    """The network in a folder that is named so, on the meta device, and its files, compared with it."""
    network = build_from_config(folder / "config.json", partial(build_meta_network, name))
    return network, match_weight_files(name, network, open_weight_files(folder, WEIGHT_FILE_STEMS[name], variant))


def read_model_index(folder: Path) -> dict[str, Any]:
    """model_index.json, whose classes are those that are known; nothing else is opened, least of all code."""
    path = folder / MODEL_INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: not a model (no {MODEL_INDEX_NAME})")
    index = read_json(path)
    try:
        kind = choose(DIFFUSERS_PIPELINES, index.get("_class_name", ""), "_class_name")
        for name, value in index.items():
            if not name.startswith("_"):
                _check_index_entry(name, value)
        for name in (
            "unet",
            "vae",
            "scheduler",
            *kind.text_encoders,
            *(TOKENIZER_FOLDERS[tower] for tower in kind.text_encoders),
        ):
            if index.get(name, [None])[0] is None:
                raise ValueError(f"no {name}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return index


def _check_index_entry(name: str, value: Any) -> None:
    """ValueError for a member of the index that is none of ours."""
    if name in MODEL_INDEX_FLAGS:
        if value not in MODEL_INDEX_FLAGS[name]:
            raise ValueError(f"{name} = {value!r} is not supported")
        return
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"unknown field {name} = {value!r}")
    library, kind = value
    if kind is None:
        return
    known = (
        kind in IGNORED_COMPONENTS[name][0]
        if name in IGNORED_COMPONENTS
        else (library, kind) in _component_classes(name)
    )
    if not known:
        raise ValueError(f"{name} is {library}.{kind}, which is not supported")


def _component_classes(name: str) -> list[tuple[str, str]]:
    library, kinds = COMPONENT_CLASSES.get(name, ("", ()))
    return [(library, kind) for kind in kinds]


def open_weight_files(folder: Path, stem: str, variant: str | None = None) -> list[SafetensorsFile]:
    """The files of weights in a folder: one, or the shards that an index names; ValueError names what does not fit."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    try:
        chosen = choose_weight_files(names, stem, variant)
    except ValueError as error:
        raise ValueError(f"{folder}/{error}") from None
    if not chosen[0].endswith(".json"):
        return [open_safetensors(folder / chosen[0])]
    index = folder / chosen[0]
    return build_from_config(index, lambda content: open_shards(folder, content.get("weight_map")))


def choose_weight_files(names: Iterable[str], stem: str, variant: str | None = None) -> list[str]:
    """Of the names in a folder those that hold its weights: one file, or an index and its shards.

    ValueError where there is none of that variant, or where it is not said which.
    """
    pattern = re.compile(
        rf"{stem}(?:\.(\w+))?(?P<shard>-\d{{5}}-of-\d{{5}})?(?:\.(\w+))?\.safetensors(?P<index>\.index(?:\.(\w+))?\.json)?"
    )
    found: dict[str, list[str]] = defaultdict(list)  # by variant; an index first
    pickles = []
    for name in sorted(names):
        if match := pattern.fullmatch(name):
            kind = next(filter(None, match.group(1, 3, 5)), "")
            found[kind].insert(0 if match["index"] else len(found[kind]), name)
        elif name.startswith(stem) and name.endswith((".bin", ".ckpt", ".pt")):
            pickles.append(name)
    if pickles and not found:
        raise ValueError(f"{pickles[0]}: {PICKLE_MESSAGE.format(what='a pickle')}")
    asked = variant or ("" if "" in found or len(found) != 1 else next(iter(found)))
    if asked not in found:
        have = ", ".join(kind or "the plain one" for kind in found) or "none"
        raise ValueError(f"{stem}.{f'{asked}.' if asked else ''}safetensors: no such file; variants here: {have}")
    chosen = found[asked]
    whole = [name for name in chosen if not re.search(r"-\d{5}-of-|\.index\.", name)]
    if whole:
        return whole[:1]
    if not chosen[0].endswith(".json"):
        raise ValueError(f"{chosen[0]}: a shard without {stem}.safetensors.index.json")
    return chosen


def open_shards(folder: Path, weight_map: Any) -> list[SafetensorsFile]:
    """The files that an index names, each of which holds the tensors that it says, and no others."""
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
        if lacking := sorted(tensors - file.tensor_infos.keys()):
            raise ValueError(f"{name} lacks {lacking[0]}, which should be there")
        if stray := sorted(file.tensor_infos.keys() - tensors):
            raise ValueError(f"{name} holds {stray[0]}, which the index does not know")
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
    """What a model's makers recommend beside its pipeline's defaults: generation_config.json, where there is one."""
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
    """The family whose U-Net is of that configuration and predicts so, if there is one; native sizes do not count."""
    for name, family in FAMILIES.items():
        own = UNetConfig.from_dict(family.unet)
        same = replace(unet, sample_size=own.sample_size, upcast_attention=own.upcast_attention) == own
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
    for folder, stem in WEIGHT_FILE_STEMS.items():
        if folder in files:
            chosen += [
                f"{folder}/{name}" for name in ("config.json", *choose_weight_files(files[folder], stem, variant))
            ]
    return chosen


LOSS_PREFIX = "loss."  # what an autoencoder was trained with, in its own file


def read_single_file(path: Path, options: LoadOptions = LoadOptions()) -> ModelSpec:
    """The model in a file, with the configurations of its family, which its tensors tell (or `options.family`).

    A file without an autoencoder gives a spec without its weights. ValueError names the file and what is missing, unknown
    or of another shape.
    """
    file = open_safetensors(path)
    tensors = file.meta_tensors()
    try:
        detect.detect_prediction(
            tensors, file.metadata, family=options.family, prediction=options.prediction
        )  # refuses contradictions
        record = FAMILIES[options.family or detect.detect_family(tensors)]
        entries = keys.map_single_file_keys(_add_missing_vae(tensors, record), record, options.ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def told(probe: UNetProbe) -> ResolvedConfig:
        try:
            found = detect.detect_model(
                tensors,
                file.metadata,
                lambda: probe(parse_scheduler_config(record.scheduler).sde),
                family=options.family,
                prediction=options.prediction,
                zero_snr=options.zero_snr,
            )
            own = FAMILIES[found.family]  # of the same tensors, maybe of another native size
            config = family_scheduler_config(own, found.prediction, found.zero_snr)
            return ResolvedConfig(parse_scheduler_config(config), found.family, UNetConfig.from_dict(own.unet))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return ModelSpec(
        {folder: build_meta_network(folder, config) for folder, config in record.configs.items()},
        ((WeightFile(file, {given: entry for given, entry in entries.items() if given in tensors}),),),
        {
            folder: partial(
                text_encoders.TextEncoder,
                tokenizer=text_encoders.build_clip_tokenizer(tower.pad_token_id),
                layer_idx=tower.layer_idx,
                final_norm=tower.final_norm,
                with_projection=tower.with_projection,
                num_dropped_layers=tower.num_dropped_layers,
            )
            for folder, tower in record.text_encoders.items()
        },
        told,
        record.generation_defaults,
        record.force_zeros_for_empty_prompt,
    )


def family_scheduler_config(family: ModelFamily, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """The scheduler_config.json of a family whose network predicts so; only trailing steps begin at zero SNR."""
    changes = {
        "prediction_type": choose(DIFFUSERS_PREDICTION_TYPES, prediction, "prediction"),
        "rescale_betas_zero_snr": zero_snr,
    }
    return {**family.scheduler, **changes, **({"timestep_spacing": "trailing"} if zero_snr else {})}


def _add_missing_vae(tensors: Mapping[str, Tensor], family: ModelFamily) -> dict[str, Tensor]:
    """The tensors, and those of an autoencoder where there is none; ValueError names another network that lacks."""
    prefixes = {
        "unet": keys.UNET_PREFIX,
        "vae": keys.VAE_PREFIX,
        **{n: t.prefix for n, t in family.text_encoders.items()},
    }
    lacking = [n for n, prefix in prefixes.items() if not any(name.startswith(prefix) for name in tensors)]
    for folder in lacking:
        if folder != "vae":
            raise ValueError(f"no {folder} in it (nothing begins with {prefixes[folder]})")
    return {
        entry.original_key: entry.original_tensor
        for entry in keys.build_key_mappings(family)
        if entry.component in lacking
    } | {**tensors}


def replace_vae(model: ModelSpec, source: Path) -> ModelSpec:
    """The model with the autoencoder of a folder or a file instead, of the same latents.

    A folder has its own configuration, a file the model's; its names are diffusers' or LDM's, with or without their
    `first_stage_model.`
    """
    network, files = _read_vae(source, get_vae_config(model.networks["vae"]))
    ours, theirs = (
        f"of {a.config.latent_channels} channels, one for {vae_scale_factor(a)} pixels a side"
        for a in (model.networks["vae"], network)
    )
    if ours != theirs:
        raise ValueError(f"{source}: its latents are {theirs}; the model's are {ours}")
    groups = [
        tuple(
            source._replace(
                key_mappings={n: entry for n, entry in source.key_mappings.items() if entry.component != "vae"}
            )
            for source in group
        )
        for group in model.shard_groups
    ]
    kept = tuple(group for group in groups if any(source.key_mappings for source in group))
    return replace(
        model,
        networks={**model.networks, "vae": network},
        shard_groups=(*kept, files),
    )


def _read_vae(source: Path, config: Mapping[str, Any]) -> tuple[Any, tuple[WeightFile, ...]]:
    if source.is_dir():
        whole = not (source / "config.json").is_file() and (source / "vae").is_dir()
        return read_component(source / "vae" if whole else source, "vae")
    file = open_safetensors(source)
    network = build_meta_network("vae", config)
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in file.tensor_infos):
        return network, match_weight_files("vae", network, [file])
    tensors = {
        name: a for name, a in file.meta_tensors().items() if not name.startswith((LOSS_PREFIX, keys.EMA_PREFIX))
    }
    prefixed = {keys.VAE_PREFIX + name.removeprefix(keys.VAE_PREFIX): name for name in tensors}
    family = replace(FAMILIES["sd1"], vae=config)
    others = {
        entry.original_key: entry.original_tensor
        for entry in keys.build_key_mappings(family)
        if entry.component != "vae"
    }
    try:
        entries = keys.map_single_file_keys(
            {**others, **{new: tensors[name] for new, name in prefixed.items()}}, family
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return network, (WeightFile(file, {name: entries[new] for new, name in prefixed.items() if new in entries}),)
