"""One model in two layouts: the single file of its makers and the directory of diffusers, one to one by rule.

A single file (CompVis' LDM, Stability's SGM) counts a U-Net's blocks from its input on, a directory by resolution; both
name the same tensors, but for four changes of form, below. Nothing is assumed: a tensor is mapped, known and ignored
for a stated reason, or an error. All functions work on the meta device, where names and shapes cost no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.families import Family, TextTower
from ldm.nn import text, vae
from ldm.nn.unet import UP_BLOCKS, UNet, UNetConfig

Names = dict[str, str]  # a module or tensor of the directory: the same of the single file
Components = Mapping[str, Mapping[str, Tensor]]  # folder: name: tensor

UNET_PREFIX, VAE_PREFIX, EMA_PREFIX = "model.diffusion_model.", "first_stage_model.", "model_ema."


class Form(NamedTuple):
    """A tensor of the single file from its parts in the directory, and back."""

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


SAME = Form(lambda a: a[0], lambda a: (a,))
POINTWISE = Form(lambda a: a[0][..., None, None], lambda a: (a.flatten(1),))  # a linear map as a 1x1 convolution
TRANSPOSED = Form(lambda a: a[0].T.contiguous(), lambda a: (a.T.contiguous(),))  # x W, not x W^T
FUSED = Form(lambda a: torch.cat([*a]), lambda a: a.chunk(3))  # queries, keys, values


class Entry(NamedTuple):
    """A tensor of the single file and its parts in a folder of the directory, as tensors on the meta device."""

    single: str
    folder: str
    parts: Mapping[str, Tensor]
    form: Form

    @property
    def whole(self) -> Tensor:
        return self.form.join([*self.parts.values()])


# What a single file may hold beside its weights (a whole name, as a regular expression), and why it is not needed.
IGNORED = {
    r"(alphas_cumprod|sqrt_|log_one_minus_|posterior_)\w*|betas|lvlb_weights|logvar|scale_factor|denoiser\.sigmas": (
        "the noise schedule and the latents' scale: the family's record has them"
    ),
    r"v_pred|ztsnr|edm_vpred\.sigma_(max|min)": "a mark of what the network predicts: read when the family is found",
    r"model_ema\..+": "a moving average of the U-Net: `averaged` puts it in its place",
    r".+\.position_ids": "the numbers 0 to 76",
    r".+\.logit_scale": "the temperature of CLIP's own training",
}
# Other names that files carry: of transformers 5, which says no text_model, and of the first versions of diffusers.
SINGLE_ALIASES = {
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?!text_model\.)": r"\1.transformer.text_model."
}
DIRECTORY_ALIASES = {
    r"(text_encoder\w*)/(?!text_model\.|text_projection\.)": r"\1/text_model.",
    r"(vae/.+\.attentions\.0)\.query\.": r"\1.to_q.",
    r"(vae/.+\.attentions\.0)\.key\.": r"\1.to_k.",
    r"(vae/.+\.attentions\.0)\.value\.": r"\1.to_v.",
    r"(vae/.+\.attentions\.0)\.proj_attn\.": r"\1.to_out.0.",
}

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ENDS = {f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")}
VAE_RESNET = {"conv_shortcut": "nin_shortcut", **{name: name for name in ("norm1", "conv1", "norm2", "conv2")}}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{f"self_attn.{x}_proj.{kind}": f"attn.in_proj_{kind}" for x in "qkv" for kind in ("weight", "bias")},
}


def to_directory(tensors: Mapping[str, Tensor], family: Family) -> dict[str, dict[str, Tensor]]:
    """The tensors of a single file by folder, under the names of the published directories (`text_model.*` included).

    Parts of fused tensors are views. A 1x1 convolution and a linear map are taken for one another, and returned as the
    family has them. ValueError names the first tensors that are missing, unknown or of another shape.
    """
    entries = layout(family)
    given = _canonical({name: a for name, a in tensors.items() if not ignored(name, family)}, SINGLE_ALIASES)
    _check(given, {entry.single: entry.whole for entry in entries})
    found: dict[str, dict[str, Tensor]] = {}
    for entry in entries:
        values = entry.form.split(given[entry.single].reshape(entry.whole.shape))
        found.setdefault(entry.folder, {}).update(zip(entry.parts, values, strict=True))
    return found


def to_single(components: Components, family: Family) -> dict[str, Tensor]:
    """The tensors of a directory as its single file, `to_directory`'s inverse; ValueError likewise.

    What a directory does not hold (the last layer of SD 2's text tower, schedule, logit_scale) is not made up.
    """
    entries = layout(family)
    flat = {f"{folder}/{name}": a for folder, tensors in components.items() for name, a in tensors.items()}
    given = _canonical({name: a for name, a in flat.items() if not ignored(name, family)}, DIRECTORY_ALIASES)
    _check(given, {f"{e.folder}/{name}": part for e in entries for name, part in e.parts.items()})
    return {
        e.single: e.form.join([given[f"{e.folder}/{name}"].reshape(part.shape) for name, part in e.parts.items()])
        for e in entries
    }


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A single file with its U-Net's moving average, LDM's `model_ema.*`, in the place of the last weights.

    The average's names are the U-Net's without their dots. ValueError where the file has none, or not all of it.
    """
    found = dict(tensors)
    for name in tensors:
        if name.startswith(UNET_PREFIX):
            average = EMA_PREFIX + name.removeprefix("model.").replace(".", "")
            if average not in tensors:
                raise ValueError(f"no moving average of {name} ({average})")
            found[name] = tensors[average]
    return found


def ignored(name: str, family: Family) -> str | None:
    """Why a tensor of that name is not needed, or None where it is not known to be superfluous."""
    reasons = dict(IGNORED)
    for tower in family.towers.values():
        prefix, layers = re.escape(tower.prefix), tower.config["num_hidden_layers"]
        if not tower.projected:
            reasons[prefix + r"text_projection(\.weight)?"] = "the pooled vector, which this U-Net does not take"
        for k in range(layers, layers + tower.dropped):
            reasons[rf"{prefix}transformer\.resblocks\.{k}\..+"] = (
                "the last layer of text, which the U-Net does not see"
            )
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, name)), None)


def layout(family: Family) -> tuple[Entry, ...]:
    """Every tensor of the family's single file with its parts in the directory, one to one."""
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for folder, tensors in skeleton(family).items():
        prefix, names = _names(folder, family)
        for name, tensor in tensors.items():
            groups.setdefault((prefix + _renamed(name, names), folder), {})[name] = tensor
    return tuple(
        Entry(single, folder, dict(sorted(parts.items(), key=_query_key_value)), _form(single, folder, parts))
        for (single, folder), parts in groups.items()
    )


def skeleton(family: Family) -> dict[str, dict[str, Tensor]]:
    """The tensors of a directory by folder, on the meta device: names and shapes from the modules themselves."""
    with torch.device("meta"):
        found = {
            "unet": dict(UNet(UNetConfig.from_dict(family.unet)).state_dict()),
            "vae": dict(vae.autoencoder(family.vae).state_dict()),
        }
        for folder, tower in family.towers.items():
            model = text.text_model(tower.config).state_dict()
            found[folder] = {f"text_model.{name}": tensor for name, tensor in model.items()}
            if tower.projected:
                shape = tower.config["projection_dim"], tower.config["hidden_size"]
                found[folder]["text_projection.weight"] = torch.empty(shape)
    return found


def unet_names(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Modules of a U-Net: blocks are counted through all resolutions, a change of size among them."""
    yield from UNET_ENDS.items()
    layers, n = config.per_level("layers_per_block"), 1
    for i, count in enumerate(layers):
        for j in range(count):
            yield from _within(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0", UNET_RESNET)
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"
            n += 1
        yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
        n += 1
    for j in range(2):
        yield from _within(f"mid_block.resnets.{j}", f"middle_block.{2 * j}", UNET_RESNET)
    yield "mid_block.attentions.0", "middle_block.1"
    n = 0
    for i, count in enumerate(reversed(layers)):
        for j in range(count + 1):
            yield from _within(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0", UNET_RESNET)
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"
            n += 1
        place = 2 if UP_BLOCKS[config.up_block_types[i]] else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n - 1}.{place}.conv"


def vae_names(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    """Modules of an autoencoder; a single file counts the decoder's resolutions from the finest on."""
    yield from VAE_ENDS.items()
    for i in range(levels):
        up = levels - 1 - i
        for j in range(layers + 1):
            yield from _within(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", VAE_RESNET)
            yield from _within(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}", VAE_RESNET)
        yield f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample"
        yield f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{up}.upsample"
    for half in ("encoder", "decoder"):
        for j in range(2):
            yield from _within(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", VAE_RESNET)
        yield from _within(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)


def tower_names(tower: TextTower) -> Iterator[tuple[str, str]]:
    """Modules of a text tower; a single file has transformers' own names for CLIP-L, open_clip's for the others."""
    if tower.layout == "open_clip":
        yield from OPEN_CLIP_ENDS.items()
        for k in range(tower.config["num_hidden_layers"]):
            yield from _within(f"text_model.encoder.layers.{k}", f"transformer.resblocks.{k}", OPEN_CLIP_LAYER)


def _names(folder: str, family: Family) -> tuple[str, Names]:
    """The prefix of a folder's tensors in a single file, and the names of its modules there."""
    if folder == "unet":
        return UNET_PREFIX, dict(unet_names(UNetConfig.from_dict(family.unet)))
    if folder == "vae":
        return VAE_PREFIX, dict(vae_names(len(family.vae["block_out_channels"]), family.vae["layers_per_block"]))
    return family.towers[folder].prefix, dict(tower_names(family.towers[folder]))


def _within(ours: str, theirs: str, inner: Names) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in inner.items())


def _renamed(name: str, names: Names) -> str:
    """The name with its longest dotted beginning that is in `names` replaced."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        if (head := ".".join(parts[:n])) in names:
            return ".".join([names[head], *parts[n:]])
    return name


def _form(single: str, folder: str, parts: Mapping[str, Tensor]) -> Form:
    if len(parts) == 3:
        return FUSED
    if single.endswith(".text_projection"):
        return TRANSPOSED
    attention = folder == "vae" and ".attn_1." in single and ".norm." not in single
    return POINTWISE if attention and single.endswith(".weight") else SAME


def _query_key_value(part: tuple[str, Tensor]) -> int:
    """The place of a part in a fused tensor, whatever the order of its module."""
    return "qkv".find(part[0].split(".")[-2][0])


def _canonical(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under the names that `layout` has; ValueError where two are one."""
    found: dict[str, Tensor] = {}
    for alias, tensor in tensors.items():
        name = alias
        for pattern, replacement in aliases.items():
            name = re.sub(rf"\A{pattern}", replacement, name)
        if name in found:
            raise ValueError(f"{name} is given twice, once as another name ({alias})")
        found[name] = tensor
    return found


def _check(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError unless the names are the same, and the shapes but for ones at their ends."""
    faults = [f"missing {name}" for name in wanted if name not in given]
    faults += [f"unknown {name}" for name in given if name not in wanted]
    faults += [
        f"{name} has shape {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and _core(given[name]) != _core(tensor)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{', '.join(faults[:3])}{more}")


def _core(tensor: Tensor) -> list[int]:
    """The shape without ones at its end: the same for a linear map and a 1x1 convolution."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape
