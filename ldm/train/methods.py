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

from ldm.checkpoints.convert import convert
from ldm.checkpoints.embeddings import save_embeddings
from ldm.checkpoints.files import DIFFUSERS, TRANSFORMERS, read_json, save_module
from ldm.checkpoints.formats import Checkpoint, locate
from ldm.checkpoints.lora_save import DIFFUSERS_FILE, save_adapter
from ldm.checkpoints.networks import TEXT_ENCODERS
from ldm.config import TuneObjective
from ldm.nn.inversion import Extended
from ldm.nn.lora import Adapter
from ldm.nn.lora_train import changes, inject
from ldm.nn.text import Tower, spelled
from ldm.pipeline import PICTO, Pipeline

KOHYA_FILE = "lora_kohya.safetensors"
EMBEDS_FILE = "learned_embeds.safetensors"


class Method(NamedTuple):
    """A way to tune.

    `prepare` gives the model, in float32, whose parameters that learn want gradients; `export` writes what they have
    become to a folder, and `reopen` is a pipeline with that folder's content. `drawing` is one of the model as it is,
    given what it was prepared from too.
    """

    prepare: Callable[[Checkpoint, TuneObjective], Checkpoint]
    export: Callable[[Checkpoint, TuneObjective, Path], None]
    reopen: Callable[[TuneObjective, Path], Pipeline]
    drawing: Callable[[Checkpoint, Checkpoint, TuneObjective], Pipeline]


def source(objective: TuneObjective) -> str | Path:
    """What a recipe tunes."""
    return objective.pretrained_model_name_or_path or PICTO


def untuned(objective: TuneObjective) -> Pipeline:
    """The pretrained model as it was."""
    return Pipeline.from_pretrained(source(objective), revision=objective.revision, variant=objective.variant)


def learning(model: Checkpoint, objective: TuneObjective) -> list[str]:
    """The folders of the networks that learn."""
    return ["unet", *TEXT_ENCODERS[: len(model.towers) if objective.train_text_encoder else 0]]


def _prepare_full(model: Checkpoint, objective: TuneObjective) -> Checkpoint:
    for folder in learning(model, objective):
        model.networks[folder].requires_grad_(True)
    return model


def _export_full(model: Checkpoint, objective: TuneObjective, folder: Path) -> None:
    """The whole model in diffusers' layout: all as it was but for the networks that learnt."""
    convert(locate(source(objective), objective.revision, None, objective.variant), folder)
    for name in learning(model, objective):
        config = model.unet.config.to_dict() if name == "unet" else read_json(folder / name / "config.json")
        shutil.rmtree(folder / name)
        save_module(model.networks[name], config, folder / name, DIFFUSERS if name == "unet" else TRANSFORMERS)


def _prepare_lora(model: Checkpoint, objective: TuneObjective) -> Checkpoint:
    for folder in learning(model, objective):
        inject(model.networks[folder], objective.targets, objective.rank, objective.alpha, objective.dora)
    return model


def adapter(model: Checkpoint) -> Adapter:
    """What the adapters of a model have learnt."""
    found = {target: d for name, network in model.networks.items() for target, d in changes(network, name).items()}
    return Adapter("tuned", found)


def _export_lora(model: Checkpoint, objective: TuneObjective, folder: Path) -> None:
    """The adapter in diffusers' dialect and, beside it, in kohya's."""
    for name, to in ((DIFFUSERS_FILE, "diffusers"), (KOHYA_FILE, "kohya")):
        save_adapter(adapter(model), folder / name, to, model.networks, model.family)


def _reopen_lora(objective: TuneObjective, folder: Path) -> Pipeline:
    pipe = untuned(objective)
    pipe.load_lora_weights(folder / DIFFUSERS_FILE)
    return pipe


def _prepare_inversion(model: Checkpoint, objective: TuneObjective) -> Checkpoint:
    """Text encoders of a larger vocabulary; the model's own stay as they were."""
    word, known = objective.placeholder_token or "", objective.initializer_token or ""
    tokenizer = model.towers[0].tokenizer
    if len(spelled(tokenizer, word)) < 2:
        raise ValueError(f"placeholder_token {word!r}: must be a word that the model does not have yet")
    ids = spelled(tokenizer, known)
    return replace(model, towers=tuple(_extended(tower, ids, objective.num_vectors) for tower in model.towers))


def _extended(tower: Tower, ids: Sequence[int], count: int) -> Tower:
    """A tower whose new vectors begin as those of some tokens, in turn."""
    shared: dict[int, object] = {id(a): a for a in (*tower.model.parameters(), *tower.model.buffers())}
    twin = replace(tower, model=copy.deepcopy(tower.model, shared))
    embeddings = twin.text.embeddings
    first = embeddings.token_embedding.weight[[ids[k % len(ids)] for k in range(count)]]
    embeddings.token_embedding = Extended(embeddings.token_embedding, first)
    return twin


def vectors(model: Checkpoint) -> dict[str, Tensor]:
    """What a word has become, by the folder of the text encoder."""
    return {
        name: tower.text.embeddings.token_embedding.vectors.detach().cpu()
        for name, tower in zip(TEXT_ENCODERS, model.towers, strict=False)
    }


def _export_inversion(model: Checkpoint, objective: TuneObjective, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_embeddings(folder / EMBEDS_FILE, objective.placeholder_token or "", vectors(model))


def _reopen_inversion(objective: TuneObjective, folder: Path) -> Pipeline:
    pipe = untuned(objective)
    pipe.load_textual_inversion(folder / EMBEDS_FILE, objective.placeholder_token or "")
    return pipe


def _drawing_inversion(plain: Checkpoint, model: Checkpoint, objective: TuneObjective) -> Pipeline:
    pipe = Pipeline(plain)
    with TemporaryDirectory() as folder:
        _export_inversion(model, objective, Path(folder))
        pipe.load_textual_inversion(Path(folder) / EMBEDS_FILE, objective.placeholder_token or "")
    return pipe


def _drawing(plain: Checkpoint, model: Checkpoint, objective: TuneObjective) -> Pipeline:
    return Pipeline(model)


METHODS: dict[str, Method] = {
    "full": Method(_prepare_full, _export_full, lambda objective, folder: Pipeline.from_pretrained(folder), _drawing),
    "lora": Method(_prepare_lora, _export_lora, _reopen_lora, _drawing),
    "textual_inversion": Method(_prepare_inversion, _export_inversion, _reopen_inversion, _drawing_inversion),
}
