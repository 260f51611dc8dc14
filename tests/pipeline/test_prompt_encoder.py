"""Texts: what a U-Net is conditioned on equals diffusers' own encode_prompt, textual inversion included."""

import gc
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from open_clip import SimpleTokenizer
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.formats import Checkpoint
from ldm.nn.text_encoders import TextEncoder, build_text_encoder
from ldm.nn.tokenizer import build_clip_tokenizer, load_clip_tokenizer
from ldm.nn.unet import UNet, UNetConfig
from ldm.pipeline.prompt_encoder import EMBEDDING_CACHE_BYTES, PromptEncoder, encoded_chunk_nbytes
from ldm.pipeline.request import Request
from tests.diffusers_models import transformers_text_encoder, transformers_tokenizer

SMALL = {"intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "projection_dim": 24}
WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 48}
PROMPTS = ["", "a red apple", "An image of a squirrel in Picasso style, 8k"]
IDS = torch.tensor([[480.0, 640.0, 8.0, 16.0, 512.0, 768.0]])


tokenizer_of = cache(build_clip_tokenizer)


def model_of(name):
    """A small random model with the text encoders of a family; the U-Net's own weights are not looked at."""
    family, towers = FAMILIES[name], []
    torch.manual_seed(0)
    for folder, record in family.text_encoders.items():
        model = build_text_encoder({**record.config, **SMALL, "hidden_size": WIDTHS[folder]}, record.with_projection)
        for parameter in model.eval().requires_grad_(False).parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        tokenizer = tokenizer_of(record.pad_token_id)
        towers.append(
            TextEncoder(
                model, tokenizer, record.layer_idx, record.final_norm, record.with_projection, record.num_dropped_layers
            )
        )
    width = sum(tower.model.config.hidden_size for tower in towers)
    unet = UNet(UNetConfig(**UNET, cross_attention_dim=width, **(ADDED if len(towers) > 1 else {})))
    return Checkpoint(
        unet, None, tuple(towers), None, None, force_zeros_for_empty_prompt=family.force_zeros_for_empty_prompt
    )


@pytest.fixture(scope="module", params=["sd1", "sd2-base", "sdxl"])
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def xl():
    return model_of("sdxl")


@pytest.fixture
def texts(model):
    return PromptEncoder(model)


class Theirs:
    """(prompt, negative, their contexts, their pooled vectors), of diffusers' pipeline with the same text encoders."""

    def __init__(self, model):
        encoder, *second = (transformers_text_encoder(tower.model) for tower in model.text_encoders)
        tokenizer, *other = (transformers_tokenizer(tower.tokenizer) for tower in model.text_encoders)
        parts = {"vae": None, "unet": None, "scheduler": None, "text_encoder": encoder, "tokenizer": tokenizer}
        if second:
            flags = {"force_zeros_for_empty_prompt": model.force_zeros_for_empty_prompt, "add_watermarker": False}
            self.pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=second[0], tokenizer_2=other[0], **flags)
        else:
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            self.pipe = StableDiffusionPipeline(**parts, **none)
            object.__setattr__(
                encoder, "text_model", encoder
            )  # as in transformers 4: diffusers asks for it with clip_skip
        self.xl = bool(second)

    def __call__(self, prompt, negative=None, skip=None):
        with torch.no_grad():
            found = self.pipe.encode_prompt(
                prompt=prompt,
                negative_prompt=negative,
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                clip_skip=skip,
            )
        return found if self.xl else (*found, None, None)


@pytest.mark.parametrize("skip", [None, 0, 1, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_diffusers_own(model, texts, prompt, skip):
    context, _, pooled, _ = Theirs(model)(prompt, skip=skip)
    ours = texts(prompt, clip_skip=skip or 0, time_ids=IDS)
    torch.testing.assert_close(ours.context, context, rtol=0, atol=1e-5)
    assert (ours.vector is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(ours.vector, model.unet.make_vector(pooled, IDS), rtol=0, atol=1e-5)
        other = texts(prompt, time_ids=IDS.flip(1)).vector
        assert torch.equal(other[:, :24], ours.vector[:, :24]) and not torch.equal(other, ours.vector)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("negative", [None, "", "blurry"])
def test_an_empty_negative_is_diffusers_own_both_ways(model, negative, zero):
    model = replace(model, force_zeros_for_empty_prompt=zero and len(model.text_encoders) > 1)
    _, context, _, pooled = Theirs(model)("a cat", negative)
    ours = PromptEncoder(model)(negative, time_ids=IDS)
    torch.testing.assert_close(ours.context, context, rtol=0, atol=1e-5)
    assert (not ours.context.any()) == (model.force_zeros_for_empty_prompt and negative is None)
    if pooled is not None:
        torch.testing.assert_close(ours.vector, model.unet.make_vector(pooled, IDS), rtol=0, atol=1e-5)


def test_no_prompt_is_zeros_of_any_length_and_their_keys_and_values(xl):
    texts = PromptEncoder(xl)
    none, pair = texts(None, 3), texts("a cat " * 90, 3)
    assert none.context.shape == pair.context.shape == (1, 231, 80)
    assert not none.context.any() and not any(k.any() or v.any() for k, v in none.kv_cache)
    assert texts.num_chunks(Request("a")) == 1 and texts.num_chunks(Request("a " * 76)) == 2
    assert PromptEncoder(replace(xl, force_zeros_for_empty_prompt=False))(None).context.equal(texts("").context)


def test_a_long_prompt_is_its_chunks_in_a_row_and_pooled_is_the_first_s(model, texts):
    parts = ["a red apple on blue " * 15, "a cat to the left of two dogs, in the style of Monet " * 4]  # 75 tokens, 52
    theirs = Theirs(model)
    first, second, empty = (theirs(part) for part in [*parts, ""])
    ours = texts("".join(parts), 3, time_ids=IDS)
    torch.testing.assert_close(ours.context, torch.cat([first[0], second[0], empty[0]], 1), rtol=0, atol=1e-5)
    if first[2] is not None:
        torch.testing.assert_close(ours.vector, model.unet.make_vector(first[2], IDS), rtol=0, atol=1e-5)
    for k, (key, value) in enumerate(ours.kv_cache):
        alone = texts(parts[1]).kv_cache[k]
        torch.testing.assert_close(key[:, 77:154], alone[0])
        torch.testing.assert_close(value[:, 77:154], alone[1])


def test_weights_of_one_change_nothing_bit_for_bit(texts):
    plain = texts("a red apple", time_ids=IDS)
    for prompt in ("a (red:1.0) apple", "((a red:1) apple:1.0)", "a [(red:1.1)] apple"):
        other = texts(prompt, time_ids=IDS)
        assert torch.equal(plain.context, other.context)
        assert plain.vector is None or torch.equal(plain.vector, other.vector)
    assert not torch.equal(plain.context, texts("a (red:1.2) apple").context)


def test_exclamation_marks_are_words_to_a_text_encoder_that_pads_with_them(xl, tmp_path):
    """As to its makers; transformers' tokenizer takes each in a text for padding, and so does diffusers."""
    theirs, texts = Theirs(xl), PromptEncoder(xl)
    transformers_tokenizer(xl.text_encoders[1].tokenizer).save_pretrained(tmp_path)
    theirs.pipe.tokenizer_2 = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt, differs in (("wow", False), ("wow!", True)):
        gap = (texts(prompt).context - theirs(prompt)[0]).abs()
        assert gap[..., :32].max() < 1e-5 and (gap[..., 32:].max() > 1e-2) == differs
    (chunk,) = texts.tokenize_prompt("wow!")
    assert chunk.ids[1:3] == tuple(SimpleTokenizer().encode("wow!"))


def test_a_layer_that_is_not_there_is_refused(texts):
    with pytest.raises(ValueError, match="clip skip 4: must be from "):
        texts("a cat", clip_skip=4)


def test_text_encoders_of_two_vocabularies_are_refused(xl, tiny):
    other = replace(xl.text_encoders[1], tokenizer=load_clip_tokenizer(tiny / "tokenizer"))
    with pytest.raises(ValueError, match="the vocabularies of text_encoder and text_encoder_2 differ"):
        PromptEncoder(replace(xl, text_encoders=(xl.text_encoders[0], other)))


def test_the_cache_of_encoded_chunks_is_bounded_by_bytes(model, texts):
    sizes = []
    texts("a cat").map(lambda a: sizes.append(a.nbytes))
    assert encoded_chunk_nbytes(model) == sum(sizes)
    cache = texts._encode_chunk
    assert cache.cache_info().maxsize == EMBEDDING_CACHE_BYTES // sum(sizes) and cache.cache_info().currsize == 1
    texts("a cat")
    assert cache.cache_info().misses == 1
    texts.clear()
    assert cache.cache_info().currsize == 0


def vectors(model, n, seed=0):
    """A file's tensors: n vectors for each text encoder, as large as those of words."""
    g = torch.Generator().manual_seed(seed)
    names = ["emb_params"] if len(model.text_encoders) == 1 else ["clip_l", "clip_g"]
    widths = [tower.model.config.hidden_size for tower in model.text_encoders]
    return {name: 0.05 * torch.randn(n, width, generator=g) for name, width in zip(names, widths, strict=True)}


@pytest.fixture
def embedding(model, tmp_path):
    def file(n, seed=0):
        path = tmp_path / f"{n}-{seed}.safetensors"
        save_file(vectors(model, n, seed), path)
        return path

    return file


@pytest.mark.parametrize("n", [1, 3])
def test_an_added_word_is_what_diffusers_makes_of_it(model, texts, embedding, n):
    texts.add_embedding("<cat-toy>", embedding(n))
    theirs = Theirs(model)
    pairs = [("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")]
    for (tokenizer, encoder), tensor in zip(pairs, vectors(model, n).values(), strict=False):
        words = {"tokenizer": getattr(theirs.pipe, tokenizer), "text_encoder": getattr(theirs.pipe, encoder)}
        theirs.pipe.load_textual_inversion({"<cat-toy>": tensor}, token="<cat-toy>", **words)
    for prompt in ("a <cat-toy> on a table", "<cat-toy>, <cat-toy>", "a cat toy"):
        context, _, pooled, _ = theirs(prompt)
        ours = texts(prompt, time_ids=IDS)
        torch.testing.assert_close(ours.context, context, rtol=0, atol=1e-5)
        if pooled is not None:
            torch.testing.assert_close(ours.vector, model.unet.make_vector(pooled, IDS), rtol=0, atol=1e-5)
    texts.remove_embedding("<cat-toy>")


def test_added_words_go_without_a_trace_in_any_order(model, texts, embedding):
    def everything():
        return [value.clone() for tower in model.text_encoders for value in tower.model.state_dict().values()]

    before, plain = everything(), texts("a <cat-toy> and a mouse-toy").context
    vocabularies = [tower.tokenizer.vocab for tower in model.text_encoders]
    seen = {}
    for word, n in (("<cat-toy>", 2), ("mouse-toy", 3), ("toy-3", 1)):
        texts.add_embedding(word, embedding(n))
        seen[word] = texts(f"a ({word}:1.2)").context
    texts.remove_embedding("<cat-toy>")
    for word in ("mouse-toy", "toy-3"):
        assert torch.equal(texts(f"a ({word}:1.2)").context, seen[word])
    for word in ("toy-3", "mouse-toy"):
        texts.remove_embedding(word)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert [tower.tokenizer.vocab for tower in model.text_encoders] == vocabularies
    assert torch.equal(texts("a <cat-toy> and a mouse-toy").context, plain)


def test_words_come_and_go_in_the_same_memory(model, texts, embedding):
    def count():
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))

    counts = []
    for _ in range(3):
        for _ in range(10):
            texts.add_embedding("<cat-toy>", embedding(2))
            texts("a <cat-toy>")
            texts.remove_embedding("<cat-toy>")
        counts.append(count())
    assert len(set(counts)) == 1


def test_a_word_is_found_in_any_case_and_not_within_another(model, texts, embedding):
    texts.add_embedding("sks-dog", embedding(2))
    start = model.text_encoders[0].model.config.vocab_size
    one = (start, start + 1)

    def added(prompt):
        return [k for chunk in texts.tokenize_prompt(prompt) for k in chunk.ids if k >= start]

    found = {"a sks-dog": 1, "SKS-dog,Sks-DOG": 2, "(sks-dog)[sks-dog]": 2, "sks-dogs": 0, "asks-dog": 0, "sks dog": 0}
    assert {prompt: len(added(prompt)) // 2 for prompt in found} == found
    assert added("a sks-dog") == list(one)
    (chunk,) = texts.tokenize_prompt("a (sks-dog:1.3) b")
    assert [chunk.weights[chunk.ids.index(k)] for k in one] == [1.3, 1.3]
    texts.add_embedding("sks-dog-2", embedding(3))
    assert added("sks-dog-2 sks-dog") == [*range(start + 2, start + 5), *one]
    for word in ("sks-dog", "sks-dog-2"):
        texts.remove_embedding(word)


def test_a_word_of_many_vectors_is_not_torn(model, texts, embedding):
    texts.add_embedding("sks-dog", embedding(5))
    for before in range(68, 77):
        first, *rest = texts.tokenize_prompt("a " * before + "sks-dog b")
        whole = [[k for k in chunk.ids if k >= 49408] for chunk in (first, *rest)]
        assert [ids for ids in whole if ids] == [list(range(49408, 49413))]
        assert len(first.ids) - 2 == (before + 6 if before < 70 else 75 if before in (70, 75, 76) else before)
    texts.remove_embedding("sks-dog")


@pytest.mark.parametrize("word", ["cat", "<|endoftext|>", "", " ", " <cat-toy>", "<there>", "<THERE>"])
def test_a_word_that_is_none_or_there_is_refused(texts, embedding, word):
    texts.add_embedding("<there>", embedding(1))
    with pytest.raises(ValueError, match="must be a word that the model does not have yet"):
        texts.add_embedding(word, embedding(1))
    texts.remove_embedding("<there>")
    with pytest.raises(ValueError, match="embedding '<there>': not added; there are none"):
        texts.remove_embedding("<there>")


def test_a_text_encoder_without_vectors_reads_the_prompt_without_the_word(model, texts, tmp_path):
    both = vectors(model, 2)
    if len(both) == 1:  # the reverse: vectors for a text encoder that the model does not have
        both, warning = {"clip_l": both["emb_params"], "clip_g": torch.ones(2, 48)}, "text_encoder_2 have no use"
        kept = dict(both)
    else:
        warning, kept = "text_encoder_2 does not see it", {"clip_l": both["clip_l"]}
    save_file(kept, tmp_path / "half.safetensors")
    with pytest.warns(UserWarning, match=warning):
        texts.add_embedding("<cat-toy>", tmp_path / "half.safetensors")
    width = model.text_encoders[0].model.config.hidden_size
    ours, plain = texts("a <cat-toy> here").context, texts("a here").context
    assert not torch.equal(ours[..., :width], plain[..., :width])
    assert torch.equal(ours[..., width:], plain[..., width:])
    texts.remove_embedding("<cat-toy>")


def test_vectors_that_do_not_fit_are_refused_by_name(model, texts, tmp_path):
    _, *second = (tower.model.config.hidden_size for tower in model.text_encoders)
    other = {"clip_g" if not second else "<word>": torch.ones(2, 48)}
    wide = {name: torch.ones(2, 40) for name in vectors(model, 1)}
    for tensors, said in (
        (
            other,
            "vectors of width 48 for" if second else "an embedding for text_encoder_2; this model has text_encoder",
        ),
        (wide, "vectors of width 40 for text_encoder, expected 32"),
        (vectors(model, 76), "76 vectors, at most 75 fit in a chunk"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=rf"bad\.safetensors: {said}"):
            texts.add_embedding("<cat-toy>", tmp_path / "bad.safetensors")
    assert not texts.embeddings
