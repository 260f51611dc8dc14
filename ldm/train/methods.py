"""The ways to fine-tune a model: what is trained, how it is exported, and how a pipeline loads it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ldm.adapters.lora import Adapter
from ldm.adapters.lora_saving import save_adapter
from ldm.adapters.lora_training import extract_lora_deltas, inject_lora
from ldm.adapters.textual_inversion import ExtendedEmbedding, save_embeddings
from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.formats import PICTO_PATH, Checkpoint, locate_weights
from ldm.checkpoints.hub import LORA_WEIGHT_NAME_SAFE, TEXT_INVERSION_NAME_SAFE
from ldm.checkpoints.networks import TEXT_ENCODERS
from ldm.checkpoints.saving import save_as_directory
from ldm.checkpoints.tensors import DIFFUSERS_WEIGHTS_NAME, TRANSFORMERS_WEIGHTS_NAME, save_module
from ldm.config import FinetuneObjective
from ldm.files import read_json
from ldm.nn.text_encoders import TextEncoder
from ldm.pipeline.pipeline import Pipeline

KOHYA_LORA_FILE = "lora_kohya.safetensors"
Metadata = Mapping[str, str]  # of a safetensors header


class FinetuneMethod(NamedTuple):
    """`prepare` makes the trained parameters of a model require a gradient; `export` writes them to a folder.

    `load_pipeline` is a pipeline with that folder's content: adapters and embeddings are loaded into the pipeline that
    is given, by default that of the recipe's pretrained model.
    """

    prepare: Callable[[Checkpoint, FinetuneObjective], Checkpoint]
    export: Callable[[Checkpoint, FinetuneObjective, Path, Metadata], None]
    load_pipeline: Callable[..., Pipeline]  # (objective, folder, pipe=None)


def base_model_path(objective: FinetuneObjective) -> str | Path:
    """The pretrained model of a recipe."""
    return objective.pretrained_model_name_or_path or PICTO_PATH


def base_load_options(objective: FinetuneObjective) -> LoadOptions:
    """How the pretrained model of a recipe is loaded."""
    vae = objective.pretrained_vae_model_name_or_path
    return LoadOptions(revision=objective.revision, variant=objective.variant, vae=vae)


def load_base_pipeline(objective: FinetuneObjective) -> Pipeline:
    """A pipeline of the pretrained model of a recipe."""
    return load_pipeline(base_model_path(objective), objective, **vars(base_load_options(objective)))


def load_pipeline(source: str | Path, objective: FinetuneObjective, **options: Any) -> Pipeline:
    """A pipeline that reads prompts as the training read captions."""
    pipe = Pipeline.from_pretrained(source, **options)
    return pipe if objective.clip_skip is None else Pipeline(skip_text_layers(pipe.model, objective))


def skip_text_layers(model: Checkpoint, objective: FinetuneObjective) -> Checkpoint:
    """The model with text encoders whose states are those of the recipe's `clip_skip`; ValueError for no such layer."""
    if objective.clip_skip is None:
        return model
    skips = [encoder.clip_skip_converter()(objective.clip_skip) for encoder in model.text_encoders]
    encoders = (replace(e, layer_idx=e.layer_idx - k) for e, k in zip(model.text_encoders, skips, strict=True))
    return replace(model, text_encoders=tuple(encoders))


def trainable_network_names(model: Checkpoint, objective: FinetuneObjective) -> list[str]:
    """The folders of the networks that are trained, or get adapters."""
    return ["unet", *TEXT_ENCODERS[: len(model.text_encoders) if objective.train_text_encoder else 0]]


def float32_components(objective: FinetuneObjective) -> tuple[str, ...]:
    """The networks that are trained whole, and so are in float32; the others are frozen."""
    if objective.method != "full":
        return ()
    return ("unet", *(TEXT_ENCODERS if objective.train_text_encoder else ()))


def prepare_full(model: Checkpoint, objective: FinetuneObjective) -> Checkpoint:
    for name in trainable_network_names(model, objective):
        model.networks[name].requires_grad_(True)
    return model


def export_full(model: Checkpoint, objective: FinetuneObjective, folder: Path, metadata: Metadata) -> None:
    """The whole model in diffusers' layout: the pretrained one with the trained networks replaced."""
    save_as_directory(locate_weights(base_model_path(objective), base_load_options(objective)), folder)
    for name in trainable_network_names(model, objective):
        is_unet = name == "unet"
        config = model.unet.config.to_dict() if is_unet else read_json(folder / name / "config.json")
        shutil.rmtree(folder / name)
        file = DIFFUSERS_WEIGHTS_NAME if is_unet else TRANSFORMERS_WEIGHTS_NAME
        save_module(model.networks[name], config, folder / name, file)


def prepare_lora(model: Checkpoint, objective: FinetuneObjective) -> Checkpoint:
    for name in trainable_network_names(model, objective):
        inject_lora(model.networks[name], objective.targets, objective.rank, objective.alpha, objective.dora)
    return model


def export_lora(model: Checkpoint, objective: FinetuneObjective, folder: Path, metadata: Metadata) -> None:
    """The adapter in diffusers' format and, beside it, in kohya's."""
    deltas = [extract_lora_deltas(network, name) for name, network in model.networks.items()]
    adapter = Adapter(
        "tuned", {target: delta for network in deltas for target, delta in network.items()}, metadata=metadata
    )
    for file, lora_format in ((LORA_WEIGHT_NAME_SAFE, "diffusers"), (KOHYA_LORA_FILE, "kohya")):
        save_adapter(adapter, folder / file, lora_format, model.networks, model.family)


def load_lora_pipeline(objective: FinetuneObjective, folder: Path, pipe: Pipeline | None = None) -> Pipeline:
    pipe = pipe or load_base_pipeline(objective)
    pipe.load_lora_weights(folder / LORA_WEIGHT_NAME_SAFE)
    return pipe


def prepare_inversion(model: Checkpoint, objective: FinetuneObjective) -> Checkpoint:
    """The model with text encoders of a larger vocabulary, which share all weights with its own."""
    placeholder, tokenizer = objective.placeholder_token or "", model.text_encoders[0].tokenizer
    if len(tokenizer.encode(placeholder)) < 2:
        raise ValueError(f"placeholder_token {placeholder!r}: must not be a single token of the model's vocabulary")
    ids = tokenizer.encode(objective.initializer_token or "")
    encoders = tuple(extend_text_encoder(encoder, ids, objective.num_vectors) for encoder in model.text_encoders)
    return replace(model, text_encoders=encoders)


def extend_text_encoder(text_encoder: TextEncoder, initializer_ids: Sequence[int], num_vectors: int) -> TextEncoder:
    """A text encoder with new trainable vectors, which start as those of some tokens in turn."""
    shared: dict[int, object] = {id(a): a for a in (*text_encoder.model.parameters(), *text_encoder.model.buffers())}
    extended = replace(text_encoder, model=copy.deepcopy(text_encoder.model, shared))
    embeddings: Any = extended.model.text_model.embeddings
    first = embeddings.token_embedding.weight[[initializer_ids[k % len(initializer_ids)] for k in range(num_vectors)]]
    embeddings.token_embedding = ExtendedEmbedding(embeddings.token_embedding, first)
    return extended


def export_inversion(model: Checkpoint, objective: FinetuneObjective, folder: Path, metadata: Metadata) -> None:
    """The placeholder's vectors for each text encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: list[Any] = [encoder.model.text_model.embeddings.token_embedding for encoder in model.text_encoders]
    vectors = {name: t.vectors.detach().cpu() for name, t in zip(TEXT_ENCODERS, tables, strict=False)}
    save_embeddings(folder / TEXT_INVERSION_NAME_SAFE, objective.placeholder_token or "", vectors, metadata)


def load_inversion_pipeline(objective: FinetuneObjective, folder: Path, pipe: Pipeline | None = None) -> Pipeline:
    pipe = pipe or load_base_pipeline(objective)
    pipe.load_textual_inversion(folder / TEXT_INVERSION_NAME_SAFE, objective.placeholder_token or "")
    return pipe


def load_full_pipeline(objective: FinetuneObjective, folder: Path, pipe: Pipeline | None = None) -> Pipeline:
    vae = objective.pretrained_vae_model_name_or_path
    return load_pipeline(folder, objective, vae=vae)


FINETUNE_METHODS: dict[str, FinetuneMethod] = {
    "full": FinetuneMethod(prepare_full, export_full, load_full_pipeline),
    "lora": FinetuneMethod(prepare_lora, export_lora, load_lora_pipeline),
    "textual_inversion": FinetuneMethod(prepare_inversion, export_inversion, load_inversion_pipeline),
}
