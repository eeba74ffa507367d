"""``llmtrain eval`` and ``llmtrain generate`` on a run that was really trained."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain import parallel
from llmtrain.cli.main import main
from llmtrain.data.batch import Batch
from llmtrain.data.loader import HeldoutSet


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    corpus = make_corpus(folder, documents=40)
    config = tiny_config(folder, corpus, train__duration="6step", checkpoint__every="3step")
    assert main(["train", str(config)]) == 0
    return folder / "runs" / "tiny"


def test_eval_repeats_the_losses_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    domains = json.loads(capsys.readouterr().out)["domains"]
    trained = records(run, "eval")[-1]["domains"]
    assert domains.keys() == trained.keys()
    for name, metrics in domains.items():
        assert metrics["loss"] == pytest.approx(trained[name]["loss"], abs=0.02)
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        assert metrics["bits_per_byte"] > 0


def test_eval_takes_overrides_and_prints_a_table(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run / "checkpoints" / "step-00000003"), "eval.samples=2"]) == 0
    out = capsys.readouterr().out
    assert "step 3" in out
    assert "bits/byte" in out
    assert "digits" in out


@pytest.mark.dist
def test_several_processes_share_the_samples_and_one_prints(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    alone = json.loads(capfd.readouterr().out)["domains"]
    seen: list[int] = []

    def body(rank: int) -> int:
        parallel.close_world = lambda: None  # the ranks part at the end of the test
        real = HeldoutSet.batches

        def counted(self: HeldoutSet, *args: int) -> Iterator[Batch]:
            for batch in real(self, *args):
                seen.append(len(batch.tokens))
                yield batch

        HeldoutSet.batches = counted  # type: ignore[method-assign]
        code = main(["eval", str(run), "--json"])
        return code + sum(seen)

    counts = run_ranks(2, body)
    shared = json.loads(capfd.readouterr().out)["domains"]
    assert sum(counts) > max(counts) > 0
    for name, metrics in alone.items():
        assert shared[name]["tokens"] == metrics["tokens"]
        assert shared[name]["loss"] == pytest.approx(metrics["loss"], abs=1e-6)


def test_generate_continues_and_is_reproducible(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--prompt", "alpha ", "--seed", seed]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0].startswith("alpha ")
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]


def test_generate_takes_several_prompts_and_ends_at_the_context(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "alpha ", "--prompt", "beta gamma", "--temperature", "0"]
    assert main(["generate", str(run), *words, "--tokens", "3", "--batch", "1"]) == 0
    alone = capsys.readouterr()
    assert main(["generate", str(run), *words, "--tokens", "3"]) == 0
    assert capsys.readouterr() == alone
    assert alone.out.startswith("alpha ") and "\nbeta gamma" in alone.out
    assert "max_seq_len" not in alone.err
    assert main(["generate", str(run), *words, "--tokens", "999"]) == 0
    assert "model.max_seq_len" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", "alpha " * 99]) == 2
    assert "shorten it" in capsys.readouterr().err
    assert main(["generate", str(run), *words, "--top-p", "0"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "{run}/nowhere"], "nowhere"),
        (["generate", "{run}", "--prompt", ""], "--prompt is empty"),
        (["generate", "{run}", "--prompt", "a", "--tokens", "0"], "--tokens"),
        (["eval", "{run}", "eval.sampels=2"], "samples"),
        (["generate", "{run}", "--prompt", "a", "--temperature", "nan"], "--temperature must be"),
        (["generate", "{run}", "--prompt", "a", "--merge"], "has no adapters; leave it out"),
        (["compare", "{run}", "{run}", "--out", __file__], "test_eval_commands.py is a file"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.format(run=run) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def flip(folder: Path, name: str) -> None:
    """Change one bit in the middle of the first file of such a name."""
    file = next(folder.glob(name))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


COMMANDS = {
    "eval": ["eval", "{path}", "eval.samples=2"],
    "generate": ["generate", "{path}", "--prompt", "alpha", "--tokens", "2"],
    "export": ["checkpoint", "export", "{path}", "{out}"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("victim", ["model-*", "config.yaml", "tensors.json", "checksums.json"])
def test_a_flipped_bit_is_noticed(
    run: Path, tmp_path: Path, name: str, victim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run's newest checkpoint: a warning, and the one before; in a named one: an error."""
    damaged = tmp_path / "run"
    shutil.copytree(run / "checkpoints", damaged / "checkpoints")
    newest = damaged / "checkpoints" / "step-00000006"
    flip(newest, victim)
    file = next(newest.glob(victim)).name

    words = [w.format(path=damaged, out=tmp_path / "out") for w in COMMANDS[name]]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("llmtrain: warning: ")
    assert f"step-00000006/{file}" in err and "step-00000003" in err
    if name == "export":
        assert json.loads((tmp_path / "out" / "meta.json").read_text())["step"] == 3

    words = [w.format(path=newest, out=tmp_path / "out2") for w in COMMANDS[name]]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llmtrain: error: ")
    assert file in err and "step-00000003" in err and "checkpoint.resume" not in err
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("damage", [lambda file: flip(file.parent, file.name), Path.unlink])
def test_a_model_is_read_although_its_optimizer_is_damaged_or_gone(
    run: Path, tmp_path: Path, damage, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "step-00000006"))
    damage(next(path.glob("optim-*")))
    for words in COMMANDS.values():
        assert main([w.format(path=path, out=tmp_path / "out") for w in words]) == 0
    assert capsys.readouterr().err == ""
    assert main(["checkpoint", "verify", str(path)]) == 2
    assert "optim-00000" in capsys.readouterr().out
