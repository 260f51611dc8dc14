"""The modules of a network under the names of both layouts: the directory's and the single file's.

A single file (CompVis' LDM, Stability's SGM) counts a U-Net's blocks from its input on, a directory by resolution.


One model in two layouts: the single file of its makers and the directory of diffusers, one to one by rule.

Both name the same tensors (`ldm.checkpoints.names`), but for four changes of form, below. Nothing is assumed: a tensor
is mapped, known and ignored for a stated reason, or an error. All functions work on the meta device, where names and
shapes cost no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.families import ModelFamily, TextEncoderSpec
from ldm.nn import text_encoders, vae
from ldm.nn.unet import UP_BLOCKS, UNet, UNetConfig

ConversionMap = Mapping[str, str]  # modules of the directory: the same of the single file

UNET_CONVERSION_MAP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
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


def map_unet_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Modules of a U-Net: blocks are counted through all resolutions, a change of size among them."""
    yield from UNET_CONVERSION_MAP.items()
    layers, n = config.per_level("layers_per_block"), 1
    for i, count in enumerate(layers):
        for j in range(count):
            yield from _prefix_pairs(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", UNET_CONVERSION_MAP_RESNET)
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
        n += 1
    for j in range(2):
        yield from _prefix_pairs(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", UNET_CONVERSION_MAP_RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    n = 0
    for i, count in enumerate(reversed(layers)):
        for j in range(count + 1):
            yield from _prefix_pairs(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", UNET_CONVERSION_MAP_RESNET)
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        place = 2 if UP_BLOCKS[config.up_block_types[i]] else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"


def map_vae_modules(num_blocks: int, layers_per_block: int) -> Iterator[tuple[str, str]]:
    """Modules of an autoencoder; a single file counts the decoder's resolutions from the finest on."""
    yield from VAE_CONVERSION_MAP.items()
    for i in range(num_blocks):
        up = num_blocks - 1 - i
        for j in range(layers_per_block + 1):
            yield from _prefix_pairs(
                f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", VAE_CONVERSION_MAP_RESNET
            )
            yield from _prefix_pairs(
                f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}", VAE_CONVERSION_MAP_RESNET
            )
        yield f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample"
        yield f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{up}.upsample"
    for half in ("encoder", "decoder"):
        for j in range(2):
            yield from _prefix_pairs(
                f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", VAE_CONVERSION_MAP_RESNET
            )
        yield from _prefix_pairs(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_CONVERSION_MAP_ATTN)


def map_text_encoder_modules(text_encoder: TextEncoderSpec) -> Iterator[tuple[str, str]]:
    """Modules of a text tower; a single file has transformers' own names for CLIP-L, open_clip's for the others."""
    if text_encoder.layout == "open_clip":
        yield from OPEN_CLIP_CONVERSION_MAP.items()
        for k in range(text_encoder.config["num_hidden_layers"]):
            yield from _prefix_pairs(
                f"text_model.encoder.layers.{k}", f"transformer.resblocks.{k}", OPEN_CLIP_CONVERSION_MAP_LAYER
            )


def _prefix_pairs(
    diffusers_prefix: str, original_prefix: str, conversion_map: ConversionMap
) -> Iterator[tuple[str, str]]:
    return ((f"{diffusers_prefix}.{a}", f"{original_prefix}.{b}") for a, b in conversion_map.items())


ComponentStateDicts = Mapping[str, Mapping[str, Tensor]]  # folder: name: tensor

UNET_PREFIX, VAE_PREFIX, EMA_PREFIX = "model.diffusion_model.", "first_stage_model.", "model_ema."


class Transform(NamedTuple):
    """A tensor of the single file from its parts in the directory, and back."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


IDENTITY = Transform(lambda a: a[0], lambda a: (a,))
POINTWISE_CONV = Transform(
    lambda a: a[0][..., None, None], lambda a: (a.flatten(1),)
)  # a linear map as a 1x1 convolution
TRANSPOSE = Transform(lambda a: a[0].T.contiguous(), lambda a: (a.T.contiguous(),))  # x W, not x W^T
FUSED_QKV = Transform(lambda a: torch.cat([*a]), lambda a: a.chunk(3))  # queries, keys, values


class KeyMapping(NamedTuple):
    """A tensor of the single file and its parts in a folder of the directory, as tensors on the meta device."""

    original_key: str
    component: str
    parts: Mapping[str, Tensor]
    transform: Transform

    @property
    def original_tensor(self) -> Tensor:
        return self.to_original(self.parts)

    def to_original(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor of the single file from its parts, each in the family's shape or with ones at its end."""
        return self.transform.join([parts[name].reshape(part.shape) for name, part in self.parts.items()])

    def to_diffusers(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor of the single file, in the family's shapes; those of fused ones are views."""
        return dict(zip(self.parts, self.transform.split(tensor.reshape(self.original_tensor.shape)), strict=True))


# What a single file may hold beside its weights (a whole name, as a regular expression), and why it is not needed.
IGNORED_KEYS = {
    r"(alphas_cumprod|sqrt_|log_one_minus_|posterior_)\w*|betas|lvlb_weights|logvar|scale_factor|denoiser\.sigmas": (
        "the noise schedule and the latents' scale: the family's record has them"
    ),
    r"v_pred|ztsnr": "a mark of what the network predicts: read when the family is found",
    r"model_ema\..+": "a moving average of the U-Net, which `ema` puts in its place",
    r".+\.position_ids": "the numbers 0 to 76",
    r".+\.logit_scale": "the temperature of CLIP's own training",
}
# Other names that files carry: of transformers 5, which says no text_model, and of the first versions of diffusers.
SINGLE_FILE_KEY_ALIASES = {
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?!text_model\.)": r"\1.transformer.text_model."
}
DIFFUSERS_KEY_ALIASES = {
    r"(text_encoder\w*)/(?!text_model\.|text_projection\.)": r"\1/text_model.",
    r"(vae/.+\.attentions\.0)\.query\.": r"\1.to_q.",
    r"(vae/.+\.attentions\.0)\.key\.": r"\1.to_k.",
    r"(vae/.+\.attentions\.0)\.value\.": r"\1.to_v.",
    r"(vae/.+\.attentions\.0)\.proj_attn\.": r"\1.to_out.0.",
}


def map_single_file_keys(
    tensors: Mapping[str, Tensor], family: ModelFamily, ema: bool = False
) -> dict[str, KeyMapping]:
    """What each tensor of a single file is, under the name that the file gives it; ignored ones are left out.

    A 1x1 convolution and a linear map are taken for one another. `ema` puts the U-Net's moving average in the place of
    its last weights. ValueError names the first tensors that are missing, unknown or of another shape.
    """
    entries = {entry.original_key: entry for entry in build_key_mappings(family)}
    names = resolve_key_aliases((name for name in tensors if not ignored_reason(name, family)), SINGLE_FILE_KEY_ALIASES)
    if ema:
        names |= _map_ema_keys(tensors)
    check_keys_and_shapes(
        {name: tensors[given] for name, given in names.items()}, {n: e.original_tensor for n, e in entries.items()}
    )
    return {given: entries[name] for name, given in names.items()}


def map_diffusers_keys(components: ComponentStateDicts, family: ModelFamily) -> dict[str, tuple[KeyMapping, str]]:
    """What each tensor of a directory is, by its folder/name there: a whole of the single file, and which part of it.

    As `map_single_file_keys` otherwise.
    """
    flat = {f"{folder}/{name}": a for folder, tensors in components.items() for name, a in tensors.items()}
    parts = {f"{e.component}/{name}": (e, name) for e in build_key_mappings(family) for name in e.parts}
    names = resolve_key_aliases((name for name in flat if not ignored_reason(name, family)), DIFFUSERS_KEY_ALIASES)
    check_keys_and_shapes(
        {name: flat[given] for name, given in names.items()}, {n: e.parts[part] for n, (e, part) in parts.items()}
    )
    return {given: parts[name] for name, given in names.items()}


def convert_to_diffusers(tensors: Mapping[str, Tensor], family: ModelFamily) -> dict[str, dict[str, Tensor]]:
    """The tensors of a single file by folder, under the names of the published directories (`text_model.*` included).

    Parts of fused tensors are views. ValueError as `map_single_file_keys` has it.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, entry in map_single_file_keys(tensors, family).items():
        found.setdefault(entry.component, {}).update(entry.to_diffusers(tensors[name]))
    return found


def convert_to_original(components: ComponentStateDicts, family: ModelFamily) -> dict[str, Tensor]:
    """The tensors of a directory as its single file, `convert_to_diffusers`'s inverse; ValueError likewise.

    What a directory does not hold (the last layer of SD 2's text tower, schedule, logit_scale) is not made up.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, KeyMapping] = {}
    for given, (entry, name) in map_diffusers_keys(components, family).items():
        folder, _, alias = given.partition("/")
        entries[entry.original_key] = entry
        parts.setdefault(entry.original_key, {})[name] = components[folder][alias]
    return {single: entry.to_original(parts[single]) for single, entry in entries.items()}


def resolve_key_aliases(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The names that `build_key_mappings` has, and which of the given names each is; ValueError where two are one."""
    found: dict[str, str] = {}
    for given in names:
        name = given
        for pattern, replacement in aliases.items():
            name = re.sub(rf"\A{pattern}", replacement, name)
        if name in found:
            raise ValueError(f"{name} is given twice, once as another name ({given})")
        found[name] = given
    return found


def ignored_reason(name: str, family: ModelFamily) -> str | None:
    """Why a tensor of that name is not needed, or None where it is not known to be superfluous."""
    reasons = dict(IGNORED_KEYS)
    for tower in family.text_encoders.values():
        prefix, layers = re.escape(tower.prefix), tower.config["num_hidden_layers"]
        if not tower.with_projection:
            reasons[prefix + r"text_projection(\.weight)?"] = "the pooled vector, which this U-Net does not take"
        for k in range(layers, layers + tower.num_dropped_layers):
            reasons[rf"{prefix}transformer\.resblocks\.{k}\..+"] = (
                "the last layer of text, which the U-Net does not see"
            )
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)


def build_key_mappings(family: ModelFamily) -> tuple[KeyMapping, ...]:
    """Every tensor of the family's single file with its parts in the directory, one to one."""
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for folder, tensors in build_meta_state_dicts(family).items():
        prefix, names = _prefix_and_conversion_map(folder, family)
        for name, tensor in tensors.items():
            groups.setdefault((prefix + _to_original_key(name, names), folder), {})[name] = tensor
    return tuple(
        KeyMapping(
            single, folder, dict(sorted(parts.items(), key=_qkv_index)), _choose_transform(single, folder, parts)
        )
        for (single, folder), parts in groups.items()
    )


def build_meta_state_dicts(family: ModelFamily) -> dict[str, dict[str, Tensor]]:
    """The tensors of a directory by folder, on the meta device: names and shapes from the modules themselves."""
    with torch.device("meta"):
        found = {
            "unet": dict(UNet(UNetConfig.from_dict(family.unet)).state_dict()),
            "vae": dict(vae.build_vae(family.vae).state_dict()),
        }
        for folder, tower in family.text_encoders.items():
            model = text_encoders.build_text_encoder(tower.config).state_dict()
            found[folder] = {f"text_model.{name}": tensor for name, tensor in model.items()}
            if tower.with_projection:
                shape = tower.config["projection_dim"], tower.config["hidden_size"]
                found[folder]["text_projection.weight"] = torch.empty(shape)
    return found


def _prefix_and_conversion_map(component: str, family: ModelFamily) -> tuple[str, ConversionMap]:
    """The prefix of a folder's tensors in a single file, and the names of its modules there."""
    if component == "unet":
        return UNET_PREFIX, dict(map_unet_modules(UNetConfig.from_dict(family.unet)))
    if component == "vae":
        return VAE_PREFIX, dict(map_vae_modules(len(family.vae["block_out_channels"]), family.vae["layers_per_block"]))
    return family.text_encoders[component].prefix, dict(map_text_encoder_modules(family.text_encoders[component]))


def _to_original_key(name: str, conversion_map: ConversionMap) -> str:
    """The name with its longest dotted beginning that is in `make_image_names` replaced."""
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


def _map_ema_keys(names: Iterable[str]) -> dict[str, str]:
    """The U-Net's tensors of a single file and their moving averages, LDM's `model_ema.*`, by name.

    The average's names are the U-Net's without their dots. ValueError where the file has none, or not all of it.
    """
    given = set(names)
    found = {
        name: EMA_PREFIX + name.removeprefix("model.").replace(".", "")
        for name in given
        if name.startswith(UNET_PREFIX)
    }
    for name, average in found.items():
        if average not in given:
            raise ValueError(f"no moving average of {name} ({average})")
    return found


def _qkv_index(part: tuple[str, Tensor]) -> int:
    """The place of a part in a fused tensor, whatever the order of its module."""
    return "qkv".find(part[0].split(".")[-2][0])


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
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{', '.join(faults[:3])}{more}")


def _strip_trailing_ones(tensor: Tensor) -> list[int]:
    """The shape without ones at its end: the same for a linear map and a 1x1 convolution."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape
