"""What the emoji data set is made from: the pinned packages, and what their labels are called in captions."""

from __future__ import annotations

from dataclasses import dataclass


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


EMOJIBASE = Package(
    "",
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "Emojibase (names)",
    "Miles Johnson",
    "MIT",
    "https://github.com/milesj/emojibase",
)

ICON_PACKAGES = (
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
LABEL_OVERRIDES = """
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
CONCEPT_ALIASES = """
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
FIREFOX_ICON_OVERRIDES = """
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
