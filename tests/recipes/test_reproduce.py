"""Verdicts are computed from numbers; runs are made once; jobs are complete."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny import make_corpus

from llmtrain.cli.main import main
from llmtrain.cli.reproduce import NAMES, _experiment
from llmtrain.config import from_dict, load_config
from llmtrain.errors import ConfigError
from llmtrain.finetune import sequence
from llmtrain.finetune.plan import plan_sequence
from llmtrain.finetune.sequence import RESULT
from llmtrain.recipes import adaptation, lora_vs_full, runner
from llmtrain.recipes.adaptation import Measures
from llmtrain.recipes.domain_upsampling import SHARES
from llmtrain.recipes.experiment import Claim, Experiment, Scoring, Trial, mini_run
from llmtrain.recipes.plot import svg
from llmtrain.recipes.results import Losses, findings, report_lines, verdict
from llmtrain.recipes.sfa import costs

CLAIM = Claim("a beats b", "a", "b", ("x",))
TWO = Experiment("two", "Two runs", ["paper: 1.0"], lambda scale: [], [CLAIM], "b")


def losses(a: list[float], b: list[float]) -> Losses:
    return {"a": [{"x": v, "y": 5.0} for v in a], "b": [{"x": v, "y": 1.0} for v in b]}


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([1.0, 1.1, 1.2], [1.2, 1.31, 1.39], "holds"),
        ([1.0, 1.4, 1.2], [1.1, 1.2, 1.4], "is within the seeds' noise"),
        ([1.2, 1.31, 1.39], [1.0, 1.1, 1.2], "is reversed"),
        ([1.0, 1.0], [1.0, 1.0], "is within the seeds' noise"),
    ],
)
def test_a_verdict_follows_from_the_numbers(a: list[float], b: list[float], word: str) -> None:
    (found,) = findings(TWO, losses(a, b))
    assert found.word == word
    gaps = [q - p for p, q in zip(a, b, strict=True)]
    middle = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((g - middle) ** 2 for g in gaps) / (len(gaps) - 1))
    t = {2: 6.314, 3: 2.920}[len(gaps)]  # Student's one-sided 95%
    assert found.gain == pytest.approx(middle)
    assert found.bound == pytest.approx(t * spread / math.sqrt(len(gaps)))
    assert verdict([found]).startswith("direction holds") == (word == "holds")
    text = "\n".join(report_lines(TWO, losses(a, b), "mini"))
    assert word in text and "paper: 1.0" in text and "verdict: direction" in text
    assert verdict([replace(found, claim=replace(CLAIM, decides=False))]) == (
        "direction holds at this scale"
    )


def test_the_plot_has_a_bar_for_every_run_and_domain() -> None:
    drawing = svg("A & B", losses([1.0, 1.2], [1.5, 1.4]), "b")
    assert drawing.count("<circle") == 2
    assert "A &amp; B" in drawing


def test_runs_are_made_once_and_the_result_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path, documents=40)
    data = {"seq_len": 32, "block_size": 4, "weights": {"letters": 0.9, "digits": 0.1}}
    keep = {"every": None, "keep_at": ["0.5dur"]}
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 48}
    config = mini_run(8, data=data, checkpoint=keep, model=shape)
    config["train"]["global_batch_size"] = 4
    trials = [
        Trial("base", config),
        Trial("tail", trunk="base", at="0.5dur", overrides=["data.weights={digits: 1}"]),
    ]
    half = {**data, "select": {"scores": "made later", "keep": 0.5}}
    scoring = Scoring("base", "0.5dur", "el2n")
    trials.append(Trial("half", {**config, "data": half}, scoring=scoring))
    trials.append(Trial("tuned", config, begins="base"))
    claims = [Claim("digits gain", "tail", "base", ("digits",))]
    experiment = Experiment("tiny", "Tiny", ["paper: none"], lambda scale: trials, claims, "base")
    text = {"letters": {"kind": "builtin", "domain": "docs"}}  # not read: the corpus is there
    section: dict[str, Any] = {"out": str(corpus), "sources": text}
    monkeypatch.setattr(runner, "mini_corpus", lambda out: section)
    monkeypatch.setattr(runner, "prepare", lambda cfg, say: None)
    trained: list[str] = []
    real = runner.train
    monkeypatch.setattr(runner, "train", lambda cfg, w: (trained.append(cfg.name), real(cfg, w)))

    lines = runner.run_mini(experiment, tmp_path / "out", 2, lambda text: None)
    names = ("base", "half", "tuned")
    assert trained == [f"tiny-{name}-s{seed}" for seed in (1, 2) for name in names]
    init = load_config(tmp_path / "out" / "tiny-tuned-s2" / "config.yaml").init
    assert init is not None and init.path == str(tmp_path / "out" / "tiny-base-s2")
    select = load_config(tmp_path / "out" / "tiny-half-s2" / "config.yaml").data.select
    assert select is not None and select.scores == str(tmp_path / "out" / "tiny-el2n-s2.parquet")
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    gaps = [b["digits"] - t["digits"] for b, t in zip(found["base"], found["tail"], strict=True)]
    assert f"{sum(gaps) / 2:+.4f}" in "\n".join(lines)
    assert found["base"][0] != found["base"][1]
    assert (tmp_path / "out" / "tiny.svg").read_text().startswith("<svg")

    again = runner.run_mini(experiment, tmp_path / "out", 2, lambda text: None)
    assert again == lines and len(trained) == 6
    config["optim"]["lr"] = 1e-3
    with pytest.raises(ConfigError, match=r"other settings \(optim.lr"):
        runner.run_mini(experiment, tmp_path / "out", 2, lambda text: None)
    with pytest.raises(ConfigError, match="at least 2"):
        runner.run_mini(experiment, tmp_path / "out", 1, lambda text: None)


def judged(
    monkeypatch: pytest.MonkeyPatch, full: dict[str, float], ranks: tuple[float, float]
) -> str:
    """The verdict of lora-vs-full where LoRA ends with docs 2.0 and math 1.6 (a little by rank)."""
    losses: Losses = {lora_vs_full.BASE: [{"docs": 1.9, "math": 3.0}] * 3}
    for steps in lora_vs_full.STEPS["mini"]:
        for method in lora_vs_full.methods("mini"):
            for worse, rate in enumerate(lora_vs_full.RATES["mini"]):
                own = {"docs": 2.0 + method.rank / 1000, "math": 1.6 - method.rank / 1000}
                row = full if method.kind == "full" else own
                name = lora_vs_full.label(method, rate, steps)
                seeds = (0.0, 0.0001, 0.0003)
                losses[name] = [{d: v + worse + x for d, v in row.items()} for x in seeds]
    made = {label: [Path(label)] * 3 for label in losses}

    def measures(run: Path, base: Path) -> Measures:
        rank = ranks[0] if str(run).startswith("full") else ranks[1]
        return Measures(0.25, rank, 64.0, 1000, 10.0)

    monkeypatch.setattr(lora_vs_full, "measures", measures)
    lines, drawing, _ = lora_vs_full.study(losses, made)
    assert drawing.count("<circle") == 2 * len(lora_vs_full.methods("mini"))
    text = "\n".join(lines)
    # The first rate is the better one of every method.
    assert "full lr 1e-03 240 steps" in text
    return lines[-1]


def test_the_verdict_on_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, forgot = {"docs": 2.5, "math": 1.0}, {"docs": 1.95, "math": 1.0}
    assert judged(monkeypatch, learned, (30.0, 5.0)) == "verdict: direction holds at this scale"
    assert "rank 2 forgets less than full (docs): is reversed" in judged(
        monkeypatch, forgot, (30.0, 5.0)
    )
    assert "at least 10 times the rank 1: does not hold" in judged(monkeypatch, learned, (9.5, 5.0))


def test_forgetting_is_compared_where_both_learned_as_much() -> None:
    """Full forgets 0.1, 0.3, 0.4 and 0.9 where it learned 1, 2, 3 and 4; LoRA 0.3 at 2.5 (full:
    0.35), 0.5 at 3.5 (0.65), and 0.7 beyond all (0.9)."""
    rows: Losses = {lora_vs_full.BASE: [{"docs": 1.0, "math": 5.0}] * 2}
    full = iter([(2.0, 1.4), (4.0, 1.1), (1.0, 1.9), (3.0, 1.3)])
    low = dict(zip(lora_vs_full.RANKS["mini"], [(2.5, 1.3), (1.5, 1.5), (0.5, 1.7)], strict=True))
    for method in lora_vs_full.methods("mini"):
        for steps in lora_vs_full.STEPS["mini"]:
            for i, rate in enumerate(lora_vs_full.RATES["mini"]):
                math, docs = next(full) if method.kind == "full" else low[method.rank]
                worse = 0.1 * i if method.kind == "all" else 0.0
                row = {"docs": docs, "math": math + worse}
                rows[lora_vs_full.label(method, rate, steps)] = [row, row]
    ranks, gains, bounds = zip(*lora_vs_full.equal_learning(rows), strict=True)
    assert ranks == lora_vs_full.RANKS["mini"]
    assert gains == pytest.approx((0.05, 0.15, 0.2)) and bounds == pytest.approx((0, 0, 0))


def test_questions_and_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = adaptation.questions(40)
    assert 30 < len(asked) <= 40
    for text, number in asked:
        line = re.split(r"[\n;:.,]", text)[-1]
        sides = re.fullmatch(r"\D*?(-?\d+) ([-+]) (\d+) =", line.strip())
        if sides:
            a, sign, b = int(sides[1]), sides[2], int(sides[3])
            assert int(number) == (a + b if sign == "+" else a - b)
    right = dict(asked)
    tokenizer = SimpleNamespace(
        encode=lambda text: [text], decode=lambda tokens: tokens[0], eos_id=None
    )
    trained: Any = SimpleNamespace(
        model=None, tokenizer=tokenizer, model_cfg=SimpleNamespace(max_seq_len=128)
    )
    for shown, share in ((" {}, so", 1.0), (" {}", 1.0), (" {}5", 0.0), (" x {}", 0.0)):

        def answer(model: Any, prompts: Any, *_: Any, shown: str = shown, **__: Any) -> list[Any]:
            return [SimpleNamespace(tokens=[shown.format(right[text])]) for (text,) in prompts]

        monkeypatch.setattr(adaptation, "generate", answer)
        assert adaptation.exact_match(trained, asked) == share


def test_memory_is_counted() -> None:
    """Frozen weights take no gradients, no moments, and their layers keep less."""
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 48, "vocab_size": 60}
    run = {"model": shape, "data": {"seq_len": 16}, "train": {"global_batch_size": 2}}
    full = adaptation.counted_memory(from_dict(run), 60)
    embedding, block = 2 * 64 * 32, 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32
    assert 16 * (embedding + block) < full < 16 * (embedding + block) + 200_000
    adapters = {"rank": 2, "targets": ["attention"]}
    low = adaptation.counted_memory(
        from_dict({**run, "model": {**shape, "adapters": adapters}}), 60
    )
    assert low < full - 12 * (embedding + block) + 16 * 2 * 32 * 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_jobs_are_complete(tmp_path: Path, name: str, scale: str) -> None:
    out = tmp_path / "jobs"
    trials = _experiment(name).trials(scale)
    seeds = 2 if len(trials) < 100 else 1
    command = ["reproduce", name, "--scale", scale, "--seeds", str(seeds), "--out", str(out)]
    assert main(command) == 0
    jobs = sorted(out.glob("*.sbatch"))
    scorings = {trial.scoring for trial in trials} - {None}
    assert len(jobs) == seeds * (len(trials) + len(scorings))
    each = 'for file; do bash -n "$file" || exit 1; done'
    subprocess.run(["bash", "-c", each, "_", *jobs, out / "submit.sh"], check=True)
    if name == "lora-vs-full":
        tasks = (out / "tasks.sh").read_text()
        assert tasks.count("--tasks hellaswag,arc_challenge,winogrande") == seeds * len(trials)
    for config in out.glob("*.yaml"):
        cfg = load_config(config, for_training=name != "sfa")
        if name == "sfa":
            assert len(plan_sequence(cfg).stages) == 3
    submit = (out / "submit.sh").read_text()
    for word in re.findall(r"\$\{?(job_\w+)", submit):
        assert f"\n{word}=$(sbatch" in submit
    waits = (t.trunk is not None or t.scoring is not None or t.begins is not None for t in trials)
    after = sum(waits) + len(scorings)
    assert len(re.findall("dependency", submit)) == seeds * after


def test_nothing_starts_before_all_that_waits_for_it_is_submitted(tmp_path: Path) -> None:
    """submit.sh with a stand-in of a federation, where a cluster's name follows the number."""
    out, told = tmp_path / "jobs", tmp_path / "told"
    words = ["--scale", "small", "--seeds", "2", "--out", str(out)]
    assert main(["reproduce", "domain-upsampling", *words]) == 0
    said = 'echo "$(basename "$0") $*" >> "$TOLD"; echo "$(wc -l < "$TOLD");east"'
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{said}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TOLD": str(told)}
    subprocess.run([out / "submit.sh"], env=env, check=True)
    lines = told.read_text().splitlines()
    held = [i for i, line in enumerate(lines, 1) if "--hold" in line]
    assert len(held) == 2
    assert lines[-2:] == [f"scontrol release {i}" for i in held]
    for i, line in enumerate(lines[:-2], 1):
        trunk = max(number for number in held if number <= i)
        assert i in held or f"--dependency=afterok:{trunk} " in line


@pytest.mark.parametrize("name", NAMES)
def test_miniatures_are_sound(name: str, tmp_path: Path) -> None:
    """Configs load, branch points are kept by the trunk, claims name runs that are made."""
    from llmtrain.config import Duration
    from llmtrain.recipes.experiment import mini_corpus
    from llmtrain.train.clockwork import Clockwork

    experiment = _experiment(name)
    trials = {t.label: t for t in experiment.trials("mini")}
    for claim in experiment.claims:
        assert {claim.better, claim.than} <= set(trials)
    assert experiment.baseline in trials
    for trial in trials.values():
        own = trials[trial.trunk] if trial.trunk else trial
        corpus = mini_corpus(tmp_path)
        data = {**own.config["data"], "corpus": corpus["out"]}
        plain = {**own.config, "data": data, "prepare": corpus}
        if "continual" in plain:
            made = {stage.run.name: stage.cfg for stage in plan_sequence(from_dict(plain)).stages}
            for run, label in trial.shares.items():
                theirs = {**trials[label].config, "data": data, "prepare": corpus}
                others = {s.run.name: s.cfg for s in plan_sequence(from_dict(theirs)).stages}
                assert made[run] == others[run]
            continue
        cfg = from_dict(plain, for_training=True)
        times = Clockwork.from_config(cfg)
        if trial.trunk:
            at = Duration.parse(trial.at).steps(times.tokens_per_step, times.total)
            assert times.keeps(at)
        if trial.scoring:
            assert list(trials).index(trial.scoring.by) < list(trials).index(trial.label)
            at = Duration.parse(trial.scoring.at).steps(times.tokens_per_step, times.total)
            scored = trials[trial.scoring.by].config
            data = {**scored["data"], "corpus": corpus["out"]}
            again = from_dict({**scored, "data": data, "prepare": corpus})
            assert Clockwork.from_config(again).keeps(at)


def test_the_branch_points_are_the_shares() -> None:
    ends = {t.label: t.at for t in _experiment("domain-upsampling").trials("mini") if t.trunk}
    assert [ends[f"d = {share}"] for share in SHARES] == [
        "95/100dur",
        "90/100dur",
        "80/100dur",
        "70/100dur",
    ]


def test_a_job_gives_every_task_its_rank_and_asks_again_when_preempted(tmp_path: Path) -> None:
    """The script is run with stand-ins for srun, scontrol and llmtrain."""
    out = tmp_path / "jobs"
    assert main(["reproduce", "domain-upsampling", "--scale", "small", "--out", str(out)]) == 0
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    told = tmp_path / "told"
    for name, body in {
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        'SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURMD_NODENAME=node7 "$@"',
        "scontrol": f'[[ $1 == show ]] && echo node7 && exit; echo "$@" >> {told}',
        "sleep": "",
        "llmtrain": f"""[[ $1 == doctor ]] && exit 0
        echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $@" >> {told}
        echo 75 > "$LLMTRAIN_EXIT_FILE"; exit 75""",
    }.items():
        file = bin_folder / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    job = next(out.glob("*d---0.2-s1.sbatch"))
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin"}
    environment |= {"SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "42", "SLURM_NNODES": "1"}
    done = subprocess.run(["bash", str(job)], env=environment, cwd=out, check=False)
    assert done.returncode == 75
    first, second = told.read_text().splitlines()
    assert first.startswith("3 1 8 node7 branch runs/domain-upsampling-base-mix--d---0-s1 --at")
    assert first.endswith("name=domain-upsampling-d---0.2-s1")
    assert "data.weights={small_cc: 0.3, domain: 0.35, code: 0.35}" in first
    assert second == "requeue 42"


def test_sequences_share_runs_and_have_their_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods of the experiment on a tiny corpus; the shared tasks are trained once."""
    corpus = make_corpus(tmp_path, documents=40)
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 48}
    tasks = [
        {"name": "code", "weights": {"letters": 1}},
        {"name": "docs", "weights": {"digits": 1}},
    ]

    def config(**method: Any) -> dict[str, Any]:
        section = {"tasks": tasks, **method}
        made = mini_run(4, data={"seq_len": 32}, model=shape, continual=section)
        made["train"]["global_batch_size"] = 4
        return made

    both = {"1-code": "plain", "2-docs": "plain"}
    trials = [Trial("plain", config()), Trial("wise", config(method="wise-ft"), shares=both)]
    claims = [Claim("old", "wise", "plain", ("letters",), also="plain")]
    experiment = Experiment(
        "two", "Two", ["paper: none"], lambda scale: trials, claims, "plain", costs=costs_of_two
    )
    section = {"out": str(corpus), "sources": {"x": {"kind": "builtin", "domain": "docs"}}}
    monkeypatch.setattr(runner, "mini_corpus", lambda out: section)
    monkeypatch.setattr(runner, "prepare", lambda cfg, say: None)
    trained: list[str] = []
    real = sequence.train
    monkeypatch.setattr(sequence, "train", lambda cfg, w: (trained.append(cfg.name), real(cfg, w)))
    lines = runner.run_mini(experiment, tmp_path / "out", 2, lambda text: None)
    assert trained == ["1-code", "2-docs"] * 2
    assert "costs: plain, wise; seeds 2" in lines
    found = json.loads((tmp_path / "out" / "two.json").read_text())
    gaps = [p["letters"] - w["letters"] for p, w in zip(found["plain"], found["wise"], strict=True)]
    assert f"{sum(gaps) / 2:+.4f}" in "\n".join(lines)
    assert runner.run_mini(experiment, tmp_path / "out", 2, lambda text: None) == lines
    assert len(trained) == 4


def costs_of_two(folders: Mapping[str, Sequence[Path]]) -> list[str]:
    rows = {
        label: [json.loads((f / RESULT).read_text()) for f in fs] for label, fs in folders.items()
    }
    assert all(one["rows"][1]["stored_bytes"] for one in rows["wise"])
    return [f"costs: {', '.join(folders)}; seeds {len(folders['plain'])}"]


def test_a_claim_may_be_against_the_middle_of_two() -> None:
    claim = replace(CLAIM, also="c")
    experiment = replace(TWO, claims=[claim])
    three = {**losses([1.0, 1.1], [2.0, 2.2]), "c": [{"x": 1.2, "y": 0.0}, {"x": 1.0, "y": 0.0}]}
    (found,) = findings(experiment, three)
    assert found.gain == pytest.approx(((1.6 - 1.0) + (1.6 - 1.1)) / 2)


def test_costs_of_the_experiment_are_read_from_the_sequences(tmp_path: Path) -> None:
    row = {"kept_bytes": 10, "stored_bytes": 100, "replayed_tokens": 7, "seconds": 1.5}
    row |= {"beside_seconds": 0.25, "losses": {"code": 3.0, "docs": 4.0, "math": 1.0}}
    (tmp_path / "sequence.json").write_text(json.dumps({"rows": [row, row], "forgetting": 0.5}))
    line = costs({"sfa": [tmp_path, tmp_path]})[-1]
    assert " ".join(line.split()) == "sfa 3.5000 1.0000 +0.5000 10B 200B 14 tokens 3.0 s 0.5 s"
