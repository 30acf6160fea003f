"""S3 under load and out of reach: every request is tried again, boundedly, and what stays wrong says what to do."""

import contextlib
import logging
import os
import pickle
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydc.data.footers import read_footers
from raydc.data.reader import read_slice
from raydc.data.slices import Column, InputSpec, plan_slices
from raydc.errors import DataError, StageError, StorageUnavailable
from raydc.storage import s3
from raydc.storage.lake import Lake
from tests import shards
from tests.faulty_s3 import PASSING, FaultyS3

pytestmark = pytest.mark.s3


@pytest.fixture
def faulty(s3_endpoint, monkeypatch):
    monkeypatch.setattr(s3, "FIRST_PAUSE_SECONDS", 0.01)
    with FaultyS3(s3_endpoint, stall_seconds=3) as proxy:
        yield proxy


@pytest.fixture
def lake(faulty, bucket):
    return Lake(endpoint_url=faulty.url, region="us-east-1", max_attempts=4, max_wait_seconds=0.0)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as opened:
        yield opened


def operations(lake: Lake, root: str, folder) -> dict[str, object]:
    """Return one call for each thing that the lake does, and what it should give."""
    parquet = f"{root}/in/a.parquet"

    def rows():
        with lake.open_parquet(parquet) as handle:
            return pq.read_table(handle).num_rows

    def staged():
        with lake.staged(f"{root}/new/staged") as path:
            path.write_bytes(b"x" * 1000)
        return lake.size(f"{root}/new/staged")

    return {
        "list": (lambda: [f.uri for f in lake.list_parquet(f"{root}/in")], [parquet]),
        "glob": (lambda: [f.uri for f in lake.list_parquet(f"{root}/in/*.parquet")], [parquet]),
        "find": (lambda: [f.size for f in lake.find(f"{root}/one")], [3]),
        "exists": (lambda: lake.exists(f"{root}/one/a"), True),
        "absent": (lambda: lake.exists(f"{root}/one/none"), False),
        "head": (lambda: lake.size(f"{root}/one/a"), 3),
        "read": (lambda: lake.read_bytes(f"{root}/one/a"), b"123"),
        "read range": (rows, 50),
        "write": (lambda: lake.write_bytes(f"{root}/new/b", b"4"), None),
        "create": (lambda: lake.create(f"{root}/new/{os.urandom(4).hex()}", b"me"), True),
        "staged": (staged, 1000),
        "delete": (lambda: lake.remove(f"{root}/new"), None),
    }


def fill(lake: Lake, root: str) -> None:
    with lake.staged(f"{root}/in/a.parquet") as path:
        pq.write_table(shards.rows(shards.vectors(50)), path)
    lake.write_bytes(f"{root}/one/a", b"123")


@pytest.mark.parametrize("kind", PASSING)
def test_every_operation_outlives_two_faults_of_each_kind(faulty, lake, bucket, tmp_path, kind):
    fill(lake, bucket)
    for name, (call, expected) in operations(lake, bucket, tmp_path).items():
        faulty.burst(kind, requests=2)
        assert call() == expected, name
        faulty.heal()
    assert faulty.faults[kind] >= 20


def test_a_store_that_does_not_answer_in_time_is_asked_again(faulty, bucket):
    lake = Lake(endpoint_url=faulty.url, region="us-east-1", max_attempts=3, timeout_seconds=0.5)
    lake.write_bytes(f"{bucket}/a", b"123")
    faulty.burst("stall", requests=1)
    assert lake.read_bytes(f"{bucket}/a") == b"123"
    assert faulty.faults == {"stall": 1}


@pytest.mark.parametrize("kind", ["slow_down", "reset"])
def test_attempts_are_bounded_and_the_last_one_says_where_and_what_to_do(faulty, lake, bucket, tmp_path, kind):
    fill(lake, bucket)
    for name, (call, _) in operations(lake, bucket, tmp_path).items():
        before = faulty.faults[kind]
        faulty.burst(kind)
        with pytest.raises(StorageUnavailable, match=rf"storage {bucket}/.*4 times in a row.*storage.max_attempts"):
            call()
        faulty.heal()
        # aiohttp asks once more by itself where a connection that it kept was gone.
        assert 4 <= faulty.faults[kind] - before <= (8 if kind == "reset" else 4), name


def test_a_store_that_is_not_there_is_told_with_its_address(monkeypatch, bucket):
    monkeypatch.setattr(s3, "FIRST_PAUSE_SECONDS", 0.01)
    lake = Lake(endpoint_url="http://127.0.0.1:9", max_attempts=3, max_wait_seconds=0.0)
    with pytest.raises(
        StorageUnavailable, match=r"storage s3://b/x.* Check that the store at http://127.0.0.1:9 is up"
    ):
        lake.list_parquet("s3://b/x")


def test_what_is_wrong_for_good_is_not_asked_again(faulty, lake, bucket, tmp_path):
    fill(lake, bucket)
    for name, (call, _) in operations(lake, bucket, tmp_path).items():
        before = faulty.faults["denied"]
        faulty.burst("denied")
        with pytest.raises(StageError, match=rf"storage {bucket}/.* \((AccessDenied|403)\). Grant the credentials"):
            call()
        faulty.heal()
        assert faulty.faults["denied"] - before == 1, name


def test_a_bucket_that_does_not_exist_is_told_also_while_listing(lake):
    for call in (lake.list_parquet, lake.find, lake.read_bytes, lake.size, lake.remove, lake.exists):
        with pytest.raises(StageError, match=r"storage s3://no-such-bucket/x/.*NoSuchBucket.*Check the bucket's name"):
            call("s3://no-such-bucket/x/y")
    with pytest.raises(StageError, match="NoSuchBucket"):
        lake.write_bytes("s3://no-such-bucket/x/y", b"1")


def test_a_missing_key_stays_a_missing_file(lake, bucket):
    with pytest.raises(FileNotFoundError):
        lake.read_bytes(f"{bucket}/none")
    with pytest.raises(DataError, match=f"input.path={bucket}/none: no Parquet file there"):
        lake.list_parquet(f"{bucket}/none")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "ExpiredToken", "SignatureDoesNotMatch"])
def test_wrong_credentials_are_told_with_the_remedy(code):
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": code, "Message": "wrong"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    with pytest.raises(StageError, match=rf"storage s3://b/k: get_object: wrong \({code}\). Renew the credentials"):
        s3._refuse_for_good(ClientError(answer, "GetObject"), "get_object", {"Bucket": "b", "Key": "k"})


def test_missing_credentials_are_told_with_the_remedy(s3_endpoint, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StageError, match="storage s3://b/x.*NoCredentialsError.*storage.anonymous=true"):
        Lake(endpoint_url=s3_endpoint).list_parquet("s3://b/x")
    with pytest.raises(StageError, match="storage s3://b/x.*ProfileNotFound.*storage.profile"):
        Lake(endpoint_url=s3_endpoint, profile="nobody").list_parquet("s3://b/x")


def test_a_profile_gives_credentials_and_anonymous_needs_none(faulty, bucket, monkeypatch, tmp_path, s3_client):
    s3_client.put_object(Bucket=bucket.removeprefix("s3://"), Key="a", Body=b"1", ACL="public-read")
    (tmp_path / "credentials").write_text("[someone]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for lake in (
        Lake(endpoint_url=faulty.url, profile="someone", region="eu-west-1"),
        Lake(endpoint_url=faulty.url, anonymous=True, region="us-east-1"),
    ):
        assert lake.read_bytes(f"{bucket}/a") == b"1"


def test_pauses_grow_to_a_bound_and_differ():
    for attempt in range(1, 30):
        longest = min(20.0, 0.5 * 2 ** (attempt - 1))
        drawn = {s3.pause(attempt) for _ in range(50)}
        assert len(drawn) > 10
        assert all(longest / 2 <= p <= longest for p in drawn)


def test_an_outage_is_waited_for_as_long_as_the_settings_say(monkeypatch, bucket):
    monkeypatch.setattr(s3, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(s3, "LONGEST_PAUSE_SECONDS", 0.2)
    lake = Lake(endpoint_url="http://127.0.0.1:9", max_attempts=2, max_wait_seconds=1.5)
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"times in a row within [12] s.*storage.max_wait_seconds"):
        lake.read_bytes("s3://b/x")
    assert 1.5 <= time.monotonic() - started < 10
    # An outage that ends before is only waited for.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"123")

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()

        def log_message(self, *_):
            pass

    def appear():
        time.sleep(1.0)
        found.append(ThreadingHTTPServer(("127.0.0.1", port), Answer))
        found[0].serve_forever()

    found = []
    thread = threading.Thread(target=appear, daemon=True)
    thread.start()
    patient = Lake(endpoint_url=f"http://127.0.0.1:{port}", anonymous=True, max_attempts=1, max_wait_seconds=60.0)
    try:
        assert patient.read_bytes("s3://b/x") == b"123"
    finally:
        found[0].shutdown()
        found[0].server_close()


def test_only_the_third_failure_in_a_row_is_told(faulty, lake, bucket, caplog):
    lake.write_bytes(f"{bucket}/a", b"1")
    with caplog.at_level(logging.INFO):
        faulty.burst("slow_down", requests=2)
        lake.read_bytes(f"{bucket}/a")
        assert not [r for r in caplog.records if r.name.startswith("raydc")]
        faulty.burst("slow_down", requests=3)
        lake.read_bytes(f"{bucket}/a")
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("raydc")]
    assert "attempt 3 of 4 failed" in told
    assert f"{bucket}/a" in told


def test_one_of_several_writers_creates_a_file(lake, bucket):
    won = []

    def write(number: int) -> None:
        if lake.create(f"{bucket}/lease", b"%d" % number):
            won.append(number)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(won) == 1
    assert lake.read_bytes(f"{bucket}/lease") == b"%d" % won[0]


def test_a_created_file_whose_answer_was_lost_is_still_ours(faulty, lake, bucket):
    faulty.burst("lost", requests=1, methods=("PUT",))
    assert lake.create(f"{bucket}/lease", b"me") is True
    assert lake.create(f"{bucket}/lease", b"you") is False


def test_a_large_file_goes_up_in_parts_and_only_whole(faulty, lake, bucket, tmp_path, s3_client):
    monkey = os.urandom(2**20)
    source = tmp_path / "large"
    source.write_bytes(monkey * 11)
    fs, path = lake.file_system(f"{bucket}/large")
    faulty.share, faulty.kinds = 0.3, ("slow_down", "reset", "server_error")
    fs.put_file(str(source), path, chunksize=5 * 2**20)
    faulty.heal()
    assert lake.read_bytes(f"{bucket}/large") == source.read_bytes()
    name = bucket.removeprefix("s3://")
    faulty.burst("denied", requests=1, methods=("PUT",))
    with pytest.raises(StageError, match="AccessDenied"):
        fs.put_file(str(source), f"{path}-2", chunksize=5 * 2**20)
    assert not lake.exists(f"{bucket}/large-2")
    # Parts that belong to nothing would cost money for ever.
    assert not s3_client.list_multipart_uploads(Bucket=name).get("Uploads")


def test_objects_that_could_not_be_removed_are_asked_for_again_or_told(lake, faulty, bucket):
    lake.write_bytes(f"{bucket}/d/a", b"1")
    faulty.burst("kept", requests=1, methods=("POST",), part="?delete")
    lake.remove(f"{bucket}/d")
    assert faulty.faults == {"kept": 1}
    assert not lake.exists(f"{bucket}/d/a")
    lake.write_bytes(f"{bucket}/d/a", b"1")
    faulty.burst("kept_denied", requests=1, methods=("POST",), part="?delete")
    with pytest.raises(StageError, match="delete_objects: it is still there .AccessDenied"):
        lake.remove(f"{bucket}/d")


def test_a_file_that_is_open_asks_again_as_all_others_do(lake, faulty, bucket):
    # Ray Train writes its checkpoints like this.
    file_system, path = lake.arrow_file_system(f"{bucket}/checkpoint")
    faulty.burst("slow_down", requests=2, methods=("PUT",))
    with file_system.open_output_stream(path) as out:
        out.write(b"state")
    assert faulty.faults["slow_down"] == 2
    assert lake.read_bytes(f"{bucket}/checkpoint") == b"state"


def test_a_file_that_is_replaced_while_it_is_read_is_told_and_never_mixed(lake, bucket, stack):
    uri = f"{bucket}/in/a.parquet"

    def write(seed: int) -> None:
        with lake.staged(uri) as path:
            x = np.random.default_rng(seed).normal(size=(50_000, 16)).astype(np.float32)
            pq.write_table(shards.rows(x), path)

    write(1)
    parquet = pq.ParquetFile(stack.enter_context(lake.open_parquet(uri)))
    write(2)
    with pytest.raises(StageError, match="was replaced while it was being read"):
        parquet.read()


def test_the_door_keeps_its_patience_on_the_way_to_another_process(faulty, lake, bucket):
    fill(lake, bucket)
    fs = pickle.loads(pickle.dumps(lake.arrow_file_system(bucket)[0].handler.fs))
    assert (fs.max_attempts, fs.retries, fs.endpoint_url) == (4, 1, faulty.url)
    faulty.burst("slow_down", requests=3)
    assert pickle.loads(pickle.dumps(lake)).read_bytes(f"{bucket}/one/a") == b"123"


def test_slices_are_read_whole_through_a_faulty_store(faulty, lake, bucket):
    with lake.staged(f"{bucket}/in/a.parquet") as path:
        pq.write_table(shards.rows(shards.vectors(4000, dim=64)), path, row_group_size=500)
    faulty.share, faulty.most_in_a_row = 0.3, 2
    spec = InputSpec(
        columns=(Column(name="embedding", dim=64, dtype="float32"),),
        id_column="id",
        id_type="int64",
        on_bad_files="quarantine",
    )
    (part,) = plan_slices(read_footers(lake, lake.list_parquet(f"{bucket}/in")), 2**30)
    batches = list(read_slice(lake, part, spec))
    assert sum(len(b.keys) for b in batches) == 4000
    assert sum(len(b.rejects) for b in batches) == 0


def test_an_outage_never_counts_as_a_bad_file(faulty, lake, bucket):
    fill(lake, bucket)
    spec = InputSpec(
        columns=(Column(name="embedding", dim=4, dtype="float32"),),
        id_column="id",
        id_type="int64",
        on_bad_files="quarantine",
    )
    files = lake.list_parquet(f"{bucket}/in")
    (part,) = plan_slices(read_footers(lake, files), 2**30)
    faulty.burst("slow_down")
    with pytest.raises(StorageUnavailable):
        list(read_slice(lake, part, spec))
    with pytest.raises(StorageUnavailable):
        read_footers(lake, files)
