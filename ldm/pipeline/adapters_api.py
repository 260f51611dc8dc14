"""A pipeline's adapters and placeholder tokens: loaded, weighted, fused and removed, by diffusers' names."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ldm.adapters.lora import Adapter, AdapterMerger, AdapterWeight
from ldm.adapters.lora_loading import load_adapter
from ldm.adapters.textual_inversion import has_bundled_embeddings, read_placeholder_tokens
from ldm.checkpoints import hub
from ldm.checkpoints.few_steps import few_step_defaults, list_names
from ldm.checkpoints.formats import Checkpoint, is_hub_source, locate_weights
from ldm.checkpoints.networks import TEXT_ENCODERS
from ldm.checkpoints.tensors import open_safetensors, save_tensors
from ldm.pipeline.compat import SILENT, Missing, Rule, translate
from ldm.pipeline.prompt_encoder import PromptEncoder

FILE_OPTIONS: Mapping[str, Rule] = {  # of diffusers' load_lora_weights and load_textual_inversion
    **dict.fromkeys(("low_cpu_mem_usage", "use_safetensors", "local_files_only", "prefix"), SILENT),
    "hotswap": Missing("unload_lora_weights(name), then load_lora_weights"),
    "network_alphas": Missing("a dict with its alphas"),
    "cache_dir": Missing("the environment variable HF_HOME"),
}


class AdaptersAPI:
    """The adapters and placeholder tokens of a pipeline. None of it is to be called while images are generated."""

    model: Checkpoint
    prompt_encoder: PromptEncoder
    adapters: AdapterMerger
    bundled_tokens: dict[str, list[str]]  # by adapter: placeholder tokens that came in its file
    adapter_files: dict[str, Path]
    adapter_defaults: dict[str, dict[str, Any]]  # settings that distilled ones are for
    fused_weights: dict[str, AdapterWeight | None]  # by fused adapter: its weight before, None: it is unloaded since
    disabled_weights: dict[str, AdapterWeight]

    def load_lora_weights(
        self,
        path: str | Path | Mapping[str, Tensor],
        weight: AdapterWeight | str = 1.0,
        adapter_name: str | None = None,
        **options: Any,
    ) -> None:
        """Merge (fuse) an adapter of any format into the weights, times `weight` (or a pair: U-Net, text encoders).

        `path` is a file, a directory, a hub id or the tensors themselves; `weight_name` and `subfolder` name a file in
        it. It names the adapter, with its folder (or owner) where another one has that name, unless `adapter_name`
        does, which may stand second as in diffusers. ValueError, with nothing changed, for a file that does not fit:
        `ldm.adapters.lora_loading.load_adapter`. Embeddings in the file (OneTrainer's) become placeholder tokens.
        """
        if isinstance(weight, str):
            adapter_name, weight = weight, 1.0
        if isinstance(path, Mapping):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"{adapter_name or 'default'}.safetensors"
                save_tensors(path, file, torch.float32)
                self._load_adapter(file, weight, adapter_name or "default")
            return
        source = find_file(path, options)
        file = locate_weights(source, kind="adapter")
        self.adapter_files[self._load_adapter(file, weight, adapter_name, source)] = file

    def _load_adapter(self, file: Path, weight: AdapterWeight, name: str | None, source: str | Path = "") -> str:
        adapter = load_adapter(file, self.model.networks, self.model.family)
        name = name or self._choose_adapter_name(source, adapter)
        self.adapters.load(replace(adapter, name=name), weight)
        titles = (adapter.metadata.get(key, "") for key in ("ss_output_name", "modelspec.title"))
        self.adapter_defaults[name] = few_step_defaults([*list_names(file), *titles], "adapter")
        self.prompt_encoder.clear()
        if file.is_file() and has_bundled_embeddings(open_safetensors(file).tensor_infos):
            try:
                tokens = self._add_embeddings(file, read_placeholder_tokens(file), may_rename=False)
                self.bundled_tokens[name] = tokens
            except ValueError:
                self._unload_adapter(name)
                raise
        return name

    def _choose_adapter_name(self, path: str | Path, adapter: Adapter) -> str:
        """The name of a file, folder or repository; with its folder's name where another adapter has that name."""
        if is_hub_source(path):
            name, longer = hub.name_from_repo_id(str(path)), str(path)
        else:
            name, longer = adapter.name, f"{Path(path).expanduser().absolute().parent.name}/{adapter.name}"
        other, _ = self.adapters.loaded.get(name, (adapter, 0.0))
        return name if other.sha256 == adapter.sha256 else longer

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[AdapterWeight | Mapping[str, float]] | Mapping[str, float] | None = None,
    ) -> None:
        """Set the weights of loaded adapters (1 by default, one for all, or one each); others get 0.

        A weight may be a pair or {"unet": ..., "text_encoder": ...}. ValueError for unequal lists and unknown names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        rows = [weights] * len(names) if isinstance(weights, float | int | Mapping) else list(weights)
        if len(names) != len(rows):
            lists = f"names {names!r} and weights {rows!r}"
            raise ValueError(f"set_adapters: {lists} must be two lists of one length")
        self._set_weights(dict(zip(names, map(read_weight, rows), strict=True)))
        self.disabled_weights.clear()

    def _set_weights(self, weights: Mapping[str, AdapterWeight]) -> None:
        self.adapters.set_weights(weights)
        self.prompt_encoder.clear()

    def _weights(self) -> dict[str, AdapterWeight]:
        return {name: weight for name, (_, weight) in self.adapters.loaded.items()}

    def unload_lora_weights(self, adapter_name: str | None = None, **options: Any) -> None:
        """Remove one adapter, or all but those that `fuse_lora` fused: the weights are as before, bit for bit."""
        names = [adapter_name] if adapter_name is not None else list(self.adapters.loaded)
        for name in names:
            if adapter_name is None and name in self.fused_weights:
                self.fused_weights[name] = None
            else:
                self._unload_adapter(name)

    def _unload_adapter(self, name: str) -> None:
        self.adapters.unload(name)
        for table in (self.fused_weights, self.disabled_weights, self.adapter_files, self.adapter_defaults):
            table.pop(name, None)
        for token in self.bundled_tokens.pop(name, []):
            self.prompt_encoder.remove_embedding(token)
        self.prompt_encoder.clear()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._unload_adapter(name)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Keep adapters, times `lora_scale`, when all are unloaded. (In the weights they always are.)"""
        if components not in (None, [], ["unet"], ["unet", *TEXT_ENCODERS], ["unet", TEXT_ENCODERS[0]]):
            raise ValueError(f"fuse_lora: components {components!r}: write set_adapters(name, (unet, text encoders))")
        weights = self._weights()
        for name in adapter_names or [name for name in weights if name not in self.fused_weights]:
            self.fused_weights[name] = weights[name]
            weights[name] = scale_weight(weights[name], lora_scale)
        self._set_weights(weights)

    def unfuse_lora(self, components: Sequence[str] | None = None, **options: Any) -> None:
        """Undo `fuse_lora`."""
        before = dict(self.fused_weights)
        self.fused_weights.clear()
        for name in [name for name, weight in before.items() if weight is None]:
            self._unload_adapter(name)
        self._set_weights(
            {**self._weights(), **{name: weight for name, weight in before.items() if weight is not None}}
        )

    def disable_lora(self) -> None:
        """Set all weights to 0 until `enable_lora`."""
        self.disabled_weights = self.disabled_weights or self._weights()
        self._set_weights({})

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        if self.disabled_weights:
            self._set_weights(self.disabled_weights)
            self.disabled_weights = {}

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters whose weight is not 0."""
        hidden = {name for name, weight in self.fused_weights.items() if weight is None}
        return [name for name, weight in self._weights().items() if weight and name not in hidden]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of the loaded adapters by the networks that they change."""
        found: dict[str, list[str]] = {}
        for name, (adapter, _) in self.adapters.loaded.items():
            for component in sorted({target.split("/")[0] for target in adapter.deltas}, reverse=True):
                found.setdefault(component, []).append(name)
        return found

    def load_textual_inversion(
        self,
        path: str | Path | Mapping[str, Tensor] | Sequence[Any],
        token: str | Sequence[str] | None = None,
        **options: Any,
    ) -> str:
        """Add the embeddings in a file, or of a hub id, under placeholder tokens, and return the first of these.

        A token is the file's own (`read_placeholder_tokens`), or the file's stem where the vocabulary has that word;
        `token` names that of a file with one. `path` may also be a list, or {token: vectors}; `weight_name` and
        `subfolder` name a file in a folder. ValueError as `PromptEncoder.add_embedding`.
        """
        if isinstance(path, list | tuple):
            tokens = [None] * len(path) if token is None else list(token)
            added = [self.load_textual_inversion(p, t, **options) for p, t in zip(path, tokens, strict=True)]
            return added[0]
        if isinstance(path, Tensor) or any(options.get(name) is not None for name in ("text_encoder", "tokenizer")):
            raise TypeError("load_textual_inversion: write load_textual_inversion(file, token), for all text encoders")
        options = {k: v for k, v in options.items() if k not in ("text_encoder", "tokenizer")}
        if isinstance(path, Mapping):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "embedding.safetensors"
                save_tensors(path, file, torch.float32)
                return self._load_embedding(file, token)
        source = find_file(cast(str | Path, path), options)
        return self._load_embedding(locate_weights(source, kind="embedding"), token)

    def _load_embedding(self, file: Path, token: str | Sequence[str] | None) -> str:
        tokens = read_placeholder_tokens(file) or {"": file.stem}
        if token is not None and len(tokens) > 1:
            raise ValueError(f"{file}: holds {len(tokens)} tokens ({', '.join(tokens)}), which are not renamed")
        token = token if token is None or isinstance(token, str) else token[0]
        added = self._add_embeddings(file, tokens if token is None else dict.fromkeys(tokens, token), token is None)
        return added[0]

    def _add_embeddings(self, file: Path, tokens: Mapping[str, str], may_rename: bool) -> list[str]:
        """Add all of a file's embeddings, by its own names for their tokens, or none."""
        added: list[str] = []
        try:
            for own, token in tokens.items():
                known = may_rename and len(tokens) == 1 and self.prompt_encoder.is_in_vocabulary(token)
                self.prompt_encoder.add_embedding(file.stem if known else token, file, own)
                added.append(file.stem if known else token)
        except ValueError:
            for token in added:
                self.prompt_encoder.remove_embedding(token)
            raise
        return added

    def unload_textual_inversion(self, token: str | Sequence[str] | None = None, **options: Any) -> None:
        """Remove a placeholder token, several, or all."""
        tokens = list(self.prompt_encoder.embeddings) if token is None else [token] if isinstance(token, str) else token
        for one in tokens:
            self.prompt_encoder.remove_embedding(one)

    @property
    def embedding_hashes(self) -> dict[str, str]:
        """The SHA-256 of the file of each placeholder token."""
        return {token: embedding.sha256 for token, embedding in self.prompt_encoder.embeddings.items()}


def find_file(source: str | Path, options: Mapping[str, Any]) -> str | Path:
    """A file in a folder or on the hub by diffusers' `weight_name` and `subfolder`; TypeError for other options."""
    translate(FILE_OPTIONS, options, ("weight_name", "subfolder"), "load")
    parts = [part for part in (options.get("subfolder"), options.get("weight_name")) if part]
    if not parts:
        return source
    if not is_hub_source(source):
        return Path(source).joinpath(*parts)
    if not options.get("weight_name"):
        raise ValueError(f"{source}: weight_name=... is needed beside subfolder")
    name = "/".join(parts)
    if not name.endswith(".safetensors"):
        raise ValueError(f"{source}: {name} is no .safetensors file; `ldm convert` makes one of a pickle")
    return f"{source}:{name}"


def read_weight(weight: Any) -> AdapterWeight:
    """An adapter's weight, or {"unet": ..., "text_encoder": ...} as a pair; ValueError for weights of blocks."""
    if not isinstance(weight, Mapping):
        return weight
    values = [weight.get("unet", 1.0), weight.get("text_encoder", weight.get("text_encoder_2", 1.0))]
    if not all(isinstance(value, float | int) for value in values):
        raise ValueError('set_adapters: weights of blocks are not supported; write {"unet": 0.5, "text_encoder": 1.0}')
    return values[0], values[1]


def scale_weight(weight: AdapterWeight, scale: float) -> AdapterWeight:
    """An adapter's weight times a scale."""
    return (weight[0] * scale, weight[1] * scale) if isinstance(weight, tuple) else weight * scale
