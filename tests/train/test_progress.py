"""What a training shows: figures, trackers, samples, and a stop that names the samples at fault."""

import json

import pytest
import torch
from accelerate import accelerator, tracking
from PIL import Image
from trainings import go, log_of, recipe_of, tensors_of

from ldm import files
from ldm.commands.train import create_task
from ldm.config import load_recipe
from ldm.train import progress
from ldm.train.progress import MetricLogger
from ldm.train.trainer import train_model


def scalars(folder, name):
    """(step, value) of a curve as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)], events.Tags()["images"]


def test_tensorboard_is_told_what_the_log_is_even_over_a_resume(recipe_file, tmp_path):
    prompts = {"validation_prompts": ["thing1", "thing2"]}
    path = recipe_file("diffusion", report_to=["tensorboard"], checkpointing_steps=2, validation_steps=3, **prompts)
    go(path, "max_train_steps=4")
    files.remove_path(tmp_path / "run" / "checkpoint-4")  # as if killed before it
    go(path)
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    curve, images = scalars(tmp_path / "run", "loss")
    assert [step for step, _ in curve] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in curve] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert images == ["samples"] and Image.open(tmp_path / "run" / "samples.png").width > 64


def test_a_tracker_that_is_not_installed_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(progress, "get_available_trackers", lambda: [])
    with pytest.warns(
        UserWarning, match=r"report_to tensorboard: not installed \(.*pip install .*\[track\].*\)"
    ) as said:
        assert progress.filter_installed_trackers(["tensorboard"]) == []
    assert len(said) == 1
    with pytest.raises(ValueError, match="report_to 'tensorbord'"):
        progress.filter_installed_trackers(["tensorbord"])


class Board:
    """A tracker of a server, as accelerate's are."""

    name, requires_logging_directory, runs = "board", False, []

    def __init__(self, project):
        self.project, self.calls = project, []
        self.runs.append(self)

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, options):
        self.options = options

    def log(self, metrics, step=None, **_):
        self.calls.append((step, "loss" in metrics))

    def log_images(self, images, step=None, **_):
        self.calls.append((step, images["samples"][0].size))

    def finish(self):
        self.calls.append("finish")


@pytest.mark.parametrize("project", [None, "zorbs"])
def test_other_trackers_get_the_project_the_recipe_metrics_and_samples(project, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "board", Board)
    monkeypatch.setattr(progress, "get_available_trackers", lambda: ["board", "tensorboard"])
    monkeypatch.setattr(accelerator, "filter_trackers", lambda names, _: names)
    monkeypatch.setattr(Board, "runs", [])
    prompts = {"validation_prompts": ["thing1"], "validation_steps": 2, "max_train_steps": 2}
    go(recipe_file("diffusion", report_to=["all"], tracker_project_name=project, **prompts))
    (run,) = Board.runs
    assert run.project == (project or "run") and run.options["learning_rate"] == 1e-3
    assert [call for call in run.calls if len(call) == 2] == [(1, True), (2, True), (2, False), run.calls[-2]]
    assert run.calls[0] == "start" and run.calls[-1] == "finish" and run.calls[-2][1][0] >= 32
    assert [step for step, _ in scalars(tmp_path / "run", "loss")[0]] == [1, 2]


def test_the_log_is_cut_where_a_resumed_training_begins(tmp_path):
    path, told = tmp_path / "log.jsonl", []
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 2.0}\n{"step": 6, "lo')
    with MetricLogger(path, 2, recipe_of(), lambda figures, step: told.append((step, figures))) as progress:
        progress.log_metrics(4, {"loss": 1.5})
    assert log_of(tmp_path) == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.5}]
    assert told[0][0] == 4 and told[0][1].keys() == {"loss", "images_per_second"}
    with MetricLogger(
        path, 0, recipe_of(), lambda figures, step: told.append((step, figures)), is_main_process=False
    ) as progress:
        progress.log_metrics(4, {"loss": 1.5})
    assert len(log_of(tmp_path)) == 2 and len(told) == 1


def test_validation_s_errors_are_those_of_means(recipe_file):
    task = create_task(load_recipe(recipe_file("diffusion")))
    said = task.validate()
    with torch.no_grad():
        losses = torch.cat([task._validation_losses(*batch) for batch in task.dataset.validation_batches()])
    losses = losses.double().unflatten(0, (8, 8))
    assert [said[f"loss_{i}"] for i in range(8)] == pytest.approx(losses.mean(0).tolist())
    assert [said[f"loss_{i}_se"] for i in range(8)] == pytest.approx((losses.std(0) / 8**0.5).tolist())
    assert said["loss"] == pytest.approx(losses.mean().item())
    assert said["loss_se"] == pytest.approx((losses.var(0) / 8).mean().div(8).sqrt().item())


def poisoned(task, rows, gradient_only):
    """The task, some samples of whose loss is not a number, or whose loss is fine and its gradient is not."""
    loss = task.compute_loss

    def bad(model, batch):
        losses, figures = loss(model, batch)
        fault = torch.tensor([visit.sample_id in rows for visit in batch["sample_keys"]])
        if gradient_only:  # sqrt has an infinite slope at 0
            nothing = (losses - losses.detach())[fault].sqrt()
            return losses.index_add(0, fault.nonzero().flatten(), nothing), figures
        return torch.where(fault, float("nan"), losses), figures

    task.compute_loss = bad
    return task


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_not_finite_stops_before_the_weights_move_and_names_the_samples(
    gradient_only, parts, recipe_file, tmp_path
):
    path = recipe_file("diffusion", lr_scheduler="constant", gradient_accumulation_steps=parts)
    recipe = load_recipe(path)
    plain = create_task(recipe)
    visit = plain.make_batch(4, range(4))["sample_keys"][2]
    task = poisoned(plain, {visit.sample_id}, gradient_only)
    with pytest.raises(
        ValueError, match=rf"step 5: .*not finite: {visit.sample_id} \(seen 0 times before\); the weights are unchanged"
    ):
        train_model(recipe, task)
    moved = {name: value.clone() for name, value in task.model.state_dict().items()}
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    del task.compute_loss
    go(path, "max_train_steps=4")
    saved = tensors_of(tmp_path / "run")
    assert all(torch.equal(saved[f"model.safetensors {name}"], value) for name, value in moved.items())


def test_figures_that_wait_are_logged_as_if_nothing_had_happened(recipe_file, tmp_path):
    go(recipe_file("autoencoder", "whole", logging_steps=4))
    go(recipe_file("autoencoder", "halves", logging_steps=4), "max_train_steps=3", "lr_scheduler=constant")
    record = json.loads((tmp_path / "halves" / "checkpoint-3" / "state.json").read_text())
    assert len(record["figures"]) == 3 and record["figures"][0].keys() == {"loss", "mse", "kl", "gradient_norm"}
