"""What is written reads back equal, whatever the texts hold."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config import RunConfig, from_dict, load_config, to_dict, to_yaml
from llmtrain.config.merge import escape


def nasty(rng: random.Random) -> Any:
    """A value of the sort that YAML writers and readers stumble over."""
    pieces = [
        "${",
        "}",
        "\\",
        "a",
        " ",
        "'",
        '"',
        "\n",
        ":",
        "#",
        "-",
        "ü",
        "🙂",
        "\t",
        "%",
        "\x85",
    ]
    words = ["no", "null", "~", "1e-3", "1e3", "0x1f", "0o17", "017", "1:30", "???", "<<", ".inf"]
    words += [
        "2024-01-01",
        "1_000",
        "",
        "true",
        "-",
        "?",
        "=",
        "- a",
        "a: b",
        "*a",
        "&a",
        "!x",
        "y",
    ]
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(words)
    if kind == 1:
        return rng.choice([None, True, False, 0, -7, 10**30, 1e-7, 1e300, -2.5, 1e16])
    if kind == 2:
        return [nasty(rng) for _ in range(rng.randrange(3))]
    if kind == 3:
        return {rng.choice(words) + str(i): nasty(rng) for i in range(rng.randrange(3))}
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))


def escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: escaped(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escaped(child) for child in value]
    return escape(value) if isinstance(value, str) else value


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    rng = random.Random(11)
    path = tmp_path / "a.yaml"
    for _ in range(50):
        data = to_dict(RunConfig())
        data["hooks"] = [{"use": "a.b:C", "args": {"x": nasty(rng), "y": nasty(rng)}}]
        data["eval"]["prompts"] = [v for v in (nasty(rng) for _ in range(8)) if isinstance(v, str)]
        data["log"]["wandb"] = rng.choice(["p", None, "${x}", "no", "???"])
        data["optim"]["lr"] = 10 ** rng.uniform(-9, 3)
        data["train"]["duration"] = f"{rng.randint(1, 10**12)}tok"
        data["schedule"]["warmup"] = f"{rng.randint(0, 97)}/97dur"
        data["data"]["weights"] = {f"s{i}": 10 ** rng.uniform(-6, 1) for i in range(3)}
        data["data"]["corpus"] = "${c}\\${d}"
        cfg = from_dict(data)
        path.write_text(to_yaml(cfg), encoding="utf-8")
        assert load_config(path) == cfg
        assert from_dict(to_dict(cfg)) == cfg
        # Any other YAML reader must see the same, up to the escapes of interpolation.
        assert yaml.safe_load(to_yaml(cfg)) == escaped(to_dict(cfg))


def test_written_defaults_are_readable(tmp_path: Path) -> None:
    text = to_yaml(RunConfig())
    assert "duration: 100step\n" in text and "warmup: 0.02dur\n" in text
    assert "betas:\n  - 0.9\n  - 0.95\n" in text and "corpus: null\n" in text
