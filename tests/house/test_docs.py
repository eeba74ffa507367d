"""The documentation does what it says.

``bash`` blocks are run against a tiny stand-in for the quickstart, ``console`` lines must parse
and their overrides fit the schema, ``yaml`` blocks must load, ``python`` blocks must compile, and
``text`` blocks that begin with a command show what it prints.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llmtrain.cli.main import COMMANDS, Parser, main
from llmtrain.config import load_config
from llmtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FIRST = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
PAGES = [*FIRST, *sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - set(FIRST))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
KNOWN = {"bash", "console", "yaml", "python", "text"}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(page:line, text) of every block of a language."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                yield f"{page.relative_to(ROOT)}:{line}", match[2]


def commands(language: str) -> Iterator[tuple[str, list[str]]]:
    """(page:line, words) of every command line of a language's blocks."""
    for where, text in blocks(language):
        for line in text.splitlines():
            if language == "console" and not line.startswith("$ "):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield where, words


def transcripts() -> list[object]:
    """Text blocks that show a command and what it prints."""
    found = [(w, t) for w, t in blocks("text") if t.startswith("$ llmtrain ")]
    return [pytest.param(text, id=where) for where, text in found]


def cases(language: str) -> list[object]:
    return [
        pytest.param(words, id=f"{where} {' '.join(words)}") for where, words in commands(language)
    ]


def test_every_fence_has_a_known_language() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        opened = re.findall(r"^```(.*)$", text, flags=re.MULTILINE)[::2]
        assert set(opened) <= KNOWN, page


def tiny_quickstart(folder: Path) -> None:
    """A stand-in for configs/quickstart.yaml with the same names and the work of a second."""
    draw = random.Random(0)
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text("utf-8"))
    del config["base"]
    sources = {}
    for name in ("code", "docs", "math"):
        file = folder / f"{name}.jsonl"
        texts = [" ".join(draw.choices(["a", "bb", "ccc", "4", "55"], k=60)) for _ in range(80)]
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        sources[name] = {"kind": "jsonl", "paths": [file.name]}
    config["prepare"] = {
        "out": "data/builtin",
        "sources": sources,
        "tokenizer": {"kind": "byte"},
        "heldout_fraction": 0.2,
        "workers": 1,
    }
    config["device"] = "cpu"
    config["model"].update({"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48})
    config["data"]["seq_len"] = 32
    config["train"].update({"duration": "8step", "global_batch_size": 4})
    config["eval"].update({"samples": 4, "generate_tokens": 4})
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def test_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_quickstart(tmp_path)
    monkeypatch.chdir(tmp_path)
    done: set[tuple[str, ...]] = set()
    for where, words in commands("bash"):
        if words[0] == "make":
            assert words[1] in TARGETS, where
        elif tuple(words) not in done:
            assert words[0] == "llmtrain", f"{where}: only llmtrain and make are run"
            code = main(words[1:])
            captured = capfd.readouterr()
            assert code == 0, f"{where}: {shlex.join(words)}\n{captured.out}\n{captured.err}"
            assert captured.out, where
            done.add(tuple(words))
    assert len(done) >= 10
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()
    assert (tmp_path / "compare.html").exists()


@pytest.mark.parametrize("text", transcripts())
def test_transcripts_are_what_is_printed(
    text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command, _, expected = text.partition("\n")
    assert main(shlex.split(command)[2:]) == 2
    captured = capfd.readouterr()
    assert captured.out + captured.err == expected


@pytest.mark.parametrize("words", cases("console"))
def test_console_lines_parse(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "make":
        assert words[1] in TARGETS
    elif words[0] == "torchrun":
        check_llmtrain(words[words.index("llmtrain") + 1 :])
    elif words[0] == "launch/local.sh":
        check_llmtrain(["train", *words[1:]])
    elif words[0].startswith("launch/docker/"):
        assert (ROOT / words[0]).is_file()
        if not words[0].endswith("build.sh"):
            check_llmtrain(["train", *words[2:]])
    elif words[0] == "llmtrain":
        check_llmtrain(words[1:])
    else:
        assert words[0] in {"pip"}


def check_llmtrain(words: list[str]) -> None:
    """The arguments parse, and overrides of a config that ships fit the schema."""
    assert words[0] in COMMANDS
    module = importlib.import_module(f"llmtrain.cli.{words[0]}")
    parser = Parser(prog="llmtrain")
    module.add_arguments(parser)
    args, extra = parser.parse_known_args(words[1:])
    assert not any(word.startswith("-") for word in extra)
    assert not extra or hasattr(args, "overrides")
    if words[0] == "branch":
        return  # what its overrides may say depends on the trunk
    overrides = [*getattr(args, "overrides", []), *extra]
    config = ROOT / str(getattr(args, "config", "configs/quickstart.yaml"))
    if config.exists() and words[0] != "merge":
        load_config(config, overrides)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "configs/quickstart.yaml", "--dryrun"],
        ["train", "configs/quickstart.yaml", "model.d_modle=3"],
        ["report"],
        ["trian", "x"],
    ],
)
def test_a_wrong_console_line_is_noticed(words: list[str]) -> None:
    with pytest.raises((SystemExit, AssertionError, ConfigError)):
        check_llmtrain(words)


@pytest.mark.parametrize("text", [pytest.param(text, id=where) for where, text in blocks("yaml")])
def test_yaml_blocks_load(text: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    file = tmp_path / "configs" / "block.yaml"
    file.write_text(text, encoding="utf-8")
    load_config(file)


@pytest.mark.parametrize("text", [pytest.param(text, id=where) for where, text in blocks("python")])
def test_python_blocks_compile(text: str) -> None:
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(text, "example", "exec"), names)
    assert any(isinstance(value, type) for value in names.values())
