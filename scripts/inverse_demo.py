"""Undo a reduction, a cut and a loss of colour with the decoder in the loop; print residuals, write a sheet.

    python scripts/inverse_demo.py [--prompt "a red apple on a blue background"] [--steps 20] [--out out/inverse.png]

The picture is one that the model draws with seed 1; what is restored starts from seed 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

from ldm import Pipeline, Request
from ldm.analysis.inverse_problems import OPERATORS, tmpd
from ldm.checkpoints.formats import PICTO_PATH
from ldm.diffusion.samplers import sample
from ldm.diffusion.singlestep import ddim
from ldm.diffusion.timesteps import SPACINGS
from ldm.image_io import contact_sheet, from_uint8, to_pil
from ldm.nn.vae import decode_latents, latent_shape
from ldm.rng import Noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PICTO_PATH)
    parser.add_argument("--prompt", default="a red apple on a blue background")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.02, help="of the measurement, pixels in [-1, 1]")
    parser.add_argument("--out", type=Path, default=Path("out/inverse.png"))
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model)
    vae, denoise = pipe.model.vae, pipe.cfg_denoiser([args.prompt], [""])
    (drawn,) = pipe.generate([Request(args.prompt, seed=1)])
    picture = from_uint8(torch.tensor(list(drawn.tobytes())).view(1, drawn.height, drawn.width, 3)).to(pipe.device)
    left = torch.zeros(picture.shape[-2:], device=pipe.device)
    left[:, : drawn.width // 2] = 1
    operators = {
        "inpaint": OPERATORS["inpaint"](left),
        "super_resolution": OPERATORS["super_resolution"](4),
        "colourise": OPERATORS["colourise"](),
    }
    noise, grid = Noise([0]), SPACINGS["log_snr"](pipe.model.sde, args.steps)
    x = noise(torch.empty(1, *latent_shape(vae, drawn.height, drawn.width), device=pipe.device))
    with torch.no_grad():
        plain = decode_latents(vae, sample(ddim, denoise, x, grid, noise))
    panels, captions = to_pil(torch.cat([picture, plain])), ["the picture", "unconditioned"]
    for name, operator in operators.items():
        y = operator(picture) + args.noise * Noise([2])(operator(picture))
        known = tmpd(denoise, lambda z, operator=operator: operator(decode_latents(vae, z)), y, args.noise)  # type: ignore[misc]
        with torch.no_grad():
            restored = decode_latents(vae, sample(ddim, known, x, grid, noise))
        residuals = [(operator(image) - y).square().mean().sqrt().item() for image in (restored, plain)]
        print(f"{name}: residual rms {residuals[0]:.4f}, unconditioned {residuals[1]:.4f}", flush=True)
        seen = F.interpolate(y.expand(-1, 3, -1, -1), picture.shape[-2:])
        panels += to_pil(torch.cat([seen, restored]))
        captions += [f"{name}: seen", f"{name}: restored"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(panels, captions, 2).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
