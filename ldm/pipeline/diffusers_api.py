"""What diffusers' pipelines have beside a call: components, schedulers, devices, adapters, saving, copies."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ldm.adapters.lora import AdapterMerger, AdapterWeight
from ldm.checkpoints import hub
from ldm.checkpoints.formats import Checkpoint
from ldm.checkpoints.hub import is_repo_id
from ldm.checkpoints.layouts import (
    COMPONENT_CLASSES,
    GENERATION_CONFIG_NAME,
    MODEL_INDEX_NAME,
    TOKENIZER_FOLDERS,
    WEIGHT_FILE_STEMS,
)
from ldm.checkpoints.networks import TEXT_ENCODERS
from ldm.checkpoints.saving import DIFFUSERS_VERSION, SAFETENSORS_SUFFIX
from ldm.checkpoints.schedule import DIFFUSERS_PREDICTION_TYPES, parse_scheduler_config
from ldm.checkpoints.tensors import add_dtype, save_tensors
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import betas_from_alphas_cumprod
from ldm.errors import suggest
from ldm.files import atomic_write, write_json
from ldm.nn.tokenizer import save_clip_tokenizer
from ldm.nn.vae import make_image_processor, vae_scale_factor
from ldm.pipeline.arguments import per_prompt
from ldm.pipeline.call import CallState
from ldm.pipeline.compat import (
    COMPONENTS,
    EMPTY_COMPONENTS,
    METHODS,
    OWN_FOLDER,
    OWN_VAE,
    Missing,
    find_method,
    say_once,
    schedule_options,
    scheduler_class,
    scheduler_config,
)
from ldm.pipeline.prompt_encoder import PromptEncoder
from ldm.pipeline.scheduler import BatchScheduler, num_concat_channels


class DiffusersAPI:
    """The attributes and methods of diffusers' pipelines, by `ldm.pipeline.compat`'s tables and in terms of ours."""

    task = ""  # of `ldm.compat`'s classes: what they begin from
    model: Checkpoint
    prompt_encoder: PromptEncoder
    adapters: AdapterMerger
    batch_scheduler: BatchScheduler
    call_state: CallState
    adapter_files: dict[str, Path]

    def _set_model(self, model: Checkpoint) -> None:
        """Go on with a model of the same networks."""
        batch_size, call = self.batch_scheduler._batch_size, self.batch_scheduler.batched_unet.function
        self.model = self.prompt_encoder.model = model
        self.batch_scheduler = BatchScheduler(model, self.prompt_encoder, batch_size)
        self.batch_scheduler.batched_unet.function = call
        self.denoiser = self.batch_scheduler.denoiser

    @property
    def unet(self) -> Any:
        """The U-Net, or what `torch.compile` made of it."""
        return self.batch_scheduler.batched_unet.function

    @unet.setter
    def unet(self, module: Any) -> None:
        if getattr(module, "_orig_mod", module) is not self.model.unet:
            raise ValueError(
                f"unet: only torch.compile(pipe.unet) can be assigned; for other weights write {OWN_FOLDER}"
            )
        self.batch_scheduler.batched_unet.function = module

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers that stands for the sampler and spacing; assign one to change them."""
        config = dict(self.model.scheduler_config) or self._tabulated_scheduler_config()
        scheduler = scheduler_class(config.pop("_class_name"))(**config)
        scheduler.pipeline = self
        return scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        config = scheduler_config(scheduler, self.scheduler.config)
        settings, model = parse_scheduler_config(config), self.model
        changes: dict[str, Any] = {}
        before, after = schedule_options(self.scheduler.config), schedule_options(config)
        if before != after:
            options = {name: value for name, value in after.items() if value != before[name]}
            changes = {"sde": settings.sde, "prediction": settings.prediction}
            changes["load_options"] = {**model.load_options, **options}
        others = {name: v for name, v in model.generation_defaults.items() if name != "final_sigmas_type"}
        defaults = {**others, **settings.generation_defaults}
        self._set_model(replace(model, generation_defaults=defaults, scheduler_config=config, **changes))

    def _tabulated_scheduler_config(self) -> dict[str, Any]:
        """A configuration with the model's own betas, for one that was read from no scheduler_config.json."""
        sde = self.model.sde
        t = torch.arange(1, sde.num_train_timesteps + 1, dtype=torch.float64) / sde.num_train_timesteps
        betas = betas_from_alphas_cumprod(sde.marginal(t)[0] ** 2).tolist()
        prediction = next(name for name, one in PREDICTIONS.items() if one is self.model.prediction)
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": len(betas),
            "trained_betas": betas,
            "prediction_type": DIFFUSERS_PREDICTION_TYPES.get(prediction, "epsilon"),
        }

    @property
    def components(self) -> dict[str, Any]:
        """The networks, tokenizers and scheduler by diffusers' names: `X(**pipe.components)` shares them."""
        return {name: getattr(self, name) for name in self._component_names()} | dict.fromkeys(EMPTY_COMPONENTS)

    def _component_names(self) -> list[str]:
        encoders = TEXT_ENCODERS[: len(self.model.text_encoders)]
        return ["unet", "vae", *encoders, *(TOKENIZER_FOLDERS[name] for name in encoders), "scheduler"]

    @property
    def config(self) -> dict[str, Any]:
        """What stands in model_index.json, and where the model was loaded from."""
        return {"_name_or_path": self.name_or_path, **self._model_index()}

    @property
    def name_or_path(self) -> str:
        return str(self.model.load_options.get("path", "picto"))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.unet.dtype

    @property
    def vae_scale_factor(self) -> int:
        return vae_scale_factor(self.model.vae)

    @property
    def image_processor(self) -> Any:
        """diffusers' VaeImageProcessor, for `postprocess` of what `pipe.vae.decode` gives."""
        return make_image_processor(self.model.vae)

    @property
    def num_timesteps(self) -> int:
        """The steps of the current call."""
        return self.call_state.num_timesteps

    @property
    def guidance_scale(self) -> float | None:
        """Of the current call."""
        return self.call_state.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return (self.guidance_scale or 0) > 1

    @property
    def interrupt(self) -> bool:
        return self.call_state.interrupt

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_interrupt", "interrupt"):
            self.call_state.interrupt = bool(value)
        elif name in EMPTY_COMPONENTS or name == "requires_safety_checker":
            if value:
                say_once(f"{name}: without effect: there is none")
        elif name in COMPONENTS and name not in ("unet", "scheduler"):
            if value is not getattr(self, name):
                raise ValueError(f"{name}: cannot be assigned; write {OWN_VAE if name == 'vae' else OWN_FOLDER}")
        elif isinstance(rule := METHODS.get(name), Missing):
            raise AttributeError(f"{type(self).__name__}: {name} cannot be set; write {rule.instead}")
        elif "call_state" in self.__dict__ and not (name.startswith("_") or name in self.__dict__ or name in dir(self)):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{suggest(name, dir(self))}")
        else:
            object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # or every attribute would have a type

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or "model" not in self.__dict__:
                raise AttributeError(name)
            if name in EMPTY_COMPONENTS or name == "hf_device_map":
                return None
            if name == "_interrupt":
                return self.call_state.interrupt
            if name == "vae":
                return self.model.vae
            for k, (encoder, tokenizer) in enumerate(TOKENIZER_FOLDERS.items()):
                if name in (encoder, tokenizer) and k < len(self.model.text_encoders):
                    one = self.model.text_encoders[k]
                    return one.model if name == encoder else one.tokenizer.to_transformers()
            return find_method(type(self).__name__, name, dir(self))

    def to(self, *args: Any, device: Any = None, dtype: Any = None, torch_dtype: Any = None, **options: Any) -> Self:
        """Move the networks to a device, to a dtype, or both, in any order, and return the pipeline.

        In float16 an autoencoder with `force_upcast` stays in float32.
        """
        if others := set(options) - {"silence_dtype_warnings"}:
            raise TypeError(f"to(...): unknown argument {sorted(others)[0]!r}; write to(device, dtype)")
        dtype = dtype or torch_dtype
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        networks: dict[str, Any] = self.model.networks
        target = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
        for name, network in networks.items():
            upcast = name == "vae" and dtype == torch.float16 and network.config.force_upcast
            options = target | ({"dtype": torch.float32} if upcast else {})
            nn.Module.to(network, **options)  # diffusers' own method warns of what it keeps in float32: nothing
        self.prompt_encoder.clear()
        if dtype is not None:
            self._set_model(self.model)
        return self

    def cuda(self) -> Self:
        return self.to("cuda")

    def cpu(self) -> Self:
        return self.to("cpu")

    def upcast_vae(self) -> None:
        """Make the autoencoder float32."""
        self.model.vae.to(torch.float32)

    def enable_vae_tiling(self) -> None:
        """Decode and encode images of any size in bounded memory, in strips that give the image of the whole."""
        self.model.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode and encode images at once."""
        self.model.vae.disable_tiling()

    def set_progress_bar_config(self, **config: Any) -> None:
        """disable=True: no progress bar; desc: its name; leave=False: it goes when it is full."""
        self.call_state.progress_bar = config

    def encode_prompt(self, prompt: Any, *args: Any, **arguments: Any) -> tuple[Tensor | None, ...]:
        """diffusers' prompt_embeds and negative_prompt_embeds [B, T, C], and for SDXL both pooled ones [B, P].

        The arguments are diffusers' in their order: prompt_2 (SDXL), device, num_images_per_prompt,
        do_classifier_free_guidance, negative_prompt, negative_prompt_2 (SDXL), clip_skip. Embeddings of a batch have
        the length of the longest.
        """
        is_xl = len(self.model.text_encoders) > 1
        second = ("prompt_2", "negative_prompt_2") if is_xl else ()
        order = [*second[:1], "device", "num_images_per_prompt", "do_classifier_free_guidance", "negative_prompt"]
        given = dict(zip(order, args, strict=False)) | arguments
        if unknown := given.keys() - {*order, *second, "clip_skip", "lora_scale"}:
            raise TypeError(f"encode_prompt: unknown argument {(name := sorted(unknown)[0])!r}{suggest(name, order)}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        skip, each = given.get("clip_skip") or 0, given.get("num_images_per_prompt", 1)

        def column(name: str) -> list[Any]:
            return per_prompt(name, given.get(name), len(prompts))

        pairs = list(zip(prompts, column("prompt_2"), strict=True))
        if given.get("do_classifier_free_guidance", True):
            pairs += zip(column("negative_prompt"), column("negative_prompt_2"), strict=True)
        count = max(len(self.prompt_encoder.tokenize_prompt(text)) for pair in pairs for text in pair)
        rows = [self.prompt_encoder.encode(text, count, skip, other) for text, other in pairs for _ in range(each)]
        both = torch.cat([cond.context for cond, _ in rows]).split(len(prompts) * each)
        embeds = (*both, None)[:2]
        if not is_xl:
            return embeds
        pooled = torch.cat([vector for _, vector in rows if vector is not None]).split(len(prompts) * each)
        return *embeds, *(*pooled, None)[:2]

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write the model as it is now in diffusers' layout, adapters fused; placeholder tokens stay in their files."""
        if not safe_serialization:
            raise ValueError("safe_serialization: pickles are not written; leave it out")
        options.pop("max_shard_size", None)
        folder, model = Path(save_directory), self.model
        networks: dict[str, Any] = model.networks
        configs = {name: networks[name].config.to_dict() for name in TEXT_ENCODERS if name in networks}
        configs |= {"unet": model.unet.config.to_dict(), "vae": model.vae.config.to_dict()}
        for name, network in networks.items():
            with atomic_write(folder / name) as draft:
                draft.mkdir()
                file = f"{WEIGHT_FILE_STEMS[name]}{f'.{variant}' if variant else ''}{SAFETENSORS_SUFFIX}"
                save_tensors(self._own_state_dict(name, network), draft / file, next(network.parameters()).dtype)
                write_json(add_dtype(configs[name]), draft / "config.json")
        for encoder, name in zip(model.text_encoders, TOKENIZER_FOLDERS.values(), strict=False):
            save_clip_tokenizer(encoder.tokenizer, folder / name)
        (folder / "scheduler").mkdir(exist_ok=True)
        write_json(dict(self.scheduler.config), folder / "scheduler" / "scheduler_config.json")
        implied = parse_scheduler_config(self.scheduler.config).generation_defaults
        defaults = {name: v for name, v in model.generation_defaults.items() if implied.get(name) != v}
        write_json(defaults, folder / GENERATION_CONFIG_NAME)
        write_json(self._model_index(), folder / MODEL_INDEX_NAME)
        if self.prompt_encoder.embeddings:
            say_once("save_pretrained: placeholder tokens are not saved: their files are to be loaded again")
        if push_to_hub:
            hub.upload_folder(
                folder, options.pop("repo_id", folder.name), bool(options.pop("private", False)), None, ""
            )

    @staticmethod
    def _own_state_dict(name: str, network: nn.Module) -> dict[str, Tensor]:
        """The tensors of a network, a text encoder's without the rows of placeholder tokens."""
        tensors = dict(network.state_dict())
        if name in TEXT_ENCODERS:
            size: int = network.config.vocab_size  # type: ignore[union-attr,assignment]
            tensors = {k: v[:size] if k.endswith("token_embedding.weight") else v for k, v in tensors.items()}
        return tensors

    def _model_index(self) -> dict[str, Any]:
        is_xl = len(self.model.text_encoders) > 1
        kind = f"StableDiffusion{'XL' * is_xl}{'Inpaint' * bool(num_concat_channels(self.model))}Pipeline"
        index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION}
        for name in self._component_names():
            library, classes = COMPONENT_CLASSES[name]
            index[name] = [library, self.scheduler.config["_class_name"] if name == "scheduler" else classes[0]]
        if is_xl:
            return index | {"force_zeros_for_empty_prompt": self.model.force_zeros_for_empty_prompt}
        return index | {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload a model",
        variant: str | None = None,
    ) -> str:
        """Write the model to a repository on the hub by `save_pretrained`, and return its address."""
        if not is_repo_id(repo_id):
            raise ValueError(f"push_to_hub: {repo_id!r} is not owner/name")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return hub.upload_folder(Path(folder), repo_id, private, token, commit_message)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickles and copies refer to files: of the model, adapters and embeddings. ValueError where one has none."""
        adapters = []
        for name, (_, weight) in self.adapters.loaded.items():
            if name not in self.adapter_files:
                raise ValueError(f"adapter {name!r}: loaded from memory, and a copy of the pipeline refers to files")
            adapters.append((self.adapter_files[name], name, weight))
        embeddings = [(e.path, token) for token, e in self.prompt_encoder.embeddings.items()]
        place = {"device": str(self.device), "dtype": self.dtype, "batch_size": self.batch_scheduler._batch_size}  # type: ignore[attr-defined]
        options = {**self.model.load_options, **place}
        return restore, (type(self), options, dict(self.model.scheduler_config), adapters, embeddings)


def restore(
    kind: type[Any],
    options: Mapping[str, Any],
    config: dict[str, Any],
    adapters: Sequence[tuple[Path, str, AdapterWeight]],
    embeddings: Sequence[tuple[Path, str]],
) -> Any:
    """A pipeline from the files that `__reduce__` refers to."""
    pipe = kind.from_pretrained(**options)
    if config:
        name = config.pop("_class_name")
        pipe.scheduler = scheduler_class(name)(**config)
    for path, name, weight in adapters:
        pipe.load_lora_weights(path, weight, name)
    for path, token in embeddings:
        if token not in pipe.prompt_encoder.embeddings:
            pipe.load_textual_inversion(path, token)
    return pipe
