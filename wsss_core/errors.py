"""What can go wrong, by who can mend it.

Every message is one line that names the thing, the value and the next step. `conta` exits with
`exit_code`.
"""

from __future__ import annotations


class ContaError(Exception):
    """A failure that has a message for the user; anything else that escapes is a fault of ours."""

    exit_code = 1


class InputError(ContaError, ValueError):
    """Wrong use or bad input; found before compute is spent."""

    exit_code = 2


class SettingsError(InputError):
    """A recipe or `--set` holds an unknown name or a value out of range."""


class DataError(InputError):
    """A photo, tag list, mask or label file is missing, broken or contradicts another."""


class TooLargeError(DataError):
    """A photo has more pixels than it may have here."""


class BusyError(InputError):
    """Another live process holds the run."""


class StoreError(ContaError):
    """The store could not be read or written: full disk, read-only folder, damaged artifact."""


class DivergedError(ContaError):
    """Training produced a loss that is not a finite number."""
