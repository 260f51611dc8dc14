"""A folder's own scheduler_config.json gives diffusers' timesteps and images; the script measures all."""

import importlib.util
from pathlib import Path

import pytest

from ldm import Pipeline
from ldm.checkpoints.formats import PICTO_PATH
from ldm.files import read_json

SCRIPT = Path(__file__).parents[2] / "scripts" / "scheduler_equality.py"
SPEC = importlib.util.spec_from_file_location("scheduler_equality", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.fixture(scope="module")
def picto():
    return Pipeline.from_pretrained(PICTO_PATH)


@pytest.mark.parametrize(
    "solver, spacing",
    [
        ("DPM++ 2M", "linspace"),
        ("DPM++ 3M", "leading"),
        ("DPM++ 3M", "trailing"),
        ("UniPC-3", "linspace"),
        ("PNDM of SD 1.x", "leading"),
        ("PNDM", "leading"),
        ("DDIM of SD 1.x", "leading"),
        ("DEIS-2", "linspace"),
        ("singlestep 2", "linspace"),
    ],
)
def test_images_of_picto_are_diffusers_within_1_of_255(picto, solver, spacing):
    config = read_json(PICTO_PATH / "scheduler" / "scheduler_config.json") | {"timestep_spacing": spacing}
    timesteps, pixels = script.measure_difference(picto, config, solver, 8)
    assert timesteps == 0 and pixels <= 1
