"""Prompts: the web UI's grammar, its cutting into chunks, and states that transformers' own classes give for each."""

import random
import re

import pytest
import torch
from transformers import CLIPTokenizer

from ldm.checkpoints.formats import load_checkpoint
from ldm.nn import text_encoders
from ldm.nn import tokenizer as tokenizers
from ldm.nn.prompts import PromptSpan, WeightedToken, parse_prompt_attention, split_into_chunks
from ldm.nn.text_encoders import apply_emphasis, tokenize_prompt
from ldm.nn.tokenizer import load_clip_tokenizer
from tests.diffusers_models import transformers_text_encoder

COMMA = 1


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_clip_tokenizer(tiny / "tokenizer")


@pytest.mark.parametrize(
    "prompt, sections",
    [
        ("", [[]]),
        ("normal text", [[("normal text", 1)]]),
        (r"a (b:1.5) [c] \(d\)", [[("a ", 1), ("b", 1.5), (" ", 1), ("c", 1 / 1.1), (" (d)", 1)]]),
        ("((a)) [[b]]", [[("a", 1.21), (" ", 1), ("b", 1 / 1.21)]]),
        ("(unbalanced", [[("unbalanced", 1.1)]]),
        ("a [(b:1.5) [c", [[("a ", 1), ("b", 1.5 / 1.1), (" ", 1 / 1.1), ("c", 1 / 1.21)]]),
        ("a) b] c:1.3)", [[("a) b] c:1.3)", 1)]]),
        (r"\(literal\] \\ a\b", [[(r"(literal] \ a\b", 1)]]),
        ("(unnecessary)(parens)", [[("unnecessaryparens", 1.1)]]),
        ("(a:-.5)(b: +2. ) (c:0)", [[("a", -0.5), ("b", 2), (" ", 1), ("c", 0)]]),
        ("(a:b) [c:2] (d:1.2.3)", [[("a:b", 1.1), (" ", 1), ("c:2", 1 / 1.1), (" ", 1), ("d:1.2.3", 1.1)]]),
        ("(a [b) c]", [[("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                [
                    *[("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55)],
                    *[(", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
                ]
            ],
        ),
        ("a BREAK b, break BREAKS", [[("a ", 1)], [(" b, break BREAKS", 1)]]),
        ("(a BREAK b:1.2)BREAK", [[("a ", 1.2)], [(" b", 1.2)], []]),
    ],
)
def test_the_grammar_by_examples(prompt, sections):
    parsed = parse_prompt_attention(prompt)
    assert [[part.text for part in section] for section in parsed] == [[part for part, _ in s] for s in sections]
    weights = [part.weight for section in parsed for part in section]
    assert weights == pytest.approx([weight for section in sections for _, weight in section], rel=1e-12)


def test_an_escaped_text_is_itself():
    rng = random.Random(0)
    for _ in range(300):
        wanted = "".join(rng.choices("ab:1. ()[]\\", k=rng.randint(1, 30)))
        assert parse_prompt_attention(re.sub(r"([()\[\]\\])", r"\\\1", wanted)) == ((PromptSpan(wanted, 1.0),),)


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("(" * 33 + "a", r"prompt: \( nested more than 32 deep; \\\( is a bracket as text"),
        ("(a:101)", "prompt weight 101: must be from -100 to 100"),
        ("((a:50):-3)", "prompt weight -150"),
        (f"(a:{'9' * 400})", "prompt weight inf"),
        ("a " * 4000, "prompt 'a a .*286 chunks of 14 tokens, at most 256"),
        ("BREAK " * 257, "257 chunks"),
    ],
)
def test_what_cannot_be_read_is_refused(tokenizer, prompt, said):
    with pytest.raises(ValueError, match=said):
        tokenize_prompt(tokenizer, prompt)


def wrapped(ids, size, reach=20):
    """The web UI's rule as it goes, token by token, with the place of the last comma in the open chunk."""
    done, chunk, last = [], [], None
    for k in ids:
        if len(chunk) == size:
            carried = []
            if k != COMMA and last is not None and size - last <= reach:
                chunk, carried = chunk[: last + 1], chunk[last + 1 :]
            done.append(chunk)
            chunk, last = carried, None
        elif k == COMMA:
            last = len(chunk)
        chunk.append(k)
    return [*done, chunk]


@pytest.mark.parametrize("size", [75, 30])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3, 1.0])
def test_long_texts_are_cut_as_the_web_ui_does(size, share):
    rng = random.Random(0)
    for _ in range(100):
        tokens = [
            WeightedToken(COMMA if rng.random() < share else k + 2, rng.random())
            for k in range(rng.randint(0, 6 * size))
        ]
        pieces = split_into_chunks(tokens, size, COMMA)
        assert [token for piece in pieces for token in piece] == tokens
        assert [[token.id for token in piece] for piece in pieces] == wrapped([token.id for token in tokens], size)


def test_the_size_of_a_chunk_less_one_goes_into_one_and_a_break_ends_it(tokenizer):
    counts = {"a " * 14: 1, "a " * 15: 2, "a " * 14 + "BREAK": 1, "BREAK a": 2, "a BREAK BREAK b": 3, "": 1, "BREAK": 1}
    assert {prompt: len(tokenize_prompt(tokenizer, prompt)) for prompt in counts} == counts


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # of Stable Diffusion 1.x and 2.x
@pytest.mark.parametrize("prompt", ["", "a red apple", "Two stars, naïve 雪\n", "a " * 14, "a <|endoftext|> b"])
def test_a_short_prompt_is_transformers_own_tokens(tiny, pad, prompt):
    tokenizer = load_clip_tokenizer(tiny / "tokenizer")
    tokenizer.pad_token = pad
    theirs = CLIPTokenizer.from_pretrained(tiny / "tokenizer", pad_token=pad)
    (chunk,) = tokenize_prompt(tokenizer, prompt)
    ids, weights = text_encoders.TextEncoder(None, tokenizer).pad_chunk(chunk)
    assert ids.tolist() == [theirs(prompt, padding="max_length", truncation=True, max_length=16).input_ids]
    assert weights.tolist() == [[1.0] * 16]
    assert tokenize_prompt(tokenizer, f"({prompt}:1.0)") == tokenize_prompt(tokenizer, f"[({prompt}:1.1)]") == (chunk,)


PARTS = [("a red apple on a blue background, ", 1.0), ("two stars, a cat", 1.4), (" to the left of a dog, ", 0.6)]


@pytest.mark.parametrize("repeat", [1, 2, 5])
@pytest.mark.parametrize("emphasis", [True, False])
def test_a_long_prompt_is_its_chunks_states_in_a_row(tiny, repeat, emphasis):
    """The concatenation rule, from transformers' own tokenizer and text encoder; each chunk's mean is what it was."""
    parts = [(part, weight if emphasis else 1.0) for part, weight in PARTS * repeat]
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    own = load_checkpoint(tiny, torch.device("cpu"), torch.float32).text_encoders[0]
    own.model.text_model.final_layer_norm.bias += 0.2  # as in trained text encoders, whose states have a mean
    tower = transformers_text_encoder(own.model)
    comma = tokenizer(",", add_special_tokens=False).input_ids[0]
    ids, weights = [], []
    for part, weight in parts:
        words = tokenizer(part).input_ids[1:-1]
        ids, weights = ids + words, weights + [weight] * len(words)
    rows = wrapped([COMMA if k == comma else k + 2 for k in ids], 14)
    states = []
    for row in rows:
        frame = [*row, *[None] * (15 - len(row))]
        of_row = [tokenizer.bos_token_id] + [tokenizer.eos_token_id if k is None else ids.pop(0) for k in frame]
        factors = torch.tensor([1.0] + [1.0 if k is None else weights.pop(0) for k in frame])
        z = tower(input_ids=torch.tensor([of_row])).last_hidden_state[0].detach()
        scaled = factors[:, None] * z
        states.append(scaled / scaled.mean() * z.mean())
    prompt = "".join(part if weight == 1 else f"({part}:{weight})" for part, weight in parts)
    assert len(states) > repeat
    ours = torch.cat(
        [own.encode(chunk)[0] for chunk in tokenize_prompt(own.tokenizer, prompt)],
        dim=1,
    )
    torch.testing.assert_close(ours, torch.cat(states)[None], rtol=0, atol=1e-5)


def test_weights_keep_each_row_s_mean_and_heed_no_neighbour():
    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(4, 16, 32, generator=g) + 1, 2 * torch.rand(4, 16, generator=g)
    out = apply_emphasis(z, w)
    torch.testing.assert_close(out.mean((1, 2)), z.mean((1, 2)))
    torch.testing.assert_close(out, torch.cat([apply_emphasis(z[k : k + 1], w[k : k + 1]) for k in range(4)]))
    torch.testing.assert_close(out / z, (out / z)[..., :1].expand_as(z))  # a token's state keeps its direction
    torch.testing.assert_close((out / z)[..., 0] / w, ((out / z)[..., 0] / w)[:, :1].expand_as(w))
    assert apply_emphasis(z, torch.ones(4, 16)) is z
    centred = z - z.mean(-1, keepdim=True)
    torch.testing.assert_close(apply_emphasis(centred, w), w[..., None] * centred)


def test_a_character_that_the_vocabulary_lacks_is_named(tiny):
    whole = load_clip_tokenizer(tiny / "tokenizer")
    vocab = {word: k for word, k in whole.base_vocab.items() if word not in ("é", "é</w>")}  # one of the bytes
    merges = [(a, b) for a, b in whole.merges if a + b in vocab]
    poor = tokenizers.CLIPTokenizer(vocab, merges, model_max_length=16)
    with pytest.raises(ValueError, match="prompt: '雪' cannot be spelled"):
        tokenize_prompt(poor, "a (cat in 雪:1.2)")
    assert len(tokenize_prompt(poor, "a <|endoftext|> cat")) == 1
