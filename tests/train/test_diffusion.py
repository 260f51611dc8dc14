"""The oracle: a plain PyTorch loop of diffusers' U-Net, noise and torch's AdamW sees the same losses."""

import json
import math

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.nn.functional import mse_loss

from ldm.commands.train import create_task
from ldm.config import load_recipe
from ldm.diffusion.objective import WEIGHTINGS
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import BETA_SCHEDULES, VPSDE
from ldm.train import state
from ldm.train.trainer import train_model

STEPS, WARMUP, RATE = 50, 5, 2e-4


def batches(task):
    """What is trained on: clean latents, noise, table indices and text states, 50 times."""
    for k in range(STEPS):
        batch = task.make_batch(k, range(task.recipe.train_batch_size))
        index = (batch["t"] * 1000 - 1).round().long()
        yield task.sample_latents(batch), batch["noise"], index, task.encode_text(batch["captions"]).context.float()


def plain_losses(unet, scheduler, data):
    """The losses of the loop that every diffusers example has."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for step, (x0, noise, index, text) in enumerate(data):
        factor = min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * max(0, step - WARMUP) / (STEPS - WARMUP))) / 2
        optimizer.param_groups[0]["lr"] = RATE * factor
        noisy = scheduler.add_noise(x0, noise, index)
        loss = mse_loss(unet(noisy, index, text).sample, scheduler.get_velocity(x0, noise, index))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fifty_steps_have_the_losses_of_a_plain_loop_with_diffusers(recipe_file, tmp_path):
    changes = {"max_train_steps": STEPS, "learning_rate": RATE, "lr_warmup_steps": WARMUP, "lr_scheduler": "cosine"}
    never = {"logging_steps": 1000, "checkpointing_steps": 1000, "validation_steps": 1000}
    path = recipe_file("diffusion", mixed_precision="no", gradient_accumulation_steps=2, **changes, **never)
    recipe = load_recipe(path, ["objective.times=discrete"])
    task = create_task(recipe)
    unet = UNet2DConditionModel.from_config(task.model.config.to_dict())
    unet.load_state_dict(task.model.state_dict())
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    theirs = plain_losses(unet.train(), scheduler, batches(task))
    train_model(recipe, task)
    ours = json.loads((state.list_checkpoints(tmp_path / "run")[-1] / "state.json").read_text())["figures"]
    assert [figures["loss"] for figures in ours] == pytest.approx(theirs, abs=1e-5)
    assert theirs[-1] < 0.8 * theirs[0]


@pytest.mark.parametrize("kind, formula", [
    ("eps", lambda snr: snr.clamp(max=5) / snr),
    ("v", lambda snr: snr.clamp(max=5) / (snr + 1)),
    ("x0", lambda snr: snr.clamp(max=5)),
])  # fmt: skip
def test_min_snr_weights_are_those_of_diffusers_scripts(kind, formula):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    alphas = scheduler.alphas_cumprod.double()
    sde = VPSDE.tabulated(BETA_SCHEDULES["squaredcos_cap_v2"](0, 0, 1000))
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    weight = WEIGHTINGS["min_snr"](PREDICTIONS[kind], sde, t)
    torch.testing.assert_close(weight, formula(alphas / (1 - alphas)), rtol=1e-3, atol=0)  # their table is float32
