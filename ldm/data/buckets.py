"""Aspect-ratio buckets: each batch has one size, and all sizes have about the same area."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

ImageSize = tuple[int, int]  # width, height


def format_size(size: ImageSize) -> str:
    """A size as "512x768", width first."""
    return f"{size[0]}x{size[1]}"


class BucketPlacement(NamedTuple):
    """An image is resized to `resized_size`, which covers `bucket`, then cropped to `bucket`."""

    bucket: ImageSize
    resized_size: ImageSize

    @property
    def crop_margin(self) -> ImageSize:
        """Pixels that the crop removes, horizontally and vertically."""
        return self.resized_size[0] - self.bucket[0], self.resized_size[1] - self.bucket[1]

    @property
    def cropped_fraction(self) -> float:
        """The part of the image's area that the crop removes."""
        return 1 - math.prod(self.bucket) / math.prod(self.resized_size)


@dataclass(frozen=True)
class AspectRatioBuckets:
    """Sizes of at most `resolution`^2 pixels, sides multiples of `step` from `min_size` to `max_size`, as in kohya.

    With `no_upscale` an image is never enlarged: its bucket is its own size, or its size at that area, rounded down to
    multiples of `step`. ValueError where there is no such size.
    """

    resolution: int
    step: int
    min_size: int
    max_size: int
    no_upscale: bool = False

    def __post_init__(self) -> None:
        if self.step <= 0 or not self.step <= self.min_size <= self.resolution <= self.max_size:
            values = f"resolution {self.resolution}, min {self.min_size}, max {self.max_size}, steps of {self.step}"
            raise ValueError(f"buckets: need steps <= min <= resolution <= max, not {values}")

    @cached_property
    def sizes(self) -> tuple[ImageSize, ...]:
        """All sizes, narrow to wide: for each width the greatest height, and the same transposed."""
        area, step = self.resolution**2, self.step
        sizes = {(self.resolution // step * step,) * 2}
        for width in range(-(-self.min_size // step) * step, self.max_size + 1, step):
            height = min(self.max_size, area // width) // step * step
            if height >= self.min_size:
                sizes |= {(width, height), (height, width)}
        return tuple(sorted(sizes))

    def assign(self, width: int, height: int) -> BucketPlacement:
        """The bucket nearest in log aspect ratio. ValueError for less than one step a side where upscaling is off."""
        if self.no_upscale:
            return self._assign_without_upscale(width, height)
        ratio = math.log(width / height)
        bucket = min(self.sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1]))
        scale = max(bucket[0] / width, bucket[1] / height)
        return BucketPlacement(bucket, (max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))))

    def _assign_without_upscale(self, width: int, height: int) -> BucketPlacement:
        scale = min(1.0, self.resolution / math.sqrt(width * height), self.max_size / max(width, height))
        resized = round(width * scale), round(height * scale)
        bucket = resized[0] // self.step * self.step, resized[1] // self.step * self.step
        if 0 in bucket:
            raise ValueError(f"{width}x{height} is smaller than {self.step} pixels a side, and must not be enlarged")
        return BucketPlacement(bucket, resized)
