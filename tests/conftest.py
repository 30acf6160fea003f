"""Fixtures that many tests share: one Ray cluster for the session, and small inputs."""

import os

# Before anything imports Ray or OpenMP: no token file in the home folder, no spinning threads on a busy machine.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster on this machine: two training workers and CPUs to spare for Ray Data."""
    import ray

    ray.init(
        address="local",
        num_cpus=5,
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of scikit-learn's digits as four Parquet files."""
    from raydc.demo import write_digits

    return write_digits(tmp_path_factory.mktemp("input") / "digits")
