"""report: one self-contained HTML page, and its figures as PNG files, from what the earlier stages have left.

What draws takes a second to load, so it is loaded when it is needed, or by `load_libraries` while a run waits.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.config import Config
from raydc.config.stages import before
from raydc.errors import StageError
from raydc.runfolder.folder import RunDir

if TYPE_CHECKING:
    from raydc.report.page import RunData

_LEVEL_PREFIX = "level_"


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write report/index.html and report/*.png."""
    from raydc.report.page import build

    page = build(load(config, run))
    html = page.html.encode()
    run.lake.remove(run.uri("report"))
    for name, png in page.figures.items():
        run.lake.write_bytes(run.uri("report", f"{name}.png"), png)
    run.lake.write_bytes(run.uri("report", "index.html"), html)
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

    needed = ("run.json", "metrics.json", "leaves.parquet", "tree/linkage.npy", "tree/levels.parquet")
    missing = [name for name in needed if not run.lake.exists(run.uri(name))]
    if missing:
        raise StageError(
            f"report: run {run.run_id!r} has no {', '.join(missing)}. Delete the markers of merge and evaluate under "
            f"{run.uri('stages')} and run again."
        )
    header = run.lake.read_json(run.uri("run.json"))
    metrics = run.lake.read_json(run.uri("metrics.json"))
    levels = _table(run, "tree/levels.parquet").sort_by("leaf")
    groups = {
        int(name.removeprefix(_LEVEL_PREFIX)): levels[name].to_numpy().astype(np.int64)
        for name in levels.column_names
        if name.startswith(_LEVEL_PREFIX)
    }
    return RunData(
        run_id=run.run_id,
        header=header,
        metrics=metrics,
        seconds=_seconds(run, metrics),
        merges=run.lake.read_array(run.uri("tree/linkage.npy")),
        levels=dict(sorted(groups.items())),
        leaves=_table(run, "leaves.parquet").sort_by("leaf"),
        exemplars=_table_if_there(run, "exemplars.parquet"),
        map_rows=_table_if_there(run, "map_rows.parquet"),
        image_shape=config.input.image_shape,
        tolerance=config.refine.tolerance if config.refines else None,
        seed=config.seed,
    )


def _seconds(run: RunDir, metrics: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of the stages before this one: a page that counted itself would change with every rerun."""
    written = metrics.get("stages") or {}
    found: dict[str, float] = {}
    for stage in before("report"):
        seconds = (run.marker(stage) or {}).get("seconds", (written.get(stage) or {}).get("seconds"))
        if seconds is not None:
            found[stage] = float(seconds)
    return found


def _table(run: RunDir, name: str) -> pa.Table:
    with run.lake.open_parquet(run.uri(name)) as handle:
        return pq.read_table(handle)


def _table_if_there(run: RunDir, name: str) -> pa.Table | None:
    return _table(run, name) if run.lake.exists(run.uri(name)) else None
