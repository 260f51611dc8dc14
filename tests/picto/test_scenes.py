"""The law of scenes: item k is a pure function of (seed, k), and its caption says what is seen."""

import colorsys
import re

import numpy as np
import pytest
from scipy import ndimage

from ldm.picto import nouns
from ldm.picto import scenes as module
from ldm.picto import sprites as drawn
from ldm.picto.scenes import BACKGROUND_COLORS, BACKGROUND_JITTER, RECOLOR_HSV, SceneDataset
from ldm.picto.sprites import Sprite

STEMS = ("bal", "bol", "dis", "gam", "kar", "lin", "mov", "tel")
SHAPES = [stem + end for stem in STEMS for end in ("ko", "min", "ra")]
STYLES = {"bright": 235, "dim": 120}  # style -> the greatest channel of its drawings
MANY = 300  # scenes looked at


def disc(colour, radius=52):
    """A plain disc on transparent black."""
    y, x = np.mgrid[:128, :128] - 63.5
    rgba = np.zeros((128, 128, 4), np.uint8)
    rgba[x**2 + y**2 < radius**2] = (*colour, 255)
    return rgba


def hue(concept):
    return SHAPES.index(concept) / len(SHAPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    rows = [(concept, style) for style in STYLES for concept in SHAPES]
    sprites = [Sprite(c, c, s, (c,), (f"{c} thing",), "objects") for c, s in rows]
    paints = [[round(v * STYLES[s]) for v in colorsys.hsv_to_rgb(hue(c), 0.9, 1)] for c, s in rows]
    drawn.write_sprites(folder, sprites, map(disc, paints))
    return folder


@pytest.fixture(scope="module")
def train(folder):
    return SceneDataset(folder)


def captions(scenes, pattern, n=MANY):
    """(scene, match) of the first n scenes whose caption, less its style, fits the pattern in full."""
    pattern = rf"(?:\w+ style, )?{pattern}"
    found = ((scene, re.fullmatch(pattern, scene.caption)) for scene in map(scenes.__getitem__, range(n)))
    return [(scene, match) for scene, match in found if match]


def ground(image):
    return image[0, 0].astype(int)


def objects(image):
    """The labels of the connected things that differ from the background, and their number."""
    return ndimage.label(np.abs(image.astype(int) - ground(image)).max(-1) > 40)


def hues(pixels):
    """Hue, 0 to 1, of RGB pixels [n, 3]."""
    return np.array([colorsys.rgb_to_hsv(*(pixel / 255))[0] for pixel in pixels.astype(float)])


def hue_distance(a, b):
    return abs((a - b + 0.5) % 1 - 0.5)


def test_item_is_a_function_of_seed_and_k(folder, train):
    other = SceneDataset(folder)
    backwards = {k: other[k] for k in reversed(range(60))}
    for k, scene in backwards.items():
        assert scene.caption == train[k].caption and np.array_equal(scene.image, train[k].image)
    assert [s.caption for s in backwards.values()] != [SceneDataset(folder, seed=1)[k].caption for k in backwards]
    assert train[len(train) - 1].image.shape == (128, 128, 3)
    with pytest.raises(IndexError):
        train[len(train)]


def test_background_is_the_colour_that_is_named(train):
    named = captions(train, r".* on an? ([a-z ]+) background")
    unnamed = captions(train, r"(?!.* background).*")
    assert abs(len(named) / MANY - 0.4) < 0.1
    for scene, match in named:
        distance = {name: np.abs(ground(scene.image) - rgb).max() for name, rgb in BACKGROUND_COLORS.items()}
        assert min(distance, key=distance.get) == match[1] and distance[match[1]] <= BACKGROUND_JITTER
    assert all((ground(scene.image) == 255).all() for scene, _ in unnamed)


def test_as_many_objects_are_seen_as_are_said(train):
    numbers = {"two": 2, "three": 3, "four": 4}
    counted = captions(train, r"(two|three|four) \w+?s(?: things)?(?: on .*)?", 3 * MANY)
    assert len(counted) > 30
    for scene, match in counted:
        assert objects(scene.image)[1] == numbers[match[1]]


def test_pairs_stand_as_said_and_share_a_style(train):
    after = {"to the left of": (1, -1), "to the right of": (1, 1), "above": (0, -1), "below": (0, 1)}
    noun = r"an? (\w+)(?: thing)?"
    pairs = captions(train, f"{noun} ({'|'.join(after)}) {noun}(?: on .*)?", 2 * MANY)
    assert len(pairs) > 30
    for scene, match in pairs:
        first, relation, second = match.groups()
        labels, number = objects(scene.image)
        assert number == 2
        solid = [ndimage.binary_erosion(labels == i, iterations=3) for i in (1, 2)]
        seen = [np.median(hues(scene.image[mask])) for mask in solid]
        order = [min((0, 1), key=lambda i, c=c: hue_distance(seen[i], hue(c))) for c in (first, second)]
        assert sorted(order) == [0, 1]
        axis, sign = after[relation]
        a, b = (np.argwhere(solid[i]).mean(0)[axis] for i in order)
        assert sign * (a - b) > 20
        assert np.ptp([np.median(scene.image[mask].max(-1)) for mask in solid]) < 10


def test_recoloured_object_has_the_colour_that_is_named(train):
    noun = f"an? ({'|'.join(RECOLOR_HSV)}) \\w+(?: thing)?(?: on .*)?"
    recoloured = captions(train, noun, 2 * MANY)
    assert abs(len(recoloured) / (2 * MANY) - 0.17) < 0.06
    for scene, match in recoloured:
        solid = ndimage.binary_erosion(objects(scene.image)[0] > 0, iterations=3)
        assert hue_distance(np.median(hues(scene.image[solid])), RECOLOR_HSV[match[1]][0] / 256) < 0.03


def test_edges_have_no_fringe_of_the_transparent_colour(tmp_path):
    drawn.write_sprites(tmp_path, [Sprite("dot", "1", "plain", ("dot",))], [disc((255, 255, 0))])
    scenes = SceneDataset(tmp_path, concepts=["dot"])
    white = [scene.image for scene, _ in captions(scenes, "a dot", 60)]
    assert white and min(image[..., :2].min() for image in white) > 240  # from yellow to white these two stay


def test_held_out_pairs_never_enter_training(folder, train):
    held_out = SceneDataset(folder, split="held-out")
    painted = re.compile(rf"(?:\w+ style, )?an? ({'|'.join(RECOLOR_HSV)}) ({'|'.join(SHAPES)})")
    styled = re.compile(rf"(\w+) style, an? ({'|'.join(SHAPES)})( thing)?( on|$)")
    for scenes, held in ((train, False), (held_out, True)):
        said = [scenes[k].caption for k in range(2 * MANY)]
        singles = [Sprite(m[2], "", m[1], ()) for m in map(styled.match, said) if m]
        assert singles and all(module.is_held_out_style(sprite) == held for sprite in singles)
        colours = {m.groups() for m in map(painted.match, said) if m}
        assert colours and all(module.is_held_out_color(*pair) == held for pair in colours)
    assert not set(train.pools["count"].sprite_indices) & set(held_out.pools["single"].sprite_indices)
    assert set(held_out.pools) == {"single", "recoloured"}


def test_held_out_hash_is_pinned():
    things = ("automobile", "cat", "star", "whale", "banana", "crown")
    assert [(c, t) for t in things for c in RECOLOR_HSV if module.is_held_out_color(c, t)] == [
        ("yellow", "star"),
        ("green", "whale"),
        ("blue", "whale"),
        ("purple", "banana"),
        ("pink", "crown"),
    ]
    assert [n for n in range(250) if module.hash_selects_one_in(76, "pinned", str(n))] == [
        33,
        115,
        199,
        206,
        208,
        223,
        234,
    ]
    assert module.is_held_out_color("blue", "green apple") == module.is_held_out_color("blue", "red apple")


def test_concepts_are_chosen_by_name_alias_and_pattern():
    sprites = [
        Sprite("whale", "1", "s", ("whale",)),
        Sprite("spouting whale", "2", "s", ("spouting whale", "whale")),
        Sprite("automobile", "3", "s", ("automobile", "car")),
        Sprite("taxi", "4", "s", ("taxi",), ("car",)),
    ]
    assert module.select_concepts(sprites, ["whale"]) == {"whale"}
    assert module.select_concepts(sprites, ["car"]) == {"automobile", "taxi"}
    assert module.select_concepts(sprites, ["*whale", "taxi"]) == {"whale", "spouting whale", "taxi"}
    with pytest.raises(ValueError, match="'qwertz'"):
        module.select_concepts(sprites, ["whale", "qwertz"])


def test_only_chosen_concepts_are_drawn(folder):
    scenes = SceneDataset(folder, concepts=["balko", "dis*"])
    nouns = {word for k in range(200) for word in scenes[k].caption.split() if word[:5].rstrip("s") in SHAPES}
    assert nouns and all(word.startswith(("balko", "dis")) for word in nouns)


@pytest.mark.parametrize(
    ("name", "said", "many"),
    [
        ("star", "a star", "stars"),
        ("apple", "an apple", "apples"),
        ("ice cream", "an ice cream", "ice creams"),
        ("unicorn", "a unicorn", "unicorns"),
        ("ufo", "a ufo", "ufos"),
        ("umbrella with rain drops", "an umbrella with rain drops", "umbrellas with rain drops"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("euro banknote", "a euro banknote", "euro banknotes"),
        ("one-piece swimsuit", "a one-piece swimsuit", "one-piece swimsuits"),
        ("x-ray", "an x-ray", "x-rays"),
        ("bus", "a bus", "buses"),
        ("butterfly", "a butterfly", "butterflies"),
        ("monkey", "a monkey", "monkeys"),
        ("wolf", "a wolf", "wolves"),
        ("computer mouse", "a computer mouse", "computer mice"),
        ("snowman", "a snowman", "snowmen"),
        ("tropical fish", "a tropical fish", "tropical fish"),
        ("tomato", "a tomato", "tomatoes"),
        ("glass of milk", "a glass of milk", "glasses of milk"),
        ("face with tears of joy", "a face with tears of joy", "faces with tears of joy"),
        ("face savoring food", "a face savoring food", "faces savoring food"),
    ],
)
def test_one_and_many(name, said, many):
    assert nouns.add_indefinite_article(name) == said and nouns.is_countable(name) and nouns.pluralize(name) == many


@pytest.mark.parametrize("name", ["scissors", "french fries", "bread", "cooked rice", "glasses", "santa claus", "mice"])
def test_plurals_and_stuff_have_no_article_and_no_number(name):
    assert nouns.add_indefinite_article(name) == name and not nouns.is_countable(name)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("red apple", "apple"),
        ("apple", "apple"),
        ("orange", None),
        ("hollow red circle", None),
        ("gold medal", "medal"),
    ],
)
def test_colour_words_leave_a_name_before_another_colour_enters(name, bare):
    assert nouns.strip_color_word(name) == bare


def test_dominant_colour_is_found_only_where_there_is_one():
    half = disc((220, 20, 20))
    half[:, 64:] = disc((20, 20, 220))[:, 64:]
    mean, paint = drawn.measure_colors(disc((200, 20, 20)))
    assert mean == (200, 20, 20) and paint == (0, 229, 200)
    assert drawn.measure_colors(half)[1] is None and drawn.measure_colors(disc((120, 120, 120)))[1] is None
