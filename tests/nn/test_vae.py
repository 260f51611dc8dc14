"""The autoencoder: our encode and decode are diffusers', and training starts from a linear map that keeps variance."""

import pytest
import torch

from ldm.nn import vae


@pytest.fixture
def model(vae_config):
    torch.manual_seed(0)
    return vae.build_vae(vae_config).eval()


def test_encode_and_decode_are_diffusers_with_the_scaling_factor(model):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = model.encode(images).latent_dist
        posterior = vae.encode_images(model, images)
        torch.testing.assert_close(posterior.mean, 0.5 * expected.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.std, 0.5 * expected.std, rtol=0, atol=1e-5)
        pictures = vae.decode_latents(model, posterior.mean)
        torch.testing.assert_close(pictures, model.decode(expected.mean).sample, rtol=0, atol=1e-5)
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + posterior.std * noise)
    assert vae.vae_scale_factor(model) == 4


def test_configuration_round_trips(model):
    assert vae.get_vae_config(vae.build_vae(vae.get_vae_config(model))) == vae.get_vae_config(model)


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
