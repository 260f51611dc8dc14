"""Build the emoji dataset: data/emoji, about 730 MB on disk from a download of 46 MB."""

import argparse
import sys
from pathlib import Path

from ldm.picto.emoji import DownloadError, build_emoji_dataset


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="output folder")
    parser.add_argument("--size", type=int, default=128, help="side of a sprite in pixels")
    options = parser.parse_args()
    try:
        made = build_emoji_dataset(options.out, options.size)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {'made' if made else 'already made'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
