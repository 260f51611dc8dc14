"""Detect a single file's family, its U-Net's prediction, and whether its schedule has zero terminal SNR, with evidence.

Nothing is guessed: names and shapes of tensors give the family; the prediction comes from the user, a marker tensor or
the header, else from probing the U-Net once. Contradictions are errors. Sources: the markers of ComfyUI, Stability's
model spec (`modelspec.*`), the metadata of kohya's sd-scripts (`ss_*`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.keys import UNET_PREFIX
from ldm.checkpoints.schedule import PREDICTION_TYPES
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Network
from ldm.diffusion.sde import VPSDE
from ldm.errors import choose
from ldm.rng import Noise

CONV_IN_KEY = UNET_PREFIX + "input_blocks.0.0.weight"
CROSS_ATTENTION_KEY_PATTERN = re.compile(re.escape(UNET_PREFIX) + r".+\.attn2\.to_k\.weight")
TEXT_ENCODER_KEY_PATTERN = re.compile(r"(cond_stage_model|conditioner\.embedders\.\d+)\.(transformer|model)\.")
LORA_DESCRIPTION, VAE_DESCRIPTION = "a LoRA file: --lora", "a VAE: --vae"
PREDICTION_OPTION_HINT = ": pass --prediction eps or v"
EMBEDDING_KEY_PATTERN = r"string_to_param.*|emb_params|clip_[gl]|<.+>"
UNSUPPORTED_KEY_PATTERNS = {  # other models by a tensor that they have (a whole name, as a regular expression)
    r"((lora|oft)_(unet|te\d?)|lycoris)_.*": LORA_DESCRIPTION,
    r".*\.(lora_(A|B|down|up)|lora_linear_layer|hada_w1|lokr_w[12]|oft_|boft_|ia3_l|on_input).*": LORA_DESCRIPTION,
    r".*[._]lora\.(down|up)\..+|(unet|text_encoder):\d+:(down|up)": LORA_DESCRIPTION,
    EMBEDDING_KEY_PATTERN: "an embedding (textual inversion), which adds a token to a model",
    r"control_.+|.*\b(controlnet_cond_embedding|input_hint_block)\..+": "a ControlNet: not supported",
    r".*\bmotion_modules\..+": "a motion module of AnimateDiff: not supported",
    r".*\bjoint_blocks\.0\..+": "a Stable Diffusion 3 file: not supported",
    r".*\bdouble_blocks\.0\..+": "a Flux file: not supported",
    r"clip_txt_mapper\..+|.*\.channelwise\.0\.weight": "a Stable Cascade file: not supported",
    r".*\.time_(stack|mixer)\..+": "a Stable Video Diffusion file: not supported",
    r"conditioner\.embedders\.0\.model\..+": "the refiner of SDXL, which generates nothing by itself: not supported",
    r"edm_(mean|std)": "a Playground 2.5 file, whose noise levels are EDM's: not supported",
    r"edm_vpred\.sigma_(max|min)": "a CosXL file, whose noise levels are EDM's: not supported",
    r"depth_model\..+": "a depth-to-image model: not supported",
    r"noise_augmentor\..+": "an unCLIP model: not supported",
}
COMPONENT_KEY_PATTERNS = {  # likewise, parts of a model, where there is no U-Net
    r"(first_stage_model\.)?decoder\.conv_in\.weight": VAE_DESCRIPTION,
    r"(diffusion_model\.)?input_blocks\.0\.0\.weight|conv_in\.weight": "a U-Net alone, without text encoder and VAE",
    r"(.+\.)?(encoder\.layers|resblocks)\.0\..+": "a text encoder alone",
}
UNSUPPORTED_IN_CHANNELS = {  # other models by the channels that their U-Net takes
    5: "a depth-to-image model: not supported",
    7: "an upscaler: not supported",
    8: "an instruct-pix2pix model: not supported",
}


class HeaderHint(NamedTuple):
    """What a header field tells: the file is of one of these families, with this prediction."""

    families: tuple[str, ...] = tuple(FAMILIES)
    prediction: str | None = None


SD1_FAMILIES, SDXL_FAMILIES = ("sd1", "sd1-inpainting"), ("sdxl", "sdxl-inpainting")
SD2_FAMILIES = "sd2-base", "sd2-v", "sd2-inpainting"
EPS_HINT, V_HINT, X0_HINT = (HeaderHint(prediction=name) for name in ("eps", "v", "x0"))
HEADER_HINTS: dict[str, dict[str, HeaderHint]] = {
    "modelspec.architecture": {
        "stable-diffusion-v1": HeaderHint(SD1_FAMILIES),
        "stable-diffusion-v1-inpainting": HeaderHint(SD1_FAMILIES[1:]),
        "stable-diffusion-v2-512": HeaderHint(SD2_FAMILIES, "eps"),
        "stable-diffusion-v2-768-v": HeaderHint(SD2_FAMILIES, "v"),
        "stable-diffusion-v2-inpainting": HeaderHint(SD2_FAMILIES[2:]),
        "stable-diffusion-xl-v1-base": HeaderHint(SDXL_FAMILIES),
        "stable-diffusion-xl-v1-inpainting": HeaderHint(SDXL_FAMILIES[1:]),
    },
    "modelspec.prediction_type": {"epsilon": EPS_HINT, "v": V_HINT, "v_prediction": V_HINT, "sample": X0_HINT},
    "modelspec.predict_key": {"epsilon": EPS_HINT, "v": V_HINT},  # ComfyUI's name
    "ss_base_model_version": {
        "sd_v1": HeaderHint(SD1_FAMILIES, "eps"),
        "sd_v1_v": HeaderHint(SD1_FAMILIES, "v"),
        "sd_v2": HeaderHint(SD2_FAMILIES, "eps"),
        "sd_v2_v": HeaderHint(SD2_FAMILIES, "v"),
        "sdxl_base_v1-0": HeaderHint(SDXL_FAMILIES),
    },
    "ss_v_parameterization": {"True": V_HINT, "False": EPS_HINT},
    "ss_v2": {"True": HeaderHint(SD2_FAMILIES), "False": HeaderHint(SD1_FAMILIES + SDXL_FAMILIES)},
}

PROBE_ANGLE = math.radians(70)  # the noise level of the probe: alpha .34, sigma .94
PROBE_AMPLITUDE = 1.5  # of a channel, in standard deviations of latents
PROBE_TOLERANCE = 0.5  # less than half of the distance between two expected results, and from one to (0, 0)


class ProbeResult(NamedTuple):
    """A network's output, by least squares, as noise_coef * noise + x0_coef * x0 + rest."""

    noise_coef: float
    x0_coef: float


# The target itself: eps = noise, v = alpha noise - sigma x0, x0.
EXPECTED_PROBE_RESULTS = {
    "eps": ProbeResult(1, 0),
    "v": ProbeResult(math.cos(PROBE_ANGLE), -math.sin(PROBE_ANGLE)),
    "x0": ProbeResult(0, 1),
}


@dataclass(frozen=True)
class Detection:
    """A name of FAMILIES, a name of PREDICTIONS, whether SNR ends in zero, and lines of evidence for each."""

    family: str
    prediction: str
    zero_snr: bool
    evidence: tuple[str, ...]


def detect_model(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    probe: Callable[[], ProbeResult],
    *,
    family: str | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Detection:
    """What a single file is, by its tensors (may be on the meta device), its header and, if need be, its U-Net.

    `family`, `prediction` and `zero_snr` are the user's, and override what the file says of the latter two. `probe`
    runs `probe_network` on the U-Net of the first of `detect_families`; it is called at most once, where nothing else
    tells the prediction. The detected family may be another one with the same tensors. ValueError, without the file's
    name, for contradictions and for what is not supported.
    """
    families = detect_families(tensors)
    prediction, evidence = detect_prediction(tensors, metadata, family=family, prediction=prediction)
    if prediction is None:
        prediction, measured = classify_probe(probe())
        evidence = (*evidence, measured)
    has_zero_snr, reason = detect_zero_snr(tensors, metadata, families[0], zero_snr)
    if has_zero_snr and prediction == "eps":
        raise ValueError(f"prediction eps and zero terminal SNR ({reason}) exclude each other: pass --no-zero-snr")
    evidence = (describe_family_evidence(tensors, families), *evidence, reason)
    return Detection(family or select_family(families, prediction), prediction, has_zero_snr, evidence)


def detect_prediction(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    family: str | None = None,
    prediction: str | None = None,
) -> tuple[str | None, tuple[str, ...]]:
    """The prediction without a probe, None where nothing tells it, and lines of evidence.

    ValueError where the header tells another family, or where two sources (the user apart) disagree.
    """
    families = detect_families(tensors)
    if family is not None and choose(FAMILIES, family, "family") and family not in families:
        raise ValueError(f"family {family}: the tensors match {' or '.join(families)}")
    if prediction is not None:
        choose(EXPECTED_PROBE_RESULTS, prediction, "prediction")
        return prediction, (f"prediction {prediction}: as requested",)
    if family is not None and len(families) > 1:
        return family_prediction(family), (f"prediction {family_prediction(family)}: family {family}, as requested",)
    sources = {"marker tensor v_pred": "v"} if "v_pred" in tensors else {}
    evidence = []
    for field, values in HEADER_HINTS.items():
        if field not in metadata:
            continue
        line = f"{field} = {metadata[field]}"
        hint = values.get(metadata[field])
        if hint is None:
            evidence.append(f"{line}: not understood")
        elif not set(hint.families) & set(families):
            raise ValueError(f"the header says {line}, the tensors match {' or '.join(families)}")
        elif hint.prediction is None:
            evidence.append(f"family {' or '.join(families)}: {line}")
        else:
            sources[line] = hint.prediction
    if len(set(sources.values())) > 1:
        both = ", but ".join(f"{source} says {name}" for source, name in sources.items())
        raise ValueError(f"{both}{PREDICTION_OPTION_HINT}")
    lines = (f"prediction {name}: {source}" for source, name in sources.items())
    return next(iter(sources.values()), None), (*evidence, *lines)


def detect_zero_snr(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: str, override: bool | None = None
) -> tuple[bool, str]:
    """Zero terminal SNR by the user, the marker tensor `ztsnr`, the header or the family; and the evidence."""
    header = metadata.get("ss_zero_terminal_snr")
    if override is not None:
        zero, reason = override, "as requested"
    elif "ztsnr" in tensors:
        zero, reason = True, "marker tensor ztsnr"
    elif header in ("True", "False"):
        zero, reason = header == "True", f"ss_zero_terminal_snr = {header}"
    else:
        zero, reason = bool(FAMILIES[family].scheduler.get("rescale_betas_zero_snr")), "by default"
    return zero, f"zero terminal SNR {'yes' if zero else 'no'}: {reason}"


def probe_network(
    network: Network, sde: VPSDE, cond: Conditioning, shape: tuple[int, ...], noise: Noise
) -> ProbeResult:
    """The response of a network to latents of one constant channel with strong noise.

    For each of the C channels of `shape` [1, C, h, w] there are two rows: x0 is +-PROBE_AMPLITUDE in this channel and 0
    elsewhere, and x = alpha x0 + sigma noise at the angle `PROBE_ANGLE`. The output y = a noise + b x0 + rest, by least
    squares. A denoiser finds the mean of a channel under any noise, so that its output is its target: (a, b) is near
    (1, 0) for eps, (alpha, -sigma) for v, (0, 1) for x0. What is the same in all rows (a mean image, or the bias of an
    untrained network) does not change b, as the x0 sum to 0. `cond` has one row, best of the empty prompt, in the
    network's dtype; `noise` has one stream.
    """
    (level,) = sde.levels_at_angles([PROBE_ANGLE])
    channels = PROBE_AMPLITUDE * torch.eye(shape[1], device=cond.context.device)
    x0 = torch.cat([channels, -channels])[:, :, None, None].expand(-1, *shape[1:])
    z = torch.cat([noise(row[None]) for row in x0])
    x = (level.alpha * x0 + level.sigma * z).to(cond.context.dtype)
    timesteps = torch.full((len(x),), sde.timestep(level.t), device=x.device)
    with torch.inference_mode():
        y = network(x, timesteps, cond.map(lambda a: a.expand(len(x), *a.shape[1:])))
    basis = torch.stack([z, x0]).flatten(1).cpu().double()  # on the host: not every device has float64
    a, b = torch.linalg.solve(basis @ basis.T, basis @ y.flatten().cpu().double()).tolist()
    return ProbeResult(a, b)


def classify_probe(result: ProbeResult) -> tuple[str, str]:
    """The prediction whose expected result is near a probe's, and the evidence; ValueError where none is.

    Expected results lie on a circle, eps and v 1.15 apart, and each 1 from (0, 0), which is an untrained network's: no
    two are within `PROBE_TOLERANCE` of a point. A good network differs as its x0 is g x0 + h noise (its prior pulls x0
    to the mean of images, g < 1): eps gives (1 - h cot, (1 - g) cot), v (alpha - h / sigma, (alpha^2 - g) / sigma),
    where cot = alpha / sigma = .36. So eps is found for any g from 0 to 1, v and x0 for g above .6. Picto's results,
    with each of the three, are within .17 of the expected ones at 32 x 32 latents, and within .46 at its own 16 x 16
    under prompts that tell the colours; those of untrained U-Nets are within .06 of (0, 0).
    """
    measured = f"{result.noise_coef:.2f} of the noise, {result.x0_coef:.2f} of the image"
    for name, (a, b) in EXPECTED_PROBE_RESULTS.items():
        if math.dist(result, (a, b)) < PROBE_TOLERANCE:
            return name, f"prediction {name}: measured, {measured} ({a:.2f} and {b:.2f} are {name})"
    raise ValueError(f"cannot tell what the U-Net predicts (its output has {measured}){PREDICTION_OPTION_HINT}")


def select_family(families: Sequence[str], prediction: str | None) -> str:
    """Of several families with the same tensors the one with this prediction, or the first."""
    return next((name for name in families if family_prediction(name) == prediction), families[0])


def family_prediction(family: str) -> str:
    """The prediction of a family's U-Nets."""
    return PREDICTION_TYPES[FAMILIES[family].scheduler["prediction_type"]]


def detect_families(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The families of a single file's tensors (may be on the meta device), by its U-Net and the text encoders.

    "sd2-base" and "sd2-v" have the same tensors. ValueError, without the file's name, tells what else it is.
    """
    if other := unsupported_reason(tensors):
        raise ValueError(other)
    dims, prefixes = _read_unet_dims(tensors), _text_encoder_prefixes(tensors)
    family_dims = {name: (f.unet["cross_attention_dim"], f.unet["in_channels"]) for name, f in FAMILIES.items()}
    if not (candidates := {name: FAMILIES[name] for name in family_dims if family_dims[name] == dims}):
        raise ValueError(f"unknown family: in_channels {dims[1]}, cross_attention_dim {dims[0]}")
    family_prefixes = {
        name: _text_encoder_prefixes(spec.prefix for spec in family.text_encoders.values())
        for name, family in candidates.items()
    }
    # encoders may be missing, or another's left over
    matches = [name for name, own in family_prefixes.items() if prefixes <= own or own <= prefixes]
    if not matches:
        encoders = " and ".join(prefixes)
        raise ValueError(f"the U-Net matches {' or '.join(candidates)}, but the text encoders are {encoders}")
    return tuple(matches)


def unsupported_reason(tensors: Mapping[str, Tensor]) -> str | None:
    """What a file is that is not a Stable Diffusion model, in a line; None where it is one."""
    for pattern, what in UNSUPPORTED_KEY_PATTERNS.items():
        if any(re.fullmatch(pattern, name) for name in tensors):
            return what
    if CONV_IN_KEY in tensors:
        return UNSUPPORTED_IN_CHANNELS.get(_read_unet_dims(tensors)[1])
    for name in tensors:
        if other := _match_first_pattern(COMPONENT_KEY_PATTERNS, name):
            return other
    if 0 < len(tensors) <= 2 and all(a.ndim <= 2 for a in tensors.values()):
        return UNSUPPORTED_KEY_PATTERNS[EMBEDDING_KEY_PATTERN]
    return f"not a model of Stable Diffusion: no {CONV_IN_KEY}"


def describe_family_evidence(tensors: Mapping[str, Tensor], families: Iterable[str]) -> str:
    """The evidence for families, in a line."""
    width, channels = _read_unet_dims(tensors)
    text = " and ".join(sorted(_text_encoder_prefixes(tensors))) or "nothing"
    evidence = f"cross_attention_dim {width}, in_channels {channels}, text encoders {text}"
    return f"family {' or '.join(families)}: {evidence}"


def _read_unet_dims(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """cross_attention_dim and in_channels of a U-Net."""
    attention = (a for name, a in tensors.items() if CROSS_ATTENTION_KEY_PATTERN.fullmatch(name))
    widths = {a.shape[1] if a.ndim == 2 else 0 for a in attention}
    if len(widths) != 1:
        raise ValueError(f"its U-Net reads {len(widths)} widths of context, expected one")
    if tensors[CONV_IN_KEY].ndim != 4:
        raise ValueError(f"{CONV_IN_KEY} has shape {list(tensors[CONV_IN_KEY].shape)}, expected that of a convolution")
    return widths.pop(), tensors[CONV_IN_KEY].shape[1]


def _text_encoder_prefixes(names: Iterable[str]) -> set[str]:
    """The prefixes of text encoders' tensors."""
    return {match[0].removesuffix(".") for name in names if (match := TEXT_ENCODER_KEY_PATTERN.match(name))}


def _match_first_pattern(table: Mapping[str, str], name: str) -> str | None:
    return next((what for pattern, what in table.items() if re.fullmatch(pattern, name)), None)
