"""The tables of `ldm.pipeline.compat` hold all that diffusers' pipelines have; what a pipeline of ours does anyway."""

import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch

from ldm import compat
from ldm.adapters.factors import LoRA
from ldm.adapters.lora import Adapter, ModuleDelta
from ldm.adapters.lora_saving import save_adapter
from ldm.checkpoints import hub
from ldm.pipeline.arguments import ARGUMENTS
from ldm.pipeline.compat import CALL, METHODS, POSITIONAL, Automatic, say_once
from ldm.pipeline.pipeline import Pipeline

FEW = {"num_inference_steps": 2}
THEIRS = {name: getattr(diffusers, name) for name in compat.TASKS if not name.startswith("Auto")}


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


@pytest.mark.parametrize("name", THEIRS)
def test_the_arguments_of_a_call_are_diffusers_in_their_order(name):
    _, _, *arguments = inspect.signature(THEIRS[name].__call__).parameters
    order = POSITIONAL[f"{compat.TASKS[name]}{' xl' * ('XL' in name)}"].split()
    assert arguments[: len(order)] == order
    assert {*arguments} - {"kwargs"} <= CALL.keys() | ARGUMENTS


@pytest.mark.parametrize("name", THEIRS)
def test_every_method_of_diffusers_is_known(name, pipe):
    ours = getattr(compat, name).from_pipe(pipe)
    names = [method for method in dir(THEIRS[name]) if not method.startswith("_")]
    assert [method for method in names if method not in METHODS and not hasattr(ours, method)] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_effect_says_so_once_and_another_names_its_replacement(pipe, name):
    rule = METHODS[name]
    if not isinstance(rule, Automatic):
        with pytest.raises(AttributeError, match="write "):
            getattr(pipe, name)
        return
    say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert getattr(pipe, name)() is None
    assert len(said) == bool(rule.reason)


def test_numbers_and_images_after_the_prompt_are_diffusers_arguments(pipe):
    assert pipe("a", 48, 40, 2).images[0].size == (40, 48)
    image = pipe("a", seed=3, **FEW).images[0]
    assert difference(pipe("a", image, 0.5, 2).images[0], pipe("a", image=image, strength=0.5, **FEW).images[0]) == 0
    assert (
        difference(pipe("a", "b", 1, 3, **FEW).images[0], pipe("a", negative_prompt="b", seed=3, **FEW).images[0]) == 0
    )


def test_a_pipeline_of_ours_keeps_its_own_defaults(pipe):
    """The seed 0, and a guidance scale of 0 as the unconditional model; diffusers' classes differ in both."""
    assert pipe("a", **FEW).seeds == [0]
    theirs = compat.DiffusionPipeline.from_pipe(pipe)
    ours = pipe("a cat", seed=1, guidance_scale=0.0, **FEW).images[0]
    empty = pipe("", seed=1, guidance_scale=1.0, **FEW).images[0]
    assert difference(ours, empty) <= 1
    none = theirs("a cat", seed=1, guidance_scale=0.0, **FEW).images[0]
    assert difference(none, pipe("a cat", seed=1, guidance_scale=1.0, **FEW).images[0]) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_images_of_generators_are_the_same_in_any_batch(pipe, batch_size):
    one = Pipeline(pipe.model, batch_size)(["a", "two stars"], generator=torch.Generator().manual_seed(3), **FEW).images
    list_of_two = [torch.Generator().manual_seed(k) for k in (3, 4)]
    two = Pipeline(pipe.model, batch_size)(["a", "two stars"], generator=list_of_two, **FEW).images
    wanted = pipe(["a", "two stars"], generator=torch.Generator().manual_seed(3), **FEW).images
    assert max(difference(a, b) for a, b in zip(one, wanted, strict=True)) <= 1
    assert (
        max(
            difference(a, pipe(p, seed=k, **FEW).images[0])
            for a, p, k in zip(two, ["a", "two stars"], (3, 4), strict=True)
        )
        <= 1
    )


def test_a_generator_that_has_drawn_gives_another_image(pipe):
    generator = torch.Generator().manual_seed(3)
    first, second = (pipe("a", generator=generator, **FEW) for _ in range(2))
    assert first.seeds == [3] and second.seeds != [3] and difference(first.images[0], second.images[0]) > 1


def test_what_is_saved_has_its_adapters_fused(tiny, tmp_path):
    pipe = Pipeline.from_pretrained(tiny, device="cpu", dtype="float32")
    g = torch.Generator().manual_seed(0)
    factors = LoRA(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))
    target = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    file = tmp_path / "a.safetensors"
    save_adapter(Adapter("a", {target: ModuleDelta(factors)}), file, "kohya", pipe.model.networks)
    plain = pipe("two stars", seed=3, **FEW).images[0]
    pipe.load_lora_weights(file, "mine")
    adapted = pipe("two stars", seed=3, **FEW).images[0]
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/own.txt").write_text("stays")
    pipe.save_pretrained(tmp_path / "saved")
    again = Pipeline.from_pretrained(tmp_path / "saved", device="cpu", dtype="float32")
    assert difference(again("two stars", seed=3, **FEW).images[0], adapted) <= 1 < difference(plain, adapted)
    assert (tmp_path / "saved/own.txt").read_text() == "stays"


def test_a_model_is_pushed_whole(pipe, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            pushed.update(repo_id=repo_id, private=private)

        def upload_folder(self, folder_path, repo_id, commit_message):
            pushed["files"] = sorted(p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*.json"))
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert pipe.push_to_hub("me/mine", private=True, token="t") == "https://huggingface.co/me/mine"
    assert pushed["repo_id"] == "me/mine" and pushed["private"] and "model_index.json" in pushed["files"]
    assert "unet/config.json" in pushed["files"] and "scheduler/scheduler_config.json" in pushed["files"]


def test_a_progress_bar_is_shown_on_a_terminal_and_can_be_turned_off(pipe, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    pipe("a", **FEW)
    assert "100%" in capsys.readouterr().err
    pipe("a", progress_bar=False, **FEW)
    ours = Pipeline(pipe.model)
    ours.set_progress_bar_config(disable=True)
    ours("a", **FEW)
    assert capsys.readouterr().err == ""
