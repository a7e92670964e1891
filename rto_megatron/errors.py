"""What the user did wrong: `__main__` prints the message alone and exits with code 2; the other exit codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER_ERROR = 2
NOT_PROVEN = 3
"""Of parity, verify-resume and verify-schedule, where a comparison fails."""
STOPPED = 75
"""Of a run that was asked to stop and can go on: EX_TEMPFAIL, "try again later"."""


class UserError(ValueError):
    """The user's config, data or files break a rule; the message names thing, rule and way out."""


class ConfigError(UserError):
    """A field of the run's config, or two of them together, break a rule."""


class DataError(UserError):
    """A data file, or a line of one, breaks a rule."""


class DecodeError(UserError):
    """Decoding and the training forward say too different things of the same tokens."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit what it is asked to be."""


class StoppedToContinue(Exception):
    """The cluster asked the run to stop; its state is saved, and the same command goes on with it."""


@contextmanager
def writing(name: str, path: Path) -> Iterator[None]:
    """Raise ConfigError with the field `name` where the block cannot write: a full disk, a folder of somebody else."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{name} {path}: cannot be written ({reason}); make room, or set another {name}") from None
