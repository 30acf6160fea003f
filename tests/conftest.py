"""Fixtures that many tests share: one Ray cluster for the session, and small inputs."""

import os
import sys

from raydc.runtime.environment import LOCAL_CLUSTER

# Before anything imports Ray or OpenMP: no token file in the home folder, no spinning threads on a busy machine.
os.environ.setdefault("RAY_AUTH_MODE", LOCAL_CLUSTER["RAY_AUTH_MODE"])
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", LOCAL_CLUSTER["RAY_USAGE_STATS_ENABLED"])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray's workers take their environment from the session that starts them: names for the tests' own S3 server.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
# Of a shape that is found again, should it ever be written down.
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "never-to-be-written-5b1f9c")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
# As raydc does where it starts a cluster itself: nothing looks for nodes about to go, or counts for a dashboard.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")

import pytest

# Fixtures behind which a Ray cluster or an S3 server is started: their tests get the marker.
STARTS = {
    "ray": {"ray_cluster", "head_with_dashboard"},
    "s3": {"s3_endpoint"},
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark every test that starts something, as its fixtures say: `make quick` leaves these out."""
    for item in items:
        for name, fixtures in STARTS.items():
            if fixtures & set(getattr(item, "fixturenames", ())):
                item.add_marker(name)


@pytest.fixture(autouse=True)
def denormals():
    """Numbers below 1e-38 count again after a test that has prepared its process for training, as a command does."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _a_cluster_is_marked(request):
    """A test that starts Ray says so by its fixture or marker; otherwise it would slow down `make quick` unseen."""
    yield
    ray = sys.modules.get("ray")
    if request.node.get_closest_marker("ray") is None and ray is not None and "ray_cluster" not in _STARTED:
        assert not ray.is_initialized(), "this test starts a Ray cluster: mark it with pytest.mark.ray"


# What the session has started.
_STARTED: set[str] = set()


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster on this machine: two training workers and CPUs to spare for Ray Data."""
    import ray

    # Train's controller fetches a report every two seconds, and a worker waits for that before its next epoch: most of
    # the time of jobs as small as these. Only the processes of this cluster, which inherit it here, are meant.
    with pytest.MonkeyPatch.context() as environment:
        name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
        environment.setenv(name, LOCAL_CLUSTER[name])
        ray.init(
            address="local",
            num_cpus=5,
            object_store_memory=256 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    _STARTED.add("ray_cluster")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of scikit-learn's digits as four Parquet files."""
    from raydc.commands.demo import write_digits

    return write_digits(tmp_path_factory.mktemp("input") / "digits")


@pytest.fixture(scope="session")
def on_one_worker(ray_cluster, digits, tmp_path_factory):
    """A finished run of the small job, on one worker, for whoever looks at one: it stays as it is."""
    from raydc import pipeline
    from tests.small_job import settings

    return pipeline.run(settings(digits, tmp_path_factory.mktemp("shared")), "one")


@pytest.fixture(scope="session")
def s3_endpoint():
    """The URL of an S3 server in this process."""
    server = pytest.importorskip("moto.server", reason="the S3 tests need moto[server]")
    threaded = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    threaded.start()
    host, port = threaded.get_host_and_port()
    yield f"http://{host}:{port}"
    threaded.stop()


@pytest.fixture
def s3_client(s3_endpoint, monkeypatch):
    """A plain client of the S3 server, and the environment in which others find it."""
    boto3 = pytest.importorskip("boto3", reason="the S3 tests need boto3")
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    yield client
    client.close()


@pytest.fixture
def bucket(s3_client):
    """The URI of a fresh bucket."""
    name = f"bucket-{os.urandom(4).hex()}"
    s3_client.create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(autouse=True)
def _no_connection_of_another_test():
    """A connection made without credentials, or with others, must not serve the next test."""
    from s3fs import S3FileSystem

    for kind in (S3FileSystem, *S3FileSystem.__subclasses__()):
        kind.clear_instance_cache()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request, tmp_path):
    """An empty lake, in a folder and in a bucket."""
    from tests.foreign import Bucket, Local

    if request.param == "local":
        (tmp_path / "lake").mkdir()
        return Local(tmp_path / "lake")
    return Bucket(request.getfixturevalue("bucket"), request.getfixturevalue("s3_client"))


@pytest.fixture
def rows(tmp_path):
    """A folder of one small Parquet file."""
    from tests import shards

    x, _ = shards.near_corners(200)
    shards.write(tmp_path / "rows" / "a.parquet", shards.rows(x))
    return tmp_path / "rows"


@pytest.fixture
def model(tmp_path):
    """A run folder with a model of such rows."""
    from raydc.storage.lake import Lake
    from tests import shards

    shards.corner_model().save(Lake(), str(tmp_path / "trained" / "model"))
    return tmp_path / "trained"


@pytest.fixture
def no_cluster(monkeypatch):
    """No command may start Ray here; one that would raises Reached."""
    from contextlib import contextmanager

    from raydc.runtime import session
    from tests.foreign import Reached

    @contextmanager
    def refuse(config):
        raise Reached
        yield

    monkeypatch.setattr(session, "connected", refuse)
