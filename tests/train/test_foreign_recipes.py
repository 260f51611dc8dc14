"""Other tools' command lines as recipes: every option they have is known, and means the same here."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from trainings import tensors_of

from ldm.checkpoints import hub
from ldm.commands.train import create_task
from ldm.config import ImageDataConfig, load_recipe
from ldm.data.image_dataset import ImageDataset
from ldm.errors import InputWarning
from ldm.pipeline.compat import Automatic, Missing, Ours
from ldm.train import diffusers_scripts, kohya_scripts
from ldm.train.command_lines import parse_words
from ldm.train.foreign_recipes import read_foreign_command, recipe_to_yaml
from ldm.train.kohya_arguments import KOHYA_ARGUMENTS
from ldm.train.kohya_datasets import TOML_ARGUMENTS
from ldm.train.optimizers import create_optimizer

THEIRS = json.loads((Path(__file__).parent / "foreign_arguments.json").read_text())  # of their sources, by ast
TABLES = {
    "diffusers": (diffusers_scripts.ARGUMENTS, THEIRS["diffusers"]["arguments"]),
    "kohya": (KOHYA_ARGUMENTS, THEIRS["kohya"]["arguments"]),
    "kohya's TOML": (TOML_ARGUMENTS, THEIRS["kohya"]["toml"]),
}
pytestmark = pytest.mark.filterwarnings("ignore::ldm.errors.InputWarning")
SOURCES = {"diffusers": ("scripts",), "kohya": ("scripts", "datasets")}
NEEDED = {
    "--like-diffusers": "train_text_to_image_lora.py --pretrained_model_name_or_path m --train_data_dir d",
    "--like-kohya": "train_network.py --pretrained_model_name_or_path m --train_data_dir d --output_dir o",
}


def recipe_of(option: str, line: str, *overrides: str):
    return read_foreign_command(option, line.split(), overrides)


def with_needed(option: str, line: str):
    return recipe_of(option, f"{NEEDED[option]} {line}")


@pytest.mark.parametrize("tool", TABLES)
def test_every_argument_of_their_parsers_has_its_rule(tool):
    table, names = TABLES[tool]
    assert len(names) > 35 and {*names} <= table.keys()
    kinds = Counter(type(argument.rule) for argument in table.values())
    assert kinds.keys() <= {Ours, Automatic, Missing} and kinds[Ours] >= len(table) / 3
    assert not [name for name, (rule, *_) in table.items() if isinstance(rule, Missing) and not rule.instead]


def test_what_a_table_says_is_read_is_read():
    """Each option that a script's translation is to read is named in its source, whole or by the end of its name."""
    train = Path(kohya_scripts.__file__).parent
    for table, tool in ((diffusers_scripts.ARGUMENTS, "diffusers"), (KOHYA_ARGUMENTS, "kohya")):
        source = "".join(train.joinpath(f"{tool}_{end}.py").read_text() for end in SOURCES[tool])
        names = [name for name, (rule, *_) in table.items() if isinstance(rule, Ours) and not rule.name]
        ends = [(name, re.sub("^prodigy_|^min_|^max_|_state$", "", name)) for name in names]
        found = [f'"{name}"' in source or f'"{end}"' in source or f"}}_{end}" in source for name, end in ends]
        assert [name for name, is_there in zip(names, found, strict=True) if not is_there] == []


@pytest.mark.parametrize("option", NEEDED)
def test_every_option_becomes_a_recipe_or_one_line(option):
    """No option of either tool ends in anything but a recipe or a ValueError in one line that names it."""
    table, made = TABLES["diffusers" if "diffusers" in option else "kohya"][0], 0
    for name, (rule, nargs, _) in table.items():
        names = name, rule.name.rpartition(".")[2] if isinstance(rule, Ours) and rule.name else name
        for value in ("1", "x"):
            words = [f"--{name}", *[value] * (nargs != 0)]
            try:
                read_foreign_command(option, [*NEEDED[option].split(), *words])
                made += 1
            except ValueError as error:
                text = str(error)
                known = (
                    any(name in text for name in names)
                    or "x.toml" in text
                    or "class_prompt" in text
                    or "No such file" in text
                )
                assert text.startswith(option) and "\n" not in text and known, (name, value, text)
    assert made > len(table)


DIFFUSERS_LINE = """accelerate launch --mixed_precision=fp16 train_text_to_image_lora.py \\
  --pretrained_model_name_or_path=CompVis/model --train_data_dir=pictures --caption_column=text --resolution=256
  --random_flip --train_batch_size=2 --gradient_accumulation_steps=4 --max_train_steps=15000 --learning_rate=1e-04
  --max_grad_norm=1 --lr_scheduler=cosine --lr_warmup_steps=0 --output_dir=out --rank=8 --snr_gamma=5.0
  --checkpointing_steps=250 --checkpoints_total_limit=3 --validation_prompt=cat --num_validation_images=2
  --seed=1337 --report_to=wandb --adam_beta1 0.8 --noise_offset 0.05"""


def test_a_line_of_diffusers_is_the_recipe_that_does_the_same():
    recipe = recipe_of("--like-diffusers", DIFFUSERS_LINE, "validation_steps=7")
    objective, data = recipe.objective, recipe.image_data
    assert (objective.method, objective.rank, objective.alpha, objective.targets) == ("lora", 8, None, ("attention",))
    assert (objective.snr_gamma, objective.noise_offset, objective.caption_dropout) == (5, 0.05, 0)
    assert (objective.times, objective.pretrained_model_name_or_path) == ("discrete", "CompVis/model")
    assert data.train_data_dir == (Path("pictures"),) and (data.random_flip, data.center_crop) == (True, False)
    assert data.resolution == data.min_bucket_reso == data.max_bucket_reso == 256 and data.caption_column == "text"
    assert (recipe.train_batch_size, recipe.gradient_accumulation_steps) == (8, 4)  # ours is the whole batch
    assert (recipe.max_train_steps, recipe.num_train_epochs, recipe.learning_rate) == (15000, None, 1e-4)
    assert (recipe.lr_scheduler, recipe.lr_warmup_steps, recipe.optimizer) == ("cosine", 0, "adamw")
    assert (recipe.ema_decay, recipe.mixed_precision, recipe.seed) == (0, "fp16", 1337)
    assert (recipe.report_to, recipe.validation_prompts) == (("wandb",), ("cat", "cat"))
    assert (recipe.checkpointing_steps, recipe.checkpoints_total_limit) == (250, 3)
    (group,) = create_optimizer(torch.nn.Linear(1, 1), recipe).param_groups
    assert (*group["betas"], group["eps"], group["weight_decay"]) == (0.8, 0.999, 1e-8, 0.01)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("train_text_to_image.py", ("full", 512, 16, 100, 1e-4, "constant", 0)),
        ("train_text_to_image_lora_sdxl.py", ("lora", 1024, 16, 100, 1e-4, "constant", 0)),
        ("train_dreambooth.py --instance_prompt sks", ("full", 512, 4, 1, 5e-6, "constant", 0)),
        ("train_dreambooth_lora.py --instance_prompt sks --scale_lr", ("lora", 512, 4, 1, 2e-3, "constant", 0)),
        ("train_dreambooth_lora_sdxl.py --lr_scheduler linear", ("lora", 1024, 4, 1, 1e-4, "linear", 500)),
        (
            "textual_inversion.py --placeholder_token <cat> --initializer_token toy",
            ("textual_inversion", 512, 16, None, 1e-4, "constant", 0),
        ),
    ],
)
def test_what_diffusers_scripts_do_by_themselves_is_written_down(line, expected):
    recipe = recipe_of("--like-diffusers", f"{line} --pretrained_model_name_or_path m --instance_data_dir d")
    method, batch = recipe.objective.method, recipe.train_batch_size
    length = recipe.num_train_epochs, recipe.learning_rate, recipe.lr_scheduler, recipe.lr_warmup_steps
    assert (method, recipe.image_data.resolution, batch, *length) == expected


def test_dreambooth_of_diffusers_with_its_class(tmp_path):
    (tmp_path / "class").mkdir()
    line = f"--with_prior_preservation --class_prompt dog --num_class_images 50 --class_data_dir {tmp_path / 'class'}"
    script = (
        "train_dreambooth_lora_sdxl.py --pretrained_model_name_or_path m --instance_data_dir d --instance_prompt sks"
    )
    recipe = recipe_of("--like-diffusers", f"{script} {line} --train_text_encoder --optimizer prodigy --use_dora")
    objective = recipe.objective
    assert objective.prior_preservation and objective.dora and objective.class_data_dir == tmp_path / "class"
    assert (objective.class_prompt, objective.num_class_images, recipe.text_encoder_lr) == ("dog", 50, 5e-6)
    assert recipe.optimizer == "prodigy" and recipe.optimizer_options["safeguard_warmup"]


KOHYA_LINE = """accelerate launch --num_cpu_threads_per_process 1 sd-scripts/train_network.py
  --pretrained_model_name_or_path=model.safetensors --network_module=networks.lora --network_dim=16 --network_alpha=8
  --train_data_dir=pictures --reg_data_dir=reg --resolution=512,768 --output_dir=out --output_name=cat
  --max_train_epochs=10 --learning_rate=1e-4 --unet_lr=2e-4 --text_encoder_lr=5e-5 --lr_scheduler=cosine_with_restarts
  --lr_scheduler_num_cycles=3 --lr_warmup_steps=100 --optimizer_type=Lion --optimizer_args weight_decay=0.1 betas=.9,.95
  --mixed_precision=bf16 --save_every_n_steps=50 --save_last_n_steps=200 --min_snr_gamma=5 --noise_offset=0.05
  --cache_latents --gradient_checkpointing --xformers --clip_skip=2 --seed 42 --enable_bucket --train_batch_size 2
  --caption_extension=.txt --shuffle_caption --keep_tokens 1 --flip_aug --caption_dropout_rate 0.05 --log_with all
  --prior_loss_weight 0.5 --gradient_accumulation_steps 3 --metadata_author me"""


def test_a_line_of_kohya_is_the_recipe_that_does_the_same():
    recipe = recipe_of("--like-kohya", KOHYA_LINE)
    objective, data = recipe.objective, recipe.image_data
    assert (objective.method, objective.rank, objective.alpha) == ("lora", 16, 8)
    assert objective.targets == ("attention", "feed-forward") and objective.train_text_encoder
    assert (recipe.learning_rate, recipe.text_encoder_lr, objective.clip_skip) == (2e-4, 5e-5, 2)
    assert (objective.snr_gamma, objective.noise_offset, objective.caption_dropout) == (5, 0.05, 0.05)
    assert data.train_data_dir == (Path("pictures"), Path("reg")) and [s.is_reg for s in data.subsets] == [False, True]
    assert objective.prior_loss_weight == 0.5
    assert (data.min_bucket_reso, data.max_bucket_reso, data.bucket_reso_steps) == (256, 1024, 64)
    assert data.resolution**2 == pytest.approx(512 * 768, rel=0.01) and data.center_crop and data.random_flip
    assert (data.caption_extension, data.shuffle_caption, data.keep_tokens) == (".txt", True, 1)
    assert (recipe.train_batch_size, recipe.num_train_epochs, recipe.max_train_steps) == (6, 10, 0)
    assert (recipe.lr_scheduler, recipe.lr_num_cycles, recipe.lr_warmup_steps) == ("cosine_with_restarts", 3, 100)
    assert (recipe.optimizer, recipe.adam_beta2, recipe.adam_weight_decay) == ("lion", 0.95, 0.1)
    assert (recipe.checkpointing_steps, recipe.checkpoints_total_limit) == (50, 4)
    assert (recipe.output_dir, recipe.card.title, recipe.card.author) == (Path("out/cat"), "cat", "me")
    assert (recipe.mixed_precision, objective.frozen_dtype, recipe.report_to) == ("bf16", "bfloat16", ("all",))


def test_what_kohya_does_by_itself_is_written_down():
    recipe = with_needed("--like-kohya", "")
    objective, data = recipe.objective, recipe.image_data
    assert (objective.rank, objective.alpha, recipe.learning_rate, recipe.max_train_steps) == (4, 1, 2e-6, 1600)
    assert (recipe.train_batch_size, data.caption_extension, recipe.text_encoder_lr) == (1, ".caption", None)
    assert data.min_bucket_reso == data.max_bucket_reso == 512 and recipe.report_to == ()
    for words in ("--network_train_unet_only", "--text_encoder_lr 0", "--cache_text_encoder_outputs"):
        assert not with_needed("--like-kohya", words).objective.train_text_encoder
    conv = "--network_dim 8 --network_alpha 4 --network_args conv_dim=8 conv_alpha=4"
    assert with_needed("--like-kohya", conv).objective.targets == ("attention", "feed-forward", "convolutions")
    ratio = with_needed("--like-kohya", "--lr_scheduler cosine --lr_warmup_steps 0.1 --max_train_steps 500")
    assert ratio.lr_warmup_steps == 50


def test_processes_of_a_launcher_enlarge_the_batch_of_a_step(monkeypatch):
    line = f"accelerate launch --multi_gpu --num_processes 2 {NEEDED['--like-diffusers']} --train_batch_size 3"
    assert recipe_of("--like-diffusers", line).train_batch_size == 6
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert recipe_of("--like-diffusers", line).train_batch_size == 12


TOML = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
color_aug = false

[[datasets]]
resolution = [32, 32]
batch_size = 4
enable_bucket = true
min_bucket_reso = 16
max_bucket_reso = 64
bucket_reso_steps = 8

  [[datasets.subsets]]
  image_dir = 'FOLDER/one'
  class_tokens = 'sks cat'
  num_repeats = 3
  flip_aug = true
  caption_prefix = 'best,'

  [[datasets.subsets]]
  image_dir = 'FOLDER/two'
  metadata_file = 'FOLDER/meta_two.json'
  shuffle_caption = false
  caption_dropout_rate = 1.0

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'FOLDER/reg'
  class_tokens = 'cat'
"""


@pytest.fixture
def toml(tmp_path):
    """A TOML file of three subsets, each of two images."""
    for name in ("one", "two", "reg"):
        (tmp_path / name).mkdir()
        for k in range(2):
            pixels = np.random.default_rng(k).integers(0, 256, (32, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    (tmp_path / "one" / "0.txt").write_text("a, b, c, d")
    rows = {str(tmp_path / "two" / "0.png"): {"tags": "x, y"}, "1.png": {"caption": "z"}}
    (tmp_path / "meta_two.json").write_text(json.dumps(rows))
    file = tmp_path / "data.toml"
    file.write_text(TOML.replace("FOLDER", str(tmp_path)))
    return file


def test_each_subset_of_a_toml_file_is_used_as_it_says(toml, tmp_path):
    line = f"train_network.py --pretrained_model_name_or_path m --output_dir o --dataset_config {toml} --keep_tokens 5"
    recipe = recipe_of("--like-kohya", line)
    data = recipe.image_data
    assert recipe.train_batch_size == 4 and data.keep_tokens == 1  # of the file, before the command line's
    assert load_recipe(write(tmp_path, recipe_to_yaml(recipe))) == recipe
    images = ImageDataset(data, 4, 0, 8)
    samples = {sample.key: (sample.caption, sample.repeats) for sample in images.samples}
    assert samples == {
        "0.png": ("best, a, b, c, d", 3),
        "1.png": ("best, sks cat", 3),
        "2:0.png": ("x, y", 1),
        "2:1.png": ("z", 1),
        "3:0.png": ("cat", 1),
        "3:1.png": ("cat", 1),
    }
    uses = [
        (row, [key for batch in range(40) for key in images.batch_sampler[batch] if key.sample_id == row])
        for row in range(6)
    ]
    captions = {images.samples[row].key: {images.augment_caption(key) for key in keys} for row, keys in uses}
    flips = {images.samples[row].key: {images.choose_augmentation(key).flip for key in keys} for row, keys in uses}
    assert len(captions["0.png"]) > 5 and all(c.startswith("best, ") for c in captions["0.png"])
    assert captions["2:0.png"] == {""} and captions["3:0.png"] == {"cat"}
    assert flips["0.png"] == {True, False} and flips["2:0.png"] == flips["3:1.png"] == {False}


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("color_aug = false", "color_aug = true", "color_aug is not supported: prepare recoloured"),
        (
            "shuffle_caption = true",
            "shufle_caption = true",
            "[general]: shufle_caption: unknown option; did",
        ),
        ("flip_aug = true", "flip_aug = 'yes'", "datasets 1, subset 1: flip_aug: true or false"),
        ("num_repeats = 3", "num_repeats = 'x'", "num_repeats x: not a whole number"),
        ("num_repeats = 3", "num_repeats = 100000", "data.subsets.0.repeats"),
        ("[general]", "[genral]", "genral: only [general] and [[datasets]]"),
        ("[general]", "[general", "data.toml: "),
        ("image_dir = 'FOLDER/one'", "", "datasets 1, subset 1: image_dir is needed"),
        ("[general]", "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'x'\n[general]", "one for all"),
    ],
)
def test_a_wrong_toml_file_is_refused_by_its_key(old, new, said, toml):
    text = toml.read_text().replace(str(toml.parent), "FOLDER").replace(old, new, 1)
    toml.write_text(text.replace("FOLDER", str(toml.parent)))
    line = f"train_network.py --pretrained_model_name_or_path m --output_dir o --dataset_config {toml}"
    with pytest.raises(ValueError) as refused:
        recipe_of("--like-kohya", line)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_losses_of_regularization_images_weigh_as_the_others(toml, tiny, tmp_path):
    line = f"train_network.py --pretrained_model_name_or_path {tiny} --output_dir {tmp_path}/o --dataset_config {toml}"
    task = create_task(recipe_of("--like-kohya", f"{line} --prior_loss_weight 0.5"))
    images, weights = task.dataset.images, task.dataset.loss_weights
    repeats = torch.tensor([float(sample.repeats) for sample in images.samples])
    is_reg = torch.tensor([sample.key.startswith("3:") for sample in images.samples])
    assert (weights[~is_reg] == 1).all()
    assert (weights * repeats)[is_reg].sum() == 0.5 * repeats[~is_reg].sum() == 4


def test_a_config_file_gives_what_the_command_does_not(tmp_path):
    (tmp_path / "run.toml").write_text(
        "[a]\nnetwork_dim = 32\nlearning_rate = 1e-3\n[b]\nxformers = true\nflip_aug = true\n"
    )
    recipe = with_needed("--like-kohya", f"--config_file {tmp_path / 'run'} --network_dim 64")
    assert (recipe.objective.rank, recipe.learning_rate, recipe.image_data.random_flip) == (64, 1e-3, True)


@pytest.mark.parametrize(
    "option, line, said",
    [
        ("--like-diffusers", "train_controlnet.py --x", "train_controlnet.py: only train_text_to_image.py, "),
        ("--like-diffusers", "accelerate launch", "expected a script and its options: train_text_to_image.py"),
        ("--like-diffusers", f"{NEEDED['--like-diffusers']} --rnak 4", "--rnak: unknown option; did you mean 'rank'?"),
        ("--like-diffusers", f"{NEEDED['--like-diffusers']} --rank x", "--rank x: not a whole number"),
        ("--like-diffusers", f"{NEEDED['--like-diffusers']} --rank", "--rank needs a value"),
        ("--like-diffusers", f"{NEEDED['--like-diffusers']} cat", "'cat': an option was expected"),
        ("--like-diffusers", f"{NEEDED['--like-diffusers']} --hub_token abc", "HF_TOKEN: a recipe holds no secrets"),
        ("--like-diffusers", f"{NEEDED['--like-diffusers']} --push_to_hub", "--hub_model_id owner/name is needed"),
        ("--like-diffusers", "train_dreambooth.py --instance_data_dir d", "--pretrained_model_name_or_path is needed"),
        ("--like-kohya", f"{NEEDED['--like-kohya']} --network_module networks.oft", "write networks.lora"),
        ("--like-kohya", f"{NEEDED['--like-kohya']} --optimizer_type Adafactor", "write AdamW, AdamW8bit, Lion"),
        ("--like-kohya", f"{NEEDED['--like-kohya']} --network_args conv_dim=4 conv_alpha=2", "must be network_dim 4"),
        ("--like-kohya", f"{NEEDED['--like-kohya']} --loss_type huber", "the loss is l2"),
        ("--like-kohya", "flux_train_network.py --x 1", "flux_train_network.py: only train_network.py, "),
    ],
)
def test_what_is_not_here_is_refused_with_what_to_write(option, line, said):
    with pytest.raises(ValueError) as refused:
        recipe_of(option, line)
    assert said in str(refused.value) and str(refused.value).startswith(f"{option}: ")


def test_options_are_read_as_argparse_reads_them():
    words = [
        "--rank=4",
        "--rank",
        "8",
        "--validation_prompts",
        "a",
        "b",
        "--center_crop",
        "--pretrained_m",
        "m",
        "--train-data-dir",
        "-x",
    ]
    assert parse_words(words, diffusers_scripts.ARGUMENTS) == {
        "rank": "8",
        "validation_prompts": ["a", "b"],
        "center_crop": True,
        "pretrained_model_name_or_path": "m",
        "train_data_dir": "-x",
    }


def test_a_dataset_of_the_hub_is_downloaded_whole(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda *words, **options: asked.append((words, options)) or tmp_path)
    line = "train_text_to_image.py --pretrained_model_name_or_path m --dataset_name owner/pictures"
    recipe = recipe_of("--like-diffusers", line)
    assert recipe.image_data.train_data_dir == (tmp_path,)
    assert asked == [(("owner/pictures",), {"repo_type": "dataset"})]


def test_what_has_no_effect_is_one_line():
    with pytest.warns(InputWarning) as said:
        with_needed("--like-kohya", "--xformers --cache_latents --lowram")
    (warning,) = said
    assert "--like-kohya: 3 without effect: --xformers (PyTorch's own attention), --cache_latents" in str(
        warning.message
    )


def test_pasted_commands_of_both_tools_train_the_same_lora(ldm_, tuning, tiny, tmp_path):
    """`ldm train --like-...` of two tools, and of the recipe that was written: the same bits."""
    tuning()  # makes the pictures
    pictures = tmp_path / "pictures"
    common = f"--pretrained_model_name_or_path {tiny} --resolution 32 --max_train_steps 2 --seed 3 --learning_rate 1e-3"
    kohya = f"--in_json {pictures}/metadata.jsonl --network_train_unet_only --network_dim 2 --network_alpha 2"
    diffusers = f"--caption_column text --rank 2 --center_crop --lr_warmup_steps 0 --output_dir {tmp_path}/d/last"
    lines = {
        "--like-diffusers": f"accelerate launch train_text_to_image_lora.py {diffusers} --train_batch_size 2",
        "--like-kohya": f"train_network.py {kohya} --output_dir {tmp_path}/k --train_batch_size 2",
    }
    overrides = ["--set", "objective.targets=[attention]", "--set", "report_to=[]"]
    for option, line in lines.items():
        written = tmp_path / f"{option[7:]}.yaml"
        words = [*line.split(), *common.split(), "--train_data_dir", pictures, "--write-recipe", written]
        status, out, err = ldm_("train", *overrides, option, *words)
        assert status == 0 and Path(out.strip()).name == "export", err
        assert yaml.safe_load(written.read_text())["objective"]["rank"] == 2
    one, other = (tensors_of(tmp_path / name / "last") for name in ("d", "k"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    status, _, err = ldm_("train", tmp_path / "kohya.yaml", "--set", f"output_dir={tmp_path}/r")
    assert status == 0, err
    name = "pytorch_lora_weights.safetensors"
    first, again = (load_file(tmp_path / run / "export" / name) for run in ("k/last", "r"))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_recipe_alone_is_printed_and_nothing_is_made(ldm_, tmp_path):
    words = [*NEEDED["--like-kohya"].split(), "--output_dir", tmp_path / "out", "--recipe-only"]
    status, out, _ = ldm_("train", "--like-kohya", *words)
    assert status == 0 and yaml.safe_load(out)["objective"]["kind"] == "tune" and not (tmp_path / "out").exists()
    assert load_recipe(write(tmp_path, out)).output_dir == tmp_path / "out" / "last"


def test_text_encoders_have_a_learning_rate_of_their_own(tuning):
    lora = {"method": "lora", "rank": 2, "train_text_encoder": True}
    recipe = load_recipe(tuning(changes={"text_encoder_lr": 1e-5}, **lora))
    task = create_task(recipe)
    groups = create_optimizer(task.model, recipe).param_groups
    names = {id(p): name for name, p in task.model.named_parameters()}
    assert [group.get("network") for group in groups] == [None, "text_encoder"]
    for group in groups:
        text = {names[id(p)].startswith("text_encoder") for p in group["params"]}
        assert text == {group.get("network") == "text_encoder"}


def test_clip_skip_counts_as_kohyas(tuning):
    layers = [
        e.layer_idx
        for k in (None, 1, 2)
        for e in create_task(load_recipe(tuning(clip_skip=k))).base_model.text_encoders
    ]
    assert layers == [-1, -1, -2]
    with pytest.raises(ValueError, match="clip skip 3: this model has the layers 1 to 2"):
        create_task(load_recipe(tuning(clip_skip=3)))


def test_a_subset_too_many_is_refused():
    with pytest.raises(ValueError, match="subsets: 2 for 1 folders"):
        ImageDataConfig.model_validate({"train_data_dir": "x", "subsets": [{}, {}]})


class Hub:
    """Stands for the hub: what was asked of it, and no connection for the call that is `lost`."""

    def __init__(self, lost=""):
        self.calls, self.lost = [], lost

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, **options):
        return self._answer("create_repo", repo_id, options)

    def upload_folder(self, **options):
        names = sorted(path.name for path in options["folder_path"].iterdir())
        return self._answer("upload_folder", options["repo_id"], names)

    def _answer(self, name, *words):
        self.calls.append((name, *words))
        if name == self.lost:
            raise OSError("no network")
        return "https://hub/owner/zorb"


@pytest.mark.parametrize("lost", ["", "create_repo", "upload_folder"])
def test_an_export_is_pushed_once_it_is_written(lost, ldm_, tuning, tmp_path, monkeypatch):
    """The repository is made before the training; weights whose upload fails stay, and the line says where."""
    hub_ = Hub(lost)
    monkeypatch.setattr(hub, "HfApi", hub_)
    path = tuning(method="lora", rank=2, changes={"max_train_steps": 1, "validation_prompts": []})
    status, out, err = ldm_("train", path, "--push", "owner/zorb")
    made, *uploaded = hub_.calls
    assert made == ("create_repo", "owner/zorb", {"private": False, "exist_ok": True})
    export = tmp_path / "run" / "export"
    *_, last = err.splitlines()
    if lost == "create_repo":
        assert status == 2 and last == "error: owner/zorb: cannot reach the hub (OSError)" and not export.exists()
        return
    assert uploaded[-1][2] == sorted(file.name for file in export.iterdir()) and "README.md" in uploaded[-1][2]
    if lost:
        assert status == 2 and last.startswith("error: owner/zorb: cannot reach the hub") and str(export) in last
    else:
        assert status == 0 and out.strip() == str(export) and last == "note: uploaded: https://hub/owner/zorb"


@pytest.mark.parametrize("name", ["zorb", "a/b/c", "a b/c"])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_made(name, refused, tuning, tmp_path):
    refused("train", tuning(), "--push", name, said=f"hub_model_id {name!r}: not owner/name")
    assert not (tmp_path / "run").exists()
