"""Curves of a log: every point at its place between the axes."""

import json
import re
from xml.etree import ElementTree

import pytest

from ldm.train.card import PLOT_HEIGHT, PLOT_MARGIN, PLOT_WIDTH, format_code_span, read_curve, render_figure


@pytest.mark.parametrize("log_scale, middle", [(False, (100 - 10) / 99), (True, 0.5)])
def test_points_lie_where_their_values_say(tmp_path, log_scale, middle):
    lines = [{"step": 0, "loss": 100.0}, {"step": 5, "val": 1}, {"step": 10, "loss": 10.0}, {"step": 20, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curve(tmp_path / "log.jsonl", "loss")
    assert curve == [(0, 100), (10, 10), (20, 1)]
    svg = render_figure({"a (log scale)" if log_scale else "a": {"loss": curve}, "b": {"loss": curve}})
    first, second = (
        [tuple(map(float, point.split(","))) for point in re.split(" ", line.attrib["points"])]
        for line in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline")
    )
    down = PLOT_MARGIN + middle * (PLOT_HEIGHT - 2 * PLOT_MARGIN)
    for point, wanted in zip(
        first,
        [(PLOT_MARGIN, PLOT_MARGIN), (PLOT_WIDTH / 2, down), (PLOT_WIDTH - PLOT_MARGIN, PLOT_HEIGHT - PLOT_MARGIN)],
        strict=True,
    ):
        assert point == pytest.approx(wanted, abs=0.06)
    assert second[0] == (PLOT_WIDTH + PLOT_MARGIN, PLOT_MARGIN)


@pytest.mark.parametrize(
    "text, span",
    [
        ("a cat", "`a cat`"),
        ("a\n\n# heading", "`a # heading`"),
        ("<img src=x> ![a](b)", "`<img src=x> ![a](b)`"),
        ("a ``b`` c", "```a ``b`` c```"),
        ("`a", "`` `a ``"),
        ("\x1b]0;x\x07\u202e", "`\\x1b]0;x\\x07\\u202e`"),
    ],
)
def test_captions_of_others_are_text_in_markdown(text, span):
    assert format_code_span(text) == span
