"""raydc turns sharded embeddings in a data lake into labels, a cluster tree and a model.

It reads Parquet embeddings, learns a space in which they cluster (an autoencoder, then DEC or IDEC), clusters them
(FAISS k-means), builds the tree above the clusters (weighted Ward), writes one label row for every input row back to
the lake and shows the result. It runs on a Ray cluster that grows and shrinks, and continues where it stopped.

    from raydc import load_config, run, Model
    folder = run(load_config("jobs/digits.yaml"), run_id="first")
    labels = Model.load(folder.uri("model")).predict(rows)
"""

from typing import Any

from raydc.config import Config, load_config, parse_config

__all__ = ["Config", "Model", "load_config", "parse_config", "run"]


def __getattr__(name: str) -> Any:
    # Late: importing the package, or its core, must not import Ray or torch.
    if name == "run":
        from raydc.pipeline import run

        return run
    if name == "Model":
        from raydc.model import Model

        return Model
    raise AttributeError(f"module 'raydc' has no attribute {name!r}")
