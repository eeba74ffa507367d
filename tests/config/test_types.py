"""What each type of key takes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config import load_config
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "refused"),
    [
        ("model.n_layers", ["true", "4.0", "4.5", "'4'", "four", "null", "[4]", "{a: 4}", "1e3"]),
        ("model.d_ff", ["false", "64.0", "wide"]),  # may be null
        ("optim.lr", ["true", "abc", "'1'", "null", "[1]", ".nan", ".inf", "1" + "0" * 400]),
        ("optim.clip_norm", ["no", "-1", "0", "-.inf"]),  # may be null
        ("train.compile", ["1", "0", "1.0", "yess", "null", "[true]"]),
        ("out", ["1", "1.5", "true", "null", "[a]", "{a: b}"]),
        ("data.corpus", ["1", "true", "[a]"]),  # may be null
        ("model.norm", ["none", "1", "null", "RMSNorm"]),
        ("train.duration", ["100", "1.5", "true", "null", "1h", "[1step]", "0.5dur", "0step"]),
        ("eval.prompts", ["a", "3", "{a: b}", "[1]", "[null]", "[[a]]"]),
        ("optim.betas", ["[0.9]", "[0.9, 0.9, 0.9]", "[0.9, x]", "[0.9, true]", "0.9"]),
        ("data.weights", ["3", "[a]", "{a: x}", "{a: true}", "{a: -1}", "{a: null}", "{a: .inf}"]),
        ("optim.lr_factors", ["{haed: 1}", "{head: x}", "[head]"]),
        ("data.sources", ["[a]", "x", "{a: 3}", "{a: [b]}"]),
        ("hooks", ["a", "{use: a}", "[a]"]),
        ("model", ["3", "a", "[a]", "true"]),
        ("seed", ["-1", str(2**63)]),
    ],
)
def test_refused(key: str, refused: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    parents = key.split(".")
    for value in refused:
        lines = [f"{'  ' * i}{part}:" for i, part in enumerate(parents)]
        path.write_text("\n".join(lines) + f" {value}\n")
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        message = str(caught.value)
        assert message.startswith(f"{path}:{len(parents)}: {key}"), (value, message)
        assert "\n" not in message, (value, message)


@pytest.mark.parametrize(
    ("key", "taken"),
    [
        ("model.n_layers", {"3": 3, "1_000": 1000, "0x10": 16, "+5": 5}),
        ("model.d_ff", {"null": None, "~": None, "": None, "64": 64}),
        ("optim.lr", {"1": 1.0, "1e-3": 0.001, "1E3": 1000.0, ".5": 0.5, "'1e-3'": 0.001}),
        ("train.compile", {"true": True, "no": False, "On": True, "FALSE": False}),
        ("out", {"a": "a", "'1'": "1", "no": "no", "2024-01-01": "2024-01-01", "1:30": "1:30"}),
        ("eval.prompts", {"[]": [], "null": [], "[a, 'b: c']": ["a", "b: c"]}),
        ("data.weights", {"{}": {}, "null": {}, "{1: 1, no: 2}": {"1": 1.0, "no": 2.0}}),
    ],
)
def test_taken(key: str, taken: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    section, _, name = key.rpartition(".")
    for text, value in taken.items():
        extra = "\n  corpus: c" if section == "data" else ""
        path.write_text(f"{section}:{extra}\n  {name}: {text}\n" if section else f"{key}: {text}\n")
        found = load_config(path)
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value and type(found) is type(value), text
