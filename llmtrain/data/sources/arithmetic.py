"""Generated worked arithmetic: the builtin domain ``math``.

Document ``i`` is a function of ``i`` alone: a page of problems of mixed kinds, each solved step by
step. Every line of the form ``a = b`` is true, so a model's arithmetic can be scored against it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from math import gcd

_NAMES = (
    "Ada",
    "Ben",
    "Chen",
    "Dina",
    "Emil",
    "Fatma",
    "Gus",
    "Hana",
    "Ivo",
    "June",
    "Kofi",
    "Lea",
)
_THINGS = ("apples", "books", "bolts", "cards", "coins", "pencils", "plums", "seeds", "stamps")


class Page:
    """Random numbers and notation of one document."""

    def __init__(self, index: int) -> None:
        self.rng = random.Random(f"llmtrain arithmetic {index}")
        self.times = self.rng.choice(("*", "×", "x"))
        self.digits = self.rng.choice((1, 2, 2, 3, 3, 4, 5))

    def number(self, digits: int | None = None, low: int = 2) -> int:
        """A number of up to ``digits`` digits (default: the page's), at least ``low``."""
        return self.rng.randint(low, max(low + 1, 10 ** (digits or self.digits) - 1))

    def name(self) -> str:
        """A first name."""
        return self.rng.choice(_NAMES)


Problem = tuple[str, list[str], str]  # question, steps, answer


def _addition(page: Page) -> Problem:
    a, b = page.number(), page.number()
    steps, carry, place = [], 0, 1
    for _ in range(max(len(str(a)), len(str(b)))):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        line = f"{x} + {y} + {carry} = {total}" if carry else f"{x} + {y} = {total}"
        carry = total // 10
        steps.append(f"{line}, write {total % 10}" + (f", carry {carry}" if carry else ""))
        place *= 10
    return f"{a} + {b}", steps, f"{a} + {b} = {a + b}"


def _subtraction(page: Page) -> Problem:
    a, b = sorted((page.number(), page.number()), reverse=True)
    steps, borrow, place = [], 0, 1
    for _ in range(len(str(a))):
        x, y = a // place % 10 - borrow, b // place % 10
        borrow = int(x < y)
        note = " (borrow 1)" if borrow else ""
        steps.append(f"{x + 10 * borrow} - {y} = {x + 10 * borrow - y}{note}")
        place *= 10
    return f"{a} - {b}", steps, f"{a} - {b} = {a - b}"


def _multiplication(page: Page) -> Problem:
    a, b, t = page.number(), page.number(min(page.digits, 3)), page.times
    parts = [int(d) * 10**k for k, d in enumerate(reversed(str(b))) if d != "0"][::-1]
    steps = [f"{a} {t} {p} = {a * p}" for p in parts]
    if len(parts) > 1:
        steps.insert(0, f"{b} = " + " + ".join(map(str, parts)))
        steps.append(" + ".join(str(a * p) for p in parts) + f" = {a * b}")
    return f"{a} {t} {b}", steps, f"{a} {t} {b} = {a * b}"


def _division(page: Page) -> Problem:
    a, b, t = page.number(page.digits + 1), page.number(min(page.digits, 2)), page.times
    steps, rest = [], 0
    for digit in str(a):
        rest = rest * 10 + int(digit)
        q = rest // b
        steps.append(f"{b} goes into {rest} {q} times, {rest} - {q * b} = {rest - q * b}")
        rest -= q * b
    answer = f"{a} = {b} {t} {a // b} + {rest}"
    return f"{a} divided by {b}", steps, f"quotient {a // b}, remainder {rest}: {answer}"


def _fractions(page: Page) -> Problem:
    small = min(page.digits, 2)
    a, b = (Fraction(page.number(small, 1), page.number(small)) for _ in range(2))
    sign = page.rng.choice("+-")
    common = a.denominator * b.denominator // gcd(a.denominator, b.denominator)
    x, y = a * common, b * common
    result, top = (a + b, x + y) if sign == "+" else (a - b, x - y)
    steps = [
        f"common denominator {common}",
        f"{_ratio(a)} = {x}/{common} and {_ratio(b)} = {y}/{common}",
        f"{x} {sign} {y} = {top}",
    ]
    if result.denominator != common:
        steps.append(f"{top}/{common} = {result}")
    question = f"{_ratio(a)} {sign} {_ratio(b)}"
    return question, steps, f"{question} = {result}"


def _ratio(value: Fraction) -> str:
    return f"{value.numerator}/{value.denominator}"


def _euclid(page: Page) -> Problem:
    factor = page.number(1)
    a, b = factor * page.number(), factor * page.number()
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {x // y} {page.times} {y} + {x % y}")
        x, y = y, x % y
    return f"the greatest common divisor of {a} and {b}", steps, f"gcd({a}, {b}) is {x}"


def _primes(page: Page) -> Problem:
    n = page.number(min(page.digits, 4))
    rest, divisor, factors, steps = n, 2, [], []
    while divisor * divisor <= rest:
        if rest % divisor:
            divisor += 1
            continue
        steps.append(f"{rest} / {divisor} = {rest // divisor}")
        factors.append(divisor)
        rest //= divisor
    factors.append(rest)
    if len(factors) == 1:
        return (
            f"the prime factors of {n}",
            [f"no prime up to its root divides {n}"],
            f"{n} is prime",
        )
    product = f" {page.times} ".join(map(str, factors))
    return f"the prime factors of {n}", [*steps, f"{rest} is prime"], f"{n} = {product}"


def _linear(page: Page) -> Problem:
    x, a, b = page.number(2, -20), page.number(1), page.number()
    c = a * x + b
    steps = [
        f"subtract {b} on both sides: {c} - {b} = {c - b}, so {a}n = {c - b}",
        f"divide by {a}: {c - b} / {a} = {x}",
    ]
    return f"n where {a}n + {b} = {c}", steps, f"n = {x}"


def _pair(page: Page) -> Problem:
    x, y = page.number(2), page.number(2)
    total, difference = x + y, x - y
    steps = [
        f"add the equations: {total} + {difference} = {2 * x}, so 2p = {2 * x}",
        f"{2 * x} / 2 = {x}, so p = {x}",
        f"{total} - {x} = {y}, so q = {y}",
    ]
    return f"p and q where p + q = {total} and p - q = {difference}", steps, f"p = {x}, q = {y}"


def _percent(page: Page) -> Problem:
    rate, base = page.rng.choice((5, 10, 12, 15, 20, 25, 30, 40, 60, 75)), page.number() * 20
    one = Fraction(base, 100)
    steps = [
        f"one percent of {base}: {base} / 100 = {_decimal(one)}",
        f"{_decimal(one)} {page.times} {rate} = {_decimal(one * rate)}",
    ]
    return f"{rate}% of {base}", steps, f"{rate}% of {base} is {_decimal(one * rate)}"


def _decimal(value: Fraction) -> str:
    cents = int(value * 100)
    if cents % 100 == 0:
        return str(cents // 100)
    return f"{cents // 100}.{cents % 100:02d}".rstrip("0")


def _expression(page: Page) -> Problem:
    t = page.times
    a, b, c, d = (page.number(min(page.digits, 2)) for _ in range(4))
    if page.rng.random() < 0.5:
        text = f"({a} + {b}) {t} {c} - {d}"
        steps = [f"{a} + {b} = {a + b}", f"{a + b} {t} {c} = {(a + b) * c}"]
        value = (a + b) * c - d
        steps.append(f"{(a + b) * c} - {d} = {value}")
    else:
        text = f"{a} + {b} {t} ({c} + {d})"
        steps = [f"{c} + {d} = {c + d}", f"{b} {t} {c + d} = {b * (c + d)}"]
        value = a + b * (c + d)
        steps.append(f"{a} + {b * (c + d)} = {value}")
    return text, steps, f"{text} = {value}"


def _sequence(page: Page) -> Problem:
    start, step, n, t = page.number(2), page.number(1), page.rng.randint(6, 40), page.times
    shown = ", ".join(str(start + k * step) for k in range(4))
    last = start + (n - 1) * step
    steps = [
        f"each term is {step} more than the one before: {start} + {step} = {start + step}",
        f"term {n}: {start} + {n - 1} {t} {step} = {last}",
        f"twice the sum: {n} {t} ({start} + {last}) = {n * (start + last)}",
        f"{n * (start + last)} / 2 = {n * (start + last) // 2}",
    ]
    answer = f"term {n} is {last}, the sum is {n * (start + last) // 2}"
    return f"term {n} of {shown}, ... and the sum of the first {n} terms", steps, answer


def _binary(page: Page) -> Problem:
    n = page.number(min(page.digits, 4))
    steps, rest = [], n
    while rest:
        steps.append(f"{rest} = 2 {page.times} {rest // 2} + {rest % 2}")
        rest //= 2
    return f"{n} in binary", [*steps, "read the remainders upwards"], f"{n} is {n:b} in binary"


def _square(page: Page) -> Problem:
    small, t = min(page.digits, 3), page.times
    n = page.number(small, 11)
    tens = round(n, -1) or 10
    rest = n - tens
    sign = "+" if rest >= 0 else "-"
    r = abs(rest)
    steps = [
        f"{n} = {tens} {sign} {r}",
        f"{tens} {t} {tens} = {tens * tens}",
        f"2 {t} {tens} {t} {r} = {2 * tens * r}",
        f"{r} {t} {r} = {r * r}",
        f"{tens * tens} {sign} {2 * tens * r} + {r * r} = {n * n}",
    ]
    return f"{n}^2", steps, f"{n}^2 = {n * n}"


def _shopping(page: Page) -> Problem:
    name, thing, t = page.name(), page.rng.choice(_THINGS), page.times
    count, price, paid_extra = page.number(1), page.number(2), page.number(2, 1)
    cost = count * price
    question = (
        f"{name} buys {count} {thing} for {price} cents each and pays {cost + paid_extra} cents. "
        f"How much change does {name} get?"
    )
    steps = [f"cost: {count} {t} {price} = {cost}"]
    steps.append(f"change: {cost + paid_extra} - {cost} = {paid_extra}")
    return question, steps, f"{paid_extra} cents"


def _travel(page: Page) -> Problem:
    speed, hours, t = page.number(2, 4), page.number(1), page.times
    more = page.number(1, 1)
    far, total = speed * hours, speed * (hours + more)
    question = (
        f"{page.name()} drives {speed} km in an hour. How far is it in {hours} hours, "
        f"and how far after {more} more?"
    )
    steps = [f"{speed} {t} {hours} = {far}", f"{hours} + {more} = {hours + more}"]
    steps.append(f"{speed} {t} {hours + more} = {total}")
    return question, steps, f"{far} km, then {total} km"


def _sharing(page: Page) -> Problem:
    friends, each, left = page.number(1), page.number(2), 0
    left = page.rng.randrange(friends)
    thing, total = page.rng.choice(_THINGS), friends * each + left
    question = (
        f"{page.name()} shares {total} {thing} equally among {friends} friends. What is left?"
    )
    steps = [
        f"{friends} {page.times} {each} = {friends * each}",
        f"{total} - {friends * each} = {left}",
    ]
    return question, steps, f"each gets {each}, {left} left over"


def _average(page: Page) -> Problem:
    n = page.rng.randint(3, 6)
    values = [page.number(min(page.digits, 3)) for _ in range(n - 1)]
    values.append(-sum(values) % n + n * page.number(1, 0))
    total = sum(values)
    steps = [" + ".join(map(str, values)) + f" = {total}", f"{total} / {n} = {total // n}"]
    return f"the average of {', '.join(map(str, values))}", steps, f"the average is {total // n}"


def _modular(page: Page) -> Problem:
    base, exponent, modulus = page.number(1), page.rng.randint(3, 20), page.number(2, 3)
    steps, power, square, bits = [], 1, base % modulus, exponent
    while bits:
        if bits & 1:
            steps.append(f"{power} {page.times} {square} leaves {power * square % modulus}")
            power = power * square % modulus
        square, bits = square * square % modulus, bits >> 1
    question = f"the remainder of {base}^{exponent} divided by {modulus}"
    head = f"{exponent} is {exponent:b} in binary, multiply the squares of its ones"
    return question, [head, *steps], f"the remainder is {power}"


def _ordering(page: Page) -> Problem:
    values = [page.number() for _ in range(page.rng.randint(4, 7))]
    ranked = sorted(values)
    gaps = [f"{b} - {a} = {b - a}" for a, b in pairwise(ranked)]
    question = f"the order of {', '.join(map(str, values))} and the gaps between neighbours"
    return question, gaps, " <= ".join(map(str, ranked))


_KINDS: tuple[Callable[[Page], Problem], ...] = (
    *(_addition, _subtraction, _multiplication, _division, _fractions, _euclid, _primes),
    *(_linear, _pair, _percent, _expression, _sequence, _binary, _square, _shopping),
    *(_travel, _sharing, _average, _modular, _ordering),
)


def _numbered(n: int, question: str, steps: list[str], answer: str) -> str:
    ask = question if question.endswith("?") else f"Find {question}."
    body = "".join(f"  Step {k}: {s}.\n" for k, s in enumerate(steps, 1))
    return f"Problem {n}. {ask}\n{body}Answer: {answer}.\n"


def _dialogue(n: int, question: str, steps: list[str], answer: str) -> str:
    ask = question if question.endswith("?") else f"What is {question}?"
    return f"Q{n}: {ask}\nA{n}: " + "; ".join([*steps, f"so {answer}"]) + ".\n"


def _listing(n: int, question: str, steps: list[str], answer: str) -> str:
    return f"{n}) {question}\n" + "".join(f"   - {s}\n" for s in steps) + f"   => {answer}\n"


def _prose(_n: int, question: str, steps: list[str], answer: str) -> str:
    ask = question if question.endswith("?") else f"We want {question}."
    linked = [f"{'First' if k == 0 else 'Then'}, {s}." for k, s in enumerate(steps)]
    return f"{ask} {' '.join(linked)} Therefore, {answer}.\n"


def page(index: int) -> str:
    """Document ``index`` (any integer >= 0): three to eight solved problems as text."""
    sheet = Page(index)
    layout = sheet.rng.choice((_numbered, _dialogue, _listing, _prose))
    title = sheet.rng.choice(("Worked arithmetic", "Exercises", "Practice sheet", "Solutions"))
    kinds = sheet.rng.sample(_KINDS, sheet.rng.randint(3, 8))
    if sheet.rng.random() < 0.25:
        kinds = kinds[:1] * len(kinds)
    body = [layout(n, *kind(sheet)) for n, kind in enumerate(kinds, 1)]
    return f"{title} {index}\n\n" + "\n".join(body)


def pages() -> Iterator[str]:
    """All documents, without end."""
    index = 0
    while True:
        yield page(index)
        index += 1
