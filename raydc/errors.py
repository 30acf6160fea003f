"""The errors that raydc raises on purpose, one for each person who can act on it."""


class RaydcError(Exception):
    """An expected failure: the command line prints its text without a traceback and exits with 2."""


class ConfigError(RaydcError):
    """The settings cannot work; the author of the config acts."""


class DataError(RaydcError):
    """The input cannot be used as it is; the owner of the data acts."""


class StageError(RaydcError):
    """A stage cannot start, continue or finish; the operator of the run acts."""


class StorageUnavailable(StageError):
    """A store gave no good answer for as long as we asked; unlike other errors, it may be gone on the next try."""
