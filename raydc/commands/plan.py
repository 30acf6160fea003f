"""What a run would cost, and whether it can work at all: `raydc run --dry-run`.

It answers within seconds, so it loads neither Ray nor what only the stages need.
"""

from pathlib import Path

from raydc.config import Config
from raydc.data.sample import profile_input
from raydc.runfolder.folder import RunDir
from raydc.runtime.assumed_cluster import read_cluster
from raydc.runtime.plan import make_plan
from raydc.storage.lake import Lake
from raydc.tables import register


def plan(config: Config, run_id: str, assume_cluster: Path | None = None) -> list[str]:
    """Return what a run would cost, as lines of text; nothing is written and no worker is started.

    Args:
        config: of the run.
        run_id: of the run.
        assume_cluster: file that describes a cluster; the lines then say what the run takes there.

    Raises:
        ConfigError, DataError, StageError: the run cannot work; all problems of a kind in one message.
    """
    cluster = None if assume_cluster is None else read_cluster(assume_cluster)
    lake = Lake(**config.storage.model_dump())
    folder = RunDir(lake, config.output, run_id)
    lake.check_writable(config.output)
    folder.check(config)
    register.check(config, folder)
    found = profile_input(config, lake)
    if config.fit.teacher is not None:
        from raydc.runfolder.teacher import load_teacher

        load_teacher(config, found.spec.dim, lake)
    made = make_plan(config, found)
    there = [] if cluster is None else cluster.lines(config, made)
    return [*made.lines(), *there, *(f"note        {note}" for note in found.notes)]
