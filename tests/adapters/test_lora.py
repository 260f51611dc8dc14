"""Adapters: changes are what their papers and peft say, sum without residue, and leave no trace when they go."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from ldm.adapters.factors import Full, LoHa, LoKr, LoRA
from ldm.adapters.lora import Adapter, AdapterMerger, ModuleDelta
from ldm.adapters.lora_saving import save_adapter
from ldm.jobs.worker import fingerprint_model
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request


class Net(nn.Module):
    """One layer of each kind that adapters change."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 8)
        self.plain = nn.Linear(8, 6, bias=False)
        self.point = nn.Conv2d(6, 10, 1)
        self.conv = nn.Conv2d(10, 4, 3)
        self.norm = nn.LayerNorm(4)


LAYERS = "linear", "plain", "point", "conv"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def randn():
    g = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=g)


def lora(weight, randn, rank=3):
    """Random factors for a weight, a convolution's with the kernel in `down`."""
    ones = (weight.ndim - 2) * (1,)
    return LoRA(randn(rank, *weight.shape[1:]), randn(len(weight), rank, *ones))


def adapter(name, network, randn, **changes):
    """A random LoRA of every layer, with biases."""
    targets = {
        f"unet/{layer}": ModuleDelta(lora(m.weight, randn), 1.5, bias=None if m.bias is None else randn(len(m.bias)))
        for layer in LAYERS
        for m in [network.get_submodule(layer)]
    }
    return Adapter(name, targets | changes)


def state(network):
    return {name: a.detach().clone() for name, a in network.state_dict().items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[n], a) for n, a in expected.items())


def from_peft(layer, name):
    """The change that one layer of peft's makes, in our words."""
    m = {field: getattr(layer, field)[name] for field in layer.adapter_layer_names if name in getattr(layer, field)}
    if "lora_A" in m:
        scale = m.get("lora_magnitude_vector")
        ndim = layer.get_base_layer().weight.ndim
        dora = None if scale is None else scale.weight.data.reshape(-1, *(ndim - 1) * [1])
        alpha = layer.scaling[name] * len(m["lora_A"].weight)
        return ModuleDelta(LoRA(m["lora_A"].weight.data, m["lora_B"].weight.data), alpha, dora)
    kind, prefix = (LoHa, "hada_") if "hada_w1_a" in m else (LoKr, "lokr_")
    factors = kind(**{field.removeprefix(prefix): a.data for field, a in m.items()})
    if factors.rank is None:
        factors = replace(factors, w1=factors.w1 * layer.scaling[name])
    return ModuleDelta(factors, layer.scaling[name] * (factors.rank or 1))


CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False),
    "rslora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, use_rslora=True),
    "dora": LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, use_dora=True),
    "loha": LoHaConfig(r=3, alpha=5, init_weights=False),
    "loha, tucker": LoHaConfig(r=3, alpha=5, init_weights=False, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=1, alpha=5, init_weights=False),
    "lokr, whole": LoKrConfig(r=8, alpha=5, init_weights=False),
    "lokr, both": LoKrConfig(r=1, alpha=5, init_weights=False, decompose_both=True, decompose_factor=2),
    "lokr, tucker": LoKrConfig(r=1, alpha=5, init_weights=False, use_effective_conv2d=True),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_is_peft_s(net, kind):
    base = {layer: net.get_submodule(layer).weight.detach().clone() for layer in LAYERS}
    config = CONFIGS[kind]
    config.target_modules = list(LAYERS)
    inject_adapter_in_model(config, net, "a")
    for layer in LAYERS:
        wrapped = net.get_submodule(layer)
        if kind == "dora":  # peft begins with the norm itself, where DoRA is LoRA
            wrapped.lora_magnitude_vector["a"].weight.data.mul_(torch.rand(1) + 0.5)
        delta = from_peft(wrapped, "a")
        wrapped.merge()
        torch.testing.assert_close(
            base[layer] + delta.delta_weight(base[layer]),
            wrapped.get_base_layer().weight.data,
            atol=1e-6,
            rtol=1e-6,
        )


def test_tucker_s_lora_is_three_convolutions(net, randn):
    """LoCon with a kernel between two 1x1 convolutions, by its effect on an image."""
    down, mid, up = randn(3, 10, 1, 1), randn(3, 3, 3, 3), randn(4, 3, 1, 1)
    x = randn(2, 10, 7, 7)
    y = x
    for kernel in (down, mid, up):
        y = nn.functional.conv2d(y, kernel)
    change = ModuleDelta(LoRA(down, up, mid), alpha=1.5).delta_weight(net.conv.weight)
    torch.testing.assert_close(nn.functional.conv2d(x, change), 0.5 * y, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dim", [0, 1], ids=["old: over outputs", "over inputs"])
@pytest.mark.parametrize("layer", LAYERS)
def test_dora_gives_the_weight_the_norms_that_it_holds(net, randn, layer, dim):
    """Liu et al. 2024, eq. 5: the direction of W + D, the magnitude m, one for each of the other dimension."""
    w = net.get_submodule(layer).weight.detach()
    shape = [1 if k == dim or k > 1 else n for k, n in enumerate(w.shape)]
    m = randn(*shape).abs() + 0.1
    thin = lora(w, randn)
    changed = w + ModuleDelta(thin, dora_scale=m).delta_weight(w)
    plain = w + ModuleDelta(thin).delta_weight(w)
    dims = [k for k in range(w.ndim) if k != 1 - dim]
    torch.testing.assert_close(torch.linalg.vector_norm(changed, dim=dims), m.flatten(), atol=1e-5, rtol=1e-5)
    norms = torch.linalg.vector_norm(plain, dim=dims, keepdim=True)
    torch.testing.assert_close(changed / m, plain / norms, atol=1e-5, rtol=1e-5)


def test_scale_is_alpha_over_rank_and_one_where_there_is_no_alpha(net, randn):
    thin = lora(net.linear.weight, randn, rank=4)
    whole = ModuleDelta(thin).delta_weight(net.linear.weight)
    assert torch.equal(ModuleDelta(thin, 4.0).delta_weight(net.linear.weight), whole)
    assert torch.equal(ModuleDelta(thin, 2.0).delta_weight(net.linear.weight), whole / 2)
    kron = LoKr(w1=randn(2, 3), w2=randn(4, 4))
    assert torch.equal(ModuleDelta(kron, 7.0).delta_weight(net.linear.weight), torch.kron(kron.w1, kron.w2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_the_sum_of_the_base_s_changes_rounded_once(net, randn, dtype):
    net.to(dtype)
    base = state(net)
    a, b = adapter("a", net, randn), adapter("b", net, randn)
    adapters = AdapterMerger({"unet": net})
    adapters.load(a, 0.7)
    adapters.load(b, -1.3)
    for layer in LAYERS:
        for kind in ("weight", "bias"):
            if (w := base.get(f"{layer}.{kind}")) is not None:
                da, db = (
                    d.delta_weight(w) if kind == "weight" else d.bias
                    for d in (x.deltas[f"unet/{layer}"] for x in (a, b))
                )
                expected = (w.float() + 0.7 * da + -1.3 * db).to(dtype)
                assert torch.equal(net.state_dict()[f"{layer}.{kind}"], expected)


def test_weights_set_again_and_again_are_as_if_set_once(net, randn):
    net.bfloat16()
    a, b = adapter("a", net, randn), adapter("b", net, randn)
    adapters = AdapterMerger({"unet": net})
    adapters.load(a, 0.3)
    adapters.load(b, 0.4)
    expected = state(net)
    for k in range(20):
        adapters.set_weights({"a": k / 7, "b": -k / 3})
    assert not same(state(net), expected)
    adapters.set_weights({"b": 0.4, "a": 0.3})
    assert same(state(net), expected)
    adapters.set_weights({"a": 0.3})  # b is not named
    alone = state(net)
    adapters.unload("b")
    assert same(state(net), alone)
    adapters.unload()
    adapters.load(a, 0.3)
    assert same(state(net), alone) and not same(alone, expected)


def test_dora_beside_another_adapter_changes_the_base_alone(net, randn):
    w = net.linear.weight.detach().clone()
    dora = ModuleDelta(lora(w, randn), dora_scale=randn(8, 1).abs())
    other = ModuleDelta(lora(w, randn))
    adapters = AdapterMerger({"unet": net})
    adapters.load(Adapter("other", {"unet/linear": other}))
    adapters.load(Adapter("dora", {"unet/linear": dora}), 0.5)
    torch.testing.assert_close(net.linear.weight.data, w + other.delta_weight(w) + 0.5 * dora.delta_weight(w))


def test_a_hundred_loads_and_unloads_leave_every_bit_and_no_tensor(net, randn):
    net.to(torch.bfloat16, memory_format=torch.channels_last)
    net.conv.weight.data[0, 0, 0, 0] = -0.0
    before = {name: a.view(torch.int16).clone() for name, a in state(net).items()}
    places = {name: (a.data_ptr(), a.stride()) for name, a in net.named_parameters()}
    a, b = adapter("a", net, randn), adapter("b", net, randn)
    adapters = AdapterMerger({"unet": net})

    def live():
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    count = live()
    for k in range(100):
        adapters.load(a, 0.1 * k)
        adapters.load(b)
        adapters.unload("a" if k % 2 else None)
        adapters.unload()
    assert {name: (p.data_ptr(), p.stride()) for name, p in net.named_parameters()} == places
    assert all(torch.equal(a.view(torch.int16), before[name]) for name, a in state(net).items())
    assert live() == count and not adapters.base_weights and not adapters.loaded


def test_two_weights_are_those_of_the_unet_and_of_the_text_encoders(net, randn):
    texts = {"text_encoder": Net(), "text_encoder_2": Net()}
    networks = {"unet": net, **texts}
    before = {folder: n.linear.weight.detach().clone() for folder, n in networks.items()}
    delta = ModuleDelta(lora(net.linear.weight, randn))
    adapters = AdapterMerger(networks)
    adapters.load(Adapter("a", {f"{folder}/linear": delta for folder in networks}), (0.5, 2.0))
    for folder, network in networks.items():
        w = before[folder]
        expected = w + (0.5 if folder == "unet" else 2.0) * delta.delta_weight(w)
        torch.testing.assert_close(network.linear.weight.data, expected)


class Failing(Full):
    """A change that fits and cannot be made."""

    def unscaled_delta(self, weight):
        if not self.diff.is_meta:
            raise MemoryError
        return self.diff


def test_what_fails_half_way_changes_nothing(net, randn):
    adapters = AdapterMerger({"unet": net})
    adapters.load(adapter("a", net, randn), 0.5)
    before, base = state(net), {name: a.clone() for name, a in adapters.base_weights.items()}
    with pytest.raises(MemoryError):
        adapters.load(adapter("bad", net, randn, **{"unet/norm": ModuleDelta(Failing(randn(4)))}))
    assert same(state(net), before) and same(adapters.base_weights, base) and list(adapters.loaded) == ["a"]


def test_norms_and_biases_change_too(net, randn):
    w, b = net.norm.weight.detach().clone(), net.norm.bias.detach().clone()
    diff, bias = randn(4), randn(4)
    adapters = AdapterMerger({"unet": net})
    adapters.load(
        Adapter("a", {"unet/norm": ModuleDelta(Full(diff), bias=bias), "unet/linear": ModuleDelta(bias=randn(8))}), 0.5
    )
    torch.testing.assert_close(net.norm.weight.data, w + 0.5 * diff)
    torch.testing.assert_close(net.norm.bias.data, b + 0.5 * bias)
    assert adapters.base_weights.keys() == {"unet/norm.weight", "unet/norm.bias", "unet/linear.bias"}


ONE = torch.ones(1)
WRONG = {
    "no module": ({"unet/nothing": ModuleDelta(Full(ONE))}, "no module unet/nothing"),
    "no network": ({"text_encoder/linear": ModuleDelta(Full(ONE))}, "no module text_encoder/linear"),
    "another width": (
        {"unet/linear": ModuleDelta(LoRA(torch.ones(2, 13), torch.ones(8, 2)))},
        r"unet/linear has factors of shape \[2, 13\] and \[8, 2\], which do not fit a weight of shape \[8, 12\]",
    ),
    "two ranks": ({"unet/linear": ModuleDelta(LoRA(torch.ones(2, 12), torch.ones(8, 3)))}, "do not fit a weight"),
    "rank 0": ({"unet/linear": ModuleDelta(LoRA(torch.ones(0, 12), torch.ones(8, 0)))}, "do not fit a weight"),
    "transposed": ({"unet/linear": ModuleDelta(Full(torch.ones(12, 8)))}, "do not fit a weight"),
    "kernel": (
        {"unet/point": ModuleDelta(LoRA(torch.ones(2, 6, 3, 3), torch.ones(10, 2, 1, 1)))},
        "do not fit a weight",
    ),
    "bias": ({"unet/linear": ModuleDelta(bias=torch.ones(7))}, r"a bias of shape \[7\], expected \[8\]"),
    "no bias": ({"unet/plain": ModuleDelta(bias=torch.ones(6))}, r"a bias of shape \[6\], expected none"),
    "dora": (
        {"unet/linear": ModuleDelta(LoRA(torch.ones(2, 12), torch.ones(8, 2)), dora_scale=torch.ones(9, 1))},
        r"dora_scale of shape \[9, 1\]",
    ),
    "many": ({f"unet/x{k}": ModuleDelta(Full(ONE)) for k in range(5)}, "no module unet/x2 and 2 more"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_does_not_fit_is_named_and_changes_nothing(net, fault):
    targets, match = WRONG[fault]
    before = state(net)
    adapters = AdapterMerger({"unet": net})
    with pytest.raises(ValueError, match=match):
        adapters.load(Adapter("a", {"unet/conv": ModuleDelta(bias=torch.ones(4)), **targets}))
    assert same(state(net), before) and not adapters.loaded


def test_names_and_weights_are_checked(net, randn):
    adapters = AdapterMerger({"unet": net})
    a = adapter("a", net, randn)
    with pytest.raises(ValueError, match="adapter 'a': choose from none"):
        adapters.unload("a")
    adapters.load(a)
    with pytest.raises(ValueError, match="adapter 'a': an adapter of that name is loaded already"):
        adapters.load(a)
    with pytest.raises(ValueError, match="adapter 'b': choose from a"):
        adapters.set_weights({"b": 1.0})
    for weight in (float("nan"), float("inf"), (1.0, float("nan"))):
        with pytest.raises(ValueError, match=r"adapter 'a': weight .*: must be finite"):
            adapters.set_weights({"a": weight})


def test_a_pipeline_s_adapters_are_set_by_two_lists_and_taken_out(tiny, tmp_path):
    pipe = Pipeline.from_pretrained(tiny, device="cpu", dtype="float32")
    g = torch.Generator().manual_seed(0)
    for name in "ab":
        factors = LoRA(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))
        target = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
        save_adapter(
            Adapter(name, {target: ModuleDelta(factors)}),
            tmp_path / f"{name}.safetensors",
            "kohya",
            pipe.model.networks,
        )

    def generate():
        return pipe("two stars", num_inference_steps=2, seed=3).images[0].tobytes()

    base = generate()
    for name in "ab":
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors")
    both = generate()
    pipe.set_adapters(["b"], [0.5])
    half = generate()
    assert len({base, both, half}) == 3
    for names, weights in ((["a", "b"], [1]), ("a", [1, 1]), ("ab", [1, 1])):
        with pytest.raises(ValueError, match="must be two lists of one length"):
            pipe.set_adapters(names, weights)
    with pytest.raises(ValueError, match="adapter 'c': choose from a, b"):
        pipe.set_adapters(["c"], [1])
    pipe.set_adapters("b", 0.5)
    assert generate() == half
    request = pipe.resolve(Request("two stars"))
    one = pipe.metadata(request, "tiny"), fingerprint_model(pipe)
    pipe.set_adapters("b", [(0.5, 0.5)])
    assert generate() == half and (pipe.metadata(request, "tiny"), fingerprint_model(pipe)) == one
    pipe.set_adapters("b", [(0.0, 0.0)])
    assert generate() == base and pipe.get_active_adapters() == [] and fingerprint_model(pipe)["adapters"] == []
    texts = pipe.metadata(request, "tiny")
    assert json.loads(texts["ldm"])["adapters"] == [] and "lora" not in texts["parameters"]
    pipe.set_adapters("b", 0.5)
    pipe.unload_lora_weights("a")
    assert generate() == half and [*pipe.adapters.loaded] == ["b"]
    pipe.unload_lora_weights()
    assert generate() == base


def test_an_image_is_the_base_s_at_weight_zero_and_after(tiny):
    pipe = Pipeline.from_pretrained(tiny, device="cpu", dtype="float32")
    adapters = AdapterMerger(pipe.model.networks)
    g = torch.Generator().manual_seed(0)
    targets = {
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q": (32, 32),
        "text_encoder/text_model.encoder.layers.0.self_attn.v_proj": (32, 32),
    }
    deltas = {name: ModuleDelta(Full(torch.randn(shape, generator=g))) for name, shape in targets.items()}

    def generate():
        pipe.prompt_encoder.clear()
        return pipe("two stars", num_inference_steps=2, seed=3).images[0].tobytes()

    base = generate()
    adapters.load(Adapter("a", deltas), 0.0)
    assert generate() == base
    for weight in ((1.0, 0.0), (0.0, 1.0)):
        adapters.set_weights({"a": weight})
        assert generate() != base
    adapters.unload()
    assert generate() == base
