"""Batches of people's own images: each row is its own sample's, from the file's pixels to the crop and its mask."""

import json
import pickle

import numpy as np
import pytest
from image_files import encoded, noise, write
from PIL import Image
from scipy.stats import chisquare

from ldm.config import ImageDataConfig
from ldm.data.augment import downsample_mask
from ldm.data.folders import open_image_sources
from ldm.data.image_dataset import (
    CachedEncoder,
    ImageDataset,
    buckets_from_config,
    collect_image_infos,
)
from ldm.data.latent_cache import LatentCache
from ldm.train.card import summarize_dataset

SIZES = [(64, 64), (96, 48), (48, 96), (70, 60), (64, 64), (200, 100), (33, 90)]


@pytest.fixture
def folder(tmp_path):
    """Seven images of four shapes, one turned by EXIF, with tags."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for k, (width, height) in enumerate(SIZES):
        data = encoded(noise(height, width, k), exif=exif) if k == 5 else encoded(noise(width, height, k))
        write(tmp_path / "p", {f"{k}.png": data, f"{k}.txt": f"tag{k}, a, b, c, d"})
    return tmp_path / "p"


def data(folder, **changes):
    values = {"resolution": 64, "bucket_reso_steps": 16, "min_bucket_reso": 32, "max_bucket_reso": 128, **changes}
    return ImageDataConfig(train_data_dir=str(folder), **values)


def dataset(folder, batch=3, seed=0, kept=None, caption_dropout=0, **changes):
    return ImageDataset(data(folder, **changes), batch, seed, 8, caption_dropout, kept)


def by_visit(found, steps):
    """Everything that is shown of each visit in some steps."""
    rows = {}
    for k in steps:
        batch = found[k]
        for row, (key, visit) in enumerate(zip(batch["keys"], batch["indices"], strict=True)):
            rows[key, visit.times_seen] = [
                np.asarray(batch[name][row]).tolist() for name in batch if name not in ("indices", "keys")
            ]
    return rows


def test_a_row_is_its_file_resized_to_cover_mirrored_then_cropped(folder):
    found = dataset(folder, random_flip=True)
    flips = set()
    for k in range(40):
        batch = found[k]
        assert len({pixels.shape for pixels in batch["pixels"]}) == 1
        for row, visit in enumerate(batch["indices"]):
            number = int(batch["keys"][row][0])
            (width, height), resized = found.image_infos[visit.sample_id].placement
            whole = Image.fromarray(noise(*SIZES[number], number))
            if number == 5:
                whole = Image.fromarray(noise(100, 200, 5)).rotate(-90, expand=True)
            assert batch["original_sizes"][row].tolist() == [SIZES[number][1], SIZES[number][0]]
            pixels = np.asarray(whole.resize(resized, Image.Resampling.LANCZOS))
            top, left = batch["crops"][row]
            wanted = [p[top : top + height, left : left + width] for p in (pixels, pixels[:, ::-1])]
            same = [np.array_equal(batch["pixels"][row], w) for w in wanted]
            assert any(same)
            flips.add(same.index(True))
    assert flips == {0, 1}


def test_a_visit_shows_the_same_in_any_batch_and_process_and_alone(folder):
    """The images of other batches, and those in the same one, change nothing; nor does a copy, or another order."""
    options = {"random_flip": True, "shuffle_caption": True, "keep_tokens": 1, "caption_dropout": 0.3}
    small, large = (dataset(folder, batch, **options) for batch in (1, 4))
    one, other = by_visit(small, range(60)), by_visit(pickle.loads(pickle.dumps(large)), reversed(range(15)))
    shared = one.keys() & other.keys()
    assert len(shared) > 25 and all(one[key] == other[key] for key in shared)
    assert one != by_visit(dataset(folder, 1, seed=1, **options), range(60))
    batch = large[3]
    for row, visit in enumerate(batch["indices"]):
        alone = large.load_batch([visit])
        assert all(np.array_equal(alone[name][0], batch[name][row]) for name in batch)


def test_adding_a_sample_changes_nothing_for_the_others(folder):
    before = by_visit(dataset(folder, 1, random_flip=True), range(70))
    write(folder, {"00.png": encoded(noise(64, 64, 99)), "00.txt": "new"})
    after = by_visit(dataset(folder, 1, random_flip=True), range(80))
    shared = before.keys() & after.keys()
    assert len(shared) >= 40 and all(before[key] == after[key] for key in shared)


def test_captions_are_dropped_at_the_rate_and_shuffled_as_told(folder):
    found = dataset(folder, 4, caption_dropout=0.25, shuffle_caption=True, keep_tokens=2)
    shown = [found.augment_caption(visit) for k in range(300) for visit in found.batch_sampler[k]]
    assert chisquare([shown.count(""), 1200 - shown.count("")], [300, 900]).pvalue > 1e-4
    tags = {caption for caption in shown if caption.startswith("tag3")}
    assert len(tags) == 6 and all(caption.startswith("tag3, a, ") for caption in tags)
    plain = dataset(folder)
    assert {plain.augment_caption(visit) for k in range(30) for visit in plain.batch_sampler[k]} == {
        f"tag{k}, a, b, c, d" for k in range(7)
    }


def test_latents_are_made_once_for_each_way_round_and_stay_those_of_the_pixels(folder, tmp_path):
    made = []

    def encode(pixels):
        made.append(len(pixels))
        return pixels[:, ::8, ::8].astype(np.float16)

    cache = LatentCache(tmp_path / "cache", "f")
    options = {"center_crop": True, "random_flip": True}
    kept, plain = dataset(folder, kept=CachedEncoder(cache, encode), **options), dataset(folder, **options)
    heard = []
    kept.cache_latents(heard.append)
    assert sum(made) == 14 and heard[-1] == 14
    for k in range(20):
        assert np.array_equal(kept[k]["latents"], plain[k]["pixels"][:, ::8, ::8]) and "pixels" not in kept[k]
    dataset(folder, 2, 5, CachedEncoder(cache, encode), **options).cache_latents()
    assert sum(made) == 14
    write(folder, {"3.png": encoded(noise(70, 60, 33))})  # another picture under the same name
    dataset(folder, kept=CachedEncoder(cache, encode), **options).cache_latents()
    assert sum(made) == 16
    dataset(folder, kept=CachedEncoder(cache, encode), **{**options, "resolution": 96}).cache_latents()
    assert sum(made) == 30
    with pytest.raises(ValueError, match="center_crop"):
        dataset(folder, kept=CachedEncoder(cache, encode))


@pytest.mark.parametrize("masks", ["file", "alpha"])
def test_a_mask_goes_the_way_of_its_image(tmp_path, masks):
    """A mask equal to the image's first channel is what the shown pixels average to."""
    for k, (width, height) in enumerate([(64, 64), (128, 64), (64, 128)]):
        level = np.zeros((height, width), np.uint8)
        level[height // 3 :, width // 4 : width // 2] = 255
        rgb = level[..., None].repeat(3, 2)
        files = {f"{k}.png": encoded(rgb), f"{k}.mask.png": encoded(level)}
        if masks == "alpha":
            files = {f"{k}.png": encoded(np.concatenate([255 - rgb, level[..., None]], 2))}
        write(tmp_path / "p", {**files, f"{k}.txt": "x"})
    found = ImageDataset(data(tmp_path / "p", masks=masks, random_flip=True, resolution=70), 2, 0, 8)
    for k in range(12):
        batch = found[k]
        shown = batch["pixels"][..., 0] if masks == "file" else 255 - batch["pixels"][..., 0]
        wanted = np.stack([downsample_mask(level, 8) for level in shown])
        assert batch["masks"].shape == wanted.shape and batch["masks"].dtype == np.float32
        assert np.abs(batch["masks"] - wanted).max() < 0.1 and 0.1 < wanted.mean() < 0.4


def test_masks_are_averaged_over_each_latent_and_ones_where_there_are_none(folder):
    mask = noise(24, 16)[..., 0]
    wanted = [[[mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() / 255 for x in range(3)] for y in range(2)]]
    assert np.allclose(downsample_mask(mask, 8), wanted, atol=1e-6)
    batch = dataset(folder)[0]
    height, width = batch["pixels"].shape[1:3]
    assert batch["masks"].shape == (3, 1, height // 8, width // 8) and (batch["masks"] == 1).all()


PLANTED = {
    "not an image": {"8.png": b"nothing", "8.txt": "x"},
    "empty": {"8.png": b"", "8.txt": "x"},
    "line 1 is not UTF-8": {"8.png": 8, "8.txt": b"caf\xe9"},
    "mask is 12x9": {"8.png": 8, "8.txt": "x", "8.mask.png": encoded(noise(12, 9))},
    "the mask: not an image": {"8.png": 8, "8.txt": "x", "8.mask.png": b"nothing"},
}


@pytest.mark.parametrize("said", PLANTED)
def test_a_fault_is_refused_before_the_first_batch(folder, said):
    write(folder, PLANTED[said])
    with pytest.raises(ValueError, match=rf"^8\.(png|txt): .*{said}") as told:
        dataset(folder, masks="file")
    assert "\n" not in str(told.value)


def test_what_must_not_be_enlarged_and_steps_that_are_no_latents_are_refused(folder):
    write(folder, {"8.png": 8, "8.txt": "x"})
    with pytest.raises(ValueError, match=r"8\.png: 12x8 is smaller than 16 pixels"):
        dataset(folder, bucket_no_upscale=True)
    write(folder, {"9.png": 9})
    with pytest.raises(ValueError, match=r"9\.png: no caption: learnt without a caption$"):
        dataset(folder, strict=True)
    with pytest.raises(ValueError, match="bucket_reso_steps: must be a multiple of 8"):
        dataset(folder, bucket_reso_steps=12)


def test_an_image_that_breaks_later_is_named(folder):
    found = dataset(folder, 1)
    for file in folder.glob("*.png"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^\d\.png: image file is truncated"):
        found[0]


def test_a_survey_tells_every_fault(folder):
    write(folder, {"8.png": b"x", "8.txt": "x", "9.png": b"", "9.txt": "x"})
    recipe = data(folder)
    found = collect_image_infos(open_image_sources(recipe).samples, buckets_from_config(recipe))
    assert [look.key for look in found if hasattr(look, "kind")] == ["8.png", "9.png"] and len(found) == 9


def test_repeats_and_several_places(tmp_path):
    write(
        tmp_path,
        {
            "a/3_dog/x.png": 0,
            "a/3_dog/y.png": 1,
            "b/z.png": 2,
            "b/metadata.jsonl": json.dumps({"file_name": "z.png", "text": "t"}),
        },
    )
    recipe = ImageDataConfig(train_data_dir=(tmp_path / "a", tmp_path / "b"), resolution=32, bucket_reso_steps=8)
    found = ImageDataset(recipe, 7, 0, 8)
    assert sorted(found[0]["keys"]) == ["2:z.png"] + ["3_dog/x.png"] * 3 + ["3_dog/y.png"] * 3
    assert sorted(set(found[0]["captions"])) == ["dog", "t"]


def test_broken_images_are_left_out_where_the_recipe_says_so(tmp_path):
    """Also those whose headers are sound; the others and their batches are as if the broken ones were not there."""
    files = {"a.png": 0, "b.png": 1, "a.txt": "x", "b.txt": "y"}
    plain = dataset(write(tmp_path / "plain", files))
    whole = encoded(noise(64, 64, 5))
    broken = {"c.png": whole[: len(whole) // 2], "c.txt": "z", "d.jpg": "no image", "d.txt": "z"}
    write(tmp_path / "broken", {**files, **broken})
    with pytest.raises(ValueError, match="not an image"):
        dataset(tmp_path / "broken")
    skipping = dataset(tmp_path / "broken", skip_broken=True)
    assert skipping.sample_digests() == plain.sample_digests()
    assert [(n.key, n.severity) for n in skipping.notices] == [("c.png", "notice"), ("d.jpg", "notice")]
    assert "Left out, or used otherwise than it is: 2" in summarize_dataset(skipping)
