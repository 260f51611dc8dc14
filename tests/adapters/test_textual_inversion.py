"""Textual inversion: every format gives its vectors, and whatever else is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.adapters.textual_inversion import load_embeddings, read_placeholder_token, read_placeholder_tokens

ONE, MANY = torch.randn(768, generator=torch.Generator().manual_seed(0)), torch.arange(2304.0).reshape(3, 768)
WIDE = torch.arange(3840.0).reshape(3, 1280)


@pytest.mark.parametrize(
    "tensors, expected",
    [
        ({"emb_params": MANY}, {"text_encoder": MANY}),
        ({"<cat-toy>": ONE}, {"text_encoder": ONE[None]}),
        ({"<cat-toy>": MANY}, {"text_encoder": MANY}),
        ({"emb_params": MANY.bfloat16()}, {"text_encoder": MANY.bfloat16().float()}),
        ({"clip_l": MANY, "clip_g": WIDE}, {"text_encoder": MANY, "text_encoder_2": WIDE}),
        ({"clip_g": WIDE[0], "clip_l": ONE}, {"text_encoder": ONE[None], "text_encoder_2": WIDE[:1]}),
        ({"clip_l": MANY}, {"text_encoder": MANY}),
        ({"clip_g": WIDE}, {"text_encoder_2": WIDE}),
        ({"clip_l": MANY, "clip_l_out": MANY + 1}, {"text_encoder": MANY}),
        ({"text_encoders_0": MANY, "text_encoders_1": WIDE}, {"text_encoder": MANY, "text_encoder_2": WIDE}),
        ({"string_to_param.*": MANY, "string_to_token.*": torch.tensor(265)}, {"text_encoder": MANY}),
        ({"emb_params": MANY[:, None]}, {"text_encoder": MANY}),
        ({"emb_params": MANY[None]}, {"text_encoder": MANY}),
    ],
    ids=[
        *("web ui", "diffusers", "diffusers of many vectors", "half", "sdxl", "sdxl of one vector", "clip_l alone"),
        *("clip_g alone", "OneTrainer", "Replicate", "a pickle's names", "[n, 1, C]", "[1, n, C]"),
    ],
)
def test_every_format_gives_its_vectors(tmp_path, tensors, expected):
    save_file(tensors, tmp_path / "word.safetensors")
    found = load_embeddings(tmp_path / "word.safetensors")
    assert list(found) == list(expected)
    assert all(a.dtype == torch.float32 and torch.equal(a, expected[name]) for name, a in found.items())


@pytest.mark.parametrize(
    "tensors, match",
    [
        ({}, "not an embedding: holds nothing, expected one tensor, or clip_l and clip_g"),
        ({"clip_l": MANY, "clip_g": WIDE, "t5": ONE}, "not an embedding: holds clip_g, clip_l, t5, expected"),
        ({f"layer{k}.weight": ONE for k in range(5)}, r"layer0\.weight, layer1\.weight, layer2\.weight and 2 more"),
        ({"clip_l": MANY, "clip_g": WIDE[:2]}, "3 vectors for text_encoder and 2 vectors for text_encoder_2"),
        ({"emb_params": MANY.long()}, r"emb_params is torch\.int64 of shape \[3, 768\], expected floating-point"),
        ({"emb_params": MANY.reshape(2, 3, 384)}, r"emb_params is torch\.float32 of shape \[2, 3, 384\]"),
        ({"emb_params": MANY[:0]}, r"of shape \[0, 768\]"),
        ({"emb_params": torch.tensor(1.0)}, r"of shape \[\]"),
        ({"emb_params": MANY / 0}, "numbers that are not finite"),
    ],
)
def test_what_is_no_embedding_is_refused_by_name(tmp_path, tensors, match):
    save_file({name: a.clone() for name, a in tensors.items()}, tmp_path / "word.safetensors")
    with pytest.raises(ValueError, match=rf"word\.safetensors: .*{match}") as error:
        load_embeddings(tmp_path / "word.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tensors, metadata, word",
    [
        ({"<cat-toy>": ONE}, None, "<cat-toy>"),
        ({"emb_params": ONE}, {"name": "toy-1"}, "toy-1"),
        ({"emb_params": ONE}, None, "word"),
        ({"clip_l": MANY, "clip_g": WIDE}, {"name": "*"}, "word"),
        ({"string_to_param.*": ONE}, None, "word"),
        ({"string_to_param.<cat>": ONE}, None, "<cat>"),
        ({"*": ONE}, None, "word"),
    ],
)
def test_a_file_names_its_token(tmp_path, tensors, metadata, word):
    save_file(tensors, tmp_path / "word.safetensors", metadata)
    assert read_placeholder_token(tmp_path / "word.safetensors") == word


def test_a_header_of_endless_sides_is_refused(tmp_path):
    header = b'{"emb_params":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % (2**70)
    (tmp_path / "word.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="too large"):
        load_embeddings(tmp_path / "word.safetensors")


def test_the_web_ui_s_pickle_names_the_way_to_convert_it(tmp_path):
    torch.save({"string_to_param": {"*": MANY}, "name": "word"}, tmp_path / "word.pt")
    with pytest.raises(ValueError, match=r"word\.pt: a zip archive.*ldm convert --trust"):
        load_embeddings(tmp_path / "word.pt")


def test_a_file_of_several_tokens_gives_each(tmp_path):
    path = tmp_path / "word.safetensors"
    save_file({"<s0>": MANY, "<s1>": ONE, "bundle": ONE + 1}, path)
    assert read_placeholder_tokens(path) == {"<s0>": "<s0>", "<s1>": "<s1>", "bundle": "bundle"}
    assert torch.equal(load_embeddings(path, "<s0>")["text_encoder"], MANY)
    with pytest.raises(ValueError, match="holds 3 tokens: choose from"):
        load_embeddings(path)
    save_file({"bundle_emb.zorb.clip_l": MANY, "bundle_emb.zorb.clip_g": WIDE, "lora_te1_a.alpha": ONE[0]}, path)
    assert read_placeholder_tokens(path) == {"zorb": "zorb"}
    assert load_embeddings(path)["text_encoder_2"].shape == WIDE.shape


def test_a_token_that_no_prompt_can_hold_is_refused(tmp_path):
    path = tmp_path / "word.safetensors"
    header = json.dumps({"\ud800": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"word.safetensors: token '\\ud800': not valid UTF-8"):
        read_placeholder_tokens(path)
