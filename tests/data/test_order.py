"""The permutation of a source's samples."""

import numpy as np
import pytest

from llmtrain.data.order import permute, sample_numbers, stream_key


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 101, 1024, 4097, 65537])
def test_every_number_comes_exactly_once(size: int) -> None:
    out = permute(np.arange(size), size, stream_key(1, "a", 0))
    assert sorted(out.tolist()) == list(range(size))


def test_a_part_is_the_part_of_the_whole() -> None:
    whole = permute(np.arange(5000), 5000, 99)
    assert np.array_equal(permute(np.arange(700, 900), 5000, 99), whole[700:900])


def test_huge_sources_need_no_memory() -> None:
    out = permute(np.array([0, 10**12 - 1]), 10**12, 5)
    assert ((out >= 0) & (out < 10**12)).all()
    assert out[0] != out[1]


def test_it_looks_shuffled() -> None:
    n = 20_000
    out = permute(np.arange(n), n, stream_key(3, "x", 1)).astype(float)
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.03
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.03
    counts, _ = np.histogram(out[: n // 10], bins=20, range=(0, n))
    assert counts.min() > 50 and counts.max() < 160


def test_epochs_seeds_and_sources_differ_and_each_epoch_is_complete() -> None:
    size = 97
    epochs, numbers = sample_numbers(7, "code", np.arange(3 * size), size)
    assert epochs.tolist() == [e for e in range(3) for _ in range(size)]
    parts = numbers.reshape(3, size)
    for part in parts:
        assert sorted(part.tolist()) == list(range(size))
    assert (parts[0] != parts[1]).any()
    for seed, name in ((8, "code"), (7, "docs")):
        _, other = sample_numbers(seed, name, np.arange(size), size)
        assert (other != parts[0]).any()


def test_known_values_hold_on_every_machine() -> None:
    """The order is part of a run's identity: it may never change silently."""
    _, numbers = sample_numbers(0, "code", np.arange(8), 1000)
    assert numbers.tolist() == KNOWN


KNOWN = [320, 739, 657, 795, 645, 124, 986, 775]
