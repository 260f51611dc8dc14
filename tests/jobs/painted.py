"""The folder of a finished job whose pictures are of one colour each."""

import json

from PIL import Image

from ldm.metadata import save_png
from ldm.pipeline.request import Request

SETTLED = Request("", "", 0, 32, 48, 6, 3.0, "dpmpp_2m", "trailing")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def line_of(number, request, **changes):
    name = f"{number:024x}"[::-1]
    file = f"images/{name[:2]}/{name}.png"
    line = {
        "id": name,
        "status": "done",
        "file": file,
        "sha256": "0" * 64,
        "line": number + 1,
        "seconds": 0.5,
        "request": request.to_record(),
        **changes,
    }
    return json.loads(json.dumps(line))


def write_job(folder, requests, draw=True, model="tiny"):
    """A finished job's folder: pictures of one colour each, a manifest, and the lines in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line_of(k, request) for k, request in enumerate(requests)]
    for k, (request, line) in enumerate(zip(requests, lines, strict=True) if draw else ()):
        colour = COLOURS[k % len(COLOURS)]
        save_png(Image.new("RGB", (request.width, request.height), colour), folder / line["file"], {})
    (folder / "job.json").write_text(json.dumps({"source": "prompts.txt", "model": model}))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines
