"""House rules that a reader relies on: layering, sizes, what an import brings with it."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmtrain"
# From the bottom up: a room may import itself and the rooms before it.
ROOMS = (
    "errors",
    "machine",
    "config",
    "data",
    "ops",
    "parallel",
    "linear",
    "model",
    "loss",
    "optim",
    "sparsity",
    "checkpoint",
    "convert",
    "analysis",
    "eval",
    "planner",
    "report",
    "train",
    "methods",
    "merge",
    "finetune",
    "launch",
    "recipes",
    "cli",
)
OPTIONAL = {
    *("datasets", "streaming", "tensorboard", "transformers", "wandb", "mlflow", "boto3"),
    *("deepspeed", "lm_eval", "transformer_engine"),
}
# Writes DeepSpeed's format, which is made of pickles of plain tensors and numbers.
FOREIGN = PACKAGE / "checkpoint" / "universal.py"
MAX_FILE, MAX_FUNCTION = 400, 60
FILES = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text("utf-8"))


def room_of(path: Path) -> str:
    """First folder (or module) below the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts[0] in ("__init__", "__main__") else parts[0]


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere in the file, inside functions too, with its line."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def upward(tree: ast.Module, path: Path) -> list[str]:
    """Imports of a file that point up, as ``line: module``."""
    room = room_of(path)
    if not room:
        return []
    found = []
    for module, line in imports(tree, path):
        parts = module.split(".")
        if parts[0] != "llmtrain" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        if parts[1] not in ROOMS or ROOMS.index(parts[1]) > ROOMS.index(room):
            found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    return found


def test_every_room_has_its_place() -> None:
    known = {room_of(path) for path in FILES} - {""}
    assert known <= set(ROOMS)


def test_imports_point_downwards_only() -> None:
    found = [fault for path in FILES for fault in upward(tree_of(path), path)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import llmtrain.train.trainer",
        "from llmtrain.train import Trainer",
        "from llmtrain import cli",
        "from ..train import hooks",
        "def f():\n    from llmtrain.report import render",
        "if TYPE_CHECKING:\n    from llmtrain.checkpoint import save",
    ],
)
def test_an_upward_import_is_noticed(text: str) -> None:
    assert upward(ast.parse(text), PACKAGE / "model" / "block.py")
    assert not upward(ast.parse(text), PACKAGE / "cli" / "train.py")


def test_files_and_functions_stay_readable() -> None:
    found = []
    for path in FILES:
        lines = path.read_text("utf-8").count("\n")
        if lines > MAX_FILE:
            found.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                if ast.get_docstring(node) is not None and len(node.body) > 1:
                    first = node.body[1]
                length = (node.end_lineno or 0) - first.lineno + 1
                if length > MAX_FUNCTION:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {length}")
    assert found == []


def test_optional_packages_are_imported_where_they_are_used() -> None:
    found = []
    for path in FILES:
        for node in tree_of(path).body:
            for module, line in imports(node, path) if not is_function(node) else ():
                if module.split(".")[0] in OPTIONAL:
                    found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert found == []


def is_function(node: ast.stmt) -> bool:
    """Whether imports inside ``node`` wait until it is called."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("llmtrain", OPTIONAL | {"torch", "numpy", "omegaconf", "yaml"}),
        ("llmtrain.config", OPTIONAL | {"torch"}),
        # Process settings must be in place before torch loads.
        ("llmtrain.cli.main", OPTIONAL | {"torch", "numpy"}),
        ("llmtrain.cli.train", OPTIONAL | {"torch", "numpy"}),
        ("llmtrain.report", OPTIONAL | {"torch"}),
        ("llmtrain.train.run", OPTIONAL),
        # They take longer than a small merge.
        ("llmtrain.merge.offline", OPTIONAL | {"torch.distributed.checkpoint", "torch._dynamo"}),
    ],
)
def test_an_import_brings_nothing_it_need_not(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert set(done.stdout.split()) & absent == set()


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Dotted names of called functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_is_pickled() -> None:
    found = []
    for path in FILES:
        tree = tree_of(path)
        where = path.relative_to(ROOT)
        for module, line in imports(tree, path):
            if module.split(".")[0] in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}:
                found.append(f"{where}:{line}: imports {module}")
        for name, call in calls(tree):
            arguments = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == "torch.load" and arguments.get("weights_only") != "True":
                found.append(f"{where}:{call.lineno}: torch.load without weights_only=True")
            if name in ("np.load", "numpy.load") and arguments.get("allow_pickle") == "True":
                found.append(f"{where}:{call.lineno}: {name} with allow_pickle")
            if name == "torch.save" and path != FOREIGN:
                found.append(f"{where}:{call.lineno}: torch.save pickles")
    assert found == []


def test_every_public_name_says_what_it_is() -> None:
    found = []
    for path in FILES:
        tree = tree_of(path)
        if ast.get_docstring(tree) is None:
            found.append(f"{path.relative_to(ROOT)}: no docstring")
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public and ast.get_docstring(node) is None:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert found == []


def test_constraints_pin_what_the_package_asks_for() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {name.lower().replace("_", "-") for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for extra in ("dev", "docs", "hf", "streaming", "deepspeed"):
        wanted += extras[extra]
    names = {w.split("<")[0].split(">")[0].split("=")[0].strip().lower() for w in wanted}
    assert names - pinned == set()
    assert pins["torchvision"] == "0.0.0"
    assert "mosaicml-streaming" in pinned


# Notes the files that pytest would collect, without importing them.
LOOK = """
import pytest

class Look:
    def pytest_collect_file(self, file_path):
        print("looked at", file_path)

pytest.main(["--collect-only", "-p", "no:python", "-p", "no:xdist"], plugins=[Look()])
"""


def test_every_test_file_is_collected() -> None:
    """pytest leaves out folders of some names, ``dist`` among them, unless it is told not to."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    looked = [line.split()[-1] for line in done.stdout.splitlines() if "looked at" in line]
    written = set((ROOT / "tests").rglob("test_*.py"))
    assert written == {Path(name) for name in looked if Path(name).match("test_*.py")}
    for path in written:
        names = {node.name for node in tree_of(path).body if isinstance(node, ast.FunctionDef)}
        assert any(name.startswith("test_") for name in names), path
