"""Build the Dockerfile's image without a daemon or a registry, and run it (``make test-docker``).

    python tests/launch/build_image.py [--suite SUITE] [--torch-args ARGS] [--cuda FOLDER]

The Dockerfile itself is built, by ``launch/docker/build.sh`` with buildah, which changes root where
Docker would start a container. Only the base differs: it is made of the packages of Debian's
``SUITE`` (that of the Dockerfile's own base where none is given), as Debian's slim images are, and
handed over by name and digest. Then the image is looked at and used as its user: health check,
training, resuming, two processes.

With ``--cuda FOLDER`` (a CUDA toolkit of this machine) the target ``cuda`` is built as well, on the
same base with that toolkit mounted where NVIDIA's image has it: the kernels are compiled as in the
real image, but NVIDIA's bases are not seen, and nothing runs on a GPU.

Needs root and, on Debian, ``apt-get install --no-install-recommends buildah crun mmdebstrap``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Read by pip from the environment or its files; whatever in them is a path is mounted.
PIP_KEYS = ("cert", "index-url", "extra-index-url", "find-links", "trusted-host", "timeout")
BASE = "localhost/base"


def default_suite() -> str:
    """Debian's suite in the tag of the Dockerfile's base for CPUs."""
    found = re.search(r"^ARG CPU_BASE=\S+:(\w+)-slim$", (ROOT / "Dockerfile").read_text(), re.M)
    assert found
    return found[1]


def pip_volumes(settings: str, folder: Path) -> list[str]:
    """Options that let pip in the image reach what pip here reaches; they leave no trace in it.

    settings: what ``pip config list`` prints. folder: takes the pip.conf that is mounted.
    """
    lines: dict[str, str] = {}
    mounts: list[str] = []
    for key, text in re.findall(r"^\S*?\.([\w-]+)='(.*)'$", settings.replace("\\n", " "), re.M):
        if key not in PIP_KEYS:
            continue
        words = []
        for given in text.split():
            word = given
            path = Path(given.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # The folder above an index: its links lead beside it.
                inside = f"/mnt/pip/{len(mounts)}"
                there = path.parent if given.startswith("file://") else path
                mounts.append(f"--volume={there.resolve()}:{inside}:ro")
                word = f"file://{inside}/{path.name}" if there != path else inside
            words.append(word)
        lines[key] = " ".join(words)  # what comes later, the environment, holds
    file = folder / "pip.conf"
    file.write_text("".join(["[global]\n", *(f"{k} = {v}\n" for k, v in lines.items())]))
    return [f"--volume={file}:/etc/pip.conf:ro", *mounts]


class Builder:
    """buildah with a storage of its own in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        conf = folder / "storage.conf"
        conf.write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\n'
            f'graphroot = "{folder}/store"\n'
        )
        # Health checks are Docker's own: the OCI format has none.
        self.env = {
            **os.environ, "CONTAINERS_STORAGE_CONF": str(conf), "BUILDAH_ISOLATION": "chroot",
            "BUILDAH_FORMAT": "docker", "DOCKER": "buildah",
        }  # fmt: skip

    def run(self, *words: str, **more: str) -> None:
        """Run a command; what it says goes to where ours does."""
        print("+", " ".join(words), flush=True)
        subprocess.run(words, env={**self.env, **more}, check=True)

    def said(self, *words: str) -> str:
        """What a command prints."""
        done = subprocess.run(words, env=self.env, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def base(self, suite: str) -> str:
        """The digest of the base, which is made as Debian's slim images are."""
        held = self.said("buildah", "images", "--format", "{{.Name}} {{.Digest}}").split()
        if BASE in held:
            return held[held.index(BASE) + 1]
        tar = self.folder / "base.tar"
        settings = (
            "force-unsafe-io",
            "path-exclude=/usr/share/doc/*",
            "path-exclude=/usr/share/man/*",
        )
        options = [f"--dpkgopt={setting}" for setting in settings]
        self.run("mmdebstrap", "--variant=minbase", *options, suite, str(tar))
        container = self.said("buildah", "from", "scratch")
        self.run("buildah", "add", "--quiet", container, str(tar), "/")
        self.run("buildah", "commit", "--quiet", "--rm", container, BASE)
        tar.unlink()
        return self.said("buildah", "images", "--format", "{{.Digest}}", BASE)

    def image(self, target: str, digest: str, options: list[str]) -> dict[str, Any]:
        """Build a target by the shipped script; Docker's configuration of the image."""
        names = {"cpu": ("CPU",), "cuda": ("CUDA_BUILD", "CUDA")}[target]
        bases = [f"--build-arg={name}_BASE={BASE}" for name in names]
        script = str(ROOT / "launch" / "docker" / "build.sh")
        tag = f"localhost/llmtrain:{target}"
        words = [script, target, tag, "--pull-never", *bases, *options]
        self.run(*words, **{f"{name}_DIGEST": digest for name in names})
        about = json.loads(self.said("buildah", "inspect", "--type", "image", tag))
        config: dict[str, Any] = about["Docker"]["config"]
        size = self.said("buildah", "images", "--format", "{{.Size}}", tag)
        base = self.said("buildah", "images", "--format", "{{.Size}}", BASE)
        print(f"== image {target}: {size}, of which the base is {base}", flush=True)
        return config


class Container:
    """A root made of an image, in which commands run as the image's user."""

    def __init__(self, builder: Builder, target: str) -> None:
        self._builder = builder
        image = f"localhost/llmtrain:{target}"
        self._name = builder.said("buildah", "from", "--pull-never", image)

    def run(self, *words: str) -> tuple[int, str]:
        """Exit code and what it printed; errors go to where ours do."""
        print("$", " ".join(words), flush=True)
        # buildah loses what is printed in a process's last moment.
        patient = ["sh", "-c", '"$@"; code=$?; sleep 0.5; exit $code', "_"]
        done = subprocess.run(
            # Docker would put the container's own name into /etc/hosts.
            ["buildah", "run", "--hostname=localhost", self._name, "--", *patient, *words],
            env=self._builder.env, stdout=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
        print(done.stdout, end="", flush=True)
        return done.returncode, done.stdout

    def good(self, *words: str) -> str:
        """The output of a command that must end well."""
        code, text = self.run(*words)
        assert code == 0, f"{' '.join(words)}: exit code {code}"
        return text


def look(config: dict[str, Any], inside: Container) -> None:
    """What holds for every target."""
    user = config["User"]
    assert user.isdecimal() and int(user) > 0, config
    assert inside.good("id", "-u").strip() == user
    assert inside.good("pwd").strip() == config["WorkingDir"] == "/work"
    assert config["Entrypoint"] == ["llmtrain"]
    for tool in ("g++", "gcc", "cc", "nvcc", "git", "curl"):
        assert inside.run("sh", "-c", f"command -v {tool}")[0], f"{tool} is in the image"
    for place in ("/opt", "/opt/venv/bin", "/opt/llmtrain/llmtrain", "/usr/bin", "/etc"):
        assert inside.run("test", "-w", place)[0], f"{user} may write to {place}"
    _, text = inside.run("sh", "-c", "find / -xdev -perm /6000 -user root -type f 2>/dev/null")
    print(f"== programs with the rights of root: {len(text.splitlines())} (of the base)")
    kind, *health = config["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert "Training works here." in inside.good(*health)


def use(inside: Container) -> None:
    """Train, resume and train on two processes, as a user of the image for CPUs would."""
    checks = json.loads(inside.good("llmtrain", "doctor", "--json"))["checks"]
    (kernels,) = [check for check in checks if check["name"] == "CPU kernels"]
    assert kernels["works"], kernels
    config = "/opt/llmtrain/configs/quickstart.yaml"
    small = ["model.d_model=48", "model.d_ff=96", "model.n_layers=2", "eval.every=null"]
    inside.good("llmtrain", "data", "prepare", config)
    inside.good(
        "llmtrain", "train", config, *small, "train.duration=6step", "train.stop_after=3step"
    )
    assert "after step 3" in inside.good(
        "llmtrain", "train", config, *small, "train.duration=6step"
    )
    inside.good("llmtrain", "checkpoint", "verify", "runs/quickstart")
    inside.good("llmtrain", "report", "runs/quickstart")
    two = ["env", "NPROC=2", "/opt/llmtrain/launch/local.sh", config, *small]
    inside.good(*two, "name=two", "train.duration=3step", "device=cpu")


def kernels(inside: Container) -> None:
    """The compiled CUDA kernels are in the image, for the GPUs that are promised."""
    library = "/opt/llmtrain/llmtrain/ops/_cuda.so"
    held = inside.good("sh", "-c", f"grep -ao 'sm_80[ a-z0-9_]*' {library} | head -n 1")
    assert {"sm_80", "sm_90a", "sm_100"} <= set(held.split()), held


def main() -> None:
    """Build and look; says what was not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", default=default_suite(), help="Debian's, for the base")
    parser.add_argument("--torch-args", help="the Dockerfile's TORCH_ARGS")
    parser.add_argument("--cuda", type=Path, help="a CUDA toolkit: build the target cuda as well")
    parser.add_argument("--keep", type=Path, help="a folder whose images are used and kept")
    args = parser.parse_args()
    missing = [tool for tool in ("buildah", "mmdebstrap") if shutil.which(tool) is None]
    if missing or os.geteuid():
        sys.exit(
            "needs root, buildah and mmdebstrap; on Debian: "
            "apt-get install --no-install-recommends buildah crun mmdebstrap"
        )
    folder = args.keep or Path(tempfile.mkdtemp(prefix="image-", dir="/var/tmp"))
    builder = Builder(folder.resolve())
    try:
        digest = builder.base(args.suite)
        pip = builder.said(sys.executable, "-m", "pip", "config", "list")
        options = pip_volumes(pip, builder.folder)
        if args.torch_args is not None:
            options.append(f"--build-arg=TORCH_ARGS={args.torch_args}")
        config = builder.image("cpu", digest, options)
        inside = Container(builder, "cpu")
        look(config, inside)
        use(inside)
        if args.cuda is not None:
            toolkit = f"--volume={args.cuda.resolve()}:/usr/local/cuda:ro"
            config = builder.image("cuda", digest, [*options, toolkit])
            inside = Container(builder, "cuda")
            look(config, inside)
            kernels(inside)
    finally:
        if args.keep is None:
            subprocess.run(["buildah", "rm", "--all"], env=builder.env, check=False)
            subprocess.run(["buildah", "rmi", "--all", "--force"], env=builder.env, check=False)
            shutil.rmtree(folder, ignore_errors=True)
    print("1 passed, 0 failed")


if __name__ == "__main__":
    main()
