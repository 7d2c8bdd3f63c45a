"""Scenes of coloured shapes: their descriptions, their pictures, and what can be said about them.

A scene is described before it is drawn, and the description is stored beside the picture, so that a program can check a
generated image.
"""

from dataclasses import dataclass
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
SHAPES = ("circle", "square", "triangle", "cross")
# Centre of each place, as shares of height and width.
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.25, 0.75),
    "bottom left": (0.75, 0.25),
    "bottom right": (0.75, 0.75),
}
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


def say(task: str, scene: Scene, random: Random) -> dict[str, Any]:
    """The text fields of a sample of ``task`` about ``scene``."""
    if task == "mmu":
        question, answer = ask(scene, random)
        return {"question": question, "answer": answer}
    return {"caption": long_caption(scene) if task == "t2i_long" else short_caption(scene)}


def short_caption(scene: Scene) -> str:
    """Colours, shapes and count; the place where there is one thing only."""
    if _all_equal(scene):
        return _counted(scene)
    if len(scene.things) == 1:
        return f"{_noun(scene.things[0])} {_at(scene.things[0])}"
    return _join([_noun(t) for t in scene.things])


def long_caption(scene: Scene) -> str:
    """The format, the background, and every thing with its place."""
    height, width = scene.size
    form = "square" if height == width else "tall" if height > width else "wide"
    if _all_equal(scene):
        things = f"{_counted(scene)} {_join([_at(t) for t in scene.things])}"
    else:
        things = _join([f"{_noun(t)} {_at(t)}" for t in scene.things])
    return f"A {form} picture with a {scene.background} background: {things}."


def ask(scene: Scene, random: Random) -> tuple[str, str]:
    """(question, answer) about colour, shape, place, count or presence; the answer follows from the scene."""
    thing = random.choice(scene.things)
    kind = random.choice(("colour", "shape", "place", "count", "presence"))
    if kind == "place" and len(scene.things) == len({(t.colour, t.shape) for t in scene.things}):
        return f"Where is the {thing.colour} {thing.shape}?", thing.place
    if kind == "count":
        return "How many shapes are there?", NUMBER_WORDS[len(scene.things)]
    if kind == "presence":
        colour = random.choice(list(COLOURS))
        present = any(t.colour == colour for t in scene.things)
        return f"Is there anything {colour}?", "yes" if present else "no"
    if kind == "shape":
        return f"Which shape is at the {thing.place}?", thing.shape
    return f"What colour is the shape at the {thing.place}?", thing.colour


def _all_equal(scene: Scene) -> bool:
    kinds = {(t.colour, t.shape) for t in scene.things}
    return len(kinds) == 1 and len(scene.things) > 1


def _noun(thing: Thing) -> str:
    article = "an" if thing.colour[0] in "aeiou" else "a"
    return f"{article} {thing.colour} {thing.shape}"


def _at(thing: Thing) -> str:
    return f"at the {thing.place}"


def _counted(scene: Scene) -> str:
    first = scene.things[0]
    ending = "es" if first.shape.endswith("s") else "s"
    return f"{NUMBER_WORDS[len(scene.things)]} {first.colour} {first.shape}{ending}"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
