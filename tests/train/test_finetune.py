"""Tuning: what learns, what is written, and that a run which was killed ends as one that was not."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from trainings import FULL, LORA, WORD, assert_goes_on, go

from ldm.checkpoints.formats import load_checkpoint
from ldm.commands.train import create_task
from ldm.conditioning import Conditioning
from ldm.config import load_recipe
from ldm.pipeline.pipeline import Pipeline
from ldm.train.ema import EMAModel
from ldm.train.task import trainable_parameters
from ldm.train.trainer import train_model


@pytest.mark.parametrize("method", [FULL, LORA, {**LORA, "dora": True}, WORD], ids=["full", "lora", "dora", "word"])
def test_a_killed_tuning_ends_with_the_bits_of_one_that_was_not(method, tuning, tmp_path):
    assert_goes_on(lambda folder: tuning(folder, **method), tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_an_exported_adapter_is_what_was_learnt_in_ours_and_in_diffusers(dora, tuning, tiny, tmp_path):
    recipe = load_recipe(tuning(**{**LORA, "train_text_encoder": False, "frozen_dtype": "float32", "dora": dora}))
    task = create_task(recipe)
    names = list(trainable_parameters(task.model))
    assert names and all(".lora_" in name for name in names)
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in trainable_parameters(task.model).items():
        if "magnitude" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=drawn)
    task.method.export(task.full_model, task.objective, tmp_path / "out", {})
    x, text, t = (torch.randn(shape, generator=drawn) for shape in ((1, 4, 8, 8), (1, 16, 32), (1,)))
    t = t.abs() * 100
    with torch.no_grad():
        learnt = task.model(x, t, Conditioning(text))
        plain = Pipeline.from_pretrained(tiny, device="cpu")
        base = plain.model.unet(x, t, Conditioning(text))
        assert (learnt - base).abs().max() > 1e-2
        for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
            plain.load_lora_weights(tmp_path / "out" / file)
            torch.testing.assert_close(plain.model.unet(x, t, Conditioning(text)), learnt, rtol=1e-4, atol=1e-4)
            plain.unload_lora_weights()
        twin = UNet2DConditionModel.from_pretrained(tiny / "unet", torch_dtype=torch.float32).eval()
        twin.load_lora_adapter(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"), prefix="unet")
        torch.testing.assert_close(twin(x, t, text).sample, learnt, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_averages_hold_what_is_trained(tuning, tiny):
    task = create_task(load_recipe(tuning(**LORA, frozen_dtype="float32")))
    x, text, t = torch.ones(1, 4, 8, 8), torch.ones(1, 16, 32), torch.tensor([500.0])
    with torch.no_grad():
        base = load_checkpoint(tiny, torch.device("cpu"), torch.float32).unet(x, t, Conditioning(text))
        assert torch.equal(task.model(x, t, Conditioning(text)), base)
    ema, weights = EMAModel(task.model, lambda step: 0.5), trainable_parameters(task.model)
    assert ema.tensors.keys() == weights.keys() and all(".lora_" in name for name in weights)
    before = {name: value.clone() for name, value in weights.items()}
    for value in ema.tensors.values():
        value.fill_(0.25)
    with ema.applied_to(task.model):
        assert all((value == 0.25).all() for value in weights.values()) and not task.full_model.unet.training
        assert (task.model(x, t, Conditioning(text)) - base).abs().max() > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in weights.items())


def test_a_word_that_was_learnt_is_what_a_pipeline_reads(tuning, tmp_path):
    export = go(tuning(**WORD))
    pipe = create_task(load_recipe(tuning(**WORD))).method.load_pipeline(load_recipe(tuning(**WORD)).objective, export)
    ema = load_file(tmp_path / "run" / "checkpoint-6" / "ema.safetensors")
    (vectors,) = ema.values()
    assert torch.equal(pipe.prompt_encoder.embeddings["zorb"].vectors[0], vectors) and len(vectors) == 2
    assert list(ema) == ["text_encoder.text_model.embeddings.token_embedding.vectors"]


def test_the_prior_counts_by_its_weight_however_many_images_it_has(tuning):
    prior = {"prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3, "prior_loss_weight": 0.5}
    task = create_task(load_recipe(tuning(**LORA, **prior)))
    own = torch.tensor([not sample.key.startswith("2:") for sample in task.dataset.images.samples])
    assert own.sum() == 10 and (~own).sum() == 3
    assert task.dataset.loss_weights[own].sum() == 10 and task.dataset.loss_weights[~own].sum() == 0.5 * 10
    assert {s.caption for s in task.dataset.images.samples if s.key.startswith("2:")} == {"a cat"}


@pytest.mark.parametrize(
    "objective, said",
    [
        ({"method": "textual_inversion"}, "initializer_token is needed"),
        ({"prior_preservation": True}, "class_prompt is needed"),
        ({**WORD, "train_text_encoder": True}, "textual inversion trains the embeddings of one token"),
        ({"targets": ["everything"]}, "targets 'everything': choose from attention"),
        ({**WORD, "placeholder_token": "glorb"}, "no caption has it"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_words(objective, said, tuning):
    with pytest.raises(ValueError, match=said):
        create_task(load_recipe(tuning(**objective)))


@pytest.mark.parametrize("method", [FULL, LORA, {**LORA, "dora": True}, WORD], ids=["full", "lora", "dora", "word"])
def test_weights_are_published_before_any_sample_of_them_is_generated(method, tuning, tmp_path, monkeypatch):
    """A process that is killed for its memory while it samples has published; no two models are in memory at a time."""
    alive, load = [], Pipeline.from_pretrained.__func__
    nbytes = lambda task: sum(p.nbytes for p in task.model.parameters() if not p.is_meta)
    task = create_task(load_recipe(tuning(**method)))

    def from_pretrained(cls, *words, **options):
        alive.append([nbytes(task), *(p.model.unet.conv_in.weight.is_meta for p in pipes)])
        pipes.append(load(cls, *words, **options))
        return pipes[-1]

    def generate(pipe, requests):
        if len(pipes) == 2:
            raise MemoryError
        return [Image.new("RGB", (32, 32)) for _ in requests]

    pipes = []
    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(task, "generate_samples", lambda: None)
    monkeypatch.setattr(Pipeline, "generate", generate)
    with pytest.raises(MemoryError):
        train_model(task.recipe, task)
    export = tmp_path / "run" / "export"
    assert [*export.rglob("*.safetensors")] and "before" not in (export / "README.md").read_text()
    assert alive == [[0], [0, True]]


def test_without_validation_prompts_no_model_is_loaded_for_samples(tuning, monkeypatch):
    export = go(tuning(**LORA, changes={"validation_prompts": []}))
    assert not [*export.glob("*.png")] and "## Images" in (export / "README.md").read_text()
    shown = go(tuning(**LORA))
    assert {path.name for path in shown.glob("*.png")} == {"before.png", "after.png"}
    assert "![after](after.png)" in (shown / "README.md").read_text()


def test_a_folder_of_the_class_is_used_and_what_lacks_is_generated(tuning, tmp_path):
    (tmp_path / "cats").mkdir()
    for k in range(2):
        Image.new("RGB", (32, 32), (90 * k, 50, 9)).save(tmp_path / "cats" / f"{k}.png")
    prior = {"prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3}
    task = create_task(load_recipe(tuning(**LORA, **prior, class_data_dir=str(tmp_path / "cats"))))
    added = [s for s in task.dataset.images.samples if s.key.startswith("2:")]
    assert [s.key for s in added] == ["2:0000.png", "2:own-0000.png", "2:own-0001.png"]
    assert {s.caption for s in added} == {"a cat"}
    with pytest.raises(ValueError, match=r"class_data_dir .*: no such folder"):
        create_task(load_recipe(tuning(**LORA, **prior, class_data_dir=str(tmp_path / "dogs"))))
