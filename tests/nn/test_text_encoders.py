"""Text text encoders: states and pooled vectors equal transformers' and open_clip's own, tokens are open_clip's."""

import random
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from open_clip import CLIPTextCfg, SimpleTokenizer
from open_clip.model import _build_text_tower

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.keys import build_key_mappings, convert_to_diffusers
from ldm.nn import text_encoders
from ldm.nn.text_encoders import (
    PromptChunk,
    TextEncoder,
    apply_emphasis_no_norm,
    build_text_encoder,
    tokenize_captions,
    warn_about_truncation,
)
from ldm.nn.tokenizer import EOS, build_clip_tokenizer, load_clip_tokenizer, save_clip_tokenizer
from tests.diffusers_models import transformers_text_encoder, transformers_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
KINDS = [(name, folder) for name in ("sd1", "sd2-base", "sdxl") for folder in FAMILIES[name].text_encoders]
PROMPTS = [
    "",
    "a red apple",
    "An IMAGE of a squirrel, in Picasso's style; 42 naïve 雪 faces",
    "wow! !!! a!b <hello> it's",
]


tokenizer_of = cache(build_clip_tokenizer)


def record_of(name, folder):
    """The record of a text text encoder, made small."""
    record = FAMILIES[name].text_encoders[folder]
    return replace(record, config={**record.config, **SMALL, "projection_dim": 24})


def tower_of(name, folder, seed=0):
    record = record_of(name, folder)
    torch.manual_seed(seed)
    model = build_text_encoder(record.config, record.with_projection).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)  # biases and norms of some consequence
    dict(model.named_modules())["text_model.final_layer_norm"].bias.add_(0.2)  # a mean to keep
    return TextEncoder(
        model,
        tokenizer_of(record.pad_token_id),
        record.layer_idx,
        record.final_norm,
        record.with_projection,
        num_dropped_layers=record.num_dropped_layers,
    )


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}/{kind[1]}")
def tower(request):
    return tower_of(*request.param)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_states_and_pooled_are_transformers_own(tower, skip):
    """By the rules of diffusers' pipelines, from transformers' whole output and its own pooling."""
    theirs = transformers_text_encoder(tower.model)
    ids = tokenize_captions(tower.tokenizer, PROMPTS)
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True)
    z = out.hidden_states[-(skip + 1 if tower.final_norm else skip + 2)]
    z = theirs.final_layer_norm(z) if tower.final_norm else z
    if tower.final_norm and not skip:
        z = out.last_hidden_state
    states, pooled = tower.encode_ids(ids, skip)
    torch.testing.assert_close(states, z, rtol=0, atol=1e-5)
    assert (pooled is None) == (not tower.with_projection)
    if pooled is not None:
        torch.testing.assert_close(pooled, out.text_embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_chunk_of_weights_one_is_what_transformers_reads(tower, prompt):
    (chunk,) = text_encoders.tokenize_prompt(tower.tokenizer, prompt)
    states, pooled = tower.encode_ids(tokenize_captions(tower.tokenizer, [prompt]))
    ours, vector = tower.encode(chunk)
    assert torch.equal(ours, states) and (pooled is None or torch.equal(vector, pooled))


def test_weights_keep_the_mean_after_a_final_norm_and_else_multiply(tower):
    (chunk,) = text_encoders.tokenize_prompt(tower.tokenizer, "a red (apple:1.3) on [it]")
    plain, pooled = tower.encode(PromptChunk(chunk.ids, (1.0,) * len(chunk.ids)))
    states, vector = tower.encode(chunk)
    weights = torch.tensor([*chunk.weights, *(77 - len(chunk.ids)) * [1.0]])[:, None]
    factor = plain.mean() / (plain * weights).mean() if tower.final_norm else 1.0
    torch.testing.assert_close(states, plain * weights * factor)
    assert pooled is None or torch.equal(vector, pooled)


@pytest.mark.parametrize(("name", "folder"), [("sd2-base", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_open_clip_s_own_text_encoder_gives_the_same(name, folder):
    """Its weights under its names, through the key map; its states are taken as Stability's code takes them."""
    record = record_of(name, folder)
    layers = SMALL["num_hidden_layers"] + record.num_dropped_layers
    torch.manual_seed(0)
    theirs = _build_text_tower(24, CLIPTextCfg(width=32, heads=2, layers=layers, mlp_ratio=2.0)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    kept = [name for name in theirs.state_dict() if not name.startswith(f"transformer.resblocks.{layers - 1}.")]
    single = {
        record.prefix + name: theirs.state_dict()[name]
        for name in (kept if record.num_dropped_layers else theirs.state_dict())
    }
    family = replace(FAMILIES[name], text_encoders={folder: record})
    others = {
        entry.original_key: entry.original_tensor for entry in build_key_mappings(family) if entry.component != folder
    }  # on the meta device
    weights = convert_to_diffusers({**others, **single}, family)[folder]
    tower = tower_of(name, folder, seed=1)
    tower.model.load_state_dict(weights)

    ids = tokenize_captions(tower.tokenizer, PROMPTS)
    reached = []
    hooks = [block.register_forward_hook(lambda *a: reached.append(a[2])) for block in theirs.transformer.resblocks]
    with torch.no_grad():
        pooled = theirs(ids)
        z = theirs.ln_final(reached[-2]) if record.final_norm else reached[-2]
    assert len(reached) == len(hooks) == layers
    states, vector = tower.encode_ids(ids)
    torch.testing.assert_close(states, z, rtol=0, atol=1e-5)
    if record.with_projection:
        torch.testing.assert_close(vector, pooled, rtol=0, atol=1e-5)


def test_the_tokens_are_open_clip_s_own():
    theirs, ours = SimpleTokenizer(), build_clip_tokenizer(0)
    rng = random.Random(0)
    words = ["a", "cat's", "Dog!", "(red),", "über", "雪だるま", "🍎", "42", "3.14", "I'LL", "x<y", "#hash", "e-mail"]
    words += ["don't", "...", "?!", "naïve\tÉcole\n_under_", "½", "™"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(300)]
    prompts += ["".join(rng.choices("ab1 !?,.-'()éß雪🍎Ω", k=12)) for _ in range(300)]
    for prompt in [*PROMPTS, *prompts]:
        assert ours.encode(prompt) == theirs.encode(prompt)
    assert len(ours) == theirs.vocab_size == 49408
    whole = [p for p in prompts if len(theirs.encode(p)) <= 75]
    assert torch.equal(tokenize_captions(ours, whole), theirs(whole))


@pytest.mark.parametrize(("pad", "token"), [(0, "!"), (49407, EOS)])
def test_a_tokenizer_keeps_its_padding_and_its_words_in_a_folder(tmp_path, pad, token):
    tokenizer = build_clip_tokenizer(pad)
    save_clip_tokenizer(tokenizer, tmp_path / "ours")
    transformers_tokenizer(tokenizer).save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        again = load_clip_tokenizer(folder)
        assert (again.pad_token, again.pad_token_id, again.model_max_length) == (token, pad, 77)
        assert torch.equal(tokenize_captions(again, PROMPTS), tokenize_captions(tokenizer, PROMPTS))
        assert again.vocab == tokenizer.vocab


def test_a_padding_that_is_no_token_is_refused():
    with pytest.raises(ValueError, match="padding with token 49408: must be from 0 to 49407"):
        build_clip_tokenizer(49408)


def test_both_numberings_of_clip_skip_name_the_same_layer():
    """The web UI's 1 is the last layer; SD 2 and SDXL are at 2 by themselves, and SD 2's last is not there."""
    sd1, sd2, xl = (tower_of(name, "text_encoder") for name in ("sd1", "sd2-base", "sdxl"))
    assert [sd1.clip_skip_converter()(k) for k in (1, 2, 4)] == [0, 1, 3]
    assert [sd2.clip_skip_converter()(k) for k in (2, 3, 5)] == [0, 1, 3]
    assert [xl.clip_skip_converter()(k) for k in (1, 2, 4)] == [-1, 0, 2]
    for k, tower, said in (
        (0, sd1, "1 to 4"),
        (5, sd1, "1 to 4"),
        (1, sd2, "2 to 5"),
        (6, sd2, "2 to 5"),
        (5, xl, "1 to 4"),
    ):
        with pytest.raises(ValueError, match=f"clip skip {k}: this model has the layers {said}, counted from the end"):
            tower.clip_skip_converter()(k)
    ids = tokenize_captions(sd1.tokenizer, ["a cat"])
    for tower in (sd1, sd2, xl):
        places = [skip for skip in range(-3, 6) if is_there(tower, ids, skip)]
        assert places == [
            tower.clip_skip_converter()(k) for k in range(1 + tower.num_dropped_layers, 5 + tower.num_dropped_layers)
        ]


def is_there(tower, ids, skip):
    try:
        tower.encode_ids(ids, skip)
    except ValueError as error:
        assert str(error).startswith(f"clip skip {skip}: must be from ")
        return False
    return True


def test_pooled_is_of_the_first_eos_though_added_ids_are_greater():
    tower = tower_of("sdxl", "text_encoder_2")
    ids = tokenize_captions(tower.tokenizer, ["a cat"])
    tower.set_placeholder_embeddings([torch.ones(2, 32)])
    assert ids[0, 3] == tower.tokenizer.eos_token_id
    ids[0, 1] = 49409
    with torch.no_grad():
        last = tower.model.text_model(ids).last_hidden_state
    torch.testing.assert_close(tower.encode_ids(ids)[1], tower.model.text_projection(last[:, 3]))


def test_added_vectors_are_read_and_go_without_a_trace(tower):
    before = {name: value.clone() for name, value in tower.model.state_dict().items()}
    ids = tokenize_captions(tower.tokenizer, ["a cat"])
    states, _ = tower.encode_ids(ids)
    tower.set_placeholder_embeddings(
        [tower.model.text_model.embeddings.token_embedding.weight[[320]].clone(), torch.randn(3, 32)]
    )
    assert torch.equal(tower.encode_ids(torch.where(ids == 320, 49408, ids))[0], states)
    assert not torch.equal(tower.encode_ids(torch.where(ids == 320, 49409, ids))[0], states)
    tower.set_placeholder_embeddings([])
    after = tower.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_no_norm_is_a_product_and_weights_of_one_are_nothing():
    z, w = torch.randn(2, 5, 3), torch.rand(2, 5)
    torch.testing.assert_close(apply_emphasis_no_norm(z, w), z * w[..., None])
    assert apply_emphasis_no_norm(z, torch.ones(2, 5)) is z


def test_captions_that_are_cut_are_counted_and_the_first_is_named():
    tokenizer = build_clip_tokenizer(0)
    with pytest.warns(UserWarning, match="2 of 4 captions are cut to 77 tokens; the first is 'cat cat ") as said:
        warn_about_truncation(tokenizer, ["cat " * 75, "cat " * 76, "", "dog " * 200])
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_truncation(tokenizer, ["cat " * 75, ""])
