"""Helpers of error messages."""

import pytest

from ldm.errors import choose, error_text, list_some, parse_json, suggest


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
