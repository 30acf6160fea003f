"""The cost of a run before it starts, by hand."""

import numpy as np
import pytest

from raydc.config import Config
from raydc.core.models.preprocess import Moments
from raydc.data.profile import Profile
from raydc.data.slices import Column, InputSpec, Slice
from raydc.runtime.plan import make_plan
from tests import shards


def profile(num_rows: int = 1000, dim: int = 8, dtype: str = "float32") -> Profile:
    spec = InputSpec(columns=(Column(name="embedding", dim=dim, dtype=dtype),), id_column="id", id_type="int64")
    half = num_rows // 2
    parts = [
        Slice(
            index=i,
            name=f"{i}.parquet",
            uri=f"/in/{i}.parquet",
            row_groups=(0,),
            first_row=0,
            first_key=i * half,
            num_rows=half,
            num_bytes=half * dim * spec.dtype.itemsize,
        )
        for i in range(2)
    ]
    return Profile(spec=spec, slices=parts, fingerprint="f", moments=Moments(1, np.zeros(dim), np.zeros(dim)))


def config(**sections) -> Config:
    small = {
        "autoencoder": {"hidden_dims": [16], "latent_dim": 4},
        "pretrain": {"num_epochs": 3, "batch_rows": 256},
        "refine": {"num_epochs": 5, "batch_rows": 128, "refreshes_per_epoch": 2},
        "cluster": {"num_leaves": 10, "num_iterations": 7},
    }
    return shards.settings("data", **{name: small.get(name, {}) | sections.get(name, {}) for name in small | sections})


def test_steps_are_epochs_times_batches():
    plan = make_plan(config(fit={"objective": "dec"}), profile())
    assert (plan.rows, plan.trained_rows, plan.slices, plan.input_bytes) == (1000, 1000, 2, 32_000)
    assert plan.pretrain_steps == 3 * 4
    assert plan.refine_steps == 5 * 8
    assert make_plan(config(fit={"objective": "autoencoder"}), profile()).refine_steps == 0
    assert make_plan(config(fit={"objective": "kmeans"}), profile()).pretrain_steps == 0


def test_arithmetic_by_hand():
    # Encoder 8-16-4: 192 weights, 384 FLOPs a row; nearest of 10 centers of 4: 80 FLOPs a row.
    forward, nearest = 384, 80
    lloyd = 1000 * nearest * 7
    pretrain = 1000 * 3 * 3 * 2 * forward
    dec = 1000 * 5 * (3 * (forward + nearest) + 2 * (forward + nearest))
    idec = 1000 * 5 * (3 * (2 * forward + nearest) + 2 * (forward + nearest))
    assert make_plan(config(fit={"objective": "autoencoder"}), profile()).fit_flops == lloyd + pretrain
    assert make_plan(config(fit={"objective": "dec"}), profile()).fit_flops == lloyd + pretrain + dec
    assert make_plan(config(fit={"objective": "idec"}), profile()).fit_flops == lloyd + pretrain + idec
    # Without a network the 8 raw values are compared with 10 centers.
    assert make_plan(config(fit={"objective": "kmeans"}), profile()).fit_flops == 1000 * 160 * 7


def test_arithmetic_of_the_other_objectives_by_hand():
    forward, nearest = 384, 80
    plain = make_plan(config(fit={"objective": "autoencoder"}), profile()).fit_flops
    # Both train encoder and decoder; DCN encodes every row again after its step.
    ae = 1000 * 5 * 3 * (2 * forward + nearest)
    dcn = ae + 1000 * 5 * (forward + nearest)
    assert make_plan(config(fit={"objective": "ae"}), profile()).fit_flops == plain + ae
    assert make_plan(config(fit={"objective": "dcn"}), profile()).fit_flops == plain + dcn
    assert make_plan(config(fit={"objective": "ae"}, refine={"code_weight": 0.0}), profile()).refine_steps == 0


def test_layers_are_pretrained_in_epochs_of_their_own():
    plan = make_plan(
        config(fit={"objective": "autoencoder"}, pretrain={"layerwise": True, "layer_epochs": 7}), profile()
    )
    assert plan.pretrain_steps == (3 + 2 * 7) * 4
    # Pairs 8-16-8 and 16-4-16; the second one learns on the output of the first layer.
    pairs = 3 * 2 * 2 * 8 * 16 + (2 * 8 * 16 + 3 * 2 * 2 * 16 * 4)
    plain = make_plan(config(fit={"objective": "autoencoder"}), profile()).fit_flops
    assert plan.fit_flops == plain + 1000 * 7 * pairs


def test_the_search_of_the_neighbors_is_counted_for_the_objectives_that_need_it():
    plan = make_plan(config(fit={"objective": "icon"}), profile())
    assert plan.neighbors_flops == 2 * 1000**2 * 8
    assert plan.pretrain_steps == 0 and plan.refine_steps == 5 * 8
    assert any("1.6e+07 for the neighbors" in line for line in plan.lines())
    # Two heads, each with a teacher: 8 products with the prototypes for a pair of rows.
    temi = make_plan(config(fit={"objective": "temi"}, head={"num_heads": 2}), profile())
    assert temi.fit_flops == 1000 * 160 * 7 + 1000 * 5 * 8 * 160 * 2
    assert make_plan(config(fit={"objective": "dec"}), profile()).neighbors_flops == 0
    approximate = config(fit={"objective": "icon"}, neighbors={"exact_rows": 900, "num_probes": 1, "recall_rows": 1})
    assert make_plan(approximate, profile()).neighbors_flops < 2 * 1000**2 * 8 / 10
    sampled = make_plan(config(fit={"objective": "icon", "max_rows": 100}), profile())
    assert sampled.neighbors_flops == 2 * 100**2 * 8


def test_the_plan_says_what_the_search_of_the_neighbors_asks_of_the_cluster():
    lines = make_plan(config(fit={"objective": "icon"}), profile()).lines()
    assert lines[8].startswith("neighbors   2 tasks, 4 fetches of up to 78.1 KiB in all, about ")
    assert len(make_plan(config(), profile()).lines()) == 8


def test_widths_of_the_encoder():
    assert config(fit={"objective": "dec"}).encoder_widths(8) == [8, 16, 4]
    assert config(fit={"objective": "kmeans"}).encoder_widths(8) == [8]


def test_a_sample_shortens_the_training_but_not_the_labeling():
    whole, part = (make_plan(config(fit={"objective": "dec", "max_rows": n}), profile()) for n in (None, 100))
    assert (part.trained_rows, part.pretrain_steps, part.rows) == (100, 3, 1000)
    assert part.fit_flops == whole.fit_flops / 10
    assert part.assign_flops == whole.assign_flops


def test_memory_falls_with_workers_and_with_streaming():
    def worker_bytes(**fit) -> int:
        return make_plan(config(fit={"objective": "dec"} | fit), profile(10**6, dim=768)).worker_bytes

    one, four = worker_bytes(), worker_bytes(num_workers=4)
    assert one > 10**6 * 768 * 4
    assert one - four == pytest.approx(0.75 * 10**6 * (768 * 4 + 20 + 24))
    # Without a network there are no codes to keep.
    plain = worker_bytes(objective="kmeans"), worker_bytes(objective="kmeans", num_workers=4)
    assert plain[0] - plain[1] == pytest.approx(0.75 * 10**6 * (768 * 4 + 20))
    streamed = make_plan(config(fit={"objective": "dec", "resident_bytes": 10**6}), profile(10**6, dim=768))
    assert streamed.streamed
    assert streamed.worker_bytes < one - 3 * 10**9
    assert not make_plan(config(fit={"objective": "dec", "resident_bytes": 10**10}), profile(10**6, dim=768)).streamed


def test_the_plan_of_an_elastic_fit_is_that_of_the_fewest_workers():
    fewest, elastic = (make_plan(config(fit={"num_workers": n}), profile(10**6)) for n in (2, [2, 8]))
    assert elastic.worker_bytes == fewest.worker_bytes
    assert "workers     2 for training, 1 CPU each" in fewest.lines()
    told = "workers     2 to 8 for training, 1 CPU each, as there is room; memory and time are those of 2"
    assert told in elastic.lines()


def test_half_precision_rows_take_half_the_memory():
    full, half = (make_plan(config(), profile(10**6, dim=768, dtype=d)).worker_bytes for d in ("float32", "float16"))
    assert full - half == 10**6 * 768 * 2


def test_the_plan_is_told_in_eight_lines():
    plan = make_plan(config(fit={"objective": "dec", "max_rows": 100}), profile())
    lines = plan.lines()
    assert lines[0] == "rows        1,000 (100 of them in training) in 2 slices, 31.2 KiB uncompressed"
    assert lines[1] == "steps       3 pretraining, at most 5 refinement"
    assert lines[2].startswith("arithmetic  ")
    assert lines[3] == "workers     1 for training, 1 CPU each"
    assert lines[4].endswith("per training worker, rows resident")
    assert lines[5] == "files       about 34 to write"
    assert lines[6] == "time        about 1 s of arithmetic, plus reading and start-up"
    assert lines[7] == "reading     1 for fit, 1 for assign: passes over the lake"


def test_gpu_workers_are_not_given_a_guess():
    plan = make_plan(config(fit={"objective": "dec", "use_gpu": True}), profile())
    assert plan.seconds is None
    assert plan.lines()[6] == "time        not estimated for GPU workers"
