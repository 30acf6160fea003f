"""`raydc compare`: objectives and classical methods on the same sample of rows, seeds side by side.

The sample is chosen by hash of the row key and read into this process, because several of the classical methods need
the distances of all pairs. The objectives are fitted by the core of a run, in this process and without Ray; those of a
seed go on from the same pretrained autoencoder.
"""

import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydc.config import Config, parse_config
from raydc.core.api import Pretrained, fit_array, pretrain_array
from raydc.core.baselines import DETERMINISTIC, METHODS
from raydc.core.hashing import sample_mask, stream_seed
from raydc.core.metrics import scores as metrics
from raydc.core.metrics.choose_k import calinski_harabasz
from raydc.core.metrics.neighbor_agreement import Neighbors, agreement, nearest_neighbors
from raydc.core.metrics.partition_stats import Tally
from raydc.core.models.preprocess import Preprocess
from raydc.core.process import prepare_process
from raydc.core.search.nearest import own_and_other
from raydc.data.columns import class_names
from raydc.data.reader import read_slice
from raydc.data.sample import profile_input
from raydc.errors import ConfigError, DataError, StageError
from raydc.pipeline import make_lake
from raydc.runfolder import artifacts
from raydc.runfolder.folder import check_output
from raydc.runfolder.formats import Place
from raydc.runtime.remedies import advice
from raydc.storage.lake import absolute

log = logging.getLogger(__name__)

# By these a comparison's files are known.
_KEYS = {"rows", "input_rows", "num_leaves", "entries"}
_HEADING = "# Comparison\n\n"

_SCORES = ("acc", "nmi", "ari", "neighbors", "silhouette", "davies_bouldin", "calinski_harabasz")


def run(config: Config, objectives: Sequence[str], classical: Sequence[str], seeds: Sequence[int], rows: int) -> str:
    """Write compare.json and compare.md into the output folder and return the page.

    Args:
        config: of the input, the preprocessing and the objectives.
        objectives: values of fit.objective.
        classical: names of raydc.core.baselines.METHODS.
        seeds: one run of each method per seed; methods without randomness run once.
        rows: size of the sample, about; all rows where there are no more.

    Raises:
        ConfigError, DataError: before anything is fitted.
    """
    check(config)
    unknown = sorted(set(classical) - set(METHODS))
    if unknown:
        raise ConfigError(f"--classical {', '.join(unknown)}: not known. Choose from {', '.join(METHODS)}.")
    configs = {name: _with_objective(config, name) for name in objectives}
    prepare_process(config.fit.cpus_per_worker)
    sample, total = _read(config, rows)
    num_rows, num_leaves, classes = len(sample.keys), config.cluster.num_leaves, sample.classes
    if num_rows < num_leaves:
        raise ConfigError(
            f"--rows {rows}: {num_rows} rows for cluster.num_leaves={num_leaves}. Raise --rows, or lower num_leaves."
        )
    x = torch.cat([sample.preprocess(block) for block in torch.from_numpy(sample.x).split(8192)]).numpy()
    evaluate = config.evaluate
    near = nearest_neighbors(x, num=evaluate.num_neighbors, max_queries=evaluate.neighbor_queries)
    entries: list[dict[str, Any]] = []

    def note(method: str, seed: int | None, groups: npt.NDArray[np.int64], seconds: float, parameters: str) -> None:
        entry = {"method": method, "seed": seed, "rows": len(x), "seconds": round(seconds, 2), "parameters": parameters}
        entries.append(entry | _scores(x, groups, classes, near))
        log.info("compare: %s, seed %s: done in %.1f s", method, seed, seconds)

    for seed in seeds:
        for method, groups, seconds in _fitted(configs, sample, seed):
            note(method, seed, groups, seconds, "by the settings")
    for name in classical:
        for seed in seeds if name not in DETERMINISTIC else seeds[:1]:
            started = time.perf_counter()
            found = METHODS[name](x, config.cluster.num_leaves, seed)
            shown = None if name in DETERMINISTIC else seed
            # scikit-learn's k-means is another method than our own.
            method = f"{name} (scikit-learn)" if name in objectives else name
            note(method, shown, found.groups_N, time.perf_counter() - started, found.parameters)
    body = {"rows": len(x), "input_rows": total, "num_leaves": config.cluster.num_leaves, "entries": entries}
    check(config)
    folder = Place(make_lake(config), absolute(config.output))
    artifacts.COMPARISON.write(folder, body)
    page = "\n".join(_page(body)) + "\n"
    artifacts.COMPARISON_PAGE.write(folder, page.encode())
    return page


def check(config: Config) -> None:
    """Return if compare.json and compare.md may be written into the output folder: before anything is read.

    Raises:
        ConfigError: the input and the output lie within one another.
        StageError: a file of such a name is there that is none of a comparison.
    """
    check_output(config)
    folder = Place(make_lake(config), absolute(config.output))
    names = {artifacts.COMPARISON.path, artifacts.COMPARISON_PAGE.path} & set(folder.lake.names(folder.root))
    # The page is written last, so it never stands alone.
    if names and not (_is_ours(folder) and (len(names) == 1 or _is_page(folder))):
        raise StageError(
            f"compare: {folder.root} holds {' and '.join(sorted(names))}, not written by a comparison. Nothing was "
            "touched. Use another output, or move what is there to another place."
        )


def _is_ours(folder: Place) -> bool:
    try:
        body = artifacts.COMPARISON.read(folder)
    except (FileNotFoundError, IsADirectoryError, DataError):
        return False
    return isinstance(body, dict) and body.keys() >= _KEYS


def _is_page(folder: Place) -> bool:
    try:
        return artifacts.COMPARISON_PAGE.read(folder).startswith(_HEADING.encode())
    except IsADirectoryError:
        return False


def _with_objective(config: Config, name: str) -> Config:
    values = json.loads(config.model_dump_json())
    values["fit"]["objective"] = name
    return parse_config(values)


@dataclass(frozen=True)
class _Sample:
    """Some rows of the input, in the order of their keys."""

    x: npt.NDArray[Any]
    """(N, D) raw rows."""

    keys: npt.NDArray[np.int64]
    """(N,) their places in the input."""

    classes: npt.NDArray[np.str_] | None
    """(N,) known classes, where there is a label column."""

    preprocess: Preprocess


def _read(config: Config, wanted: int) -> tuple[_Sample, int]:
    """Return a sample of about so many rows, by hash of the row key, and the number of all rows."""
    lake = make_lake(config)
    profile = profile_input(config, lake)
    rows, keys, classes = [], [], []
    # Slices and rows come in the order of their keys.
    for part in profile.slices:
        for batch in read_slice(lake, part, profile.spec, with_labels=True):
            chosen = sample_mask(batch.keys, stream_seed(config.seed, 14), wanted / profile.num_rows)
            rows.append(batch.x[chosen])
            keys.append(batch.keys[chosen])
            names = class_names(batch.labels)
            if names is not None:
                classes.append(names[chosen])
    if not sum(len(k) for k in keys):
        raise DataError(f"compare: the sample of about {wanted} rows is empty. Raise --rows.")
    known = np.concatenate(classes) if classes else None
    sample = _Sample(np.concatenate(rows), np.concatenate(keys), known, profile.preprocess(config))
    return sample, profile.num_rows


def _fitted(configs: dict[str, Config], sample: _Sample, seed: int) -> list[tuple[str, npt.NDArray[np.int64], float]]:
    """Return (objective, group of each row, seconds with the pretraining) of each objective."""
    fits = []
    shared: tuple[Pretrained, float] | None = None
    for name, config in configs.items():
        settings = config.fit_settings("")
        started, before = time.perf_counter(), 0.0
        rows: dict[str, Any] = {
            "x": sample.x,
            "keys": sample.keys,
            "preprocess": sample.preprocess,
            "settings": settings,
            "seed": seed,
        }
        try:
            if settings.learns and shared is None:
                shared = pretrain_array(**rows), time.perf_counter() - started
            elif settings.learns and shared is not None:
                before = shared[1]
            result = fit_array(
                **rows,
                num_clusters=config.cluster.num_leaves,
                objective=name,
                pretrained=shared[0] if shared is not None else None,
                num_neighbors=config.neighbors.num,
                neighbor_metric=config.neighbors.metric,
            )
        except ValueError as error:
            raise ConfigError(f"compare: {name}: {advice(str(error))}") from None
        fits.append((name, result.labels, before + time.perf_counter() - started))
    return fits


def _scores(
    x: npt.NDArray[np.float32],
    groups_N: npt.NDArray[np.int64],
    classes: npt.NDArray[np.str_] | None,
    near: Neighbors,
) -> dict[str, Any]:
    """Return the scores of a partition; noise is counted, and is one group more."""
    names, place = np.unique(groups_N, return_inverse=True)
    noise = int((groups_N == -1).sum())
    rows, ids = torch.from_numpy(x), torch.from_numpy(place)
    sizes = torch.bincount(ids).double()
    centers = (torch.zeros(len(names), x.shape[1], dtype=torch.float64).index_add_(0, ids, rows.double())) / sizes[
        :, None
    ]
    tally = Tally(num_groups=len(names))
    for block in torch.arange(len(rows)).split(8192):
        own, other = own_and_other(rows[block], centers.float(), ids[block])
        tally.add(place[block.numpy()], own.numpy(), other.numpy(), None if classes is None else classes[block.numpy()])
    table, known = tally.classes.table()
    inside = metrics.internal(tally, centers.numpy()) if len(names) > 1 else {}
    return {
        **({k: v for k, v in metrics.external(table).items() if k in _SCORES} if known else {}),
        "neighbors": agreement(place, near).score,
        "silhouette": inside.get("silhouette"),
        "davies_bouldin": inside.get("davies_bouldin"),
        "calinski_harabasz": calinski_harabasz(tally, centers.numpy()),
        "groups": len(names) - bool(noise),
        "noise": noise,
    }


def _page(body: dict[str, Any]) -> list[str]:
    entries = body["entries"]
    shown = [key for key in _SCORES if any(e.get(key) is not None for e in entries)]
    methods = list(dict.fromkeys(e["method"] for e in entries))
    seeds = list(dict.fromkeys(e["seed"] for e in entries if e["seed"] is not None))
    head = ["method", "rows", "seeds", *shown, "groups", "noise rows", "seconds"]
    lines = [
        *_HEADING.splitlines(),
        f"On {body['rows']:,} of {body['input_rows']:,} rows, chosen by hash of the row key; {body['num_leaves']} "
        "groups were asked for. Means over the seeds. Silhouette, Davies-Bouldin and Calinski-Harabasz are measured "
        "among the preprocessed rows, where k-means is at home; neighbors: agreement with nearest neighbors, "
        "corrected for chance. Noise rows count as one group more in every score.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for method in methods:
        own = [e for e in entries if e["method"] == method]
        cells = [_mean([e.get(key) for e in own]) for key in (*shown, "groups", "noise", "seconds")]
        lines.append("| " + " | ".join([method, f"{own[0]['rows']:,}", str(len(own)), *cells]) + " |")
    main = "nmi" if "nmi" in shown else "neighbors"
    lines += ["", "| " + " | ".join([f"method, {main}", *(f"seed {s}" for s in seeds)]) + " |"]
    lines.append("|---" * (1 + len(seeds)) + "|")
    for method in methods:
        by_seed = {e["seed"]: e for e in entries if e["method"] == method}
        cells = [_mean([by_seed.get(s, by_seed.get(None, {})).get(main)]) for s in seeds]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    lines.append("")
    for method in methods:
        lines.append(f"- {method}: {next(e['parameters'] for e in entries if e['method'] == method)}")
    return lines


def _mean(values: Sequence[float | None]) -> str:
    found = [v for v in values if v is not None]
    return f"{statistics.fmean(found):.4g}" if found else "-"
