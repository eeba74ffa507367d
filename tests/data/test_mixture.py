"""Which source gives global sample i: exact shares, nothing twice, the past untouched.

Targets are computed here from the weights as exact fractions, independently of the code.
"""

import itertools
import math
import threading
from fractions import Fraction

import numpy as np
import pytest
from helpers.mixtures import shares, walk

from llmtrain.data import apportion
from llmtrain.data.apportion import Apportionment
from llmtrain.data.mixture import Mixture
from llmtrain.data.phases import stretches_of
from llmtrain.data.targets import Stretch

BILLION = 10**9
BLOCK = 1024


def fifty(kind: str) -> dict[str, Fraction]:
    """Fifty weights, the smallest a millionth of the largest or less."""
    rng = np.random.default_rng(4)
    made = {
        "geometric": np.geomspace(1, 1e-6, 50),
        "uniform in log": 10 ** rng.uniform(-6, 0, 50),
        "random": np.append(rng.dirichlet(np.ones(49)), 1e-6),
        "one dominates": np.append(1, 10 ** rng.uniform(-6, -3, 49)),
        "three kinds": np.repeat([1.0, 1e-3, 1e-6], [10, 20, 20]),
        "equal": np.ones(50),
    }
    return shares(made[kind].tolist())


KINDS = ["geometric", "uniform in log", "random", "one dominates", "three kinds", "equal"]


def constant(weights: dict[str, Fraction], block: int) -> Apportionment:
    return Apportionment([Stretch(0, BILLION, weights)], block)


def worst_error(part: Apportionment, weights: dict[str, Fraction], n: int) -> Fraction:
    counts = part.counts(n).tolist()
    assert sum(counts) == n
    unit = math.lcm(*(w.denominator for w in weights.values()))
    errors = [
        c * unit - n * int(weights[name] * unit) for c, name in zip(counts, part.names, strict=True)
    ]
    return Fraction(max(map(abs, errors)), unit)


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_sources_stay_within_one_sample_at_block_boundaries(kind: str) -> None:
    weights = fifty(kind)
    assert len(weights) == 50
    part = constant(weights, BLOCK)
    last = BILLION // BLOCK
    draw = np.random.default_rng(1).integers(0, last, 150).tolist()
    for block in draw:
        assert worst_error(part, weights, block * BLOCK) < 1, block
    for begin in (0, 123_456, last - 150):
        before = part.counts(begin * BLOCK)
        for block in range(begin, begin + 150):
            assert worst_error(part, weights, block * BLOCK) < 1, block
            counts = part.counts(block * BLOCK)
            assert (counts >= before).all()
            before = counts
    assert worst_error(part, weights, BILLION) < 1


def hard_weights(rng: np.random.Generator) -> dict[str, Fraction]:
    """Weights at which apportionment is known to be difficult: alike, or far apart, or both."""
    kind, k = rng.integers(5), int(rng.integers(2, 40))
    made = [
        rng.dirichlet(np.full(k, 0.1)) + 1e-6,
        10 ** rng.uniform(-6, 0, k),
        np.append(np.ones(rng.integers(1, 20)), np.full(k, 10 ** rng.uniform(-6, -2))),
        np.append(1, 10 ** rng.uniform(-5, -2) * (1 + 0.01 * rng.random(k))),
        np.append(1, 10 ** rng.uniform(-4, 0) * rng.uniform(0.2, 0.9) ** np.arange(8) ** 1.5),
    ][kind]
    return shares(made.tolist())


@pytest.mark.parametrize("block", [1024, 100, 64, 1])
def test_hard_weights_stay_within_one_sample(block: int) -> None:
    rng = np.random.default_rng(block)
    for _ in range(20):
        weights = hard_weights(rng)
        part = constant(weights, block)
        for n in range(0, 200 * block, block):
            assert worst_error(part, weights, n) < 1, weights


@pytest.mark.parametrize("block", [1, 3, 64])
def test_counts_never_fall_and_sum_up_whatever_the_weights(block: int) -> None:
    rng = np.random.default_rng(block)
    for _ in range(15):
        weights = hard_weights(rng)
        part = constant(weights, block)
        before = np.zeros(len(weights), np.int64)
        for n in range(0, 150 * block, block):
            counts = part.counts(n)
            assert counts.sum() == n
            assert (counts >= before).all()
            before = counts


def test_a_position_takes_few_choices_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = fifty("geometric")
    mixture = Mixture(list(weights), [Stretch(0, BILLION, weights)], BLOCK, 0)
    calls = 0
    deal = apportion._deal

    def counted(*args: object) -> object:
        nonlocal calls
        calls += 1
        return deal(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(apportion, "_deal", counted)
    positions = np.random.default_rng(2).integers(0, BILLION, 600).tolist()
    most = 0
    for i in positions:
        calls = 0
        mixture.locate(i)
        most = max(most, calls)
    assert 0 < most <= 12
    for held in (mixture, Mixture(list(weights), [Stretch(0, 10**13, weights)], BLOCK, 0)):
        (part, *_), *_ = held._parts
        states = (part._ends, part._powers, part._kept, part._known, part._older)
        assert sum(map(len, states)) < 2600


def test_the_order_of_asking_does_not_matter() -> None:
    weights = fifty("uniform in log")
    forward, backward = constant(weights, 64), constant(weights, 64)
    ns = [64 * b for b in range(700)] + [64 * 5 + 3, 64 * 699 + 63]
    expected = [forward.counts(n) for n in ns]
    for n, counts in reversed(list(zip(ns, expected, strict=True))):
        assert np.array_equal(backward.counts(n), counts)
    together = constant(weights, 64)
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for j in np.random.default_rng(seed).permutation(len(ns)).tolist():
            if not np.array_equal(together.counts(ns[j]), expected[j]):
                wrong.append(j)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def changed_at_eighty_percent(total: int) -> tuple[list[Stretch], dict[str, Fraction]]:
    """Ten of fifty sources are dropped, others gain; and what the whole run should take."""
    early = fifty("geometric")
    late = shares([0] * 10 + np.random.default_rng(3).dirichlet(np.ones(40)).tolist())
    turn = total * 8 // 10
    stretches = [Stretch(0, turn, early), Stretch(turn, total, late)]
    wanted = {n: early[n] * turn + late.get(n, 0) * (total - turn) for n in early}
    return stretches, wanted


def test_a_change_at_eighty_percent_of_a_billion_samples() -> None:
    total = BILLION + 12_345
    stretches, wanted = changed_at_eighty_percent(total)
    mixture = Mixture(list(wanted), stretches, BLOCK, 7)
    turn = stretches[0].stop
    assert turn % BLOCK != 0
    low, high = turn - 5000, turn + 5000
    labels, before = mixture.locate_range(low, high)
    start, stop = mixture.counts(low), mixture.counts(high)
    for index in range(50):
        assert before[labels == index].tolist() == list(range(start[index], stop[index]))
    at = mixture.counts(turn).tolist()
    for index, weight in enumerate(stretches[0].weights.values()):
        assert abs(at[index] - turn * weight) < 1
    end = mixture.counts(total).tolist()
    assert sum(end) == total
    assert max(abs(n - w) for n, w in zip(end, wanted.values(), strict=True)) < 1


@pytest.mark.parametrize(("block", "total"), [(1024, 30_000), (64, 4_321), (1, 500), (1024, 700)])
def test_every_sample_of_a_run_comes_once(block: int, total: int) -> None:
    stretches, wanted = changed_at_eighty_percent(total)
    mixture = Mixture(list(wanted), stretches, block, 1)
    labels, before = mixture.locate_range(0, total)
    assert len(labels) == total
    for index in range(50):
        mine = before[labels == index]
        assert mine.tolist() == list(range(len(mine)))
    for i in (0, 1, block - 1, total // 3, stretches[0].stop, total):
        assert mixture.counts(i).tolist() == np.bincount(labels[:i], minlength=50).tolist()
    for i in (0, total // 2, total - 1):
        assert mixture.locate(i) == (labels[i], before[i])


def test_a_block_is_shuffled_by_the_seed_and_keeps_its_counts() -> None:
    weights = shares([0.5, 0.3, 0.2])
    one, two = (Mixture(list(weights), [Stretch(0, 9000, weights)], 1000, s) for s in (1, 2))
    first, second = one.locate_range(3000, 4000)[0], two.locate_range(3000, 4000)[0]
    assert np.bincount(first).tolist() == np.bincount(second).tolist() == [500, 300, 200]
    assert (first != second).mean() > 0.4
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.1
    assert (np.bincount(first[:500]) < [300, 200, 150]).all()
    later = one.locate_range(4000, 5000)[0]
    assert (first != later).any()


def hard_schedule(seed: int, come_back: bool) -> list[Stretch]:
    """Abrupt phases of hard weights; many go to 0, for good or for a phase."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    gone, out, at = np.zeros(n, bool), [], 0
    for _ in range(int(rng.integers(2, 7))):
        weights = np.resize(rng.permutation(list(hard_weights(rng).values())), n).astype(float)
        gone = (gone & (not come_back)) | (rng.random(n) < (0.3 if out else 0.05))
        gone[0] &= not gone.all()
        stop = at + int(rng.integers(1, 60 * 64))
        out.append(Stretch(at, stop, shares((weights * ~gone).tolist())))
        at = stop
    return out


@pytest.mark.parametrize("come_back", [False, True])
def test_hard_schedules_stay_within_one_sample(come_back: bool) -> None:
    strays = 0
    for seed in range(40):
        schedule = hard_schedule(seed, come_back)
        names = sorted({name for s in schedule for name in s.weights})
        worst, stray = walk(Mixture(names, schedule, 64, 0))
        assert max(worst) < 1, seed
        assert max(stray) <= 5, seed
        strays += sum(1 for n in stray if n)
    assert strays <= 8


def test_a_source_that_stops_gets_nothing_more() -> None:
    stretches, wanted = changed_at_eighty_percent(BILLION + 12_345)
    mixture = Mixture(list(wanted), stretches, BLOCK, 7)
    stopped = [j for j, name in enumerate(mixture.names) if name not in stretches[1].weights]
    assert len(stopped) == 10
    gained = mixture.counts(mixture.total) - mixture.counts(stretches[0].stop)
    assert not gained[stopped].any()


def test_rounding_does_not_add_up_over_many_phases() -> None:
    rng = np.random.default_rng(6)
    stretches, wanted, at = [], np.array([Fraction(0)] * 12), 0
    worst = Fraction(0)
    for _ in range(120):
        weights = shares((rng.dirichlet(np.ones(12)) * (rng.random(12) < 0.7) + 1e-4).tolist())
        stop = at + int(rng.integers(1, 3000))
        stretches.append(Stretch(at, stop, weights))
        at = stop
    names = [f"s{i:02d}" for i in range(12)]
    mixture = Mixture(names, stretches, 256, 0)
    for stretch in stretches:
        wanted = wanted + [stretch.weights[name] * (stretch.stop - stretch.start) for name in names]
        counts = mixture.counts(stretch.stop).tolist()
        worst = max(worst, *(abs(c - w) for c, w in zip(counts, wanted, strict=True)))
    assert worst < 1


def test_a_ramp_follows_the_straight_line() -> None:
    from llmtrain.config.schema import DataConfig, PhaseConfig, RunConfig, TrainConfig, dur

    phases = [
        PhaseConfig(dur("0.5dur"), {"a": 0.9, "b": 0.1}),
        PhaseConfig(dur("1dur"), {"a": 0.2, "b": 0.5, "c": 0.3}, "linear"),
    ]
    cfg = RunConfig(
        data=DataConfig(phases=phases, block_size=64), train=TrainConfig(global_batch_size=10)
    )
    total = 100_000
    stretches = stretches_of(cfg, total)
    mixture = Mixture(["a", "b", "c"], stretches, 64, 0)
    half = total // 2
    for left, right in itertools.pairwise(stretches[1:]):
        assert left.stop == right.start
        done = left.stop - half
        line = [
            half * first + done * first + (last - first) * done * done / (2 * half)
            for first, last in ((0.9, 0.2), (0.1, 0.5), (0.0, 0.3))
        ]
        assert np.abs(mixture.counts(left.stop) - line).max() <= 1 + 1e-6


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_one_source_gives_everything(block: int) -> None:
    mixture = Mixture(["a", "b"], [Stretch(0, 3000, {"b": Fraction(1)})], block, 0)
    labels, before = mixture.locate_range(0, 3000)
    assert (labels == 1).all()
    assert before.tolist() == list(range(3000))
    assert mixture.counts(3000).tolist() == [0, 3000]


def test_known_labels_hold_on_every_machine() -> None:
    """The mixture is part of a run's identity: it may never change silently."""
    weights = shares([0.5, 0.3, 0.15, 0.05])
    mixture = Mixture(list(weights), [Stretch(0, 10**6, weights)], 16, 11)
    assert mixture.locate_range(160, 192)[0].tolist() == KNOWN
    assert constant(fifty("geometric"), 64).counts(64 * 777)[::7].tolist() == KNOWN_COUNTS


# fmt: off
KNOWN = [
    1, 2, 0, 1, 0, 2, 1, 0, 1, 0, 0, 0, 0, 2, 0, 1,
    2, 0, 0, 2, 0, 1, 3, 0, 1, 1, 0, 0, 1, 0, 0, 1,
]
# fmt: on
KNOWN_COUNTS = [12218, 1697, 236, 33, 5, 1, 0, 0]
