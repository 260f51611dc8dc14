"""Prompt files as people have them: what is read of each and what is counted, or one error that names the line."""

import io
import json
import os
import tracemalloc

import pytest
from PIL import Image

from ldm.jobs.readers import MAX_LINE_BYTES, MAX_YAML_BYTES
from ldm.jobs.source import open_prompt_source
from ldm.pipeline.request import Request

PLAIN = Request("")


def line(**record):
    """A good line, and a second one of these fields."""
    return '{"prompt": "a"}\n' + json.dumps({"prompt": "a", **record}) + "\n"


def parquet(**columns):
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def write(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(tmp_path, content, name="p.txt", **options):
    """The entries of a file, and its notices with the numbers of their places."""
    source = open_prompt_source(write(tmp_path / name, content), PLAIN, **options)
    source.validate(lambda request: None)
    return list(source), {notice: len(places) for notice, places in source.notices.items()}


DEEP = "[" * 100_000
ROWS = parquet(prompt=["a"] * 9)
CASES = [  # file, content, line (0: the file as a whole), what is said
    # bytes
    ("p.txt", b"a\nb \xff\n", 2, "byte 3 is not UTF-8"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', 2, "byte 13 is not UTF-8"),
    ("p.csv", b"prompt\na\nb\n\xc3(\n", 4, "byte 1 is not UTF-8"),
    ("p.yaml", b"prompts:\n- a\n- \xff\n", 3, "byte 3 is not UTF-8"),
    ("p.txt", "a\n".encode("utf-16"), 1, "is UTF-16: save it as UTF-8"),
    ("p.jsonl", "\ufeffa".encode("utf-16-be"), 1, "is UTF-16"),
    ("p.txt", b"a\nb\0c\n", 2, "character 2 is a NUL"),
    ("p.csv", b"prompt\na\0\n", 2, "character 2 is a NUL"),
    ("p.jsonl", '{"prompt": "a\\u0000"}', 1, "must be text without a NUL"),
    ("p.jsonl", line(negative="\ud800"), 2, "prompt: not valid UTF-8"),
    ("p.txt", b"a\n" + b"b" * (MAX_LINE_BYTES + 1) + b"\nc", 2, f"longer than {MAX_LINE_BYTES} bytes"),
    ("p.csv", b"prompt\n" + b"b" * (MAX_LINE_BYTES + 1), 2, f"longer than {MAX_LINE_BYTES} bytes"),
    ("p.jsonl", b"a" * 2 * MAX_LINE_BYTES, 1, f"longer than {MAX_LINE_BYTES} bytes"),
    (
        "p.yaml",
        b"#" + b"a\n#" * (MAX_YAML_BYTES // 3 + 1),
        MAX_YAML_BYTES // 3 + 1,
        f"more than {MAX_YAML_BYTES} bytes",
    ),
    # nothing to generate
    ("p.txt", b"", 0, "no prompts in it"),
    ("p.txt", b"\xef\xbb\xbf", 0, "no prompts in it"),
    ("p.txt", "# a\n\n \t\n  # b", 0, "no prompts in it"),
    ("p.jsonl", "\n\n", 0, "no prompts in it"),
    ("p.csv", "prompt,seed\r\n", 0, "no prompts in it"),
    ("p.parquet", parquet(prompt=[]), 0, "no prompts in it"),
    ("p.yaml", "prompts: []\n", 0, "no prompts in it"),
    ("p.yaml", "steps: 4\n", 0, "no prompts in it"),
    ("p.yaml", "", 1, "not YAML of fields"),
    # JSON
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', 2, "not JSON: Expecting ',' delimiter: "),
    ("p.jsonl", '{"prompt": "a"}{"prompt": "b"}\n', 1, "not JSON: Extra data"),
    ("p.jsonl", "a cat\n", 1, "not JSON"),
    ("p.jsonl", '["a"]\n', 1, "not a JSON object"),
    ("p.jsonl", '"a"\n', 1, "not a JSON object"),
    ("p.jsonl", DEEP, 1, "not JSON: nested too deeply"),
    ("p.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', 1, "'seed' is given twice"),
    ("p.jsonl", '{"prompt": "a", "prompt": "b"}', 1, "'prompt' is given twice"),
    ("p.jsonl", line(steps=4, num_inference_steps=4), 2, "num_inference_steps and steps name the same field"),
    ("p.jsonl", line(prompt={"a": 1}), 2, "prompt {'a': 1}: must be text"),
    ("p.jsonl", line(prompt=5), 2, "prompt 5: must be text"),
    ("p.jsonl", '{"prompt": null}', 1, "no prompt"),
    ("p.jsonl", '{"prompt": "a"}\n{"steps": 4}', 2, "no prompt"),
    # values
    ("p.jsonl", line(steps="many"), 2, "steps 'many': must be a whole number"),
    ("p.jsonl", line(steps=4.5), 2, "steps 4.5: must be a whole number"),
    ("p.jsonl", line(steps=True), 2, "steps True: must be a whole number"),
    ("p.jsonl", line(steps=[4]), 2, "steps [4]: must be a whole number"),
    ("p.jsonl", line(steps=0), 2, "steps 0: must be from 1"),
    ("p.jsonl", line(steps=2000), 2, "2000 steps"),
    ("p.jsonl", line(width=512.5), 2, "width 512.5: must be a whole number"),
    ("p.jsonl", line(width=10**12), 2, f"width {10**12}: must be a multiple of 4"),
    ("p.jsonl", line(width=-64), 2, "width -64: must be"),
    ("p.jsonl", '{"prompt": "a", "height": ' + "9" * 5000 + "}", 1, "height inf: must be a whole number"),
    ("p.jsonl", line(guidance=float("nan")), 2, "not JSON: NaN is not a value"),
    ("p.jsonl", line(guidance=float("inf")), 2, "guidance inf: must be"),
    ("p.jsonl", line(guidance=10**30), 2, "guidance 1e+30: must be"),
    ("p.jsonl", line(guidance="high"), 2, "guidance 'high': must be a number"),
    ("p.jsonl", line(guidance={}), 2, "guidance {}: must be a number"),
    ("p.jsonl", line(eta="0x1"), 2, "eta '0x1': must be a number"),
    ("p.jsonl", line(seed=-2), 2, "seed -2: must be from 0"),
    ("p.jsonl", line(seed=2**64), 2, f"seed {2**64}: must be from 0"),
    ("p.jsonl", line(seed="9-3"), 2, "seed '9-3': must run upwards"),
    ("p.jsonl", line(seed="1,,2"), 2, "seed '1,,2': must be a whole number"),
    ("p.jsonl", line(seed="1-3", count=2), 2, "count 2: needs a single seed, and several are given"),
    ("p.jsonl", line(count=0), 2, "count 0: must be from 1"),
    ("p.jsonl", line(count=10**30), 2, "must be from 1"),
    ("p.jsonl", line(sampler="dpm"), 2, "sampler 'dpm': choose from ddpm"),
    ("p.jsonl", line(sampler=3), 2, "sampler 3: must be text"),
    ("p.jsonl", line(guidance_interval=[1]), 2, "guidance_interval [1]: must be two numbers"),
    ("p.jsonl", line(guidance_interval=[5, 1]), 2, "guidance interval 5 to 1"),
    ("p.jsonl", line(original_size="large"), 2, "original_size 'large': must be two numbers, such as 512x768"),
    ("p.jsonl", line(original_size=[-1, 5]), 2, "original_size (-1, 5)"),
    ("p.jsonl", line(strength=0.5), 2, "strength: needs an image"),
    ("p.jsonl", line(prompt="(a:1000)"), 2, "prompt weight 1000"),
    ("p.jsonl", line(prompt="a " * 9999), 2, "chunks of"),
    # images
    ("p.jsonl", line(image="../x.png"), 2, "image '../x.png': must lie in the file's folder or below it"),
    ("p.jsonl", line(image="a/../../x.png"), 2, "must lie in the file's folder"),
    ("p.jsonl", line(image="/etc/passwd"), 2, "must lie in the file's folder"),
    ("p.jsonl", line(image="..\\x.png"), 2, "must lie in the file's folder"),
    ("p.jsonl", line(image="C:\\x.png"), 2, "must lie in the file's folder"),
    ("p.jsonl", line(image="none.png"), 2, "image 'none.png': No such file"),
    ("p.jsonl", line(image="a" * 5000), 2, "File name too long"),
    ("p.jsonl", line(image="."), 2, "not a file"),
    ("p.jsonl", line(image="pipe"), 2, "image 'pipe': not a file"),
    ("p.jsonl", line(image="p.jsonl"), 2, "p.jsonl: not an image"),
    ("p.jsonl", line(image="torn.png"), 2, "torn.png: "),
    ("p.jsonl", line(image="\ud800"), 2, "not a file"),
    ("p.jsonl", line(image=["x.png"]), 2, "must be text"),
    ("p.jsonl", line(mask="good.png"), 2, "mask: needs an image"),
    # lines of text
    ("p.txt", "a\nb --w wide\n", 2, "width 'wide': must be a whole number"),
    ("p.txt", "a --d\n", 1, "--d: no value"),
    ("p.txt", "a --w 64 --W 64\n", 1, "--W: width is given twice"),
    ("p.txt", "a --am 0.5\n", 1, "--am: adapters have one weight in a whole job"),
    ("p.txt", "a --ow 64\n", 1, "--ow: this option of kohya's is not supported"),
    ("p.txt", "a --stpes 20\n", 1, "--stpes: unknown option; did you mean 'steps'?"),
    ("p.txt", '--prompt "a\n', 1, "a quote is not closed"),
    ("p.txt", '--prompt "a" --tiling true\n', 1, "--tiling true: not supported"),
    ("p.txt", "--prompt a --styles x\n", 1, "--styles: styles of the web UI are not supported"),
    ("p.txt", "--prompt a --sd_model x\n", 1, "--sd_model: a job has one model"),
    ("p.txt", "--prompt a --subseed 7\n", 1, "--subseed 7: not supported"),
    ("p.txt", "--prompt a --foo 1\n", 1, "--foo: unknown option"),
    ("p.txt", "a\nb --zz 1 --w 64\n", 2, "--zz: unknown option"),
    ("p.txt", "a --w 64 --zz 1\n", 1, "--zz: unknown option"),
    ("p.txt", "a --n x --y z --w 64\n", 1, "--y: unknown option"),
    ("p.txt", "a --ar 16:9\n", 1, "--ar: an option of Midjourney"),
    ("p.txt", "a --s 750\n", 1, "--s 750: as steps write --steps 750"),
    ("p.txt", "a --g 3.5\n", 1, "--g: distilled guidance"),
    ("p.txt", "a --cn x.png\n", 1, "--cn: this option of kohya's"),
    ("p.txt", b"a\rb --w wide\rc", 2, "width 'wide'"),
    ("p.txt", "--steps 4\n", 1, "no prompt"),
    ("p.txt", "--prompt a --steps\n", 1, "--steps: no value"),
    # wildcards
    ("p.txt", "a\n{a|b\n", 2, "wildcards: { at character 1 is not closed"),
    ("p.txt", "a}\n", 1, "wildcards: } at character 2 closes nothing"),
    ("p.txt", "{{a}|b\n", 1, "wildcards: { at character 1 is not closed"),
    ("p.txt", "{0::a|0::b}\n", 1, "must not all be 0"),
    ("p.txt", "{two$$a|b}\n", 1, "wildcards: $$ at character 5 is not understood"),
    ("p.txt", "{3-2$$a|b|c}\n", 1, "wildcards: 3-2$$: must run upwards"),
    ("p.txt", "%{x ... y$$ {a|b}}\n", 1, "wildcards: $$ at character 10 is not understood"),
    ("p.txt", "a ${c}\n", 1, "wildcards: ${c}: no such variable is set"),
    ("p.txt", "a ${1}\n", 1, "wildcards: ${ at character 3 is not understood"),
    ("p.txt", "{${c=a}|b}\n", 1, "a variable cannot be set within braces"),
    ("p.txt", "snake__case__name\n", 1, "wildcard __case__: no file"),
    ("p.txt", "${c=a}__good/${c}__\n", 1, "wildcards: __ at character 7 is not understood"),
    ("p.txt", "__no*__\n", 1, "wildcard __no*__: no file"),
    ("p.txt", "__chain0__\n", 1, "wildcard __chain32__: nested more than 32 deep"),
    ("p.txt", "{" * 99 + "}" * 99, 1, "wildcards: nested more than 32 deep"),
    ("p.txt", "__none__\n", 1, "wildcard __none__: no file"),
    ("p.txt", "__god__\n", 1, "did you mean 'good'?"),
    ("p.txt", "__../p__\n", 1, "wildcard '../p': not the name of a file below"),
    ("p.txt", "__/etc/passwd__\n", 1, "wildcard '/etc/passwd': not the name"),
    ("p.txt", "__a/../../p__\n", 1, "not the name"),
    ("p.txt", "__..\\p__\n", 1, "not the name"),
    ("p.txt", f"__{'a' * 5000}__\n", 1, "aaa...: not the name of a file"),
    ("p.txt", "__pipe__\n", 1, "wildcard __pipe__: no file"),
    ("p.txt", "__self__\n", 1, "wildcard __self__: includes itself (self > self)"),
    ("p.txt", "__ring__\n", 1, "includes itself (ring > round > ring)"),
    ("p.txt", "__empty__\n", 1, "empty.txt has no lines"),
    ("p.txt", "__torn__\n", 1, "torn.txt:2: wildcards: { at character 3 is not closed"),
    ("p.txt", "__nul__\n", 1, "nul.txt: holds a NUL"),
    ("p.txt", "__bomb9__\n", 1, "wildcards: up to"),
    ("p.jsonl", line(negative="{a"), 2, "wildcards: { at character 1"),
    # CSV
    ("p.csv", "seed,steps\n1,2\n", 1, "no column 'prompt' among 'seed', 'steps'"),
    ("p.csv", "prompt,seed,seed\na,1,2\n", 1, "seed is given twice"),
    ("p.csv", "Prompt,prompt\na,b\n", 1, "prompt and Prompt name the same field"),
    ("p.csv", "prompt,size,width\na,64x64,64\n", 1, "size and width name the same field"),
    ("p.csv", "prompt;steps\na;4.5\n", 2, "steps '4.5': must be a whole number"),
    ("p.csv", "prompt,seed\na,1\nb\n", 3, "1 cells under 2 columns"),
    ("p.csv", "prompt,seed\na,1,2\n", 2, "3 cells under 2 columns"),
    ("p.csv", 'prompt,seed\n"a\nb",1\n"c,2\n', 4, "not CSV: unexpected end of data"),
    ("p.csv", 'prompt\n"a"b\n', 2, "not CSV"),
    ("p.csv", 'prompt\n"' + "a\n" * 99_999, 2, "not CSV: field larger than field limit"),
    ("p.csv", "prompt,seed\na,1\n,2\n", 3, "no prompt"),
    ("p.csv", "prompt,guidance\na,nan\n", 2, "guidance nan: must be"),
    # parquet
    ("p.parquet", ROWS[:-9], 0, "not parquet"),
    ("p.parquet", ROWS[: len(ROWS) // 2], 0, "not parquet"),
    ("p.parquet", b"PAR1", 0, "not parquet"),
    ("p.parquet", b"prompt\na\n", 0, "not parquet"),
    ("p.parquet", ROWS[:4] + b"\xff" * 40 + ROWS[44:], 0, "not parquet"),
    ("p.parquet", parquet(seed=[1]), 0, "no column 'prompt'"),
    ("p.parquet", parquet(prompt=["a", None]), 2, "no prompt"),
    ("p.parquet", parquet(prompt=[b"a"]), 1, "must be text"),
    ("p.parquet", parquet(prompt=["a", "b"], guidance=[1.0, float("nan")]), 2, "guidance nan: must be"),
    ("p.parquet", parquet(prompt=["a", "b"], seed=[1, -2]), 2, "seed -2: must be"),
    # YAML
    ("p.yaml", "prompts: [a\n", 2, "not YAML"),
    ("p.yaml", "a\n", 1, "not YAML of fields"),
    ("p.yaml", "- a\n- prompt: b\n  steps: [4, 5]\n", 2, "must be a whole number"),
    ("p.yaml", "- a\n- [b]\n", 2, "['b']: must be a prompt, or fields"),
    ("p.yaml", "prompts: a\nprompts: b\n", 2, "prompts is given twice"),
    ("p.yaml", "prompts: a\nprompt: b\n", 2, "prompt and prompts name the same field"),
    ("p.yaml", "prompts: a\nguidence: 3\n", 2, "unknown field 'guidence'; did you mean 'guidance'?"),
    ("p.yaml", "prompts: a\n? [x]\n: 3\n", 2, "unknown field"),
    ("p.yaml", "prompts:\n- a\n- ~\n", 3, "prompts None: must be text"),
    ("p.yaml", "prompts: a\nsteps: [4,\n five]\n", 3, "steps 'five': must be a whole number"),
    ("p.yaml", "prompts: a\nseeds: 9-0\n", 2, "seeds '9-0': must run upwards"),
    ("p.yaml", "prompts: a\nseeds: {from: 1}\n", 2, "nested too deeply"),
    ("p.yaml", "prompts: [[a, b]]\n", 1, "must be text"),
    ("p.yaml", "prompts: &a [*a]\n", 1, "nested too deeply"),
    ("p.yaml", "prompts: a\nseeds: 0-999999999\n", 1, "1000000000 images of one record"),
    (
        "p.yaml",
        "prompts: a\n" + "".join(f"{k}: [{'1, ' * 999}]\n" for k in ("steps", "eta", "width")),
        0,
        "combinations",
    ),
    ("p.yaml", f"prompts: {DEEP}\n", 0, "not YAML"),
    ("p.yaml", "prompts: a\0\n", 1, "is a NUL"),
    ("p.yaml", "prompts: a\x07\n", 0, "not YAML"),
    ("p.yaml", "prompts: !!python/name:os.system\n", 1, "not supported"),
    # names
    ("p.json", '["a", 5]', 2, "5: must be a prompt, or fields"),
    ("p.json", "[", 0, "not JSON"),
    ("p.json", DEEP, 0, "not JSON: nested too deeply"),
    ("p.txt", '[{"prompt": "a"}, {"steps": 4}]', 2, "no prompt"),
    ("p.xlsx", "a", 0, "unknown suffix .xlsx"),
]
BOMB = {f"bomb{k}": f"__bomb{k - 1}__ __bomb{k - 1}__ {{__bomb{k - 1}__}}" for k in range(1, 20)}
WILDCARDS = {
    "good": "a",
    "self": "a\nb __self__",
    "ring": "__round__",
    "round": "{a|__ring__}",
    "empty": "# none\n\n",
    "torn": "a\nb {c",
    "bomb0": "a" * 99,
    **BOMB,
    "nul": "a\0",
    **{f"chain{k}": f"__chain{k + 1}__" for k in range(400)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images and wildcards, good and bad; a case's file is written into it and taken out again."""
    folder = tmp_path_factory.mktemp("input")
    (folder / "wildcards").mkdir()
    for name, content in WILDCARDS.items():
        (folder / "wildcards" / f"{name}.txt").write_text(content)
    Image.effect_noise((64, 64), 50).save(folder / "good.png")
    (folder / "torn.png").write_bytes((folder / "good.png").read_bytes()[:500])
    for pipe in ("pipe", "wildcards/pipe.txt"):
        os.mkfifo(folder / pipe)
    return folder


@pytest.fixture
def case(folder, request):
    name, content, number, said = request.param
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    yield path, f"{path}:{number}: " if number else f"{path}: ", said
    path.unlink()


IDS = [f"{k}-{name}-{said[:40].replace(' ', '_')}" for k, (name, _, _, said) in enumerate(CASES)]


@pytest.mark.parametrize("case", CASES, indirect=True, ids=IDS)
def test_a_malformed_file_is_one_error_with_its_line(case, pipe):
    path, place, said = case
    with pytest.raises(ValueError) as error:
        open_prompt_source(path, Request("")).validate(pipe.resolve)
    message = str(error.value)
    assert message.startswith(place) and said in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize("case", CASES[::16], indirect=True, ids=IDS[::16])
def test_the_command_refuses_it_and_writes_nothing(case, refused, tiny, tmp_path):
    path, place, _ = case
    before = sorted(path.parent.rglob("*"))
    refused("batch", path, "--model", tiny, "--out", tmp_path / "out", said=place)
    assert not list(tmp_path.iterdir()) and sorted(path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "path, said", [("none.txt", "none.txt: No such file"), (".", "not a file"), ("/dev/zero", "/dev/zero: not a file")]
)
def test_what_is_no_file_is_refused(path, said):
    with pytest.raises(ValueError, match=said):
        open_prompt_source(path, Request(""))


def test_a_line_of_a_hundred_megabytes_is_refused_without_being_read(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.csv", "a.yaml"):
        with (path := tmp_path / name).open("wb") as file:
            file.truncate(100 * 2**20)
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"{name}:1: longer than {MAX_LINE_BYTES} bytes"):
            open_prompt_source(path, Request("")).validate(lambda request: None)
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_LINE_BYTES
        tracemalloc.stop()


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("a cat", {"prompt": "a cat"}),
        ("  a cat \r", {"prompt": "a cat"}),
        (  # kohya, gen_img.py
            "a cat, best --n bad, (ugly:1.2) --w 512 --h 768 --s 28 --l 7.5 --t 0.6 --d 12",
            {
                "prompt": "a cat, best",
                "negative_prompt": "bad, (ugly:1.2)",
                "width": 512,
                "height": 768,
                "num_inference_steps": 28,
                "guidance_scale": 7.5,
                "strength": 0.6,
                "seed": 12,
            },
        ),
        ("a cat --W 64 --D 3", {"prompt": "a cat", "width": 64, "seed": 3}),
        ("a cat --n", {"prompt": "a cat", "negative_prompt": ""}),
        (  # the web UI, prompts_from_file.py
            '--prompt "a \'big\' cat" --negative_prompt bad dog --steps 20 --cfg_scale 7 --sampler_name "Euler a"',
            {
                "prompt": "a 'big' cat",
                "negative_prompt": "bad dog",
                "num_inference_steps": 20,
                "guidance_scale": 7.0,
                "sampler": "euler_ancestral",
            },
        ),
        (
            '--width 64 --height 32 --seed 5 --prompt "x -- y" --sampler_name "DPM++ 2M Karras"',
            {"prompt": "x -- y", "width": 64, "height": 32, "seed": 5, "sampler": "dpmpp_2m", "spacing": "karras"},
        ),
        ("a cat --steps 9 --sampler heun", {"prompt": "a cat", "num_inference_steps": 9, "sampler": "heun"}),
        ("a cat -- a dog", {"prompt": "a cat -- a dog"}),
        ("1990--1999, --fluffy-- and --very round", {"prompt": "1990--1999, --fluffy-- and --very round"}),
        ("--fluffy cat", {"prompt": "--fluffy cat"}),
        ("a cat --ss euler_a --d 7", {"prompt": "a cat", "sampler": "euler_ancestral", "seed": 7}),
        ("a --negative-prompt b --steps=9", {"prompt": "a", "negative_prompt": "b", "num_inference_steps": 9}),
        ("#1 best cat", {"prompt": "#1 best cat"}),
        (r"--prompt a cat \(cute\) 'tis --steps 5", {"prompt": r"a cat \(cute\) 'tis", "num_inference_steps": 5}),
        (r'--prompt "a \(b\) \"c\"" --cfg-scale 2', {"prompt": r'a \(b\) "c"', "guidance_scale": 2.0}),
        ("--prompt a --batch_size 4 --do_not_save_grid --tiling false --subseed -1", {"prompt": "a"}),
        (r"(a:1.2) [b] \(c\) d|e \_ BREAK", {"prompt": r"(a:1.2) [b] \(c\) d|e \_ BREAK"}),
    ],
)
def test_options_in_a_line_of_text(tmp_path, line, wanted):
    assert [entry.request for entry in read(tmp_path, line + "\n")[0]] == [Request(**wanted)]


@pytest.mark.parametrize(
    "content, prompts, notices",
    [
        ("a --ar 1\nb --zz 1 --w 64\nc --w 64 --zz", None, {}),
        ("b --zz 1 --w 64\nc --w 64 --zz", ["b", "c"], {"--zz is unknown: left out": 2}),
        ("a --fluffy cat", ["a --fluffy cat"], {"--fluffy is no option: read as text": 1}),
        ("#cat\n# cat\n##\n#cat\na", ["a"], {"taken for a comment: '#cat'": 2}),
        ("--prompt a --restore_faces\n--prompt b", ["a", "b"], {"--restore_faces has no effect here: left out": 1}),
        (b"a\rb\r\rc", ["a", "b", "c"], {}),
    ],
)
def test_what_is_left_out_of_lines_is_counted(tmp_path, content, prompts, notices):
    if prompts is None:
        with pytest.raises(ValueError, match=r":1: --ar.*:2: --zz: unknown option.*:3: --zz: unknown option"):
            read(tmp_path, content)
    else:
        entries, found = read(tmp_path, content, lenient=True)
        assert [entry.request.prompt for entry in entries] == prompts and found == notices


ROWS = [
    {"prompt": "a", "negative": "b", "size": "64x32", "steps": 5, "cfg": 2, "id": "1", "Category": "x"},
    {"caption": "a", "negative": "b", "size": [64, 32], "steps": 5.0, "cfg": "2", "id": "2"},
]
TABLES = [  # name, content: two rows of one request, and an `id` and a `Category` beside it
    ("a.csv", "id,Prompt,Negative Prompt,Size,Steps,CFG,Category\n1,a,b,64x32,5.0,2,x\n2,a,b,64X32,5,2,\n"),
    ("b.csv", "Text;negative;width;height;steps;cfg;id;Category\na;b;64;32;5;2;1;x\na;b;64;32;5;2;2;\n;;;;;;;\n"),
    ("c.tsv", "caption|negative|size|steps|cfg|id|Category\na|b|64x32|5|2|1|x\na|b|64x32|5|2|2|\n".replace("|", "\t")),
    ("d.json", json.dumps(ROWS)),
    ("e.yaml", f"- {json.dumps(ROWS[0])}\n- {json.dumps(ROWS[1])}\n"),
    ("f.txt", json.dumps(ROWS)),
]


@pytest.mark.parametrize("name, content", TABLES, ids=[name for name, _ in TABLES])
def test_tables_as_people_have_them(tmp_path, name, content):
    entries, notices = read(tmp_path, content, name)
    wanted = Request("a", "b", width=64, height=32, num_inference_steps=5, guidance_scale=2.0)
    assert [entry.request for entry in entries] == [wanted] * 2
    assert [entry.extra for entry in entries] == [{"id": "1", "Category": "x"}, {"id": "2"}]
    assert all(notice.startswith("carried along into the manifest, not read: ") for notice in notices) and notices


INFOTEXT = (
    "a cat,\nbig eyes\nNegative prompt: blurry\n"
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 64x32, Model: x, Tiling: True, RNG: CPU\n"
)


def test_settings_that_the_web_ui_saves_beside_images_are_one_image_each(tmp_path, pipe):
    values = {"width": 64, "height": 32, "num_inference_steps": 20, "guidance_scale": 7.0, "sampler": "dpmpp_2m"}
    first = Request("a cat,\nbig eyes", "blurry", 5, **values, spacing="karras")
    entries, notices = read(tmp_path, f"\n{INFOTEXT}\n\na dog\nSteps: 9, Sampler: Euler a, RNG: CPU\n")
    assert [(e.line, e.request.prompt, e.request.sampler) for e in entries] == [
        (2, "a cat,\nbig eyes", "dpmpp_2m"),
        (8, "a dog", "euler_ancestral"),
    ]
    assert entries[0].request == first and notices == {"not taken over: Tiling True": 1}
    with pytest.raises(ValueError, match=r"p\.txt:6: settings of an image without their last line, Steps: \.\.\."):
        read(tmp_path, f"{INFOTEXT}\na dog\n")
    own = pipe.resolve(Request("two stars", "a dog", 3, sampler="heun", spacing="karras"))
    entries, notices = read(tmp_path, pipe.metadata(own, "tiny")["parameters"])
    assert entries[0].request == own and notices == {}


def test_a_column_that_is_nearly_a_field_is_named(tmp_path):
    entries, notices = read(tmp_path, "prompt,text,step\na,b,4\nc,d,5\n", "p.csv")
    assert [(e.request.prompt, e.extra) for e in entries] == [
        ("a", {"text": "b", "step": "4"}),
        ("c", {"text": "d", "step": "5"}),
    ]
    assert notices == {"carried along into the manifest, not read: 'text'; 'step', did you mean 'steps'?": 2}


def test_other_columns_are_in_the_manifest(tmp_path, ldm_, tiny):
    path = write(tmp_path / "p.csv", "id,prompt,steps\nx7,a,2\n")
    status, _, err = ldm_("batch", path, "--model", tiny, "--out", tmp_path / "job")
    assert status == 0 and err == f"warning: {path}:2: carried along into the manifest, not read: 'id'\n"
    for name in ("manifest.jsonl", "items.jsonl"):
        assert json.loads((tmp_path / "job" / name).read_text())["extra"] == {"id": "x7"}


def test_lists_of_prompts_alone(tmp_path):
    for name, content in (("a.json", '["a", "b"]'), ("b.yaml", "- a\n- b\n"), ("c.txt", '[\n"a",\n"b"]\n')):
        assert [entry.request.prompt for entry in read(tmp_path, content, name)[0]] == ["a", "b"]


def test_dates_beyond_those_of_python_are_text(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    when = pa.array([10**15], pa.timestamp("s"))
    parquet.write_table(pa.table({"prompt": ["a"], "when": when}), tmp_path / "p.parquet")
    (entry,) = open_prompt_source(tmp_path / "p.parquet", PLAIN)
    assert entry.request.prompt == "a" and isinstance(entry.extra["when"], str)


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "a --d -1\n"),
        ("p.txt", "--prompt a --seed -1\n"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}'),
        ("p.csv", "prompt,seed\na,-1\n"),
        ("p.yaml", "prompts: a\nseeds: -1\n"),
    ],
)
def test_seed_minus_one_is_drawn_once_for_a_row(tmp_path, name, text):
    """The same whenever the file is read, so that a job can be resumed."""
    path = write(tmp_path / name, text)
    first, second = ([e.request.seed for e in open_prompt_source(path, PLAIN, count=2)] for _ in range(2))
    assert first == second and first[1] == first[0] + 1 and 0 < first[0] < 2**32


@pytest.mark.parametrize(
    "name, text", [("p.txt", "--n bad\n"), ("p.jsonl", '{"prompt": ""}'), ("p.jsonl", '{"negative": "bad"}')]
)
def test_a_prompt_may_be_empty(tmp_path, pipe, name, text):
    source = open_prompt_source(write(tmp_path / name, text), PLAIN)
    assert source.validate(pipe.resolve) == 1 and [e.request.prompt for e in source] == [""]
