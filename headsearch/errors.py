"""One tree of errors, sorted by who can act on them.

    HeadsearchError
    +-- InputError            exit 2: the user's input; the message names the field and what would be valid
    |   +-- SpecError             a study file, a --set override or a configuration
    |   +-- DataError             a data set that is missing, empty or unreadable
    |   +-- UnknownStudyError     no study of that name in the database
    |   +-- StudyExistsError      a study of that name with another spec
    |   +-- StudyBusyError        workers are training trials of this study
    +-- WorldError            exit 1: the machine, the disk, the network, the database
    |   +-- DatabaseError         unreachable, refused, or of another version
    |   |   +-- AccessError           exit 2: the database's role may not do that; the message says who may
    |   +-- StorageError          no permission, disk full
    |   +-- ServeError            the dashboard's address cannot be used
    |   +-- ServerError           the embedded PostgreSQL could not be started or stopped
    +-- TrialFailure          one trial cannot go on; `reason` is stored with it
    +-- TrainingStopped       it was asked to, inside an epoch; its checkpoint says where it goes on
    +-- LeaseLost             another worker owns the trial now; whoever sees this tells nothing

Every message is one line. The command line prints it after ``error:`` and exits with `exit_code`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

FailureReason = Literal[
    "non_finite_loss",
    "collapsed",
    "out_of_memory",
    "unbuildable",
    "epoch_time",
    "hung",
    "lost",
    "cancelled",
    "error",
]


class HeadsearchError(Exception):
    """Anything headsearch knows how to explain in one line."""

    exit_code: ClassVar[int] = 1


class InputError(HeadsearchError):
    """What the user gave cannot be used."""

    exit_code: ClassVar[int] = 2


class SpecError(InputError):
    """A study file, an override or a configuration is not valid."""


class DataError(InputError):
    """A data set is missing, empty or too damaged to use."""


class UnknownStudyError(InputError):
    """There is no study of this name."""


class StudyExistsError(InputError):
    """A study of this name exists and asks another question."""


class StudyBusyError(InputError):
    """Workers hold leases on trials of this study."""


class WorldError(HeadsearchError):
    """The input was fine; the machine was not."""


class DatabaseError(WorldError):
    """The database cannot be reached, refuses us, or has another version.

    `transient` says whether the same call may succeed later.
    """

    def __init__(self, message: str, *, transient: bool = True) -> None:
        super().__init__(message)
        self.transient = transient


class AccessError(DatabaseError):
    """The role that the database's URL names may not do this."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=False)


class StorageError(WorldError):
    """A file or folder cannot be written or read."""


class ServeError(WorldError):
    """The dashboard cannot listen on the address it was given."""


class ServerError(WorldError):
    """The embedded PostgreSQL server did not start or stop."""


class TrialFailure(HeadsearchError):
    """This trial cannot go on.

    `reason` is a word that tables group by; the message says what happened.
    """

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason: FailureReason = reason


class TrainingStopped(HeadsearchError):
    """A training was asked to stop inside an epoch, and saved a checkpoint."""


class LeaseLost(HeadsearchError):
    """The lease on a trial went to another worker."""
