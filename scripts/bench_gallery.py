"""How fast a job's gallery is made, opens and scrolls in a headless Chromium; and its figure for the README.

    python scripts/bench_gallery.py [--counts 10000 100000] [--size 512]
    python scripts/bench_gallery.py --figure JOB --out docs/figures/gallery.png [--address '#sort=seed']

The jobs are synthetic: their thumbnails are links to 512 different ones, which the browser cannot know. A frame lasts
from one callback of requestAnimationFrame to the next; the row `page at rest` is what no scrolling can beat. Last,
thumbnails in single files against sheets of 64: the 60 of a screen, neighbours or from anywhere.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from _browser import Browser, find_browser
from PIL import Image

from ldm.jobs import gallery
from ldm.metadata import save_png
from ldm.pipeline.request import Request

NUM_DISTINCT = 512  # images
SHEET, SCREEN, SIDE = 64, 60, 128  # thumbnails per sheet and per screen; pixels of a side
REQUEST = Request("", height=SIDE, width=SIDE, num_inference_steps=30, guidance_scale=2.5)
VOCABULARY = "red green small large round apple banana car cat house star moon on under"
FRAMES = """(async () => {
  const gaps = [];
  await new Promise(requestAnimationFrame);
  let last = performance.now();
  for (let k = 0; k < 300; k++) {
    STEP;
    await new Promise(requestAnimationFrame);
    gaps.push(performance.now() - last);
    last = performance.now();
  }
  return gaps;
})()"""


def random_image(rng: random.Random, size: int) -> Image.Image:
    """An image that is neither flat nor noise: 8x8 random colours, enlarged."""
    small = Image.frombytes("RGB", (8, 8), rng.randbytes(192))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def write_job(folder: Path, count: int) -> None:
    """A job of `count` items with random prompts, whose images and thumbnails are links."""
    rng = random.Random(0)
    names = [f"{rng.getrandbits(96):024x}" for _ in range(count)]
    lines = []
    for k, name in enumerate(names):
        request = replace(
            REQUEST, prompt=" ".join(rng.choices(VOCABULARY.split(), k=12)), seed=k % 1000, eta=rng.randrange(3) / 2
        )
        line: dict[str, Any] = {"id": name, "status": "done", "file": f"images/{name[:2]}/{name}.png", "sha256": ""}
        lines.append(line | {"line": k + 1, "seconds": 0.4, "request": request.to_record()})
        files = folder / str(line["file"]), gallery.thumbnail_path(folder, line)
        first = [folder / f"first-{k % NUM_DISTINCT}{file.suffix}" for file in files]
        if k < NUM_DISTINCT:
            save_png(random_image(rng, SIDE), first[0], {})
            Image.open(first[0]).save(first[1], "WEBP", quality=82)
        for own, shared in zip(files, first, strict=True):
            own.parent.mkdir(parents=True, exist_ok=True)
            os.link(shared, own)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def median_ms(browser: Browser, script: str, rounds: int = 5) -> float:
    """The median milliseconds of a script in the page."""
    clock = f"(() => {{ const start = performance.now(); {script}; return performance.now() - start; }})()"
    return statistics.median(browser.run(clock) for _ in range(rounds))


def time_frames(browser: Browser, step: str) -> str:
    """Median, 99th percentile and longest of 300 frames, in ms, each after a step."""
    gaps = sorted(browser.run(FRAMES.replace("STEP", step)))
    return f"{gaps[150]:.0f} | {gaps[296]:.0f} | {gaps[-1]:.0f}"


def measure(browser: Browser, folder: Path, count: int) -> None:
    """Print how long the page of a job takes to write, open, search and scroll."""
    write_job(folder, count)
    start = time.perf_counter()
    page = gallery.write_gallery(folder)
    made = time.perf_counter() - start
    size = sum(file.stat().st_size for file in (folder / gallery.GALLERY_DATA).iterdir()) + page.stat().st_size
    start = time.perf_counter()
    browser.open(page, until="document.querySelectorAll('.tile').length > 0")
    first = time.perf_counter() - start
    browser.wait("rows.length === header.count")
    whole = time.perf_counter() - start
    print(f"\n## {count:,} images\n")
    print(
        f"written in {made:.1f} s, {size / 1e6:.1f} MB; first tiles after {first:.2f} s, all rows after {whole:.2f} s\n"
    )
    print("| what | ms |\n|---|---|")
    for what, script in {
        "search: two words": "state.q = 'red apple'; refresh()",
        "filter: one value": "state.q = ''; want('eta', '0.5'); refresh()",
        "sort by prompt": "filters.clear(); state.sort = 'prompt'; refresh()",
        "back to all": "state.sort = ''; refresh()",
    }.items():
        print(f"| {what} | {median_ms(browser, script):.0f} |")
    print("\n| frames, ms | median | 99 % | longest |\n|---|---|---|---|")
    for what, step in {
        "page at rest": "0",
        "scrolling, 200 pixels a frame": "scrollBy(0, 200)",
        "scrolling, a screen a frame": "scrollBy(0, innerHeight)",
        "jumping anywhere": "scrollTo(0, Math.random() * document.body.scrollHeight)",
    }.items():
        browser.run("scrollTo(0, 0)")
        print(f"| {what} | {time_frames(browser, step)} |")
    print(f"\ntiles in the document: {browser.run('document.querySelectorAll(`.tile`).length')}")


def measure_thumbnails(size: int, count: int = 64) -> None:
    """Print how long a thumbnail takes to make."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [{"id": f"{k:024d}", "file": f"{k}.png"} for k in range(count)]
        for line in lines:
            save_png(random_image(rng, size), folder / line["file"], {})
        start = time.perf_counter()
        gallery.make_thumbnails(folder, lines)
        print(f"\na thumbnail of {size}x{size}: {(time.perf_counter() - start) / count * 1e3:.1f} ms")


def compare_sheets(browser: Browser, folder: Path) -> None:
    """Print how long it takes to read and decode 60 thumbnails, from single files and from sheets of 64."""
    rng = random.Random(1)
    files, packed = [folder / f"{k}.webp" for k in range(SCREEN * SHEET)], []
    for k in range(SCREEN):
        side = int(SHEET**0.5)
        sheet = Image.new("RGB", (side * SIDE, side * SIDE))
        for j, file in enumerate(files[k * SHEET : (k + 1) * SHEET]):
            small = random_image(rng, SIDE)
            small.save(file, "WEBP", quality=82, method=2)
            sheet.paste(small, (j % side * SIDE, j // side * SIDE))
        packed.append(folder / f"sheet-{k}.webp")
        sheet.save(packed[-1], "WEBP", quality=82, method=2)
    (folder / "empty.html").write_text("<!doctype html>")
    anywhere = [k * SHEET for k in range(SCREEN)]
    print("\n| 60 thumbnails, ms | single files | sheets of 64 |\n|---|---|---|")
    for what, own, shared in (
        ("neighbours", files[:SCREEN], packed[:1]),
        ("from anywhere", [files[k] for k in anywhere], packed),
    ):
        print(f"| {what} | {time_decoding(browser, folder, own):.0f} | {time_decoding(browser, folder, shared):.0f} |")
    sizes = [sum(file.stat().st_size for file in some) / len(files) for some in (files, packed)]
    print(f"| bytes a thumbnail | {sizes[0]:.0f} | {sizes[1]:.0f} |")


def time_decoding(browser: Browser, folder: Path, files: Iterable[Path], rounds: int = 5) -> float:
    """Median milliseconds until the browser, with empty caches, has read and decoded images."""
    names = json.dumps([file.name for file in files])
    script = f"""(async () => {{
      const start = performance.now();
      await Promise.all({names}.map((name) => {{
        const image = Object.assign(new Image(), {{ src: `${{name}}?${{start}}` }});
        return image.decode();
      }}));
      return performance.now() - start;
    }})()"""
    times = []
    for _ in range(rounds):
        browser.open(folder / "empty.html")
        times.append(browser.run(script))
    return statistics.median(times)


def write_figure(browser: Browser, job: Path, address: str, out: Path) -> None:
    """Write a screenshot of a job's page, its levels rounded to multiples of 4: half the bytes, invisible."""
    browser.resize(1280, 720)
    browser.open(gallery.write_gallery(job), address, "tiles.size > 0 && !filling")
    browser.wait("[...document.images].every((img) => img.complete)")
    time.sleep(1)  # until the last images are painted
    image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    out.parent.mkdir(parents=True, exist_ok=True)
    image.point([min(255, (level + 2) // 4 * 4) for level in range(256)] * 3).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--size", type=int, default=512, help="pixels a side of the images that thumbnails are made of")
    parser.add_argument("--figure", type=Path, metavar="JOB")
    parser.add_argument("--address", default="", help="the state of the page in the figure")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/gallery.png"))
    args = parser.parse_args()
    program = find_browser()
    if program is None:
        parser.error("no Chromium on this machine: apt install chromium")
    with Browser(program) as browser, tempfile.TemporaryDirectory() as root:
        if args.figure:
            return write_figure(browser, args.figure, args.address, args.out)
        for count in args.counts:
            (folder := Path(root) / str(count)).mkdir()
            measure(browser, folder, count)
        measure_thumbnails(args.size)
        (folder := Path(root) / "sheets").mkdir()
        compare_sheets(browser, folder)


if __name__ == "__main__":
    main()
