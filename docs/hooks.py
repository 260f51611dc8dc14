"""mkdocs hooks: render what is derived from the code, and show images that lie outside of docs/.

python docs/hooks.py     write the file map of docs/architecture.md anew, from the modules' docstrings
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ROOT / "docs/architecture.md"
CLI_MARKER = "<!-- commands -->"
MAP_MARKERS = "<!-- file map -->\n", "<!-- end of the file map -->"
PICTO_IMAGES = ("easy.png", "composed.png")


def render_cli() -> str:
    """Every command of `ldm` as Markdown: its help text, and a table of its arguments and options."""
    import typer

    from ldm.cli import app

    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join(_render_command(name, command) for name, command in commands.items() if not command.hidden)


def _render_command(name: str, command: Any) -> str:
    rows = ["| option | meaning | default |", "|---|---|---|"]
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        spellings = (
            (*parameter.opts, *parameter.secondary_opts) if is_option else (parameter.metavar or parameter.name,)
        )
        default = parameter.default
        shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
        meaning = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
        rows.append(f"| {', '.join(f'`{s}`' for s in spellings)} | {meaning} | {shown} |")
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    return "\n".join([f"## ldm {name}", "", "\n\n".join(paragraphs), "", *rows, ""])


def file_map() -> str:
    """Every module of `ldm` with the first sentence of its docstring, a table for each room."""
    rooms: dict[str, list[str]] = {}
    for path in sorted((ROOT / "ldm").rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text:
            sentence = re.split(r"(?<=[.:])\s", " ".join(text.split("\n\n")[0].split()))
            first = sentence[0] if not sentence[0].endswith(":") else " ".join(sentence[:2])
            room = path.parent.relative_to(ROOT).as_posix()
            rooms.setdefault(room, []).append(f"| `{path.name}` | {first.rstrip('.').replace('|', chr(92) + '|')} |")
    tables = (
        f"**{room}/**\n\n| file | |\n|---|---|\n" + "\n".join(rows) + "\n" for room, rows in sorted(rooms.items())
    )
    return "\n".join(tables)


def with_file_map(markdown: str) -> str:
    """The page with the file map as it is now between its two markers."""
    before, rest = markdown.split(MAP_MARKERS[0])
    return before + MAP_MARKERS[0] + "\n" + file_map() + "\n" + MAP_MARKERS[1] + rest.split(MAP_MARKERS[1])[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the reference of the command line; let links to picto's images lead to their copies."""
    markdown = markdown.replace("../weights/picto/", "figures/")
    return markdown.replace(CLI_MARKER, render_cli()) if page.file.src_uri == "reference/cli.md" else markdown


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add picto's images, which lie beside its weights."""
    from mkdocs.structure.files import File

    for name in PICTO_IMAGES:
        files.append(File.generated(config, f"figures/{name}", abs_src_path=str(ROOT / "weights/picto" / name)))
    return files


if __name__ == "__main__":
    ARCHITECTURE.write_text(with_file_map(ARCHITECTURE.read_text()))
