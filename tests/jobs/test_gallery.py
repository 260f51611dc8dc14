"""The gallery of a job: its data are the manifest's, whatever the prompts."""

import json
import re
import subprocess
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from job_folders import COLOURS, SETTLED, line_of, write_job
from PIL import Image
from typer.main import get_command

from ldm import cli
from ldm.jobs import contact_sheets, gallery
from ldm.jobs.exports import export_job
from ldm.metadata import save_png
from ldm.pipeline.request import Request

ROOT = Path(__file__).resolve().parents[2]
NASTY = [
    "</script><script>pwned = 1</script>",
    "<img src=x onerror='pwned = 1'>",
    'it\'s "quoted" \\ and `ticked` ${pwned = 1}',
    "--negative like an option",
    "🎈 雪 é \u2028 line and paragraph \u2029",
    "تفاحة حمراء على خلفية زرقاء",
    "two\nlines\tand a tab",
    "HEADER <!-- a comment",
    "&amp; &lt;b&gt; %20 #hash ?query=1",
]


class Scripts(HTMLParser):
    """The text of each script in a page, as a browser parts them."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "script"
        self.texts += [""] if self.inside else []

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def read_page(folder):
    """A page's header, and its rows as entries by column."""
    data, _ = Scripts((folder / "index.html").read_text("utf-8")).texts
    header = json.loads(data)
    rows = []
    for name in header["chunks"]:
        script = (folder / name).read_text("ascii")
        rows += json.loads(re.fullmatch(r"take\((.*)\);\n", script, re.DOTALL)[1])
    return header, [{**header["common"], **dict(zip(header["columns"], row, strict=True))} for row in rows]


@pytest.mark.parametrize("chunk", [2, 5000])
def test_the_page_s_data_are_the_manifest_s_whatever_the_prompts(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(gallery, "ROWS_PER_CHUNK", chunk)
    interval = (0.5, None)
    requests = [replace(SETTLED, prompt=text, seed=2**62 + k) for k, text in enumerate(NASTY)]
    requests[1] = replace(requests[1], guidance_interval=interval, seed=3)
    lines = write_job(tmp_path, requests)
    assert gallery.write_gallery(tmp_path) == tmp_path / "index.html"
    header, entries = read_page(tmp_path)
    assert len(header["chunks"]) == -(-len(NASTY) // chunk) and header["count"] == len(entries) == len(lines)
    for line, entry in zip(lines, entries, strict=True):
        seed = line["request"]["seed"]
        exact = {**line["request"], "seed": seed if seed < 2**53 else str(seed)}
        assert {name: entry[name] for name in header["record"]} == exact
        assert (entry["id"], entry["file"], entry["size"]) == (line["id"], line["file"], "48 × 32")


@pytest.mark.parametrize("text", NASTY)
def test_what_all_images_share_ends_no_script_whatever_it_is(tmp_path, text):
    write_job(tmp_path, [replace(SETTLED, prompt=text, seed=k) for k in range(2)], draw=False, model=text)
    gallery.write_gallery(tmp_path)
    header, _ = read_page(tmp_path)
    assert header["common"]["prompt"] == header["common"]["model"] == text


def test_what_all_images_share_is_told_once(tmp_path):
    write_job(tmp_path, [replace(SETTLED, seed=k) for k in range(5)])
    gallery.write_gallery(tmp_path)
    header, _ = read_page(tmp_path)
    assert set(header["columns"]) == {"id", "file", "line", "seed"}
    assert header["summary"] == "tiny · dpmpp_2m · trailing · steps 6 · guidance 3.0 · 48 × 32"


def test_the_same_job_gives_the_same_bytes_and_a_grown_one_leaves_nothing_behind(tmp_path):
    lines = write_job(tmp_path, [replace(SETTLED, seed=k) for k in range(4)])

    def files():
        gallery.write_gallery(tmp_path)
        return {
            p.relative_to(tmp_path): (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()
        }

    first, again = files(), files()
    assert {p: data for p, (data, _) in first.items()} == {p: data for p, (data, _) in again.items()}
    assert [p for p in first if first[p][1] != again[p][1]] == [Path("index.html")]  # thumbnails were made once
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:3]))
    header, _ = (gallery.write_gallery(tmp_path), read_page(tmp_path))[1]
    assert [f"index.data/{p.name}" for p in (tmp_path / "index.data").iterdir()] == header["chunks"]


def test_a_manifest_cut_at_any_byte_shows_its_whole_lines(tmp_path):
    write_job(tmp_path, [replace(SETTLED, prompt=text) for text in ("雪", "b")], draw=False)
    whole = (tmp_path / "manifest.jsonl").read_bytes()
    ends = [k for k in range(len(whole)) if whole[k : k + 1] == b"\n"]
    for cut in {*range(0, len(whole), 17), *ends, *(end + 1 for end in ends)}:
        (tmp_path / "manifest.jsonl").write_bytes(whole[:cut])
        assert len(gallery.read_finished_records(tmp_path)[0]) == sum(cut > end for end in ends)


def test_an_image_outlives_a_failure_in_whichever_file_and_order_they_are_told(tmp_path):
    done = line_of(0, SETTLED)
    failed = {**done, "status": "failed", "reason": "out of memory"}
    cases = [
        ({"manifest": [failed, done]}, "done"),
        ({"manifest": [done, failed]}, "done"),
        ({"manifest-a": [failed], "manifest-b": [done]}, "done"),
        ({"manifest-a": [done], "manifest-b": [failed]}, "done"),
        ({"manifest-a": [failed], "manifest-b": [failed]}, "failed"),
    ]
    for k, (files, wanted) in enumerate(cases):
        folder = tmp_path / str(k)
        folder.mkdir()
        for name, lines in files.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines, count = gallery.read_finished_records(folder)
        assert (len(lines), count) == ((1, 0) if wanted == "done" else (0, 1)), files


def test_images_stand_in_the_order_of_the_source_and_failures_are_counted(tmp_path):
    lines = write_job(tmp_path, [replace(SETTLED, seed=k) for k in range(4)])
    lines[1] = {**lines[1], "status": "failed", "reason": "black picture"}
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    gallery.write_gallery(tmp_path)
    header, entries = read_page(tmp_path)
    assert header["failed"] == 1 and [entry["seed"] for entry in entries] == [0, 2, 3]


def test_a_thumbnail_is_the_image_shrunk_never_enlarged_and_a_broken_image_has_none(tmp_path):
    sizes = [(1024, 512), (64, 128), (48, 32)]
    lines = write_job(tmp_path, [replace(SETTLED, seed=k, width=w, height=h) for k, (w, h) in enumerate(sizes)])
    (tmp_path / lines[2]["file"]).write_bytes(b"torn")
    gallery.write_gallery(tmp_path)
    small = [gallery.thumbnail_path(tmp_path, line) for line in lines]
    assert [Image.open(path).size for path in small[:2]] == [(256, 128), (64, 128)] and not small[2].exists()
    for path, colour in zip(small[:2], COLOURS, strict=False):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - colour).max() < 8
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_without_a_manifest_is_refused_by_name(tmp_path):
    for make in (gallery.write_gallery, lambda folder: contact_sheets.write_contact_sheets(folder, ["seed"])):
        with pytest.raises(ValueError, match=r"no manifest\.jsonl"):
            make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_field_of_a_request_is_an_option_of_generate_or_stated_to_have_none():
    generate = get_command(cli.app).commands["generate"]
    options = {option for parameter in generate.params for option in parameter.opts}
    assert set(gallery.GENERATE_OPTIONS.values()) <= options and set(gallery.GENERATE_OPTIONS) <= set(
        gallery.RECORD_FIELDS
    )
    untold = set(gallery.RECORD_FIELDS) - set(gallery.GENERATE_OPTIONS)
    pictures = {"image", "mask"}  # of which a manifest has the fingerprint
    sdxl = {"original_size", "crops_coords_top_left", "target_size"}
    assert untold == {"prompt", "clip_skip", *pictures, *sdxl}


def test_the_template_is_part_of_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert gallery.GALLERY_TEMPLATE.name in data["ldm.jobs"] and gallery.GALLERY_TEMPLATE.is_file()


# ---- In a browser, where there is one ----


@pytest.fixture(scope="module")
def browser():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        from _browser import Browser, find_browser
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    with Browser(program) as page:
        yield page


READY = "rows.length === header.count && rows.length > 0"


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of a job's folder by its file name; the browser must not complain of anything meanwhile."""

    def run(address=""):
        gallery.write_gallery(tmp_path)
        browser.open(tmp_path / "index.html", address, READY)
        return browser

    browser.problems.clear()
    browser.resize(1280, 800)
    yield run
    assert [problem for problem in browser.problems if "ERR_FILE_NOT_FOUND" not in problem] == []


FOUND = "found.map((index) => value(rows[index], 'id'))"


def search(browser, words):
    browser.run(f"$('search').value = {json.dumps(words)}; $('search').oninput()")
    return browser.run(FOUND)


def pick(browser, field, text):
    """Click the chip of a value in the filters."""
    chip = f"[...$('filters').children].find((set) => set.firstChild.textContent === {json.dumps(field)})"
    browser.run(f"[...{chip}.querySelectorAll('button')].find((b) => b.textContent === {json.dumps(text)}).click()")


def test_prompts_are_text_and_nothing_else(show, tmp_path):
    write_job(tmp_path, [replace(SETTLED, prompt=text, negative_prompt=text, seed=k) for k, text in enumerate(NASTY)])
    page = show()
    assert page.run("[...document.querySelectorAll('.tile img')].map((img) => img.alt)") == NASTY
    assert page.run("[...document.querySelectorAll('.tile .caption:nth-child(2)')].map((s) => s.textContent)") == NASTY
    for k, text in enumerate(NASTY):
        page.run(f"open({k})")
        assert page.run("[$('prompt').textContent, $('image').alt]") == [text, text]
    page.run("$('detail').close(); $('view').click()")
    assert page.run("[...document.querySelectorAll('tbody th')].map((th) => th.textContent)") == NASTY
    assert page.run("typeof pwned") == "undefined" and page.run("document.scripts.length") == 2


def test_thumbnails_and_images_are_found_and_what_is_missing_says_so(show, tmp_path):
    lines = write_job(tmp_path, [replace(SETTLED, seed=k) for k in range(3)])
    (tmp_path / lines[1]["file"]).unlink()
    page = show()
    page.wait("document.querySelectorAll('.missing').length === 1")
    page.wait("[...document.images].filter((img) => img.naturalWidth === 48).length === 2")
    page.run("open(2)")
    page.wait("$('image').complete && $('image').naturalWidth === 48")


@pytest.fixture
def mixed(tmp_path):
    """A job over prompts, seeds, samplers and guidance, as lines."""
    prompts = ["A red apple", "a red car on a meadow", "green apples", "Ein Äpfelchen"]
    grid = [(p, s, n, g) for p in prompts for s in (0, 1, 10) for n in ("euler", "heun") for g in (1.5, 4.0)]
    return write_job(
        tmp_path,
        [replace(SETTLED, prompt=p, seed=s, sampler=n, guidance_scale=g) for p, s, n, g in grid],
        draw=False,
    )


@pytest.mark.parametrize(
    "words, fits",
    [
        ("", lambda p: True),
        ("APPLE", lambda p: "apple" in p),
        ("red apple", lambda p: "red" in p and "apple" in p),
        ("apple -red", lambda p: "apple" in p and "red" not in p),
        ('"red car"', lambda p: "red car" in p),
        ('-"red car"', lambda p: "red car" not in p),
        ("äpfel", lambda p: "äpfel" in p),
        ("- ", lambda p: True),
        ("zebra", lambda p: False),
    ],
)
def test_search_finds_the_prompts_with_all_words_and_none_of_the_unwanted(show, mixed, words, fits):
    wanted = [line["id"] for line in mixed if fits(line["request"]["prompt"].lower())]
    page = show()
    assert search(page, words) == wanted
    shown = page.run("[...document.querySelectorAll('.tile button')].map((button) => button.title)")
    prompts = [line["request"]["prompt"] for line in mixed if line["id"] in wanted]
    assert shown == prompts[: len(shown)] and len(shown) >= min(28, len(wanted))  # as many as there is room for
    assert page.run("$('nothing').hidden") == bool(wanted)
    said = "48" if len(wanted) == 48 else f"{len(wanted)} of 48"
    assert page.run("$('count').textContent") == f"{said} images"


def test_filters_are_the_data_s_own_values_any_of_a_field_and_all_of_the_fields(show, mixed):
    page = show()
    page.run("$('filter').click()")
    legends = page.run("[...document.querySelectorAll('legend')].map((legend) => legend.textContent)")
    assert legends == ["seed", "guidance", "sampler"]
    chips = page.run("[...document.querySelectorAll('.chip')].map((chip) => chip.textContent)")
    assert chips == ["0", "1", "10", "1.5", "4", "euler", "heun"]

    def wanted(**some):
        return [line["id"] for line in mixed if all(line["request"][name] in v for name, v in some.items())]

    pick(page, "seed", "10")
    assert page.run(FOUND) == wanted(seed=[10])
    pick(page, "seed", "0")
    pick(page, "guidance", "1.5")
    assert page.run(FOUND) == wanted(seed=[0, 10], guidance_scale=[1.5])
    pick(page, "seed", "10")
    assert page.run(FOUND) == wanted(seed=[0], guidance_scale=[1.5])
    page.run("$('clear').click()")
    assert page.run(FOUND) == wanted() and page.run("document.querySelectorAll('[aria-pressed=true].chip').length") == 0


def test_a_field_of_many_values_is_filtered_by_values_and_ranges(show, tmp_path):
    lines = write_job(tmp_path, [replace(SETTLED, seed=k) for k in range(50)], draw=False)
    page = show()
    ranges = [("7", [7]), ("3..5", [3, 4, 5]), ("48..", [48, 49]), ("..1 30", [0, 1, 30]), ("..", []), ("x", [])]
    for words, seeds in ranges:
        page.run(f"document.querySelector('fieldset input').value = {json.dumps(words)}")
        page.run("document.querySelector('fieldset input').oninput()")
        assert page.run(FOUND) == [lines[k]["id"] for k in seeds], words


def test_sorting_orders_numbers_as_numbers_and_keeps_the_listed_order_of_equals(show, mixed):
    page = show("#sort=seed")
    by_seed = sorted(mixed, key=lambda line: line["request"]["seed"])
    assert page.run(FOUND) == [line["id"] for line in by_seed]
    page.run("$('down').click()")
    assert page.run(FOUND) == [line["id"] for line in by_seed[::-1]]


def test_the_address_keeps_the_state(show, mixed, tmp_path):
    page = show()
    search(page, 'apple & "r=1"')
    search(page, "apple")
    pick(page, "sampler", "heun")
    page.run("$('sort').value = 'guidance_scale'; $('sort').onchange(); $('theme').click(); open(3)")
    told = page.run(f"[{FOUND}, state.open, $('command').textContent]")
    address = page.run("location.hash")
    again = show(address)
    assert again.run(f"[{FOUND}, state.open, $('command').textContent]") == told
    assert again.run("[$('search').value, $('sort').value, $('detail').open]") == ["apple", "guidance_scale", True]
    again.run("location.hash = 'q=car'")
    again.wait("found.length === 12")
    assert len(mixed) == 48 and again.run("$('search').value") == "car"


@pytest.mark.parametrize("rows, columns", [("prompt", "seed"), ("guidance_scale", "sampler")])
def test_comparing_puts_every_image_into_the_cell_of_its_two_fields(show, mixed, rows, columns):
    page = show(f"#view=compare&rows={rows}&columns={columns}")
    shown = page.run(
        "[...document.querySelectorAll('tbody tr')].map((tr) => [...tr.children].map((cell) => ["
        "cell.querySelector('img')?.dataset.src.slice(-29, -5), cell.textContent]))"
    )
    values = {name: sorted({line["request"][name] for line in mixed}) for name in (rows, columns)}
    order = list(dict.fromkeys(line["request"][rows] for line in mixed))
    assert len(shown) == len(order)
    for down, (_, *cells) in zip(order, shown, strict=True):
        for right, cell in zip(values[columns], cells, strict=True):
            inside = [k["id"] for k in mixed if (k["request"][rows], k["request"][columns]) == (down, right)]
            assert cell == [inside[0], f"+{len(inside) - 1}"]


def test_same_prompt_and_same_seed_compare_an_image_with_its_like(show, mixed):
    page = show()
    own = mixed[5]["request"]
    for button, name in (("same-prompt", "prompt"), ("same-seed", "seed")):
        page.run("$('clear').click(); open(5)")
        page.run(f"$({json.dumps(button)}).click()")
        assert page.run(FOUND) == [line["id"] for line in mixed if line["request"][name] == own[name]]
        assert page.run("[$('detail').open, state.view]") == [False, "compare"]


def test_the_command_and_the_json_of_an_image_generate_it_again(show, ldm_, tiny, pipe, tmp_path):
    requests = [
        Request(NASTY[3], NASTY[2], 7, 48, 32, 4, 2.5, "heun", "karras"),
        Request(
            NASTY[2], seed=2**60 + 1, num_inference_steps=5, sampler="ddim", eta=0.5, guidance_interval=(0.2, None)
        ),
        Request(NASTY[4], seed=3, upscale=1.5, upscale_strength=0.6, guidance_rescale=0.7, num_inference_steps=4),
        Request("a cat", seed=4, num_inference_steps=4, clip_skip=1),
    ]
    requests = [pipe.resolve(request) for request in requests]
    lines = write_job(tmp_path, requests, model=str(tiny))
    pictures = pipe.generate(requests)
    for line, picture, request in zip(lines, pictures, requests, strict=True):
        save_png(picture, tmp_path / line["file"], pipe.metadata(request, "tiny"))
    page = show()
    for k, picture in enumerate(pictures):
        page.run(f"open({k})")
        command, data = page.run("[$('command').textContent, $('json').textContent]")
        program, *words = split_by_shell(command)
        status, out, _ = ldm_(words[0], "--out", tmp_path / f"again-{k}", *words[1:])
        assert (program, status) == ("ldm", 0)
        assert Image.open(out.strip()).tobytes() == picture.tobytes(), command
        assert Request(**json.loads(data)) == requests[k]


def split_by_shell(command):
    """The words of a command, as bash reads them."""
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
    return said.stdout.decode().split("\0")[:-1]


def test_no_control_character_is_in_a_command_and_the_shell_reads_the_prompt(show, tmp_path):
    prompts = ["a\x15b", "\x1b[201~id\r", "it's \\ \x07'", "two\nlines\tand a tab", "\u202etac", "\x9b2J", "a cat"]
    write_job(tmp_path, [replace(SETTLED, prompt=text, seed=k) for k, text in enumerate(prompts)], draw=False)
    page = show()
    for k, text in enumerate(prompts):
        page.run(f"open({k})")
        command = page.run("$('command').textContent")
        assert command.isprintable() and split_by_shell(command)[-1] == text, command


def test_what_a_command_cannot_say_stands_beside_it(show, tmp_path):
    image = Image.new("RGB", (48, 32))
    write_job(tmp_path, [replace(SETTLED, image=image, strength=0.5, target_size=(8, 8))], draw=False)
    page = show()
    page.run("open(0)")
    assert page.run("$('command').textContent").split("\n")[1].endswith(": image, target size")


def test_keys_alone_reach_search_tiles_and_images(show, mixed):
    page = show()
    page.press("/", "/")
    assert page.run("document.activeElement.id") == "search"
    page.press("Escape")
    page.run("document.querySelector('.tile button').focus()")
    for key, k in (("ArrowRight", 1), ("ArrowDown", 8), ("ArrowLeft", 7), ("End", 47), ("ArrowUp", 40), ("Home", 0)):
        page.press(key)
        at = page.run("[cursor, grid.per, tiles.get(cursor).firstChild === document.activeElement]")
        assert at == [k, 7, True], key
        box = page.run("(({ top, bottom }) => [top, bottom])(document.activeElement.getBoundingClientRect())")
        assert box[0] >= 0 and box[1] <= 800
    page.press("Enter")
    page.press("ArrowRight")
    assert page.run("[$('detail').open, state.open]") == [True, mixed[1]["id"]]
    page.press("Escape")
    page.wait("!$('detail').open && tiles.get(1).firstChild === document.activeElement")


def test_of_ten_thousand_images_the_document_holds_a_screen_and_its_neighbours(show, tmp_path):
    prompts = [f"picture number {k}" for k in range(10_000)]
    write_job(tmp_path, [replace(SETTLED, prompt=text) for text in prompts], draw=False)
    page = show()
    most = 0
    for share in (0, 0.001, 0.37, 0.372, 0.9, 1, 0.5, 0):
        page.run(f"scrollTo(0, {share} * document.body.scrollHeight)")
        page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen = page.run(
            "[200, 500, 790].map((y) => document.elementsFromPoint(100, y).find((e) => e.matches('.tile button')))"
            ".filter(Boolean).map((b) => [b.title, Math.round(b.parentNode.getBoundingClientRect().top)])"
        )
        top, step = page.run("[$('gallery').getBoundingClientRect().top, grid.side + CAPTION + GAP]")
        assert seen and all(title == prompts[round((y - top) / step) * 7] for title, y in seen)
        most = max(most, page.run("document.querySelectorAll('.tile').length"))
    assert most <= 7 * (2 * 800 // step + 2)


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("address", ["", "#view=compare&columns=guidance_scale", "#open=ID"])
def test_no_width_scrolls_sideways(show, mixed, browser, width, address):
    browser.resize(width, 700)
    page = show(address.replace("ID", mixed[0]["id"]))
    page.run("$('filter').click()")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("$('detail').scrollWidth <= $('detail').clientWidth")


NAMELESS = """[...document.querySelectorAll('button, input, select, img')].filter((e) => e.checkVisibility() &&
    !(e.ariaLabel || e.alt || e.textContent.trim() || e.labels?.length || e.querySelector?.('img[alt]')))"""
CONTRASTS = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const linear = [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)].map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ground = (e) => {
    while (e && getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
    return getComputedStyle(e ?? document.body).backgroundColor;
  };
  const texts = [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && !e.closest('script, style'));
  return texts.map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
  });
})()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_control_has_a_name_and_every_text_the_contrast_of_wcag(show, mixed, theme):
    page = show(f"#theme={theme}&sampler=heun")
    page.run("$('filter').click()")
    for step in ("1", "$('view').click()", "open(0)"):
        page.run(step)
        contrasts = page.run(CONTRASTS)
        assert len(contrasts) > 10 and [entry for entry in contrasts if entry[0] < 4.5] == []  # WCAG 2.2, 1.4.3
        assert page.run(f"{NAMELESS}.map((e) => e.outerHTML)") == []


HOSTILE_LINES = {  # a change of a manifest's line: what is said of it
    "an id that climbs": ({"id": "../../../../x"}, "an id that is not hexadecimal"),
    "an id that is a path": ({"id": "/tmp/x"}, "an id that is not hexadecimal"),
    "an id that is a number": ({"id": 5}, "an id that is not hexadecimal"),
    "a file outside": ({"file": "../secret.txt"}, "a file not below images/"),
    "a file that climbs out": ({"file": "images/../../secret.txt"}, "a file not below images/"),
    "an absolute file": ({"file": "/etc/passwd"}, "a file not below images/"),
    "the folder's own file": ({"file": "job.json"}, "a file not below images/"),
    "no request": ({"request": None}, "no request"),
    "a request that is a list": ({"request": []}, "no request"),
    "a prompt that is a number": ({"request": {"prompt": 5}}, "request: prompt 5: not of its type"),
    "a width that is text": ({"request": {"prompt": "a", "width": "x"}}, "width 'x': not of its type"),
    "a scale beyond numbers": ({"request": {"prompt": "a", "guidance_scale": 10**400}}, "guidance_scale"),
    "a field of nobody": ({"request": {"prompt": "a", "colour": 1}}, "unknown field 'colour'"),
}


@pytest.mark.parametrize("case", HOSTILE_LINES)
@pytest.mark.parametrize("read", [gallery.write_gallery, lambda f: export_job(f, f.parent / "o", "parquet", 9, print)])
def test_a_hostile_manifest_is_refused_and_writes_nothing(tmp_path, case, read):
    change, said = HOSTILE_LINES[case]
    folder = tmp_path / "a" / "job"
    write_job(folder, [SETTLED, replace(SETTLED, seed=1)])
    (tmp_path / "a" / "secret.txt").write_text("secret")
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    (folder / "manifest.jsonl").write_text("".join(json.dumps({**line, **change}) + "\n" for line in lines))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(said)):
        read(folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("job", ["[]", "5", '{"model": 5, "source": [], "words": "x"}', '{"words": [1]}', "[" * 10**5])
def test_an_odd_job_file_leaves_a_gallery_with_what_is_known(tmp_path, job):
    write_job(tmp_path, [SETTLED])
    (tmp_path / "job.json").write_text(job)
    assert gallery.write_gallery(tmp_path).is_file()
