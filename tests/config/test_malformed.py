"""Two hundred malformed configurations: each one message that names file and key, exit code 2.

A good file is damaged line by line, so the test knows which line and key must be named without
asking the code under test.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.cli.main import main

ROOT = Path(__file__).parents[2]
GOOD = """\
name: good
seed: 3
device: cpu
model:
  d_model: 64
  n_layers: 2
  n_heads: 4
  n_kv_heads: 2
  norm: rmsnorm
  norm_eps: 1e-5
  position: rope
  tie_embeddings: true
data:
  corpus: some/corpus
  seq_len: 64
  document_mask: false
  sources:
    code:
      loss_weight: 0.5
      max_epochs: 4
    extra:
      path: some/where
      format: mds
      cache_bytes: 1_000_000_000
  phases:
    - until: 0.8dur
      weights:
        code: 0.9
        docs: 0.1
    - until: 1dur
      ramp: linear
      weights:
        code: 0.1
        docs: 0.9
prepare:
  out: some/corpus
  heldout_fraction: 0.05
  sources:
    code:
      kind: builtin
      domain: code
    docs:
      kind: text
      paths: [a/*.txt]
      max_bytes: 1000
  tokenizer:
    kind: bpe
    vocab_size: 4096
loss:
  z_loss: 1e-4
  chunk_tokens: 512
optim:
  name: adamw
  lr: 3e-4
  betas: [0.9, 0.95]
  decay_roles: [hidden, head]
  lr_factors:
    embedding: 0.5
  clip_norm: 1.0
schedule:
  name: wsd
  warmup: 10step
  decay: 0.2dur
precision:
  compute: fp32
parallel:
  replicate: 1
train:
  duration: 1Mtok
  global_batch_size: 8
  micro_batch_size: 4
  recompute: none
  compile: false
eval:
  every: 0.25dur
  prompts: [once]
checkpoint:
  every: 100step
  keep: 2
guard:
  sigma: 6.0
log:
  every: 10
  tensorboard: false
hooks:
  - use: my.module:Hook
    args:
      depth: 3
"""
# Names of the user's own: any other name there is a different, valid, configuration.
OWN_NAMES = re.compile(r"\.args\.|^data\.sources\.\w+$|^prepare\.sources\.\w+$|\.weights\.\w+$")

WRONG_TYPES = {
    "number": ["abc", "true", "null", "[1]", "{a: 1}", ".nan", ".inf", "'1'", "1..2", "1 2"],
    "flag": ["1", "maybe", "0.5", "null", "[true]", "'truee'"],
    "text": ["[a]", "{a: 1}", "5", "true"],
    "duration": ["100", "1.5", "soon", "10 stepz", "true", "[1step]", "-1step", "0.5step", "3dur"],
    "section": ["3", "abc", "[1, 2]", "true"],
}
IMPOSSIBLE = [
    ("model.d_model", "65"),
    ("model.d_model", "0"),
    ("model.n_layers", "-1"),
    ("model.n_heads", "3"),
    ("model.n_kv_heads", "3"),
    ("model.norm", "batchnorm"),
    ("model.norm_eps", "0"),
    ("seed", "-1"),
    ("device", "tpu"),
    ("data.seq_len", "1"),
    ("data.sources.code.loss_weight", "-0.5"),
    ("data.sources.code.max_epochs", "0"),
    ("data.sources.extra.format", "mdss"),
    ("data.sources.extra.cache_bytes", "10"),
    ("data.phases.0.until", "0step"),
    ("data.phases.0.until", "1dur"),
    ("data.phases.1.until", "0.9dur"),
    ("data.phases.1.until", "0.7dur"),
    ("data.phases.0.weights.code", "-1"),
    ("data.phases.1.ramp", "linaer"),
    ("prepare.heldout_fraction", "1"),
    ("prepare.sources.code.kind", "hf"),
    ("prepare.sources.docs.max_bytes", "0"),
    ("prepare.tokenizer.vocab_size", "100"),
    ("prepare.tokenizer.kind", "file"),
    ("loss.z_loss", "-1"),
    ("optim.name", "adam"),
    ("optim.lr", "0"),
    ("optim.betas", "[0.9]"),
    ("optim.betas", "[0.9, 1.0]"),
    ("optim.decay_roles", "[hidden, haed]"),
    ("optim.lr_factors.embedding", "-2"),
    ("schedule.warmup", "100000step"),
    ("schedule.decay", "1dur"),
    ("schedule.name", "triangle"),
    ("precision.compute", "fp16"),
    ("parallel.replicate", "0"),
    ("train.duration", "0.5dur"),
    ("train.duration", "0step"),
    ("train.micro_batch_size", "3"),
    ("train.micro_batch_size", "16"),
    ("train.recompute", "some"),
    ("eval.every", "0tok"),
    ("checkpoint.keep", "0"),
    ("guard.sigma", "0"),
    ("log.every", "0"),
    ("hooks.0.use", "my.module.Hook"),
]


def keys_by_line(text: str) -> dict[int, str]:
    """Line number (from 1) -> full key, for the block style of GOOD."""
    found: dict[int, str] = {}
    stack: list[tuple[int, str]] = []
    items: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        indent, body = len(line) - len(line.lstrip()), line.strip()
        while stack and stack[-1][0] >= indent:
            stack.pop()
        if body.startswith("- "):
            parent = ".".join(key for _, key in stack)
            items[parent] = items.get(parent, -1) + 1
            stack.append((indent, str(items[parent])))
            indent, body = indent + 2, body[2:]
        key = body.partition(":")[0]
        stack.append((indent, key))
        found[number] = ".".join(key for _, key in stack)
    return found


KEYS = keys_by_line(GOOD)
LINES = GOOD.splitlines()


def kind_of(number: int) -> str:
    """What sort of value the key on a line of GOOD takes."""
    key, value = KEYS[number], LINES[number - 1].partition(":")[2].strip()
    if not value:
        return "section"
    if value in ("true", "false"):
        return "flag"
    if re.fullmatch(r"[\d_.]+(e-\d+)?", value):
        return "number"
    if re.fullmatch(r"[\d.]+M?(step|tok|dur)", value):
        return "duration"
    return "list" if value.startswith("[") else "text" if not key.endswith(".use") else "import"


def misspell(word: str, rng: random.Random) -> str:
    """One slip of the finger that leaves something that is no key."""
    siblings = {key.rpartition(".")[2] for key in KEYS.values()} | {"base"}
    while True:
        i = rng.randrange(len(word))
        slip = rng.choice(["drop", "double", "swap", "other"])
        new = {
            "drop": word[:i] + word[i + 1 :],
            "double": word[:i] + word[i] + word[i:],
            "swap": word[:i] + word[i : i + 2][::-1] + word[i + 2 :],
            "other": word[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz_") + word[i + 1 :],
        }[slip]
        if new and new not in siblings and new != word:
            return new


Case = tuple[str, str, list[str], str]
"""A name, the text of the file, what the message must contain, and the sort of damage."""


def cases() -> list[Case]:
    """The two hundred files."""
    rng = random.Random(20)
    made: list[Case] = []

    def put(kind: str, number: int, line: str, *expected: str) -> None:
        text = "\n".join([*LINES[: number - 1], line, *LINES[number:]]) + "\n"
        made.append((f"{kind}-{len(made)}", text, list(expected), kind))

    own = [n for n, key in KEYS.items() if OWN_NAMES.search(key)]
    for number in rng.sample([n for n in KEYS if n not in own], 70):
        path, _, word = KEYS[number].rpartition(".")
        new = misspell(word, rng)
        line = re.sub(rf"\b{word}:", f"{new}:", LINES[number - 1], count=1)
        full = f"{path}.{new}" if path else new
        put("misspelt", number, line, f"FILE:{number}: {full}: is not a key")
    typed = [n for n in KEYS if kind_of(n) in WRONG_TYPES and ".args" not in KEYS[n]]
    for number in rng.sample(typed, min(60, len(typed))):
        kind = kind_of(number)
        value = rng.choice(WRONG_TYPES[kind])
        below = number
        head = LINES[number - 1].partition(":")[0]
        if kind == "section":  # the lines below it go
            indent = len(head) - len(head.lstrip())
            while below < len(LINES) and (len(LINES[below]) - len(LINES[below].lstrip()) > indent):
                below += 1
            if KEYS[number] in ("hooks", "data.phases") and value == "[1, 2]":
                value = "abc"
        text = "\n".join([*LINES[: number - 1], f"{head}: {value}", *LINES[below:]]) + "\n"
        made.append((f"type-{len(made)}", text, [f"FILE:{number}: {KEYS[number]}"], "type"))
    numbers = {key: number for number, key in KEYS.items()}
    for key, value in IMPOSSIBLE:
        number = numbers[key]
        head = LINES[number - 1].partition(":")[0]
        section = key.partition(".")[0]
        put("value", number, f"{head}: {value}", "FILE:", section)
    for number in rng.sample([n for n in typed if kind_of(n) != "section"], 8):
        if "- " not in LINES[number - 1]:
            twice = f"FILE:{number + 1}: {KEYS[number]}: is given twice (first on line {number})"
            put("twice", number, f"{LINES[number - 1]}\n{LINES[number - 1]}", twice)
    for number in rng.sample([n for n in KEYS if KEYS[n].count(".") == 1], 8):
        put("tab", number, "\t" + LINES[number - 1].strip(), f"FILE:{number}: ", "spaces, not tabs")
    for name in ("none.yaml", "no/such/folder.yaml", "[a.yaml, b.yaml]", "FILE", "../none.yaml"):
        text = f"base: {name}\n{GOOD}"
        made.append((f"base-{len(made)}", text, ["FILE:1: base: "], "base"))
    made.append((f"cut-{len(made)}", GOOD.replace("[0.9, 0.95]", "[0.9, 0.95"), ["FILE:"], "cut"))
    made.append((f"cut-{len(made)}", GOOD.replace("[once]", "'once"), ["FILE:"], "cut"))
    return made


CASES = cases()


def test_the_undamaged_file_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    assert main(["train", str(path), "--print-config"]) == 0
    assert "duration: 1Mtok" in capsys.readouterr().out


def test_there_are_two_hundred() -> None:
    assert len(CASES) == 200
    assert len({text for _, text, _, _ in CASES}) == 200
    depths = {text.count(".") for _, _, (text, *_), kind in CASES if kind == "misspelt"}
    assert len(depths) >= 3


def assert_one_message(code: int, out: str, err: str, path: Path, expected: list[str]) -> None:
    """Exit code 2, nothing printed, one message without traceback that says where and what."""
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert err.count("llmtrain: error: ") == 1 and err.startswith("llmtrain: error: ")
    for part in expected:
        assert part.replace("FILE", str(path)) in err, (part, err)
    assert str(path) in err
    for line in err.strip().splitlines():
        assert len(line) < 600


@pytest.mark.parametrize(("name", "text", "expected", "kind"), CASES, ids=[c[0] for c in CASES])
def test_a_malformed_file_is_one_message(
    name: str,
    text: str,
    expected: list[str],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace("FILE", str(path)))
    code = main(["train", str(path), "--print-config"])
    out, err = capsys.readouterr()
    assert_one_message(code, out, err, path, expected)
    if kind in ("misspelt", "type", "tab", "twice"):
        # One mistake, one fault: no guesses about what follows from it.
        assert "faults in the configuration" not in err, err


@pytest.mark.parametrize("index", [0, 75, 140, 180, 199])
def test_the_same_through_the_command(index: int, tmp_path: Path) -> None:
    name, text, expected, _ = CASES[index]
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace("FILE", str(path)))
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "train", str(path), "--print-config"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert_one_message(done.returncode, done.stdout, done.stderr, path, expected)


@pytest.mark.parametrize("words", [["none.yaml"], ["."], ["none.yaml", "optim.lr=3"]])
def test_files_that_are_not_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", *words, "--print-config"])
    out, err = capsys.readouterr()
    assert_one_message(code, out, err, Path(words[0]), [])
