"""The decoder of Stable Diffusion 1.5, random weights, at once and in strips: CPU time, memory, difference.

    python scripts/bench_tiling.py [--sizes 512 1024 2048] [--once-to 1024]

Each in a process of its own; memory is the peak above the loaded network. The difference is that of the float32 images,
whose values reach about 2.
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from ldm.checkpoints.families import FAMILIES
from ldm.hardware import to_device
from ldm.nn.vae import build_vae, decode_latents


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def decode(size: int, is_tiled: bool, out: Connection) -> None:
    torch.manual_seed(0)
    vae = build_vae(FAMILIES["sd1"].vae).eval().requires_grad_(False)
    del vae.encoder
    vae = to_device(vae, torch.device("cpu"))
    if is_tiled:
        vae.enable_tiling()
    latents = torch.randn(1, 4, size // 8, size // 8)
    before = peak = resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.process_time()
    with torch.inference_mode():
        image = decode_latents(vae, latents)
    seconds = time.process_time() - start
    done.set()
    thread.join()
    out.send((seconds, peak - before, image.numpy()))


def measure(size: int, is_tiled: bool) -> tuple[float, int, torch.Tensor]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=decode, args=(size, is_tiled, theirs))
    process.start()
    seconds, memory, image = ours.recv()
    process.join()
    return seconds, memory, torch.from_numpy(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--once-to", type=int, default=1024, help="the largest size that is decoded at once, too")
    options = parser.parse_args()
    print("| size | s, at once | s, in strips | MB, at once | MB, in strips | difference |\n|---|---|---|---|---|---|")
    for size in options.sizes:
        seconds, memory, image = measure(size, True)
        once = measure(size, False) if size <= options.once_to else None
        texts = (f"{once[0]:.0f}", f"{once[1] / 2**20:.0f}", f"{(once[2] - image).abs().max():.1e}") if once else "---"
        print(
            f"| {size} | {texts[0]} | {seconds:.0f} | {texts[1]} | {memory / 2**20:.0f} | {texts[2]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
