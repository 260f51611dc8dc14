"""Our U-Net is diffusers' UNet2DConditionModel: same files, same function, same gradients."""

import inspect
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

# isort: split
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # after the repair of torchvision
from peft import LoraConfig, inject_adapter_in_model

from ldm.checkpoints.families import FAMILIES
from ldm.conditioning import Conditioning
from ldm.nn.unet import UNSUPPORTED_UNET_FIELDS, UNet, UNetConfig

TINY = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=12,
)
EVERYWHERE: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
NOWHERE: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
CONFIGS = {
    "SD 1": TINY,
    "SD 2": replace(TINY, use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True, **EVERYWHERE),
    "picto": replace(TINY, in_channels=3, out_channels=5, layers_per_block=2, attention_head_dim=(1, 2), **EVERYWHERE),
    "fourier": replace(TINY, time_embedding_type="fourier", flip_sin_to_cos=False),
    "sine first": replace(TINY, flip_sin_to_cos=False, freq_shift=1, center_input_sample=True),
    "two layers": replace(TINY, transformer_layers_per_block=2, mid_block_type="UNetMidBlock2D"),
    "uneven": replace(TINY, transformer_layers_per_block=(1, 2), layers_per_block=(2, 1), **EVERYWHERE),
    "no attention": replace(TINY, mid_block_type="UNetMidBlock2D", **NOWHERE),
    "no middle": replace(TINY, mid_block_type=None),
    "scale and shift": replace(TINY, resnet_time_scale_shift="scale_shift", norm_eps=1e-3),
    "SDXL": replace(
        TINY,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", *2 * ("CrossAttnDownBlock2D",)),
        up_block_types=(*2 * ("CrossAttnUpBlock2D",), "UpBlock2D"),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    ),
    "SSD-1B": replace(  # pruned: a depth for each transformer, another one on the way up, none in the middle
        TINY,
        layers_per_block=2,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (2, 1)),
        reverse_transformer_layers_per_block=((1, 3, 2), (2, 1, 1)),
        **EVERYWHERE,
    ),
    "distilled": replace(TINY, time_cond_proj_dim=12),
    "three levels": replace(
        TINY,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' model with every parameter perturbed, so that none is at a value where it could be overlooked."""
    torch.manual_seed(0)
    model = UNet2DConditionModel.from_config(config.to_dict())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.05 * noise(*p.shape, seed=i)
    return model


def twin(model: UNet2DConditionModel, config: UNetConfig) -> UNet:
    unet = UNet(config)
    unet.load_state_dict(model.state_dict(), strict=True)
    return unet


def inputs(config: UNetConfig, height: int = 8, width: int = 8, rows: int = 2):
    x, text = noise(rows, config.in_channels, height, width, seed=1), noise(rows, 7, config.cross_attention_dim, seed=2)
    added = None if config.addition_embed_type is None else UNet(config).make_vector(*pooled_and_ids(rows))
    guidance = torch.linspace(1.5, 8.5, rows) if config.time_cond_proj_dim else None
    return x, torch.linspace(3.25, 999, rows), Conditioning(text, vector=added, guidance=guidance)


def pooled_and_ids(rows: int):
    """The text as one vector of 10 numbers, and SDXL's six sizes in pixels."""
    return noise(rows, 10, seed=3), torch.tensor([[1024, 769, 0, 13, 1023, 768.0]]) + torch.arange(rows)[:, None]


def call(model, x, t, cond):
    """Either implementation's output; diffusers embeds the ids itself, and its pipeline the guidance scale."""
    if isinstance(model, UNet):
        return model(x, t, cond)
    added = dict(zip(("text_embeds", "time_ids"), pooled_and_ids(len(x)), strict=True))
    embed, w = StableDiffusionPipeline.get_guidance_scale_embedding, cond.guidance
    guidance = None if w is None else embed(None, w - 1, embedding_dim=model.config.time_cond_proj_dim)
    return model(
        x, t, cond.context, timestep_cond=guidance, added_cond_kwargs=None if cond.vector is None else added
    ).sample


def output_and_gradients(model, config: UNetConfig, height: int, width: int) -> dict[str, torch.Tensor]:
    """By name: the output, and the gradients of its mean square in the input, the text and every parameter."""
    x, t, cond = inputs(config, height, width)
    x.requires_grad_(), cond.context.requires_grad_()
    y = call(model, x, t, cond)
    y.square().mean().backward()
    parameters = {name: p.grad for name, p in model.named_parameters()}
    found = {"output": y, "input": x.grad, "text": cond.context.grad, **parameters}
    return {name: a for name, a in found.items() if a is not None}


@pytest.mark.parametrize("size", [(8, 8), (6, 12), (9, 7), (5, 10)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name, size):
    config = CONFIGS[name]
    theirs = oracle(config)
    ours = twin(theirs, config)
    expected, found = (output_and_gradients(model, config, *size) for model in (theirs, ours))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(cross_attention_dim=768),
        UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        UNetConfig.from_dict(FAMILIES["sdxl"].unet),
    ],
    ids=["SD 1.5", "SD 2.1", "SDXL"],
)
def test_full_size_models_have_the_tensors_of_their_files(config):
    with torch.device("meta"):
        ours, theirs = UNet(config).state_dict(), UNet2DConditionModel.from_config(config.to_dict()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name", ["SD 1", "SD 2", "SDXL", "uneven", "no attention"])
def test_projecting_the_text_first_changes_no_bit(name):
    config = CONFIGS[name]
    unet = twin(oracle(config), config).eval()
    x, t, cond = inputs(config)
    projected = unet.compute_kv_cache(cond)
    assert unet.compute_kv_cache(projected) is projected
    assert torch.equal(unet(x, t, projected), unet(x, t, cond))


def test_projected_text_is_all_that_is_read():
    config = CONFIGS["SD 2"]
    unet = twin(oracle(config), config).eval()
    x, t, cond = inputs(config)
    projected = unet.compute_kv_cache(cond)
    wrong = Conditioning(torch.full_like(cond.context, torch.nan), projected.kv_cache)
    assert torch.equal(unet(x, t, wrong), unet(x, t, cond))


def test_pooled_text_and_time_ids_are_given_where_they_are_taken_and_nowhere_else():
    with_added, without = (twin(oracle(CONFIGS[name]), CONFIGS[name]) for name in ("SDXL", "SD 1"))
    x, t, cond = inputs(with_added.config)
    with pytest.raises(ValueError, match="needs pooled text and time ids"):
        with_added(x, t, Conditioning(cond.context))
    with pytest.raises(ValueError, match="takes no pooled text and time ids"):
        without(x, t, cond)
    with pytest.raises(ValueError, match="takes no pooled text"):
        without.make_vector(*pooled_and_ids(2))
    with pytest.raises(ValueError, match="pooled text of 9 and 6 time ids: 57 numbers, and this U-Net takes 58"):
        with_added.make_vector(pooled_and_ids(2)[0][:, 1:], pooled_and_ids(2)[1])


def test_attention_back_ends_agree():
    config = CONFIGS["picto"]
    unet = twin(oracle(config), config)
    x, t, cond = inputs(config)
    expected = unet(x, t, cond)
    unet.attention = "math"
    assert unet.attention == "math"
    torch.testing.assert_close(unet(x, t, cond), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="choose from"):
        unet.attention = "fast"
    with pytest.raises(ValueError, match="choose from"):
        UNet(config, attention="fast")


@pytest.mark.parametrize("name", ["picto", "SDXL"])
def test_rows_are_independent_and_memory_layout_is_immaterial(name):
    config = CONFIGS[name]
    unet = twin(oracle(config), config).eval()
    x, t, cond = inputs(config, rows=3)
    y = unet(x, t, cond)
    for i in range(3):
        torch.testing.assert_close(
            unet(x[i : i + 1], t[i : i + 1], cond[i : i + 1]), y[i : i + 1], atol=1e-5, rtol=1e-5
        )
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(unet(x.to(memory_format=torch.channels_last), t, cond), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["SD 1", "fourier", "SDXL"])
def test_time_is_seen_in_float32_by_a_half_precision_network(name):
    """A bfloat16 timestep or frequency near 999 would be off by whole waves; 3 % is bfloat16 everywhere else."""
    config = CONFIGS[name]
    unet = UNet(config)
    x, t, cond = inputs(config)
    features, y = unet.time_proj(t), unet(x, t, cond)
    half = unet.to(torch.bfloat16)
    assert torch.equal(half.time_proj(t), features)
    assert half(x, t, cond).dtype == torch.bfloat16
    assert (half(x, t, cond).float() - y).norm() < 0.03 * y.norm()


def test_half_precision_training_has_the_gradients_of_float32():
    """Under autocast too, where inputs, weights and products differ in dtype."""
    config = CONFIGS["picto"]
    unet = twin(oracle(config), config)
    x, t, cond = inputs(config)

    def gradients(enabled: bool) -> torch.Tensor:
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = unet(x, t, cond)
        y.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])

    exact = gradients(False)
    assert (gradients(True) - exact).norm() < 0.05 * exact.norm()


def test_adapters_fit_every_kind_of_layer():
    """peft's LoRA on linear maps and convolutions starts as the identity, and every adapter is trained."""
    config = CONFIGS["SD 1"]
    unet = twin(oracle(config), config)
    x, t, cond = inputs(config)
    expected = unet(x, t, cond)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k", "to_out.0", "proj_in", "conv1", "conv"]), unet)
    y = unet(x, t, cond)
    torch.testing.assert_close(y, expected)
    y.square().mean().backward()
    adapters = {name: p.grad for name, p in unet.named_parameters() if "lora_B" in name}
    assert len(adapters) > 20
    assert all(grad is not None and grad.norm() > 0 for grad in adapters.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_diffusers_and_json(name):
    config = CONFIGS[name]
    theirs = UNet2DConditionModel.from_config(json.loads(json.dumps(config.to_dict())))
    assert UNetConfig.from_dict(json.loads(json.dumps(dict(theirs.config)))) == config
    assert UNetConfig.from_dict(config.to_dict()) == config


def test_every_field_of_diffusers_is_ours_or_refused_unless_neutral():
    defaults = {
        n: p.default for n, p in inspect.signature(UNet2DConditionModel.__init__).parameters.items() if n != "self"
    }
    assert UNetConfig.from_dict(defaults) == UNetConfig()
    assert defaults.items() >= UNSUPPORTED_UNET_FIELDS.items()
    assert defaults.keys() == UNSUPPORTED_UNET_FIELDS.keys() | UNetConfig().to_dict().keys() - {"_class_name"}
    for name in UNSUPPORTED_UNET_FIELDS:
        with pytest.raises(ValueError, match=f"{name} = 'other'"):
            UNetConfig.from_dict({name: "other"})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep' is not supported"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type 'text_image': choose from None, text_time"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim None: text_time needs a width"),
        ({"chanels": 4}, "unknown field chanels = 4"),
        ({"_class_name": "UNet2DModel"}, "'UNet2DModel'"),
        ({"down_block_types": ["KDownBlock2D"] * 4}, "down_block_types 'KDownBlock2D': choose from"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type .*: choose from"),
        ({"time_embedding_type": "learned"}, "'learned': choose from positional, fourier"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types .*expected 4 values"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim .*expected 4 values"),
        ({"attention_head_dim": 7}, "320: not a multiple of attention_head_dim 7"),
        ({"norm_num_groups": 48}, "320: not a multiple of norm_num_groups 48"),
        ({"reverse_transformer_layers_per_block": [1]}, "reverse_transformer_layers_per_block .*expected 4 values"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(fields)
