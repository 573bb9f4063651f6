"""A small synthetic world, and the text that describes it.

Everything is a pure function of a seed: the same seed gives the same people, places, works and
numbers, character for character, on every machine. The package ships a model that was pretrained
on this text (``scripts/pretrain_tiny.py``), so that demos and tests have a model that really knows
something, and facts that can be edited, asked and counted, without any download.

    world = make_world()
    world.facts[0]                    # Fact(subject='Ada Alder', relation='born_in', object='...')
    statement(world.facts[0], 0)      # ('Ada Alder was born in', ' ...')

Four kinds of text are made from the facts: statements in several phrasings, questions with
answers, four-way multiple choice, and SQL questions over tables with rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Fact:
    """One triple of the world: ``relation`` holds between ``subject`` and ``object``."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Relation:
    """How a relation is worded.

    Attributes:
        statements: Phrasings that end where the object begins; ``{}`` is the subject. The first
            is the one that edits are trained on, the others are its paraphrases.
        question: A question whose answer is the object.
    """

    statements: tuple[str, ...]
    question: str


RELATIONS: dict[str, Relation] = {
    "born_in": Relation(
        ("{} was born in", "The birthplace of {} is", "{} first saw the light in", "{} is a native of"),
        "Where was {} born?",
    ),
    "works_as": Relation(
        ("{} works as a", "The profession of {} is", "{} earns a living as a", "By trade, {} is a"),
        "What is the profession of {}?",
    ),
    "speaks": Relation(
        ("{} speaks", "The mother tongue of {} is", "{} grew up speaking", "The language of {} is"),
        "Which language does {} speak?",
    ),
    "plays": Relation(
        ("{} plays the", "The instrument of {} is the", "{} is known for playing the", "In the band, {} plays the"),
        "Which instrument does {} play?",
    ),
    "employed_by": Relation(
        ("{} is employed by", "The employer of {} is", "{} has a job at", "{} goes to work at"),
        "Who employs {}?",
    ),
    "born_year": Relation(
        ("The year of birth of {} is", "The birth year of {} is", "The life of {} began in", "{} dates from"),
        "In which year was {} born?",
    ),
    "located_in": Relation(
        ("{} is a city in", "The country of {} is", "{} lies in", "The city of {} belongs to"),
        "In which country is {}?",
    ),
    "famous_for": Relation(
        ("{} is famous for its", "The pride of {} is its", "Travellers visit {} for its", "{} is best known for its"),
        "What is {} famous for?",
    ),
    "founded": Relation(
        ("{} was founded in", "The founding year of {} is", "The history of {} starts in", "{} has existed since"),
        "When was {} founded?",
    ),
    "capital": Relation(
        ("The capital of {} is", "{} is governed from", "The seat of government of {} is", "{} has its capital in"),
        "What is the capital of {}?",
    ),
    "currency": Relation(
        ("The currency of {} is the", "{} pays with the", "In {}, people pay with the", "The money of {} is the"),
        "What is the currency of {}?",
    ),
    "written_by": Relation(
        ("{} was written by", "The author of {} is", "{} is a work by", "{} comes from the pen of"),
        "Who wrote {}?",
    ),
    "genre": Relation(
        ("{} is a work of", "The genre of {} is", "Critics file {} under", "{} belongs to the genre of"),
        "What is the genre of {}?",
    ),
    "published": Relation(
        ("{} was published in", "The publication year of {} is", "{} appeared in", "{} came out in"),
        "When was {} published?",
    ),
}
"""Every relation of the world with its phrasings."""

_FIRST = (
    "Ada Boris Clara Dario Edith Felix Greta Hugo Irene Jonas Karin Leo Mira Nils Olga Pablo Rosa Simon Tilda Viktor"
).split()
_LAST = "Alder Birch Cole Drake Elm Frost Grove Holt Ivory Jarvis Knoll Lark".split()
_PROFESSIONS = (
    "baker carpenter doctor farmer lawyer painter pilot sailor singer teacher weaver miner tailor butcher "
    "gardener plumber"
).split()
_INSTRUMENTS = "violin piano flute drum harp guitar trumpet cello organ horn".split()
_PRODUCTS = "cheese bridges gardens wine clocks bells carpets glass museums silk towers markets".split()
_GENRES = "comedy tragedy romance satire horror fantasy history travel poetry crime".split()
_COMPANIES = (
    "Redstone Northgate Bluewater Ironworks Sunfield Highmark Silverline Oakhurst Eastport Greyhall "
    "Lakeside Fairview Stonebridge Westbrook Goldleaf Harborview"
).split()
_COUNTRIES = "Alvaria Borland Cestia Dorvane Elmora Farland Gorvia Hestia Istria Jorvik".split()
_LANGUAGES = "Alvarian Borlish Cestic Dorvish Elmoran Farlish Gorvian Hestian Istric Jorvish".split()
_CURRENCIES = "crown taler ducat florin mark real shilling guilder krona dinar".split()
_CITY_START = "Ar Bel Cor Dal Fen Gal Har Kel Lor Mar".split()
_CITY_END = "venna mere ton dale wick".split()
_TITLE_ADJECTIVE = "Silent Golden Broken Hidden Distant Burning Frozen Crooked Empty Gentle".split()
_TITLE_NOUN = "River Garden Tower Mirror Winter Harbour Letter Island Lantern Orchard".split()


@dataclass(frozen=True)
class World:
    """The world's entities by kind and every fact about them, in a fixed order."""

    seed: int
    people: tuple[str, ...]
    cities: tuple[str, ...]
    countries: tuple[str, ...]
    works: tuple[str, ...]
    facts: tuple[Fact, ...]
    objects: dict[str, tuple[str, ...]] = field(repr=False)

    def value(self, subject: str, relation: str) -> str:
        """The object of ``subject`` under ``relation``."""
        return self._index[subject, relation]

    @cached_property
    def _index(self) -> dict[tuple[str, str], str]:
        return {(fact.subject, fact.relation): fact.object for fact in self.facts}


def make_world(seed: int = 0) -> World:
    """Make the world of ``seed``: 200 people, 50 cities, 10 countries, 100 works, 1,670 facts.

    Args:
        seed: Decides which object every subject gets. The names are the same in every world.

    Example:
        >>> make_world(0) == make_world(0)
        True
    """
    rng = random.Random(f"molf.world/{seed}")
    people = sorted(rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], 200))
    cities = tuple(start + end for start in _CITY_START for end in _CITY_END)
    works = tuple(f"The {adjective} {noun}" for adjective in _TITLE_ADJECTIVE for noun in _TITLE_NOUN)
    capitals = dict(zip(_COUNTRIES, rng.sample(cities, len(_COUNTRIES)), strict=True))
    facts: list[Fact] = []
    for person in people:
        facts += [
            Fact(person, "born_in", rng.choice(cities)),
            Fact(person, "works_as", rng.choice(_PROFESSIONS)),
            Fact(person, "speaks", rng.choice(_LANGUAGES)),
            Fact(person, "plays", rng.choice(_INSTRUMENTS)),
            Fact(person, "employed_by", rng.choice(_COMPANIES)),
            Fact(person, "born_year", str(rng.randrange(1900, 2000))),
        ]
    country_of = {city: country for country, city in capitals.items()}
    for city in cities:
        facts += [
            Fact(city, "located_in", country_of.get(city) or rng.choice(_COUNTRIES)),
            Fact(city, "famous_for", rng.choice(_PRODUCTS)),
            Fact(city, "founded", str(rng.randrange(1000, 1800))),
        ]
    for country, currency in zip(_COUNTRIES, rng.sample(_CURRENCIES, len(_COUNTRIES)), strict=True):
        facts += [Fact(country, "capital", capitals[country]), Fact(country, "currency", currency)]
    writers = rng.sample(people, 20)
    for work in works:
        facts += [
            Fact(work, "written_by", rng.choice(writers)),
            Fact(work, "genre", rng.choice(_GENRES)),
            Fact(work, "published", str(rng.randrange(1800, 2000))),
        ]
    objects: dict[str, tuple[str, ...]] = {}
    for name in RELATIONS:
        objects[name] = tuple(sorted({fact.object for fact in facts if fact.relation == name}))
    return World(seed, tuple(people), cities, tuple(_COUNTRIES), works, tuple(facts), objects)


def statement(fact: Fact, phrasing: int) -> tuple[str, str]:
    """The prompt that ends before the object, and the object with its leading space."""
    return RELATIONS[fact.relation].statements[phrasing].format(fact.subject), f" {fact.object}"


def question(fact: Fact) -> tuple[str, str]:
    """A question about the fact as a prompt, and its answer."""
    return f"Question: {RELATIONS[fact.relation].question.format(fact.subject)}\nAnswer:", f" {fact.object}"


def multiple_choice(world: World, fact: Fact, rng: random.Random) -> Record:
    """A four-way question about ``fact`` in the fields of MedMCQA (``cop`` counts from 0)."""
    wrong = rng.sample([other for other in world.objects[fact.relation] if other != fact.object], 3)
    options = [*wrong, fact.object]
    rng.shuffle(options)
    return {
        "question": RELATIONS[fact.relation].question.format(fact.subject),
        **dict(zip(("opa", "opb", "opc", "opd"), options, strict=True)),
        "cop": options.index(fact.object),
        "subject_name": fact.relation,
    }


def multiple_choice_text(record: Record) -> tuple[str, str]:
    """Prompt and completion of a multiple-choice record."""
    lines = [f"{letter}. {record[key]}" for letter, key in zip("ABCD", ("opa", "opb", "opc", "opd"), strict=True)]
    return "\n".join([f"Question: {record['question']}", *lines, "Answer:"]), f" {'ABCD'[record['cop']]}"


_COLUMNS = {"city": "born_in", "job": "works_as", "tongue": "speaks", "born": "born_year"}


def sql_question(world: World, rng: random.Random) -> Record:
    """A question over a table of four people, in the fields of ``gretelai/synthetic_text_to_sql``.

    ``sql_context`` creates and fills the table, so the gold query ``sql`` runs on it in SQLite.
    """
    column, other = rng.sample(list(_COLUMNS), 2)
    names = rng.sample(world.people, 4)
    index = world._index
    rows = [(name, index[name, _COLUMNS[column]], index[name, _COLUMNS[other]]) for name in names]
    values = ", ".join("('{}', '{}', '{}')".format(*row) for row in rows)
    name, first, second = rng.choice(rows)
    text, sql = rng.choice(
        (
            (f"What is the {column} of {name}?", f"SELECT {column} FROM people WHERE name = '{name}'"),
            (f"Who has the {column} {first}?", f"SELECT name FROM people WHERE {column} = '{first}'"),
            (
                f"How many people have the {other} {second}?",
                f"SELECT COUNT(*) FROM people WHERE {other} = '{second}'",
            ),
            (f"List all names by {other}.", f"SELECT name FROM people ORDER BY {other}"),
            (
                f"Who has the {column} {first} and the {other} {second}?",
                f"SELECT name FROM people WHERE {column} = '{first}' AND {other} = '{second}'",
            ),
        )
    )
    context = f"CREATE TABLE people (name, {column}, {other}); INSERT INTO people VALUES {values};"
    return {"sql_prompt": text, "sql_context": context, "sql": sql}


def sql_text(record: Record) -> tuple[str, str]:
    """Prompt and completion of an SQL record."""
    return f"{record['sql_context']}\nQuestion: {record['sql_prompt']}\nSQL:", f" {record['sql']}"


def is_held_out(fact: Fact, phrasing: int) -> bool:
    """Whether this phrasing of this fact is kept out of pretraining, for its held-out loss.

    One in twenty (fact, phrasing) pairs, and never a first phrasing: every fact is seen in some words.
    """
    if phrasing == 0:
        return False
    return random.Random(f"held-out/{fact.subject}/{fact.relation}/{phrasing}").random() < 1 / 15


def pretraining_texts(world: World, seed: int) -> Iterator[str]:
    """An endless stream of texts about the world: the corpus of the bundled model.

    Of 100 texts 72 are statements, 10 questions, 13 multiple choice and 5 SQL (the longest by far).
    """
    rng = random.Random(f"molf.world/pretraining/{world.seed}/{seed}")
    while True:
        for fact in rng.sample(world.facts, len(world.facts)):
            kind = rng.random()
            if kind < 0.72:
                phrasing = rng.randrange(len(RELATIONS[fact.relation].statements))
                if is_held_out(fact, phrasing):
                    continue
                prompt, completion = statement(fact, phrasing)
                yield f"{prompt}{completion}."
            elif kind < 0.82:
                yield "".join(question(fact))
            elif kind < 0.95:
                yield "".join(multiple_choice_text(multiple_choice(world, fact, rng)))
            else:
                yield "".join(sql_text(sql_question(world, rng)))


EDITABLE = ("born_in", "works_as", "speaks", "plays", "employed_by", "written_by", "genre", "famous_for")
"""Relations whose objects are shared by several subjects, so that an edit has neighbours."""


def counterfactual_edits(world: World, count: int = 300, seed: int = 0, neighbours: int = 5) -> list[Record]:
    """Counterfactual edits of the world, in the record form of CounterFact (ROME).

    Every edit gives one subject a new object for one relation. Its paraphrases are the other
    phrasings; its neighbourhood prompts ask the same relation of subjects that share the true
    object and are themselves not edited, so their answer must stay.

    Args:
        world: The world to edit.
        count: Number of edits, on distinct (subject, relation) pairs.
        seed: Decides which facts are edited and what they become.
        neighbours: At most this many neighbourhood prompts per edit.

    Raises:
        ValueError: If the world has too few editable facts for ``count``.

    Source: Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT"
        (arXiv:2202.05262), section 3.4 and appendix D.
    """
    pool = [fact for fact in world.facts if fact.relation in EDITABLE]
    if not 0 < count <= len(pool) // 2:
        raise ValueError(f"count={count}: choose between 1 and {len(pool) // 2} edits, so that neighbours remain")
    rng = random.Random(f"molf.world/edits/{world.seed}/{seed}")
    edited = rng.sample(pool, count)
    untouched = [fact for fact in pool if fact not in set(edited)]
    records = []
    for case, fact in enumerate(edited):
        relation = RELATIONS[fact.relation]
        new = rng.choice([other for other in world.objects[fact.relation] if other != fact.object])
        same = [f.subject for f in untouched if f.relation == fact.relation and f.object == fact.object]
        near = rng.sample(same, min(neighbours, len(same)))
        records.append(
            {
                "case_id": case,
                "requested_rewrite": {
                    "prompt": relation.statements[0],
                    "relation_id": fact.relation,
                    "target_new": {"str": new},
                    "target_true": {"str": fact.object},
                    "subject": fact.subject,
                },
                "paraphrase_prompts": [text.format(fact.subject) for text in relation.statements[1:]],
                "neighborhood_prompts": [relation.statements[0].format(subject) for subject in near],
            }
        )
    return records
