"""Import of mosaicml-streaming, an optional package that is hard to import on CPU machines."""

from __future__ import annotations

import importlib
import sys
import threading
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType

from llmtrain.errors import EnvironmentFault

_STANDINS = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)
_LOCK = threading.Lock()


def import_streaming() -> ModuleType:
    """The ``streaming`` package (mosaicml-streaming).

    It imports torchvision for its image classes, which text never touches. The torchvision of
    the package registries does not load beside a CPU build of torch, so where it is absent or
    broken an empty stand-in takes its place during the import and is removed right after: left
    behind, it would break the model imports of ``transformers``. A process that was spawned
    (not forked) must call this before it unpickles a dataset of streaming's.

    Raises EnvironmentFault when the package is absent or one of its own requirements is.
    """
    with _LOCK:
        loaded = sys.modules.get("streaming")
        if loaded is not None:
            return loaded
        if _torchvision_works():
            return _import()
        # transformers remembers whether torchvision is there: it must look before the stand-in is.
        with suppress(ImportError):
            importlib.import_module("transformers.utils").is_torchvision_available()
        _forget("torchvision")
        sys.modules.update(_standins())
        try:
            return _import()
        finally:
            for name in _STANDINS:
                sys.modules.pop(name, None)


def _torchvision_works() -> bool:
    """Whether torchvision imports; a build for another torch raises RuntimeError or OSError."""
    try:
        importlib.import_module("torchvision")
    except Exception:
        return False
    return True


def _import() -> ModuleType:
    """``import streaming`` with our own words for what can be missing."""
    try:
        return importlib.import_module("streaming")
    except ImportError as error:
        _forget("streaming")
        missing = error.name or str(error)
        if missing.split(".")[0] == "streaming":
            message = (
                "mosaicml-streaming is not installed: "
                "run `pip install --no-deps mosaicml-streaming==0.13.0`"
            )
        else:
            message = f"mosaicml-streaming needs the package {missing}: run `pip install {missing}`"
        raise EnvironmentFault(message) from error


def _forget(package: str) -> None:
    """Removes the remains of a failed import, which would make the next one fail differently."""
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        del sys.modules[name]


def _standins() -> dict[str, ModuleType]:
    """Empty torchvision modules with the three names that streaming reads at import."""
    modules: dict[str, ModuleType] = {}
    for name in _STANDINS:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        modules[name] = module
    for name in _STANDINS[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    modules["torchvision.datasets"].__dict__["VisionDataset"] = type("VisionDataset", (), {})
    modules["torchvision.transforms.functional"].__dict__["to_tensor"] = None
    return modules
