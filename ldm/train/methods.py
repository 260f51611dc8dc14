"""The ways to tune a model: what learns, how it is written, and how a pipeline takes it up again."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

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
from ldm.nn.text_encoders import TextEncoder, tokenize
from ldm.pipeline.pipeline import Pipeline

KOHYA_LORA_FILE = "lora_kohya.safetensors"


class FinetuneMethod(NamedTuple):
    """A way to tune.

    `prepare` gives the model, in float32, whose parameters that learn want gradients; `export_job` writes what they have
    become to a folder, and `reopen` is a pipeline with that folder's content. `drawing` is one of the model as it is,
    given what it was prepared from too.
    """

    prepare: Callable[[Checkpoint, FinetuneObjective], Checkpoint]
    export: Callable[[Checkpoint, FinetuneObjective, Path], None]
    load_pipeline: Callable[[FinetuneObjective, Path], Pipeline]
    make_pipeline: Callable[[Checkpoint, Checkpoint, FinetuneObjective], Pipeline]


def base_load_options(objective: FinetuneObjective) -> LoadOptions:
    """How the pretrained model of a recipe is loaded."""
    return LoadOptions(revision=objective.revision, variant=objective.variant)


def base_model_path(objective: FinetuneObjective) -> str | Path:
    """What a recipe tunes."""
    return objective.pretrained_model_name_or_path or PICTO_PATH


def load_base_pipeline(objective: FinetuneObjective) -> Pipeline:
    """The pretrained model as it was."""
    return Pipeline.from_pretrained(base_model_path(objective), revision=objective.revision, variant=objective.variant)


def trainable_network_names(model: Checkpoint, objective: FinetuneObjective) -> list[str]:
    """The folders of the networks that learn."""
    return ["unet", *TEXT_ENCODERS[: len(model.text_encoders) if objective.train_text_encoder else 0]]


def _prepare_full(model: Checkpoint, objective: FinetuneObjective) -> Checkpoint:
    for folder in trainable_network_names(model, objective):
        model.networks[folder].requires_grad_(True)
    return model


def _export_full(model: Checkpoint, objective: FinetuneObjective, folder: Path) -> None:
    """The whole model in diffusers' layout: all as it was but for the networks that learnt."""
    save_as_directory(locate_weights(base_model_path(objective), base_load_options(objective)), folder)
    for name in trainable_network_names(model, objective):
        config = model.unet.config.to_dict() if name == "unet" else read_json(folder / name / "config.json")
        shutil.rmtree(folder / name)
        save_module(
            model.networks[name],
            config,
            folder / name,
            DIFFUSERS_WEIGHTS_NAME if name == "unet" else TRANSFORMERS_WEIGHTS_NAME,
        )


def _prepare_lora(model: Checkpoint, objective: FinetuneObjective) -> Checkpoint:
    for folder in trainable_network_names(model, objective):
        inject_lora(model.networks[folder], objective.targets, objective.rank, objective.alpha, objective.dora)
    return model


def extract_adapter(model: Checkpoint) -> Adapter:
    """What the adapters of a model have learnt."""
    found = {
        target: d
        for name, network in model.networks.items()
        for target, d in extract_lora_deltas(network, name).items()
    }
    return Adapter("tuned", found)


def _export_lora(model: Checkpoint, objective: FinetuneObjective, folder: Path) -> None:
    """The adapter in diffusers' dialect and, beside it, in kohya's."""
    for name, to in ((LORA_WEIGHT_NAME_SAFE, "diffusers"), (KOHYA_LORA_FILE, "kohya")):
        save_adapter(extract_adapter(model), folder / name, to, model.networks, model.family)


def _load_pipeline_lora(objective: FinetuneObjective, folder: Path) -> Pipeline:
    pipe = load_base_pipeline(objective)
    pipe.load_lora_weights(folder / LORA_WEIGHT_NAME_SAFE)
    return pipe


def _prepare_inversion(model: Checkpoint, objective: FinetuneObjective) -> Checkpoint:
    """Text encoders of a larger vocabulary; the model's own stay as they were."""
    word, known = objective.placeholder_token or "", objective.initializer_token or ""
    tokenizer = model.text_encoders[0].tokenizer
    if len(tokenize(tokenizer, word)) < 2:
        raise ValueError(f"placeholder_token {word!r}: must be a word that the model does not have yet")
    ids = tokenize(tokenizer, known)
    return replace(
        model,
        text_encoders=tuple(_extend_text_encoder(tower, ids, objective.num_vectors) for tower in model.text_encoders),
    )


def _extend_text_encoder(text_encoder: TextEncoder, initializer_ids: Sequence[int], num_vectors: int) -> TextEncoder:
    """A tower whose new vectors begin as those of some tokens, in turn."""
    shared: dict[int, object] = {id(a): a for a in (*text_encoder.model.parameters(), *text_encoder.model.buffers())}
    twin = replace(text_encoder, model=copy.deepcopy(text_encoder.model, shared))
    embeddings = twin.text_model.embeddings
    first = embeddings.token_embedding.weight[[initializer_ids[k % len(initializer_ids)] for k in range(num_vectors)]]
    embeddings.token_embedding = ExtendedEmbedding(embeddings.token_embedding, first)
    return twin


def extract_placeholder_embeddings(model: Checkpoint) -> dict[str, Tensor]:
    """What a word has become, by the folder of the text encoder."""
    return {
        name: tower.text_model.embeddings.token_embedding.vectors.detach().cpu()
        for name, tower in zip(TEXT_ENCODERS, model.text_encoders, strict=False)
    }


def _export_inversion(model: Checkpoint, objective: FinetuneObjective, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_embeddings(
        folder / TEXT_INVERSION_NAME_SAFE, objective.placeholder_token or "", extract_placeholder_embeddings(model)
    )


def _load_pipeline_inversion(objective: FinetuneObjective, folder: Path) -> Pipeline:
    pipe = load_base_pipeline(objective)
    pipe.load_textual_inversion(folder / TEXT_INVERSION_NAME_SAFE, objective.placeholder_token or "")
    return pipe


def _make_pipeline_inversion(base_model: Checkpoint, model: Checkpoint, objective: FinetuneObjective) -> Pipeline:
    pipe = Pipeline(base_model)
    with TemporaryDirectory() as folder:
        _export_inversion(model, objective, Path(folder))
        pipe.load_textual_inversion(Path(folder) / TEXT_INVERSION_NAME_SAFE, objective.placeholder_token or "")
    return pipe


def _make_pipeline(base_model: Checkpoint, model: Checkpoint, objective: FinetuneObjective) -> Pipeline:
    return Pipeline(model)


FINETUNE_METHODS: dict[str, FinetuneMethod] = {
    "full": FinetuneMethod(
        _prepare_full, _export_full, lambda objective, folder: Pipeline.from_pretrained(folder), _make_pipeline
    ),
    "lora": FinetuneMethod(_prepare_lora, _export_lora, _load_pipeline_lora, _make_pipeline),
    "textual_inversion": FinetuneMethod(
        _prepare_inversion, _export_inversion, _load_pipeline_inversion, _make_pipeline_inversion
    ),
}
