"""Errors that a person reads. The message says what is wrong, what was found, what was expected, and the way out."""

from __future__ import annotations


class OmniError(Exception):
    """Base of all errors raised on purpose; tools print its message without a traceback."""

    exit_code = 1


class InputError(OmniError):
    """The input is wrong: a file, a flag, a configuration key. Nothing was changed. Exit code 2."""

    exit_code = 2


class WorkError(OmniError):
    """The input was fine but the work failed: a damaged checkpoint, a full disk, a failed check. Exit code 1."""
