"""`ldm check`: a table, a page and JSON; its status says whether a training would fail."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from faulty_dataset import beside, file, sound
from PIL import Image

from ldm.commands.train import preflight
from ldm.config import load_recipe


@pytest.fixture
def recipe(tiny, tmp_path):
    """A recipe on a sound folder."""
    sound(tmp_path / "data")
    values = {
        "objective": {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": "lora"},
        "data": {"train_data_dir": str(tmp_path / "data" / "beside"), "resolution": 64, "bucket_reso_steps": 16},
        "output_dir": str(tmp_path / "runs" / "mine"),
        "train_batch_size": 2,
        "max_train_steps": 100,
        "learning_rate": 1e-3,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Page(HTMLParser):
    """The findings and the boxes of a page, and every address that it names."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.boxes, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        if tag == "li":
            self.rows.append({"kind": values["data-kind"], "text": "", "image": None})
        if tag == "input":
            self.boxes.append(values["value"])
        if tag == "img":
            self.rows[-1]["image"] = values["src"]

    def handle_data(self, data):
        if self.rows:
            self.rows[-1]["text"] += data


def test_of_a_sound_folder_nothing_is_said_and_the_status_is_0(ldm_, recipe, tmp_path):
    status, out, err = ldm_("check", recipe)
    assert status == 0 and err == "" and "No issues found." in out
    assert (tmp_path / "runs" / "check.html").is_file() and not (tmp_path / "runs" / "mine").exists()
    found = json.loads(ldm_("check", recipe, "--json", "--latents")[1])
    assert found["findings"] == [] and found["page"] == str(tmp_path / "runs" / "check.html")
    expected = {"images": 8, "samples_per_epoch": 8, "epochs": 25.0, "steps": 100}
    assert expected.items() <= found["forecast"].items()
    assert found["forecast"]["buckets"] == {"48x80": 2, "64x64": 4, "80x48": 2}


def test_a_warning_is_status_0_and_an_error_status_2_in_one_line(ldm_, recipe, tmp_path):
    beside(tmp_path / "data", "none.png", file(90), "None")
    status, out, err = ldm_("check", recipe)
    assert (
        status == 0 and err == "" and "warning" in out and "none.png: 'None' describes nothing" in " ".join(out.split())
    )
    beside(tmp_path / "data", "torn.png", b"x")
    status, out, err = ldm_("check", recipe, "--json")
    assert status == 2 and err == "error: torn.png: not an image\n"
    rows = {(row["severity"], row["kind"], row["key"]) for row in json.loads(out)["findings"]}
    assert rows == {("error", "broken image", "torn.png"), ("warning", "placeholder caption", "none.png")}


def test_names_of_files_do_not_act_on_the_terminal(ldm_, recipe, tmp_path):
    beside(tmp_path / "data", "a\x1b[2J\u202e.png", file(90), "None")
    out = ldm_("check", recipe)[1]
    assert "a\\x1b[2J\\u202e.png: 'None' describes" in " ".join(out.split()) and "\x1b" not in out


def test_the_page_shows_each_finding_and_needs_nothing_else(ldm_, recipe, tmp_path):
    caption = "<script>alert(1)</script> & \"quotes\" 'too'<br>"
    beside(tmp_path / "data", "a&b<i>.png", file(91, 120, 60), caption)
    beside(tmp_path / "data", "torn.png", b"x")
    assert ldm_("check", recipe, "--out", tmp_path / "out" / "p.html")[0] == 2
    text = (tmp_path / "out" / "p.html").read_text()
    page = Page(text)
    (markup,) = (row for row in page.rows if row["kind"] == "markup")
    for word in (caption, str(tmp_path / "data" / "beside" / "a&b<i>.png"), "120 x 60"):
        assert word in markup["text"]
    head, data = markup["image"].split(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and shown.size == (120, 60)
    (torn,) = (row for row in page.rows if row["kind"] == "broken image")
    assert torn["image"] is None and "not an image" in torn["text"]
    assert sorted(page.boxes) == sorted({row["kind"] for row in page.rows})
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"(?:src|href|url\(|@import|fetch)\W*https?:", text)


def test_a_training_hears_of_warnings_and_is_refused_for_errors(recipe, tmp_path, capsys):
    beside(tmp_path / "data", "none.png", file(90), "None")
    preflight(load_recipe(recipe))
    assert capsys.readouterr() == ("", "warning: none.png: 'None' describes nothing\n")
    beside(tmp_path / "data", "torn.png", b"x")
    with pytest.raises(ValueError, match=r"^torn\.png: not an image$"):
        preflight(load_recipe(recipe))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.yaml"], "no.yaml"),
        (["RECIPE", "--set", "data={sprites: none}"], "train_data_dir"),
        (["RECIPE", "--set", "data.resolutoin=3"], "did you mean 'resolution'?"),
        (["RECIPE", "--out", "RECIPE/x.html"], "--out"),
    ],
)
def test_wrong_words_are_one_error_line(refused, recipe, words, said):
    refused("check", *(word.replace("RECIPE", str(recipe)) for word in words), said=said)


def test_a_training_counts_in_one_line_what_it_leaves_out(recipe, tmp_path, capsys):
    folder = tmp_path / "data" / "beside"
    (folder / "README.txt").write_text("about")
    (folder / "sketch.psd").write_bytes(b"8BPS")
    preflight(load_recipe(recipe))
    lines = [line for line in capsys.readouterr().err.splitlines() if "--strict" in line]
    assert lines == ["warning: 1 caption without image, 1 unsupported (README.txt, sketch.psd): --strict refuses them"]
    with pytest.raises(ValueError, match=r"README\.txt"):
        preflight(load_recipe(recipe, ["data.strict=true"]))
