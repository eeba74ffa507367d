"""Errors that speak to the user.

Everything a user can cause (a wrong key, a missing file, a full disk) raises a subclass of
``LlmtrainError``; the command line prints its message in one piece and exits with its
``exit_code``, without a traceback. Mistakes of our own stay ordinary exceptions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_GUARD = 3
EXIT_HANG = 4
EXIT_PREEMPTED = 75
# Names of environment variables that hold secrets, and how long these are at least: a shorter
# value, such as "false", may stand in any text.
_SECRET = re.compile(
    r"(API|ACCESS|PRIVATE|STORAGE|ACCOUNT)_?KEY|TOKEN$|SECRET|PASSW|CONNECTION_STRING|_SAS(_|$)",
    re.IGNORECASE,
)
_SECRET_LENGTH = 8


def secrets_in(text: str) -> Iterator[tuple[str, str]]:
    """Environment variables that hold a secret which stands in ``text``: name, and how it stands.

    As it is, as in an URL or as in JSON; the longest first, since one may be a part of another.
    """
    found = []
    for name, value in os.environ.items():
        if len(value) >= _SECRET_LENGTH and _SECRET.search(name):
            forms = {value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1]}
            found += [(name, form) for form in forms if form in text]
    yield from sorted(found, key=lambda one: len(one[1]), reverse=True)


def without_secrets(text: str) -> str:
    """``text`` with the names of environment variables in the place of the secrets they hold."""
    for name, value in secrets_in(text):
        text = text.replace(value, f"${name}")
    return text


class LlmtrainError(Exception):
    """Base of all errors caused by the user's input or machine. Message: one clear sentence.

    It goes to logs and metrics; secrets of the environment, which what other programs say may
    hold, are taken out.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_secrets(a) if isinstance(a, str) else a for a in args))


class ConfigError(LlmtrainError):
    """One or more faults of a configuration, all reported together."""


class DataError(LlmtrainError):
    """Data that is missing, damaged or does not fit the configuration."""


class CheckpointError(LlmtrainError):
    """A checkpoint that cannot be written, read or trusted."""


class EnvironmentFault(LlmtrainError):
    """The machine lacks what the configuration asks for (device, package, world size, disk)."""


class GuardStop(LlmtrainError):
    """Training was stopped by the guard (non-finite or spiking loss or gradient norm)."""

    exit_code = EXIT_GUARD


class Preempted(LlmtrainError):
    """A termination signal arrived; the step was finished and saved. Rerunning resumes."""

    exit_code = EXIT_PREEMPTED
