"""Checkpoints that leave out frozen weights and refer to the checkpoint that holds them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hf_folders import run_convert
from helpers.ranks import run_ranks
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.checkpoint import export_model, verify
from llmtrain.checkpoint.layout import (
    checksums_text,
    read_checksums,
    read_layout,
    read_own_layout,
)
from llmtrain.checkpoint.safefile import write_small
from llmtrain.checkpoint.tensors import read_tensor
from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.eval.loading import load_trained
from llmtrain.parallel import init_world
from llmtrain.train.run import train

ADAPTED = [
    "model.adapters.rank=3",
    "optim.lr=0.02",
    "train.duration=4step",
    "checkpoint.every=2step",
]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {key: read_tensor(path, key, layout) for key, layout in read_layout(path).items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two runs that adapt it: one saves all, one its adapters alone."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_config(folder, make_corpus(folder, documents=40), train__duration="2step")
    assert main(["train", str(config)]) == 0
    words = [*ADAPTED, f"init.path={folder}/runs/tiny"]
    assert main(["train", str(config), *words, "name=all", "checkpoint.save=all"]) == 0
    assert main(["train", str(config), *words, "name=few"]) == 0
    return folder / "runs"


def test_only_adapters_are_stored_and_all_is_read(runs: Path) -> None:
    few, everything = (runs / n / "checkpoints/step-00000004" for n in ("few", "all"))
    own = read_own_layout(few)
    assert own and all(".adapter." in key for key in own)
    assert any(key.startswith("optim.") for key in own)
    base = json.loads((few / "base.json").read_text())
    assert base["path"] == str((runs / "tiny/checkpoints/step-00000002").resolve())
    ours, theirs = tensors(few), tensors(everything)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    sizes = [
        sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (few, everything)
    ]
    assert sizes[0] < 0.5 * sizes[1]
    assert verify(few) == []


def test_resume_is_exact(runs: Path) -> None:
    config = next(runs.parent.glob("*.yaml"))
    again = [*ADAPTED, f"init.path={runs}/tiny", "name=again"]
    assert main(["train", str(config), *again, "train.stop_after=2step"]) == 0
    assert main(["train", str(config), *again]) == 0
    few, ours = (records(runs / name) for name in ("few", "again"))
    assert [r["loss"] for r in few] == [r["loss"] for r in ours]
    last = [runs / n / "checkpoints/step-00000004" for n in ("few", "again")]
    assert all(".adapter." in key for key in read_own_layout(last[1]))
    first, second = map(tensors, last)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_that_holds_its_base_goes_on_holding_it(runs: Path) -> None:
    """Its own earlier checkpoint, which it will prune, is no base."""
    config = next(runs.parent.glob("*.yaml"))
    words = [*ADAPTED, "name=whole", f"checkpoint.resume={runs}/all/checkpoints/step-00000002"]
    assert main(["train", str(config), *words]) == 0
    last = runs / "whole/checkpoints/step-00000004"
    assert not (last / "base.json").exists() and "model.embedding.weight" in read_own_layout(last)


def on_rank(rank: int, config: str, words: list[str]) -> int:
    return train(load_config(config, words), init_world("cpu"))


SPLIT = {"TP2": ["parallel.tensor=2", "train.micro_batch_size=4"]}
SPLIT |= {"ZeRO-3": ["parallel.engine=deepspeed", "parallel.zero_stage=3"]}


@pytest.mark.dist
@pytest.mark.parametrize("layout", SPLIT)
def test_other_layouts_go_on(layout: str, runs: Path, tmp_path: Path) -> None:
    """Begun and saved on two ranks, of either engine, resumed on one process from the copy."""
    config = str(next(runs.parent.glob("*.yaml")))
    words = [*ADAPTED, f"init.path={runs}/tiny", f"name={layout}", f"checkpoint.remote={tmp_path}"]
    split = [*words, "train.stop_after=2step", *SPLIT[layout]]
    assert run_ranks(2, lambda rank: on_rank(rank, config, split)) == [0, 0]
    before = records(runs / layout)
    shutil.rmtree(runs / layout)
    assert main(["train", config, *words]) == 0
    rows = [*before, *records(runs / layout)]
    for one, other in zip(records(runs / "few"), rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)


def test_readers_need_not_know(runs: Path, tmp_path: Path) -> None:
    few, everything = runs / "few", runs / "all"
    models = [load_trained(path, torch.device("cpu")).model for path in (few, everything)]
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
    for action in ("to-hf", "to-peft"):
        for path in (few, everything):
            assert run_convert(action, path, tmp_path / action / path.name) == 0
        file = "model" if action == "to-hf" else "adapter_model"
        one, other = (tmp_path / action / n / f"{file}.safetensors" for n in ("few", "all"))
        assert one.read_bytes() == other.read_bytes()
    exported = [export_model(path, tmp_path / path.name)[0] for path in (few, everything)]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    merged = ["merge", "soup", str(few), str(everything), "--out", str(tmp_path / "mean")]
    assert main(merged) == 0


def test_a_base_that_moved_or_changed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "runs"
    shutil.copytree(runs, moved)
    few, base = moved / "few/checkpoints/step-00000004", moved / "tiny/checkpoints/step-00000002"
    assert verify(few) == []  # the old place is still there
    link = json.loads((few / "base.json").read_text())

    def refer(**changes: Any) -> None:
        # As if it had been saved so: the checksums are right.
        (few / "base.json").unlink()
        written = write_small(few / "base.json", json.dumps(link | changes).encode())
        sums = read_checksums(few) | {"base.json": written}
        (few / "checksums.json").write_bytes(checksums_text(sums.values()))

    refer(path="/nowhere/base")
    assert verify(few) == []  # by the way from its own folder
    base.rename(base.with_name("elsewhere"))
    assert main(["eval", str(few)]) == 2
    said = capsys.readouterr().err
    assert f"{few} holds adapters alone and their base, /nowhere/base, is not there" in said
    base.with_name("elsewhere").rename(base)
    file = next(base.glob("model-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert any("damaged: its checksum" in text for text in verify(few))
    other = runs / "all/checkpoints/step-00000004"
    shutil.rmtree(base)
    shutil.copytree(other, base)
    [text] = verify(few)
    assert f"their base, {base}, now holds other weights than when they were trained" in text
    refer(path=str(base), relative=os.path.relpath(link["path"], few.parent))
    assert verify(few) == []  # at its old place stands another run now; its own is beside it


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("alpha=50", "with alpha 6 (factor 2) there and an adapter of rank 3 with alpha 50"),
        ("kind=rslora", "(factor 2) there and an adapter of rank 3 with alpha 6 (factor 3.464)"),
        ("targets=[v]", "blocks.0.attention.qkv (q) has an adapter of rank 3"),
    ],
)
def test_adapters_that_would_mean_another_thing(
    change: str, says: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same shapes; a run that begins with them and one that goes on with them."""
    config = next(runs.parent.glob("*.yaml"))
    words = [*ADAPTED, f"model.adapters.{change}"]
    few = runs / "few/checkpoints/step-00000002"
    assert main(["train", str(config), *words, "name=bent", f"init.path={few}"]) == 2
    assert says in capsys.readouterr().err
    going_on = ["name=bent", f"checkpoint.resume={few}"]
    assert main(["train", str(config), *words, *going_on]) == 2
    said = capsys.readouterr().err
    assert says in said and f"{few}: " in said and "set model.adapters (kind" in said
    assert not (runs / "bent/checkpoints/step-00000004").exists()


def test_masked_weights_are_stored(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base does not hold them, so what is read later is what was trained."""
    config = next(runs.parent.glob("*.yaml"))
    words = [*ADAPTED, f"init.path={runs}/tiny", "name=sparse", "sparsity.density=0.5"]
    assert main(["train", str(config), *words]) == 0
    held = tensors(runs / "sparse/checkpoints/step-00000004")
    assert 0.4 < (held["model.blocks.0.mlp.down.weight"] == 0).float().mean() < 0.6
    capsys.readouterr()
    assert run_convert("to-peft", runs / "sparse", tmp_path / "adapter") == 2
    assert "adapts masked weights (sparsity)" in capsys.readouterr().err
    assert main(["train", str(config), *words, "name=bad", "checkpoint.save=trainable"]) == 2
    assert "does not go together with the section sparsity" in capsys.readouterr().err


def test_merging_adapters(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mean = [f"{runs}/few", "--out", str(tmp_path / "mean")]
    assert main(["merge", "soup", f"{runs}/tiny", *mean]) == 2
    assert "merge adapters into the weights first" in capsys.readouterr().err
    assert main(["merge", "soup", f"{runs}/all", *mean]) == 0
    assert "merged each by itself" in capsys.readouterr().err


def test_folders_of_other_formats(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for way, name in (("to-hf", "tiny"), ("to-peft", "few")):
        assert run_convert(way, runs / name, tmp_path / way) == 0
        assert main(["generate", str(tmp_path / way), "--prompt", "a"]) == 2
        assert f"`llmtrain convert {way.replace('to', 'from')}`" in capsys.readouterr().err
    assert run_convert("from-hf", tmp_path / "to-hf", tmp_path / "base") == 0
    assert main(["eval", str(tmp_path / "base")]) == 2
    assert "was saved without held-out text" in capsys.readouterr().err


ZERO = ["parallel.engine=deepspeed"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "checkpoint.save: trainable needs model.adapters"),
        (["model.adapters.rank=2"], "checkpoint.save: trainable needs init.path"),
        (["model.adapters.rank=2", *ZERO], "keeps frozen weights in the compute dtype, needs the"),
    ],
)
def test_nothing_to_refer_to(
    runs: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = next(runs.parent.glob("*.yaml"))
    assert main(["train", str(config), *words, "checkpoint.save=trainable", "name=bad"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (runs / "bad").exists()


def test_the_base_goes_to_the_object_store_and_comes_back(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run and base are lost: the same command goes on, with the digits of the undisturbed run."""
    config, base, out = str(next(runs.parent.glob("*.yaml"))), tmp_path / "tiny", tmp_path / "runs"
    shutil.copytree(runs / "tiny", base)
    words = [*ADAPTED, f"init.path={base}", "name=sent", f"out={out}"]
    words = ["train", config, *words, f"checkpoint.remote={tmp_path}/remote"]
    assert main([*words, "train.stop_after=2step"]) == 0
    wanted = json.loads((out / "sent/checkpoints/step-00000002/base.json").read_text())
    (copied,) = (tmp_path / "remote/sent").glob("base-*")
    assert copied.name == f"base-{wanted['content']}"
    # What adapters do not need of their base stays where it is.
    assert not list(copied.glob("optim-*")) and list(copied.glob("model-*"))
    first = {p.name: p.stat().st_mtime_ns for p in copied.iterdir()}
    shutil.rmtree(base)
    shutil.rmtree(out)
    assert main(words) == 0
    few, ours = records(runs / "few"), records(out / "sent")
    assert [r["loss"] for r in few[2:]] == [r["loss"] for r in ours]
    last = out / "sent/checkpoints/step-00000004"
    assert verify(last) == [] and (last.parent / copied.name).is_dir()
    assert {p.name: p.stat().st_mtime_ns for p in copied.iterdir()} == first  # once is enough
    # Without a copy of the base nothing begins anew in silence.
    shutil.rmtree(out)
    (copied / "COMPLETE").unlink()
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert wanted["content"] in said and "neither there nor at" in said and str(out) in said
    damaged = next(copied.glob("model-*"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    names = sorted(path.name for path in copied.iterdir())
    (copied / "COMPLETE").write_text(json.dumps({"files": names, "permanent": True}))
    left = last.parent / f".tmp-{copied.name}-0123abcd"  # of a process that was killed
    left.mkdir(parents=True)
    assert main(words) == 2 and "is damaged" in capsys.readouterr().err
    assert not list(last.parent.glob(".tmp-*"))
