"""Global batches are the same whatever the ranks, the micro-batch and the prefetching."""

import json
import threading
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.streams import MemorySource, documents

from llmtrain.config.data_methods import DietConfig
from llmtrain.config.fields import dur
from llmtrain.config.schema import DataConfig, RunConfig
from llmtrain.data.catalogue import Catalogue
from llmtrain.data.loader import HeldoutSet, Loader
from llmtrain.data.mixture import Mixture, Stretch
from llmtrain.data.packing import samples_in
from llmtrain.data.plan import DataPlan
from llmtrain.errors import DataError


def make_plan(prefetch: int = 2) -> DataPlan:
    cfg = RunConfig(data=DataConfig(seq_len=16, document_mask=True, prefetch=prefetch))
    sources = [MemorySource("a", documents(1, 90)), MemorySource("b", documents(2, 30))]
    weights = {"a": Fraction(2, 3), "b": Fraction(1, 3)}
    mixture = Mixture(["a", "b"], [Stretch(0, 960, weights)], 64, 5)
    sizes = [samples_in(s.num_tokens, 16) for s in sources]
    catalogue = Catalogue({}, {}, {}, 0, 99, None)
    all_of_it = [None, None]
    facts = (["a", "b"], list(sources), sizes, [1.0, 0.5], all_of_it)
    return DataPlan(cfg, catalogue, *facts, mixture.stretches, mixture)


def joined(plan: DataPlan, world: int, step: int) -> dict[str, torch.Tensor]:
    parts = [Loader(plan, 24, rank, world).batch(step) for rank in range(world)]
    keys = [key for key, value in vars(parts[0]).items() if value is not None]
    return {key: torch.cat([getattr(p, key) for p in parts]) for key in keys}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_are_the_global_batch(world: int) -> None:
    plan = make_plan()
    for step in (0, 7, 39):
        alone = joined(plan, 1, step)
        for key, value in joined(plan, world, step).items():
            assert torch.equal(value, alone[key]), key
        assert alone["sample_ids"].tolist() == list(range(step * 24, step * 24 + 24))


@pytest.mark.parametrize("size", [1, 10, 40])
def test_another_batch_size_sees_the_same_samples_in_the_same_order(size: int) -> None:
    plan = make_plan()
    whole = Loader(plan, 120, 0, 1).batch_at(77)
    parts = [Loader(plan, size, 0, 1).batch_at(77 + i) for i in range(0, 120, size)]
    assert whole.first is None
    for key in vars(whole).keys() - {"first"}:
        value = getattr(whole, key)
        assert torch.equal(torch.cat([getattr(part, key) for part in parts]), value), key


@pytest.mark.parametrize("world", [1, 2])
def test_a_diet_repeats_the_first_batches_and_then_goes_on_as_any_run(world: int) -> None:
    plan = make_plan()
    data = replace(plan.cfg.data, diet=DietConfig(48, dur("5step")))
    train = replace(plan.cfg.train, global_batch_size=24, duration=dur("40step"))
    cfg = replace(plan.cfg, data=data, train=train)
    rank = world - 1
    plain, diet = Loader(plan, 24, rank, world), Loader.from_config(plan, cfg, rank, world)
    for step, source in enumerate((0, 1, 0, 1, 0, 5, 6, 7)):
        found, wanted = diet.batch(step), plain.batch(source)
        assert torch.equal(found.tokens, wanted.tokens)
        assert torch.equal(found.source_ids, wanted.source_ids)
        assert torch.equal(found.sample_ids, plain.batch(step).sample_ids)


def fed(diet: DietConfig | None, steps: int = 40) -> DataPlan:
    plan = make_plan()
    data = replace(plan.cfg.data, diet=diet)
    train = replace(plan.cfg.train, global_batch_size=24, duration=dur(f"{steps}step"))
    return replace(plan, cfg=replace(plan.cfg, data=data, train=train))


def test_what_a_plan_counts_is_what_a_diet_draws() -> None:
    plan = fed(DietConfig(48, dur("5step")))
    loader, counts = Loader.from_config(plan, plan.cfg, 0, 1), np.zeros(2, np.int64)
    for step in range(8):
        assert plan.counts(step * 24).tolist() == counts.tolist()
        counts += np.bincount(loader.batch(step).source_ids.numpy(), minlength=2)
    assert counts.tolist() != plan.mixture.counts(8 * 24).tolist()
    assert "diet: the first 48 samples again and again up to 120" in plan.tree()
    row = next(line.split() for line in plan.tree().splitlines() if line.split()[0] == "a")
    assert row[3] == f"{plan.counts(960)[0] / plan.sizes[0]:.3f}"


@pytest.mark.parametrize(
    ("now", "consumed", "then"),
    [
        (None, 72, "{samples: 48, until: 5step}"),
        (DietConfig(24, dur("5step")), 72, "{samples: 48, until: 5step}"),
        (DietConfig(48, dur("4step")), 120, "{samples: 48, until: 5step}"),
        (DietConfig(48, dur("7step")), 144, "{samples: 48, until: 5step}"),
        (None, 48, None),  # nothing was repeated yet
        (DietConfig(48, dur("7step")), 96, None),
        (DietConfig(48, dur("0.125dur")), 960, None),
    ],
)
def test_a_resumed_run_may_not_change_the_diet_it_had(
    now: DietConfig | None, consumed: int, then: str | None
) -> None:
    state = json.loads(json.dumps(fed(DietConfig(48, dur("5step"))).state()))
    if then is None:
        fed(now).check_resume(state, consumed)
        return
    with pytest.raises(DataError, match=r"data\.diet: the checkpoint's samples") as caught:
        fed(now).check_resume(state, consumed)
    assert f"data.diet={then}" in str(caught.value)


def test_a_run_without_a_diet_may_not_get_one_over_its_past() -> None:
    state = json.loads(json.dumps(fed(None).state()))
    fed(DietConfig(48, dur("5step"))).check_resume(state, 48)
    with pytest.raises(DataError, match=r"resume with data.diet=null"):
        fed(DietConfig(48, dur("5step"))).check_resume(state, 72)


def test_a_run_reads_every_sample_of_a_source_once_per_epoch() -> None:
    plan = make_plan()
    loader = Loader(plan, 24, 0, 1)
    seen: dict[int, list[bytes]] = {0: [], 1: []}
    for step in range(40):
        batch = loader.batch(step)
        for label, row in zip(batch.source_ids.tolist(), batch.tokens, strict=True):
            seen[label].append(row.numpy().tobytes())
    for label, size in enumerate(plan.sizes):
        first_epoch = seen[label][:size]
        assert len(seen[label]) > size
        assert len(set(first_epoch)) == size
        assert set(seen[label][size : 2 * size]) <= set(first_epoch)


def test_source_weights_reach_the_tokens() -> None:
    batch = Loader(make_plan(), 24, 0, 1).batch(3)
    for label, weights in zip(batch.source_ids.tolist(), batch.weights, strict=True):
        assert set(weights.tolist()) <= {0.0, [1.0, 0.5][label]}


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_reading_ahead_changes_nothing_and_ends_its_thread(prefetch: int) -> None:
    loader = Loader(make_plan(prefetch), 24, 0, 1)
    got = [b.tokens for b in loader.iterate(5, 11)]
    assert len(got) == 6
    for step, tokens in zip(range(5, 11), got, strict=True):
        assert torch.equal(tokens, loader.batch(step).tokens)
    batches = loader.iterate(0, 40)
    next(batches)
    loader.close()
    assert not any(t.name == "loader" for t in threading.enumerate())
    assert loader.wait_seconds >= 0


def test_what_goes_wrong_is_raised_at_its_batch() -> None:
    plan = make_plan()

    class Broken(MemorySource):
        def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
            raise DataError("shard 3 is truncated")

    loader = Loader(plan, 24, 0, 1)
    batches = loader.iterate(0, 40)
    next(batches)
    plan.sources[1] = Broken("b", documents(2, 30))
    with pytest.raises(DataError, match="shard 3"):
        for _ in batches:
            pass
    assert not any(t.name == "loader" for t in threading.enumerate())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_heldout_samples_are_shared_out_evenly_and_counted_once(world: int) -> None:
    source = MemorySource("a", documents(4, 50))
    held = HeldoutSet("a", source, DataConfig(seq_len=16), samples=7, bytes_per_token=2.0)
    shapes, weights, rows = [], 0.0, []
    for rank in range(world):
        batches = list(held.batches(2, rank, world))
        shapes.append([tuple(b.tokens.shape) for b in batches])
        weights += sum(float(b.weights.sum()) for b in batches)
        rows += [t for b in batches for t, w in zip(b.tokens, b.weights, strict=True) if w.any()]
    assert all(shape == shapes[0] for shape in shapes)
    assert weights == 7 * 16
    assert torch.equal(torch.cat(rows), torch.from_numpy(source.tokens[: 7 * 16]))


def test_a_token_outside_the_vocabulary_is_named_with_its_source() -> None:
    plan = make_plan()
    tokens = documents(2, 30)
    tokens[:] = 99
    plan.sources[1] = MemorySource("b", tokens)
    loader = Loader(plan, 24, 0, 1)
    with pytest.raises(DataError, match=r"'b'.*token id 99.*ends at 98"):
        for step in range(40):
            loader.batch(step)
