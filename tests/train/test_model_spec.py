"""What exports say about themselves: the hub's README.md, ModelSpec and kohya's metadata."""

import hashlib
import json

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from trainings import FULL, LORA, WORD

from ldm.checkpoints.detect import HEADER_HINTS
from ldm.checkpoints.tensors import open_safetensors
from ldm.commands.train import create_task
from ldm.config import load_recipe
from ldm.convert.inspect import inspect_model
from ldm.train.model_spec import START_FILE, count_tags, find_architecture, record_start

CARD = {
    "author": "Ann",
    "license": "openrail",
    "description": "Zorbs.",
    "trigger_phrase": "zorb style",
    "tags": ["zorb"],
    "date": "2026-01-02",
}


def export(recipe, folder):
    """The task of a recipe, exported without a training."""
    task = create_task(load_recipe(recipe))
    task.recipe.output_dir.mkdir(exist_ok=True)
    record_start(task.recipe.output_dir)
    (task.recipe.output_dir / "log.jsonl").write_text("")
    folder.mkdir()
    task.export(folder)
    return task


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_lora_says_what_it_is_in_every_format(tuning, tmp_path):
    recipe = tuning(**LORA, changes={"card": CARD, "seed": 7}, pretrained_model_name_or_path=None)
    task = export(recipe, tmp_path / "a")
    export(recipe, tmp_path / "b")
    for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        path = tmp_path / "a" / name
        assert path.read_bytes() == (tmp_path / "b" / name).read_bytes()
        found, file = header(path), open_safetensors(path)
        digest = hashlib.sha256(path.read_bytes()[file.data_offset :]).hexdigest()
        spec = {key.removeprefix("modelspec."): text for key, text in found.items() if key.startswith("modelspec.")}
        assert spec == {
            "sai_model_spec": "1.0.1",
            "implementation": "diffusers",
            "title": "run",
            "author": "Ann",
            "license": "openrail",
            "description": "Zorbs.",
            "trigger_phrase": "zorb style",
            "tags": "zorb",
            "date": "2026-01-02",
            "resolution": "32x32",
            "prediction_type": "v",
            "hash_sha256": f"0x{digest}",
        }
        assert found["sshs_model_hash"] == digest and found["ss_seed"] == "7" and found["ss_steps"] == "6"
        assert json.loads(found["ss_tag_frequency"]) == {"pictures": {f"a {c} zorb": 1 for c in colours(task)}}
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "2"
    assert inspect_model(path)["unknown"] == []


def colours(task):
    return sorted(sample.key.removesuffix(".png") for sample in task.dataset.images.samples)


@pytest.mark.parametrize(
    "method, trigger, tag", [(LORA, "zorbs", "lora"), (WORD, "zorb", "textual_inversion"), (FULL, "zorbs", "diffusers")]
)
def test_the_card_is_the_hub_s(method, trigger, tag, tuning, tmp_path):
    export(tuning(**method, data={"instance_prompt": "zorbs"}), tmp_path / "a")
    card = ModelCard.load(tmp_path / "a" / "README.md")
    data = card.data.to_dict()
    assert data["instance_prompt"] == trigger and tag in data["tags"] and data["library_name"] == "diffusers"
    assert {"license", "base_model", "widget"}.isdisjoint(data) and f"Write `{trigger}` in the prompt." in card.text
    assert (tmp_path / "run" / START_FILE).read_text().strip() in card.text


def test_no_control_character_of_a_caption_or_a_recipe_is_in_the_card(tuning, tmp_path):
    words = "a\x1b[2J zorb\u202e <script>"
    recipe = tuning(**LORA, changes={"card": {"description": words}})
    table = tmp_path / "pictures" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps({**row, "text": words}) + "\n" for row in rows))
    export(recipe, tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert all(line.isprintable() for line in text.split("\n"))
    assert "- `a\\x1b[2J zorb\\u202e <script>`" in text


def test_the_day_is_that_of_the_first_start(tuning, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / START_FILE).write_text("2026-02-03\n")
    export(tuning(**WORD), tmp_path / "a")
    (path,) = (tmp_path / "a").glob("*.safetensors")
    assert header(path)["modelspec.date"] == "2026-02-03" and header(path)["modelspec.trigger_phrase"] == "zorb"


def test_tags_are_counted_by_folder_without_the_class_s_images(tuning, tmp_path):
    prior = {"prior_preservation": True, "class_prompt": "a cat", "num_class_images": 2}
    task = create_task(load_recipe(tuning(**LORA, **prior)))
    assert count_tags(task.recipe, task.dataset.images) == {"pictures": {f"a {c} zorb": 1 for c in colours(task)[-10:]}}


@pytest.mark.parametrize(
    "family, name",
    [
        ("sd1", "stable-diffusion-v1"),
        ("sd1-inpainting", "stable-diffusion-v1"),
        ("sd2-base", "stable-diffusion-v2-512"),
        ("sd2-v", "stable-diffusion-v2-768-v"),
        ("sdxl", "stable-diffusion-xl-v1-base"),
        (None, None),
    ],
)
def test_the_architecture_is_named_as_other_tools_do(family, name):
    assert find_architecture(family, "lora") == (name and f"{name}/lora")
    assert name is None or family in HEADER_HINTS["modelspec.architecture"][name].families
