"""Arithmetic word problems, made from a seed: a small task that a small model can learn in minutes.

A problem is a scene (fruit in a basket, riders on a bus, ...) in which a count starts at some
number and changes two or three times. Training and held-out problems share neither a scene, so no
sentence, nor the tuple (operations, numbers), so no calculation: a model that scores on the
held-out ones has learnt to read and to count, not to recite.

The split of the calculations is `split_of`, a pure function, so both promises can be tested.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

LARGEST = 40
"""No count in a problem, and so no answer, is above this or below zero."""

_NAMES = [
    "Ana",
    "Ben",
    "Chloe",
    "Dan",
    "Ella",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Kate",
    "Leo",
    "Maya",
    "Nora",
    "Omar",
    "Paul",
    "Rosa",
    "Sam",
    "Tara",
    "Will",
]


@dataclass(frozen=True)
class Scene:
    """Sentences about one kind of thing; `{n}` is a number, `{g}` a number of groups."""

    start: tuple[str, ...]
    groups: tuple[str, ...]
    gain: tuple[str, ...]
    lose: tuple[str, ...]
    ask: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """One word problem.

    `operations` is such as ("+", "-"); `numbers` is the first count and one number per operation;
    for "*", always first, the two numbers are the group size and the number of groups.
    """

    question: str
    answer: int
    operations: tuple[str, ...]
    numbers: tuple[int, ...]
    scene: int

    @property
    def working(self) -> str:
        """Every step as an equation, such as `5+4=9, 9-2=7`."""
        count, steps = self.numbers[0], []
        for operation, number in zip(self.operations, self.numbers[1:], strict=True):
            result = _apply(count, operation, number)
            steps.append(f"{count}{operation}{number}={result}")
            count = result
        return ", ".join(steps)


def make_problems(count: int, *, split: Split, seed: int = 0) -> list[Problem]:
    """`count` different problems of one split, the same for the same arguments.

    Half have two steps and half three. Raises ValueError for an unknown split or a negative count.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if count < 0:
        raise ValueError(f"count: expected 0 or more, got {count}")
    # zlib.crc32, not hash(): strings hash differently in every process.
    rng = random.Random(zlib.crc32(f"{split}/{seed}".encode()))
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < count:
        problem = _draw(rng, split, steps=2 + len(problems) % 2)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def split_of(operations: tuple[str, ...], numbers: tuple[int, ...]) -> Split:
    """The split that a calculation belongs to: one in five is held out."""
    key = " ".join([*operations, *map(str, numbers)])
    return "test" if zlib.crc32(key.encode()) % 5 == 0 else "train"


def scenes_of(split: Split) -> range:
    """Indices into `SCENES` of the scenes of one split."""
    return range(_TRAIN_SCENES) if split == "train" else range(_TRAIN_SCENES, len(SCENES))


def _draw(rng: random.Random, split: Split, steps: int) -> Problem:
    while True:
        operations, numbers = _draw_calculation(rng, steps)
        if split_of(operations, numbers) == split:
            break
    index = rng.choice(scenes_of(split))
    question = _tell(rng, SCENES[index], operations, numbers)
    count = numbers[0]
    for operation, number in zip(operations, numbers[1:], strict=True):
        count = _apply(count, operation, number)
    return Problem(question, count, operations, numbers, index)


def _draw_calculation(rng: random.Random, steps: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Operations and numbers whose every intermediate count lies in 0..LARGEST."""
    while True:
        first = rng.choice("*+-")
        operations = (first, *(rng.choice("+-") for _ in range(steps - 1)))
        if first == "*":
            numbers = [rng.randint(2, 6), rng.randint(2, 5)]
        else:
            numbers = [rng.randint(3, 15), rng.randint(2, 9)]
        numbers += [rng.randint(2, 9) for _ in range(steps - 1)]
        count, fits = numbers[0], True
        for operation, number in zip(operations, numbers[1:], strict=True):
            count = _apply(count, operation, number)
            fits = fits and 0 <= count <= LARGEST
        if fits:
            return operations, tuple(numbers)


def _apply(count: int, operation: str, number: int) -> int:
    if operation == "*":
        return count * number
    return count + number if operation == "+" else count - number


def _tell(
    rng: random.Random, scene: Scene, operations: tuple[str, ...], numbers: tuple[int, ...]
) -> str:
    name = rng.choice(_NAMES)
    friend = rng.choice([other for other in _NAMES if other != name])
    if operations[0] == "*":
        sentences = [rng.choice(scene.groups).format(n=numbers[0], g=numbers[1], name=name)]
        events = list(zip(operations[1:], numbers[2:], strict=True))
    else:
        sentences = [rng.choice(scene.start).format(n=numbers[0], name=name)]
        events = list(zip(operations, numbers[1:], strict=True))
    for operation, number in events:
        phrases = scene.gain if operation == "+" else scene.lose
        sentences.append(rng.choice(phrases).format(n=number, name=name, friend=friend))
    sentences.append(rng.choice(scene.ask).format(name=name))
    return " ".join(sentences)


_TRAIN_SCENES = 13

SCENES = (
    Scene(
        ("{name} has {n} apples.", "There are {n} apples in {name}'s basket."),
        (
            "{name} buys {g} bags with {n} apples each.",
            "{name} fills {g} baskets with {n} apples each.",
        ),
        ("{name} picks {n} more.", "{friend} gives {name} {n} apples."),
        (
            "{name} eats {n} of them.",
            "{name} gives {n} to {friend}.",
            "{n} of them are bad and thrown away.",
        ),
        ("How many apples are left?", "How many apples does {name} have now?"),
    ),
    Scene(
        ("A bus leaves with {n} riders.", "There are {n} people on a bus."),
        ("A bus has {g} rows with {n} riders in each.",),
        ("At the next stop {n} people get on.", "Then {n} more riders board."),
        ("At the next stop {n} people get off.", "Then {n} riders leave."),
        ("How many people are on the bus now?", "How many riders are on the bus at the end?"),
    ),
    Scene(
        ("{name} has {n} dollars.", "{name} starts the day with {n} dollars."),
        ("{name} works {g} hours for {n} dollars an hour.",),
        ("{name} earns {n} dollars more.", "{name} finds {n} dollars."),
        ("{name} spends {n} dollars on lunch.", "{name} lends {friend} {n} dollars."),
        ("How many dollars does {name} have now?", "How much money is left?"),
    ),
    Scene(
        ("A library shelf holds {n} books.", "{name} puts {n} books on a shelf."),
        ("A bookcase has {g} shelves with {n} books each.",),
        ("{name} brings back {n} books.", "The library adds {n} new books."),
        ("{friend} borrows {n} books.", "{n} old books are taken away."),
        ("How many books are there now?", "How many books are left?"),
    ),
    Scene(
        ("{n} birds sit in a tree.", "{name} counts {n} birds in a tree."),
        ("{name} sees {g} trees with {n} birds in each.",),
        ("{n} more birds fly in.", "Then {n} birds join them."),
        ("{n} birds fly away.", "A cat scares {n} birds off."),
        ("How many birds are there now?", "How many birds does {name} count at the end?"),
    ),
    Scene(
        ("{name} bakes {n} cookies.", "There are {n} cookies in a jar."),
        ("{name} bakes {g} trays of {n} cookies.",),
        ("{friend} brings {n} more cookies.", "Then {name} bakes another {n}."),
        ("{friend} eats {n} cookies.", "{name} sells {n} cookies."),
        ("How many cookies are left?", "How many cookies are there now?"),
    ),
    Scene(
        ("{name} owns {n} stickers.", "{name} has collected {n} stickers."),
        ("{name} opens {g} packs of {n} stickers.",),
        ("{name} gets {n} stickers from {friend}.", "{name} buys {n} new ones."),
        ("{name} loses {n} stickers.", "{name} trades away {n} stickers."),
        ("How many stickers does {name} have in the end?", "How many stickers are left?"),
    ),
    Scene(
        ("{n} children play in the park.", "There are {n} children in a class."),
        ("{g} groups of {n} children come to the park.",),
        ("{n} more children arrive.", "Later {n} children join."),
        ("{n} children go home.", "Later {n} children have to leave."),
        ("How many children are there now?", "How many children are still there?"),
    ),
    Scene(
        ("A farmer has {n} sheep.", "{n} sheep stand in a field."),
        ("A farmer has {g} pens with {n} sheep each.",),
        ("The farmer buys {n} sheep.", "{n} lambs are born."),
        ("The farmer sells {n} sheep.", "{n} sheep run away."),
        ("How many sheep are there now?", "How many sheep does the farmer have in the end?"),
    ),
    Scene(
        ("A glass jar holds {n} coins.", "{name} saves {n} coins."),
        ("{name} fills {g} jars with {n} coins each.",),
        ("{name} drops in {n} coins.", "{n} more coins are put in."),
        ("{name} pulls out {n} coins.", "{n} coins are spent."),
        ("How many coins are there now?", "How many coins remain?"),
    ),
    Scene(
        ("{name} plants {n} flowers.", "A garden has {n} flowers."),
        ("{name} plants {g} rows of {n} flowers.",),
        ("{n} new flowers grow.", "{friend} plants {n} more flowers."),
        ("{n} flowers die.", "A rabbit eats {n} flowers."),
        ("How many flowers remain?", "How many flowers are in the garden now?"),
    ),
    Scene(
        ("{n} boats are in the harbor.", "A harbor holds {n} boats."),
        ("A harbor has {g} docks with {n} boats at each.",),
        ("{n} boats sail in.", "Then {n} boats return."),
        ("{n} boats sail out.", "A storm sinks {n} boats."),
        ("How many boats remain?", "How many boats are in the harbor at the end?"),
    ),
    Scene(
        ("A toy store has {n} dolls.", "{name} makes {n} dolls."),
        ("{name} packs {g} cartons of {n} dolls.",),
        ("A truck brings {n} dolls.", "The workers make {n} more."),
        ("{friend} buys {n} dolls.", "{n} dolls get damaged and are thrown out."),
        ("How many dolls are left?", "How many dolls are in stock now?"),
    ),
    # Held out from here on.
    Scene(
        ("{name} has {n} marbles.", "{name} keeps {n} marbles in a box."),
        ("{name} has {g} boxes of {n} marbles.",),
        ("{name} wins {n} marbles.", "{name} gets {n} more from {friend}."),
        ("{name} loses {n} marbles in a game.", "{name} hands {n} marbles to {friend}."),
        ("How many marbles does {name} have now?", "How many marbles are left?"),
    ),
    Scene(
        ("There are {n} cars in a parking lot.", "{n} cars are parked on a street."),
        ("A car park has {g} floors with {n} cars on each.",),
        ("{n} more cars come in.", "Then {n} cars arrive."),
        ("{n} cars drive away.", "Then {n} cars leave."),
        ("How many cars are parked there now?", "How many cars are there at the end?"),
    ),
    Scene(
        ("A shop has {n} lamps.", "{name}'s shop opens with {n} lamps."),
        ("A shop receives {g} crates of {n} lamps.",),
        ("A van delivers {n} more lamps.", "{name} orders {n} more, and they arrive."),
        ("The shop sells {n} lamps.", "{n} lamps break."),
        ("How many lamps does the shop have now?", "How many lamps remain?"),
    ),
    Scene(
        ("{name} catches {n} fish.", "There are {n} fish in a tank."),
        ("{name} fills {g} tanks with {n} fish each.",),
        ("{friend} adds {n} fish.", "{name} puts in {n} more."),
        ("{name} takes out {n} fish.", "{n} fish are sold."),
        ("How many fish are there now?", "How many fish remain?"),
    ),
)
