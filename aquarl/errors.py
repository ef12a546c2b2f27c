"""Exceptions whose message is written for the person at the terminal.

Every message says what is so, why it cannot work, and what to type instead. `cli.main` prints that
sentence alone and exits with status 2; a traceback means a bug in aquarl.
"""


class AquarlError(Exception):
    """Something the user can mend. The message is the whole story."""


class ConfigError(AquarlError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(AquarlError):
    """A data file is missing, broken, or does not hold what its task needs."""


class CheckpointError(AquarlError):
    """A checkpoint is missing, incomplete, damaged, or of another shape."""


class StorageError(AquarlError):
    """A place to write to is full, away or forbidden. What stood there before still stands."""


class DivergedError(AquarlError):
    """Training has left the numbers."""


class ClusterError(AquarlError):
    """Ray, a worker, or the machine cannot do what was asked of it."""
