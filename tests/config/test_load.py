"""Files, inheritance, overrides, interpolation, and writing back."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from llmtrain.config import Duration, RunConfig, from_dict, load_config
from llmtrain.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes files into a folder that is also the current one; messages then name them short."""
    monkeypatch.chdir(tmp_path)

    def writer(name: str, text: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
        return name

    return writer


def faults_of(path: str, *overrides: str, for_training: bool = False) -> list[str]:
    """The lines of the one error that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, for_training=for_training)
    lines = str(caught.value).split("\n  ")
    if len(lines) > 1:
        assert lines[0] == f"{len(lines) - 1} faults in the configuration:"
        lines = lines[1:]
    return lines


def test_an_empty_file_is_all_defaults(write: Any) -> None:
    for text in ("", "# nothing\n", "model:\ndata:\n", "---\n", "\ufeff"):
        assert load_config(write("a.yaml", text)) == RunConfig()


def test_values_reach_their_types(write: Any) -> None:
    cfg = load_config(
        write(
            "a.yaml",
            """
            name: no
            seed: 1_000
            model: {rope_theta: 500000, norm_eps: 1e-6, tie_embeddings: yes, n_kv_heads: null}
            data:
              corpus: c
              phases:
                - {until: 0.8dur, weights: {1: 1, on: .5}}
                - weights: {null: 2e-1}
            optim: {betas: [0.9, 0], lr_factors: {head: 2}}
            train: {duration: 3Mtok, stop_after: 7step}
            hooks: [{use: "a.b:C", args: {x: [1, {y: 1e-3}], z: no, w: 1:30}}]
            """,
        )
    )
    assert cfg.name == "no" and cfg.seed == 1000 and cfg.model.tie_embeddings is True
    assert cfg.model.norm_eps == 1e-6
    assert isinstance(cfg.model.rope_theta, float) and cfg.model.rope_theta == 5e5
    assert cfg.data.phases[0].weights == {"1": 1.0, "on": 0.5}
    assert cfg.data.phases[1].weights == {"null": 0.2}
    assert cfg.data.phases[1].until == Duration.parse("1dur")
    assert cfg.optim.betas == [0.9, 0.0] and cfg.optim.lr_factors == {"head": 2.0}
    assert cfg.train.duration == Duration.parse("3000000tok")
    assert cfg.hooks[0].args == {"x": [1, {"y": 0.001}], "z": "no", "w": "1:30"}


def test_anchors_and_merge_keys(write: Any) -> None:
    cfg = load_config(
        write(
            "a.yaml",
            """
            data:
              corpus: c
              sources:
                a: &a {path: x, max_epochs: 2}
                b: {<<: *a, path: y}
                c: {path: z, <<: [{max_epochs: 3}, *a]}
            """,
        )
    )
    sources = cfg.data.sources
    assert (sources["b"].path, sources["b"].max_epochs) == ("y", 2.0)
    assert (sources["c"].path, sources["c"].max_epochs) == ("z", 3.0)


def test_base_files_lie_below(write: Any) -> None:
    write("sub/root.yaml", "seed: 1\nname: root\nmodel: {d_model: 64, n_layers: 9}\n")
    write("sub/left.yaml", "base: root.yaml\nseed: 2\ndata: {weights: {a: 1, b: 2}, corpus: c}\n")
    write("right.yaml", "base: [sub/root.yaml]\nmodel: {n_layers: 3}\noptim: {betas: [0.5, 0.5]}\n")
    cfg = load_config(
        write(
            "top.yaml",
            """
            base: [sub/left.yaml, right.yaml]
            data: {weights: {b: null, c: 4}}
            model: {d_ff: 7}
            """,
        )
    )
    # A diamond is fine; right comes after left, and brings root's seed and name again.
    assert (cfg.seed, cfg.name) == (1, "root")
    assert (cfg.model.d_model, cfg.model.n_layers, cfg.model.d_ff) == (64, 3, 7)
    assert cfg.data.weights == {"a": 1.0, "c": 4.0}
    assert cfg.optim.betas == [0.5, 0.5]


def test_null_takes_back_what_was_inherited(write: Any) -> None:
    write(
        "base.yaml",
        """
        model: {d_model: 64}
        optim: {lr: 0.5, clip_norm: 3}
        prepare: {sources: {a: {kind: builtin, domain: code}, b: {kind: builtin, domain: math}}}
        """,
    )
    cfg = load_config(
        write(
            "a.yaml",
            """
            base: base.yaml
            model: null
            optim: {lr: null, clip_norm: null}
            prepare: {sources: {b: null}}
            """,
        )
    )
    assert cfg.model == RunConfig().model
    assert cfg.optim.lr == RunConfig().optim.lr and cfg.optim.clip_norm is None
    assert cfg.prepare is not None and list(cfg.prepare.sources) == ["a"]
    [line] = faults_of(write("b.yaml", "optim: {lr: null}"))
    assert line.startswith("b.yaml:1: optim.lr: must be a number, not null")


def test_overrides(write: Any) -> None:
    path = write(
        "a.yaml",
        """
        name: x
        data:
          corpus: c
          sources: {wiki.en: {path: p}}
          phases: [{until: 0.5dur, weights: {a: 1}}, {weights: {a: 1}}]
        """,
    )
    cfg = load_config(
        path,
        [
            "data.phases.0.until=0.7dur",
            "data.phases.1.weights.b=.5",
            "data.sources.wiki.en.path=q=r",
            "data.sources.new.path=*.npy",
            "optim.betas.1=0.98",
            "optim.lr=1e-4",
            "optim.lr=2e-4",
            "hooks.0.use=a:B",
            "hooks.0.args={k: [1, 2]}",
            "name=007",
            "out=12",
            "eval.prompts=[one, 'two: 3']",
            "train.stop_after=null",
            "model.tie_embeddings=on",
            "checkpoint.resume=@here/there",
        ],
    )
    assert [str(p.until) for p in cfg.data.phases] == ["0.7dur", "1dur"]
    assert cfg.data.phases[1].weights == {"a": 1.0, "b": 0.5}
    assert cfg.data.sources["wiki.en"].path == "q=r"
    assert cfg.data.sources["new"].path == "*.npy"
    assert cfg.optim.betas == [0.9, 0.98] and cfg.optim.lr == 2e-4
    assert cfg.hooks[0].use == "a:B" and cfg.hooks[0].args == {"k": [1, 2]}
    assert (cfg.name, cfg.out) == ("007", "12")
    assert cfg.eval.prompts == ["one", "two: 3"]
    assert cfg.model.tie_embeddings is True
    assert cfg.checkpoint.resume == "@here/there"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "'optim.lr' is not an override; write key=value"),
        ("=3", "'=3' is not an override"),
        ("optim..lr=3", "is not an override"),
        ("base=x.yaml", "base: is read from files only"),
        ("optim.lrr=3", "optim.lrr: is not a key of optim; did you mean 'lr'?"),
        ("optm.lr=3", "optm: is not a key of a run; did you mean 'optim'?"),
        ("learning.lr=3", "learning: is not a key of a run; the keys are name, out"),
        ("lr=3", "lr: is not a key of a run; did you mean 'optim.lr'?"),
        ("optim.lr=abc", "optim.lr: must be a number, not 'abc'"),
        ("optim.lr.x=3", "optim.lr: must be a number, not a mapping"),
        ("optim.betas.2=0.5", "optim.betas: must have 2 items, not 3"),
        ("optim.betas.7=0.5", "optim.betas: is a list with items 0 to 1"),
        ("optim.betas.x=0.5", "optim.betas: is a list with items 0 to 1"),
        ("optim.betas=[0.5", "optim.betas: is not valid YAML"),
        ("hooks.1.use=a:b", "hooks: is a list with no items; 0 appends one"),
        ("train.duration=100", "train.duration: needs a unit, not 100; did you mean '100step'?"),
    ],
)
def test_bad_overrides(write: Any, override: str, expected: str) -> None:
    [line] = faults_of(write("a.yaml", "seed: 3\n"), override)
    assert line.startswith("command line: ")
    assert expected in line


def test_interpolation(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_LR", "0.125")
    monkeypatch.setenv("MY_NAME", "42")
    path = write(
        "a.yaml",
        r"""
        name: ${oc.env:MY_NAME}
        out: runs/${name}-${model.d_model}
        optim: {lr: "${oc.env:MY_LR}"}
        data: {seq_len: 128, corpus: "${oc.env:NOT_SET,some/where}"}
        model: {max_seq_len: "${data.seq_len}", n_kv_heads: "${.n_heads}"}
        eval: {prompts: ["a \\${b}", "${eval.generate_tokens}"]}
        """,
    )
    cfg = load_config(path)
    assert (cfg.name, cfg.out, cfg.optim.lr) == ("42", "runs/42-256", 0.125)
    assert cfg.data.corpus == "some/where" and cfg.model.max_seq_len == 128
    assert cfg.model.n_kv_heads == 4  # a default
    assert cfg.eval.prompts == ["a ${b}", "64"]


def test_interpolations_that_fail_are_all_named(write: Any) -> None:
    lines = faults_of(
        write(
            "a.yaml",
            """
            name: ${nope.x}
            out: ${oc.env:SURELY_NOT_SET}
            model:
              d_model: ${model.d_ff}
              d_ff: ${model.d_model}
            data: {corpus: "${unfinished"}
            log: {wandb: "${what:3}"}
            """,
        )
    )
    keys = ["name", "out", "model.d_model", "model.d_ff", "data.corpus", "log.wandb"]
    numbers = [2, 3, 5, 6, 7, 8]
    assert len(lines) == 6
    for line, key, number in zip(lines, keys, numbers, strict=True):
        assert line.startswith(f"a.yaml:{number}: {key}: ") and "cannot be resolved" in line


def test_all_faults_at_once_with_their_places(write: Any) -> None:
    write("base.yaml", "log:\n  evry: 5\n")
    lines = faults_of(
        write(
            "a.yaml",
            """\
            base: base.yaml
            model:
              n_head: 3
              norm: rmsnrm
            optim:
              lr: fast
              betas: [0.9, 1.5]
            data:
              sources:
                code:
                  pth: x
              phases:
                - until: soon
            train:
              duration: 0.5dur
              lr: 1
            """,
        ),
        "eval.sample=3",
    )
    expected = [
        ("base.yaml:2: log.evry", "did you mean 'every'?"),
        ("a.yaml:3: model.n_head", "did you mean 'n_heads'?"),
        ("a.yaml:4: model.norm", "did you mean 'rmsnorm'?"),
        ("a.yaml:6: optim.lr", "must be a number, not 'fast'"),
        ("a.yaml:7: optim.betas.1", "must be less than 1, not 1.5"),
        ("a.yaml:11: data.sources.code.pth", "did you mean 'path'?"),
        ("a.yaml:13: data.phases.0.until", "'soon' is not a duration"),
        ("a.yaml:13: data.phases.0.weights", "the weights are missing"),
        ("a.yaml:15: train.duration", "must be in step or tok"),
        ("a.yaml:16: train.lr", "did you mean 'optim.lr'?"),
        ("command line: eval.sample", "did you mean 'samples'?"),
    ]
    assert len(lines) == len(expected)
    for start, part in expected:
        assert any(line.startswith(start + ": ") and part in line for line in lines), (start, lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "a.yaml:1: must hold 'key: value' lines, not a list"),
        ("hello\n", "a.yaml:1: must hold 'key: value' lines, not a single value"),
        ("seed:3\n", "a.yaml:1: must hold 'key: value' lines"),
        ("model:\n\td_model: 3\n", "a.yaml:2: is not valid YAML"),
        ("model:\n\td_model: 3\n", "indent with spaces, not tabs"),
        ("seed: 1\nname: a: b\n", "a.yaml:2: is not valid YAML"),
        ("seed: 1\nname: [a\n", "is not valid YAML"),
        ("seed: 1\nname: 'a\n", "is not valid YAML"),
        ("seed: 1\n---\nseed: 2\n", "keep one document in a file"),
        ("seed: 1\nname: x\nseed: 2\n", "a.yaml:3: seed: is given twice (first on line 1)"),
        ("model: {d_ff: 1, d_ff: 2}\n", "a.yaml:1: model.d_ff: is given twice"),
        ("? [a]\n: 3\n", "a key must be plain text"),
        ("name: !!python/name:os.system\n", "tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("model: !foo {d_model: 3}\n", "a.yaml:1: model: the tag '!foo' is not supported"),
        ("name: *nothing\n", "undefined alias"),
        ("hooks: &a [*a]\n", "an alias contains itself"),
        ("out: ???\n", "a.yaml:1: out: is marked ??? and must be given"),
        ("seed: " + "9" * 5000, "is not a valid int"),
        ("model: {<<: 3}\n", "'<<' merges mappings only"),
        (b"\xff\xfea\x00b\x00", "a.yaml: is a binary file"),
        (b"seed: 1\nname: \xe9\n", "a.yaml:2: is not UTF-8 text"),
        (b"name: a\x07b\n", "is not valid YAML"),
        ("a: " + "[" * 5000, "is nested too deeply"),
        (b"# x\n" * (2 << 20), "a.yaml: is over 4 MiB"),
        ("data: {weights: {'': 1}}\n", "has an empty name"),
    ],
)
def test_files_that_are_no_configuration(write: Any, text: str | bytes, expected: str) -> None:
    path = write("a.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("a.yaml")


def test_aliases_that_explode_are_refused(write: Any) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    [line] = faults_of(write("a.yaml", "\n".join(lines)))
    assert "holds more than" in line


def test_missing_and_unreadable_files(write: Any, tmp_path: Path) -> None:
    write("quickstart.yaml", "")
    write("run/config.yaml", "")
    [line] = faults_of("quikstart.yaml")
    assert line == "quikstart.yaml: no such configuration file; did you mean 'quickstart.yaml'?"
    [line] = faults_of("no/such.yaml")
    assert "the folder no does not exist either" in line
    [line] = faults_of("run")
    assert line == "run: is a folder, not a configuration file; did you mean run/config.yaml?"
    [line] = faults_of("a\0b")
    assert "cannot be read" in line
    if os.geteuid():
        (tmp_path / "quickstart.yaml").chmod(0)
        [line] = faults_of("quickstart.yaml")
        assert "cannot be read (Permission denied)" in line


def test_base_that_is_missing_circular_or_no_name(write: Any) -> None:
    write("b.yaml", "base: [c.yaml]\nmodel: {norm: x}\n")
    write("c.yaml", "base: a.yaml\n")
    lines = faults_of(write("a.yaml", "seed: 1\nbase: [b.yaml, none.yaml, 3]\ndata: {weigts: 1}\n"))
    text = "\n".join(lines)
    assert "a.yaml:2: base: must be a list of file names" in text
    assert "c.yaml:1: base: files are based on each other in a circle" in text
    assert "(a.yaml -> b.yaml -> c.yaml -> a.yaml)" in text
    assert "a.yaml:2: base: there is no file none.yaml" in text
    assert "b.yaml:2: model.norm: must be one of rmsnorm, layernorm" in text
    assert "a.yaml:3: data.weigts: is not a key of data; did you mean 'weights'?" in text
    assert len(lines) == 5
    [line] = faults_of(write("d.yaml", "model: {base: a.yaml}"))
    assert "`base` stands at the top of a file" in line


def test_from_dict_takes_plain_data_and_names_keys() -> None:
    cfg = from_dict(
        {"train": {"duration": Duration.parse("5step")}, "optim": {"betas": (0.5, 0.6)}}
    )
    assert str(cfg.train.duration) == "5step" and cfg.optim.betas == [0.5, 0.6]
    with pytest.raises(ConfigError) as caught:
        from_dict({"optim": {"lr": "3"}, "out": "${x}", "modl": 1})
    assert str(caught.value).split("\n  ")[1:] == [
        "optim.lr: must be a number, not '3'; remove the quotes",
        "modl: is not a key of a run; did you mean 'model'?",
    ]


def test_trees_are_frozen_and_defaults_not_shared() -> None:
    one, two = from_dict({}), from_dict({})
    with pytest.raises(AttributeError):
        one.seed = 3  # type: ignore[misc]
    one.optim.betas.append(0.1)
    assert two.optim.betas == [0.9, 0.95]
