"""Helpers of error messages."""

import ast
import typing
import warnings
from pathlib import Path

import pytest

import ldm
from ldm.cli import show_warning
from ldm.errors import (
    InputWarning,
    MessageKind,
    choose,
    error_text,
    list_some,
    parse_json,
    print_message,
    suggest,
    warn_of_input,
)


def test_a_name_is_chosen_or_the_choices_are_listed():
    assert choose({"a": 1}, "a", "kind") == 1
    with pytest.raises(ValueError, match=r"^kind 'c': choose from a, b$"):
        choose({"a": 1, "b": 2}, "c", "kind")


def test_the_nearest_name_is_suggested_whatever_its_case():
    assert suggest("Stpes ", ["steps", "seed"]) == "; did you mean 'steps'?" and suggest("zzz", ["steps"]) == ""


def test_an_error_is_one_line():
    assert error_text(FileNotFoundError(2, "No such file", "x")) == "No such file"
    assert error_text(ValueError("a\n b")) == "a b" and error_text(KeyError()) == "KeyError"


def test_a_list_ends_with_the_number_of_what_it_leaves_out():
    assert list_some("ab") == "a, b" and list_some(range(5)) == "0, 1, 2 and 2 more"


def test_json_has_unique_keys_and_no_nan():
    assert parse_json(b'{"a": [1, -Infinity]}') == {"a": [1, float("-inf")]}
    assert parse_json("1" * 5000) == float("inf")
    for text, reason in (
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("NaN", "NaN"),
        ("[" * 10**5, "too deeply"),
        ("{", ""),
    ):
        with pytest.raises(ValueError, match=f"^f.json: not JSON: .*{reason}"):
            parse_json(text, "f.json")


def test_a_line_on_stderr_says_first_what_it_is(capsys, monkeypatch):
    for kind in typing.get_args(MessageKind):
        print_message(kind, "a\x1b[2J\nb")
    with warnings.catch_warnings():
        warnings.simplefilter("default", InputWarning)
        monkeypatch.setattr(warnings, "showwarning", show_warning)
        warn_of_input("left out")
        warnings.warn("a library's own", DeprecationWarning, stacklevel=1)
    lines = [f"{kind}: a\\x1b[2J b" for kind in ("error", "warning", "note")]
    assert capsys.readouterr() == ("", "\n".join([*lines, "warning: left out\n"]))


def test_all_lines_on_stderr_are_printed_in_one_place():
    """No other `print(..., file=...)`: each line has one of the three words, and no control characters of others."""
    printing = [
        path.name
        for path in Path(ldm.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stderr.write", "typer.echo")
        if any(keyword.arg in ("file", "err") for keyword in node.keywords) or ast.unparse(node.func) != "print"
    ]
    assert printing == ["errors.py"]
