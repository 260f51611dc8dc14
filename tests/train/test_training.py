"""Training: the laws of the loop, and that each task learns from what its recipe says."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainings import ROOT, go

from ldm.commands.train import create_task, load_checked_recipe
from ldm.config import load_recipe
from ldm.data.batch_sampler import SampleKey
from ldm.nn.text_encoders import tokenize_captions
from ldm.picto.autoencoder import image_gradient_loss
from ldm.picto.clip import contrastive_targets
from ldm.picto.diffusion import shuffle_sample_keys
from ldm.pipeline.pipeline import Pipeline


def test_the_exported_folder_is_a_model(recipe_file):
    folder = go(recipe_file("diffusion"))
    assert Pipeline.from_pretrained(folder, device="cpu")("thing1", num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("dropout, dropped", [(0.0, 0), (1.0, 64), (0.25, None)])
def test_captions_are_dropped_as_often_as_the_recipe_says(dropout, dropped, recipe_file):
    recipe = load_recipe(recipe_file("diffusion"), [f"objective.caption_dropout={dropout}", "train_batch_size=64"])
    task = create_task(recipe)
    batch = task.make_batch(0, range(64))
    tokenizer, (ids,) = task.full_model.text_encoders[0].tokenizer, batch["captions"].token_ids
    empty = (ids == tokenize_captions(tokenizer, [""])[0]).all(1)
    assert torch.equal(batch["captions"].nonempty, (~empty).float())
    assert empty.sum() == dropped if dropped is not None else 8 <= empty.sum() <= 26
    captions = [task.dataset.train.captions[key.sample_id] for key in batch["sample_keys"]]
    assert torch.equal(ids[~empty], tokenize_captions(tokenizer, captions)[~empty])


def test_every_latent_is_visited_once_an_epoch_in_an_order_of_its_own():
    epochs = [shuffle_sample_keys(50, 3, 50 * k, 50) for k in range(3)]
    for k, epoch in enumerate(epochs):
        assert sorted(epoch) == [SampleKey(i, k) for i in range(50)]
    orders = [[visit.sample_id for visit in epoch] for epoch in [*epochs, shuffle_sample_keys(50, 4, 0, 50)]]
    assert orders[0] != orders[1] and orders[0] != orders[3]
    assert shuffle_sample_keys(50, 3, 40, 20) == epochs[0][40:] + epochs[1][:10]


def test_equal_captions_are_positives_of_one_another():
    target = contrastive_targets({"same": np.array([1, 2, 1])})
    assert target.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]


def test_edges_measure_differences_and_nothing_else():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert image_gradient_loss(torch.cat([ramp + 5, 2 * ramp]), num_scales=1).tolist() == pytest.approx([1, 2])
    assert image_gradient_loss(ramp, num_scales=2) == pytest.approx((1 + 2) / 2)
    assert image_gradient_loss(torch.full((1, 1, 8, 8), 3.0)) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    load_recipe(path)


@pytest.mark.parametrize(
    "override, said",
    [
        ("learning_rat=1", "learning_rat: unknown option; did you mean 'learning_rate'"),
        ("objective.kl_wait=1", "objective.kl_wait: unknown option; did you mean 'kl_weight'"),
        ("max_train_steps=0", "max_train_steps or num_train_epochs is needed"),
        ("seed=!!bool foo", "--set seed=!!bool foo: a value is not of its tag's type"),
        ("seed=!!timestamp foo", "--set seed=!!timestamp foo: a value is not of its tag's type"),
        ("seed=!!int ''", "--set seed=!!int '': a value is not of its tag's type"),
        ("seed=!!float x", "--set seed=!!float x: "),
        ("seed=" + 5000 * "[", "nested too deeply"),
        ("seed=18446744073709551616", "seed: Input should be less than"),
        ("learning_rate=.inf", "learning_rate: Input should be a finite number"),
        ("validation_guidance=.nan", "validation_guidance: Input should be "),
        ("validation_guidance=1e4", "validation_guidance: Input should be less than or equal to 1000"),
        ("ema_decay=1", "ema_decay"),
        ("objective.kind=gan", "objective"),
        ("seed", "expected key.path=value"),
        ("seed=-1", "seed: Input should be greater"),
        ("seed=[", "--set seed=\\["),
        ("max_train_steps.x=1", "'max_train_steps' is not a group"),
    ],
)
def test_a_wrong_option_is_named(override, said, recipe_file):
    path = recipe_file("autoencoder")
    with pytest.raises(ValueError, match=said.replace("?", r"\?")) as error:
        load_recipe(path, [override])
    assert "\n" not in str(error.value)


def test_yaml_refuses_a_repeated_key_and_reads_1e_4_as_a_number(tmp_path, recipe_file):
    text = recipe_file("autoencoder").read_text()
    path = tmp_path / "x.yaml"
    path.write_text(text.replace("learning_rate: 0.001", "learning_rate: 1e-4"))
    assert math.isclose(load_recipe(path).learning_rate, 1e-4)
    path.write_text(text + "\nlearning_rate: 2\n")
    with pytest.raises(ValueError, match="'learning_rate' is given twice"):
        load_recipe(path)


def test_no_precision_is_a_word_and_elsewhere_a_truth_value(tmp_path, recipe_file):
    path = recipe_file("autoencoder")
    assert load_recipe(path, ["mixed_precision=no"]).mixed_precision == "no"
    path.write_text(path.read_text() + "\nmixed_precision: no\n")
    assert load_recipe(path).mixed_precision == "no"
    assert load_recipe(path, ["optimizer_options.amsgrad=no"]).optimizer_options == {"amsgrad": False}
    shown = load_recipe(
        ROOT / "configs" / "tune-lora.yaml", ["data.random_flip=yes", "data.center_crop=False"]
    ).image_data
    assert shown.random_flip is True and shown.center_crop is False


def test_a_training_begins_with_the_unet_of_a_folder(recipe_file, tiny):
    task = create_task(
        load_recipe(recipe_file("diffusion"), [f"objective.unet={tiny / 'unet'}", "objective.attention=math"])
    )
    assert task.model.attention == "math"
    for name, tensor in load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(task.model.state_dict()[name], tensor.float()), name


def test_offset_and_perturbation_are_noise_of_their_own_of_the_stated_deviation(recipe_file):
    path = recipe_file("diffusion", train_batch_size=64)
    plain = create_task(load_recipe(path)).make_batch(0, range(64))
    task = create_task(load_recipe(path, ["objective.noise_offset=0.3", "objective.input_perturbation=0.2"]))
    batch = task.make_batch(0, range(64))
    offset = batch["noise"] - plain["noise"]
    assert offset.flatten(2).std(2).max() < 1e-6 and offset[:, :, 0, 0].std() == pytest.approx(0.3, rel=0.15)
    x0 = task.sample_latents(batch)
    assert torch.equal(x0, task.sample_latents(plain)) and torch.equal(batch["t"], plain["t"])
    assert batch["perturbation"].std() == pytest.approx(0.2, rel=0.03)
    draws = [batch["perturbation"], plain["noise"], x0 - x0.mean(0)]
    correlations = torch.corrcoef(torch.stack([values.flatten() for values in draws]))
    assert (correlations - torch.eye(3)).abs().max() < 0.05


def test_zero_terminal_snr_is_trained_and_exported(recipe_file):
    path = recipe_file("diffusion")
    task = create_task(load_recipe(path, ["objective.rescale_betas_zero_snr=true"]))
    assert task.full_model.sde.level(1.0).alpha == 0 < create_task(load_recipe(path)).full_model.sde.level(1.0).alpha
    folder = go(path, "objective.rescale_betas_zero_snr=true")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["rescale_betas_zero_snr"] is True
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        create_task(load_recipe(path, ["objective.rescale_betas_zero_snr=true", "objective.prediction=eps"]))


@pytest.mark.parametrize(
    "typed, meant",
    [
        ({"optimizer": "AdamW"}, {"optimizer": "adamw"}),
        ({"optimizer": "AdamW8bit"}, {"optimizer": "adamw8bit"}),
        ({"optimizer": "Prodigy"}, {"optimizer": "prodigy"}),
        ({"optimizer": "Lion"}, {"optimizer": "lion"}),
        ({"lr_scheduler": "Cosine_With_Restarts"}, {"lr_scheduler": "cosine_with_restarts"}),
        ({"lr_scheduler": "constant-with-warmup"}, {"lr_scheduler": "constant_with_warmup"}),
        ({"resolution": "64,64"}, {"data.resolution": 64}),
        ({"resolution": [64, 64]}, {"data.resolution": 64}),
        ({"resolution": "512x768"}, {"data.resolution": 628}),
        ({"resolution": "64"}, {"data.resolution": 64}),
        ({"snr_gamma": 5.0, "rank": 3}, {"objective.snr_gamma": 5.0, "objective.rank": 3}),
        ({"random_flip": True}, {"data.random_flip": True}),
        ({"num_train_epochs": 2}, {"num_train_epochs": 2}),
    ],
)
def test_names_and_places_that_people_type(typed, meant, tmp_path):
    values = yaml.safe_load((ROOT / "configs" / "tune-lora.yaml").read_text())
    for name in typed:
        values.pop(name, None), values["objective"].pop(name, None), values["data"].pop(name, None)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, **typed}))
    recipe = load_recipe(path).model_dump()
    flat = {**recipe, **{f"{group}.{k}": v for group in ("objective", "data") for k, v in recipe[group].items()}}
    assert {name: flat[name] for name in meant} == meant


@pytest.mark.parametrize(
    "override, said",
    [
        ("lr_scheduler=yes_", "lr_scheduler 'yes_': choose from constant"),
        ("optimizer=adamx", "optimizer 'adamx': choose from adamw"),
        ("optimizer_options.x=1", "optimizer_options of adamw"),
        ("objective.weighting=x", "weighting 'x': choose from"),
        ("objective.times=x", "times 'x': choose from"),
        ("objective.attention=x", "attention 'x': choose from"),
        ("data.resolution=100000000", "data.resolution: Input should be less than or equal to 16384"),
        ("data.max_bucket_reso=10000000000", "data.max_bucket_reso: Input should be less"),
        ("objective.snr_gamma=-1", "objective.snr_gamma: Input should be greater than 0"),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_a_name_that_is_not_known_is_refused_before_anything_is_written(
    command, override, said, tuning, tmp_path, refused
):
    path = tuning()
    before = {*tmp_path.rglob("*")}
    refused(command, path, "--set", override, said=said)
    assert {*tmp_path.rglob("*")} == before


def test_epochs_are_steps_over_the_samples_and_max_train_steps_overrides_them(tuning):
    path = tuning(changes={"num_train_epochs": 3, "max_train_steps": 0})
    assert load_checked_recipe(path, []).max_train_steps == 8  # 30 uses of ten images, in batches of four
    assert load_checked_recipe(path, ["max_train_steps=5"]).max_train_steps == 5
    prior = {"prior_preservation": True, "class_prompt": "a cat", "num_class_images": 6}
    path = tuning(changes={"num_train_epochs": 3, "max_train_steps": 0}, **prior)
    assert load_checked_recipe(path, []).max_train_steps == 12
