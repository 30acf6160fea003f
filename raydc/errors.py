"""The errors that raydc raises on purpose, one for each person who can act on it, and those that may pass."""


class RaydcError(Exception):
    """An expected failure: the command line prints its text without a traceback and exits with 2 (75: TryAgain)."""


class ConfigError(RaydcError):
    """The settings cannot work; the author of the config acts."""


class DataError(RaydcError):
    """The input cannot be used as it is; the owner of the data acts."""


class StageError(RaydcError):
    """A stage cannot start, continue or finish; the operator of the run acts."""


class TryAgain(StageError):
    """Nobody need act: what failed may be gone when the same command runs again. Schedulers see exit code 75."""


class StorageUnavailable(TryAgain):
    """A store gave no good answer for as long as we asked."""


class ClusterUnavailable(TryAgain):
    """The Ray cluster could not be reached, or workers and nodes were lost more often than one command bears."""


class Busy(TryAgain):
    """Somebody else is at work on the same run or table."""
