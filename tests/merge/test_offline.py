"""``llmtrain merge``: mergekit's results, formulas in float64, folders of both kinds, bad input."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.mergekit_reference import CASES, CONFIG
from helpers.tiny import make_corpus, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.checkpoint import verify
from llmtrain.cli.main import main
from llmtrain.eval.loading import load_trained
from llmtrain.merge import blocks, offline
from llmtrain.merge.methods import _largest

STORED = load_file(Path(__file__).parent / "data" / "mergekit.safetensors")
METHOD = {"ties-sum": "ties", "dare-ties": "dare"}
Weights = dict[str, Tensor]


def stored(prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in STORED.items() if k.startswith(prefix)}


def write(folder: Path, tensors: Weights, config: dict[str, Any] | None = None) -> str:
    """A Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return {name: write(tmp_path / name, stored(f"in.{name}.")) for name in ("base", *"abc")}


def read(folder: Path) -> Weights:
    out: Weights = {}
    for file in folder.glob("*.safetensors"):
        out.update(load_file(file))
    return out


def words(case: str, models: dict[str, str]) -> list[str]:
    """The command line of one of mergekit's cases."""
    method, weights, densities, parameters = CASES[case]
    names = ["a"] if method == "slerp" else ["a", "b", "c"]
    line = [METHOD.get(case, case), *(models[n] for n in names)]
    if method != "linear":
        line += ["--base", models["base"]]
    line += [f"models.{i}.weight={w}" for i, w in enumerate(weights)]
    line += [f"models.{i}.density={d}" for i, d in enumerate(densities)]
    line += [f"{'scale' if k == 'lambda' else k}={json.dumps(v)}" for k, v in parameters.items()]
    if method.startswith("dare"):
        line += ["rescale=l1", "seed=3"]
    return [*line, "sign_election=true"] if method == "dare_ties" else line


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_mergekits(tmp_path: Path, models: dict[str, str], case: str) -> None:
    out = tmp_path / "out"
    assert main(["merge", *words(case, models), "--out", str(out)]) == 0
    ours, theirs = read(out), stored(f"out.{case}.")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)
        assert not torch.equal(value, STORED[f"in.base.{name}"])


@pytest.mark.parametrize("case", CASES)
def test_blocks_of_any_size_give_the_same(
    tmp_path: Path, models: dict[str, str], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not case.startswith("dare"):  # whose draws are by block
        monkeypatch.setattr(blocks, "BLOCK", 7)
    monkeypatch.setattr(offline, "Workers", partial(blocks.Workers, 3))
    out = tmp_path / "out"
    assert main(["merge", *words(case, models), "shard_bytes=1000", "--out", str(out)]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for name, value in read(out).items():
        wanted = STORED[f"out.{case}.{name}"]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
        file = out / index["weight_map"][name]
        assert torch.equal(load_file(file)[name], value)


def doubles(name: str) -> dict[str, np.ndarray]:
    return {k: v.double().numpy() for k, v in stored(f"in.{name}.").items()}


def test_wise_ft_and_soup_in_float64(tmp_path: Path, models: dict[str, str]) -> None:
    base, a, b = doubles("base"), doubles("a"), doubles("b")
    line = ["merge", "wise-ft", models["a"], "--base", models["base"], "beta=0.3"]
    assert main([*line, "--out", str(tmp_path / "w")]) == 0
    for name, value in read(tmp_path / "w").items():
        np.testing.assert_allclose(value, 0.7 * a[name] + 0.3 * base[name], rtol=1e-6, atol=1e-7)
    assert main(["merge", "soup", models["a"], models["b"], "--out", str(tmp_path / "s")]) == 0
    for name, value in read(tmp_path / "s").items():
        np.testing.assert_allclose(value, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("beta", "name"), [("0", "a"), ("1", "base")])
def test_the_ends_of_an_interpolation_are_exact(
    tmp_path: Path, models: dict[str, str], beta: str, name: str
) -> None:
    line = ["merge", "wise-ft", models["a"], "--base", models["base"], f"beta={beta}"]
    assert main([*line, "--out", str(tmp_path / "w")]) == 0
    for key, value in read(tmp_path / "w").items():
        assert torch.equal(value, STORED[f"in.{name}.{key}"])


def test_dare_divides_by_density_and_fisher_weighs_by_element(
    tmp_path: Path, models: dict[str, str]
) -> None:
    base, a, b = doubles("base"), doubles("a"), doubles("b")
    line = ["merge", "dare", models["a"], "--base", models["base"], "density=0.25"]
    assert main([*line, "--out", str(tmp_path / "d")]) == 0
    kept = total = 0
    for name, value in read(tmp_path / "d").items():
        change = value.double().numpy() - base[name]
        stays = np.abs(change) > 1e-7
        wanted = 4 * (a[name] - base[name])
        np.testing.assert_allclose(change[stays], wanted[stays], rtol=1e-4, atol=1e-6)
        kept, total = kept + int(stays.sum()), total + stays.size
    assert abs(kept / total - 0.25) < 0.03
    fishers = []
    for i, name in enumerate("ab"):
        random = torch.Generator().manual_seed(i)
        values = {
            k: torch.rand(v.shape, generator=random) ** 3 for k, v in stored(f"in.{name}.").items()
        }
        fishers.append(values)
        write(tmp_path / f"fisher-{name}", values)
    line = ["merge", "fisher", models["a"], models["b"]]
    line += [f"models.{i}.fisher={tmp_path / f'fisher-{n}'}" for i, n in enumerate("ab")]
    assert main([*line, "models.1.weight=2", "--out", str(tmp_path / "f")]) == 0
    for name, value in read(tmp_path / "f").items():
        one, two = (np.maximum(f[name].double().numpy(), 1e-6) for f in fishers)
        wanted = (one * a[name] + 2 * two * b[name]) / (one + 2 * two)
        np.testing.assert_allclose(value, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selection_finds_what_sorting_finds(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.rand(999, generator=random, dtype=dtype) ** 9
    values[::3] = values[1]  # many equals
    values[5] = 0
    each = lambda function: map(function, values.split(100))  # noqa: E731
    ordered = values.sort(descending=True).values
    for count in (1, 2, 100, 500, 700, 999):
        threshold, left, equals = _largest(each, count)
        assert threshold == float(ordered[count - 1])
        assert left == count - int((values > threshold).sum())
        assert equals == int((values == threshold).sum())


def test_ties_keeps_the_first_of_equal_changes(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 7)
    monkeypatch.setattr(offline, "Workers", partial(blocks.Workers, 2))
    names = stored("in.base.")
    zeros = {k: torch.zeros_like(v) for k, v in names.items()}
    equal = {k: torch.full_like(v, 0.5) for k, v in names.items()}
    for value in equal.values():
        value.view(-1)[9] = -3.0
    base, model = write(tmp_path / "zeros", zeros), write(tmp_path / "equal", equal)
    line = ["merge", "ties", model, "--base", base, "density=0.75", "--out"]
    assert main([*line, str(tmp_path / "out")]) == 0
    for name, value in read(tmp_path / "out").items():
        wanted = torch.zeros(value.numel())
        # The large one stays, and of the others the first.
        wanted[: int(0.75 * value.numel()) if value.numel() > 12 else 8] = 0.5
        wanted[9] = -3.0
        assert torch.equal(value.reshape(-1), wanted), name


@pytest.mark.parametrize("stored_head", [(True, True), (True, False), (False, True)])
def test_tied_and_sharded_folders(tmp_path: Path, stored_head: tuple[bool, bool]) -> None:
    """A head that is stored beside tied embeddings is left out; shards may differ."""
    config = {**CONFIG, "tie_word_embeddings": True}
    parts = []
    for i, (name, head) in enumerate(zip("ab", stored_head, strict=True)):
        tensors = {k: v.bfloat16() for k, v in stored(f"in.{name}.").items()}
        if not head:
            del tensors["lm_head.weight"]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        names = sorted(tensors)
        files = {n: f"part-{j % (2 + i)}.safetensors" for j, n in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        parts.append(tensors)
    line = ["merge", "soup", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    merged = read(tmp_path / "out")
    assert merged.keys() == parts[0].keys() - {"lm_head.weight"}
    for name, value in merged.items():
        wanted = (parts[0][name].float() + parts[1][name].float()) / 2
        assert torch.equal(value, wanted.bfloat16())


def test_bf16_models_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    pair = [{k: v.bfloat16() for k, v in stored(f"in.{n}.").items()} for n in "ab"]
    paths = [write(tmp_path / str(i), one) for i, one in enumerate(pair)]
    line = ["merge", "linear", *paths, "models.0.weight=0.3", "models.1.weight=0.7"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    for name, value in read(tmp_path / "out").items():
        assert value.dtype == torch.bfloat16
        a, b = pair[0][name].double() * 0.3, pair[1][name].double() * 0.7
        wanted = a + b
        # 8 significant bits: numbers in [1, 2) lie 2^-7 apart, so one rounding errs by 2^-8.
        half = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 1 - 8)
        in_float32 = 2.0**-22 * (a.abs() + b.abs())
        assert ((value.double() - wanted).abs() <= half + in_float32).all()


def test_a_recipe_file_and_the_recorded_recipe_repeat_the_merge(
    tmp_path: Path, models: dict[str, str]
) -> None:
    recipe = {
        "method": "ties",
        "base_model": models["base"],
        "density": 0.3,
        "models": [{"path": models["a"], "weight": 0.5}, {"path": models["b"]}],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(file), "scale=0.9", "--out", str(tmp_path / "x")]) == 0
    assert (tmp_path / "x" / "config.json").exists()
    again = str(tmp_path / "x" / "merge.yaml")
    assert main(["merge", again, "--out", str(tmp_path / "y")]) == 0
    assert yaml.safe_load((tmp_path / "y" / "merge.yaml").read_text())["scale"] == 0.9
    first, second = read(tmp_path / "x"), read(tmp_path / "y")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs from one start: the initial weights almost, then two sources."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = make_corpus(folder, documents=40)
    out = []
    mixtures = {"base": "{letters: 1, digits: 1}", "l": "{letters: 1}", "d": "{digits: 1}"}
    for name, weights in mixtures.items():
        (folder / name).mkdir()
        config = str(tiny_config(folder / name, corpus, data__phases=None))
        steps = "2step" if name == "base" else "20step"
        changes = [f"data.weights={weights}", f"train.duration={steps}", "checkpoint.keep=1"]
        assert main(["train", config, *changes]) == 0
        out.append(folder / name / "runs" / "tiny")
    return out


def test_checkpoints_merge_into_one_that_loads_and_verifies(
    tmp_path: Path, runs: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    base, *others = map(str, runs)
    line = ["merge", "task-arithmetic", *others, "--base", base, "scale=0.5"]
    assert main([*line, "shard_bytes=20000", "--out", str(out)]) == 0
    assert verify(out) == []
    place = torch.device("cpu")
    merged, start, one, two = (
        dict(load_trained(p, place).model.named_parameters()) for p in (out, *runs)
    )
    for name, value in merged.items():
        wanted = one[name].double() + two[name].double()
        wanted = start[name].double() + 0.5 * (wanted - 2 * start[name].double())
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    assert main(["eval", str(out)]) == 0
    assert main(["checkpoint", "export", str(out), str(tmp_path / "hf")]) == 0
    assert "letters" in capfd.readouterr().out


def newest(run: str) -> str:
    """The newest checkpoint of a run."""
    return str(max(Path(run).glob("checkpoints/step-*")))


def test_searches_are_judged_by_the_held_out_loss(
    tmp_path: Path, runs: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    base, letters, digits = map(str, runs)
    line = ["merge", "greedy-soup", base, letters, digits, "--domain", "letters"]
    assert main([*line, "--out", str(tmp_path / "soup")]) == 0
    printed = capfd.readouterr().out
    losses = {}
    for text in printed.splitlines():
        if ": held-out loss" in text:
            losses[text.partition(": held")[0]] = float(text.rpartition(" ")[2])
    recipe = yaml.safe_load((tmp_path / "soup" / "merge.yaml").read_text())
    # letters is the best single model on letters; the untrained base must not be put in.
    assert recipe["models"][0]["path"] == newest(letters)
    assert newest(base) not in [m["path"] for m in recipe["models"]]
    assert losses[f"with {newest(base)}"] > losses[newest(letters)]

    line = ["merge", "wise-ft", letters, "--base", base, "--domain", "letters"]
    assert main([*line, "--search", "beta=1,0,0.9", "--out", str(tmp_path / "best")]) == 0
    assert yaml.safe_load((tmp_path / "best" / "merge.yaml").read_text())["beta"] == 0.0
    assert not list(tmp_path.glob(".tmp-*"))


def test_fisher_is_estimated_from_each_models_own_data(tmp_path: Path, runs: list[Path]) -> None:
    _, letters, digits = map(str, runs)
    line = ["merge", "fisher", letters, digits, "fisher_samples=4", "fisher_floor=1e-12"]
    assert main([*line, "--out", str(tmp_path / "f")]) == 0
    assert main(["eval", str(tmp_path / "f")]) == 0
    merged = load_trained(tmp_path / "f", torch.device("cpu")).model
    plain = load_trained(runs[1], torch.device("cpu")).model
    other = load_trained(runs[2], torch.device("cpu")).model
    inside = total = 0
    for m, a, b in zip(merged.parameters(), plain.parameters(), other.parameters(), strict=True):
        low, high = torch.minimum(a, b) - 1e-6, torch.maximum(a, b) + 1e-6
        inside += int(((m >= low) & (m <= high)).sum())
        total += m.numel()
    assert inside == total


def altered(models: dict[str, str], change: str, tmp_path: Path) -> list[str]:
    """A command line that cannot work, and why."""
    tensors = stored("in.b.")
    name = next(iter(tensors))
    bad = tmp_path / "bad"
    if change == "shape":
        tensors[name] = torch.zeros(3, 5)
    elif change == "names":
        del tensors[name]
    path = write(bad, tensors, {**CONFIG, "num_attention_heads": 4} if change == "heads" else None)
    if change == "tokenizer":
        for folder, word in ((models["a"], "x"), (path, "y")):
            (Path(folder) / "tokenizer.json").write_text(
                json.dumps({"model": {"vocab": {word: 1}}})
            )
    if change == "cut":
        file = bad / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
    return ["linear", models["a"], path]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("shape", "differ in shape"),
        ("names", "hold different tensors"),
        ("heads", "differ in config.json num_attention_heads"),
        ("tokenizer", "different tokenizers"),
        ("cut", "is cut short"),
    ],
)
def test_models_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path,
    models: dict[str, str],
    change: str,
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = set(tmp_path.iterdir()) | {tmp_path / "bad"}
    assert main(["merge", *altered(models, change, tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert says in capfd.readouterr().err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["wise-ft", "{a}", "--base", "{base}", "beta=1.2"], "beta: must be at most 1"),
        (["slerp", "{a}", "--base", "{base}", "t=-0.1"], "t: must be at least 0"),
        (["ties", "{a}", "{b}"], "base_model: ties needs it"),
        (["ties", "{a}", "--base", "{base}", "densty=0.1"], "did you mean 'density'"),
        (["linear", "{a}"], "models: linear needs at least 2"),
        (["wise-ft", "{a}", "{b}", "--base", "{base}"], "merges one model with the base, not 2"),
        (["linear", "{a}", "{a}x"], "does not exist"),
        (["tiess", "{a}"], "did you mean 'ties'"),
        (["model-stock", "{a}", "--base", "{base}"], "models: model-stock needs at least 2"),
        (["linear", "{a}", "{b}", "models.0.weight=-1"], "weights sum to 0"),
        (["greedy-soup", "{a}", "{b}"], "not a checkpoint of llmtrain"),
        (["wise-ft", "{a}", "--base", "{base}", "--search", "beta"], "--search"),
    ],
)
def test_bad_words_are_one_sentence_and_nothing_is_written(
    tmp_path: Path,
    models: dict[str, str],
    line: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import re

    before = set(tmp_path.iterdir())
    filled = [word.format(**models) for word in line]
    assert main(["merge", *filled, "--out", str(tmp_path / "out")]) == 2
    assert re.search(says, capfd.readouterr().err)
    assert set(tmp_path.iterdir()) == before


def test_a_full_folder_is_left_alone(
    tmp_path: Path, models: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models["c"], tmp_path / "out")
    assert main(["merge", "soup", models["a"], models["b"], "--out", str(tmp_path / "out")]) == 2
    assert "not empty" in capfd.readouterr().err
    assert read(tmp_path / "out").keys() == stored("in.c.").keys()
