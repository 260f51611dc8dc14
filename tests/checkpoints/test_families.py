"""The families' records are the published models': their sizes, their text encoders, their schedule."""

import inspect
import math

import diffusers
import open_clip
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_TO_LDM_DEFAULT_IMAGE_SIZE_MAP,
    SCHEDULER_DEFAULT_CONFIG,
)
from transformers import CLIPTextConfig

from ldm.checkpoints.families import FAMILIES, SD1_CLIP_L, SD2_CLIP_H, SDXL_CLIP_G, SDXL_CLIP_L
from ldm.checkpoints.keys import build_meta_state_dicts
from ldm.checkpoints.schedule import compute_alphas_cumprod
from ldm.nn.unet import UNetConfig

every_family = pytest.mark.parametrize("name", FAMILIES)
PARAMETERS = {  # as counted in the published files
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd1-inpainting": {"unet": 859_535_364, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2-base": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sd2-v": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sd2-inpainting": {"unet": 865_925_124, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
MASK_PARAMETERS = 320 * 5 * 3 * 3  # of the first convolution, for the five channels that inpainting adds
PARAMETERS["sdxl-inpainting"] = PARAMETERS["sdxl"] | {"unet": PARAMETERS["sdxl"]["unet"] + MASK_PARAMETERS}
SIZES = {"sd1": "v1", "sd1-inpainting": "inpainting", "sd2-v": "v2", "sdxl": "xl_base"}  # our names: diffusers'


@every_family
def test_full_size_networks_have_the_published_number_of_parameters(name):
    count = {
        folder: sum(a.numel() for a in tensors.values())
        for folder, tensors in build_meta_state_dicts(FAMILIES[name]).items()
    }
    assert count == PARAMETERS[name]


@every_family
def test_a_family_fits_together(name):
    family = FAMILIES[name]
    unet, towers = UNetConfig.from_dict(family.unet), family.text_encoders.values()
    assert (
        unet.sample_size * 2 ** (len(family.vae["block_out_channels"]) - 1)
        == family.resolution
        == family.vae["sample_size"]
    )
    assert unet.cross_attention_dim == sum(tower.config["hidden_size"] for tower in towers)
    pooled = sum(tower.config["projection_dim"] for tower in towers if tower.with_projection)
    ids = 6 * (unet.addition_time_embed_dim or 0)
    assert pooled + ids == (unet.projection_class_embeddings_input_dim or 0)
    known = 2 * family.vae["latent_channels"] + 1 if "inpainting" in name else family.vae["latent_channels"]
    assert unet.in_channels == known and unet.out_channels == family.vae["latent_channels"]


@every_family
def test_no_field_is_unknown_to_the_class_that_reads_it(name):
    family = FAMILIES[name]
    for config in (family.unet, family.vae, family.scheduler):
        known = inspect.signature(getattr(diffusers, config["_class_name"])).parameters
        ours = config.keys() - {"_class_name"}
        stray = {"set_alpha_to_one", "skip_prk_steps", "clip_sample"} if config is family.scheduler else set()
        assert ours - stray <= known.keys()
    for tower in family.text_encoders.values():
        assert tower.config.keys() <= CLIPTextConfig().to_dict().keys()
    assert hasattr(diffusers, family.pipeline_class)


@every_family
def test_the_schedule_is_stable_diffusion_s(name):
    """sqrt(beta) linear: sigma/alpha from 0.0292 to 14.6146, and diffusers' table in single precision."""
    config = FAMILIES[name].scheduler
    alphas = compute_alphas_cumprod(config)
    ratio = ((1 - alphas) / alphas).sqrt()
    assert math.isclose(ratio[0], 0.0291672, rel_tol=1e-5) and math.isclose(ratio[-1], 14.6146412, rel_tol=1e-5)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    torch.testing.assert_close(alphas.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    legacy = SCHEDULER_DEFAULT_CONFIG | {"prediction_type": config["prediction_type"]}
    assert config.items() - {("_class_name", config["_class_name"]), ("clip_sample", False)} <= legacy.items()


@pytest.mark.parametrize("name, theirs", SIZES.items())
def test_native_sizes_are_diffusers(name, theirs):
    assert FAMILIES[name].resolution == DIFFUSERS_TO_LDM_DEFAULT_IMAGE_SIZE_MAP[theirs]


@pytest.mark.parametrize(
    "tower, model",
    [
        (SD1_CLIP_L, "ViT-L-14-quickgelu"),
        (SDXL_CLIP_L, "ViT-L-14-quickgelu"),
        (SD2_CLIP_H, "ViT-H-14"),
        (SDXL_CLIP_G, "ViT-bigG-14"),
    ],
    ids=["L", "L of XL", "H", "G"],
)
def test_text_encoders_are_open_clip_s(tower, model):
    theirs, config = open_clip.get_model_config(model), tower.config
    text = theirs["text_cfg"]
    assert (config["hidden_size"], config["num_attention_heads"]) == (text["width"], text["heads"])
    assert config["num_hidden_layers"] + tower.num_dropped_layers == text["layers"]
    assert (config["vocab_size"], config["max_position_embeddings"]) == (text["vocab_size"], text["context_length"])
    assert config["projection_dim"] == theirs["embed_dim"]
    assert config["hidden_act"] == ("quick_gelu" if theirs.get("quick_gelu") else "gelu")
