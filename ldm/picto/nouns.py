"""Nouns in captions: articles, plurals, and names without their colour words."""

from __future__ import annotations

import re

COLOR_WORDS_TEXT = "red orange yellow green blue purple pink brown gray grey black white gold golden silver bronze"
COLOR_WORDS = set(COLOR_WORDS_TEXT.split())

IRREGULAR_PLURALS_TEXT = """
mouse mice goose geese tooth teeth foot feet ox oxen child children man men woman women person people die dice
fish fish blowfish blowfish jellyfish jellyfish sheep sheep deer deer moose moose bison bison squid squid
shrimp shrimp knife knives leaf leaves sheaf sheaves wolf wolves scarf scarves loaf loaves potato potatoes
tomato tomatoes mango mangoes volcano volcanoes tornado tornadoes mosquito mosquitoes buffalo buffaloes
"""
IRREGULAR_PLURALS = dict(zip(IRREGULAR_PLURALS_TEXT.split()[::2], IRREGULAR_PLURALS_TEXT.split()[1::2], strict=True))

# Without an article and never counted: substances, games, proper names.
UNCOUNTABLE_NOUNS_TEXT = """
bread rice spaghetti sushi broccoli garlic butter bacon popcorn salt sake milk ice fire water fog rain snow
soap money paper yarn corn wood lightning pasta meat cheese curry chocolate coffee tea beer wine champagne
ramen candy oden paella coral luggage dna badminton lacrosse hockey tennis cutlery treasure lettuce cabbage
zzz hundred fuji claus santa saturn earth leo virgo libra capricorn aquarius cancer gemini scorpio taurus
aries pisces ophiuchus sagittarius
"""
UNCOUNTABLE_NOUNS = set(UNCOUNTABLE_NOUNS_TEXT.split())
PERSON_NOUNS = {"face", "head", "person", "man", "woman", "people", "men", "women"}
POSTMODIFIERS_OF_ANY_NOUN = ("with", "of", "in", "on", "at", "without", "behind", "to", "over", "not", "done", "tilted")
POSTMODIFIERS = {*POSTMODIFIERS_OF_ANY_NOUN, "showing", "facing", "fluttering"}
SINGULAR_S_SUFFIXES = ("ss", "us", "rhinoceros", "lens", "canvas")


def split_head_noun(name: str) -> tuple[list[str], str, list[str]]:
    """The words before the head noun of a name, the noun, and the words after it."""
    words = name.split(" ")
    if words[0] in PERSON_NOUNS:
        return [], words[0], words[1:]
    end = next((i for i, word in enumerate(words) if i and word in POSTMODIFIERS), len(words))
    return words[: end - 1], words[end - 1], words[end:]


def is_countable(name: str) -> bool:
    """Whether it is a singular count noun, unlike `scissors`, `fork and knife` and `bread`."""
    before, noun, _ = split_head_noun(name)
    plural = noun.endswith("s") and not noun.endswith(SINGULAR_S_SUFFIXES)
    plural = plural or noun in IRREGULAR_PLURALS.values() - IRREGULAR_PLURALS.keys()
    return not (plural or noun in UNCOUNTABLE_NOUNS or "and" in before)


def add_indefinite_article(name: str) -> str:
    """The name with its indefinite article, by sound; without one for plurals and uncountable nouns."""
    before, noun, _ = split_head_noun(name)
    if not is_countable(" ".join([w for w in before if w != "and"] + [noun])):
        return name
    vowel = re.match(r"[aeiou]|hour|x-|sos", name) and not re.match(r"uni|u[kfs][aeo]|eu|one\b|once", name)
    return f"{'an' if vowel else 'a'} {name}"


def pluralize(name: str) -> str:
    """`star` to `stars`, `glass of milk` to `glasses of milk`, `snowman` to `snowmen`."""
    before, noun, after = split_head_noun(name)
    return " ".join([*before, pluralize_noun(noun), *after])


def pluralize_noun(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("man") and noun not in ("human", "talisman"):
        return noun[:-3] + "men"
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return re.sub(r"(?<![aeiou])y$", "ie", noun) + "s"


def strip_color_word(name: str) -> str | None:
    """The name without a leading colour word; None where nothing is left, or another colour word is."""
    words = name.split(" ")
    words = words[1:] if words[0] in COLOR_WORDS else words
    return None if not words or COLOR_WORDS & set(words) else " ".join(words)
