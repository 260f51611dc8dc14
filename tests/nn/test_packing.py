"""Packed weights: the same numbers, memory freed, and plain again for whoever reads or changes them."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.nn import packing
from ldm.nn.packing import Conv2d, Linear, PackableModule

KINDS = {
    "3x3": (lambda: Conv2d(8, 24, 3, padding=1), (2, 8, 9, 7)),
    "strided": (lambda: Conv2d(8, 24, 3, stride=2, padding=1), (2, 8, 9, 7)),
    "unpadded": (lambda: Conv2d(8, 24, 3, stride=2), (2, 8, 9, 7)),
    "1x1": (lambda: Conv2d(8, 24, 1), (2, 8, 9, 7)),
    "linear": (lambda: Linear(256, 512), (2, 9, 256)),
    "without bias": (lambda: Linear(256, 512, bias=False), (3, 256)),
}
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if not packing.packing_unavailable_reason(dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this build of torch packs no weights")


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[PackableModule, Tensor]:
    build, shape = KINDS[kind]
    torch.manual_seed(0)
    module, x = build(), torch.randn(shape).to(dtype)
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return module.to(dtype, memory_format=layout), x.contiguous(memory_format=layout)


def plain_output(module: PackableModule, x: Tensor) -> Tensor:
    with torch.enable_grad():  # where nothing is packed
        return module(x).detach()


@torch.no_grad()
def pack(module: PackableModule, x: Tensor) -> Tensor:
    y = module(x)
    assert module._packed is not None
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_plain_for_every_shape_and_each_row_is_the_same_in_any_batch(kind: str, dtype: torch.dtype):
    module, x = make(kind, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for rows in (x, torch.cat([x] * 3), x[:1], x.repeat(1, *[1] * (x.ndim - 2), 2) if x.ndim == 4 else x):
        expected = plain_output(module, rows)
        torch.testing.assert_close(pack(module, rows), expected, rtol=tolerance, atol=tolerance)
    many = torch.cat([x] * 3)
    if many[0].numel() > 256:  # a single row is another product than several
        assert torch.equal(pack(module, many)[:2], pack(module, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_weight_is_freed_and_comes_back_bit_for_bit_for_every_reader(kind: str, dtype: torch.dtype):
    module, x = make(kind, dtype)
    before, stride, names = module.weight.detach().clone(), module.weight.stride(), list(module.state_dict())
    y, gone = pack(module, x), weakref.ref(module.weight)
    readers = {
        "weight": lambda: module.weight,
        "parameters": lambda: next(module.parameters()),
        "state_dict": lambda: module.state_dict()["weight"],
        "get_parameter": lambda: module.get_parameter("weight"),
        "deepcopy": lambda: copy.deepcopy(module).weight,
        "pickle": lambda: pickle.loads(pickle.dumps(module)).weight,
        "functional": lambda: dict(module.named_parameters())["weight"],
        "to": lambda: module.to("cpu").weight,
        "in a network": lambda: nn.Sequential(module).state_dict()["0.weight"],
    }
    for name, read in readers.items():
        assert torch.equal(pack(module, x), y)
        assert gone() is None, f"{name}: the plain weight is still in memory"
        weight = read()
        assert torch.equal(weight, before) and weight.stride() == stride and weight.dtype == dtype, name
        assert module._packed is None and list(module.state_dict()) == names, name
        del weight
        gone = weakref.ref(module.weight)


def test_a_weight_that_is_held_stays_plain_and_its_changes_count():
    module, x = make("3x3")
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with torch.inference_mode():
        first = module(x)
    module(x).square().mean().backward()
    optimizer.step()
    with torch.inference_mode():
        assert not torch.equal(module(x), first)
        assert module._packed is None
    del optimizer
    with torch.no_grad():
        module(x)
    assert module._packed is None and module.weight.grad is not None, "a gradient was lost"


@pytest.mark.parametrize("kind", ["3x3", "1x1", "linear"])
@pytest.mark.parametrize("how", ["copy_", "data", "assign", "load_state_dict"])
def test_every_change_of_the_weight_is_seen(kind: str, how: str):
    module, x = make(kind)
    pack(module, x)
    new = torch.randn_like(module.weight)
    changes = {
        "copy_": lambda: module.weight.copy_(new),
        "data": lambda: setattr(module.weight, "data", new.clone()),
        "assign": lambda: setattr(module, "weight", nn.Parameter(new.clone())),
        "load_state_dict": lambda: module.load_state_dict({**module.state_dict(), "weight": new}),
    }
    with torch.no_grad():
        pack(module, x)
        changes[how]()
        expected = F.linear(x, new, module.bias) if kind == "linear" else module._conv_forward(x, new, module.bias)
    torch.testing.assert_close(pack(module, x), expected, rtol=1e-5, atol=1e-5)


def test_it_trains_as_before_after_inference():
    module, x = make("3x3")
    module.weight.requires_grad_(False)
    with torch.inference_mode():
        module(x)
    assert module._packed is not None and not module.weight.requires_grad
    module.weight.requires_grad_(True)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    reference = F.conv2d(x, (w := module.weight.detach().clone().requires_grad_()), module.bias, padding=1)
    reference.sum().backward()
    assert torch.equal(module.weight.grad, w.grad)


def test_dtype_device_autocast_and_fake_tensors():
    module, x = make("3x3")
    pack(module, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    pack(module, x)
    with pytest.raises(RuntimeError), torch.no_grad():
        module(x.double())
    pack(module, x)
    assert module.to(torch.float64).weight.dtype == torch.float64
    with torch.no_grad():
        assert module(x.double()).dtype == torch.float64
    assert module.to("meta", torch.float32).weight.is_meta
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = module.to_empty(device="cpu")
        assert fake(torch.zeros(2, 8, 9, 7)).shape == (2, 24, 9, 7)


def test_torch_compile_takes_a_network_that_was_packed():
    module, x = make("3x3")
    y = pack(module, x)
    compiled = torch.compile(nn.Sequential(module), backend="eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), y, rtol=1e-5, atol=1e-5)


def test_threads_may_read_a_weight_while_others_compute_with_it():
    module, x = make("3x3")
    y, wrong = pack(module, x), []

    def run(read: bool) -> None:
        for _ in range(100):
            with torch.inference_mode():
                wrong.extend([1] * (not torch.allclose(module(x), y, atol=1e-5)))
            if read:
                wrong.extend([1] * (module.weight.shape != (24, 8, 3, 3)))

    threads = [threading.Thread(target=run, args=(k % 2 == 0,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_where_nothing_can_be_packed_all_stays_plain(monkeypatch: pytest.MonkeyPatch):
    module, x = make("3x3")
    monkeypatch.setattr(packing, "packing_unavailable_reason", lambda dtype: "no oneDNN")
    with torch.no_grad():
        assert torch.equal(module(x), plain_output(module, x)) and module._packed is None
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad():
        module(x)
        assert module._packed is None
