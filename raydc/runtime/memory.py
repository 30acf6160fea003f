"""How much memory a process can still take, and what it gives back."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from raydc.core.process import release_memory

_ROOT = Path("/")


def available_bytes(root: Path = _ROOT) -> int:
    """Return what this machine can still give, or the container around this process where that is less.

    The page cache counts as free: the kernel gives it up when a program asks.

    Args:
        root: folder in which proc/ and sys/ are looked up.
    """
    return max(0, min([_of_machine(root), *_of_container(root / "sys/fs/cgroup")]))


def give_back() -> None:
    """Give back to the system what Arrow's pool and malloc keep of what was freed."""
    pa.default_memory_pool().release_unused()
    release_memory()


def _of_machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        # No Linux: the pages that nothing uses.
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_container(folder: Path) -> Iterator[int]:
    """Yield what is left under the limit of a control group of either version, where there is one."""
    versions = (
        (folder, "memory.max", "memory.current", "inactive_file"),
        (folder / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for place, limit, used, cached in versions:
        try:
            most = int((place / limit).read_text())
            taken = int((place / used).read_text())
            statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            # No such group, or "max": no limit.
            continue
        yield most - taken + int(statistics.get(cached, 0))
