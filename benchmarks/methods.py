"""Every method on labeled data, over seeds, by the settings of jobs/; and DEC on classes of unequal size.

The fit is the job's own (raydc.core.api.fit_array) in one process without Ray. Methods that start from the same
pretrained autoencoder share its checkpoint below build/benchmarks/methods/, so their rows differ by the method alone;
the seconds of a method are those of its pretraining and its own. A fit whose settings and input stand in
docs/methods.json already is not done again. docs/methods.md and docs/methods.json are written after every fit.
"""

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.methods_page import page
from benchmarks.record import ROOT, made
from raydc.commands.demo import write_digits
from raydc.config import Config, FitConfig, digest, dump, load_config
from raydc.core.api import Pretrained, fit_array, pretrain_array
from raydc.core.hashing import stream_seed, uniform
from raydc.core.metrics import scores as metrics
from raydc.core.models.preprocess import Preprocess
from raydc.core.process import prepare_process
from raydc.core.training import checkpoint
from raydc.core.training.settings import FitSettings
from raydc.data.columns import class_names
from raydc.data.reader import read_slice
from raydc.data.sample import profile_input
from raydc.storage.lake import Lake

BUILD = ROOT / "build" / "benchmarks" / "methods"
BOOK = ROOT / "docs" / "methods.json"

METHODS: dict[str, list[str]] = {
    "raw_kmeans": ["fit.objective=kmeans", "cluster.space=codes"],
    "autoencoder_kmeans": ["fit.objective=autoencoder"],
    "sae_kmeans": ["fit.objective=autoencoder", "pretrain.layerwise=true"],
    "dec": ["fit.objective=dec"],
    "dec_layerwise": ["fit.objective=dec", "pretrain.layerwise=true"],
    "idec": ["fit.objective=idec"],
    "dcn": ["fit.objective=dcn"],
    "vade": ["fit.objective=vade", "refine.max_grad_norm=null"],
    "distillation": ["fit.objective=distill", "distill.temperature=1.0"],
}
"""What each method sets beside the settings of the job."""

OWN: dict[tuple[str, str], list[str]] = {
    ("mnist", "vade"): ["vade.likelihood=bernoulli", "refine.num_epochs=60", "refine.learning_rate=2.0e-3"],
    ("digits", "vade"): ["vade.kl_weight=20", "refine.num_epochs=25", "refine.learning_rate=1.0e-3"],
    ("mnist", "dcn"): ["refine.num_epochs=10"],
    ("mnist", "distillation"): ["refine.num_epochs=5", "refine.learning_rate=1.0e-3"],
    ("digits", "distillation"): ["refine.num_epochs=8"],
}
"""What a method sets on one data set beside that, where the settings of the job are made for DEC."""

IMBALANCED = ("autoencoder_kmeans", "dec")
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Labeled rows in memory."""

    name: str
    x_ND: npt.NDArray[Any]
    """(N, D) raw rows."""

    keys_N: npt.NDArray[np.int64]
    """(N,) their places in the input, rising."""

    classes: npt.NDArray[np.str_]
    """(N,) in the order of the rows."""

    preprocess: Preprocess
    fingerprint: str


def main(options: argparse.Namespace) -> None:
    """Run the methods that are asked for on digits, and on MNIST where its folder is given."""
    prepare_process(len(os.sched_getaffinity(0)))
    methods = options.methods or list(METHODS)
    for name in options.data or ["digits", "mnist"]:
        if name == "mnist" and not options.mnist:
            print("methods on MNIST skipped: give its folder with --mnist or RAYDC_MNIST")
            continue
        folder = Path(options.mnist) if name == "mnist" else write_digits(BUILD / "input-digits")
        if not options.imbalance:
            run(name, folder, options.seeds, methods)
        elif name == "mnist":
            for share in SHARES:
                run(name, folder, options.seeds, options.methods or IMBALANCED, smallest_share=share)


def run(
    name: str, folder: Path, seeds: list[int], methods: list[str] | tuple[str, ...], smallest_share: float = 1.0
) -> None:
    """Fit every method and seed that is not in the book, and write the page after each.

    Args:
        name: of a file in jobs/.
        folder: the rows as Parquet.
        seeds: of the fits.
        methods: keys of METHODS.
        smallest_share: share of the rows of the first class that is kept, see `imbalanced`.
    """
    configs = {method: config_of(name, folder, method) for method in methods}
    data = _read(name, next(iter(configs.values())), smallest_share)
    for seed in seeds:
        for method, plain in configs.items():
            config = plain.model_copy(update={"seed": seed})
            settings = fit_fingerprint(config, data.fingerprint)
            if any(e.get("settings") == settings and e["method"] == method for e in _entries()):
                continue
            entry = {"data": data.name, "method": method, "seed": seed, **measure(data, config), "settings": settings}
            print(json.dumps(entry), flush=True)
            record(entry)


def config_of(name: str, folder: Path, method: str) -> Config:
    """Return the settings of a method on a data set."""
    # The comparison with k-means on the raw rows is a row of the table itself, so no fit needs to repeat it.
    overrides = [f"input.path={folder}", "evaluate.baseline_rows=2000", *METHODS[method], *OWN.get((name, method), [])]
    return load_config(ROOT / "jobs" / f"{name}.yaml", overrides)


def imbalanced(keys: torch.Tensor, classes: npt.NDArray[np.str_], smallest_share: float) -> npt.NDArray[np.bool_]:
    """Return which rows are kept: those of the first class with `smallest_share`, of the last with 1, linear between.

    Source: Xie, Girshick, Farhadi, arXiv:1511.06335, section 5.4 (protocol).
    """
    names, of_row = np.unique(classes, return_inverse=True)
    share = smallest_share + (1.0 - smallest_share) * np.arange(len(names)) / (len(names) - 1)
    return uniform(keys, stream_seed(0, 12)).numpy() < share[of_row]


def measure(data: Data, config: Config) -> dict[str, Any]:
    """Return the scores of one fit, and its seconds with those of its pretraining, wherever they were spent."""
    settings, pretrained = config.fit_settings(data.fingerprint), None
    rows: dict[str, Any] = {
        "x": data.x_ND,
        "keys": data.keys_N,
        "preprocess": data.preprocess,
        "settings": settings,
        "seed": config.seed,
    }
    if config.learns:
        fingerprint = pretraining_fingerprint(config, data.fingerprint)
        pretrained = _pretrained(BUILD / f"{data.name.replace(' ', '-')}-{config.seed}-{fingerprint}", settings, rows)
    started = time.perf_counter()
    result = fit_array(
        **rows, num_clusters=config.cluster.num_leaves, objective=config.fit.objective, pretrained=pretrained
    )
    seconds = time.perf_counter() - started
    seconds += sum(h["seconds"] for h in result.history if h["phase"] in ("layers", "pretrain"))
    return {**_scores(data, result.labels), "seconds": round(seconds, 1), **_course(result.history)}


def _pretrained(folder: Path, settings: FitSettings, rows: dict[str, Any]) -> Pretrained:
    """Return the autoencoder that all methods of these settings share: from the folder, or trained and kept there."""
    if (folder / "state.json").exists():
        tensors, values = checkpoint.load(folder)
        return Pretrained(autoencoder=settings.autoencoder, dim=rows["x"].shape[1], tensors=tensors, values=values)
    pretrained = pretrain_array(**rows)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    checkpoint.save(fresh, pretrained.tensors, pretrained.values)
    fresh.rename(folder)
    return pretrained


def fit_fingerprint(config: Config, input_fingerprint: str) -> str:
    """Return a hash of all that decides the fit; a new section for another objective leaves it as it was."""
    names = ["preprocess", "autoencoder", "pretrain", "cluster", "refine", "evaluate"]
    names += [config.fit.objective] if config.fit.objective in type(config).model_fields else []
    deciding = {name: config.settings("fit")[name] for name in names}
    plain = dump(FitConfig())
    fitting = {name: value for name, value in dump(config.fit).items() if value != plain[name]}
    return digest(deciding | {"fit": fitting, "seed": config.seed, "input": input_fingerprint})


def pretraining_fingerprint(config: Config, input_fingerprint: str) -> str:
    """Return a hash of all that decides the pretrained autoencoder."""
    deciding = {name: dump(getattr(config, name)) for name in ("preprocess", "autoencoder", "pretrain")}
    return digest(deciding | {"seed": config.seed, "precision": config.fit.precision, "input": input_fingerprint})


def _read(name: str, config: Config, smallest_share: float) -> Data:
    profile = profile_input(config, Lake())
    rows, keys, classes = [], [], []
    for part in profile.slices:
        for batch in read_slice(Lake(), part, profile.spec, with_labels=True):
            names = class_names(batch.labels)
            assert names is not None
            rows.append(batch.x.copy())
            keys.append(batch.keys.copy())
            classes.append(names)
    x, key, label = np.concatenate(rows), np.concatenate(keys), np.concatenate(classes)
    if smallest_share < 1:
        kept = imbalanced(torch.from_numpy(key), label, smallest_share)
        x, key, label = x[kept], key[kept], label[kept]
    title = name if smallest_share == 1 else f"{name} r_min={smallest_share}"
    fingerprint = digest([profile.fingerprint, smallest_share])
    return Data(
        name=title, x_ND=x, keys_N=key, classes=label, preprocess=profile.preprocess(config), fingerprint=fingerprint
    )


def _scores(data: Data, labels_N: npt.NDArray[np.int64]) -> dict[str, float]:
    of_row = np.unique(data.classes, return_inverse=True)[1]
    table = metrics.counted(labels_N, of_row)
    return {k: round(v, 4) for k, v in metrics.external(table).items() if k in ("acc", "nmi", "ari")}


def _course(history: list[dict[str, Any]]) -> dict[str, Any]:
    refine = [h for h in history if h["phase"] == "refine"]
    found: dict[str, Any] = {"epochs": len(refine)} if refine else {}
    return found | {k: round(refine[-1][k], 5) for k in ("changed", "top_q") if refine and k in refine[-1]}


def _entries() -> list[dict[str, Any]]:
    return json.loads(BOOK.read_text()) if BOOK.exists() else []


def record(entry: dict[str, Any]) -> None:
    """Put an entry into the book, in place of an older one of the same data, method and seed, and write the page."""
    machine = made()
    entry |= {"commit": machine["commit"], "cpu": machine["cpu"], "cores": machine["cores"], "date": machine["date"]}
    key = (entry["data"], entry["method"], entry["seed"])
    kept = [e for e in _entries() if (e["data"], e["method"], e["seed"]) != key]
    order = {name: place for place, name in enumerate(METHODS)}
    book = sorted([*kept, entry], key=lambda e: (e["data"], order.get(e["method"], len(order)), e["method"], e["seed"]))
    BOOK.write_text(json.dumps(book, indent=1) + "\n")
    BOOK.with_suffix(".md").write_text(page(book))
