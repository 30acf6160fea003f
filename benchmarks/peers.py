"""The peers of the speed table, each run in the peers' own environment: `build/peers/bin/python benchmarks/peers.py`.

Nothing here imports raydc. Prints one JSON object. Letters: N rows, D width, K centers.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


def clustpy_autoencoder(data: str, widths: list, batch: int, epochs: int, threads: int) -> dict:
    """Return the seconds of each epoch of ClustPy's FeedforwardAutoencoder."""
    torch = _clustpy(threads)
    from clustpy.deep.neural_networks import FeedforwardAutoencoder

    x_ND = np.load(data)

    def run(num: int) -> float:
        network = FeedforwardAutoencoder(widths)
        started = time.perf_counter()
        network.fit(num, {"lr": 1e-3}, batch, data=x_ND, optimizer_class=torch.optim.Adam)
        return time.perf_counter() - started

    # The difference leaves out what an epoch does not cost.
    return {"seconds": [(run(1 + epochs) - run(1)) / epochs]}


def clustpy_dec(data: str, widths: list, clusters: int, batch: int, epochs: int, threads: int) -> dict:
    """Return the seconds of an epoch of ClustPy's DEC, which makes its target from the batch."""
    torch = _clustpy(threads)
    from clustpy.deep import DEC
    from clustpy.deep.neural_networks import FeedforwardAutoencoder

    x_ND = np.load(data)
    network = FeedforwardAutoencoder(widths)
    network.fit(1, {"lr": 1e-3}, batch, data=x_ND, optimizer_class=torch.optim.Adam)

    def run(num: int) -> float:
        import copy

        dec = DEC(
            clusters,
            batch_size=batch,
            clustering_epochs=num,
            neural_network=copy.deepcopy(network),
            device=torch.device("cpu"),
            random_state=0,
        )
        started = time.perf_counter()
        dec.fit(x_ND)
        return time.perf_counter() - started

    return {"seconds": [(run(1 + epochs) - run(1)) / epochs]}


def sklearn_lloyd(data: str, start: str, iterations: int, threads: int) -> dict:
    """Return the seconds of an iteration of scikit-learn's KMeans from given centers."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    x_ND, centers_KD = np.load(data), np.load(start)

    def run(num: int) -> float:
        started = time.perf_counter()
        KMeans(len(centers_KD), init=centers_KD, n_init=1, max_iter=num, tol=0, copy_x=False).fit(x_ND)
        return time.perf_counter() - started

    with threadpool_limits(threads):
        return {"seconds": [(run(1 + iterations) - run(1)) / iterations]}


def spark_lloyd(data: str, clusters: int, iterations: int, threads: int) -> dict:
    """Return the seconds of an iteration of Spark MLlib's KMeans on cached rows."""
    import tempfile

    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyspark.ml.clustering import KMeans
    from pyspark.ml.functions import array_to_vector
    from pyspark.sql import SparkSession

    x_ND = np.load(data)
    spark = (
        SparkSession.builder.master(f"local[{threads}]")
        .config("spark.driver.memory", "8g")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(np.array_split(x_ND, 4 * threads)):
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])
            pq.write_table(pa.table({"x": column.cast(pa.list_(pa.float32()))}), f"{folder}/{number}.parquet")
        rows = spark.read.parquet(folder).select(array_to_vector("x").alias("features")).cache()
        rows.count()

        def run(num: int) -> float:
            started = time.perf_counter()
            KMeans(k=clusters, maxIter=num, tol=0.0, initMode="random", seed=0).fit(rows)
            return time.perf_counter() - started

        run(1)
        seconds = (run(1 + iterations) - run(1)) / iterations
    spark.stop()
    return {"seconds": [seconds]}


def evoc(folder: str, threads: int) -> dict:
    """Return the seconds of EVoC from Parquet embeddings to labels in memory, and how the labels agree with classes."""
    import glob

    import numba
    import pyarrow as pa
    import pyarrow.parquet as pq
    from evoc import EVoC
    from sklearn.metrics import normalized_mutual_info_score

    numba.set_num_threads(threads)
    started = time.perf_counter()
    table = pa.concat_tables([pq.read_table(path) for path in sorted(glob.glob(f"{folder}/*.parquet"))])
    column = table["embedding"].combine_chunks()
    x_ND = column.flatten().to_numpy().reshape(len(column), -1).astype(np.float32)
    model = EVoC()
    found = model.fit_predict(x_ND)
    seconds = time.perf_counter() - started
    classes = table["label"].to_numpy()
    layers = [
        {
            "clusters": int(labels.max() + 1),
            "noise": round(float((labels < 0).mean()), 4),
            "nmi": round(float(normalized_mutual_info_score(classes, labels)), 4),
        }
        for labels in [found, *model.cluster_layers_]
    ]
    return {"seconds": [seconds], "quality": {"chosen": layers[0], "layers": layers[1:]}}


def _clustpy(threads: int):
    """Import ClustPy beside a torch without CUDA: torchvision's operators, which it never calls, are missing there."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",):
        library.define(operator)
    library.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    )
    _clustpy.library = library  # It must outlive the import.
    return torch


NAMES = {f.__name__: f for f in (clustpy_autoencoder, clustpy_dec, sklearn_lloyd, spark_lloyd, evoc)}

if __name__ == "__main__":
    found = NAMES[sys.argv[1]](**json.loads(sys.argv[2]))
    # getrusage would count the process that started this one as well.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
    print(json.dumps({**found, "peak_mib": peak}))
