"""The table of request fields: one meaning for each name, and values that are what they were written as."""

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from ldm.commands.options import REQUEST_OPTIONS, normalize_option
from ldm.jobs.schema import FIELD_NAMES, PROMPT_FIELDS, PROMPT_OPTIONS
from ldm.pipeline.request import REQUEST_FIELDS, Request, coerce_request


def test_a_name_is_of_one_field():
    names = [name for field, spec in PROMPT_FIELDS.items() for name in {field, spec.option, *spec.aliases}]
    assert max(Counter(names).values()) == 1 and set(names) | {"text", "caption"} == FIELD_NAMES.keys()
    letters = [spec.kohya for spec in PROMPT_FIELDS.values() if spec.kohya]
    assert len(set(letters)) == len(letters) and not set(letters) & set(names) and set(letters) <= PROMPT_OPTIONS.keys()


def test_every_field_is_in_the_table_and_its_default_is_in_range():
    for field in fields(Request):
        if spec := REQUEST_FIELDS.get(field.name):
            assert not isinstance(field.default, int | float) or spec.low <= field.default <= spec.high
        else:  # of Python alone
            assert field.default in (None, "pil") and field.name not in Request("").to_record()


def test_a_field_is_called_the_same_on_the_command_line_and_in_a_file():
    for field in REQUEST_OPTIONS:
        spec = REQUEST_FIELDS[field]
        for name in (field, spec.option, *spec.aliases):
            assert normalize_option(name) == spec.option.replace("_", "-")


def test_numbers_of_numpy_become_python_s():
    request = coerce_request(Request("", seed=np.int64(3), guidance_scale=np.float32(2), strength=np.int32(1)))
    assert [type(v) for v in (request.seed, request.guidance_scale, request.strength)] == [int, float, float]
    assert coerce_request(Request("", guidance_scale=2)).guidance_scale == 2


@pytest.mark.parametrize("change", [{"seed": None}, {"seed": 1.0}, {"eta": "0"}, {"image": "a.png"}])
def test_what_is_no_number_or_image_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} .*must be a"):
        coerce_request(Request("", **change))
