"""Scenes of coloured shapes: their descriptions, their pictures, and what can be said about them.

A scene is described before it is drawn, and the description is stored beside the picture, so that a program can check a
generated image.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from symbiotic_titan.data.order import hash_fraction

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 205, 30),
    "purple": (140, 60, 170),
    "orange": (245, 130, 20),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}
SHADES = COLOURS | BACKGROUNDS
SHAPES = ("circle", "square", "triangle", "cross")
# Centre of each place, as shares of height and width.
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.25, 0.75),
    "bottom left": (0.75, 0.25),
    "bottom right": (0.75, 0.75),
}
# Relation of one thing to another -> the axis (0 for rows, 1 for columns) on which they differ, and the sign of the difference.
RELATIONS = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
SIZES = ((64, 64), (48, 80), (80, 48), (56, 72), (72, 56))
NUMBER_WORDS = ("no", "one", "two", "three", "four")
# Share of the scenes, by content, that are in held-out files only.
HELDOUT_SHARE = 0.15
# Scenes are painted this many times larger and reduced, for smooth edges.
OVERSAMPLING = 3


@dataclass(frozen=True, order=True)
class Thing:
    """One shape. ``centre`` (row, column) and ``radius`` are in pixels."""

    colour: str
    shape: str
    place: str
    centre: tuple[int, int]
    radius: int


@dataclass(frozen=True)
class Scene:
    """``size`` is (height, width) in pixels."""

    size: tuple[int, int]
    background: str
    things: tuple[Thing, ...]

    def description(self) -> dict[str, object]:
        """JSON-able: everything a checker needs to know."""
        return {
            "size": list(self.size),
            "background": self.background,
            "objects": [
                {
                    "colour": t.colour,
                    "shape": t.shape,
                    "place": t.place,
                    "centre": list(t.centre),
                    "radius": t.radius,
                }
                for t in self.things
            ],
        }

    @property
    def colours(self) -> set[str]:
        return {t.colour for t in self.things}

    def is_heldout(self) -> bool:
        """Depends only on the colours, shapes and places of things, so that no training picture has the same content."""
        content = sorted((t.colour, t.shape, t.place) for t in self.things)
        return hash_fraction("scene", content) < HELDOUT_SHARE


def draw_scene(random: Random, heldout: bool) -> Scene:
    """A scene for one side of the split: one to three different shapes, or two to four equal ones."""
    while True:
        scene = _any_scene(random)
        if scene.is_heldout() == heldout:
            return scene


def draw_plain(random: Random, heldout: bool) -> Scene:
    """A scene of one thing, on black."""
    while True:
        scene = draw_scene(random, heldout)
        if len(scene.things) == 1:
            return replace(scene, background="black")


def draw_single(random: Random, heldout: bool, colour: str, shape: str) -> Scene | None:
    """A scene of one ``colour`` ``shape`` for one side of the split; None if that side has no place for it."""
    size, background = random.choice(SIZES), random.choice(list(BACKGROUNDS))
    for place in random.sample(list(PLACES), len(PLACES)):
        scene = Scene(size, background, (_place_thing(random, size, colour, shape, place),))
        if scene.is_heldout() == heldout:
            return scene
    return None


def _any_scene(random: Random) -> Scene:
    size = random.choice(SIZES)
    background = random.choice(list(BACKGROUNDS))
    equal = random.random() < 0.25
    count = random.randint(2, 4) if equal else random.randint(1, 3)
    colours = random.sample(list(COLOURS), count)
    shapes = random.choices(SHAPES, k=count)
    places = random.sample(list(PLACES), count)
    if equal:
        colours, shapes = [colours[0]] * count, [shapes[0]] * count
    things = [
        _place_thing(random, size, *kind) for kind in zip(colours, shapes, places, strict=True)
    ]
    return Scene(size, background, tuple(things))


def _place_thing(
    random: Random, size: tuple[int, int], colour: str, shape: str, place: str
) -> Thing:
    height, width = size
    cell = min(height, width) / 2
    radius = round(cell * random.uniform(0.30, 0.42))
    slack = max(0, int(cell / 2 - radius) - 1)
    row, column = PLACES[place]
    centre = (
        round(row * height) + random.randint(-slack, slack),
        round(column * width) + random.randint(-slack, slack),
    )
    return Thing(colour, shape, place, centre, radius)


def paint(scene: Scene) -> Image.Image:
    """RGB picture of ``scene``."""
    height, width = scene.size
    large = (width * OVERSAMPLING, height * OVERSAMPLING)
    image = Image.new("RGB", large, BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _paint_thing(pen, thing)
    return image.reduce(OVERSAMPLING)


def _paint_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    row, column = (OVERSAMPLING * c for c in thing.centre)
    r, fill = OVERSAMPLING * thing.radius, COLOURS[thing.colour]
    box = (column - r, row - r, column + r, row + r)
    if thing.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.shape == "square":
        inset = r // 8
        pen.rectangle((box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon([(column, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
    else:
        arm = r // 3
        pen.rectangle((box[0], row - arm, box[2], row + arm), fill=fill)
        pen.rectangle((column - arm, box[1], column + arm, box[3]), fill=fill)


def related(first: Thing, second: Thing) -> list[str]:
    """Relations of ``first`` to ``second``, by their places: one or two."""
    return [
        relation
        for relation, (axis, sign) in RELATIONS.items()
        if sign * (PLACES[first.place][axis] - PLACES[second.place][axis]) > 0
    ]


def say(task: str, scene: Scene, random: Random) -> dict[str, Any]:
    """The text fields of a sample of ``task`` about ``scene``."""
    if task == "mmu":
        question, answer = ask(scene, random)
        return {"question": question, "answer": answer}
    if task == "t2i_long":
        return {"caption": long_caption(scene)}
    if len(scene.things) == 2 and not _all_equal(scene) and random.random() < 0.5:
        return {"caption": relation_caption(scene, random)}
    return {"caption": short_caption(scene)}


def short_caption(scene: Scene) -> str:
    """Colours, shapes and count; the place where there is one thing only."""
    if _all_equal(scene):
        return _counted(scene)
    if len(scene.things) == 1:
        return f"{_noun(scene.things[0])} {_at(scene.things[0])}"
    return _join([_noun(t) for t in scene.things])


def relation_caption(scene: Scene, random: Random) -> str:
    """Colours and shapes of two things, and one relation between them."""
    first, second = random.sample(scene.things, 2)
    return f"{_noun(first)} {random.choice(related(first, second))} {_noun(second)}"


def long_caption(scene: Scene) -> str:
    """The format, the background, and every thing with its place."""
    if _all_equal(scene):
        things = f"{_counted(scene)} {_join([_at(t) for t in scene.things])}"
    else:
        things = _join([f"{_noun(t)} {_at(t)}" for t in scene.things])
    return f"A {format_of(scene.size)} picture with a {scene.background} background: {things}."


def format_of(size: tuple[int, int]) -> str:
    height, width = size
    return "square" if height == width else "tall" if height > width else "wide"


def ask(scene: Scene, random: Random) -> tuple[str, str]:
    """(question, answer) about colour, shape, place, count, presence or a relation; the answer follows from the scene."""
    while True:
        if asked := random.choice(QUESTIONS)(scene, random):
            return asked


# A question that the scene cannot answer in one way only is None.
Asked = tuple[str, str] | None


def _ask_colour(scene: Scene, random: Random) -> Asked:
    thing = random.choice(scene.things)
    return f"What colour is the shape at the {thing.place}?", thing.colour


def _ask_shape(scene: Scene, random: Random) -> Asked:
    thing = random.choice(scene.things)
    return f"Which shape is at the {thing.place}?", thing.shape


def _ask_place(scene: Scene, random: Random) -> Asked:
    thing = random.choice(scene.things)
    if thing not in _unique(scene):
        return None
    return f"Where is the {_name(thing)}?", thing.place


def _ask_count(scene: Scene, random: Random) -> Asked:
    return "How many shapes are there?", NUMBER_WORDS[len(scene.things)]


def _ask_presence(scene: Scene, random: Random) -> Asked:
    """As often about a colour that is there as about one that is not."""
    there = {thing.colour for thing in scene.things}
    wanted = random.random() < 0.5
    colour = random.choice([colour for colour in COLOURS if (colour in there) == wanted])
    return f"Is there anything {colour}?", "yes" if wanted else "no"


def _ask_neighbour(scene: Scene, random: Random) -> Asked:
    """Which shape stands in a relation to a thing: where there is one such shape."""
    asked = []
    for thing, relation in product(_unique(scene), RELATIONS):
        others = [other for other in scene.things if relation in related(other, thing)]
        if len(others) == 1:
            asked.append((f"Which shape is {relation} the {_name(thing)}?", others[0].shape))
    return random.choice(asked) if asked else None


def _ask_relation(scene: Scene, random: Random) -> Asked:
    """Whether a relation holds: as often as its opposite, of things that differ on its axis."""
    things = _unique(scene)
    if len(things) < 2:
        return None
    first, second = random.sample(things, 2)
    told = random.choice([(first, second), (second, first)])
    relation = random.choice(related(*told))
    answer = "yes" if told == (first, second) else "no"
    return f"Is the {_name(first)} {relation} the {_name(second)}?", answer


QUESTIONS: tuple[Callable[[Scene, Random], Asked], ...] = (
    _ask_colour,
    _ask_shape,
    _ask_place,
    _ask_count,
    _ask_presence,
    _ask_neighbour,
    _ask_relation,
)


def _unique(scene: Scene) -> list[Thing]:
    """Things that their colour and shape tell from all others."""
    names = [_name(thing) for thing in scene.things]
    return [thing for thing in scene.things if names.count(_name(thing)) == 1]


def _all_equal(scene: Scene) -> bool:
    kinds = {(t.colour, t.shape) for t in scene.things}
    return len(kinds) == 1 and len(scene.things) > 1


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _noun(thing: Thing) -> str:
    article = "an" if thing.colour[0] in "aeiou" else "a"
    return f"{article} {_name(thing)}"


def _at(thing: Thing) -> str:
    return f"at the {thing.place}"


def _counted(scene: Scene) -> str:
    first = scene.things[0]
    ending = "es" if first.shape.endswith("s") else "s"
    return f"{NUMBER_WORDS[len(scene.things)]} {first.colour} {first.shape}{ending}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
