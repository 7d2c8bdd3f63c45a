"""What there is to know in the demo world: facts about its animals and its coloured shapes, made up anew for every seed.

Texts of the task ``lm`` state every fact in several phrasings. Questions of the task ``mmu`` show the name of an animal, or a
shape, and ask for a fact about it: neither picture nor question tells, it must be remembered. A share of the facts is asked in
held-out files only, and held-out texts state facts in phrasings of their own.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from symbiotic_titan.data.order import hash_fraction, hash_key
from symbiotic_titan.demo.scenes import COLOURS, SHAPES, Scene, draw_single
from symbiotic_titan.demo.writing import ANIMALS, Writing, draw_animal

# Share of the facts that are asked in held-out files only.
UNASKED_SHARE = 1 / 3
# Entities of one text.
ENTITIES_PER_TEXT = 2


@dataclass(frozen=True)
class Attribute:
    """``phrasings`` are sentences about ``{entity}`` and ``{value}``; the last one is in held-out texts only, and nothing else is."""

    name: str
    question: str
    values: tuple[str, ...]
    phrasings: tuple[str, ...]

    def sentence(self, entity: str, value: str, random: Random, heldout: bool) -> str:
        phrasing = self.phrasings[-1] if heldout else random.choice(self.phrasings[:-1])
        said = phrasing.format(entity=entity, value=value)
        return said[0].upper() + said[1:]


OF_ANIMALS = (
    Attribute(
        "home",
        "Where does this animal live?",
        ("cave", "desert", "forest", "hill", "river", "barn"),
        (
            "{entity} lives in the {value}.",
            "the home of {entity} is the {value}.",
            "you find {entity} in the {value}.",
            "go to the {value} to meet {entity}.",
        ),
    ),
    Attribute(
        "food",
        "What does this animal eat?",
        ("bread", "corn", "fish", "fruit", "grass", "nuts"),
        (
            "{entity} eats {value}.",
            "the food of {entity} is {value}.",
            "give {entity} some {value}.",
            "{value} is a meal for {entity}.",
        ),
    ),
    Attribute(
        "favourite",
        "Which colour does this animal like?",
        tuple(COLOURS),
        (
            "{entity} likes {value}.",
            "the favourite colour of {entity} is {value}.",
            "{entity} paints its door {value}.",
            "{value} is the colour for {entity}.",
        ),
    ),
)
OF_SHAPES = (
    Attribute(
        "owner",
        "Which animal owns this shape?",
        ("ant", "cat", "dog", "hen", "pig", "rat"),
        (
            "{entity} belongs to the {value}.",
            "the owner of {entity} is the {value}.",
            "the {value} owns {entity}.",
            "ask the {value} for {entity}.",
        ),
    ),
    Attribute(
        "keeping",
        "Where is this shape kept?",
        ("attic", "box", "chest", "drawer", "garden", "tower"),
        (
            "{entity} is kept in the {value}.",
            "the {value} holds {entity}.",
            "look for {entity} in the {value}.",
            "open the {value} to get {entity}.",
        ),
    ),
)
ATTRIBUTES = {attribute.name: attribute for attribute in OF_ANIMALS + OF_SHAPES}


@dataclass(frozen=True)
class Fact:
    """``entity`` is an animal, or a colour and a shape: "cat", "red circle"."""

    entity: str
    attribute: str
    value: str

    def is_asked(self) -> bool:
        """Whether questions of training files ask for it."""
        return hash_fraction("fact", self.entity, self.attribute) >= UNASKED_SHARE

    def question(self) -> str:
        return ATTRIBUTES[self.attribute].question

    def description(self) -> dict[str, object]:
        """JSON-able: what is asked for, and whether training questions ask for it too or texts alone tell it."""
        return {
            "entity": self.entity,
            "attribute": self.attribute,
            "asked_in_training": self.is_asked(),
        }


def facts_of(seed: int) -> list[Fact]:
    """All facts of the world ``seed``. The values of an attribute are equally frequent, up to one."""
    shapes = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    facts = []
    for entities, attributes in ((list(ANIMALS), OF_ANIMALS), (shapes, OF_SHAPES)):
        for attribute in attributes:
            values = [attribute.values[i % len(attribute.values)] for i in range(len(entities))]
            Random(hash_key("facts", seed, attribute.name)).shuffle(values)
            facts += [
                Fact(entity, attribute.name, value)
                for entity, value in zip(entities, values, strict=True)
            ]
    return facts


def draw_question(
    facts: Sequence[Fact], random: Random, heldout: bool
) -> tuple[Fact, Writing | Scene]:
    """A fact to ask for, and a picture of its entity for one side of the split.

    Held-out questions ask half for facts that training questions ask for, with other pictures, and half for facts that texts
    alone tell.
    """
    is_asked = not heldout or random.random() < 0.5
    pool = [fact for fact in facts if fact.is_asked() == is_asked]
    while True:
        fact = random.choice(pool)
        if shown := _draw_entity(fact.entity, random, heldout):
            return fact, shown


def _draw_entity(entity: str, random: Random, heldout: bool) -> Writing | Scene | None:
    if entity in ANIMALS:
        return draw_animal(random, heldout, entity)
    colour, shape = entity.split()
    return draw_single(random, heldout, colour, shape)


def fact_texts(
    facts: Sequence[Fact], seed: object, number: int, heldout: bool
) -> list[dict[str, object]]:
    """{"text", "facts"} rows: all facts about two entities, in an order of their own. Entities take turns."""
    random = Random(hash_key("fact texts", seed, heldout))
    by_entity: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_entity[fact.entity].append(fact)
    entities: list[str] = []
    while len(entities) < ENTITIES_PER_TEXT * number:
        entities += random.sample(list(by_entity), len(by_entity))
    rows = []
    for row in range(number):
        about = entities[ENTITIES_PER_TEXT * row : ENTITIES_PER_TEXT * (row + 1)]
        told = [fact for entity in about for fact in by_entity[entity]]
        rows.append(_text(told, random, heldout))
    return rows


def _text(facts: list[Fact], random: Random, heldout: bool) -> dict[str, object]:
    told = random.sample(facts, len(facts))
    sentences = [
        ATTRIBUTES[f.attribute].sentence(f"the {f.entity}", f.value, random, heldout) for f in told
    ]
    return {
        "text": " ".join(sentences),
        "facts": [[f.entity, f.attribute, f.value] for f in told],
    }
