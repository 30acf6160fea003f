"""raydc turns sharded embeddings in a data lake into labels, a cluster tree and a model.

It reads Parquet embeddings, learns a space in which they cluster (an autoencoder, then DEC or IDEC), clusters them
(FAISS k-means), builds the tree above the clusters (weighted Ward), writes one label row for every input row back to
the lake and shows the result. It runs on a Ray cluster that grows and shrinks, and continues where it stopped.

    from raydc import load_config, run, Model
    folder = run(load_config("jobs/digits.yaml"), run_id="first")
    labels = Model.load(folder.uri("model")).predict(rows)
"""

from typing import Any

# Late: importing the package, or its core, must import neither Ray nor torch.
_NAMES = {
    "Config": "raydc.config",
    "Model": "raydc.model",
    "fit_array": "raydc.core.api",
    "load_config": "raydc.config",
    "parse_config": "raydc.config",
    "run": "raydc.pipeline",
}

__all__ = ["Config", "Model", "fit_array", "load_config", "parse_config", "run"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'raydc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_NAMES[name]), name)
