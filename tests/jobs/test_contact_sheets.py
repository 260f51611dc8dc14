"""Contact sheets: each image at the cell of its two fields, on the sheet of all others."""

import re
from dataclasses import replace

import numpy as np
import pytest
from job_folders import COLOURS, SETTLED, write_job
from PIL import Image

from ldm.jobs import contact_sheets

SQUARE = replace(SETTLED, width=64, height=64)
GREY = (0xD4,) * 3


def shown(sheet, rows, columns):
    """The colour of each cell of a sheet, by row; AssertionError where an image is not of one colour."""
    found = []
    for i in range(rows):
        for j in range(columns):
            x = sheet.width - contact_sheets.SHEET_MARGIN - (columns - j) * (64 + contact_sheets.CELL_GAP)
            y = sheet.height - contact_sheets.SHEET_MARGIN - (rows - i) * (64 + contact_sheets.CELL_GAP)
            cell = np.asarray(sheet)[y : y + 64, x : x + 64].reshape(-1, 3)
            assert (cell == cell[0]).all(), (i, j)
            found.append(tuple(map(int, cell[0])))
    return [found[k : k + columns] for k in range(0, len(found), columns)]


def drawn(folder, words):
    """The sheets of a folder, and their titles."""
    pictures = [
        Image.open(path) for path in contact_sheets.write_contact_sheets(folder, contact_sheets.parse_grid_axes(words))
    ]
    return pictures, [picture.text["Title"] for picture in pictures]


def test_a_sheet_shows_each_image_at_its_place_and_grey_where_there_is_none(tmp_path):
    prompts, seeds = ["a cat", "a dog on a very long meadow " * 20], [10, 9, 2]
    lines = write_job(tmp_path, [replace(SQUARE, prompt=p, seed=s) for p in prompts for s in seeds])
    (tmp_path / lines[4]["file"]).unlink()
    (sheet,), (title,) = drawn(tmp_path, "seed,prompt")
    a, b, c, d, _, f = [COLOURS[k % 4] for k in range(6)]
    assert shown(sheet, 2, 3) == [[c, b, a], [f, GREY, d]] and title == ""  # numbers in their order
    dark = np.asarray(sheet).max(-1) < 100
    assert (
        dark[: contact_sheets.SHEET_MARGIN + contact_sheets.LINE_HEIGHT].any()
        and dark[:, : contact_sheets.ROW_LABEL_WIDTH].any()
    )  # both axes are labelled
    (turned,), _ = drawn(tmp_path, "prompt,seed")
    assert shown(turned, 3, 2) == [[c, f], [b, GREY], [a, d]]
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["prompt-seed", "seed-prompt"]


def test_each_combination_of_the_other_fields_has_its_sheet_and_the_title_says_which(tmp_path):
    fields = [(p, s, n, g) for p in ("a cat", "a dog") for s in (0, 1) for n in ("ddim", "heun") for g in (2.0, 3.5)]
    made = [replace(SQUARE, prompt=p, seed=s, sampler=n, guidance_scale=g) for p, s, n, g in fields]
    write_job(tmp_path, made)
    found, titles = drawn(tmp_path, "guidance, seed")
    assert titles == [f"{p} · sampler {n}" for p in ("a cat", "a dog") for n in ("ddim", "heun")]
    for sheet, title in zip(found, titles, strict=True):
        prompt, sampler = title.split(" · sampler ")
        own = [COLOURS[k % 4] for k, field in enumerate(fields) if (field[0], field[2]) == (prompt, sampler)]
        assert shown(sheet, 2, 2) == [own[:2], own[2:]]
    rows, titles = drawn(tmp_path, "sampler")
    assert len(titles) == 8 and titles[3] == "a cat · seed 1 · guidance 3.5"
    assert shown(rows[1], 1, 2) == [[COLOURS[1], COLOURS[3]]]


def test_the_title_stands_above_the_labels_of_the_columns(tmp_path):
    write_job(tmp_path, [replace(SQUARE, prompt=p, seed=s) for p in ("", "a cat") for s in (0, 1)])
    (bare, titled), titles = drawn(tmp_path, "seed")
    assert titles == ["", "a cat"] and titled.width == bare.width
    more = titled.height - bare.height
    assert more == contact_sheets.LINE_HEIGHT + contact_sheets.CELL_GAP
    line = np.s_[contact_sheets.SHEET_MARGIN : contact_sheets.SHEET_MARGIN + contact_sheets.LINE_HEIGHT]
    assert (np.asarray(titled)[line].min(-1) < 100).any()
    assert (np.asarray(titled)[more:][line] == np.asarray(bare)[line]).all()


def test_written_again_after_the_job_has_grown_nothing_old_is_left(tmp_path):
    write_job(tmp_path, [replace(SQUARE, prompt=p) for p in ("a", "b", "c")])
    assert len(drawn(tmp_path, "seed")[0]) == 3
    first = (tmp_path / "grids" / "seed" / "000.png").read_bytes()
    write_job(tmp_path, [replace(SQUARE, prompt="a")])
    drawn(tmp_path, "seed")
    assert [path.read_bytes() for path in (tmp_path / "grids" / "seed").iterdir()] == [first]
    (tmp_path / "manifest.jsonl").write_text("")
    assert contact_sheets.write_contact_sheets(tmp_path, ["size"]) == [] and not (tmp_path / "grids" / "size").exists()


@pytest.mark.parametrize(
    "words, fields",
    [
        ("steps,guidance", ["num_inference_steps", "guidance_scale"]),
        ("num_inference_steps, guidance-rescale", ["num_inference_steps", "guidance_rescale"]),
        ("size", ["size"]),
    ],
)
def test_axes_have_either_name(words, fields):
    assert contact_sheets.parse_grid_axes(words) == fields


@pytest.mark.parametrize(
    "words, said",
    [
        ("colour", "--grid 'colour': choose from prompt, negative, seed"),
        ("seed,", "--grid '': choose from"),
        ("guidance,guidance_scale", "must be one field, for columns, or two"),
        ("seed,prompt,steps", "must be one field, for columns, or two"),
    ],
)
def test_axes_that_are_none_are_refused(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        contact_sheets.parse_grid_axes(words)


@pytest.mark.parametrize(
    "sheets_, cells, said",
    [(5, 1000, "--grid seed: more than 5 sheets, one for each prompt"), (100, 3, "--grid seed: more than 3 cells")],
)
def test_sheets_that_are_too_many_or_too_large_are_refused(tmp_path, monkeypatch, sheets_, cells, said):
    monkeypatch.setattr(contact_sheets, "MAX_SHEETS", sheets_)
    monkeypatch.setattr(contact_sheets, "MAX_CELLS", cells)
    asked = [(replace(SETTLED, prompt=p, seed=s).to_record(), None) for p in "abcdef" for s in range(4)]
    few = [entry for entry in asked if entry[0]["prompt"] in "abcde" and entry[0]["seed"] < 3]
    assert len(contact_sheets.layout_sheets(few, ["seed"])) == 5
    entries = iter(asked)
    with pytest.raises(ValueError, match=re.escape(said)):
        contact_sheets.layout_sheets(entries, ["seed"])
    assert next(entries, None) is not None  # it looks no further


def test_a_sheet_of_few_images_far_apart_is_as_large_as_its_cells():
    scattered = [(replace(SQUARE, seed=k, num_inference_steps=k).to_record(), None) for k in range(40)]
    with pytest.raises(ValueError, match="more than 1000 cells"):
        contact_sheets.layout_sheets(scattered, ["seed", "num_inference_steps"])
