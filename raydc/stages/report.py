"""report: one self-contained HTML page, and its figures as PNG files, from what the earlier stages have left.

What draws takes a second to load, so it is loaded when it is needed, or by `load_libraries` while a run waits.
"""

from typing import TYPE_CHECKING

from raydc.config import Config
from raydc.config.stages import before
from raydc.data.metrics import Metrics
from raydc.data.records import ReportMetrics
from raydc.errors import StageError
from raydc.runfolder import artifacts
from raydc.runfolder.folder import RunDir

if TYPE_CHECKING:
    from raydc.report.page import RunData

_NEEDED = (artifacts.RUN, artifacts.METRICS, artifacts.LEAF_TABLE, artifacts.LINKAGE, artifacts.LEVELS)
"""Files that the page cannot do without."""


def run(config: Config, run: RunDir) -> ReportMetrics:
    """Write report/index.html and report/*.png."""
    from raydc.report.page import build

    page = build(load(config, run))
    html = page.html.encode()
    artifacts.REPORT.remove(run)
    for name, png in page.figures.items():
        artifacts.figure(name).write(run, png)
    artifacts.PAGE.write(run, html)
    return {"figures": len(page.figures), "bytes": len(html), "leaves_shown": page.num_leaves_shown}


def load_libraries() -> None:
    """Import what the page is made with."""
    import raydc.report.page  # noqa: F401


def load(config: Config, run: RunDir) -> "RunData":
    """Return what the page is made from.

    Raises:
        StageError: a file that the page cannot do without is not there.
    """
    from raydc.report.page import RunData

    missing = [file.path for file in _NEEDED if not file.exists(run)]
    if missing:
        raise StageError(
            f"report: run {run.run_id!r} has no {', '.join(missing)}. Delete the markers of merge and evaluate under "
            f"{artifacts.STAGES.uri(run)} and run again."
        )
    metrics = artifacts.METRICS.read(run)
    return RunData(
        run_id=run.run_id,
        header=artifacts.RUN.read(run),
        metrics=metrics,
        seconds=_seconds(run, metrics),
        merges=artifacts.LINKAGE.read(run),
        levels=artifacts.LEVELS.read(run),
        leaves=artifacts.LEAF_TABLE.read(run).sort_by("leaf"),
        exemplars=artifacts.EXEMPLARS.read_if_there(run),
        map_rows=artifacts.MAP_ROWS.read_if_there(run),
        image_shape=config.input.image_shape,
        tolerance=config.refine.tolerance if config.refines else None,
        seed=config.seed,
    )


def _seconds(run: RunDir, metrics: Metrics) -> dict[str, float]:
    """Return the seconds of the stages before this one: a page that counted itself would change with every rerun."""
    written = metrics.get("stages") or {}
    found: dict[str, float] = {}
    for stage in before("report"):
        marker = run.marker(stage)
        if marker is not None and "seconds" in marker:
            found[stage] = float(marker["seconds"])
        elif stage in written:
            found[stage] = float(written[stage]["seconds"])
    return found
