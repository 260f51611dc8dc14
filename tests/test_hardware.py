"""The number format that pays: asked of the hardware, not assumed."""

from pathlib import Path

import pytest
import torch

from ldm import hardware
from ldm.config import load_recipe
from ldm.train import state

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "found, dtype, name",
    [
        ({"amx_bf16": True, "avx2": True}, torch.bfloat16, "bf16"),
        ({"avx512_bf16": True}, torch.bfloat16, "bf16"),
        ({"bf16": True, "neon": True}, torch.bfloat16, "bf16"),
        ({"avx2": True, "avx512_f": True, "amx_bf16": False}, torch.float32, "no"),
        ({}, torch.float32, "no"),
    ],
)
def test_auto_is_bfloat16_only_where_the_cpu_multiplies_it(found, dtype, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert hardware.resolve_frozen_dtype("auto", CPU) == dtype
    assert hardware.resolve_mixed_precision("auto", CPU) == name
    with hardware.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_what_a_recipe_asks_for_by_name_is_taken():
    assert hardware.resolve_frozen_dtype("bfloat16", CPU) == torch.bfloat16
    assert [hardware.resolve_mixed_precision(name, CPU) for name in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]


@pytest.mark.parametrize("found, dtype, name", [({"amx_bf16": True}, "bfloat16", "bf16"), ({}, "float32", "no")])
def test_a_checkpoint_says_what_auto_meant_so_that_another_machine_cannot_go_on_otherwise(
    found, dtype, name, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    recipe = load_recipe(ROOT / "configs" / "tune-lora.yaml")
    assert recipe.mixed_precision == recipe.objective.frozen_dtype == "auto"
    resolved = state.resolve_recipe(recipe, CPU)
    assert state.select_immutable_options(resolved)["objective.frozen_dtype"] == dtype
    assert resolved.mixed_precision == name
