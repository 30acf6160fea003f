"""Free memory, of made files."""

from pathlib import Path

from raydc.runtime.memory import available_bytes

GIB = 2**30


def machine(root: Path, available: int) -> Path:
    """Write what the kernel says of a machine."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        f"MemTotal: {64 * 2**20} kB\nMemFree: 1024 kB\nMemAvailable: {available // 1024} kB\n"
    )
    return root


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    """Write what the kernel says of a control group."""
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


NEW = ("memory.max", "memory.current", "inactive_file")
OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_the_page_cache_counts_as_free(tmp_path):
    assert available_bytes(machine(tmp_path, 20 * GIB)) == 20 * GIB


def test_a_containers_limit_is_less_than_its_machine(tmp_path):
    root = machine(tmp_path, 20 * GIB)
    group(root / "sys/fs/cgroup", NEW, str(8 * GIB), 5 * GIB, 2 * GIB)
    assert available_bytes(root) == 5 * GIB


def test_the_older_version_of_control_groups(tmp_path):
    root = machine(tmp_path, 20 * GIB)
    group(root / "sys/fs/cgroup/memory", OLD, str(4 * GIB), 3 * GIB, 0)
    assert available_bytes(root) == GIB


def test_a_group_without_a_limit_and_one_that_is_full(tmp_path):
    root = machine(tmp_path, 20 * GIB)
    group(root / "sys/fs/cgroup", NEW, "max", 5 * GIB, 0)
    assert available_bytes(root) == 20 * GIB
    group(root / "sys/fs/cgroup/memory", OLD, str(GIB), 2 * GIB, 0)
    assert available_bytes(root) == 0


def test_this_machine_has_some(tmp_path):
    assert available_bytes() > 0
    assert available_bytes(tmp_path) > 0  # No such files: not Linux.
