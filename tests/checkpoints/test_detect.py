"""What a file is: told by its tensors, its header, and one question to its U-Net; never guessed."""

import math

import pytest
import torch

from ldm.checkpoints.detect import (
    EXPECTED_PROBE_RESULTS,
    PROBE_ANGLE,
    ProbeResult,
    classify_probe,
    detect_families,
    detect_model,
    probe_network,
)
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.formats import PICTO_PATH, load_checkpoint
from ldm.checkpoints.keys import build_key_mappings
from ldm.checkpoints.schedule import compute_alphas_cumprod
from ldm.conditioning import Conditioning
from ldm.diffusion.prediction import PREDICTIONS, convert_prediction
from ldm.diffusion.sde import VPSDE, append_dims
from ldm.nn.unet import UNet
from ldm.pipeline.prompt_encoder import PromptEncoder
from ldm.rng import Noise

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": SD,
    "zero terminal SNR": SD | {"rescale_betas_zero_snr": True},
}
SHAPE = (1, 4, 16, 16)
NOTHING = Conditioning(torch.zeros(1, 2, 3))


def meta(*shape):
    return torch.empty(shape, device="meta")


def single(name):
    """The tensors of a family's single file, full size, on the meta device."""
    return {entry.original_key: entry.original_tensor for entry in build_key_mappings(FAMILIES[name])}


def never():
    raise AssertionError("the U-Net was asked")


@pytest.fixture(scope="module")
def singles():
    return {name: single(name) for name in FAMILIES}


@pytest.fixture(scope="module")
def picto():
    return load_checkpoint(PICTO_PATH, torch.device("cpu"), torch.float32)


def as_if(model, kind, sde):
    """The model's network as one of another prediction, trained on another schedule: the same at equal log-SNR."""

    def network(x, timesteps, cond):
        t = (timesteps.double() + 1) / sde.num_train_timesteps
        own = model.sde.timestep(model.sde.time_at_log_snr(sde.log_snr(t))).float()
        return convert_prediction(model.unet(x, own, cond), x, *sde.marginal(t), "v", kind)

    return network


@pytest.mark.parametrize("kind", EXPECTED_PROBE_RESULTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_trained_network_is_told(picto, schedule, kind):
    """For any seed and prompt; picto predicts v on the cosine schedule."""
    sde, texts = VPSDE.tabulated(compute_alphas_cumprod(SCHEDULES[schedule])), PromptEncoder(picto)
    for seed, prompt in enumerate(["", "", "a red apple on a blue background", "two stars"]):
        reply = probe_network(as_if(picto, kind, sde), sde, texts(prompt), SHAPE, Noise([seed]))
        assert classify_probe(reply)[0] == kind, reply


def test_an_untrained_network_is_refused(picto):
    for seed in range(6):
        torch.manual_seed(seed)
        reply = probe_network(UNet(picto.unet.config).eval(), picto.sde, PromptEncoder(picto)(""), SHAPE, Noise([seed]))
        assert math.hypot(*reply) < 0.1
        with pytest.raises(ValueError, match="cannot tell what the U-Net predicts"):
            classify_probe(reply)


def flat(kind, gain=1.0, offset=0.0):
    """The best denoiser of flat pictures: their mean, times `gain`, and what it says of any picture."""

    def network(x, timesteps, cond):
        alpha, sigma = (append_dims(a, x) for a in VPSDE.cosine().marginal((timesteps.double() + 1) / 1000))
        x0 = gain * x.mean((2, 3), keepdim=True).expand_as(x) / alpha + offset
        return PREDICTIONS[kind].to_output(x0, x, alpha, sigma)

    return network


def reply_of(network, seed=0, side=64):
    return probe_network(network, VPSDE.cosine(), NOTHING, (1, 4, side, side), Noise([seed]))


@pytest.mark.parametrize("kind", EXPECTED_PROBE_RESULTS)
def test_a_perfect_denoiser_answers_its_target(kind):
    assert math.dist(reply_of(flat(kind)), EXPECTED_PROBE_RESULTS[kind]) < 0.03


@pytest.mark.parametrize("kind", EXPECTED_PROBE_RESULTS)
@pytest.mark.parametrize("gain", [0.0, 0.3, 0.6, 0.8, 1.2])
def test_a_denoiser_drawn_to_the_mean_of_images(kind, gain):
    """x0 is g x0: the results are those of `classify_probe`, and eps is found for any g, the others from .6 on."""
    reply = reply_of(flat(kind, gain))
    alpha, sigma = math.cos(PROBE_ANGLE), math.sin(PROBE_ANGLE)
    b = {"eps": (1 - gain) * alpha / sigma, "v": (alpha**2 - gain) / sigma, "x0": gain}[kind]
    assert math.dist(reply, (EXPECTED_PROBE_RESULTS[kind].noise_coef, b)) < 0.03
    if kind == "eps" or gain >= 0.6:
        assert classify_probe(reply)[0] == kind
    else:
        with pytest.raises(ValueError, match="pass --prediction eps or v"):
            classify_probe(reply)


@pytest.mark.parametrize("kind", EXPECTED_PROBE_RESULTS)
def test_what_is_the_same_in_all_images_does_not_count(kind):
    offset = torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None, None]
    assert math.dist(reply_of(flat(kind, offset=offset)), reply_of(flat(kind))) < 0.05


def test_answers_are_too_far_apart_to_be_mistaken():
    points = [*EXPECTED_PROBE_RESULTS.values(), ProbeResult(0, 0)]
    assert min(math.dist(a, b) for k, a in enumerate(points) for b in points[:k]) >= 1
    with pytest.raises(ValueError, match="cannot tell"):
        classify_probe(ProbeResult(math.nan, math.nan))  # float16 that overflows


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_silent_file_is_measured(singles, name, kind):
    found = detect_model(singles[name], {}, lambda: EXPECTED_PROBE_RESULTS[kind])
    twins = {"eps": "sd2-base", "v": "sd2-v"}
    assert found.family == (twins[kind] if name in twins.values() else name)
    assert (found.prediction, found.zero_snr) == (kind, False)
    assert [line.split(" ")[0] for line in found.evidence] == ["family", "prediction", "zero"]
    assert "measured" in found.evidence[1]


def test_the_unet_is_asked_once(singles):
    calls = []
    detect_model(singles["sd1"], {}, lambda: calls.append(1) or EXPECTED_PROBE_RESULTS["v"])
    assert calls == [1]


ARCHITECTURE, TYPE = "modelspec.architecture", "modelspec.prediction_type"
TOLD = {  # family, marks, header, what the user says: family, prediction, zero SNR, a word of the evidence
    "mark": ("sdxl", ["v_pred"], {}, {}, "sdxl", "v", False, "marker tensor v_pred"),
    "marks": ("sdxl", ["v_pred", "ztsnr"], {}, {}, "sdxl", "v", True, "marker tensor ztsnr"),
    "header eps": ("sd2-base", [], {TYPE: "epsilon"}, {}, "sd2-base", "eps", False, "prediction_type = epsilon"),
    "header v": ("sd2-base", [], {TYPE: "v"}, {}, "sd2-v", "v", False, "prediction_type = v"),
    "ComfyUI's header": ("sd1", [], {"modelspec.predict_key": "v"}, {}, "sd1", "v", False, "predict_key = v"),
    "768": ("sd2-v", [], {ARCHITECTURE: "stable-diffusion-v2-768-v"}, {}, "sd2-v", "v", False, "v2-768-v"),
    "512": ("sd2-v", [], {ARCHITECTURE: "stable-diffusion-v2-512"}, {}, "sd2-base", "eps", False, "v2-512"),
    "kohya's version": ("sd2-v", [], {"ss_base_model_version": "sd_v2_v"}, {}, "sd2-v", "v", False, "sd_v2_v"),
    "kohya's flag": ("sd1", [], {"ss_v_parameterization": "True"}, {}, "sd1", "v", False, "ss_v_parameterization"),
    "kohya's zero": (
        "sdxl",
        ["v_pred"],
        {"ss_zero_terminal_snr": "True"},
        {},
        "sdxl",
        "v",
        True,
        "ss_zero_terminal_snr = True",
    ),
    "both agree": (
        "sd1",
        ["v_pred"],
        {ARCHITECTURE: "stable-diffusion-v1", TYPE: "v"},
        {},
        "sd1",
        "v",
        False,
        "family sd1: modelspec.architecture",
    ),
    "unknown words": (
        "sd1",
        ["v_pred"],
        {ARCHITECTURE: "my-merge", TYPE: "?"},
        {},
        "sd1",
        "v",
        False,
        "my-merge: not understood",
    ),
    "the user, against all": (
        "sdxl",
        ["v_pred", "ztsnr"],
        {TYPE: "v"},
        {"prediction": "eps", "zero_snr": False},
        "sdxl",
        "eps",
        False,
        "as requested",
    ),
    "the user's family": ("sd2-base", [], {TYPE: "epsilon"}, {"family": "sd2-v"}, "sd2-v", "v", False, "as requested"),
    "both of the user's": (
        "sd2-base",
        [],
        {},
        {"family": "sd2-v", "prediction": "eps"},
        "sd2-v",
        "eps",
        False,
        "as requested",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_is_told_is_not_measured(singles, case):
    name, marks, header, user, *expected, word = TOLD[case]
    tensors = singles[name] | {mark: meta(0) for mark in marks}
    found = detect_model(tensors, header, never, **user)
    assert [found.family, found.prediction, found.zero_snr] == expected
    assert any(word in line for line in found.evidence), found.evidence


def test_a_family_that_the_user_names_does_not_silence_the_unet(singles):
    """It says what the prediction is only where it chooses between two of the same tensors."""
    assert detect_model(singles["sd1"], {}, lambda: EXPECTED_PROBE_RESULTS["v"], family="sd1").prediction == "v"


CONTRADICTIONS = {
    "architecture": ("sd1", [], {ARCHITECTURE: "stable-diffusion-xl-v1-base"}, {}, r"xl-v1-base.+match sd1$"),
    "version": ("sdxl", [], {"ss_base_model_version": "sd_v1"}, {}, r"sd_v1, the tensors match sdxl"),
    "flag of SD 2": ("sd1", [], {"ss_v2": "True"}, {}, r"ss_v2 = True, the tensors match sd1"),
    "mark and header": ("sdxl", ["v_pred"], {TYPE: "epsilon"}, {}, r"v_pred says v, but .+epsilon says eps"),
    "header and header": ("sd2-v", [], {TYPE: "v", "ss_v_parameterization": "False"}, {}, "but ss_v_param.+ says eps"),
    "zero SNR of eps": ("sdxl", ["ztsnr"], {TYPE: "epsilon"}, {}, "exclude each other: pass --no-zero-snr"),
    "the user's family": ("sd1", [], {}, {"family": "sdxl"}, "family sdxl: the tensors match sd1"),
    "no family": ("sd1", [], {}, {"family": "sd3"}, "family 'sd3': choose from sd1"),
    "no prediction": ("sd1", [], {}, {"prediction": "score"}, "prediction 'score': choose from eps, v, x0"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_an_error(singles, case):
    name, marks, header, user, said = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=said):
        detect_model(singles[name] | {mark: meta(0) for mark in marks}, header, never, **user)


UNET, INPUT = "model.diffusion_model.", "model.diffusion_model.input_blocks.0.0.weight"
STRANGERS = {  # tensors that are the whole file, and what it is
    "kohya's LoRA": (
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": meta(4, 320)},
        "a LoRA file: --lora",
    ),
    "diffusers' LoRA": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": meta(4, 320)}, "a LoRA file"),
    "old LoRA": ({"mid_block.attn1.processor.to_q_lora.down.weight": meta(4, 320)}, "a LoRA file"),
    "LoRA of dots": ({"unet.mid_block.attentions.0.to_k.lora.down.weight": meta(4, 320)}, "a LoRA file: --lora"),
    "LoRA of LyCORIS": ({"lycoris_mid_block_attentions_0_proj_in.lora_up.weight": meta(4, 320)}, "a LoRA file: --lora"),
    "LoRA of ComfyUI": ({"diffusion_model.middle_block.1.proj_in.lora_up.weight": meta(4, 320)}, "a LoRA file: --lora"),
    "OFT": ({"oft_unet_mid_block_attentions_0_proj_in.oft_blocks": meta(4, 8, 8)}, "a LoRA file: --lora"),
    "OFT of peft": ({"base_model.model.mid_block.proj_in.oft_R.weight": meta(4, 6)}, "a LoRA file: --lora"),
    "IA3": ({"lora_unet_a.weight": meta(8), "lora_unet_a.on_input": meta()}, "a LoRA file: --lora"),
    "LoHa": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": meta(4, 320)}, "a LoRA file"),
    "embedding": ({"emb_params": meta(2, 768)}, "an embedding"),
    "embedding of XL": ({"clip_l": meta(2, 768), "clip_g": meta(2, 1280)}, "an embedding"),
    "embedding by its word": ({"my-cat": meta(768)}, "an embedding"),
    "VAE": ({"decoder.conv_in.weight": meta(512, 4, 3, 3), "encoder.conv_in.weight": meta(1)}, "a VAE: --vae"),
    "VAE with prefix": ({"first_stage_model.decoder.conv_in.weight": meta(512, 4, 3, 3)}, "a VAE"),
    "ControlNet": ({"control_model.time_embed.0.weight": meta(1)}, "a ControlNet"),
    "diffusers' ControlNet": ({"controlnet_cond_embedding.conv_in.weight": meta(1)}, "a ControlNet"),
    "U-Net": ({"conv_in.weight": meta(320, 4, 3, 3)}, "a U-Net alone"),
    "U-Net without prefix": ({"diffusion_model.input_blocks.0.0.weight": meta(320, 4, 3, 3)}, "a U-Net alone"),
    "text": ({"text_model.encoder.layers.0.mlp.fc1.weight": meta(1)}, "a text encoder alone"),
    "SD 3": ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": meta(1)}, "a Stable Diffusion 3 file: not supported"),
    "Flux": ({UNET + "double_blocks.0.img_attn.qkv.weight": meta(1)}, "a Flux file"),
    "bare Flux": ({"double_blocks.0.img_attn.qkv.weight": meta(1)}, "a Flux file"),
    "Cascade": ({"clip_txt_mapper.weight": meta(1)}, "a Stable Cascade file"),
    "AnimateDiff": ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": meta(1)}, "AnimateDiff"),
    "other": ({f"layer{k}.weight": meta(3, 3) for k in range(9)}, f"not a model of Stable Diffusion: no {INPUT}"),
    "nothing": ({}, "not a model of Stable Diffusion"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_another_file_is_told_by_name(case):
    tensors, said = STRANGERS[case]
    with pytest.raises(ValueError, match=said):
        detect_families(tensors)


def without(tensors, beginning):
    return {name: a for name, a in tensors.items() if not name.startswith(beginning)}


RELATIVES = {  # changes of a family's file, and what they make of it
    "instruct-pix2pix": ("sd1", lambda t: t | {INPUT: meta(320, 8, 3, 3)}, "an instruct-pix2pix model"),
    "depth": ("sd2-base", lambda t: t | {INPUT: meta(320, 5, 3, 3)}, "a depth-to-image model"),
    "upscaler": ("sd2-base", lambda t: t | {INPUT: meta(320, 7, 3, 3)}, "an upscaler"),
    "XL of 6 channels": ("sdxl", lambda t: t | {INPUT: meta(320, 6, 3, 3)}, "in_channels 6, cross_attention_dim 2048"),
    "refiner": (
        "sdxl",
        lambda t: t | {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": meta(1280)},
        "the refiner of SDXL",
    ),
    "Playground": ("sdxl", lambda t: t | {"edm_mean": meta(4)}, "a Playground 2.5 file"),
    "CosXL": ("sdxl", lambda t: t | {"v_pred": meta(0), "edm_vpred.sigma_max": meta()}, "a CosXL file"),
    "video": ("sd2-v", lambda t: t | {UNET + "input_blocks.1.0.time_mixer.mix_factor": meta(1)}, "Video Diffusion"),
    "unCLIP": ("sd2-v", lambda t: t | {"noise_augmentor.data_mean": meta(1)}, "an unCLIP model"),
    "two widths": (
        "sd1",
        lambda t: t | {UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": meta(320, 1024)},
        "2 widths of context, expected one",
    ),
    "no convolution": ("sd1", lambda t: t | {INPUT: meta()}, "expected that of a convolution"),
    "no context": ("sd1", lambda t: {n: a for n, a in t.items() if "attn2" not in n}, "0 widths of context"),
    "text of another": (
        "sd1",
        lambda t: without(t, "cond_stage_model.") | {"cond_stage_model.model.ln_final.bias": meta(1024)},
        "U-Net matches sd1, but the text encoders are cond_stage_model.model",
    ),
}


@pytest.mark.parametrize("case", RELATIVES)
def test_a_relative_is_told_by_name(singles, case):
    name, change, said = RELATIVES[case]
    with pytest.raises(ValueError, match=said):
        detect_families(change(dict(singles[name])))
