"""What a single file is, with the evidence: its family, what its U-Net predicts, whether its schedule ends in zero SNR.

Nothing is guessed. Names and shapes of tensors give the family. Of the prediction speak the user, a mark among the
tensors, the header; where all are silent, the U-Net itself is asked, once. Contradictions are errors.
Sources: the marks of ComfyUI, Stability's model spec (`modelspec.*`), the metadata of kohya's sd-scripts (`ss_*`).
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
LORA_DESCRIPTION, VAE_DESCRIPTION, PREDICTION_OPTION_HINT = (
    "a LoRA file: --lora",
    "a VAE: --vae",
    ": say --prediction eps or v",
)
EMBEDDING_KEY_PATTERN = r"string_to_param.*|emb_params|clip_[gl]|<.+>"
UNSUPPORTED_KEY_PATTERNS = {  # tensors (whole names, as regular expressions) that no Stable Diffusion has: what has them
    r"(lora_(unet|te\d?)_|.*\.(lora_(A|B|down|up)|lora_linear_layer|hada_w1|lokr_w[12])).*|.*_lora\.(down|up)\..+": (
        LORA_DESCRIPTION
    ),
    EMBEDDING_KEY_PATTERN: "an embedding (textual inversion), which adds a word to a model",
    r"control_.+|.*\b(controlnet_cond_embedding|input_hint_block)\..+": "a ControlNet: not supported",
    r".*\bmotion_modules\..+": "a motion module of AnimateDiff: not supported",
    r".*\bjoint_blocks\.0\..+": "a Stable Diffusion 3 file: not supported",
    r".*\bdouble_blocks\.0\..+": "a Flux file: not supported",
    r"clip_txt_mapper\..+|.*\.channelwise\.0\.weight": "a Stable Cascade file: not supported",
    r".*\.time_(stack|mixer)\..+": "a Stable Video Diffusion file: not supported",
    r"conditioner\.embedders\.0\.model\..+": "the refiner of SDXL, which draws nothing by itself: not supported",
    r"edm_(mean|std)": "a Playground 2.5 file, whose noise levels are EDM's: not supported",
    r"edm_vpred\.sigma_(max|min)": "a CosXL file, whose noise levels are EDM's: not supported",
    r"depth_model\..+": "a depth-to-image model: not supported",
    r"noise_augmentor\..+": "an unCLIP model: not supported",
}
COMPONENT_KEY_PATTERNS = {  # likewise, of a model where there is no U-Net
    r"(first_stage_model\.)?decoder\.conv_in\.weight": VAE_DESCRIPTION,
    r"(diffusion_model\.)?input_blocks\.0\.0\.weight|conv_in\.weight": "a U-Net alone, without text encoder and VAE",
    r"(.+\.)?(encoder\.layers|resblocks)\.0\..+": "a text encoder alone",
}
UNSUPPORTED_IN_CHANNELS = {  # that go into other U-Nets: whose
    5: "a depth-to-image model: not supported",
    7: "an upscaler: not supported",
    8: "an instruct-pix2pix model: not supported",
}


class HeaderHint(NamedTuple):
    """What a line of a header says: the file is of one of these families, and predicts this."""

    families: tuple[str, ...] = tuple(FAMILIES)
    prediction: str | None = None


SD1_FAMILIES, SD2_FAMILIES, SDXL_FAMILIES = (
    ("sd1", "sd1-inpainting"),
    ("sd2-base", "sd2-v", "sd2-inpainting"),
    ("sdxl",),
)
EPS_HINT, V_HINT, X0_HINT = (HeaderHint(prediction=name) for name in ("eps", "v", "x0"))
HEADER_HINTS: dict[str, dict[str, HeaderHint]] = {
    "modelspec.architecture": {
        "stable-diffusion-v1": HeaderHint(SD1_FAMILIES),
        "stable-diffusion-v1-inpainting": HeaderHint(SD1_FAMILIES[1:]),
        "stable-diffusion-v2-512": HeaderHint(SD2_FAMILIES, "eps"),
        "stable-diffusion-v2-768-v": HeaderHint(SD2_FAMILIES, "v"),
        "stable-diffusion-v2-inpainting": HeaderHint(SD2_FAMILIES[2:]),
        "stable-diffusion-xl-v1-base": HeaderHint(SDXL_FAMILIES),
    },
    "modelspec.prediction_type": {"epsilon": EPS_HINT, "v": V_HINT, "v_prediction": V_HINT, "sample": X0_HINT},
    "modelspec.predict_key": {"epsilon": EPS_HINT, "v": V_HINT},  # ComfyUI's word for it
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

PROBE_ANGLE = math.radians(70)  # of the level where the U-Net is asked: alpha .34, sigma .94
PROBE_AMPLITUDE = 1.5  # of a channel, in standard deviations of latents
PROBE_TOLERANCE = 0.5  # less than half of the way between two answers, and from one to silence


class ProbeResult(NamedTuple):
    """An output as `noise` times the noise plus `x0` times the picture that were its input, and a rest."""

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
    """A name of FAMILIES, a name of PREDICTIONS, whether SNR ends in zero; `evidence` has a line or more on each."""

    family: str
    prediction: str
    zero_snr: bool
    evidence: tuple[str, ...]


def detect_family(tensors: Mapping[str, Tensor]) -> str:
    """The family of a single file's tensors, which may be on the meta device; of two that share all, the first.

    Names and shapes are all that is looked at: "sd2-base" may be "sd2-v", as `detect_model` finds out, whose U-Net is the
    same module. ValueError, which the caller puts the file's name before, tells what else it is, or is missing.
    """
    return detect_families(tensors)[0]


def detect_model(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    probe: Callable[[], ProbeResult],
    *,
    family: str | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Detection:
    """What a single file is, by its tensors (the meta device will do), its header and, if need be, its U-Net.

    `family`, `prediction` and `zero_snr` are the user's, and overrule what the file says of the latter two. `probe_network` is
    called at most once, where nothing tells the prediction: it asks the U-Net of `detect_family`, by the function `probe_network`.
    The verdict's family may be another one of the same tensors. ValueError, which the caller puts the file's name
    before, for what contradicts itself or is not supported.
    """
    fitting = detect_families(tensors)
    kind, said = detect_prediction(tensors, metadata, family=family, prediction=prediction)
    if kind is None:
        kind, measured = classify_probe(probe())
        said = (*said, measured)
    zero, why = detect_zero_snr(tensors, metadata, fitting[0], zero_snr)
    if zero and kind == "eps":
        raise ValueError(f"prediction eps and zero terminal SNR ({why}) exclude each other: say --no-zero-snr")
    return Detection(
        family or select_family(fitting, kind), kind, zero, (describe_family_evidence(tensors, fitting), *said, why)
    )


def detect_prediction(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    family: str | None = None,
    prediction: str | None = None,
) -> tuple[str | None, tuple[str, ...]]:
    """The prediction by all but measurement, None where nothing tells it, and a line of evidence for each that speaks.

    ValueError where the header speaks of another family or where two disagree, the user apart.
    """
    fitting = detect_families(tensors)
    if family is not None and choose(FAMILIES, family, "family") and family not in fitting:
        raise ValueError(f"family {family}: the tensors are those of {' or '.join(fitting)}")
    if prediction is not None:
        choose(EXPECTED_PROBE_RESULTS, prediction, "prediction")
        return prediction, (f"prediction {prediction}: as asked",)
    if family is not None and len(fitting) > 1:
        return family_prediction(family), (f"prediction {family_prediction(family)}: family {family}, as asked",)
    said = {"the mark v_pred": "v"} if "v_pred" in tensors else {}
    evidence = []
    for field, values in HEADER_HINTS.items():
        if field not in metadata:
            continue
        line = f"{field} = {metadata[field]}"
        claim = values.get(metadata[field])
        if claim is None:
            evidence.append(f"{line}: not understood")
        elif not set(claim.families) & set(fitting):
            raise ValueError(f"the header says {line}, the tensors are those of {' or '.join(fitting)}")
        elif claim.prediction is None:
            evidence.append(f"family {' or '.join(fitting)}: {line}")
        else:
            said[line] = claim.prediction
    if len(set(said.values())) > 1:
        both = ", but ".join(f"{source} says {kind}" for source, kind in said.items())
        raise ValueError(f"{both}: say --prediction eps or v")
    lines = (f"prediction {kind}: {source}" for source, kind in said.items())
    return next(iter(said.values()), None), (*evidence, *lines)


def detect_zero_snr(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: str, override: bool | None = None
) -> tuple[bool, str]:
    """Whether the schedule ends in zero SNR, by the user, the mark `ztsnr`, the header or the family; and why."""
    header = metadata.get("ss_zero_terminal_snr")
    if override is not None:
        zero, why = override, "as asked"
    elif "ztsnr" in tensors:
        zero, why = True, "the mark ztsnr"
    elif header in ("True", "False"):
        zero, why = header == "True", f"ss_zero_terminal_snr = {header}"
    else:
        zero, why = bool(FAMILIES[family].scheduler.get("rescale_betas_zero_snr")), "nothing else is said"
    return zero, f"zero terminal SNR {'yes' if zero else 'no'}: {why}"


def probe_network(
    network: Network, sde: VPSDE, cond: Conditioning, shape: tuple[int, ...], noise: Noise
) -> ProbeResult:
    """What a network answers to pictures that it can hardly mistake: one flat channel, under much noise.

    For each of the C channels of `select_immutable_options` [1, C, h, w] there are two rows, x0 = +-LIFT in this channel and 0 elsewhere,
    and x = alpha x0 + sigma noise at the angle `PROBE_ANGLE`. The network's output y is resolved into y = a noise + b x0 +
    rest by least squares. A denoiser finds the mean of a channel under any noise, so it answers its target: (a, b) is
    near (1, 0) for eps, (alpha, -sigma) for v, (0, 1) for x0. What is the same in all rows, as the mean of all pictures
    or all that an untrained network says, drops out of b, as the x0 sum to 0.
    `cond` has one row, best the empty prompt's, in the network's dtype; `noise` has one stream.
    """
    (point,) = sde.levels_at_angles([PROBE_ANGLE])
    channels = PROBE_AMPLITUDE * torch.eye(shape[1], device=cond.context.device)
    x0 = torch.cat([channels, -channels])[:, :, None, None].expand(-1, *shape[1:])
    z = torch.cat([noise(row[None]) for row in x0])
    x = (point.alpha * x0 + point.sigma * z).to(cond.context.dtype)
    timesteps = torch.full((len(x),), sde.timestep(point.t), device=x.device)
    with torch.inference_mode():
        y = network(x, timesteps, cond.map(lambda a: a.expand(len(x), *a.shape[1:])))
    basis = torch.stack([z, x0]).flatten(1).double()
    a, b = torch.linalg.solve(basis @ basis.T, basis @ y.flatten().double()).tolist()
    return ProbeResult(a, b)


def classify_probe(result: ProbeResult) -> tuple[str, str]:
    """The prediction whose answer a reply is, and the evidence; ValueError where it is near none.

    Answers lie on a circle, eps and v 1.15 apart, 0 and each 1: within `PROBE_TOLERANCE` no two are near, and an untrained
    network's (0, 0) is near none. The reply of a good network differs as its x0 is g x0 + h noise (its prior draws it
    to the mean of pictures, g < 1): eps answers (1 - h cot, (1 - g) cot), v (alpha - h / sigma, (alpha^2 - g) / sigma),
    where cot = alpha / sigma = .36. So eps is told for any g from 0 to 1, v and x0 for g above .6. Picto's replies, as
    any of the three, are within .17 of their answers at 32 x 32 latents, and within .46 at its own 16 x 16 under
    prompts that know the colours beforehand; those of untrained U-Nets within .06 of (0, 0).
    """
    shares = f"{result.noise_coef:.2f} of the noise, {result.x0_coef:.2f} of the picture"
    for name, answer in EXPECTED_PROBE_RESULTS.items():
        if math.dist(result, answer) < PROBE_TOLERANCE:
            return (
                name,
                f"prediction {name}: measured, {shares} ({answer.noise_coef:.2f} and {answer.x0_coef:.2f} are {name})",
            )
    raise ValueError(f"cannot tell what the U-Net predicts (it answers {shares}){PREDICTION_OPTION_HINT}")


def select_family(families: Sequence[str], prediction: str | None) -> str:
    """The one of several families with the same tensors whose U-Nets predict this, or the first."""
    return next((name for name in families if family_prediction(name) == prediction), families[0])


def family_prediction(family: str) -> str:
    """What a family's U-Nets predict."""
    return PREDICTION_TYPES[FAMILIES[family].scheduler["prediction_type"]]


def detect_families(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The families that a single file's tensors may be of, by what its U-Net reads and whose text encoders it has.

    ValueError tells what else it is.
    """
    if other := unsupported_reason(tensors):
        raise ValueError(other)
    read, prefixes = _read_unet_dims(tensors), _text_encoder_prefixes(tensors)
    width, channels = read
    alike = [name for name, f in FAMILIES.items() if read == (f.unet["cross_attention_dim"], f.unet["in_channels"])]
    if not alike:
        raise ValueError(f"of no known family: its U-Net reads {channels} channels and a context of width {width}")
    found = [
        n
        for n in alike
        if prefixes <= _text_encoder_prefixes(tower.prefix for tower in FAMILIES[n].text_encoders.values())
    ]
    if not found:
        raise ValueError(f"its U-Net is of {' or '.join(alike)}, its text is encoded by {' and '.join(prefixes)}")
    return tuple(found)


def unsupported_reason(tensors: Mapping[str, Tensor]) -> str | None:
    """What a file is, in a line, that is no Stable Diffusion; None where it is one."""
    for name in tensors:
        if other := _match_first_pattern(UNSUPPORTED_KEY_PATTERNS, name):
            return other
    if CONV_IN_KEY in tensors:
        return UNSUPPORTED_IN_CHANNELS.get(_read_unet_dims(tensors)[1])
    for name in tensors:
        if other := _match_first_pattern(COMPONENT_KEY_PATTERNS, name):
            return other
    words = 0 < len(tensors) <= 2 and all(a.ndim <= 2 for a in tensors.values())
    return (
        UNSUPPORTED_KEY_PATTERNS[EMBEDDING_KEY_PATTERN]
        if words
        else f"not a model of Stable Diffusion: no {CONV_IN_KEY}"
    )


def describe_family_evidence(tensors: Mapping[str, Tensor], families: Iterable[str]) -> str:
    """The evidence for families."""
    width, channels = _read_unet_dims(tensors)
    text = " and ".join(sorted(_text_encoder_prefixes(tensors))) or "nothing"
    told_by = f"a context of width {width}, {channels} channels go into the U-Net, text is encoded by {text}"
    return f"family {' or '.join(families)}: {told_by}"


def _read_unet_dims(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The width of the context that a U-Net reads, and its number of channels."""
    widths = {
        a.shape[1] if a.ndim == 2 else 0 for name, a in tensors.items() if CROSS_ATTENTION_KEY_PATTERN.fullmatch(name)
    }
    if len(widths) != 1:
        raise ValueError(f"its U-Net reads {len(widths)} widths of context, expected one")
    if tensors[CONV_IN_KEY].ndim != 4:
        raise ValueError(f"{CONV_IN_KEY} has shape {list(tensors[CONV_IN_KEY].shape)}, expected that of a convolution")
    return widths.pop(), tensors[CONV_IN_KEY].shape[1]


def _text_encoder_prefixes(names: Iterable[str]) -> set[str]:
    """Where text encoders are kept."""
    return {match[0].removesuffix(".") for name in names if (match := TEXT_ENCODER_KEY_PATTERN.match(name))}


def _match_first_pattern(table: Mapping[str, str], name: str) -> str | None:
    return next((what for pattern, what in table.items() if re.fullmatch(pattern, name)), None)
