"""Captions: what is wrong is told by its kind, and what people write is left in peace."""

import pytest

from ldm.audit.caption_checks import check_captions, check_tokenization, count_tokens, kohya_class_folder
from ldm.data.sources import ImageSample


def sample(caption, key="a.png"):
    return ImageSample(key, caption, bytes)


WRONG = {
    "file name": ["a red fox.jpg", "IMG_0042", "dsc00123", "Screenshot 2024-01-02", "photo_17"],
    "markup": ["a <b>red</b> fox", "a fox<br/>", "a fox &amp; a hen", "&#39;a fox&#39;", "see https://example.org"],
    "mojibake": [
        "a cafÃ©",
        "itâ€™s a fox",
        "a fox\ufffd",
        "a\x00fox",
        "ä½ å¥½".encode("latin-1", "ignore").decode("latin-1"),
    ],
    "placeholder caption": ["None", "nan", " ... ", "N/A", "(untitled)", "TODO"],
    "multiple lines": ["a fox\nwith a hen"],
}
WRONG["mojibake"][-1] = "你好".encode().decode("latin-1")


@pytest.mark.parametrize(("kind", "caption"), [(kind, caption) for kind, group in WRONG.items() for caption in group])
def test_what_is_wrong_is_told_and_nothing_else(kind, caption):
    key = "photo_17.png" if caption == "photo_17" else "a.png"
    assert [fault.kind for fault in check_captions([sample(caption, key)], None)] == [kind]


RIGHT = [
    "a red fox",
    "café",
    "naïve façade, Zürich",
    "雪の中の狐",
    "a <sks> fox",
    "<my-cat> & co.",
    "1girl, solo",
    "a fox :)",
]


@pytest.mark.parametrize(
    "caption", [*RIGHT, "x < y > z", "£5, 20 °C", "no", "fox", "🦊", "Ã la carte", "a 3.5 mm plug"]
)
def test_what_people_write_is_left_in_peace(caption):
    assert list(check_captions([sample(caption)], None)) == []


def test_a_class_is_a_folder_whose_tokens_are_the_caption():
    assert kohya_class_folder(sample("sks dog", "10_sks dog/a.png")) == kohya_class_folder(
        sample("sks dog", "2:10_sks dog/a.png")
    )
    assert kohya_class_folder(sample("sks dog", "10_sks dog/a.png")) == "10_sks dog"
    assert (
        kohya_class_folder(sample("my dog", "10_sks dog/a.png"))
        is kohya_class_folder(sample("sks dog", "10_sks dog"))
        is None
    )


def test_tokens_are_counted_as_the_model_reads_them(pipe):
    tokenizer = pipe.model.text_encoders[0].tokenizer
    for caption in ("a red apple", "two stars, a cat to the left of a dog"):
        assert count_tokens(caption, tokenizer, {}) == len(tokenizer.encode_batch([caption])[0])
    words = {"<cat>": (0, 1, 2)}
    spread = count_tokens("a <cat> to the left", tokenizer, words)
    assert spread == count_tokens("a", tokenizer, {}) + count_tokens("to the left", tokenizer, {}) - 2 + 3
    long = sample("a " * 14, "b.png"), sample("a " * 15)
    assert [fault.key for fault in check_tokenization(long, tokenizer, {})] == ["a.png"]
