"""The generated arithmetic is deterministic, and every equation in it is true."""

from __future__ import annotations

import ast
import re
from fractions import Fraction

import pytest

from llmtrain.data.sources.arithmetic import page

NUMBERS = r"(?:[-\d+*×/^(). ]|(?<= )x(?= ))*"
OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a ** int(b),
}


def value(text: str) -> Fraction:
    """Exact value of an expression in the page's notation."""

    def of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.UnaryOp):
            return -of(node.operand)
        assert isinstance(node, ast.Constant)
        return Fraction(str(node.value))

    plain = re.sub(r"[×x]", "*", text).replace("^", "**")
    return of(ast.parse(plain.strip(), mode="eval").body)


def equations(text: str) -> list[list[str]]:
    """The sides of every chain ``a = b = ...`` of plain numbers, without unknowns."""
    text = re.sub(r"^   - |=>|<=", "; ", text, flags=re.M)
    found = []
    for match in re.finditer(rf"{NUMBERS}(?:={NUMBERS})+", text):
        sides = [side.strip(" .").removesuffix("(").strip() for side in match.group().split("=")]
        if all(sides) and sides[0][0] not in "+*×x/^":
            found.append(sides)
    return found


def test_every_equation_holds():
    checked = 0
    for index in range(600):
        for sides in equations(page(index)):
            assert len({value(side) for side in sides}) == 1, f"page {index}: {sides}"
            checked += 1
    assert checked > 8000


def test_a_false_equation_is_seen():
    text = "so 12 + 30 = 43."
    ((left, right),) = equations(text)
    assert value(left) != value(right)


@pytest.mark.parametrize("index", [0, 1, 10**9])
def test_pages_depend_on_their_number_alone(index):
    assert page(index) == page(index)
    assert page(index) != page(index + 1)
    assert str(index) in page(index)


def test_page_zero_is_frozen():
    """A change of the generator changes every builtin corpus: make it on purpose."""
    assert page(0).splitlines()[2].startswith("We want 48 + 28 × (5 + 93). First, 5 + 93 = 98.")


def test_euclid_and_remainders():
    """Claims in words, which the equations do not cover."""
    import math

    seen = 0
    for index in range(400):
        text = page(index)
        for a, b, g in re.findall(r"gcd\((\d+), (\d+)\) is (\d+)", text):
            assert math.gcd(int(a), int(b)) == int(g)
            seen += 1
        for base, power, modulus, rest in re.findall(
            r"remainder of (\d+)\^(\d+) divided by (\d+).*?the remainder is (\d+)", text, re.S
        ):
            assert pow(int(base), int(power), int(modulus)) == int(rest)
            seen += 1
        for n, bits in re.findall(r"(\d+) is ([01]+) in binary\.", text):
            assert int(bits, 2) == int(n)
    assert seen > 100
