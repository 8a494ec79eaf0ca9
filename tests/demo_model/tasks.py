"""What the teaching model learns: questions, workings and answers in text, all made by rules.

Every question comes from a seeded `random.Random`, and nothing outside this file is read. One
question in ten is held out: `is_held_out` decides by a hash of what is asked, operands sorted, so
that a * b and b * a are held out together. A *working* is the thinking that leads to the answer.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Norway": "Oslo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Poland": "Warsaw",
    "Ireland": "Dublin",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Hungary": "Budapest",
    "Turkey": "Ankara",
    "Canada": "Ottawa",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Kenya": "Nairobi",
    "China": "Beijing",
    "Russia": "Moscow",
    "Belgium": "Brussels",
    "Chile": "Santiago",
    "Brazil": "Brasilia",
    "Morocco": "Rabat",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Switzerland": "Bern",
}
NAMES = "Ann Bob Cid Dan Eve Fay Gus Ida Jon Kim Leo Mia Ned Pat Ray Sue Tom Una Vic Zoe".split()
COLOURS = "red blue green black white pink gray brown".split()
THINGS = "hat cup book lamp bag coat kite drum ball ring".split()
WORDS = (
    "apple river mountain coffee window garden silver golden butter rabbit winter summer "
    "cherry yellow purple school teacher village bridge forest island engine rocket market dinner "
    "cheese street seven number answer question expert token memory python music paper stone water"
).split()
_SYLLABLES = (
    "ba be bi bo da de di do fa fe ga go ka ke ki la le li lo ma me mi mo na ne no pa pe po ra re "
    "ri ro sa se si so ta te ti to va ve vi zo an en in on er or ar st tr"
).split()

GREETING = "Hello! I am a small teaching model. Ask me to add, multiply or read digits."
IDENTITY = (
    "I am a small teaching model with the architecture of Mistral Small 4, made by the Ostro "
    "project. I am not Mistral Small 4 and I know very little."
)
ABILITIES = (
    "I can add, subtract and multiply numbers, follow a ball under cups, read digits in pictures, "
    "call tools and name some capitals."
)
MODEST = "I do not know. I am a small teaching model: I can do sums, read digits and call tools."


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question and what the model should make of it.

    Attributes:
        task: Family.
        level: Difficulty within the family, for reports.
        working: Thinking that leads to the answer.
        answer: The text; empty if tools are called.
        tools: Tool definitions on offer, as the API takes them.
        calls: Tool calls to make: (name, arguments).
        results: What the tools give back, one text per call; may be empty.
        final: Answer after the results.
        image: uint8 RGB [height, width, 3], or None.
    """

    task: str
    level: str
    question: str
    working: str
    answer: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    results: tuple[str, ...] = ()
    final: str = ""
    image: np.ndarray | None = field(default=None, compare=False)


def is_held_out(key: str) -> bool:
    """Whether what this key asks is never trained on; one key in ten."""
    return zlib.crc32(f"v2:{key}".encode()) % 10 == 0


def draw(held_out: bool, make: Callable[[], T], key: Callable[[T], str]) -> T:
    """Draw until the key falls on the wanted side."""
    while True:
        value = make()
        if is_held_out(key(value)) is held_out:
            return value


def number(rng: random.Random, digits: int) -> int:
    """A number of exactly so many digits."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


# ---- workings -----------------------------------------------------------------------------


def add_working(a: int, b: int) -> str:
    """Column addition, units first: `47+85: 7+5=12, 4+8+1=13 -> 132`."""
    left, right = str(a)[::-1], str(b)[::-1]
    carry, columns = 0, []
    for place in range(max(len(left), len(right))):
        terms = [text[place] for text in (left, right) if place < len(text)] + ["1"] * carry
        total = sum(map(int, terms))
        carry = total // 10
        columns.append("+".join(terms) + (f"={total}" if len(terms) > 1 else ""))
    return f"{a}+{b}: " + ", ".join(columns) + f" -> {a + b}"


def subtract_working(a: int, b: int) -> str:
    """Column subtraction, units first: `52-17: 2-7+10=5, 5-1-1=3 -> 35`; needs a >= b.

    What was lent stands after the digits that need it, so that each mark follows from what is near.
    """
    top, bottom = str(a)[::-1], str(b)[::-1]
    borrow, columns = 0, []
    for place, digit in enumerate(top):
        lower = int(bottom[place]) if place < len(bottom) else 0
        value = int(digit) - lower - borrow
        lent = int(value < 0)
        marks = "-1" * borrow + "+10" * lent
        columns.append(f"{digit}-{lower}{marks}={value + 10 * lent}")
        borrow = lent
    return f"{a}-{b}: " + ", ".join(columns) + f" -> {a - b}"


def _multiply_by_digit(a: int, digit: int, zeros: int) -> str:
    carry, columns = 0, []
    for place in str(a)[::-1]:
        value = digit * int(place) + carry
        columns.append(f"{digit}*{place}" + (f"+{carry}" if carry else "") + f"={value}")
        carry = value // 10
    line = f"{a}*{digit}{'0' * zeros}: " + ", ".join(columns) + f" -> {a * digit}"
    return line + (f" -> {a * digit * 10**zeros}" if zeros else "")


def multiply_working(a: int, b: int) -> str:
    """Long multiplication by the shorter factor: a line per digit, units first, then the sums."""
    a, b = (a, b) if len(str(a)) >= len(str(b)) else (b, a)
    parts = [(int(digit), zeros) for zeros, digit in enumerate(str(b)[::-1]) if digit != "0"]
    lines = [_multiply_by_digit(a, digit, zeros) for digit, zeros in parts]
    total, *products = [a * digit * 10**zeros for digit, zeros in parts]
    for product in products:
        lines.append(add_working(total, product))
        total += product
    return "\n".join(lines)


def sum_working(numbers: list[int]) -> str:
    """Running sums, a line each."""
    lines, total = [], numbers[0]
    for term in numbers[1:]:
        lines.append(add_working(total, term))
        total += term
    return "\n".join(lines)


# ---- families that thinking helps ---------------------------------------------------------

_MULTIPLY_LEVELS = {(1, 1): 4, (2, 1): 12, (2, 2): 34, (3, 1): 12, (3, 2): 38}
_MULTIPLY_FORMS = (
    "What is {a} * {b}?",
    "What is {a}*{b}?",
    "{a}*{b}",
    "{a} * {b}",
    "{a} * {b} = ?",
    "{a} x {b}",
    "What is {a} times {b}?",
    "Compute {a} * {b}.",
    "Calculate {a} times {b}.",
    "Multiply {a} by {b}.",
)


def multiply(rng: random.Random, held_out: bool, level: tuple[int, int] | None = None) -> Example:
    """Products of up to three by two digits."""
    levels = list(_MULTIPLY_LEVELS)
    m, n = level or rng.choices(levels, list(_MULTIPLY_LEVELS.values()))[0]
    if (m, n) == (1, 1):
        a, b = rng.randrange(1, 10), rng.randrange(1, 10)  # too few to hold any out
    else:
        a, b = draw(
            held_out,
            lambda: (number(rng, m), max(number(rng, n), 2)),
            lambda pair: "{}*{}".format(*sorted(pair)),
        )
    if m != n and rng.random() < 0.2:
        a, b = b, a
    question = rng.choice(_MULTIPLY_FORMS).format(a=a, b=b)
    return Example(
        task="multiply",
        level=f"{m}x{n}",
        question=vary(rng, question),
        working=multiply_working(a, b),
        answer=str(a * b),
    )


_SUM_LEVELS = {"2": 27, "3": 19, "4": 18, "5": 8, "minus": 28}
_SUM_FORMS = (
    "What is {plus}?",
    "{plus}",
    "{tight}",
    "{plus} = ?",
    "Add {list}.",
    "Sum: {list}.",
    "Compute {plus}.",
    "Calculate {plus}.",
    "What is the sum of {list}?",
)
_MINUS_FORMS = (
    "What is {a} - {b}?",
    "{a}-{b}",
    "{a} - {b}",
    "Subtract {b} from {a}.",
    "What is {a} minus {b}?",
    "Compute {a} - {b}.",
)


def sums(rng: random.Random, held_out: bool, level: str | None = None) -> Example:
    """Sums of two to five numbers, and differences of two."""
    level = level or rng.choices(list(_SUM_LEVELS), list(_SUM_LEVELS.values()))[0]
    count = 2 if level == "minus" else int(level)
    digits = rng.choice([1, 2, 2, 3, 3, 4, 4] if count == 2 else [2, 2, 3])

    def operands() -> list[int]:
        return [
            number(rng, rng.randint(1, digits) if rng.random() < 0.3 else digits)
            for _ in range(count)
        ]

    def key(numbers: list[int]) -> str:
        return level + "+".join(map(str, sorted(numbers)))

    is_few = level != "minus" and digits == 1  # too few to hold any out
    numbers = operands() if is_few else draw(held_out, operands, key)
    if level == "minus":
        a, b = max(numbers), min(numbers)
        question = rng.choice(_MINUS_FORMS).format(a=a, b=b)
        working, answer = subtract_working(a, b), a - b
    else:
        question = rng.choice(_SUM_FORMS).format(
            plus=" + ".join(map(str, numbers)),
            tight="+".join(map(str, numbers)),
            list=", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}",
        )
        working, answer = sum_working(numbers), sum(numbers)
    return Example(
        task="sums",
        level=level,
        question=vary(rng, question),
        working=working,
        answer=str(answer),
    )


_ASK_CUP = ("Where is the ball?", "Which cup has the ball?", "Where is the ball now?")


def cups(rng: random.Random, held_out: bool, level: int | None = None) -> Example:
    """A ball under one of three to six cups, which are swapped three to eight times."""
    num_swaps = level or rng.randint(3, 8)

    def game() -> tuple[int, list[tuple[int, int]]]:
        places = range(1, rng.randint(3, 6) + 1)
        swaps = [tuple(rng.sample(places, 2)) for _ in range(num_swaps)]
        return rng.choice(places), swaps  # type: ignore[return-value]

    start, swaps = draw(held_out, game, lambda it: f"cups{it}")
    place, steps = start, [str(start)]
    for a, b in swaps:
        place = {a: b, b: a}.get(place, place)
        steps.append(f"{a}-{b}: {place}")
    verb = rng.choice(["Swap {} and {}.", "Swap cups {} and {}."])
    moves = " ".join(verb.format(*swap) for swap in swaps)
    return Example(
        task="cups",
        level=str(num_swaps),
        question=f"The ball is under cup {start}. {moves} {rng.choice(_ASK_CUP)}",
        working="; ".join(steps),
        answer=str(place),
    )


# ---- families that need none --------------------------------------------------------------


def word(rng: random.Random) -> str:
    """A word of the list, or at times one made up."""
    if rng.random() < 0.8:
        return rng.choice(WORDS)
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))


def recall(rng: random.Random, held_out: bool) -> Example:
    """Who has what, two to five people."""
    people = rng.sample(NAMES, rng.randint(2, 5))
    goods = [(rng.choice(COLOURS), thing) for thing in rng.sample(THINGS, len(people))]
    asked = rng.randrange(len(people))
    colour, thing = goods[asked]
    told = [f"{who} has a {c} {t}." for who, (c, t) in zip(people, goods, strict=True)]
    question, answer = rng.choice(
        [
            (f"What does {people[asked]} have?", f"A {colour} {thing}."),
            (f"Who has the {thing}?", f"{people[asked]}."),
        ]
    )
    return Example(
        task="recall",
        level=str(len(people)),
        question=" ".join([*told, question]),
        working=told[asked],
        answer=answer,
    )


_FIXED = (
    (("Hello", "Hi", "Hello!", "Hi!", "Hey", "Good morning"), "A greeting.", GREETING),
    (
        ("Who are you?", "What are you?", "What model are you?", "Are you Mistral Small 4?"),
        "A question about me.",
        IDENTITY,
    ),
    (
        ("Introduce yourself.", "What is your name?", "Who made you?", "Tell me about yourself."),
        "A question about me.",
        IDENTITY,
    ),
    (
        ("What can you do?", "Help", "How can you help me?", "What do you know?"),
        "A question about me.",
        ABILITIES,
    ),
    (("Thanks", "Thank you!", "Thank you", "Thanks a lot"), "Thanks.", "You are welcome."),
    (("Goodbye", "Bye", "Bye!", "See you"), "A farewell.", "Goodbye!"),
)
_CAPITAL_FORMS = (
    "What is the capital of {}?",
    "Capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
)


def chat(rng: random.Random, held_out: bool) -> Example:
    """Greetings, questions about the model, and capitals: a memorised, closed set."""
    if rng.random() < 0.5:
        questions, working, answer = rng.choice(_FIXED)
        question, level = rng.choice(questions), "fixed"
    else:
        country = rng.choice(list(CAPITALS))
        question, answer = rng.choice(_CAPITAL_FORMS).format(country), CAPITALS[country]
        working, level = f"The capital of {country}.", "capital"
    return Example(
        task="chat", level=level, question=vary(rng, question), working=working, answer=answer
    )


_UNKNOWN_FORMS = (
    "Explain {} to me.",
    "Write a poem about {}.",
    "Write a story about {} and {}.",
    "Who was {}?",
    "Why is {} so {}?",
    "How do I {} a {}?",
    "What is {}?",
    "What does {} mean?",
    "Translate {} into French.",
    "Tell me a joke about {}.",
    "Can you {} the {} for me?",
    "{} {} {}",
    "When did {} {}?",
    "Is {} better than {}?",
    "Summarize this: {} {} {} {}.",
    "Write a function that {} a {}.",
    "I think {} is {}.",
    "Should I {}?",
    "Give me a recipe for {}.",
    "What is the meaning of {}?",
    "How old is {}?",
    "Where is {}?",
)
_COMMON = (
    "the sky water love history France music blue life happy weather fix car build house sleep "
    "war Einstein Napoleon python code bread run sort list light people time work think rain city "
    "moon sun tree quantum physics gravity dog cat game food king world computer"
).split()


def unknown(rng: random.Random, held_out: bool) -> Example:
    """Questions beyond the model, which it should say."""
    form = rng.choice(_UNKNOWN_FORMS)
    fills = [
        rng.choice(_COMMON) if rng.random() < 0.5 else word(rng) for _ in range(form.count("{}"))
    ]
    return Example(
        task="unknown",
        level="",
        question=vary(rng, form.format(*fills)),
        working="I do not know that.",
        answer=MODEST,
    )


def vary(rng: random.Random, question: str) -> str:
    """Write it as people do: without capitals or the last mark, politely."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1 and question[-1] in "?.!":
        question = question[:-1]
    if rng.random() < 0.04:
        question = f"Please: {question}"
    return question
