"""The audit: every planted fault is told and nothing else; its forecasts equal what training does."""

import math
import os
import shutil
from collections import Counter

import pytest
import torch
from faulty_dataset import FAULTS, PLACES, beside, caption, encoded, file, smooth, sound
from image_files import write
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.audit import image_checks
from ldm.audit.audit import audit_dataset, quick_audit
from ldm.config import Recipe
from ldm.data.sources import SEVERITIES
from ldm.nn.vae import Posterior

COMMON = {"train_batch_size": 2, "learning_rate": 1e-3, "max_train_steps": 10_000, "mixed_precision": "no"}
BUCKETS = {"resolution": 64, "bucket_reso_steps": 16, "min_bucket_reso": 32, "max_bucket_reso": 128, "masks": "file"}


def recipe_of(tiny, root, places=None, data=None, **changes):
    found = [root / name for name in places or sorted(os.listdir(root), key=lambda n: (n not in PLACES, order(n)))]
    made = {
        **COMMON,
        "objective": {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": "full"},
        "data": {"train_data_dir": found, **BUCKETS, **(data or {})},
        "output_dir": root.parent / "out",
    }
    return Recipe.model_validate({**made, **changes})


def order(name):
    return PLACES.index(name) if name in PLACES else name


def told(report):
    return {(fault.kind, fault.key) for fault in report.issues}


def encode(vae, images):
    """Latents that are the image's, extreme where its first pixel is red, and not finite where it is green."""
    corner = images[0, :, 0, 0].tolist()
    scale = {(1, -1, -1): 100.0, (-1, 1, -1): math.nan}.get(tuple(corner), 1.0)
    return Posterior(images * scale, torch.ones_like(images))


@pytest.fixture
def root(tmp_path):
    sound(tmp_path / "data")
    return tmp_path / "data"


def test_of_a_sound_data_set_nothing_is_told(tiny, root, monkeypatch):
    assert audit_dataset(recipe_of(tiny, root), encode_all=True).issues == ()
    monkeypatch.setattr(image_checks, "encode_images", encode)
    assert audit_dataset(recipe_of(tiny, root), encode_all=True).issues == ()


@pytest.fixture
def planted(root):
    return [fault for plant in FAULTS.values() for fault in plant(root)]


def test_every_planted_fault_is_told_and_nothing_else(tiny, root, planted, monkeypatch):
    monkeypatch.setattr(image_checks, "encode_images", encode)
    found = [(fault.kind, fault.key) for fault in audit_dataset(recipe_of(tiny, root), encode_all=True).issues]
    assert len({kind for kind, _ in planted}) >= 25
    assert set(found) == set(planted) and len(found) == len(planted)


def test_the_quick_part_tells_the_same_but_for_what_pixels_tell(tiny, root, planted):
    pixels = {"near duplicate", "color mode", "blank image", "black mask", "animated", "color profile"}
    pixels |= {"extreme latents", "non-finite latents", "gray levels"}
    found, left = told(quick_audit(recipe_of(tiny, root))), {fault for fault in planted if fault[0] not in pixels}
    assert found <= left
    assert {kind for kind, _ in left - found} == {"broken image"}  # a body that no reader of heads looks at


def test_moving_and_renaming_changes_nothing_but_keys(tiny, root, planted):
    before = audit_dataset(recipe_of(tiny, root))
    moved = shutil.move(root, root.parent / "else" / "where")
    assert told(audit_dataset(recipe_of(tiny, moved))) == told(before)
    for path in sorted((moved / "beside").glob("*.*")):
        path.rename(path.with_name(f"x{path.name}"))
    renamed = audit_dataset(recipe_of(tiny, moved))
    own = lambda report: Counter(f.kind for f in report.issues if f.kind not in ("file name", "skipped", "hidden"))
    assert own(renamed) == own(before) and renamed.estimates == before.estimates


MILD = """picture_that_is_tiny panorama picture_of_one_colour file_that_is_there_twice file_with_two_captions
picture_saved_again caption_that_is_a_file_name caption_in_markup caption_read_in_another_encoding
caption_that_says_nothing caption_longer_than_is_read class_of_two_pictures picture_whose_latents_are_extreme"""
SLIGHT = """picture_in_grey picture_with_a_palette picture_for_printing animation profile_of_another_colour_space
caption_on_two_lines what_machines_leave"""


def test_a_fault_that_training_survives_is_a_warning_or_a_notice(tiny, root, monkeypatch):
    monkeypatch.setattr(image_checks, "encode_images", encode)
    mild, slight = (
        {fault for name in names.split() for fault in FAULTS[name](root) if fault[0] != "small bucket"}
        for names in (MILD, SLIGHT)
    )
    report = audit_dataset(recipe_of(tiny, root), encode_all=True)
    report.raise_for_errors()
    assert {(f.kind, f.key) for f in report.with_severity("warning")} == mild
    assert {(f.kind, f.key) for f in report.with_severity("notice")} - slight == {("small bucket", "128x32")}


def test_the_gravest_come_first_and_an_error_is_refused_in_one_line(tiny, root, planted):
    report = quick_audit(recipe_of(tiny, root))
    ranks = [SEVERITIES.index(fault.severity) for fault in report.issues]
    assert ranks == sorted(ranks) and set(ranks) == {0, 1, 2}
    with pytest.raises(
        ValueError, match=rf"\(and {len(report.with_severity('error')) - 1} more: see ldm check\)$"
    ) as said:
        report.raise_for_errors()
    assert "\n" not in str(said.value)


RECIPES = {  # what is wrong with a recipe alone: (kind, key), its data, and other options
    ("buckets", "data.bucket_reso_steps"): ({"bucket_reso_steps": 6}, {}),
    ("buckets", "data.resolution"): ({"min_bucket_reso": 100}, {}),
    ("no masks", "data.masks"): ({"masks": "alpha"}, {}),
    ("too few steps", "max_train_steps"): ({}, {"max_train_steps": 3}),
    ("small bucket", "80x48"): ({}, {"train_batch_size": 3}),
    ("model", "objective"): ({}, {"objective": {"kind": "tune", "pretrained_model_name_or_path": "/nowhere"}}),
    ("disk space", "output_dir"): ({}, {"checkpoints_total_limit": 10**12}),
}


@pytest.mark.parametrize("fault", RECIPES, ids=str)
def test_what_is_wrong_with_a_recipe_is_told(tiny, root, fault):
    data, changes = RECIPES[fault]
    check = audit_dataset if fault[0] == "no masks" else quick_audit
    assert fault in told(check(recipe_of(tiny, root, ["beside"], data, **changes)))


def test_images_too_small_to_be_left_as_they_are(tiny, root):
    key = beside(root, "icon.png", file(1, 12, 12))
    assert ("too small", key) in told(quick_audit(recipe_of(tiny, root, data={"bucket_no_upscale": True})))


def test_one_caption_for_all_is_told_unless_it_was_asked_for(tiny, tmp_path):
    write(tmp_path / "p", {f"{k}.png": file(k) for k in range(6)})
    asked = recipe_of(tiny, tmp_path, ["p"], {"instance_prompt": "sks dog", "masks": "none"})
    assert audit_dataset(asked).issues == ()
    write(tmp_path / "p", {f"{k}.txt": "a dog" for k in range(6)})
    assert told(audit_dataset(recipe_of(tiny, tmp_path, ["p"], {"masks": "none"}))) == {("one caption", "captions")}
    few = [tmp_path / "p" / f"{k}.{e}" for k in range(3) for e in ("png", "txt")]
    assert len([path.unlink() for path in few]) == 6
    again = recipe_of(tiny, tmp_path, ["p"], {"instance_prompt": "a dog", "masks": "none"})
    assert told(audit_dataset(again)) == {("few images", "a dog")}


def test_what_is_held_out_is_audited_too_and_must_not_be_learnt_from(tiny, root):
    apart = root.parent / "apart"
    tune = {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": "full", "validation_data_dir": apart}
    recipe = recipe_of(tiny, root, objective=tune)
    assert told(audit_dataset(recipe)) == {("missing folder", "held out: apart")}
    write(apart / "beside", {f"{k}.png": file(k) for k in range(300, 302)})  # few, and of one caption: no fault here
    write(apart / "beside", {f"{k}.txt": "a red star" for k in range(300, 302)})
    assert audit_dataset(recipe).issues == ()
    again = encoded(smooth(3, 80, 80).resize((72, 72)), "JPEG", quality=80)
    wall = encoded(Image.new("RGB", (64, 64), "teal"))
    planted = {
        ("held-out leak", beside(apart, "copy.png", file(2, 48, 96), "something else")),
        ("held-out leak", beside(apart, "saved-again.jpg", again, caption(9))),
        ("same image", beside(apart, "twice.png", file(301), "a red star")),
        ("broken image", beside(apart, "words.png", "once upon a time")),
        ("blank image", beside(apart, "wall.png", wall)),
        ("small image", beside(apart, "icon.png", file(303, 24, 24))),
        ("mojibake", beside(apart, "garbled.png", file(304), "a cafÃ©")),
        ("truncated caption", beside(apart, "long.png", file(305), "a red star, " * 12)),
        ("empty caption", beside(apart, "blank.png", file(306), " ").replace("png", "txt")),
    }
    report = audit_dataset(recipe)
    assert {(fault.kind, fault.key) for fault in report.issues} == {
        (kind, f"held out: beside/{key}") for kind, key in planted
    }
    assert {fault.kind for fault in report.with_severity("error")} == {"broken image"}
    assert report.estimates == audit_dataset(recipe_of(tiny, root)).estimates


def test_a_word_to_be_learnt_must_be_said(tiny, tmp_path):
    write(tmp_path / "p", {f"{k}.png": file(k) for k in range(4)})
    write(tmp_path / "p", {f"{k}.txt": f"{'a <blob>' if k else 'a blob'} {k}" for k in range(4)})
    learnt = {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": "textual_inversion"}
    recipe = recipe_of(
        tiny,
        tmp_path,
        ["p"],
        {"masks": "none"},
        objective={**learnt, "placeholder_token": "<blob>", "initializer_token": "star"},
    )
    assert told(quick_audit(recipe)) == {("no placeholder token", "0.png")}


def test_weights_that_are_not_finite_are_told_of_every_image(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: a * math.nan for name, a in load_file(path).items()}, path)
    sound(tmp_path / "data")
    found = told(audit_dataset(recipe_of(model, tmp_path / "data", ["beside"]), encode_all=True))
    assert found == {("non-finite latents", f"{k}.png") for k in range(8)}
