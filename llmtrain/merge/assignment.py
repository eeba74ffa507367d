"""The linear assignment problem: partners that are worth most together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row for which the sum of ``values`` [n, n] is largest; exact.

    Shortest augmenting paths with dual prices (Jonker and Volgenant 1987), after giving each row
    its best column where nobody wants the same: O(n^3) at worst, O(n^2) where most rows have a
    clear partner. Deterministic.
    """
    cost = -np.asarray(values, dtype=np.float64)
    n = len(cost)
    column_price = cost.min(axis=0)
    reduced = cost - column_price
    row_price = reduced.min(axis=1)
    partner = np.full(n, -1)  # of each column: its row
    taken = np.zeros(n, dtype=bool)
    for row, column in enumerate((reduced - row_price[:, None]).argmin(axis=1)):
        if partner[column] < 0:
            partner[column], taken[row] = row, True
    for free in np.flatnonzero(~taken):
        _augment(cost, row_price, column_price, partner, int(free))
    found = np.empty(n, dtype=np.int64)
    found[partner] = np.arange(n)
    return found


def _augment(
    cost: NDArray[np.float64],
    row_price: NDArray[np.float64],
    column_price: NDArray[np.float64],
    partner: NDArray[np.int64],
    start: int,
) -> None:
    """Give row ``start`` a column, moving others along the cheapest alternating path."""
    n = len(cost)
    distance = np.full(n, np.inf)
    before = np.full(n, -1)  # the column from which a column was reached
    done = np.zeros(n, dtype=bool)
    row, last, base = start, -1, 0.0
    while True:
        offer = base + cost[row] - row_price[row] - column_price
        better = ~done & (offer < distance)
        distance[better], before[better] = offer[better], last
        column = int(np.where(done, np.inf, distance).argmin())
        base = float(distance[column])
        done[column] = True
        last = column
        if partner[column] < 0:
            break
        row = int(partner[column])
    reached = done.copy()
    reached[last] = False
    row_price[partner[reached]] += base - distance[reached]
    column_price[reached] -= base - distance[reached]
    row_price[start] += base
    while last >= 0:
        previous = int(before[last])
        partner[last] = start if previous < 0 else partner[previous]
        last = previous
