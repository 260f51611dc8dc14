"""Curves of a training's log as an SVG picture, for a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN = 420, 220, 44
PLOT_COLORS = ("#2a6fbb", "#d1495b", "#3a7d44")

Curve = list[tuple[float, float]]


def read_curve(log: Path, key: str) -> Curve:
    """(step, value) of every line of a `log.jsonl` that has the key."""
    lines = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[key]) for line in lines if key in line]


def render_panel(title: str, curves: dict[str, Curve], x_offset: int = 0, log_scale: bool = False) -> str:
    """One pair of axes with a few curves, as SVG elements `left` pixels from the edge."""
    look = math.log10 if log_scale else float
    points = [point for curve in curves.values() for point in curve]
    right = max(step for step, _ in points)
    low, high = min(look(v) for _, v in points), max(look(v) for _, v in points)
    span = (high - low) or 1.0

    def place(step: float, value: float) -> str:
        x = x_offset + PLOT_MARGIN + step / right * (PLOT_WIDTH - 2 * PLOT_MARGIN)
        return f"{x:.1f},{PLOT_HEIGHT - PLOT_MARGIN - (look(value) - low) / span * (PLOT_HEIGHT - 2 * PLOT_MARGIN):.1f}"

    def words(x: float, y: float, text: str, anchor: str = "start", colour: str = "#333") -> str:
        return f'<text x="{x_offset + x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'

    frame = f'x="{x_offset + PLOT_MARGIN}" y="{PLOT_MARGIN}" width="{PLOT_WIDTH - 2 * PLOT_MARGIN}" height="{PLOT_HEIGHT - 2 * PLOT_MARGIN}"'
    parts = [f'<rect {frame} fill="none" stroke="#bbb"/>', words(PLOT_WIDTH / 2, 18, title, "middle")]
    for level in (low, high):
        value = 10**level if log_scale else level
        y = PLOT_HEIGHT - PLOT_MARGIN - (level - low) / span * (PLOT_HEIGHT - 2 * PLOT_MARGIN) + 4
        parts.append(words(PLOT_MARGIN - 5, y, f"{value:.3g}", "end"))
    parts.append(words(PLOT_WIDTH - PLOT_MARGIN, PLOT_HEIGHT - PLOT_MARGIN + 16, f"step {right:.0f}", "end"))
    for k, (name, curve) in enumerate(curves.items()):
        line = " ".join(place(step, value) for step, value in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{PLOT_COLORS[k]}" stroke-width="1.3"/>')
        parts.append(words(PLOT_MARGIN + 110 * k, PLOT_HEIGHT - 8, name, colour=PLOT_COLORS[k]))
    return "\n".join(parts)


def render_figure(panels: Sequence[str]) -> str:
    """Panels side by side as one SVG document."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{PLOT_WIDTH * len(panels)}" height="{PLOT_HEIGHT}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="12">', *panels, "</svg>\n"])
