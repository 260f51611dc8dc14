"""One model in two layouts: the single file (CompVis' LDM, Stability's SGM) and the directory of diffusers.

This is what diffusers' `from_single_file` and `convert_ldm_unet_checkpoint` do.
Both hold the same tensors under other names, but for four transforms of their shapes, below. A single file counts a
U-Net's blocks from the input, a directory by resolution. Every tensor is mapped, ignored for a stated reason, or an
error. All functions work on the meta device, where names and shapes need no memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.families import (
    TEXT_ENCODER_CONFIG_SCHEMA,
    VAE_CONFIG_SCHEMA,
    ModelFamily,
    TextEncoderSpec,
    check_config_values,
)
from ldm.errors import list_some
from ldm.nn import text_encoders, vae
from ldm.nn.unet import UP_BLOCKS, UNet, UNetConfig

ConversionMap = Mapping[str, str]  # module names in a directory: those in a single file
ComponentStateDicts = Mapping[str, Mapping[str, Tensor]]  # component: name: tensor

LAYER_COUNT_FIELDS = (
    *("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    "num_hidden_layers",
)
MAX_LAYERS = 100  # guards against huge configurations
UNET_PREFIX, VAE_PREFIX, EMA_PREFIX = "model.diffusion_model.", "first_stage_model.", "model_ema."
UNET_CONVERSION_MAP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_CONVERSION_MAP_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_CONVERSION_MAP = {f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")}
VAE_CONVERSION_MAP_RESNET = {
    "conv_shortcut": "nin_shortcut",
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
}
VAE_CONVERSION_MAP_ATTN = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_CONVERSION_MAP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_CONVERSION_MAP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{x}_proj.{kind}": f"attn.in_proj_{kind}" for x in "qkv" for kind in ("weight", "bias")},
}
# What a single file may hold beside its weights (a whole name, as a regular expression), and why it is not needed.
IGNORED_KEYS = {
    r"(alphas_cumprod|sqrt_|log_one_minus_|posterior_)\w*|betas|lvlb_weights|logvar|scale_factor|denoiser\.sigmas": (
        "the noise schedule and the latents' scale: from the family's configuration"
    ),
    r"v_pred|ztsnr": "a marker of what the network predicts: read when the family is found",
    r"model_ema\..+": "a moving average of the U-Net, which `ema` puts in its place",
    r".+\.position_ids": "position ids",
    r".+\.logit_scale": "CLIP's logit scale, used in its training only",
    r"first_stage_model\.(loss|model_ema)\..+": "of the autoencoder's training",
    r"(.+\.)?scaled_fp8|.+\.(scale_weight|weight_scale)": "the scales of fp8 weights, which are multiplied by them",
    r".+\.(scale_input|input_scale)": "the scales of inputs in fp8, which are not rounded here",
    r"(?!model\.diffusion_model\.|first_stage_model\.|cond_stage_model\.|conditioner\.)[^/]+": (
        LEFT_OVER := "left over from training, or of another tool"
    ),
}
ANOTHER_TEXT_ENCODER = "of a text encoder that this U-Net does not read"
UNUSUAL_REASONS = LEFT_OVER, ANOTHER_TEXT_ENCODER  # of tensors that are passed over with a notice
# Other names in files: those of transformers 5, without "text_model", and of the first versions of diffusers.
SINGLE_FILE_KEY_ALIASES = {
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?!text_model\.)": r"\1.transformer.text_model.",
    r"model\.diffusion_model\.time_embedding\.cond_proj\.": "model.diffusion_model.time_embed.cond_proj.",
}
DIFFUSERS_KEY_ALIASES = {
    r"(text_encoder\w*)/(?!text_model\.|text_projection\.)": r"\1/text_model.",
    r"(vae/.+\.attentions\.0)\.query\.": r"\1.to_q.",
    r"(vae/.+\.attentions\.0)\.key\.": r"\1.to_k.",
    r"(vae/.+\.attentions\.0)\.value\.": r"\1.to_v.",
    r"(vae/.+\.attentions\.0)\.proj_attn\.": r"\1.to_out.0.",
}


def build_meta_network(component: str, config: Mapping[str, Any]) -> Any:
    """A component's network on the meta device, by the fields of its config.json; ValueError for unsupported values."""
    check_config_values(config)
    for name in LAYER_COUNT_FIELDS:
        if config.get(name) is not None:
            _check_layer_counts(name, config[name])
    with torch.device("meta"):
        if component == "unet":
            fields = UNetConfig.from_dict(config)
            if (width := min(fields.block_out_channels, default=1)) < 1:
                raise ValueError(f"U-Net block_out_channels {width}: at least 1 is needed")
            return UNet(fields)
        if component == "vae":
            VAE_CONFIG_SCHEMA.validate(config)
            return vae.build_vae(config)
        TEXT_ENCODER_CONFIG_SCHEMA.validate(config)
        size = config.get("vocab_size", 49408)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config.get(name) is not None and not 0 <= config[name] < size:
                raise ValueError(f"text encoder {name} {config[name]}: vocab_size is {size}")
        return text_encoders.build_text_encoder(config, with_projection=component == "text_encoder_2")


def _check_layer_counts(name: str, value: Any, max_nesting: int = 2) -> None:
    """ValueError unless it is a whole number of layers, or a list of these, or of lists of these."""
    if isinstance(value, list | tuple) and max_nesting:
        for part in value:
            _check_layer_counts(name, part, max_nesting - 1)
    elif type(value) is not int or not 0 <= value <= MAX_LAYERS:
        raise ValueError(f"{name} {value!r}: must be a whole number from 0 to {MAX_LAYERS}")


def build_meta_state_dicts(family: ModelFamily) -> dict[str, dict[str, Tensor]]:
    """A family's tensors by component, on the meta device, under the names of the published directories."""
    networks = {component: build_meta_network(component, config) for component, config in family.configs.items()}
    return {c: {diffusers_key(c, n): a for n, a in network.state_dict().items()} for c, network in networks.items()}


def diffusers_key(component: str, name: str) -> str:
    """The name of a component's tensor in the published directories, from an alias or from our module's state dict."""
    return resolve_key_alias(f"{component}/{name}", DIFFUSERS_KEY_ALIASES).removeprefix(f"{component}/")


def map_unet_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(directory, single file) names of a U-Net's modules; a change of resolution counts as a block."""
    yield from UNET_CONVERSION_MAP.items()
    layers, n, resnet = config.per_level("layers_per_block"), 1, UNET_CONVERSION_MAP_RESNET
    for i, count in enumerate(layers):
        for j in range(count):
            yield from _prefix_pairs(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", resnet)
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
        n += 1
    for j in range(2):
        yield from _prefix_pairs(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", resnet)
    yield "mid_block.attentions.0", "middle_block.1"
    n = 0
    for i, count in enumerate(reversed(layers)):
        for j in range(count + 1):
            yield from _prefix_pairs(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", resnet)
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        index = 2 if UP_BLOCKS[config.up_block_types[i]] else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{index}.conv"


def original_unet_tensors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a U-Net in a single file, on the meta device."""
    conversion_map = dict(map_unet_modules(UNetConfig.from_dict(config)))
    tensors = build_meta_network("unet", config).state_dict()
    return {UNET_PREFIX + _to_original_key(name, conversion_map): a for name, a in tensors.items()}


def map_vae_modules(num_blocks: int, layers_per_block: int) -> Iterator[tuple[str, str]]:
    """(directory, single file) names of a VAE's modules; a single file counts the decoder's levels from the finest."""
    yield from VAE_CONVERSION_MAP.items()
    resnet = VAE_CONVERSION_MAP_RESNET
    for i in range(num_blocks):
        up = num_blocks - 1 - i
        for j in range(layers_per_block + 1):
            yield from _prefix_pairs(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", resnet)
            yield from _prefix_pairs(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}", resnet)
        yield f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample"
        yield f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{up}.upsample"
    for half in ("encoder", "decoder"):
        for j in range(2):
            yield from _prefix_pairs(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", resnet)
        yield from _prefix_pairs(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_CONVERSION_MAP_ATTN)


def map_text_encoder_modules(spec: TextEncoderSpec) -> Iterator[tuple[str, str]]:
    """(directory, single file) names of a text encoder's modules; in a file transformers' (CLIP-L) or open_clip's."""
    if spec.layout == "open_clip":
        yield from OPEN_CLIP_CONVERSION_MAP.items()
        for k in range(spec.config["num_hidden_layers"]):
            diffusers_name, original_name = f"text_model.encoder.layers.{k}", f"transformer.resblocks.{k}"
            yield from _prefix_pairs(diffusers_name, original_name, OPEN_CLIP_CONVERSION_MAP_LAYER)


def _prefix_pairs(diffusers_name: str, original_name: str, conversion_map: ConversionMap) -> Iterator[tuple[str, str]]:
    return ((f"{diffusers_name}.{a}", f"{original_name}.{b}") for a, b in conversion_map.items())


class Transform(NamedTuple):
    """How a tensor of the single file is joined from its parts in the directory, and split into them."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


IDENTITY = Transform(lambda a: a[0], lambda a: (a,))
POINTWISE_CONV = Transform(lambda a: a[0][..., None, None], lambda a: (a.flatten(1),))  # a linear map as a 1x1 conv
TRANSPOSE = Transform(lambda a: a[0].T.contiguous(), lambda a: (a.T.contiguous(),))  # x W, not x W^T
FUSED_QKV = Transform(lambda a: torch.cat([*a]), lambda a: a.chunk(3))  # queries, keys, values


class KeyMapping(NamedTuple):
    """A tensor of the single file, and its parts (on the meta device) in a component of the directory."""

    original_key: str
    component: str
    parts: Mapping[str, Tensor]
    transform: Transform

    @property
    def original_tensor(self) -> Tensor:
        """The tensor of the single file on the meta device."""
        return self.to_original(self.parts)

    def to_original(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor of the single file from its parts, each in the family's shape or with ones at its end."""
        return self.transform.join([parts[name].reshape(part.shape) for name, part in self.parts.items()])

    def to_diffusers(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor of the single file, in the family's shapes; those of fused tensors are views."""
        return dict(zip(self.parts, self.transform.split(tensor.reshape(self.original_tensor.shape)), strict=True))


def build_key_mappings(family: ModelFamily) -> tuple[KeyMapping, ...]:
    """Every tensor of the family's single file with its parts in the directory."""
    groups: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for component, tensors in build_meta_state_dicts(family).items():
        prefix, names = _prefix_and_conversion_map(component, family)
        for name, tensor in tensors.items():
            groups[prefix + _to_original_key(name, names), component][name] = tensor
    return tuple(
        KeyMapping(
            key, component, dict(sorted(parts.items(), key=_qkv_index)), _choose_transform(key, component, parts)
        )
        for (key, component), parts in groups.items()
    )


def _prefix_and_conversion_map(component: str, family: ModelFamily) -> tuple[str, ConversionMap]:
    """The prefix of a component's tensors in a single file, and the names of its modules there."""
    if component == "unet":
        return UNET_PREFIX, dict(map_unet_modules(UNetConfig.from_dict(family.unet)))
    if component == "vae":
        return VAE_PREFIX, dict(map_vae_modules(len(family.vae["block_out_channels"]), family.vae["layers_per_block"]))
    return family.text_encoders[component].prefix, dict(map_text_encoder_modules(family.text_encoders[component]))


def _to_original_key(name: str, conversion_map: ConversionMap) -> str:
    """The name with its longest dotted beginning that is in the map replaced."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if (head := ".".join(parts[:n])) in conversion_map:
            return ".".join([conversion_map[head], *parts[n:]])
    return name


def _choose_transform(original_key: str, component: str, parts: Mapping[str, Tensor]) -> Transform:
    if len(parts) == 3:
        return FUSED_QKV
    if original_key.endswith(".text_projection"):
        return TRANSPOSE
    attention = component == "vae" and ".attn_1." in original_key and ".norm." not in original_key
    return POINTWISE_CONV if attention and original_key.endswith(".weight") else IDENTITY


def _qkv_index(part: tuple[str, Tensor]) -> int:
    """The position of a part in a fused tensor, whatever the order in its module."""
    return "qkv".find(part[0].split(".")[-2][0])


def map_single_file_keys(
    tensors: Mapping[str, Tensor], family: ModelFamily, ema: bool = False
) -> dict[str, KeyMapping]:
    """The mapping of each tensor of a single file, by its name in the file, without the ignored ones.

    1x1 convolutions and linear maps may stand for each other; single numbers that are not known are passed over. `ema`
    takes the U-Net's moving average instead of its last weights. ValueError names the first tensors that are missing,
    unknown or of another shape.
    """
    mappings = {mapping.original_key: mapping for mapping in build_key_mappings(family)}
    names = resolve_key_aliases((name for name in tensors if not ignored_reason(name, family)), SINGLE_FILE_KEY_ALIASES)
    names = {name: alias for name, alias in names.items() if name in mappings or tensors[alias].numel() > 1}
    if ema:
        names |= _map_ema_keys(tensors)
    actual = {name: tensors[alias] for name, alias in names.items()}
    check_keys_and_shapes(actual, {name: mapping.original_tensor for name, mapping in mappings.items()})
    return {alias: mappings[name] for name, alias in names.items()}


def map_diffusers_keys(components: ComponentStateDicts, family: ModelFamily) -> dict[str, tuple[KeyMapping, str]]:
    """The mapping of each tensor of a directory, and the name of its part there, by its component/name.

    Errors as of `map_single_file_keys`.
    """
    flat = {f"{component}/{name}": a for component, tensors in components.items() for name, a in tensors.items()}
    parts = {f"{m.component}/{name}": (m, name) for m in build_key_mappings(family) for name in m.parts}
    names = resolve_key_aliases((name for name in flat if not ignored_reason(name, family)), DIFFUSERS_KEY_ALIASES)
    actual = {name: flat[alias] for name, alias in names.items()}
    check_keys_and_shapes(actual, {name: mapping.parts[part] for name, (mapping, part) in parts.items()})
    return {alias: parts[name] for name, alias in names.items()}


def convert_to_diffusers(tensors: Mapping[str, Tensor], family: ModelFamily) -> dict[str, dict[str, Tensor]]:
    """A single file's tensors by component, as in the published directories; ValueError as `map_single_file_keys`."""
    components: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, mapping in map_single_file_keys(tensors, family).items():
        components[mapping.component].update(mapping.to_diffusers(tensors[name]))
    return dict(components)


def convert_to_original(components: ComponentStateDicts, family: ModelFamily) -> dict[str, Tensor]:
    """The tensors of a directory as its single file, the inverse of `convert_to_diffusers`.

    What a directory does not hold (the last layer of SD 2's text encoder, schedule, logit_scale) is not made up.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    mappings: dict[str, KeyMapping] = {}
    for alias, (mapping, name) in map_diffusers_keys(components, family).items():
        component, _, key = alias.partition("/")
        mappings[mapping.original_key] = mapping
        parts[mapping.original_key][name] = components[component][key]
    return {key: mapping.to_original(parts[key]) for key, mapping in mappings.items()}


def resolve_key_aliases(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The names in a file by those of `build_key_mappings`; ValueError where two are the same."""
    names_by_key: dict[str, str] = {}
    for alias in names:
        if (name := resolve_key_alias(alias, aliases)) in names_by_key:
            raise ValueError(f"{name} is given twice, once as another name ({alias})")
        names_by_key[name] = alias
    return names_by_key


def resolve_key_alias(name: str, aliases: Mapping[str, str]) -> str:
    """The name with each pattern of `aliases` at its beginning replaced."""
    for pattern, replacement in aliases.items():
        name = re.sub(rf"\A{pattern}", replacement, name)
    return name


def ignored_reason(name: str, family: ModelFamily) -> str | None:
    """Why a tensor of that name is not needed; None where it is not known to be superfluous."""
    reasons = dict(IGNORED_KEYS)
    for spec in family.text_encoders.values():
        prefix, layers = re.escape(spec.prefix), spec.config["num_hidden_layers"]
        if not spec.with_projection:
            reasons[prefix + r"text_projection(\.weight)?"] = "the pooled vector, which this U-Net does not take"
        for k in range(layers, layers + spec.num_dropped_layers):
            reasons[rf"{prefix}transformer\.resblocks\.{k}\..+"] = (
                "the last layer of text, which the U-Net does not see"
            )
    own = tuple(spec.prefix for spec in family.text_encoders.values())
    if name.startswith(("cond_stage_model.", "conditioner.")) and not name.startswith(own):
        return ANOTHER_TEXT_ENCODER
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)


def ema_key(name: str) -> str:
    """The name of a weight's moving average (LDM's LitEma)."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def _map_ema_keys(names: Iterable[str]) -> dict[str, str]:
    """The names of a U-Net's moving averages (LDM's `model_ema.*`, without further dots) by those of its weights.

    ValueError where the file has none, or not all of them.
    """
    present = set(names)
    weights = (name for name in present if name.startswith(UNET_PREFIX))
    averages = {name: ema_key(name) for name in weights}
    for name, average in averages.items():
        if average not in present:
            raise ValueError(f"no moving average of {name} ({average})")
    return averages


def check_keys_and_shapes(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError unless the names are the same, and the shapes but for ones at their ends."""
    faults = [f"missing {name}" for name in expected if name not in actual]
    faults += [f"unknown {name}" for name in actual if name not in expected]
    faults += [
        f"{name} has shape {list(actual[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in actual and _strip_trailing_ones(actual[name]) != _strip_trailing_ones(tensor)
    ]
    if faults:
        raise ValueError(list_some(faults))


def _strip_trailing_ones(tensor: Tensor) -> list[int]:
    """The shape without ones at its end: the same for a linear map and a 1x1 convolution."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape
