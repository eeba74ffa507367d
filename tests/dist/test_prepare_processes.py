"""Preparation with several processes, and killed at every point where it touches the disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmtrain

pytestmark = pytest.mark.dist

PRELUDE = """
import os, shutil, signal, sys
from pathlib import Path
from llmtrain.config.schema import PrepareConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data import encode, prepare as module

os.fsync = lambda _: None  # a kill is not a power cut, and waiting for the disk is slow

def config(out, source, **changes):
    sources = {k: TextSourceConfig(kind="jsonl", paths=[source], max_documents=n)
               for k, n in (("a", 60), ("b", None))}
    settings = dict(out=out, sources=sources, tokenizer=TokenizerConfig(kind="byte"), workers=1,
                    heldout_fraction=0.2, shard_bytes=30_000)
    return PrepareConfig(**{**settings, **changes})

def tree(folder):
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
"""

# Kills the process at its n-th write, rename or removal, for all n, and then runs it again.
SWEEP = """
root, source = sys.argv[1:]
encode.BATCH_DOCUMENTS, module.SAVE_SECONDS = 15, 0.0
module.print = lambda *_: None
points = ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree"), (os, "unlink"))
real = {name: getattr(owner, name) for owner, name in points}

def arm(limit):
    left = [limit]
    def counted(name):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args, **kwargs)
        return call
    for owner, name in points:
        setattr(owner, name, counted(name))

def attempt(out, limit, force):
    pid = os.fork()
    if pid == 0:
        arm(limit)
        module.prepare(config(out, source), force=force, say=lambda _: None)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

old = dict(heldout_fraction=0.0)
module.prepare(config(f"{root}/want", source), say=lambda _: None)
module.prepare(config(f"{root}/old", source, **old), say=lambda _: None)
want, limit, killed = tree(f"{root}/want"), 0, True
while killed:
    out = f"{root}/out{limit}"
    shutil.copytree(f"{root}/old", out)  # a complete corpus that is being replaced
    killed = attempt(out, limit, True)
    have = tree(out)
    if "manifest.json" in have:  # complete, so it is wholly the old one or wholly the new one
        now = {k: v for k, v in have.items() if not k.startswith(".partial")}
        assert now in (want, tree(f"{root}/old")), limit
    if killed:
        assert not attempt(out, 10**9, True)
    assert tree(out) == want, limit
    shutil.rmtree(out)
    limit += 1
out, kills = f"{root}/often", 0
while attempt(out, 16, False):  # killed over and over, each time a little further on
    kills += 1
assert tree(out) == want
print(limit, kills)
"""


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(llmtrain.__file__).parents[1])}


def run(code, *args):
    command = [sys.executable, "-c", PRELUDE + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())


@pytest.fixture
def source(tmp_path):
    rng = random.Random(5)
    words = ["alpha", "beta", "gamma", "émile", "東京", "12"]
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for _ in range(170):
            text = " ".join(rng.choices(words, k=rng.randint(1, 150)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def test_killed_anywhere_and_run_again(tmp_path, source):
    done = run(SWEEP, tmp_path, source)
    assert done.returncode == 0, done.stderr
    points, kills = map(int, done.stdout.split())
    assert points > 60
    assert kills > 3


WORKERS = """
import json
if __name__ == "__main__":
    root, source = sys.argv[1:]
    for workers in (1, 2, 3):
        encode.BATCH_DOCUMENTS = 7
        cfg = config(f"{root}/{workers}", source, tokenizer=TokenizerConfig(vocab_size=300))
        module.prepare(cfg, workers=workers, say=lambda _: None)
    assert tree(f"{root}/1") == tree(f"{root}/2") == tree(f"{root}/3")
    print(len(tree(f"{root}/1")))
"""


def test_number_of_workers_changes_nothing(tmp_path, source):
    script = tmp_path / "script.py"  # spawned workers import the main module
    script.write_text(PRELUDE + WORKERS)
    command = [sys.executable, str(script), str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 12


ENDLESS = """
if __name__ == "__main__":
    root, source = sys.argv[1:]
    encode.BATCH_DOCUMENTS, module.SAVE_SECONDS = 5, 0.0
    module.prepare(config(f"{root}/corpus", source), workers=2, say=print)
"""


def children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_kill_9_leaves_no_process_and_the_rerun_the_same_bytes(tmp_path, source):
    lines = source.read_text()
    source.write_text(lines * 12)  # long enough to be caught in the middle
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + ENDLESS)

    def start(root):
        command = [sys.executable, str(script), str(root), str(source)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())

    (tmp_path / "want").mkdir()
    (tmp_path / "killed").mkdir()
    whole = start(tmp_path / "want")
    assert whole.wait(120) == 0
    whole.stdout.close()
    first = start(tmp_path / "killed")
    wait_until((tmp_path / "killed/corpus/.partial/state-b.npz").exists)
    family = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert len(family) >= 2
    wait_until(lambda: not any(map(alive, family)))
    assert not (tmp_path / "killed/corpus/manifest.json").exists()
    second = start(tmp_path / "killed")
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0
    assert "b: continuing after" in said
    for path in (tmp_path / "want/corpus").rglob("*"):
        if path.is_file():
            other = tmp_path / "killed/corpus" / path.relative_to(tmp_path / "want/corpus")
            assert other.read_bytes() == path.read_bytes(), path
    left = {p.name for p in (tmp_path / "killed/corpus").iterdir()}
    assert left == {p.name for p in (tmp_path / "want/corpus").iterdir()}


DYING = """
import llmtrain.data.encode as e
def die(batch, *_):
    os._exit(9)
if __name__ == "__main__":
    root, source = sys.argv[1:]
    e._encode = die
    try:
        module.prepare(config(f"{root}/corpus", source), workers=2, say=print)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_dead_worker_is_a_sentence(tmp_path, source):
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + DYING)
    command = [sys.executable, str(script), str(tmp_path), str(source)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), timeout=60
    )
    assert done.stdout.startswith("EnvironmentFault a tokenizing process died"), done.stderr
