"""Eight openly licensed drawings of the same 1,640 things: npm packages in, a folder of named sprites out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.scenes import Scenes
from ldm.data.sprites import Sprite, write_sprites
from ldm.files import publish
from ldm.images import contact_sheet

LAYOUT = 1  # raise it when the same inputs give other files


class FetchError(RuntimeError):
    """Something that the data set is made with could not be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Package:
    """One pinned npm package: `style` is what captions call its drawings, `integrity` npm's sha512."""

    style: str
    name: str
    version: str
    integrity: str
    title: str
    author: str
    licence: str
    url: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NAMES = Package(
    "",
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "Emojibase (names)",
    "Miles Johnson",
    "MIT",
    "https://github.com/milesj/emojibase",
)

DRAWINGS = (
    Package(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Noto Emoji",
        "Google Inc",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "blob",
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Noto Emoji (v1)",
        "Google Inc",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Package(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "Twitter Emoji",
        "Twitter",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
    Package(
        "fluent",
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "Fluent Emoji",
        "Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Package(
        "flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "Fluent Emoji Flat",
        "Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Package(
        "3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "Fluent Emoji 3D",
        "Microsoft Corporation; packaged by LobeHub",
        "MIT",
        "https://github.com/lobehub/fluent-emoji",
    ),
    Package(
        "emojione",
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "Emoji One (Colored)",
        "Emoji One",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
    ),
    Package(
        "firefox",
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Firefox OS Emoji",
        "Mozilla",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
    ),
)

# Labels that do not name what is seen.
RENAMED = """
rolling on the floor laughing: laughing face rolling on the floor; star-struck: star-struck face
dizzy: dizzy star; dashing away: puff of dust; collision: explosion; foggy: foggy city; locked: lock
unlocked: open lock; locked with pen: lock with pen; locked with key: lock with key
construction: construction barrier; wireless: wireless sign; registered: registered sign
copyright: copyright sign; prohibited: prohibition sign; radioactive: radioactive sign
biohazard: biohazard sign; no entry: no entry sign; no smoking: no smoking sign
no littering: no littering sign; information: information sign; multiply: multiplication sign; plus: plus sign
minus: minus sign; divide: division sign; infinity: infinity sign; bowling: bowling ball and pins
tennis: tennis ball; performing arts: theatre masks; chart increasing: rising chart
chart decreasing: falling chart; warning: warning sign; chart increasing with yen: rising chart with yen
children crossing: children crossing sign; om: om sign; baggage claim: baggage claim sign
passport control: passport control sign; customs: customs sign; cooking: fried egg
left luggage: left luggage sign; potable water: drinking water sign; non-potable water: no drinking water sign
no bicycles: no bicycles sign; no pedestrians: no pedestrians sign; no mobile phones: no mobile phones sign
no one under eighteen: no one under eighteen sign; camping: tent in a forest
building construction: construction site
"""

# What else people call a thing, as often as by its label; after the bar: what it is called now and then.
ALIASES = """
grinning face: smiling face | smiley; slightly smiling face: smiling face
smiling face with smiling eyes: smiling face; grinning face with big eyes: | smiley
smiling face with sunglasses: cool face; face with tears of joy: laughing face
smiling face with heart-eyes: face with heart eyes, face in love
loudly crying face: crying face | sobbing face; enraged face: angry face; angry face: | mad face
sleeping face: | sleepy face; thinking face: | pensive face; clown face: clown; pile of poo: poo | poop
skull and crossbones: | pirate sign; alien monster: | space invader; smiling face with halo: | angel face
smiling face with horns: devil face | devil; nerd face: | geek face; face with medical mask: | masked face
face blowing a kiss: | kissing face; cowboy hat face: cowboy; red heart: heart; heart with arrow: | heart
sparkling heart: | heart; hundred points: | hundred; monkey face: monkey; dog face: dog | puppy
guide dog: | dog; service dog: | dog; poodle: | dog; cat face: cat | kitten; black cat: | cat
tiger face: tiger; horse face: horse; cow face: cow; pig face: pig; mouse face: mouse; ewe: sheep | lamb
rabbit face: rabbit | bunny; rabbit: | bunny; moose: | elk; donkey: | mule; bison: | buffalo
water buffalo: | buffalo; ox: | bull; pig nose: | snout; boar: | wild pig; llama: | alpaca
hippopotamus: hippo; rhinoceros: rhino; two-hump camel: | camel; chipmunk: squirrel; polar bear: | bear
bear: | bear face; paw prints: | paws; baby chick: chick; hatching chick: | chick
front-facing baby chick: chick; rooster: | cock; black bird: | crow, raven; dragon face: dragon
sauropod: | dinosaur, brontosaurus; t-rex: | dinosaur, tyrannosaurus; turtle: | tortoise
spouting whale: whale; orca: | killer whale; tropical fish: | fish; blowfish: | puffer fish
spiral shell: shell | seashell; honeybee: bee | bumblebee; lady beetle: ladybug | ladybird
cricket: | grasshopper; cockroach: | roach; bug: | caterpillar; snail: | slug; butterfly: | insect
worm: | earthworm; spider web: | cobweb; snake: | serpent; swan: | bird; dove: | bird; crocodile: | alligator
shrimp: | prawn; microbe: | germ; bouquet: | flowers, bunch of flowers; seedling: | sprout
cherry blossom: | flower; rose: | flower; hibiscus: | flower; sunflower: | flower; tulip: | flower
blossom: | flower; deciduous tree: tree; evergreen tree: tree, pine tree | fir; palm tree: palm
potted plant: | houseplant; four leaf clover: clover; sheaf of rice: ear of rice; maple leaf: | leaf
fallen leaf: | leaf; leaf fluttering in wind: leaves; mushroom: | toadstool; herb: | herbs
leafless tree: | bare tree; tangerine: orange | mandarin; red apple: apple; green apple: apple
kiwi fruit: kiwi; blueberries: | berries; cherries: | pair of cherries; grapes: | bunch of grapes
eggplant: aubergine; ear of corn: corn | maize; hot pepper: | chili pepper, chili; bell pepper: | pepper
leafy green: | lettuce, cabbage; peanuts: | nuts; bread: | loaf of bread; baguette bread: baguette
pancakes: | stack of pancakes; cheese wedge: cheese | piece of cheese; meat on bone: | meat
poultry leg: chicken leg | drumstick; cut of meat: | steak; hamburger: burger | cheeseburger
french fries: fries | chips; pizza: slice of pizza; hot dog: | sausage in a bun
stuffed flatbread: | kebab, gyro; fried egg: | frying pan; shallow pan of food: paella; pot of food: | stew
bowl with spoon: | bowl of soup; green salad: salad; canned food: | can; cooked rice: bowl of rice
curry rice: curry; steaming bowl: bowl of noodles | ramen; roasted sweet potato: sweet potato
spaghetti: | pasta; fish cake with swirl: | fish cake; soft ice cream: ice cream | ice cream cone
ice cream: | bowl of ice cream; doughnut: donut; birthday cake: cake; shortcake: cake, piece of cake
cookie: | biscuit; chocolate bar: chocolate; candy: sweet; custard: | pudding, flan
honey pot: | pot of honey, jar of honey; baby bottle: | bottle of milk; glass of milk: milk
hot beverage: coffee, cup of coffee | cup of tea, hot drink
teacup without handle: green tea | cup of green tea
bottle with popping cork: champagne bottle | bottle of champagne; wine glass: glass of wine | wine
cocktail glass: cocktail | martini; beer mug: beer | mug of beer; clinking beer mugs: beers
tumbler glass: glass of whiskey; cup with straw: | soft drink; bubble tea: | boba tea; beverage box: juice box
ice: ice cube; fork and knife: | cutlery; kitchen knife: knife
fork and knife with plate: | plate with cutlery; globe showing americas: globe, planet earth | earth
globe showing europe-africa: globe, planet earth | earth; globe showing asia-australia: globe | earth
snow-capped mountain: snowy mountain | mountain; mountain: | hill; beach with umbrella: beach
desert island: island; house with garden: house; houses: | group of houses
derelict house: | abandoned house, haunted house; rock: | stone; wood: log; office building: | building
post office: | building; castle: | european castle; church: | chapel; ferris wheel: | big wheel
locomotive: steam train | train; railway car: | tram; high-speed train: | train; bullet train: | train
bus: | school bus; oncoming bus: bus; fire engine: fire truck; police car: | cop car; taxi: cab
oncoming taxi: taxi; automobile: car; oncoming automobile: car; sport utility vehicle: suv | car
pickup truck: | truck; delivery truck: truck | lorry; articulated lorry: lorry | truck, semi truck
racing car: race car | formula one car; motorcycle: motorbike; motor scooter: scooter
manual wheelchair: wheelchair; bicycle: bike; kick scooter: | scooter; skateboard: | board
fuel pump: gas pump | petrol pump; vertical traffic light: traffic light
horizontal traffic light: | traffic light; police car light: | siren; construction barrier: | road barrier
ring buoy: | lifebuoy, life preserver; sailboat: sailing boat | boat, yacht; speedboat: | boat
motor boat: | boat; passenger ship: | ship, cruise ship; canoe: | boat; ferry: | ship; airplane: plane | jet
small airplane: | small plane, plane; seat: | chair; flying saucer: ufo; bellhop bell: | desk bell
luggage: suitcase; hourglass done: hourglass | sand timer; hourglass not done: hourglass; watch: wristwatch
stopwatch: | timer; mantelpiece clock: | clock; timer clock: | timer; crescent moon: moon; full moon: moon
full moon face: moon face | moon; sun with face: smiling sun | sun; ringed planet: planet, saturn
glowing star: | star; shooting star: | falling star; tornado: | whirlwind; cloud with lightning: | storm cloud
cloud with rain: rain cloud; cloud with snow: snow cloud; sun behind cloud: | partly cloudy sky
umbrella with rain drops: umbrella in the rain | umbrella; umbrella on ground: beach umbrella | parasol
high voltage: lightning bolt; closed umbrella: | folded umbrella; snowman without snow: snowman; fire: flame
droplet: drop of water | water drop; water wave: wave; cyclone: | spiral
jack-o-lantern: halloween pumpkin | pumpkin; wrapped gift: gift, present; reminder ribbon: | ribbon
admission tickets: tickets; trophy: | cup; sports medal: medal; 1st place medal: gold medal
2nd place medal: silver medal; 3rd place medal: bronze medal; soccer ball: football
american football: | football; ping pong: table tennis | ping pong paddle; badminton: | shuttlecock
flag in hole: golf flag | golf hole; ice skate: | skate; fishing pole: fishing rod; running shirt: | shirt
sled: | sledge; bullseye: target | dartboard; water pistol: | water gun; pool 8 ball: billiard ball
video game: game controller | gamepad; game die: die | dice; puzzle piece: jigsaw piece
teddy bear: | toy bear; chess pawn: pawn; spade suit: spade; club suit: | club
joker: joker card | playing card; theatre masks: | masks; framed picture: painting
artist palette: palette | paint palette; thread: spool of thread; sewing needle: needle; yarn: ball of yarn
mirror ball: disco ball; nesting dolls: | russian dolls, matryoshka; knot: | rope
glasses: eyeglasses | spectacles; lab coat: white coat; necktie: tie | shirt and tie
t-shirt: tee shirt | shirt; woman's clothes: blouse; folding hand fan: fan; purse: | coin purse
shopping bags: | bags; backpack: school bag | rucksack; thong sandal: flip-flop | sandal; man's shoe: shoe
running shoe: sneaker | trainer, shoe; hiking boot: boot | shoe; flat shoe: | ballet flat, shoe
high-heeled shoe: high heel | shoe; woman's sandal: sandal; woman's boot: boot; woman's hat: hat
top hat: | hat; billed cap: cap | baseball cap; military helmet: | helmet; rescue worker's helmet: | helmet
jeans: | trousers, pants; coat: | jacket; one-piece swimsuit: swimsuit; ring: diamond ring
gem stone: diamond | gem, jewel; loudspeaker: | speaker; speaker high volume: loud speaker | speaker
musical keyboard: piano keys | piano; headphone: headphones; studio microphone: | microphone; saxophone: | sax
violin: | fiddle; long drum: | drum; mobile phone: smartphone | phone, cell phone; telephone: | phone
laptop: computer | notebook computer; desktop computer: computer monitor | computer, screen
computer mouse: | pc mouse; television: tv; camera with flash: camera | photo camera
movie camera: film camera; video camera: camcorder; magnifying glass tilted left: magnifying glass | loupe
magnifying glass tilted right: magnifying glass; light bulb: bulb | lamp; flashlight: torch
red paper lantern: paper lantern | lantern; closed book: book; open book: | book; green book: book
blue book: book; orange book: book; books: stack of books; notebook with decorative cover: | notebook
scroll: | old paper; page facing up: | page; money bag: bag of money | sack of money; coin: gold coin
dollar banknote: | dollar bill, money; treasure chest: | treasure; envelope: letter
package: parcel | box, cardboard box; closed mailbox with raised flag: mailbox; postbox: | mailbox
black nib: | pen nib; memo: | note, paper and pencil; calendar: | date; file folder: folder
rising chart: chart | graph; pushpin: | pin, thumbtack; straight ruler: ruler; triangular ruler: set square
file cabinet: filing cabinet; wastebasket: trash can | bin, waste bin; lock: padlock; old key: | key
axe: | hatchet; pick: pickaxe; crossed swords: swords; dagger: | knife; bow and arrow: | bow
carpentry saw: saw; wrench: | spanner; gear: cog | cogwheel; balance scale: scales; white cane: | cane
chains: | chain; magnet: | horseshoe magnet; shovel: spade; test tube: | tube
satellite antenna: satellite dish | antenna; syringe: | needle, injection; drop of blood: blood drop
pill: | capsule; adhesive bandage: bandage | plaster; couch and lamp: couch | sofa; toilet: | lavatory
bathtub: bath; roll of paper: toilet paper; bucket: | pail; soap: | bar of soap
headstone: gravestone | tombstone; shopping cart: | trolley; moai: stone face | easter island head
baby: | infant; santa claus: santa | father christmas; mrs. claus: | mother christmas
person in suit levitating: | floating man; raising hands: | raised hands; flexed biceps: | muscle, strong arm
ear: | human ear; mouth: lips; brain: | human brain; police officer: policeman | cop
man police officer: policeman; woman police officer: policewoman; firefighter: | fireman
person in tuxedo: | groom; person with veil: bride; person walking: | walking person; person running: | runner
person biking: cyclist; person swimming: swimmer; person surfing: surfer; person rowing boat: | rower
woman dancing: dancer; man dancing: | dancer; check mark: tick; check mark button: | check mark
cross mark: red cross; red question mark: question mark; red exclamation mark: exclamation mark
recycling symbol: recycling sign; peace symbol: peace sign; yin yang: yin and yang; red circle: circle
blue circle: circle; red square: square; blue square: square; musical note: | note
"""

# Icons of the oldest set whose names mislead: there `cat` is the face, and the animal `catside`.
FIREFOX = """
cat face: cat; cat: catside; dog face: dog; dog: dogside; mouse face: mouse; mouse: mouseside
tiger face: tiger; tiger: tigerside; pig face: pig; pig: pigside; rabbit face: bunny; rabbit: bunnyside
leopard: leopardside; dragon face: dragonhead; dragon: dragonside; hamster: hampster
spouting whale: spurtingwhale; pig nose: pigsnout; evergreen tree: evergreen; hot pepper: chilipepper
fallen leaf: fallingleaf; leaf fluttering in wind: leaffluttering; chestnut: acorn; sun: whitesun
tennis ball: tennisball; man's shoe: mensshoe; high-heeled shoe: heels; necktie: tie; t-shirt: mansshirt
wrapped gift: present; blue heart: heartblue; green heart: heartgreen; yellow heart: heartyellow
purple heart: heartpurple; heart with ribbon: heartribbon; heart with arrow: heartarrow
mobile phone: cellphone; mantelpiece clock: manltepiececlock; studio microphone: studiomic
snow-capped mountain: snowmountains; lock with key: lockandkey; two hearts: 2hearts
spade suit: blackspadesuit; tokyo tower: toykotower; fish cake with swirl: fishcakeswirl
rolled-up newspaper: rolledupnewspaper; pizza: sliceofpizza
water wave: wave; kiss: couplekiss; backhand index pointing down: down; backhand index pointing up: up
backhand index pointing left: left; backhand index pointing right: right
"""


def table(text: str) -> dict[str, str]:
    """`left: right` pairs, between semicolons or on lines of their own."""
    return {entry.split(": ")[0]: entry.split(": ")[1] for entry in re.split("; |\n", text.strip())}


def spoken(words: str) -> tuple[tuple[str, ...], ...]:
    """`a, b | c` to (a, b), (c,): aliases and tags."""
    names, _, tags = words.partition("|")
    return tuple(tuple(word.strip() for word in part.split(",") if word.strip()) for part in (names, tags))


def fetch(packages: Iterable[Package], folder: Path) -> None:
    """Download the packages' tarballs with `npm pack` and check each against its pinned sha512.

    Raises FetchError, in one line, where npm is missing or fails, or a tarball is not the pinned one.
    """
    packages = list(packages)
    command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run([*command, *(p.spec for p in packages)], capture_output=True, text=True)
    except FileNotFoundError:
        raise FetchError("npm, which fetches the drawings, is not installed (Debian: apt install npm)") from None
    if done.returncode:
        said = " ".join(line.removeprefix("npm error ") for line in done.stderr.splitlines()[:2])
        raise FetchError(f"npm pack failed with status {done.returncode}: {said or 'no message'}")
    for package in packages:
        verify(package, folder / package.tarball)


def verify(package: Package, tarball: Path) -> None:
    """Raise FetchError unless the tarball's sha512, in base64, is the package's pinned one."""
    if not tarball.is_file():
        raise FetchError(f"npm pack left no {tarball.name} for {package.spec}")
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != package.integrity:
        raise FetchError(f"{tarball.name} is not the pinned one: sha512-{digest}")


def read_json(tarball: Path, member: str) -> Any:
    """One JSON file of an npm package."""
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None, f"{tarball.name}: {member} is a folder"
        return json.load(file)


@dataclass(frozen=True)
class Concept:
    """One emoji: its code point sequence without variation selectors, its names, and where it belongs."""

    code: str
    name: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    subgroup: str
    keys: tuple[str, ...]


def bare(code: str) -> str:
    """A code point sequence in the one spelling used here: upper case, no variation selector 16."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def slug(name: str) -> str:
    """Letters and digits only, so that `jack-o-lantern`, `jack_o_lantern` and `jackolantern` meet."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def natural(label: str) -> str:
    """An emojibase label as one would write it in a prompt: `woman: red hair` to `woman with red hair`."""
    name = re.sub("[“”⊛]", "", label.lower().replace("’", "'")).strip()
    name = re.sub(r"^(\w+ o'clock|\w+-thirty)$", r"clock at \1", name)
    name = name.replace("keycap: ", "keycap ").replace(": ", " with ")
    return table(RENAMED).get(name, name)


def read_concepts(tarball: Path) -> list[Concept]:
    """Every emoji of emojibase but flags, skin tones and other components, in its order."""
    messages = read_json(tarball, "en/messages.json")
    groups, subgroups = ({g["order"]: g["key"] for g in messages[kind]} for kind in ("groups", "subgroups"))
    short: dict[str, list[str]] = {}
    for vendor in ("emojibase", "github", "iamcal", "joypixels"):
        for code, words in read_json(tarball, f"en/shortcodes/{vendor}.json").items():
            short.setdefault(code, []).extend([words] if isinstance(words, str) else words)
    concepts, also = [], table(ALIASES)
    for entry in read_json(tarball, "en/data.json"):
        group = groups.get(entry.get("group"), "component")
        if group in ("component", "flags"):
            continue
        code, name = entry["hexcode"], natural(entry["label"])
        unicode_name = [unicodedata.name(entry["emoji"][0], "")] if "-" not in bare(code) else []
        keys = dict.fromkeys(map(slug, [entry["label"], name, *unicode_name, *short.get(code, [])]))
        aliases, tags = spoken(also.get(name, ""))
        where = (group, subgroups[entry["subgroup"]])
        concepts.append(Concept(bare(code), name, (name, *aliases), tags, *where, tuple(filter(None, keys))))
    return concepts


def match(
    concepts: list[Concept], icons: Iterable[str], keys: dict[str, list[str]], told: dict[str, str]
) -> dict[str, str]:
    """Code -> icon by name: what is told first, then a concept's better keys, no icon twice."""
    icons = set(icons)
    found = {c.code: told[c.name] for c in concepts if told.get(c.name) in icons}
    free = {slug(icon): icon for icon in sorted(icons - set(found.values()))}
    for rank in range(max(map(len, keys.values()))):
        for concept in concepts:
            tried = keys[concept.code]
            if concept.code not in found and rank < len(tried) and tried[rank] in free:
                found[concept.code] = free.pop(tried[rank])
    return found


def svg(icons: dict[str, Any], name: str) -> str:
    """The SVG text of an iconify icon or alias, centred in a square view box."""
    icon, flips = {**icons["icons"], **icons.get("aliases", {})}[name], [1, 1]
    while "parent" in icon:
        flips = [flips[0] * (-1) ** icon.get("hFlip", False), flips[1] * (-1) ** icon.get("vFlip", False)]
        parent = icon["parent"]
        icon = icons["icons"].get(parent) or icons["aliases"][parent]
    w, h = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    x, y, side = icon.get("left", 0) + w / 2, icon.get("top", 0) + h / 2, max(w, h)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{-side / 2} {-side / 2} {side} {side}">'
        f'<g transform="scale({flips[0]} {flips[1]}) translate({-x} {-y})">{icon["body"]}</g></svg>'
    )


def drawings(package: Package, folder: Path, concepts: list[Concept], keys: dict[str, list[str]]) -> dict[str, bytes]:
    """Code -> SVG or WebP file content, for the concepts that the package draws."""
    tarball = folder / package.tarball
    if package.style == "3d":
        return images(tarball)
    icons = read_json(tarball, "icons.json")
    told = table(FIREFOX) if package.style == "firefox" else {}
    chars = read_chars(package, folder) or match(concepts, [*icons["icons"], *icons.get("aliases", {})], keys, told)
    return {c.code: svg(icons, chars[c.code]).encode() for c in concepts if c.code in chars}


def read_chars(package: Package, folder: Path) -> dict[str, str]:
    """Code -> icon, where the package tells."""
    if package.style == "3d":
        return {}
    return {bare(code): name for code, name in read_json(folder / package.tarball, "chars.json").items()}


def images(tarball: Path) -> dict[str, bytes]:
    """Code -> content of the package's `assets/CODE.webp`."""
    with tarfile.open(tarball) as archive:
        files = ((m, archive.extractfile(m)) for m in archive if m.name.endswith(".webp"))
        return {bare(Path(m.name).stem): file.read() for m, file in files if file is not None}


def render(content: bytes, size: int) -> np.ndarray:
    """An SVG or WebP file to RGBA with straight alpha, uint8 [size, size, 4]."""
    if content.startswith(b"<svg"):
        import resvg_py

        content = resvg_py.svg_to_bytes(content.decode(), width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS))


def build(out: Path, size: int = 128, workers: int | None = None) -> bool:
    """Make `out`: sprites.npy, sprites.jsonl, NOTICE, contact.png and build.json; False where it is there.

    `out` is published whole: an interrupted build leaves what was there before.
    `size` is the sprites' side in pixels. Raises FetchError where a package cannot be had.
    """
    inputs = fingerprint(size)
    if (out / "build.json").is_file() and json.loads((out / "build.json").read_text())["inputs"] == inputs:
        return False
    with tempfile.TemporaryDirectory() as tarballs, publish(out) as made:
        fetch((NAMES, *DRAWINGS), Path(tarballs))
        sprites, files = collect(Path(tarballs))
        made.mkdir()
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            pixels = pool.map(render, files, [size] * len(files), chunksize=64)
            write_sprites(made, sprites, pixels, size)
        (made / "NOTICE").write_text(notice(), encoding="utf-8")
        scenes = Scenes(made, size=size)
        images, captions = zip(*(scenes[k] for k in range(100)), strict=True)
        contact_sheet([Image.fromarray(image) for image in images], captions, 10).save(made / "contact.png")
        (made / "build.json").write_text(json.dumps({"inputs": inputs, "size": size, "sprites": len(sprites)}))
    return True


def fingerprint(size: int) -> str:
    """A sha256 of all that the files depend on: packages, names, renderer, size and the layout's version."""
    try:
        renderer = version("resvg-py")
    except PackageNotFoundError:
        raise FetchError("resvg-py, which renders the drawings, is not installed: install ldm[data]") from None
    inputs = (LAYOUT, size, renderer, NAMES, DRAWINGS, RENAMED, ALIASES, FIREFOX)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


def collect(tarballs: Path) -> tuple[list[Sprite], list[bytes]]:
    """Every sprite's record and file content, style by style."""
    concepts = read_concepts(tarballs / NAMES.tarball)
    keys = {concept.code: list(concept.keys) for concept in concepts}
    for package in DRAWINGS:
        for code, name in read_chars(package, tarballs).items():
            if code in keys and slug(name) not in keys[code]:
                keys[code].append(slug(name))
    sprites, files = [], []
    for package in DRAWINGS:
        drawn = drawings(package, tarballs, concepts, keys)
        for c in concepts:
            if c.code in drawn:
                sprites.append(Sprite(c.name, c.code, package.style, c.names, c.tags, c.group, c.subgroup))
                files.append(drawn[c.code])
    return sprites, files


def notice() -> str:
    """What the sprites were made from, under which licences."""
    head = "Rendered at one size from these drawings and named after emojibase; scenes also recolour them."
    rows = [f"{p.title} ({p.spec}), style {p.style}: {p.author}. {p.licence}. {p.url}" for p in DRAWINGS]
    names = f"{NAMES.title} ({NAMES.spec}): {NAMES.author}. {NAMES.licence}. {NAMES.url}"
    licences = sorted({p.licence for p in (NAMES, *DRAWINGS)})
    return "\n".join(
        [head, "", *rows, names, "", *(f"{name}: https://spdx.org/licenses/{name}" for name in licences), ""]
    )
