"""diffusers' words in tables: theirs -> ours, accepted without effect (said once), or what to write instead.

Names that are in no table and no name of ours are errors with the nearest name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.checkpoints.schedule import DIFFUSERS_PREDICTION_TYPES, PREDICTION_TYPES, compute_alphas_cumprod
from ldm.errors import choose, suggest


class Ours(NamedTuple):
    """Our name, and how a value becomes ours."""

    name: str
    convert: Callable[[Any], Any] = lambda value: value


class Automatic(NamedTuple):
    """Accepted without effect; why, or "" where there is nothing to say."""

    reason: str = ""


class Missing(NamedTuple):
    """An error; what to write instead."""

    instead: str


Rule = Ours | Automatic | Missing
SILENT = Automatic()
OWN_VAE = 'Pipeline.from_pretrained(..., vae="folder, file or hub id")'
OWN_FOLDER = "a folder or file with that component: Pipeline.from_pretrained(folder)"
CROP = "crop image and mask around the hole, and paste the result"
IP_ADAPTER = "image=... and strength=...; image prompts (IP-Adapter) are not supported"

CALL: Mapping[str, Rule] = {
    "mask_image": Ours("mask"),
    "clip_skip": Ours("clip_skip", lambda skip: skip or None),
    "add_watermark": SILENT,
    "add_predicted_noise": SILENT,
    **dict.fromkeys(("ip_adapter_image", "ip_adapter_image_embeds"), Missing(IP_ADAPTER)),
    **dict.fromkeys(("pag_scale", "pag_adaptive_scale"), Missing("guidance_scale=...; PAG is not supported")),
    "padding_mask_crop": Missing(CROP),
    "masked_image_latents": Missing("image=... and mask=..."),
    "control_image": Missing("image=... and strength=...; ControlNet is not supported"),
    "controlnet_conditioning_scale": Missing("image=... and strength=...; ControlNet is not supported"),
    **dict.fromkeys(
        ("aesthetic_score", "negative_aesthetic_score"), Missing("nothing: SDXL's refiner is not supported")
    ),
    "max_embeddings_multiples": Automatic("prompts may be of any length"),
}


def component_source(value: Any) -> Any:
    """The folder, file or hub id of a network: one of diffusers remembers where it was loaded from."""
    is_network = hasattr(value, "parameters")
    source = getattr(value.config, "_name_or_path", None) if is_network else value
    if not (isinstance(source, str | Path) and str(source)) and value is not None:
        raise ValueError(f"vae: {type(value).__name__} that was loaded from no file; write {OWN_VAE}")
    return source


def to_device_name(value: Any) -> str:
    """`device_map` as one device: "auto" and the like are the best one."""
    if isinstance(value, Mapping):
        raise ValueError('device_map: the whole model is on one device; write device="cuda"')
    if value in (None, "auto") or str(value).startswith("balanced"):
        return "auto"
    return str(value)


SAFETY = "there is no safety checker"
LOADING: Mapping[str, Rule] = {
    **dict.fromkeys(("pretrained_model_name_or_path", "pretrained_model_link_or_path"), Ours("path")),
    "torch_dtype": Ours("dtype", lambda dtype: "auto" if dtype is None else dtype),
    "device_map": Ours("device", to_device_name),
    "use_auth_token": Ours("token", lambda token: token if isinstance(token, str) else None),
    "extract_ema": Ours("ema"),
    "prediction_type": Ours("prediction", lambda kind: kind and choose(PREDICTION_TYPES, kind, "prediction_type")),
    "vae": Ours("vae", component_source),
    **dict.fromkeys(
        (
            *("low_cpu_mem_usage", "use_safetensors", "requires_safety_checker", "add_watermarker"),
            *("load_safety_checker", "resume_download", "keep_in_fp32_modules", "disable_mmap"),
        ),
        SILENT,
    ),
    "safety_checker": Automatic(SAFETY),
    **dict.fromkeys(("feature_extractor", "image_encoder"), Automatic("image prompts are not supported")),
    **dict.fromkeys(
        ("max_memory", "offload_folder", "offload_state_dict"), Automatic("the networks stay on one device")
    ),
    "trust_remote_code": Automatic("no code of a repository is run"),
    "force_zeros_for_empty_prompt": Missing('pipe(..., negative_prompt=""), which is no zeros'),
    "mirror": Missing("the environment variable HF_ENDPOINT"),
    **dict.fromkeys(
        ("config", "original_config", "original_config_file", "num_in_channels", "image_size", "scheduler_type"),
        Automatic("the tensors of a file tell what it is"),
    ),
    **dict.fromkeys(("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), Missing(OWN_FOLDER)),
    "custom_pipeline": Missing("the model's id alone; prompts may be of any length and weighted: (word:1.3)"),
    "custom_revision": Missing("revision=..."),
    "quantization_config": Missing("dtype=torch.bfloat16; quantized networks are not supported"),
    "controlnet": Missing("pipe(..., image=..., strength=...); ControlNet is not supported"),
    "cache_dir": Missing("the environment variable HF_HOME"),
    "force_download": Missing("`hf cache delete`, then load again"),
    "proxies": Missing("the environment variable HTTPS_PROXY"),
    "subfolder": Missing("the path of the folder itself"),
    "motion_adapter": Missing("an image model; video is not supported"),
}

MEMORY = "calls of the networks become smaller where memory runs out"
ATTENTION = "torch's attention needs no memory for its matrix"
OFFLOAD = "the networks stay on one device"
METHODS: Mapping[str, Automatic | Missing] = {
    **dict.fromkeys(("enable_attention_slicing", "disable_attention_slicing"), Automatic(ATTENTION)),
    **dict.fromkeys(
        ("enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention"),
        Automatic(f'{ATTENTION}; pipe.unet.attention = "xformers" chooses that of xformers'),
    ),
    **dict.fromkeys(("enable_vae_slicing", "disable_vae_slicing"), Automatic(MEMORY)),
    **dict.fromkeys(
        ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "remove_all_hooks"),
        Automatic(f"{OFFLOAD}; {MEMORY}"),
    ),
    **dict.fromkeys(("maybe_free_model_hooks", "reset_device_map", "eval"), SILENT),
    **dict.fromkeys(("fuse_qkv_projections", "unfuse_qkv_projections"), Automatic("keys and values are cached")),
    "set_lora_device": Automatic("adapters are fused into the weights"),
    "set_use_memory_efficient_attention_xformers": Automatic(ATTENTION),
    "enable_lora_hotswap": Automatic("adapters are fused into the weights"),
    "disable_freeu": SILENT,
    "enable_freeu": Missing("guidance_rescale=...; FreeU is not supported"),
    **dict.fromkeys(
        ("load_ip_adapter", "unload_ip_adapter", "set_ip_adapter_scale", "prepare_ip_adapter_image_embeds"),
        Missing(f"pipe(..., {IP_ADAPTER}"),
    ),
    "save_lora_weights": Missing("ldm.adapters.lora_saving.save_adapter, or the command `ldm convert`"),
    "prepare_latents": Missing("pipe(..., latents=...)"),
    "run_safety_checker": Missing(f"nothing: {SAFETY}"),
    "check_inputs": Missing("pipe.resolve(Request(...)), which raises ValueError"),
    "mask_processor": Missing("mask=..., a PIL image"),
    "load_attn_procs": Missing("pipe.load_lora_weights(...)"),
    "_guidance_scale": Missing("guidance_interval=(sigma, None), which guides only above a noise level"),
    "_callback_tensor_inputs": Missing("callback_on_step_end_tensor_inputs=..."),
    "download": Missing("from_pretrained, which downloads what it reads"),
    **dict.fromkeys(
        ("clip_skip", "cross_attention_kwargs", "denoising_start", "denoising_end", "guidance_rescale", "lora_scale"),
        Missing("pipe(...), whose argument it is"),
    ),
    **dict.fromkeys(
        ("lora_state_dict", "load_lora_into_unet", "load_lora_into_text_encoder"),
        Missing("pipe.load_lora_weights(...)"),
    ),
    **dict.fromkeys(("fused_loras", "num_fused_loras"), Missing("pipe.get_active_adapters()")),
    **dict.fromkeys(("write_lora_layers", "pack_weights"), Missing("ldm.adapters.lora_saving.save_adapter")),
    **dict.fromkeys(("decode_latents", "numpy_to_pil"), Missing('output_type="pil", or ldm.nn.vae.decode_latents')),
    "encode_image": Missing("pipe.encode_images([image])"),
    "maybe_convert_prompt": Missing("the prompt itself"),
    "progress_bar": Missing("pipe.set_progress_bar_config(...)"),
    **dict.fromkeys(
        ("prepare_extra_step_kwargs", "prepare_mask_latents", "get_timesteps", "get_guidance_scale_embedding"),
        Missing("pipe(...), which does that"),
    ),
    **dict.fromkeys(
        (
            *("register_modules", "register_to_config", "from_config", "load_config", "get_config_dict", "save_config"),
            *("extract_init_dict", "to_json_string", "to_json_file", "config_name", "ignore_for_config"),
            *("has_compatibles", "register_for_auto_class", "model_cpu_offload_seq", "unet_name", "text_encoder_name"),
            *("set_attention_slice", "parameters"),
        ),
        Missing("pipe.config, or a component's own: pipe.unet"),
    ),
}
COMPONENTS = "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"
EMPTY_COMPONENTS = "safety_checker", "feature_extractor", "image_encoder"

# The positional arguments of diffusers' pipelines by what they begin from; XL's take prompt_2 after prompt.
_STEPS = "num_inference_steps timesteps sigmas"
_REST = "guidance_scale negative_prompt num_images_per_prompt eta generator latents"
_REST_XL = "guidance_scale negative_prompt negative_prompt_2 num_images_per_prompt eta generator latents"
POSITIONAL = {
    "ours": "negative_prompt num_images_per_prompt seed latents",
    "text2image": f"height width {_STEPS} {_REST}",
    "image2image": f"image strength {_STEPS} {_REST.removesuffix(' latents')}",
    "inpainting": f"image mask_image masked_image_latents height width padding_mask_crop strength {_STEPS} {_REST}",
    "text2image xl": f"prompt_2 height width {_STEPS} denoising_end {_REST_XL}",
    "image2image xl": f"prompt_2 image strength {_STEPS} denoising_start denoising_end {_REST_XL}",
    "inpainting xl": f"prompt_2 image mask_image masked_image_latents height width padding_mask_crop strength {_STEPS} "
    f"denoising_start denoising_end {_REST_XL}",
}


@cache
def say_once(text: str) -> None:
    """A warning, once in a process."""
    warnings.warn(text, stacklevel=4)


def positional_order(task: str, is_xl: bool, args: Sequence[Any]) -> str:
    """The key of `POSITIONAL` for a task ("" or "auto": by the first argument after the prompt)."""
    if task in ("", "auto"):
        first, second = (*args, None, None)[:2]
        if isinstance(first, int | float) and not isinstance(first, bool):
            return "text2image"
        if not hasattr(first, "size"):  # of images, arrays and tensors
            return "ours" if task == "" or not args else f"text2image{' xl' * is_xl}"
        return "inpainting" if hasattr(second, "size") else "image2image"
    return f"{task}{' xl' * is_xl}"


def bind_positional(task: str, is_xl: bool, args: Sequence[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; TypeError for too many, and for one that is given twice."""
    names = POSITIONAL[positional_order(task, is_xl, args)].split()
    if len(args) > len(names):
        raise TypeError(f"{len(args) + 1} positional arguments, at most {len(names) + 1} are known: name them")
    by_name = dict(zip(names, args, strict=False))
    if twice := by_name.keys() & arguments.keys():
        raise TypeError(f"{sorted(twice)[0]}: given twice, by position and by name")
    return {**by_name, **arguments}


def translate(table: Mapping[str, Rule], arguments: Mapping[str, Any], own: Iterable[str], what: str) -> dict[str, Any]:
    """Arguments in our words. TypeError for an unknown name, with the nearest, and for one that is not supported."""
    own, translated = set(own), dict[str, Any]()
    for name, value in arguments.items():
        rule = table.get(name) or (Ours(name) if name in own else None)
        if rule is None:
            raise TypeError(f"{what}: unknown argument {name!r}{suggest(name, {*own, *table})}")
        if isinstance(rule, Missing):
            if value is not None:
                raise TypeError(f"{what}: {name} is not supported; write {rule.instead}")
        elif isinstance(rule, Automatic):
            if rule.reason and value is not None:
                say_once(f"{name}: without effect: {rule.reason}")
        elif rule.name in translated:
            raise TypeError(f"{what}: {rule.name} is given twice, once as {name}")
        else:
            translated[rule.name] = rule.convert(value)
    return translated


def find_method(owner: str, name: str, known: Iterable[str]) -> Callable[..., None]:
    """A method of diffusers' pipelines that has nothing to do; AttributeError names what to write instead."""
    match METHODS.get(name):
        case Automatic(reason):
            return lambda *args, **options: say_once(f"{name}: without effect: {reason}") if reason else None
        case Missing(instead):
            raise AttributeError(f"{owner} has no {name}; write {instead}")
    raise AttributeError(f"{owner} has no attribute {name!r}{suggest(name, {*known, *METHODS})}")


class SchedulerConfig(dict[str, Any]):
    """The fields of a scheduler_config.json, also as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the scheduler's config has no {name!r}{suggest(name, self)}")


class NoiseScheduler:
    """A scheduler of diffusers by its class's name and configuration: `pipe.scheduler = ...` makes it ours.

    It computes nothing: a pipeline takes its sampler, spacing, prediction and zero terminal SNR from it. That of a
    pipeline refers to it, so that `X(**pipe.components)` can share it.
    """

    pipeline: Any = None

    def __init__(self, **config: Any) -> None:
        self.config = SchedulerConfig({"_class_name": type(self).__name__, **config})

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> NoiseScheduler:
        """The scheduler with the fields of another's configuration."""
        fields = dict(getattr(config, "config", config))
        fields.pop("_class_name", None)
        return cls(**{**fields, **changes})

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str = "scheduler", **changes: Any) -> NoiseScheduler:
        """The scheduler of a model's folder, file or hub id."""
        from ldm.checkpoints.formats import read_scheduler_config

        return cls.from_config(read_scheduler_config(path, subfolder), **changes)

    @property
    def compatibles(self) -> list[type[NoiseScheduler]]:
        """The classes that a pipeline takes."""
        from ldm.checkpoints.schedule import DIFFUSERS_SCHEDULERS

        return [scheduler_class(name) for name in DIFFUSERS_SCHEDULERS]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {dict(self.config)}"


@cache
def scheduler_class(name: str) -> type[NoiseScheduler]:
    """The class of that name."""
    return type(name, (NoiseScheduler,), {"__module__": "ldm.compat"})


def scheduler_config(scheduler: Any, current: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a scheduler, ours or diffusers', for a model with the current one.

    ValueError for what is none, and for one whose noise schedule is another than the model was trained with.
    """
    fields = getattr(scheduler, "config", None)
    if isinstance(scheduler, type) or not isinstance(fields, Mapping):
        example = "X.from_config(pipe.scheduler.config), or pipe(..., sampler=..., spacing=...)"
        raise ValueError(f"scheduler {scheduler!r:.60}: not a scheduler; write pipe.scheduler = {example}")
    config = {**fields, "_class_name": type(scheduler).__name__}
    tables = [compute_alphas_cumprod({**c, "rescale_betas_zero_snr": False}) for c in (config, current)]
    if len(tables[0]) != len(tables[1]) or not torch.allclose(tables[0], tables[1], rtol=1e-4):
        name = config["_class_name"]
        raise ValueError(
            f"{name}: its betas are not those that the model was trained with; "
            f"write {name}.from_config(pipe.scheduler.config)"
        )
    return config


def schedule_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `LoadOptions` that a scheduler's configuration stands for."""
    names = {diffusers_name: name for name, diffusers_name in DIFFUSERS_PREDICTION_TYPES.items()}
    return {
        "prediction": names[config.get("prediction_type", "epsilon")],
        "zero_snr": bool(config.get("rescale_betas_zero_snr")),
    }
