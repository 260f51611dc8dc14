"""Sources: the same requests whatever kind of file they are in; wildcards are a function of the record and its seed."""

import csv
import io
import itertools
import json
import os
import pickle
import sys
import threading
import tracemalloc
from collections import Counter
from functools import partial

import pytest
from PIL import Image

from ldm.jobs.source import open_prompt_source
from ldm.nn.text_encoders import convert_clip_skip
from ldm.pipeline.request import Request

RECORDS = [
    {"prompt": "a red fox, é 雪", "negative_prompt": "blurry, (bad:1.3)", "seed": 7, "num_inference_steps": 4},
    {"prompt": 'two "stars"', "guidance_scale": 1e-1, "width": 48, "height": 32, "sampler": "euler_ancestral"},
    {"prompt": "a cat", "sampler": "dpmpp_2m", "spacing": "karras", "eta": 0.0, "original_size": [512, 768]},
]
REQUESTS = [Request(**record) for record in RECORDS]
PLAIN = Request("")


def write(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def web(record):
    """A record as a line of the web UI's."""
    size = {"original_size": lambda pair: f"{pair[0]}x{pair[1]}"}
    return " ".join(f"--{name} {json.dumps(size.get(name, str)(value))}" for name, value in record.items())


def text(records):
    return "# ours\n\n" + "".join(web(record).encode().decode("unicode_escape") + "\n" for record in records)


def table(records):
    file, names = io.StringIO(), sorted({name for record in records for name in record})
    rows = csv.DictWriter(file, names, lineterminator="\n")
    rows.writeheader()
    for record in records:
        pair = {"original_size": "{} x {}".format(*record["original_size"])} if "original_size" in record else {}
        rows.writerow({**record, **pair})
    return file.getvalue()


def parquet(records):
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(records, pa.schema(_columns(pa))), file, row_group_size=2)
    return file.getvalue()


def _columns(pa):
    numbers = {"seed": pa.int32(), "num_inference_steps": pa.float64(), "guidance_scale": pa.float64()}
    sizes = {"width": pa.int64(), "height": pa.int64(), "eta": pa.float32(), "original_size": pa.list_(pa.int16())}
    return {
        **dict.fromkeys(("prompt", "negative_prompt", "sampler", "spacing"), pa.string()),
        **numbers,
        **sizes,
    }.items()


def crlf(records):
    return "\ufeff" + jsonl(records).replace("\n", "\r\n").rstrip()


KINDS = {
    "a.jsonl": jsonl,
    "b.JSONL": crlf,
    "c.txt": jsonl,
    "plain": jsonl,
    "d.csv": table,
    "e.csv": lambda records: "\ufeff" + table(records).replace("\n", "\r\n"),
    "f.parquet": parquet,
    "g": parquet,
}


def requests(path, defaults=PLAIN, **options):
    source = open_prompt_source(path, defaults, **options)
    found = [entry.request for entry in source]
    assert source.validate(lambda request: None) == len(found)
    return found


def drawn(tmp_path, content, name="p.txt", **options):
    """(prompt, seed) of a file's requests."""
    return [(r.prompt, r.seed) for r in requests(write(tmp_path / name, content), **options)]


@pytest.mark.parametrize("name", KINDS)
def test_a_record_is_the_same_request_in_any_kind_of_file(tmp_path, name):
    assert requests(write(tmp_path / name, KINDS[name](RECORDS))) == REQUESTS


def test_clip_skip_counts_as_in_the_web_ui_in_text_and_as_in_diffusers_elsewhere(tmp_path):
    text = write(tmp_path / "a.txt", '--prompt "a cat" --clip_skip 2\na cat --clip_skip 2\n')
    assert [request.clip_skip for request in requests(text)] == [1, 1]
    sd2 = partial(convert_clip_skip, num_layers=23, num_dropped_layers=1, layer_idx=-1)
    assert [request.clip_skip for request in requests(text, convert_clip_skip=sd2)] == [0, 0]
    assert pickle.loads(pickle.dumps(open_prompt_source(text, PLAIN, convert_clip_skip=sd2))).convert_clip_skip(3) == 1
    with pytest.raises(ValueError, match=r"b\.txt:1: clip skip 1: this model has the layers 2 to 24"):
        requests(write(tmp_path / "b.txt", "a --clip_skip 1"), convert_clip_skip=sd2)
    for name, content in (("a.jsonl", '{"prompt": "a", "clip_skip": 2}\n'), ("a.csv", "prompt,clip_skip\na,2\n")):
        assert [request.clip_skip for request in requests(write(tmp_path / name, content))] == [2]


def test_lines_are_those_of_the_file(tmp_path):
    content = "# one\n\na\n  # two\n\n\nb\n"
    assert [entry.line for entry in open_prompt_source(write(tmp_path / "a.txt", content), PLAIN)] == [3, 7]
    content = 'prompt,seed\na,1\n\n"b\nc",2\nd,3\n'
    assert [entry.line for entry in open_prompt_source(write(tmp_path / "a.csv", content), PLAIN)] == [2, 4, 6]


def test_several_seeds_of_a_line_are_several_images(tmp_path):
    assert [seed for _, seed in drawn(tmp_path, "a --d 5,9-11,2\n", count=4)] == [5, 9, 10, 11, 2]


def test_what_a_record_leaves_unsaid_is_the_command_s(tmp_path):
    """Record k, image j uses S + j."""
    defaults = Request("", negative_prompt="bad", seed=40, num_inference_steps=5, sampler="heun")
    path = write(
        tmp_path / "a.jsonl",
        jsonl([{"prompt": "a"}, {"prompt": "b", "seed": 7, "count": 3}, {"prompt": "c", "negative": ""}]),
    )
    found = requests(path, defaults, count=2)
    assert [(r.prompt, r.seed) for r in found] == [
        ("a", 40),
        ("a", 41),
        ("b", 7),
        ("b", 8),
        ("b", 9),
        ("c", 40),
        ("c", 41),
    ]
    assert [r.negative_prompt for r in found] == ["bad"] * 5 + [""] * 2
    assert {(r.num_inference_steps, r.sampler) for r in found} == {(5, "heun")}


def test_yaml_is_every_combination_in_the_order_of_the_file(tmp_path):
    content = "prompts: [a, no, 12]\nseeds: [0-2, 7]\nguidance: [1, 2e0]\nsampler: [Euler a, heun]\nsteps: 3\neta: ~\n"
    found = requests(write(tmp_path / "a.yaml", content))
    axes = (["a", "no", "12"], [1.0, 2.0], ["euler_ancestral", "heun"], [0, 1, 2, 7])
    assert [(r.prompt, r.guidance_scale, r.sampler, r.seed) for r in found] == list(itertools.product(*axes))
    assert {r.num_inference_steps for r in found} == {3}


def test_yaml_tells_the_prompt_s_line_and_repeats_one_that_is_counted(tmp_path):
    source = open_prompt_source(write(tmp_path / "a.yml", "seed: 3\ncount: 2\nprompts:\n- a\n- |\n  b\n  c\n"), PLAIN)
    assert [(e.line, e.request.prompt, e.request.seed) for e in source] == [
        (4, "a", 3),
        (4, "a", 4),
        (5, "b\nc\n", 3),
        (5, "b\nc\n", 4),
    ]


def test_a_hundred_million_seeds_are_neither_listed_nor_asked_about(tmp_path):
    source = open_prompt_source(write(tmp_path / "a.yaml", "prompts: [a, b]\nseeds: 5-100000004\n"), PLAIN)
    asked = []
    assert source.validate(asked.append) == 2 * 10**8
    assert sorted((r.prompt, r.seed) for r in asked) == [(p, s) for p in "ab" for s in (5, 100000004)]
    tracemalloc.start()
    assert next(iter(source)).request == Request("a", seed=5)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_standard_input_and_pipes_are_read_once_and_iterated_often(tmp_path, monkeypatch):
    for content in (jsonl(RECORDS), text_of(["a cat", "two stars"])):
        wanted = requests(write(tmp_path / "a.txt", content))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert requests("-") == wanted
        os.mkfifo(pipe := tmp_path / "pipe")
        writer = threading.Thread(target=pipe.write_bytes, args=[content.encode()])
        writer.start()
        assert requests(pipe) == wanted
        writer.join()
        pipe.unlink()


def text_of(prompts):
    return "".join(f"{prompt}\n" for prompt in prompts)


# Wildcards


def wild(folder, **files):
    for name, content in files.items():
        path = folder / "wildcards" / f"{name.replace('/', os.sep)}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


TEMPLATES = [
    ("a {red|blue} cat", ["a red cat", "a blue cat"]),
    ("{a|{b|c} d|}e", ["ae", "b de", "c de", "e"]),
    ("{2::a|0.5::b}{x|y}", ["ax", "ay", "bx", "by"]),
    (r"\{a\|b\} {\}|\||\{}", [r"{a\|b} }", r"{a\|b} |", r"{a\|b} {"]),
    (r"\(x\) (y:1.2) \\{a} | z", [r"\(x\) (y:1.2) \\a | z"]),
    ("{only}", ["only"]),
    (r"a \__colour__ b", ["a __colour__ b"]),
    ("snake__case, ____, __ x __, a_b", ["snake__case, ____, __ x __, a_b"]),
    ("100%{a|b} for $5", ["100%a for $5", "100%b for $5"]),
    # as dynamicprompts 0.31 enumerates them
    ("__hair colour__ __Colour__ish", [f"{a} {b}ish" for a in ("fair", "dark") for b in ("red", "blue é")]),
    ("__colour____hair colour__", [f"{a}{b}" for a in ("red", "blue é") for b in ("fair", "dark")]),
    ("x__colour__y", ["xredy", "xblue éy"]),
    (r"__deep\tree/fir__, (__deep/tree/fir__:1.2)", ["green, (green:1.2)"]),
    ("__*__", ["red", "blue é", "fair", "dark", "l", "sweet(ish)", "[none]"]),
    ("__d??p/*__ __**/fir__", [f"{a} green" for a in ("dog", "red hen", "blue é hen", "x", "y")]),
    ("__sweet(ish)__", ["sweet(ish)"]),
    ("{2$$a|b|c}", ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]),
    ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
    ("{0-1$$a|b}{-2$$|$$c|d}", [f"{x}{y}" for x in ("", "a", "b") for y in ("c", "d", "c|d", "d|c")]),
    ("{9$$a|{b|c}}", ["a,b", "a,c", "b,a", "c,a"]),
    ("{2$$__colour__}", ["red,blue é", "blue é,red"]),
    ("${c={red|blue}}a ${c} ${c}", ["a red red", "a red blue", "a blue red", "a blue blue"]),
    ("${c=!{red|blue}}a ${c} ${c}", ["a red red", "a blue blue"]),
    ("${c=1}${c?=2}${d?=3}${c}${d:4}${e:{5|6}}", ["135", "136"]),
    ("${c=!{x|y}}__use__${c}", ["[x]x", "[y]y"]),
    ("__use(c={x|y})__ __use__", ["[x] [none]", "[y] [none]"]),
    ("__pets/cat__ __pets/big/cat__ __list__", ["tabby lion l", "tom lion l"]),
    (
        "__colour__ {cat|__deep/pet__}",
        [f"{c} {p}" for c in ("red", "blue é") for p in ("cat", "dog", "red hen", "blue é hen")],
    ),
]


@pytest.fixture
def wildcards(tmp_path):
    wild(
        tmp_path,
        colour="# colours\nred\n\n3::blue é\r\n",
        use="[${c:none}]",
        **{"deep/pet": "\ufeffdog\n__colour__ hen"},
    )
    wild(
        tmp_path,
        **{"hair colour": "fair\rdark", "sweet(ish)": "sweet(ish)", "deep/tree/fir": "green", "deep/q": "x\ny"},
    )
    write(tmp_path / "wildcards" / "more.yaml", "pets:\n  cat: [tabby, 2::tom]\n  big:\n    cat: lion\n")
    write(tmp_path / "wildcards" / "list.json", '["l"]')
    return tmp_path


@pytest.mark.parametrize("template, texts", TEMPLATES)
def test_all_enumerates_and_one_is_among_them(wildcards, template, texts):
    assert [p for p, _ in drawn(wildcards, template, expand="all")] == texts
    chosen = [p for p, _ in drawn(wildcards, template, count=200)]
    assert set(chosen) == set(texts)
    assert drawn(wildcards, template, expand="none") == [(template, 0)]


def test_all_generates_each_text_with_each_seed_and_combines_it_with_the_negative_prompt(tmp_path):
    found = requests(write(tmp_path / "p.txt", "{a|b} --n {x|y}"), expand="all", count=2)
    every = itertools.product("ab", "xy", (0, 1))
    assert [(r.prompt, r.negative_prompt, r.seed) for r in found] == list(every)


def test_the_same_record_gives_the_same_prompt_wherever_it_stands(tmp_path):
    record = {"prompt": "{a|b|c|d} {a|b|c|d} {a|b|c|d}", "negative_prompt": "{a|b|c|d}", "seed": 5}
    lone = requests(write(tmp_path / "a.jsonl", jsonl([record])))
    others = [{"prompt": "{x|y}"}, {"prompt": "z", "count": 3}, record]
    assert requests(write(tmp_path / "b.jsonl", jsonl(others)))[-1:] == lone
    counted = requests(write(tmp_path / "c.jsonl", jsonl([{**record, "seed": 3, "count": 4}])))
    assert counted[2:3] == lone


def test_choices_have_their_weights_and_are_independent(tmp_path):
    n = 4000
    seen = Counter(p for p, _ in drawn(tmp_path, "{3::a|b}{c|d}", count=n))
    for word, share in {"ac": 3 / 8, "ad": 3 / 8, "bc": 1 / 8, "bd": 1 / 8}.items():
        assert abs(seen[word] - n * share) < 4 * (n * share * (1 - share)) ** 0.5
    assert {p for p, _ in drawn(tmp_path, "{0::a|b}", count=50)} == {"b"}


def test_several_of_a_choice_have_their_weights(tmp_path):
    n = 4000
    seen = Counter(p for p, _ in drawn(tmp_path, "{2$$3::a|b|0::c}", count=n))
    assert set(seen) == {"a,b", "b,a"} and abs(seen["a,b"] - n * 3 / 4) < 4 * (n * 3 / 16) ** 0.5


def test_marks_choose_in_turn_at_random_and_every_one(wildcards):
    turns = [p for p, _ in drawn(wildcards, "{@red|blue} {!a|b} {!x|y} __@colour__ --d 0-3")]
    assert turns == ["red a x red", "blue a y blue é", "red b x red", "blue b y blue é"]
    every = drawn(wildcards, "{~red|blue} {a|b} {@x|y}", expand="all", count=40)
    assert Counter(p.split()[1] for p, _ in every) == {"a": 40, "b": 40}
    assert all(p[-1] == "xy"[seed % 2] for p, seed in every) and {p.split()[0] for p, _ in every} == {"red", "blue"}


def test_a_latin_1_file_is_read_with_a_notice(wildcards, ldm_, tiny):
    (wildcards / "wildcards" / "old.txt").write_bytes(b"\xe9t\xe9\r\n")
    assert drawn(wildcards, "__old__") == [("été", 0)]
    _, _, err = ldm_("batch", wildcards / "p.txt", "--model", tiny, "--out", wildcards / "job", "--steps", 2)
    assert err == f"warning: {wildcards / 'wildcards' / 'old.txt'}: not UTF-8: read as Latin-1\n"


def test_a_file_s_lines_have_their_weights(wildcards):
    seen = Counter(p for p, _ in drawn(wildcards, "__colour__", count=2000))
    assert abs(seen["red"] - 500) < 4 * (2000 * 3 / 16) ** 0.5


def test_the_wildcards_may_lie_elsewhere(tmp_path, wildcards):
    path = write(tmp_path / "wildcards" / "p.txt", "__colour__")
    assert requests(path, wildcards=tmp_path / "wildcards", expand="all")[0].prompt == "red"


# Images


def test_images_lie_beside_the_file_wherever_that_is(tmp_path, pipe):
    for name in ("a", "b"):
        folder = tmp_path / name / "in"
        folder.mkdir(parents=True)
        Image.new("RGB", (48, 32), "red").save(folder / "x.png")
        Image.new("L", (48, 32), 255).save(folder / "m.png")
        write(
            tmp_path / name / "p.jsonl", jsonl([{"prompt": "a", "image": "in/x.png", "mask": "in/m.png", "count": 2}])
        )
    one, two = (requests(tmp_path / name / "p.jsonl") for name in ("a", "b"))
    assert [r.to_record() for r in one] == [r.to_record() for r in two]
    resolved = pipe.resolve(one[0])
    assert (resolved.width, resolved.height, resolved.strength) == (48, 32, 1.0)
    assert resolved.to_record()["image"]["size"] == [48, 32]


# Checking


def test_each_fault_is_told_with_its_line_and_what_is_beyond_five_is_counted(tmp_path, pipe):
    good = {"prompt": "a"}
    faults = [{"prompt": "a", "guidance": float("inf")}, {"prompt": "b", "width": 3}, {"prompt": "(a:1000)"}]
    path = write(tmp_path / "p.jsonl", jsonl([good, *faults, good]))
    with pytest.raises(ValueError) as error:
        open_prompt_source(path, PLAIN).validate(pipe.resolve)
    first, second, third = str(error.value).split("; ")
    assert first == f"{path}:2: guidance inf: must be from 0 to 1000"
    assert second.startswith(f"{path}:3: width 3: must be a multiple of 4") and third.startswith(
        f"{path}:4: prompt weight"
    )
    write(path, jsonl(faults * 3))
    with pytest.raises(ValueError) as error:
        open_prompt_source(path, PLAIN).validate(pipe.resolve)
    assert str(error.value).endswith("; and 4 more") and str(error.value).count(f"{path}:") == 5


def test_the_last_of_counted_seeds_is_asked_about_and_every_text_of_a_wildcard(tmp_path, pipe):
    path = write(tmp_path / "p.jsonl", jsonl([{"prompt": "a", "seed": 2**64 - 3, "count": 3}]))
    assert open_prompt_source(path, PLAIN).validate(pipe.resolve) == 3
    write(path, jsonl([{"prompt": "a", "seed": 2**64 - 3, "count": 4}]))
    with pytest.raises(ValueError, match=f":1: seed {2**64}: must be"):
        open_prompt_source(path, PLAIN).validate(pipe.resolve)
    write(path, jsonl([{"prompt": "{a|b|c|(d:1000)}", "count": 40}]))
    with pytest.raises(ValueError, match=":1: prompt weight 1000"):
        open_prompt_source(path, PLAIN).validate(pipe.resolve)


def test_a_source_goes_to_other_processes(wildcards):
    source = open_prompt_source(write(wildcards / "p.txt", "__colour__ a --d 1-9"), PLAIN)
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


def test_a_hundred_thousand_lines_leave_no_more_behind_than_a_thousand(tmp_path):
    path = write(tmp_path / "p.txt", text_of(f"a red cat {k}" for k in range(100_000)))
    held = {}  # blocks of memory at some lines

    def probe(request):
        number = int(request.prompt.rsplit(" ", 1)[1])
        if number % 1000 == 0:
            held[number] = sys.getallocatedblocks()

    assert open_prompt_source(path, PLAIN).validate(probe) == 100_000 and len(held) == 100
    assert max(held.values()) < held[1000] + 5000


@pytest.mark.parametrize("name", ["a.jsonl", "d.csv", "f.parquet"])
def test_no_kind_of_file_is_held_whole(tmp_path, name):
    path = write(tmp_path / name, KINDS[name]([{"prompt": f"{k} {'cat ' * 4000}"} for k in range(2000)]))
    tracemalloc.start()
    open_prompt_source(path, PLAIN).validate(lambda request: None)
    assert tracemalloc.get_traced_memory()[1] < 2**23 < 2000 * 16000
    tracemalloc.stop()


def test_entries_are_given_while_the_file_is_still_read(tmp_path):
    path = write(tmp_path / "a.txt", text_of(["a"] * 100_000) + "{\n")
    assert [entry.line for entry in itertools.islice(open_prompt_source(path, PLAIN), 3)] == [1, 2, 3]
