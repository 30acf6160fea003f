"""The page docs/faults.md, from the rows of docs/faults.json."""

from typing import Any

_METHOD = """
The job clusters digits (five noisy copies of each image, two bad rows in each of 24 files) with two training workers
and two actors, on two Ray nodes: a head with one CPU, on which the driver runs, and a node with two that may die. The
driver is a process of its own, `python -m raydc run`. What is killed is killed with SIGKILL: a worker process that is
first stopped and looked at, so that it dies in the middle of its work; a node with its raylet and every worker; the
driver. Bytes of input files are overwritten and mended again. S3 is a server behind a proxy that answers every request
with 503, or cuts every connection, for two seconds. A preempted node is announced to Ray, as a cloud does, three
seconds before it dies. A stopped driver gets SIGSTOP until another one has taken the run over and published it, then
SIGCONT. A second submission is made while the first driver, at the stage that is named, crawls (a few milliseconds a
second), or the stage would be over. In the elastic rows the workers crawl until Ray has noted a checkpoint, and the
lone worker is held until Ray has booked the new node.

A run whose fault comes after fit starts from a copy of the unbroken run as it was before that stage. Where fit comes
after the fault and is not the point (profile; tasks of merge, with 64 leaves), the run is k-means without a network.

*Commands* says how often the command was given until the run was published: 1 where the run lived through the fault. A
second submission is a command too; it is refused. *Labels equal*: all label rows are those of the unbroken run, in all
columns. Where a fit goes on from a checkpoint on restarted workers, sums come in another order and labels may differ in
single rows; there the bound is the accuracy, at most 0.01 below that of the unbroken run. A fault that came too late,
after the stage, does not count and is injected again.
"""

_NOT_THERE = """
Pairs that are not there: training workers exist in fit alone, actors in assign alone, and tasks in merge alone;
profile, evaluate, report and publish run in the driver (a node that dies meanwhile is in the table). Slices are read in
profile, in assign and at the start of fit: the rows stay in memory from then on, so no slice can fail in the
refinement, and merge, evaluate and publish read none. Workers are added and taken away in fit alone; elsewhere Ray
moves tasks and actors.
"""


def page(rows: list[dict[str, Any]], missing: list[str]) -> str:
    """Return docs/faults.md; `missing` names the pairs of the matrix that were not injected yet."""
    lost, doubled = sum(r["lost"] for r in rows), sum(r["duplicates"] for r in rows)
    unequal = sum(not r["labels_equal"] for r in rows if r["stage"] not in ("profile", "fit pretrain", "fit refine"))
    seconds = [r["seconds"] for r in rows]
    lines = [
        "# What a run survives",
        "",
        "Written by `python -m benchmarks faults`; the same rows are in faults.json. "
        f"**{len(rows)} injections: {lost} rows lost, {doubled} doubled, {unequal} with other labels after fit.**",
        "",
        *_METHOD.strip().splitlines(),
        "",
        f"An injection took {min(seconds):.0f} to {max(seconds):.0f} s with its whole run, on cores that were shared:",
        "",
        *_made(rows),
        "",
        "| fault | stage | rows in | labels | rejects | twice | lost | labels equal | ACC (unbroken) | commands | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = [f"{r[name]:,}" for name in ("rows_in", "labels", "rejects", "duplicates", "lost")]
        stage = r["stage"] + (f", workers {r['resizes'][0][0]}" if r.get("resizes") else "")
        stage += "".join(f" -> {b}" for _, b in r.get("resizes", []))
        equal = "yes" if r["labels_equal"] else "no"
        cells = [r["fault"], stage, *numbers, equal, f"{r['acc']:.4f} ({r['acc_unbroken']:.4f})", str(r["commands"])]
        lines.append("| " + " | ".join([*cells, f"{r['seconds']:.0f}"]) + " |")
    if missing:
        lines += ["", "Not injected yet, the same command goes on with them: " + ", ".join(missing) + "."]
    lines += ["", *_NOT_THERE.strip().splitlines(), ""]
    return "\n".join(lines)


def _made(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line for each machine, number of cores, commit and set of versions with which rows were made."""
    counts: dict[str, int] = {}
    for made in (r["made"] for r in rows):
        used = ", ".join(f"{k} {made['versions'][k]}" for k in ("python", "ray", "torch") if k in made["versions"])
        cores = f"{made['cores']} core" + "s" * (made["cores"] > 1)
        told = f"on {made['date'][:10]}, {made['cpu']}, {cores}, commit {made['commit']}, {used}"
        counts[told] = counts.get(told, 0) + 1
    return [f"- {n} of the rows {told}." for told, n in counts.items()]
