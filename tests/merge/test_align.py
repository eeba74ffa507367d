"""Permutation alignment: the same function, planted orders found, lower barriers; paths."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import make_corpus, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.checkpoint.layout import checksums_text, read_checksums
from llmtrain.checkpoint.safefile import FileSum, hash_file
from llmtrain.cli.main import main
from llmtrain.config.schema import ModelConfig
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.eval.loading import load_trained
from llmtrain.merge.align import align
from llmtrain.merge.assignment import assign
from llmtrain.merge.path import barrier
from llmtrain.model import Decoder, complete

Weights = dict[str, Tensor]


@pytest.mark.parametrize("seed", range(20))
def test_assignment_is_the_best_of_all_permutations(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = 1 + seed % 7
    values = random.normal(size=(n, n)) if seed % 2 else random.integers(0, 3, (n, n)) * 1.0
    found = assign(values)
    assert sorted(found) == list(range(n))
    best = max(sum(values[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    assert values[np.arange(n), found].sum() == pytest.approx(best, abs=1e-12)


def test_assignment_of_many_rows_that_want_the_same() -> None:
    """Duals prove it: no pair is worth more than its prices."""
    random = np.random.default_rng(0)
    values = random.normal(size=(60, 1)) + random.normal(size=(1, 60)) * 9
    values += 0.1 * random.normal(size=(60, 60))
    total = values[np.arange(60), assign(values)].sum()
    for _ in range(200):  # no swap of two rows does better
        order = assign(values)
        i, j = random.integers(0, 60, 2)
        order[i], order[j] = order[j], order[i]
        assert values[np.arange(60), order].sum() <= total + 1e-9


SHAPE: dict[str, Any] = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "n_heads": 6, "d_ff": 20}
CASES: dict[str, dict[str, Any]] = {
    "grouped, gated, rope": {"n_kv_heads": 2},
    "biases, head norms": {
        "n_kv_heads": 3, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
        "qk_norm": "head",
    },
    "one group, norm over the width": {"n_kv_heads": 1, "qk_norm": "full"},
    "all heads, norm over the width, layer norms": {
        "qk_norm": "full", "norm": "layernorm", "norm_bias": True, "attention_bias": True,
    },
    "GPT-2": {
        "position": "learned", "activation": "gelu", "norm": "layernorm", "norm_bias": True,
        "attention_bias": True, "mlp_bias": True, "tie_embeddings": True,
    },
}  # fmt: skip


def config(case: str) -> ModelConfig:
    return complete(ModelConfig(**{**SHAPE, **CASES[case]}), None, 11)


def random_model(cfg: ModelConfig, seed: int) -> Decoder:
    """A decoder with all parameters random, norms and biases too."""
    model = Decoder(cfg, torch.float32)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.3 * torch.randn(param.shape, generator=random))
    return model.eval()


def weights(model: Decoder) -> Weights:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def logits(cfg: ModelConfig, tensors: Weights) -> Tensor:
    model = Decoder(cfg, torch.float32).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(tensors[name])
        return model(torch.arange(33).view(3, 11) % 61)


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_and_the_distance_falls(case: str) -> None:
    cfg = config(case)
    one, two = weights(random_model(cfg, 1)), weights(random_model(cfg, 2))
    moved = align(one, two, cfg)
    assert moved.keys() == two.keys()
    torch.testing.assert_close(logits(cfg, moved), logits(cfg, two), rtol=1e-4, atol=1e-5)

    def distance(other: Weights) -> float:
        return sum(float((one[k] - v).square().sum()) for k, v in other.items())

    assert distance(moved) < distance(two) - 1
    changed = {k.split(".", 2)[2] for k in moved if not torch.equal(moved[k], two[k])}
    expected = {"mlp.up.weight", "mlp.down.weight", "attention.qkv.weight", "attention.out.weight"}
    assert expected <= changed


def shuffled(cfg: ModelConfig, tensors: Weights, seed: int) -> Weights:
    """The same function in another order, written without the code under test."""
    random = torch.Generator().manual_seed(seed)
    groups, d = cfg.n_kv_heads or 0, cfg.d_head or 0
    per = cfg.n_heads // groups
    gated = 2 if cfg.activation == "swiglu" else 1
    out = dict(tensors)
    for i in range(cfg.n_layers):
        order = torch.randperm(cfg.d_ff or 0, generator=random)
        outer = torch.randperm(groups, generator=random)
        inner = torch.stack([torch.randperm(per, generator=random) for _ in range(groups)])
        stem = f"blocks.{i}"
        for kind in ("weight", "bias"):
            up, qkv = f"{stem}.mlp.up.{kind}", f"{stem}.attention.qkv.{kind}"
            if up in out:
                rows = out[up].unflatten(0, (-1, gated))
                out[up] = rows[order].flatten(0, 1)
            if qkv in out:
                rows = out[qkv].unflatten(0, (groups, per + 2, d))[outer]
                heads = torch.stack([rows[g][inner[g]] for g in range(groups)])
                out[qkv] = torch.cat((heads, rows[:, per:]), 1).flatten(0, 2)
            if cfg.qk_norm == "full" and f"{stem}.attention.q_norm.{kind}" in out:
                query = out[f"{stem}.attention.q_norm.{kind}"].view(groups, per, d)[outer]
                heads = torch.stack([query[g][inner[g]] for g in range(groups)])
                out[f"{stem}.attention.q_norm.{kind}"] = heads.flatten()
                key = out[f"{stem}.attention.k_norm.{kind}"].view(groups, d)[outer]
                out[f"{stem}.attention.k_norm.{kind}"] = key.flatten()
        out[f"{stem}.mlp.down.weight"] = out[f"{stem}.mlp.down.weight"][:, order]
        columns = out[f"{stem}.attention.out.weight"].unflatten(1, (groups, per, d))[:, outer]
        heads = torch.stack([columns[:, g][:, inner[g]] for g in range(groups)], 1)
        out[f"{stem}.attention.out.weight"] = heads.flatten(1, 3)
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_planted_order_is_found_exactly(case: str) -> None:
    cfg = config(case)
    one = weights(random_model(cfg, 3))
    other = shuffled(cfg, one, 4)
    torch.testing.assert_close(logits(cfg, other), logits(cfg, one), rtol=1e-4, atol=1e-5)
    assert not all(torch.equal(v, other[k]) for k, v in one.items())
    moved = align(one, other, cfg)
    assert all(torch.equal(v, moved[k]) for k, v in one.items())


def test_hugging_face_folders_are_aligned_before_they_are_merged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random = torch.Generator().manual_seed(0)
    settings = {
        "model_type": "qwen2", "hidden_size": 12, "intermediate_size": 7, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3,
    }  # fmt: skip
    stem = "model.layers.0"
    shapes = {f"{stem}.self_attn.{p}_proj.weight": (6, 12) for p in "kv"}
    shapes |= {f"{stem}.self_attn.{p}_proj.bias": (6,) for p in "kv"}
    shapes |= {f"{stem}.self_attn.{p}_proj.weight": (12, 12) for p in "qo"}
    shapes |= {f"{stem}.self_attn.q_proj.bias": (12,), f"{stem}.mlp.down_proj.weight": (12, 7)}
    shapes |= {f"{stem}.mlp.{p}_proj.weight": (7, 12) for p in ("gate", "up")}
    one = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    two = dict(one)
    groups, heads = torch.tensor([1, 0]), torch.tensor([3, 2, 0, 1])
    order = torch.randperm(7, generator=random)
    for name in shapes:
        part = name.split(".")[-2]
        if part in ("k_proj", "v_proj"):
            two[name] = one[name].unflatten(0, (2, 3))[groups].flatten(0, 1)
        elif part == "q_proj":
            two[name] = one[name].unflatten(0, (4, 3))[heads].flatten(0, 1)
        elif part == "o_proj":
            two[name] = one[name].unflatten(1, (4, 3))[:, heads].flatten(1, 2)
        elif part == "down_proj":
            two[name] = one[name][:, order]
        else:
            two[name] = one[name][order]
    paths = []
    for name, tensors in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, tmp_path / name / "a.safetensors"
        )
        paths.append(str(tmp_path / name))
    assert main(["merge", "soup", *paths, "--align", "--out", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[k], v) for k, v in one.items())
    assert "align: true" in (tmp_path / "out" / "merge.yaml").read_text()
    assert main(["merge", "soup", *paths, "--out", str(tmp_path / "plain")]) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert not any(torch.equal(plain[k], v) for k, v in one.items())
    for name in ("one", "two"):
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    assert main(["merge", "soup", *paths, "--align", "--out", str(tmp_path / "no")]) == 2
    assert "model_type 'bloom'" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_barrier_is_the_largest_height_over_the_chord() -> None:
    assert barrier([0.0, 0.25, 1.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert barrier([0.0, 0.5, 1.0], [2.0, 3.0, 6.0]) == 0.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two runs from equal initial weights on other text, and a twin of the second, whose units are
    shuffled after that."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = make_corpus(folder, documents=40)
    out = []
    for name, mixture in (("one", "{letters: 1}"), ("two", "{letters: 1, digits: 1}")):
        (folder / name).mkdir()
        made = str(tiny_config(folder / name, corpus, data__phases=None))
        changes = [f"data.weights={mixture}", "train.duration=60step", "optim.lr=0.005"]
        assert main(["train", made, *changes, "checkpoint.keep=1"]) == 0
        out.append(str(folder / name / "runs" / "tiny"))
    end = Path(out[1]) / "checkpoints" / "step-00000060"
    shutil.copytree(end, folder / "twin")
    out.append(str(folder / "twin"))
    (file,) = end.glob("model-*.safetensors")
    cfg = load_trained(end, torch.device("cpu")).model_cfg
    stored = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    moved = shuffled(cfg, stored, 5)
    save_file({f"model.{k}": v.contiguous() for k, v in moved.items()}, file)
    sums = read_checksums(end)
    sums[file.name] = FileSum(file.name, file.stat().st_size, hash_file(file))
    (end / "checksums.json").write_bytes(checksums_text(sums.values()))
    return out


def test_the_path_between_two_runs_and_its_barrier(
    tmp_path: Path, runs: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    found = []
    one, two, twin = runs
    for name, words in (
        ("plain", [one, two]),
        ("aligned", [one, two, "--align"]),
        ("never shuffled", [one, twin]),
    ):
        out = tmp_path / name
        line = ["merge", "path", *words, "--points", "5", "--out", str(out)]
        assert main(line) == 0
        found.append(json.loads((out / "path.json").read_text()))
        page = (out / "path.html").read_text()
        assert "<svg" in page and f"{found[-1]['losses']['mean'][2]:.4f}" in page
    printed = capfd.readouterr().out
    for facts in found:
        assert facts["places"] == [0.0, 0.25, 0.5, 0.75, 1.0]
        for end, run in ((0, runs[0]), (-1, runs[1])):
            alone = evaluate_checkpoint(Path(run), (), "cpu").domains
            for domain, values in alone.items():
                assert facts["losses"][domain][end] == pytest.approx(values["loss"], rel=1e-5)
        values = facts["losses"]["letters"]
        heights = [
            v - values[0] - t * (values[-1] - values[0])
            for t, v in zip(facts["places"], values, strict=True)
        ]
        assert facts["barriers"]["letters"] == pytest.approx(max(heights), abs=1e-9)
        assert f"barrier of letters: {max(heights):.4f}" in printed
    plain, aligned, never = (facts["barriers"]["letters"] for facts in found)
    assert plain > 0.1
    assert aligned < 0.85 * plain
    assert aligned < never + 0.01


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{a}"], "path takes two checkpoints"),
        (["{a}", "{b}", "--points", "2"], "--points: 2 is too few"),
        (["{a}", "{b}x"], "does not exist"),
        (["{a}", "{a}/checkpoints/../config.yaml"], "not a whole safetensors"),
    ],
)
def test_bad_words_of_path(
    tmp_path: Path,
    runs: list[str],
    words: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = [word.format(a=runs[0], b=runs[1]) for word in words]
    assert main(["merge", "path", *line, "--out", str(tmp_path / "out")]) == 2
    assert says in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
