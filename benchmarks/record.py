"""Where and with what a benchmark ran: every page says it."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from raydc.runfolder.folder import versions

ROOT = Path(__file__).resolve().parent.parent

# Of the code that runs: asked when the run starts, not after hours in which others may have committed.
_COMMIT = subprocess.run(
    ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
).stdout.strip()


def made() -> dict[str, Any]:
    """Return date, commit, processor, cores and versions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _COMMIT,
        "cpu": model[0] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "faiss-cpu", "ray", "numpy")},
    }
