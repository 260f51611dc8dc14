"""The autoencoder equals diffusers' on the same weights, and training starts from a linear map that keeps variance."""

import errno
import os
import tempfile

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.checkpoints.families import FAMILIES
from ldm.nn import vae

VARIANTS = [
    {},
    {"mid_block_add_attention": True},
    {"use_quant_conv": False, "use_post_quant_conv": False, "layers_per_block": 2, "latent_channels": 6},
]


@pytest.fixture
def model(vae_config):
    torch.manual_seed(0)
    return vae.build_vae(vae_config).eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(16, 16), (24, 40)], ids=str)
def test_encode_and_decode_are_diffusers_with_the_scaling_factor(vae_config, variant, size):
    torch.manual_seed(0)
    theirs = AutoencoderKL.from_config({**vae_config, **variant}).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)  # biases and norms of some consequence
    model = vae.build_vae(dict(theirs.config)).eval().requires_grad_(False)
    model.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, *size) * 2 - 1
    expected = theirs.encode(images).latent_dist
    posterior = vae.encode_images(model, images)
    ours = model.encode(images).latent_dist
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    torch.testing.assert_close(ours.sample(g[0]), expected.sample(g[1]), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.decode(ours.mode()).sample, model.decode(ours.mean, return_dict=False)[0])
    torch.testing.assert_close(posterior.mean, 0.5 * expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.std, 0.5 * expected.std, rtol=1e-5, atol=1e-5)
    decoded = vae.decode_latents(model, posterior.mean)
    torch.testing.assert_close(decoded, theirs.decode(expected.mean).sample, rtol=1e-5, atol=1e-5)
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + posterior.std * noise)
    assert vae.vae_scale_factor(model) == 4


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_parameters_of_full_size_are_diffusers_own(name):
    config = FAMILIES[name].vae
    with torch.device("meta"):
        ours, theirs = vae.build_vae(config), AutoencoderKL.from_config(dict(config))
    shapes = [{key: a.shape for key, a in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_configuration_round_trips(vae_config, model):
    config = model.config.to_dict()
    assert vae.build_vae(config).config == model.config
    assert {**config, **vae_config} == config
    theirs = AutoencoderKL.from_config(config).config
    assert {name: theirs[name] for name in config if name != "_class_name"} == {
        name: value for name, value in config.items() if name != "_class_name"
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "3 of 'DownEncoderBlock2D'"),
        ({"norm_num_groups": 5}, "not a multiple of norm_num_groups 5"),
        ({"block_out_chanels": [8]}, r"unknown field block_out_chanels = \[8\]"),
        ({"shift_factor": 0.1}, "shift_factor = 0.1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_configuration_that_is_not_implemented_is_refused(vae_config, fields, message):
    with pytest.raises(ValueError, match=message):
        vae.build_vae({**vae_config, **fields})


def test_training_starts_with_features_that_are_linear_in_the_image(model):
    vae.init_weights(model)
    encoder = model.encoder

    def features(x):  # what the last norm of the encoder sees
        x = encoder.conv_in(x)
        for block in encoder.down_blocks:
            x = block(x)
        return encoder.mid_block(x)

    x, y = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(features(2 * x + y), 2 * features(x) + features(y), rtol=0, atol=1e-5)
        assert 0.5 < encoder.conv_in(x).square().sum() / x.square().sum() < 12


@pytest.mark.parametrize("tile_bytes", [1, 3_000, 40_000, 2**26])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_tiles_give_what_the_whole_gives(vae_config, variant, tile_bytes):
    torch.manual_seed(0)
    model = vae.build_vae({**vae_config, **variant}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    images = torch.rand(2, 3, 28, 16) * 2 - 1
    whole = vae.encode_images(model, images)
    latents = torch.randn_like(whole.mean)
    decoded = vae.decode_latents(model, latents)
    model.tile_bytes = tile_bytes
    tiled = vae.encode_images(model, images)
    torch.testing.assert_close(tiled.mean, whole.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiled.std, whole.std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode_latents(model, latents), decoded, rtol=1e-4, atol=1e-5)


def test_tiles_take_bounded_memory(vae_config):
    """The largest tensor that is made does not grow with the image, beyond the image itself."""
    model = vae.build_vae({**vae_config, "mid_block_add_attention": True}).eval()
    model.tile_bytes = 40_000

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.layout == torch.strided:  # not packed weights
                self.bytes = max(self.bytes, out.untyped_storage().nbytes())
            return out

    def largest(side):
        with Largest() as mode, torch.inference_mode():
            vae.decode_latents(model, torch.randn(1, model.config.latent_channels, side, side))
        return mode.bytes - 4 * 3 * (4 * side) ** 2

    assert largest(32) < 2 * model.tile_bytes > largest(64)
    model.disable_tiling()
    assert largest(32) > 4 * 2 * 40_000


def test_a_full_folder_for_temporary_files_is_named(model, monkeypatch):
    def pwrite(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    model.tile_bytes = 1
    with pytest.raises(OSError, match=tempfile.gettempdir()):
        vae.decode_latents(model, torch.zeros(1, model.config.latent_channels, 4, 4))
