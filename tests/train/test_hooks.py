"""Finding hooks by import path; what is wrong is said with the key."""

import pytest

from llmtrain.config.schema import HookConfig, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.train import Hook
from llmtrain.train.hooks import load_hooks


class Counting(Hook):
    def __init__(self, every: int = 1) -> None:
        self.every = every


def test_a_hook_is_imported_and_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("my_hooks")
    module.Counting = Counting  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_hooks", module)
    (hook,) = load_hooks(RunConfig(hooks=[HookConfig("my_hooks:Counting", {"every": 3})]))
    assert isinstance(hook, Counting)
    assert hook.every == 3
    with pytest.raises(ConfigError, match=r"hooks\.0\.args.*evry"):
        load_hooks(RunConfig(hooks=[HookConfig("my_hooks:Counting", {"evry": 3})]))


@pytest.mark.parametrize(
    ("use", "says"),
    [
        ("no_such_package:Thing", "cannot import"),
        ("llmtrain.train.hooks:NoSuch", "cannot import"),
        ("pathlib:Path", "not a subclass"),
    ],
)
def test_what_cannot_be_a_hook_is_refused(use: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"hooks\.1\.use.*{says}"):
        load_hooks(RunConfig(hooks=[HookConfig("llmtrain.train.hooks:Hook"), HookConfig(use)]))
