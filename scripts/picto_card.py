"""Copy a trained picto to weights/picto and draw the curves of its three trainings into it.

    python scripts/picto_card.py [--runs runs/picto] [--out weights/picto]

MODEL_CARD.md and NOTICE, which are written by hand, stay.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ldm.train.card import read_curve, render_figure, render_panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/picto"))
    parser.add_argument("--out", type=Path, default=Path("weights/picto"))
    args = parser.parse_args()
    shutil.copytree(args.runs / "unet" / "export", args.out, dirs_exist_ok=True)
    vae, clip, unet = (args.runs / name / "log.jsonl" for name in ("vae", "clip", "unet"))
    panels = [
        render_panel("VAE: loss (log scale)", {"training": read_curve(vae, "loss")}, 0, log_scale=True),
        render_panel("VAE: PSNR of held-out pictures, dB", {"held out": read_curve(vae, "val_psnr")}, 420),
        render_panel("CLIP: contrastive loss", {"training": read_curve(clip, "loss")}, 840),
        render_panel(
            "U-Net: loss (log scale)",
            {"training": read_curve(unet, "loss"), "held out": read_curve(unet, "val_loss")},
            1260,
            log_scale=True,
        ),
    ]
    (args.out / "curves.svg").write_text(render_figure(panels), encoding="utf-8")


if __name__ == "__main__":
    main()
