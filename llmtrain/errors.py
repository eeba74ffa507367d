"""Errors that speak to the user.

Everything a user can cause (a wrong key, a missing file, a full disk) raises a subclass of
``LlmtrainError``; the command line prints its message in one piece and exits with its
``exit_code``, without a traceback. Mistakes of our own stay ordinary exceptions.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BAD_INPUT = 2
EXIT_GUARD = 3
EXIT_HANG = 4
EXIT_PREEMPTED = 75


class LlmtrainError(Exception):
    """Base of all errors caused by the user's input or machine. Message: one clear sentence."""

    exit_code = EXIT_BAD_INPUT


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
