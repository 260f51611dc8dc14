"""Buckets: about one area, every shape at home, nothing enlarged that must not be."""

import math

import numpy as np
import pytest

from ldm.data.buckets import AspectRatioBuckets

SD = AspectRatioBuckets(512, 64, 256, 1024)
MANY = [tuple(map(int, size)) for size in np.random.default_rng(0).integers(20, 4000, (300, 2))]


def kohya(resolution, step, least, most):
    """`make_bucket_resolutions` of kohya's trainers, restated: all widths from the least, and both ways round."""
    found = {(resolution // step * step, resolution // step * step)}
    for width in range(least, most + 1, step):
        height = min(most, resolution * resolution // width // step * step)
        if height >= least:
            found |= {(width, height), (height, width)}
    return sorted(found)


@pytest.mark.parametrize("numbers", [(512, 64, 256, 1024), (1024, 64, 512, 2048), (128, 8, 64, 256), (96, 32, 32, 96)])
def test_sizes_are_kohya_s(numbers):
    buckets = AspectRatioBuckets(*numbers)
    assert list(buckets.sizes) == kohya(*numbers)
    assert {(h, w) for w, h in buckets.sizes} == set(buckets.sizes)
    for width, height in buckets.sizes:
        assert width % numbers[1] == height % numbers[1] == 0 and width * height <= numbers[0] ** 2
        assert numbers[2] <= min(width, height) and max(width, height) <= numbers[3]


def test_one_size_where_all_sides_are_the_resolution():
    assert AspectRatioBuckets(512, 64, 512, 512).sizes == ((512, 512),)


@pytest.mark.parametrize("size", [*SD.sizes, (2048, 512), (384, 384)])
def test_an_image_of_a_bucket_s_shape_loses_nothing(size):
    placement = SD.assign(*size)
    assert placement.crop_margin == (0, 0)
    if size in SD.sizes:
        assert placement.bucket == placement.resized_size == size


@pytest.mark.parametrize("buckets", [SD, AspectRatioBuckets(128, 8, 64, 256)])
def test_resizing_covers_and_keeps_the_shape_and_turns_with_the_image(buckets):
    for width, height in MANY:
        bucket, resized = buckets.assign(width, height)
        gaps = [math.log(a / b * height / width) for a, b in buckets.sizes]
        assert abs(math.log(bucket[0] / bucket[1] * height / width)) == min(map(abs, gaps))
        assert resized[0] >= bucket[0] and resized[1] >= bucket[1] and bucket in buckets.sizes
        assert resized[0] == bucket[0] or resized[1] == bucket[1]
        scale = max(bucket[0] / width, bucket[1] / height)
        assert max(abs(resized[0] - width * scale), abs(resized[1] - height * scale)) < 1
        assert buckets.assign(height, width) == (bucket[::-1], resized[::-1])


def test_nothing_is_enlarged_where_that_is_forbidden():
    buckets = AspectRatioBuckets(512, 64, 256, 1024, no_upscale=True)
    for width, height in MANY:
        if min(width, height) * min(1, 512 / math.sqrt(width * height), 1024 / max(width, height)) < 64:
            with pytest.raises(ValueError, match="smaller than 64"):
                buckets.assign(width, height)
            continue
        bucket, resized = buckets.assign(width, height)
        assert resized[0] <= width and resized[1] <= height and max(resized) <= 1024
        assert all(0 <= slack < 64 for slack in buckets.assign(width, height).crop_margin) and bucket[0] % 64 == 0
        if width * height <= 512**2 and max(width, height) <= 1024:
            assert resized == (width, height)
    assert buckets.assign(300, 200) == ((256, 192), (300, 200))


@pytest.mark.parametrize("numbers", [(512, 0, 256, 1024), (512, 64, 600, 1024), (512, 64, 256, 500), (32, 64, 32, 64)])
def test_sizes_that_cannot_be_are_refused(numbers):
    with pytest.raises(ValueError, match="buckets: need steps"):
        AspectRatioBuckets(*numbers)
