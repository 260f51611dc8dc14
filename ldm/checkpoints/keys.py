"""One model in two layouts: the single file of its makers and the directory of diffusers, one to one by rule.

Both name the same tensors (`ldm.checkpoints.names`), but for four changes of form, below. Nothing is assumed: a tensor
is mapped, known and ignored for a stated reason, or an error. All functions work on the meta device, where names and
shapes cost no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.families import Family
from ldm.checkpoints.names import Names, tower_names, unet_names, vae_names
from ldm.nn import text, vae
from ldm.nn.unet import UNet, UNetConfig

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
        return self.join(self.parts)

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor of the single file from its parts, each in the family's shape or with ones at its end."""
        return self.form.join([parts[name].reshape(part.shape) for name, part in self.parts.items()])

    def divide(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor of the single file, in the family's shapes; those of fused ones are views."""
        return dict(zip(self.parts, self.form.split(tensor.reshape(self.whole.shape)), strict=True))


# What a single file may hold beside its weights (a whole name, as a regular expression), and why it is not needed.
IGNORED = {
    r"(alphas_cumprod|sqrt_|log_one_minus_|posterior_)\w*|betas|lvlb_weights|logvar|scale_factor|denoiser\.sigmas": (
        "the noise schedule and the latents' scale: the family's record has them"
    ),
    r"v_pred|ztsnr": "a mark of what the network predicts: read when the family is found",
    r"model_ema\..+": "a moving average of the U-Net, which `ema` puts in its place",
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


def plan(tensors: Mapping[str, Tensor], family: Family, ema: bool = False) -> dict[str, Entry]:
    """What each tensor of a single file is, under the name that the file gives it; ignored ones are left out.

    A 1x1 convolution and a linear map are taken for one another. `ema` puts the U-Net's moving average in the place of
    its last weights. ValueError names the first tensors that are missing, unknown or of another shape.
    """
    entries = {entry.single: entry for entry in layout(family)}
    names = canonical((name for name in tensors if not ignored(name, family)), SINGLE_ALIASES)
    if ema:
        names |= _averages(tensors)
    compare({name: tensors[given] for name, given in names.items()}, {n: e.whole for n, e in entries.items()})
    return {given: entries[name] for name, given in names.items()}


def plan_directory(components: Components, family: Family) -> dict[str, tuple[Entry, str]]:
    """What each tensor of a directory is, by its folder/name there: a whole of the single file, and which part of it.

    As `plan` otherwise.
    """
    flat = {f"{folder}/{name}": a for folder, tensors in components.items() for name, a in tensors.items()}
    parts = {f"{e.folder}/{name}": (e, name) for e in layout(family) for name in e.parts}
    names = canonical((name for name in flat if not ignored(name, family)), DIRECTORY_ALIASES)
    compare({name: flat[given] for name, given in names.items()}, {n: e.parts[part] for n, (e, part) in parts.items()})
    return {given: parts[name] for name, given in names.items()}


def to_directory(tensors: Mapping[str, Tensor], family: Family) -> dict[str, dict[str, Tensor]]:
    """The tensors of a single file by folder, under the names of the published directories (`text_model.*` included).

    Parts of fused tensors are views. ValueError as `plan` has it.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, entry in plan(tensors, family).items():
        found.setdefault(entry.folder, {}).update(entry.divide(tensors[name]))
    return found


def to_single(components: Components, family: Family) -> dict[str, Tensor]:
    """The tensors of a directory as its single file, `to_directory`'s inverse; ValueError likewise.

    What a directory does not hold (the last layer of SD 2's text tower, schedule, logit_scale) is not made up.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, Entry] = {}
    for given, (entry, name) in plan_directory(components, family).items():
        folder, _, alias = given.partition("/")
        entries[entry.single] = entry
        parts.setdefault(entry.single, {})[name] = components[folder][alias]
    return {single: entry.join(parts[single]) for single, entry in entries.items()}


def canonical(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The names that `layout` has, and which of the given names each is; ValueError where two are one."""
    found: dict[str, str] = {}
    for given in names:
        name = given
        for pattern, replacement in aliases.items():
            name = re.sub(rf"\A{pattern}", replacement, name)
        if name in found:
            raise ValueError(f"{name} is given twice, once as another name ({given})")
        found[name] = given
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


def _names(folder: str, family: Family) -> tuple[str, Names]:
    """The prefix of a folder's tensors in a single file, and the names of its modules there."""
    if folder == "unet":
        return UNET_PREFIX, dict(unet_names(UNetConfig.from_dict(family.unet)))
    if folder == "vae":
        return VAE_PREFIX, dict(vae_names(len(family.vae["block_out_channels"]), family.vae["layers_per_block"]))
    return family.towers[folder].prefix, dict(tower_names(family.towers[folder]))


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


def _averages(names: Iterable[str]) -> dict[str, str]:
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


def _query_key_value(part: tuple[str, Tensor]) -> int:
    """The place of a part in a fused tensor, whatever the order of its module."""
    return "qkv".find(part[0].split(".")[-2][0])


def compare(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
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
