"""Memory and disk: what is counted from shapes is what real tensors and files take."""

import pytest
import torch
from test_audit import recipe_of

from ldm.audit import estimates
from ldm.conditioning import Conditioning
from ldm.nn.unet import UNet

BUCKET = 64, 96


def tuned(tiny, tmp_path, method="lora", **options):
    objective = {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": method, **options}
    recipe = recipe_of(tiny, tmp_path, ["p"], objective=objective, train_batch_size=6, gradient_accumulation_steps=2)
    return recipe, estimates.load_model_config(recipe)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_by_shape_are_those_of_real_tensors(tiny, tmp_path, method):
    recipe, networks = tuned(tiny, tmp_path, method)
    config = networks.spec.networks["unet"].config
    found = []
    for batch in (1, 2, 5):
        found.append(estimates.estimate_activation_bytes(recipe, networks, BUCKET, batch))
        unet = estimates.set_trainable(UNet(config), recipe.objective)
        cond = Conditioning(torch.zeros(batch, 16, config.cross_attention_dim))
        real = estimates.measure_saved_tensor_bytes(unet, torch.zeros(batch, 4, 24, 16), cond, torch.float32)
        assert found[-1] == pytest.approx(real, rel=1e-3)
    assert found[2] - found[0] == 4 * (found[1] - found[0])  # affine in the batch


def test_a_matrix_keeps_its_input_and_not_its_weight():
    class Layer(torch.nn.Linear):
        def forward(self, x, t, cond):
            return super().forward(x)

    cond = Conditioning(torch.zeros(3, 1, 1))
    assert (
        estimates.measure_saved_tensor_bytes(Layer(5, 7), torch.zeros(3, 5, requires_grad=True), cond, torch.float32)
        == 4 * 3 * 5
    )


def test_what_learns_is_counted(tiny, tmp_path, pipe):
    unet = pipe.model.unet
    _, networks = tuned(tiny, tmp_path, "full")
    assert networks.num_trainable_parameters == sum(p.numel() for p in unet.parameters())
    text = sum(p.numel() for p in pipe.model.text_encoders[0].model.parameters())
    _, both = tuned(tiny, tmp_path, "full", train_text_encoder=True)
    assert both.num_trainable_parameters == sum(p.numel() for p in unet.parameters()) + text
    attention = [m for n, m in unet.named_modules() if n.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    _, networks = tuned(tiny, tmp_path, rank=3)
    assert networks.num_trainable_parameters == 3 * sum(m.in_features + m.out_features for m in attention)
    _, words = tuned(
        tiny, tmp_path, "textual_inversion", placeholder_token="<x>", initializer_token="star", num_vectors=2
    )
    assert words.num_trainable_parameters == 2 * 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_rows_that_are_on_a_device_at_a_time(tiny, tmp_path, dtype):
    recipe, networks = tuned(tiny, tmp_path, "full", frozen_dtype=dtype)
    found = estimates.estimate_memory(recipe, networks, [(32, 32), BUCKET])
    learns = networks.num_trainable_parameters
    assert found["activations"] == estimates.estimate_activation_bytes(recipe, networks, BUCKET, 3)
    assert found["gradients"] == found["ema"] == 4 * learns and found["optimizer"] == 8 * learns
    assert found["total"] == sum(value for name, value in found.items() if name != "total")
    others = sum(p.numel() for n in ("vae", "text_encoder") for p in networks.spec.networks[n].parameters())
    assert found["frozen_weights"] == getattr(torch, dtype).itemsize * others
