"""The bare limits: the arithmetic of a row of the speed table in one process, data in memory, no Ray and no raydc.

Run as `python benchmarks/bare.py NAME JSON`; prints one JSON object. Letters: N rows, D width, K centers.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import faiss  # isort: skip


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    faiss.omp_set_num_threads(threads)


def _network(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def autoencoder_epoch(data: str, widths: list[int], batch: int, epochs: int, threads: int, arithmetic: str) -> dict:
    """Return the seconds of each epoch of reconstruction training: shuffle, step, nothing else."""
    _prepare(threads)
    x_ND = torch.from_numpy(np.load(data))
    encoder, decoder = _network(widths), _network(widths[::-1])
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        for rows in torch.randperm(len(x_ND)).split(batch):
            x = x_ND[rows]
            with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "bf16"):
                y = decoder(encoder(x))
            loss = F.mse_loss(y.float(), x)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds}


def dec_epoch(data: str, widths: list[int], clusters: int, batch: int, epochs: int, threads: int) -> dict:
    """Return the seconds of each epoch of DEC in bf16 with the exact target, which is kept for all rows."""
    _prepare(threads)
    x_ND = torch.from_numpy(np.load(data))
    encoder = _network(widths)
    with torch.no_grad():
        centers = nn.Parameter(encoder(x_ND[torch.randperm(len(x_ND))[:clusters]]))
    optimizer = torch.optim.Adam([*encoder.parameters(), centers], lr=1e-4, fused=True)

    def logits(z: Tensor) -> Tensor:
        return -torch.log1p(((z[:, None] - centers) ** 2).sum(dim=2))

    seconds = []
    for _ in range(epochs):
        started = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = torch.cat([encoder(x) for x in x_ND.split(8192)]).float()
        with torch.no_grad():
            q = torch.softmax(logits(z), dim=1)
            p_NK = q**2 / q.sum(dim=0)
            p_NK /= p_NK.sum(dim=1, keepdim=True)
        for rows in torch.randperm(len(x_ND)).split(batch):
            with torch.autocast("cpu", torch.bfloat16):
                z = encoder(x_ND[rows])
            log_q = torch.log_softmax(logits(z.float()), dim=1)
            loss = F.kl_div(log_q, p_NK[rows], reduction="batchmean")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds}


def lloyd(data: str, start: str, iterations: int, threads: int) -> dict:
    """Return the seconds of an iteration of faiss.Kmeans from given centers."""
    _prepare(threads)
    x_ND, centers_KD = np.load(data), np.load(start)

    def run(num: int) -> float:
        kmeans = faiss.Kmeans(
            x_ND.shape[1],
            len(centers_KD),
            niter=num,
            max_points_per_centroid=len(x_ND),
            min_points_per_centroid=1,
        )
        started = time.perf_counter()
        kmeans.train(x_ND, init_centroids=centers_KD)
        return time.perf_counter() - started

    return {"seconds": [(run(1 + iterations) - run(1)) / iterations]}


def assign(folder: str, output: str, centers: str, widths: list[int], threads: int) -> dict:
    """Return the seconds from Parquet embeddings to Parquet labels, file by file; `widths` empty is no encoder."""
    started = time.perf_counter()
    _prepare(threads)
    centers_KD = np.load(centers)
    encoder = _network(widths).eval() if widths else None
    Path(output).mkdir(parents=True)
    rows = 0
    for path in sorted(Path(folder).glob("*.parquet")):
        ids, leaves, distances = [], [], []
        for batch in pq.ParquetFile(path).iter_batches(65536, columns=["id", "embedding"]):
            column = batch.column("embedding")
            x = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1).astype(np.float32)
            if encoder is not None:
                with torch.no_grad():
                    x = np.concatenate([encoder(part).numpy() for part in torch.from_numpy(x).split(8192)])
            squared, nearest = faiss.knn(np.ascontiguousarray(x), centers_KD, 2)
            ids.append(batch.column("id"))
            leaves.append(nearest.astype(np.int32))
            distances.append(np.sqrt(np.maximum(squared, 0)).astype(np.float32))
            rows += len(batch)
        leaf, distance = np.concatenate(leaves), np.concatenate(distances)
        table = pa.table(
            {
                "id": pa.chunked_array(ids),
                "leaf": leaf[:, 0],
                "distance": distance[:, 0],
                "second_leaf": leaf[:, 1],
                "second_distance": distance[:, 1],
            }
        )
        pq.write_table(table, Path(output) / path.name)
    return {"seconds": [time.perf_counter() - started], "rows": rows}


def read(folder: str) -> dict:
    """Return the seconds of reading all embeddings of a folder into one array by pyarrow."""
    started = time.perf_counter()
    files = sorted(Path(folder).glob("*.parquet"))
    counts = [pq.read_metadata(path).num_rows for path in files]
    x_ND, row = None, 0
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(65536, columns=["id", "embedding"], use_threads=False):
            part = batch.column("embedding").flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
            if x_ND is None:
                x_ND = np.empty((sum(counts), part.shape[1]), part.dtype)
            x_ND[row : row + len(part)] = part
            row += len(part)
    assert x_ND is not None
    return {"seconds": [time.perf_counter() - started], "bytes": x_ND.nbytes}


def ray_alone() -> dict:
    """Do a bare ray.init, an empty TorchTrainer.fit and the shutdown; return when it entered its loop, and left fit."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    entered = Path(f"/tmp/raydc-bench-{os.getpid()}")
    TorchTrainer(_touch, train_loop_config={"path": str(entered)}, scaling_config=ScalingConfig(num_workers=1)).fit()
    first = entered.stat().st_mtime
    entered.unlink()
    ended = time.time()
    ray.shutdown()
    return {"entered": first, "fitted": ended}


def _touch(config: dict[str, Any]) -> None:
    Path(config["path"]).touch()


NAMES = {f.__name__: f for f in (autoencoder_epoch, dec_epoch, lloyd, assign, read, ray_alone)}

if __name__ == "__main__":
    found = NAMES[sys.argv[1]](**json.loads(sys.argv[2]))
    # getrusage would count the process that started this one as well.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
    print(json.dumps({**found, "peak_mib": peak}))
