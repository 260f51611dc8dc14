"""Names in captions: articles, plurals, and what they are without their colours."""

from __future__ import annotations

import re

COLOURS = """
red orange yellow green blue purple pink brown gray grey black white gold golden silver bronze
"""
COLOUR_WORDS = set(COLOURS.split())

PLURAL_PAIRS = """
mouse mice goose geese tooth teeth foot feet ox oxen child children man men woman women person people die dice
fish fish blowfish blowfish jellyfish jellyfish sheep sheep deer deer moose moose bison bison squid squid
shrimp shrimp knife knives leaf leaves sheaf sheaves wolf wolves scarf scarves loaf loaves potato potatoes
tomato tomatoes mango mangoes volcano volcanoes tornado tornadoes mosquito mosquitoes buffalo buffaloes
"""
PLURALS = dict(zip(PLURAL_PAIRS.split()[::2], PLURAL_PAIRS.split()[1::2], strict=True))

# Said without an article and never counted: stuff, games, proper names.
MASS_NOUNS = """
bread rice spaghetti sushi broccoli garlic butter bacon popcorn salt sake milk ice fire water fog rain snow
soap money paper yarn corn wood lightning pasta meat cheese curry chocolate coffee tea beer wine champagne
ramen candy oden paella coral luggage dna badminton lacrosse hockey tennis cutlery treasure lettuce cabbage
zzz hundred fuji claus santa saturn earth leo virgo libra capricorn aquarius cancer gemini scorpio taurus
aries pisces ophiuchus sagittarius
"""
MASS = set(MASS_NOUNS.split())
PEOPLE = {"face", "head", "person", "man", "woman", "people", "men", "women"}
AFTER = ("with", "of", "in", "on", "at", "without", "behind", "to", "over", "not", "done", "tilted")
AFTER_HEAD = {*AFTER, "showing", "facing", "fluttering"}
SINGULAR_IN_S = ("ss", "us", "rhinoceros", "lens", "canvas")


def head(name: str) -> tuple[list[str], str, list[str]]:
    """The words before the noun that the name is built on, the noun, and the words after it."""
    words = name.split(" ")
    if words[0] in PEOPLE:
        return [], words[0], words[1:]
    end = next((i for i, word in enumerate(words) if i and word in AFTER_HEAD), len(words))
    return words[: end - 1], words[end - 1], words[end:]


def countable(name: str) -> bool:
    """Is it one thing of which there can be two? Not so for `scissors`, `fork and knife`, `bread`."""
    before, noun, _ = head(name)
    many = noun in PLURALS.values() - PLURALS.keys() or (noun.endswith("s") and not noun.endswith(SINGULAR_IN_S))
    return not (many or noun in MASS or "and" in before)


def indefinite(name: str) -> str:
    """The name with its indefinite article, by sound; without one for plurals and stuff."""
    before, noun, _ = head(name)
    if not countable(" ".join([w for w in before if w != "and"] + [noun])):
        return name
    vowel = re.match(r"[aeiou]|hour|x-|sos", name) and not re.match(r"uni|u[kfs][aeo]|eu|one\b|once", name)
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """`star` to `stars`, `glass of milk` to `glasses of milk`, `snowman` to `snowmen`."""
    before, noun, after = head(name)
    return " ".join([*before, plural_noun(noun), *after])


def plural_noun(noun: str) -> str:
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("man") and noun not in ("human", "talisman"):
        return noun[:-3] + "men"
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return re.sub(r"(?<![aeiou])y$", "ie", noun) + "s"


def uncoloured(name: str) -> str | None:
    """The name without a leading colour word; None where nothing is left, or another colour word is."""
    words = name.split(" ")
    words = words[1:] if words[0] in COLOUR_WORDS else words
    return None if not words or COLOUR_WORDS & set(words) else " ".join(words)
