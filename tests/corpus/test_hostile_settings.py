"""Other tools' metadata that anybody may have written: settings or one line in a second, whatever the graph or text."""

import json
import time

import pytest
from images_of_tools import comfy, graph, node, png

from ldm.jobs.image_settings import read_image_settings

SAMPLER = {"steps": 1, "cfg": 1, "sampler_name": "euler"}


def doubled(count):
    """Texts each of which is the next one twice."""
    parts = [node("StringConcatenate", string_a=[f"t{k + 1}", 0], string_b=[f"t{k + 1}", 0]) for k in range(count)]
    return {f"t{k}": part for k, part in enumerate(parts)}


def invoke(prompt):
    return png(invokeai_metadata=json.dumps({"positive_prompt": prompt}))


CASES = {  # the file, and what the error says; "" where there are settings
    "a conditioning of itself": (comfy(n6=node("Combine", conditioning=["n6", 0], conditioning_2=["n6", 0])), ""),
    "a sampler of itself": (
        comfy(n3=node("KSampler", **{**SAMPLER, "latent_image": ["n3", 0], "model": ["n3", 0], "seed": ["n3", 0]})),
        "",
    ),
    "texts that double": (
        png(prompt=json.dumps(graph(n6=node("CLIPTextEncode", text=["t0", 0])) | doubled(90))),
        "",
    ),
    "a chain of samplers": (
        png(prompt=json.dumps({f"{k}": node("K", **SAMPLER, samples=[f"{k + 1}", 0]) for k in range(5000)})),
        "",
    ),
    "depth": (png(prompt="[" * 900_000), "nested too deeply"),
    "depth of objects": (png(parameters='{"prompt":' * 90_000), "nested too deeply"),
    "brackets": (invoke("(" * 90_000), "at most 100000"),
    "signs": (invoke("+" * 99_000 + "x"), ""),
    "words": (invoke("a+b-" * 24_000), ""),
    "an old command line": (png(Dream="[" * 900_000), "longer than"),
    "pairs": (png(parameters="a\nSteps: 3, Sampler: x, " + "AA: 1, " * 90_000), ""),
    "blanks": (png(parameters="a\nSteps: 3, Sampler: x, A1:" + " " * 500_000 + "x"), ""),
    "digits": (png(parameters=f"a\nSteps: 3, Sampler: x, Size: {'1' * 9000}x{'2' * 9000}"), ""),
    "no prompt": (png(invokeai_metadata="{}"), "no prompt"),
    "lists": (png(**{"sd-metadata": '{"image": []}'}), "no image"),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_settings_are_read_or_refused_in_a_moment(case, tmp_path):
    data, said = CASES[case]
    (tmp_path / "x.png").write_bytes(data)
    start = time.process_time()
    if said:
        with pytest.raises(ValueError, match=said):
            read_image_settings(tmp_path / "x.png")
    else:
        settings = read_image_settings(tmp_path / "x.png")
        assert len(settings.values.get("prompt", "")) < 100_000 and all(len(text) < 300 for text in settings.lost)
    assert time.process_time() - start < 3
