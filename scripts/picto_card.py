"""Copy a trained picto to weights/picto and plot the curves of its three trainings there.

    python scripts/picto_card.py [--runs runs/picto] [--out weights/picto]

MODEL_CARD.md and NOTICE, which are written by hand, stay.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ldm.train.card import read_curve, render_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/picto"))
    parser.add_argument("--out", type=Path, default=Path("weights/picto"))
    args = parser.parse_args()
    shutil.copytree(args.runs / "unet" / "export", args.out, dirs_exist_ok=True)
    vae, clip, unet = (args.runs / name / "log.jsonl" for name in ("vae", "clip", "unet"))
    panels = {
        "VAE: loss (log scale)": {"training": read_curve(vae, "loss")},
        "VAE: PSNR of held-out images, dB": {"held out": read_curve(vae, "val_psnr")},
        "CLIP: contrastive loss": {"training": read_curve(clip, "loss")},
        "U-Net: loss (log scale)": {"training": read_curve(unet, "loss"), "held out": read_curve(unet, "val_loss")},
    }
    (args.out / "curves.svg").write_text(render_figure(panels), encoding="utf-8")


if __name__ == "__main__":
    main()
