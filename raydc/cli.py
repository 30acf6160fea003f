"""The `raydc` command: run, resume, sweep, compare, assign, evaluate, show, tree, demo."""

import argparse
import datetime
import gc
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from raydc.commands.supervise import EXIT_TRY_AGAIN, supervised
from raydc.config import Config, load_config, parse_config
from raydc.errors import ConfigError, RaydcError, StageError, TryAgain
from raydc.storage.lake import Lake, absolute, join
from raydc.storage.secrets import masked

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130

MOST_RETRIES = 100

TREE_FORMATS = ("newick", "json", "edges", "topics", "condensed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit; docs/operations.md lists the codes.

    0 done, 2 an expected failure that lasts, 75 one that may pass (each one message), 130 interrupted, 143 on SIGTERM.
    """
    options = _parser().parse_args(arguments)
    set_up_logging(sys.stdout)
    try:
        if getattr(options, "retries", 0):
            sys.exit(_supervised(options, sys.argv[1:] if arguments is None else arguments))
        options.command(options)
    except TryAgain as error:
        print(masked(f"{type(error).__name__}: {error}"), file=sys.stderr)
        sys.exit(EXIT_TRY_AGAIN)
    except RaydcError as error:
        print(masked(f"{type(error).__name__}: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. The same command with the same --run-id continues.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        if arguments is None:
            # The process ends here, and Python would look for cycles in all that torch and Ray have loaded: a second.
            gc.freeze()


def set_up_logging(stream: TextIO) -> None:
    """Send log lines to a stream: as they are to a terminal, elsewhere with time (UTC) and level before them."""
    before = "" if stream.isatty() else "%(asctime)s %(levelname)s "
    lines = logging.Formatter(f"{before}%(message)s", "%Y-%m-%dT%H:%M:%SZ")
    lines.converter = time.gmtime
    handler = logging.StreamHandler(stream)
    handler.setFormatter(lines)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("faiss", "fsspec", "botocore", "ray", "py.warnings"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _supervised(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the command in a process of its own, and again after a failure that may pass."""
    # The last of two counts.
    fixed = [*arguments, "--retries", "0"]
    if options.command is _run and options.run_id is None and not options.dry_run:
        fixed += ["--run-id", _new_run_id()]
    return supervised(fixed, options.retries)


def _retries(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MOST_RETRIES:
        raise argparse.ArgumentTypeError(f"expected 0 to {MOST_RETRIES}")
    return value


def _add_retries(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retries",
        type=_retries,
        default=0,
        metavar="N",
        help="try again up to N times after exit code 75 (default: 0)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `raydc run`, which jobs share."""
    parser.add_argument("--config", metavar="FILE", help="YAML settings, see jobs/; --set alone does too")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as cluster.num_leaves=10"
    )
    parser.add_argument("--run-id", help="name of the run folder; the same one continues an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="check the settings and the input, print the plan, stop")
    _add_retries(parser)
    parser.add_argument("--assume-cluster", metavar="FILE", help="with --dry-run: plan for the nodes in this YAML file")
    parser.set_defaults(command=_run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raydc", description="Deep clustering of sharded embeddings on Ray.")
    parser.add_argument("--version", action="version", version=f"raydc {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_run_arguments(commands.add_parser("run", help="cluster a data set: labels, tree, model, report"))

    resume = commands.add_parser("resume", help="continue a run with the settings in its folder, after any death")
    resume.add_argument("run", metavar="RUN", help="run folder")
    resume.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other workers, memory, ...")
    _add_retries(resume)
    resume.set_defaults(command=_resume)

    _add_comparisons(commands)

    assign = commands.add_parser("assign", help="label new data with the model of a finished run")
    assign.add_argument("--model", required=True, metavar="URI", help="a run folder, or its model/")
    assign.add_argument("--input", required=True, metavar="URI", help="Parquet files with the columns of the model")
    assign.add_argument("--output", required=True, metavar="URI", help="folder for labels/ and rejects/")
    assign.add_argument("--id-column", default="id")
    assign.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings, as for run")
    assign.set_defaults(command=_assign)

    evaluate = commands.add_parser("evaluate", help="compute metrics.json of a run again from its statistics")
    evaluate.add_argument("run", metavar="RUN", help="run folder")
    _add_storage_argument(evaluate)
    evaluate.set_defaults(command=_evaluate)

    show = commands.add_parser("show", help="say where a run stands, and its results")
    show.add_argument("run", metavar="RUN", help="run folder")
    _add_storage_argument(show)
    show.set_defaults(command=_show)

    tree = commands.add_parser("tree", help="cut the tree of a run, or write it for other programs")
    tree.add_argument("run", metavar="RUN", help="run folder")
    what = tree.add_mutually_exclusive_group(required=True)
    what.add_argument("--cut", type=int, metavar="K", help="the group of each leaf in a cut into K groups, as CSV")
    what.add_argument("--export", choices=TREE_FORMATS, help="write the whole tree in a format")
    tree.add_argument("--output", metavar="FILE", help="path or URI; standard output by default. A cut may be .parquet")
    tree.add_argument("--min-rows", type=float, metavar="N", help="condensed: rows of a cluster (default: 1 %% of all)")
    tree.add_argument("--max-nodes", type=int, default=5000, metavar="N", help="json: most nodes (default: 5000)")
    _add_storage_argument(tree)
    tree.set_defaults(command=_tree)

    demo = commands.add_parser("demo", help="cluster scikit-learn's digits, end to end, into runs/demo")
    demo.add_argument("--output", default="runs")
    demo.set_defaults(command=_demo)
    return parser


def _add_comparisons(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="compare numbers of leaves and recommend one")
    sweep.add_argument("--config", metavar="FILE", help="YAML settings, as for run")
    sweep.add_argument("--k", required=True, metavar="NUMBERS", help="FIRST:LAST:STEP, or a list such as 5,8,10")
    sweep.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as fit.max_rows=20000"
    )
    sweep.add_argument("--run-id", help="name of the folder; the same one continues an interrupted sweep")
    sweep.set_defaults(command=_sweep)

    compare = commands.add_parser("compare", help="objectives and classical methods side by side, on a sample")
    compare.add_argument("config", metavar="CONFIG", help="YAML settings, as for run")
    compare.add_argument("--seeds", default="0", metavar="LIST", help="such as 0,1,2 (default: 0)")
    compare.add_argument("--objectives", default="dec,idec", metavar="LIST", help="default: dec,idec; may be empty")
    compare.add_argument(
        "--classical",
        default="kmeans,minibatch_kmeans,gmm,dbscan,hdbscan,agglomerative,spectral",
        metavar="LIST",
        help="default: all of them; may be empty",
    )
    compare.add_argument("--rows", type=int, default=5000, metavar="N", help="size of the sample (default: 5000)")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="other settings, as for run")
    compare.set_defaults(command=_compare)


def _version() -> str:
    try:
        return metadata.version("raydc")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _add_storage_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="how to reach the run, as storage.endpoint_url=URL",
    )


def _run(options: argparse.Namespace) -> None:
    if options.config is None and not any(o.startswith("input.path=") for o in options.set):
        raise ConfigError("raydc run: give --config FILE, or at least --set input.path=FOLDER.")
    if options.assume_cluster and not options.dry_run:
        raise ConfigError("raydc run: --assume-cluster plans and runs nothing. Add --dry-run, or leave it out.")
    config = load_config(options.config, options.set)
    assumed = Path(options.assume_cluster) if options.assume_cluster else None
    _execute(config, options.run_id, dry_run=options.dry_run, assume_cluster=assumed)


def _new_run_id() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")


def _execute(config: Config, run_id: str | None, *, dry_run: bool = False, assume_cluster: Path | None = None) -> None:
    run_id = _new_run_id() if run_id is None else run_id
    with _loading():
        from raydc.commands import demo
    if dry_run:
        with _loading():
            from raydc.commands.plan import plan

        config = demo.with_data(config, partial(_check_folder, run_id=run_id))
        for line in plan(config, run_id, assume_cluster):
            print(line)
        return
    with _loading():
        from raydc import pipeline
        from raydc.commands import show as summary

    config = demo.with_data(config, partial(_check_folder, run_id=run_id))
    log.debug("settings: %s", config.model_dump(mode="json"))
    try:
        folder = pipeline.run(config, run_id)
    except KeyboardInterrupt:
        place = join(absolute(config.output), run_id)
        print(f"Interrupted. `raydc resume {place}` continues, and so does the same command with --run-id {run_id}.",
              file=sys.stderr)  # fmt: skip
        sys.exit(EXIT_INTERRUPTED)
    print()
    print("\n".join(summary.lines(folder)))


def _check_folder(config: Config, run_id: str) -> None:
    from raydc.runfolder.folder import RunDir

    RunDir(Lake(**config.storage.model_dump()), config.output, run_id).check(config)


def _resume(options: argparse.Namespace) -> None:
    with _loading():
        from raydc import pipeline
        from raydc.commands import show as summary

    folder, config = _open_run(options.run, [o for o in options.set if o.startswith("storage.")])
    output = folder.root.removesuffix(f"/{folder.run_id}")
    config = _with_overrides(config.model_dump(mode="json") | {"output": output}, options.set)
    print("\n".join(["", *summary.lines(pipeline.run(config, folder.run_id))]))


def _sweep(options: argparse.Namespace) -> None:
    with _loading():
        from raydc import pipeline
        from raydc.commands import demo, sweep

    numbers = sweep.parse_numbers(options.k)
    run_id = options.run_id
    if run_id is None:
        run_id = datetime.datetime.now(datetime.UTC).strftime("sweep-%Y%m%d-%H%M%S")
    check = partial(pipeline.check, run_id=run_id, kind="sweep")
    config = demo.with_data(load_config(options.config, options.set), check)
    log.info("sweep %s in %s", run_id, join(absolute(config.output), run_id))
    folder = sweep.run(config, run_id, numbers)
    print()
    print("\n".join(sweep.lines(folder)))


def _compare(options: argparse.Namespace) -> None:
    with _loading():
        from raydc.commands import compare, demo

    try:
        seeds = [int(seed) for seed in _names(options.seeds)]
    except ValueError:
        raise ConfigError(f"--seeds {options.seeds}: expected whole numbers, such as 0,1,2.") from None
    objectives, classical = _names(options.objectives), _names(options.classical)
    if not seeds or not (objectives or classical) or options.rows < 1:
        raise ConfigError("compare: give at least one seed, one method and one row.")
    config = demo.with_data(load_config(options.config, options.set), compare.check)
    print("\n" + compare.run(config, objectives, classical, seeds, options.rows))


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _assign(options: argparse.Namespace) -> None:
    with _loading():
        from raydc.commands import assign as labels

    base = {"input": {"path": options.input, "id_column": options.id_column}}
    config = _with_overrides(base, options.set)
    counts = labels.label_new_rows(config, options.model, options.output)
    log.info("assign: %d rows in, %d labels, %d rejects in %s", *counts, absolute(options.output))


def _evaluate(options: argparse.Namespace) -> None:
    from raydc.commands import show as summary
    from raydc.runfolder.folder import RUN_KIND
    from raydc.stages import evaluate

    folder, config = _open_run(options.run, options.set)
    # Its files are written anew, so they must be of this format.
    folder.header(RUN_KIND)
    evaluate.run(config, folder)
    print("\n".join(summary.lines(folder)))


def _show(options: argparse.Namespace) -> None:
    from raydc.commands import show as summary

    folder, _ = _open_run(options.run, options.set)
    print("\n".join(summary.lines(folder)))


def _tree(options: argparse.Namespace) -> None:
    from raydc.commands import tree as trees

    folder, _ = _open_run(options.run, options.set)
    tree = trees.read(folder)
    table = trees.groups(tree, options.cut) if options.cut is not None else None

    def write(path: Path) -> None:
        if table is not None:
            trees.write_groups(table, path, parquet=(options.output or "").endswith(".parquet"))
        else:
            trees.export(tree, options.export, path, min_rows=options.min_rows, max_nodes=options.max_nodes)

    if options.output:
        with folder.lake.staged(absolute(options.output)) as path:
            write(path)
        log.info("tree: %s", absolute(options.output))
        return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tree"
        write(path)
        sys.stdout.write(path.read_text(encoding="utf-8"))


def _demo(options: argparse.Namespace) -> None:
    jobs = Path(__file__).resolve().parent.parent / "jobs"
    _execute(load_config(jobs / "digits.yaml", [f"output={options.output}"]), "demo")


@contextmanager
def _loading() -> Iterator[None]:
    """Load modules without looking for cycles meanwhile, of which there are none: a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _open_run(uri: str, overrides: Sequence[str]) -> tuple[Any, Config]:
    from raydc.config import apply_override
    from raydc.runfolder import artifacts
    from raydc.runfolder.folder import RunDir

    settings: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith("storage."):
            raise ConfigError(f"--set {masked(override)}: a finished run takes storage settings alone.")
        apply_override(settings, override)
    # The run itself says how it was made, but not from where it is looked at.
    door = parse_config({"input": {"path": ""}, **settings}).storage
    output, _, run_id = absolute(uri).rstrip("/").rpartition("/")
    folder = RunDir(Lake(**door.model_dump()), output, run_id)
    if not artifacts.RUN.exists(folder) or (header := folder.header()) is None:
        raise StageError(f"{uri}: no run there. Give the folder <output>/<run_id> of a run.")
    with warnings.catch_warnings():
        # What a run wrote down long ago is not for its reader to rename.
        warnings.simplefilter("ignore", FutureWarning)
        return folder, parse_config(header["config"] | settings)


def _with_overrides(base: dict[str, Any], overrides: Sequence[str]) -> Config:
    from raydc.config import apply_override

    for override in overrides:
        apply_override(base, override)
    return parse_config(base)
