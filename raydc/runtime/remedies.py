"""What helps against a failure of the workers, as far as its text says what it was."""

import re
from typing import Literal

_KILLED_FOR_MEMORY = re.compile(r"OutOfMemory|low on memory|MemoryError|can't allocate memory|CUDA out of memory", re.I)
_PERHAPS_MEMORY = re.compile(r"OOM killer|SIGKILL", re.I)
WorkerStage = Literal["fit", "merge", "assign"]
"""Stages that say what helps their workers; those of `raydc sweep` are the workers of fit."""

_FULL_DISK = re.compile(r"No space left on device|Disk quota exceeded|OutOfDiskError|disk is full", re.I)

_WAITED_TOO_LONG = re.compile(
    r"Timed out waiting \d+ms|Watchdog caught collective|collective operation timeout|DistStoreError.*timed? ?out", re.I
)

LESS_MEMORY: dict[WorkerStage, str] = {
    "fit": (
        "lower fit.resident_bytes (a shard that does not fit is streamed), take more fit.num_workers, or give them "
        "more memory"
    ),
    "merge": "raise merge.cpus_per_cell, so that fewer cells are merged at once, or give the workers more memory",
    "assign": (
        "lower assign.block_rows or assign.num_actors, so that fewer rows are in memory at once, or give the workers "
        "more memory"
    ),
}


def is_want_of_memory(text: str) -> bool:
    """Return whether a text says for sure that workers had too little memory."""
    return _KILLED_FOR_MEMORY.search(text) is not None


_ADVICE: list[tuple[str, str]] = [
    ("the loss is not finite", "preprocess.method=scale or standardize gives them such a scale."),
    ("Raise baseline_rows", "It is the setting evaluate.baseline_rows."),
    ("the last checkpoint is damaged", "Restore checkpoints/, or delete it and stages/fit.json to fit again."),
    ("the last checkpoint has format", "To fit again, delete checkpoints/ and stages/fit.json."),
    ("the last checkpoint was made with other settings", "Use a new --run-id."),
    ("neighbors are no rows of the fit", "Use a new --run-id."),
    ("vade.likelihood=bernoulli takes", "preprocess.method=scale with a preprocess.factor does that."),
]
"""What core's messages say, and what a run adds: core knows neither the settings around it nor the command line."""


def advice(text: str) -> str:
    """Return a message of core with the settings and options of a run that help, if there are any."""
    for beginning, sentence in _ADVICE:
        if beginning in text:
            return f"{text.rstrip('.')}. {sentence}"
    return text


def remedy(stage: WorkerStage, error: BaseException | str) -> str:
    """Return a sentence with a space before it, or nothing where the failure does not tell what would help."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    if _KILLED_FOR_MEMORY.search(text):
        return f" The memory did not suffice: {LESS_MEMORY[stage]}."
    if _FULL_DISK.search(text):
        return " A disk is full: free space where the run is written and under Ray's temporary folder."
    if stage == "fit" and _WAITED_TOO_LONG.search(text):
        return (
            " A worker waited for another one until the bound on it. "
            "Look whether a node hangs; else raise fit.cpus_per_worker, or lower cluster.init_rows, "
            "cluster.num_restarts or evaluate.baseline_rows: rank 0 makes the start of k-means alone."
        )
    if _PERHAPS_MEMORY.search(text):
        return f" If it was killed for want of memory: {LESS_MEMORY[stage]}."
    return ""
