"""Load a model from disk or the hub, whatever its layout; every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm.checkpoints import detect, hub
from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.few_steps import few_step_defaults, list_names
from ldm.checkpoints.layouts import read_component, read_directory, read_generation_config
from ldm.checkpoints.networks import TEXT_ENCODERS, ModelSpec, check_model_spec, load_weights
from ldm.checkpoints.single_file import read_single_file, replace_vae
from ldm.conditioning import Conditioning
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import VPSDE
from ldm.errors import error_text
from ldm.files import read_json
from ldm.installation import find_picto, missing_picto
from ldm.nn import vae
from ldm.nn.text_encoders import TextEncoder, join_text_embeddings, tokenize_prompt
from ldm.nn.unet import UNet
from ldm.rng import Noise

MODEL_INDEX = {  # the model_index.json of a diffusers.StableDiffusionPipeline
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CPU_DEVICE = torch.device("cpu")
PICTO_PATH = find_picto()  # the shipped model
PROBE_LATENT_SIZE = 32  # latents a side


@dataclass(frozen=True)
class Checkpoint:
    """A whole text-to-image model: its networks, what the U-Net predicts, and under which SDE.

    `generation_defaults` are recommended settings of a request; `weight_hashes` the SHA-256 of each component's file
    (of its shards' bytes, one after another). `force_zeros_for_empty_prompt`: an empty negative prompt is encoded as
    zeros rather than as "". `family` is a name of `FAMILIES` or None; `vae_name` names the file of another autoencoder
    than the model's own. `load_options` are those of `load_checkpoint` as JSON values:
    `Pipeline.from_pretrained(**load_options)` loads the same again. `scheduler_config` is what the SDE was read from.
    """

    unet: UNet
    vae: vae.AutoencoderKL
    text_encoders: tuple[TextEncoder, ...]
    sde: VPSDE
    prediction: Prediction
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    weight_hashes: Mapping[str, str] = field(default_factory=dict)
    force_zeros_for_empty_prompt: bool = False
    family: str | None = None
    vae_name: str | None = None
    load_options: Mapping[str, Any] = field(default_factory=dict)
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by component."""
        encoders = {name: encoder.model for name, encoder in zip(TEXT_ENCODERS, self.text_encoders, strict=False)}
        return {"unet": self.unet, "vae": self.vae, **encoders}


class CheckpointFormat(NamedTuple):
    """A layout of checkpoints on disk: its reader, and the `LoadOptions` that do not apply to it."""

    read: Callable[[Path, LoadOptions], ModelSpec]
    unsupported_options: frozenset[str]


FORMATS = {
    "folder": CheckpointFormat(read_directory, frozenset({"family", "ema"})),
    "single file": CheckpointFormat(read_single_file, frozenset({"variant"})),
}


def load_checkpoint(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    options: LoadOptions = LoadOptions(),
    float32_components: Container[str] = (),
) -> Checkpoint:
    """The model in a directory, a single file or on the hub (`owner/name`, `owner/name:file.safetensors`).

    `float32_components`, and in float16 an autoencoder with `force_upcast`, are in float32. ValueError in one line
    names the file and what is missing, unknown, truncated or of another shape.
    """
    spec = read_model_spec(source, options)
    networks, dtypes = spec.networks, choose_dtypes(spec, dtype, float32_components)
    hashes = load_weights(networks, spec.shard_groups, device, dtypes)
    for network in networks.values():
        network.eval().requires_grad_(False)
    unet = networks["unet"]
    encoders = tuple(factory(networks[name]) for name, factory in spec.text_encoder_factories.items())
    schedule, family, unet.config, scheduler_config = spec.resolve_config(lambda sde: probe_unet(unet, encoders, sde))
    path = {} if source == PICTO_PATH else {"path": str(source)}
    return Checkpoint(
        unet,
        networks["vae"],
        encoders,
        schedule.sde,
        schedule.prediction,
        {**schedule.generation_defaults, **spec.generation_defaults, **distilled_defaults(spec)},
        hashes,
        spec.force_zeros_for_empty_prompt,
        family,
        vae_name=None if options.vae is None else Path(options.vae).name,
        load_options={**path, **options.to_record()},
        scheduler_config=scheduler_config,
    )


def distilled_defaults(spec: ModelSpec) -> dict[str, Any]:
    """The settings for a model that its name says is distilled; a folder's own scheduler and settings come first."""
    file = spec.weight_files[0].file.path
    if file.parent.name != "unet":
        return few_step_defaults(list_names(file))
    folder = file.parent.parent
    own = {"sampler", "spacing", *read_generation_config(folder)}
    return {name: value for name, value in few_step_defaults(list_names(folder)).items() if name not in own}


def choose_dtypes(
    spec: ModelSpec, dtype: torch.dtype, float32_components: Container[str] = ()
) -> dict[str, torch.dtype]:
    """The dtype of each network, as `load_checkpoint` says."""
    upcast = {"vae"} if dtype == torch.float16 and spec.networks["vae"].config.force_upcast else set()
    return {n: torch.float32 if n in float32_components or n in upcast else dtype for n in spec.networks}


def read_model_spec(source: str | Path, options: LoadOptions = LoadOptions()) -> ModelSpec:
    """The networks of a model, compared with its files by name and shape, without the weights.

    ValueError as `load_checkpoint`.
    """
    path = locate_weights(source, options)
    layout = "folder" if path.is_dir() else "single file"
    if unsupported := FORMATS[layout].unsupported_options & options.to_record().keys():
        raise ValueError(f"{path}: {' and '.join(sorted(unsupported))} does not apply to a {layout}")
    spec = FORMATS[layout].read(path, options)
    if options.vae is not None:
        spec = replace_vae(spec, locate_weights(options.vae, LoadOptions(token=options.token), "vae"))
    check_model_spec(spec, path)
    return spec


def locate_weights(source: str | Path, options: LoadOptions = LoadOptions(), kind: str = "model") -> Path:
    """The local path of a model, or another kind of `REPO_CONTENTS`, downloaded from the hub if need be."""
    if is_hub_source(source):
        return hub.download_from_hub(str(source), options, kind)
    return check_local_path(source)


def read_scheduler_config(source: str | Path, folder: str = "scheduler") -> dict[str, Any]:
    """The scheduler_config.json of a model's folder, or of a hub id."""
    name = f"{folder}/scheduler_config.json"
    return read_json(hub.download_file(str(source), name) if is_hub_source(source) else Path(source) / name)


def is_hub_source(source: str | Path) -> bool:
    """Whether it is a hub id, and not the name of a local file or folder."""
    return isinstance(source, str) and hub.is_repo_id(source) and not Path(source).exists()


def check_local_path(source: str | Path) -> Path:
    """The path of an existing folder or file; ValueError for anything else."""
    path = Path(source).expanduser()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if path == PICTO_PATH:
            raise ValueError(missing_picto()) from None
        raise ValueError(f"{source}: {error_text(error)}") from None
    if not (S_ISDIR(mode) or S_ISREG(mode)):
        raise ValueError(f"{source}: neither a folder nor a file")
    return path


def probe_checkpoint(path: Path, options: LoadOptions = LoadOptions()) -> detect.ProbeResult:
    """The probe of a checkpoint's U-Net, which is loaded for it in bfloat16 on a CPU."""
    if path.is_file():  # a prediction is given so that loading does not probe; which one, the U-Net does not depend on
        options = LoadOptions(family=options.family, prediction="eps", zero_snr=False, ema=options.ema)
    model = load_checkpoint(path, CPU_DEVICE, torch.bfloat16, options)
    return probe_unet(model.unet, model.text_encoders, model.sde)


@torch.no_grad()
def probe_unet(unet: UNet, text_encoders: Sequence[TextEncoder], sde: VPSDE) -> detect.ProbeResult:
    """`probe_network` of a U-Net with the empty prompt, which reveals what it predicts."""
    side, pixels, device = PROBE_LATENT_SIZE, 8 * PROBE_LATENT_SIZE, unet.device
    context, pooled = join_text_embeddings(e.encode(tokenize_prompt(e.tokenizer, "")[0]) for e in text_encoders)
    ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=device)
    vector = None if unet.add_embedding is None or pooled is None else unet.make_vector(pooled, ids)
    extra = unet.config.in_channels - unet.config.out_channels  # inpainting: all is masked
    channels = torch.cat([torch.ones(1, 1, side, side), torch.zeros(1, extra - 1, side, side)], 1) if extra else None
    guidance = torch.ones(1, device=device) if unet.config.time_cond_proj_dim else None
    concat = None if channels is None else channels.to(device)
    cond = Conditioning(context, vector=vector, concat=concat, guidance=guidance)
    return detect.probe_network(unet, sde, cond, (1, unet.config.out_channels, side, side), Noise([0]))


def load_component(folder: Path, component: str) -> Any:
    """The network of a component from its folder, in float32 on the CPU."""
    network, sources = read_component(folder, component)
    load_weights({component: network}, [sources], CPU_DEVICE, {component: torch.float32})
    return network
