"""``llmtrain COMMAND``: finds the subcommand, and turns every user's error into one sentence."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import NoReturn

import llmtrain
from llmtrain.cli.chorus import said_elsewhere
from llmtrain.errors import (
    EXIT_BAD_INPUT,
    EXIT_GUARD,
    EXIT_PREEMPTED,
    ConfigError,
    LlmtrainError,
    without_secrets,
)
from llmtrain.machine import EXIT_LOST, tell_launcher

COMMANDS = (
    "train",
    "branch",
    "continual",
    "data",
    "eval",
    "generate",
    "checkpoint",
    "convert",
    "merge",
    "compare",
    "report",
    "reproduce",
    "sparsity",
    "plan",
    "launch",
    "doctor",
)
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
TRACEBACK = "LLMTRAIN_TRACEBACK"

_OS_REMEDIES = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some of your quota or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "check the rights of the file and its folder",
    errno.EPERM: "check the rights of the file and its folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has too many files open",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another name",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CHOICE = re.compile(r"argument ([^:]+): invalid choice: '([^']*)' \(choose from (.*)\)")
# What gloo says when the process at the other end of a connection is gone.
_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe")
_EXTRAS = {
    "datasets": "pip install 'llmtrain[hf]'",
    "transformers": "pip install 'llmtrain[hf]'",
    "wandb": "pip install 'llmtrain[wandb]'",
    "mlflow": "pip install 'llmtrain[mlflow]'",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and what was probably meant."""

    def __init__(self, **options: object) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        # argparse counts arguments that may be absent (nargs="*") among the required ones.
        message = message.replace(", key=value", "")
        # argparse takes a word that begins with a minus for an option.
        message = message.replace(
            "expected one argument", "a value must follow, and none that begins with a minus"
        )
        choice = _CHOICE.match(message)
        if choice:
            name, word, known = choice.groups()
            words = re.findall(r"[\w.-]+", known)
            remedy = _nearest(word, words) or f"choose from {', '.join(words)}"
            message = f"{name}: {word!r} is not known; {remedy}"
        self.exit(EXIT_BAD_INPUT, f"llmtrain: error: {message}; see {self.prog} --help\n")
        raise AssertionError("exit returned")


def entry() -> NoReturn:
    """The installed command."""
    from llmtrain.cli.process import this_is_the_command

    this_is_the_command()
    sys.excepthook = _traceback
    code = main()
    if _several():
        # A gloo worker thread that still holds a tensor owned by Python would abort the
        # interpreter on its way out and hide the exit code. All is closed and flushed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        tell_launcher(code)
        os._exit(code)
    sys.exit(code)


def _traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """A traceback as Python prints it, without the secrets that an error may quote."""
    text = "".join(traceback.format_exception(kind, error, at))
    print(without_secrets(text), end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``llmtrain`` with ``argv`` (the process's own when None); returns the exit code.

    Errors of the user and of the machine become one sentence on stderr; mistakes of ours keep
    their traceback, and LLMTRAIN_TRACEBACK=1 shows it for all.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("llmtrain: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (as in `llmtrain ... | head`); without this Python
        # complains once more when it flushes at exit.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        sentence, code = _explain(error)
        if sentence is None or os.environ.get(TRACEBACK):
            raise
        _report(error, sentence, code)
        return code


def _dispatch(argv: list[str]) -> int:
    """Parse and run; importing only the module of the subcommand that was named."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        _print_help()
        return EXIT_BAD_INPUT if not argv else 0
    if argv[0] in ("-V", "--version"):
        print(f"llmtrain {llmtrain.__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        remedy = _nearest(name, COMMANDS) or f"the commands are {', '.join(COMMANDS)}"
        what = "option" if name.startswith("-") else "command"
        raise LlmtrainError(f"{name!r} is no {what}; {remedy}")
    module = _module(name)
    parser = Parser(prog=f"llmtrain {name}", description=f"{module.HELP}.")
    module.add_arguments(parser)
    args, extra = parser.parse_known_args(argv[1:])
    _take_overrides(parser, args, extra)
    code: int = module.run(args)
    return code


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"llmtrain.cli.{name}")


def _print_help() -> None:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{_module(name).HELP}" for name in COMMANDS]
    print(
        "usage: llmtrain COMMAND ...\n\n"
        "Pretrain, continue and evaluate language models from one YAML file.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "llmtrain COMMAND --help explains a command, llmtrain --version names the version.\n"
        "Exit codes: 0 done, 2 bad input, 3 stopped by the guard, "
        "4 ended by the watchdog, 75 preempted and saved."
    )


def _take_overrides(parser: Parser, args: argparse.Namespace, extra: list[str]) -> None:
    """Overrides behind an option, which argparse leaves over; all else is an error."""
    overrides = getattr(args, "overrides", None)
    for word in extra:
        if overrides is not None and not word.startswith("-"):
            overrides = args.overrides = [*overrides, word]
            continue
        known = [option for p in _parsers(parser) for option in p._option_string_actions]
        key = word.lstrip("-")
        if overrides is not None and "=" in key and "." in key.partition("=")[0]:
            remedy = f"overrides have no dashes: write {key}"
        else:
            remedy = _nearest(word.partition("=")[0], known) or "it is not known"
        parser.error(f"unrecognized argument {word!r}; {remedy}")


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its actions."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)


def _nearest(word: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def _explain(error: Exception) -> tuple[str | None, int]:
    """The sentence for the user and the exit code; no sentence for mistakes of our own."""
    if isinstance(error, LlmtrainError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in _EXTRAS:
            return f"this needs the package {package}: run {_EXTRAS[package]}", EXIT_BAD_INPUT
    if isinstance(error, ImportError | AttributeError):
        from llmtrain.cli.process import torch_fault

        if fault := torch_fault():
            return fault, EXIT_BAD_INPUT
    if isinstance(error, RuntimeError) and _LOST.search(str(error)) and _several():
        return "another process of this run has ended; its own message says why", EXIT_LOST
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and (cause is error or cause.errno in _FULL):
            sentence = _os_sentence(cause)
            if sentence is not None:
                return sentence, EXIT_BAD_INPUT
        cause = cause.__cause__ or cause.__context__
    return None, 1


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _os_sentence(error: OSError) -> str | None:
    """What the system refused and what helps; None where it may be a mistake of our own."""
    remedy = _OS_REMEDIES.get(error.errno or 0)
    if remedy is None or (error.filename is None and error.errno not in _FULL):
        return None
    name = error.filename
    where = f"{os.fsdecode(name) if isinstance(name, bytes) else name}: " if name else ""
    return f"{where}{(error.strerror or 'failed').lower()}; {remedy}"


def _report(error: Exception, sentence: str, code: int) -> None:
    """Print ``sentence`` on stderr, once where several processes would say the same."""
    rank = os.environ.get("RANK", "0")
    ended = code in (EXIT_GUARD, EXIT_PREEMPTED)
    if (ended and rank != "0") or (
        isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0"
    ):
        return
    # Faults of the config are found before torch is loaded, by all ranks alike.
    if _several() and not isinstance(error, ConfigError) and said_elsewhere(sentence):
        return
    who = "llmtrain" if rank == "0" else f"llmtrain: rank {rank}"
    label = {EXIT_GUARD: "stopped", EXIT_PREEMPTED: "preempted"}.get(code, "error")
    print(f"{who}: {label}: {sentence}", file=sys.stderr)
