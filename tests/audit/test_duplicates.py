"""Duplicates: the library's hash, found whatever is done to an image that does not change it, and only then."""

import io

import imagehash
import numpy as np
import pytest
from faulty_dataset import smooth
from image_files import noise
from PIL import Image, ImageEnhance

from ldm.audit.duplicates import (
    MAX_HASH_DISTANCE,
    find_identical_files,
    find_near_duplicates,
    fingerprint_image,
    perceptual_hash,
)
from ldm.data.sources import ImageSample


def told(pictures):
    pairs = [(ImageSample(f"{k}", "x", bytes), fingerprint_image(picture)) for k, picture in enumerate(pictures)]
    return {(issue.key, issue.what.split(":")[0]) for issue in find_near_duplicates(pairs)}


@pytest.mark.parametrize("picture", [smooth(0), smooth(1, 130, 50), Image.fromarray(noise(90, 70))])
def test_the_hash_is_the_library_s(picture):
    theirs = imagehash.phash(picture)
    assert perceptual_hash(picture) == int(str(theirs), 16)


def saved(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return Image.open(file).convert("RGB")


SAME = {
    "a JPEG": lambda p: saved(p, "JPEG", quality=60),
    "a WebP": lambda p: saved(p, "WEBP", quality=60),
    "half the size": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS),
    "a little brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.02),
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_image_is_found_again(change):
    pictures = [smooth(k, 96, 96) for k in range(20)]
    again = [SAME[change](picture) for picture in pictures]
    assert told([*pictures, *again]) == {(f"{k + 20}", f"looks like {k}") for k in range(20)}


def test_other_images_are_not():
    pictures = [smooth(k) for k in range(300)]
    hues = [Image.fromarray(np.roll(np.asarray(p), 1, 2)) for p in pictures[:50]]  # other colours, much the same shape
    mirrored = [p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in pictures[:50]]
    assert told([*pictures, *mirrored]) == set()
    greyish = [p.convert("L").convert("RGB") for p in pictures[:50]]
    apart = [(perceptual_hash(p) ^ perceptual_hash(q)).bit_count() for p, q in zip(pictures[:50], greyish, strict=True)]
    assert max(apart) <= MAX_HASH_DISTANCE and told([*pictures[:50], *greyish]) == set() == told([*pictures, *hues])


def test_the_same_file_is_told_once_each_with_the_first():
    samples = [ImageSample(key, caption, bytes) for key, caption in zip("abcd", "xxyx", strict=True)]
    assert [(f.kind, f.key) for f in find_identical_files(list(zip(samples, "1112", strict=True)))] == [
        ("same image", "b"),
        ("other caption", "c"),
    ]
