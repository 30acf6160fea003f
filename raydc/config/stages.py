"""The stages of a run in their order, and the sections of settings that decide each: the ONE list of stages.

It stands at the bottom, because the settings, the files of a run, the pipeline and the commands all read it.
"""

from typing import Literal, get_args

StageName = Literal["profile", "neighbors", "fit", "merge", "assign", "evaluate", "report", "publish"]

STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)

SECTIONS_OF_STAGE: dict[StageName, tuple[str, ...]] = {
    "profile": ("input", "preprocess"),
    "neighbors": ("neighbors",),
    "fit": ("seed", "autoencoder", "pretrain", "cluster", "fit", "refine", "vade", "distill", "head", "evaluate"),
    "merge": ("merge",),
    "assign": ("assign",),
    "evaluate": (),
    "report": (),
    "publish": ("publish",),
}
assert tuple(SECTIONS_OF_STAGE) == STAGE_NAMES


def up_to(stage: StageName) -> tuple[StageName, ...]:
    """Return a stage and those before it: their settings decide its result."""
    return STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]


def before(stage: StageName) -> tuple[StageName, ...]:
    """Return the stages before one."""
    return STAGE_NAMES[: STAGE_NAMES.index(stage)]


def after(stage: StageName) -> tuple[StageName, ...]:
    """Return the stages after one: they rest on what it writes."""
    return STAGE_NAMES[STAGE_NAMES.index(stage) + 1 :]
