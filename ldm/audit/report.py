"""An audit as one HTML page that needs nothing else: each finding with its picture, caption, size and path."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.audit.audit import SEVERITIES, AuditReport, count_issues, get_severity
from ldm.config import ImageDataConfig
from ldm.data.sources import DatasetIssue, FileSlice
from ldm.image_io import decode_image

REPORT_THUMBNAIL_SIZE = 160  # pixels a side of a thumbnail
MAX_THUMBNAILS = 1000  # findings that have one: about 6 MB
REPORT_CSS = """
:root { color-scheme: light dark; --line: #8884; --error: #c62828; --warning: #b26a00; --notice: #5b6b7a }
@media (prefers-color-scheme: dark) { :root { --error: #ff8a80; --warning: #ffb74d; --notice: #a7b4c0 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem 1.5rem .15rem 0; vertical-align: top }
td + td { font-variant-numeric: tabular-nums }
nav { display: flex; flex-wrap: wrap; gap: .5rem } label { border: 1px solid var(--line); border-radius: 1rem;
  padding: .15rem .7rem; cursor: pointer } ul { list-style: none; padding: 0 }
li { display: flex; gap: 1rem; border-top: 1px solid var(--line); padding: .7rem 0 } li[hidden] { display: none }
figure { flex: 0 0 160px; margin: 0; min-height: 2rem; text-align: center } img { max-width: 160px;
  background: repeating-conic-gradient(#8883 0 25%, #0000 0 50%) 0 0 / 16px 16px }
div { min-width: 0; overflow-wrap: anywhere } b { margin-right: .5rem } p { margin: .2rem 0 } small { opacity: .75 }
.error b { color: var(--error) } .warning b { color: var(--warning) } .notice b { color: var(--notice) }
"""
REPORT_SCRIPT = """
const boxes = [...document.querySelectorAll('nav input')], rows = [...document.querySelectorAll('li')];
const show = () => { const kinds = new Set(boxes.filter(b => b.checked).map(b => b.value));
  rows.forEach(row => row.hidden = !kinds.has(row.dataset.kind)); };
boxes.forEach(box => box.addEventListener('change', show));
document.querySelectorAll('button').forEach(button => button.addEventListener('click', () => {
  boxes.forEach(box => box.checked = button.value === 'all'); show(); }));
show();
"""


def render_html_report(report: AuditReport, data_config: ImageDataConfig, title: str) -> str:
    """The page of a report on some data."""
    said = ", ".join(
        f"{len(found)} {name}{'' if len(found) == 1 else 's'}" for name, found in group_by_severity(report)
    )
    boxes = "".join(
        _render_filter_checkbox(severity, kind, count) for (severity, kind), count in count_issues(report).items()
    )
    rows = "".join(
        _render_issue(fault, report, data_config, k < MAX_THUMBNAILS) for k, fault in enumerate(report.issues)
    )
    figures = "".join(
        f"<tr><td>{escape(name)}<td>{escape(value)}" for name, value in format_estimates(report.estimates)
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{REPORT_CSS}</style>'
        f"<h1>{escape(title)}</h1><p>{said or 'Nothing to complain about'}.<h2>Findings</h2>"
        f'<nav><button value="all">all</button><button value="none">none</button>{boxes}</nav><ul>{rows}</ul>'
        f"<h2>Foreseen</h2><table>{figures}</table><script>{REPORT_SCRIPT}</script></html>\n"
    )


def group_by_severity(report: AuditReport) -> Iterator[tuple[str, list[DatasetIssue]]]:
    """What was found of each severity that was found."""
    for severity in SEVERITIES:
        if found := report.with_severity(severity):
            yield severity, found


def _render_filter_checkbox(severity: str, kind: str, count: int) -> str:
    name = escape(kind)
    return f'<label class="{severity}"><input type="checkbox" value="{name}" checked> <b>{name}</b>{count}</label>'


def _render_issue(issue: DatasetIssue, report: AuditReport, data_config: ImageDataConfig, with_thumbnail: bool) -> str:
    """One finding; where the key is no picture's, what it names has no thumbnail."""
    path = resolve_key(issue.key, data_config)
    sample, look = report.samples.get(issue.key, (None, None))
    source = sample.read_bytes if sample else FileSlice(path) if path else None
    picture = _render_thumbnail(source) if source and with_thumbnail else ""
    size = f"{look.size[0]} x {look.size[1]}" if look else ""
    where = str(path) if path else issue.key
    caption = f"<p><q>{escape(sample.caption)}</q>" if sample else ""
    return (
        f'<li class="{get_severity(issue)}" data-kind="{escape(issue.kind)}"><figure>{picture}</figure><div>'
        f"<p><b>{escape(issue.kind)}</b>{escape(issue.what)}{caption}<p><small>{escape(where)} {size}</small></div>"
    )


def resolve_key(key: str, data_config: ImageDataConfig) -> Path | None:
    """The file that a key names, None where it is a row, a member of a tar or the recipe's."""
    number, colon, rest = key.partition(":")
    nth = int(number) if colon and number.isdigit() else 1
    path = (
        data_config.train_data_dir[nth - 1] / (rest if nth > 1 else key)
        if nth <= len(data_config.train_data_dir)
        else None
    )
    return path if path and path.is_file() else None


def _render_thumbnail(source: Any) -> str:
    """An image element with a small JPEG in it, empty for what cannot be decoded."""
    try:
        picture = decode_image(source()).rgb
    except (OSError, ValueError):
        return ""
    picture.thumbnail((REPORT_THUMBNAIL_SIZE, REPORT_THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def format_estimates(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A forecast in words, a row a figure."""
    for name, value in values.items():
        words = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and name in ("memory", "disk", "tokens"):
            yield from format_estimates(value, f"{words}: ")
        elif isinstance(value, Mapping):
            yield words, ", ".join(f"{key} {part}" for key, part in value.items())
        elif prefix.startswith(("memory", "disk")) and name != "rows_at_a_time":
            yield words, f"{value / 1e6:,.1f} MB"
        elif name.endswith("share"):
            yield words, f"{value:.1%}"
        else:
            yield words, f"{value:.4g}" if isinstance(value, float) else f"{value}"
