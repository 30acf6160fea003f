"""The proxy that the storage tests stand on: it passes on what is well, and makes each fault as it says."""

import pytest

from tests.faulty_s3 import FaultyS3

botocore = pytest.importorskip("botocore", reason="the S3 tests need boto3")
pytestmark = pytest.mark.s3


@pytest.fixture
def faulty(s3_endpoint):
    with FaultyS3(s3_endpoint, stall_seconds=5) as proxy:
        yield proxy


@pytest.fixture
def client(faulty, bucket):
    import boto3
    from botocore.config import Config

    once = Config(retries={"total_max_attempts": 1}, read_timeout=1, connect_timeout=1)
    found = boto3.client("s3", endpoint_url=faulty.url, config=once)
    yield found
    found.close()


def test_a_healthy_proxy_passes_everything_on(faulty, client, bucket):
    name = bucket.removeprefix("s3://")
    body = bytes(range(256)) * 5000
    client.put_object(Bucket=name, Key="a/b c", Body=body)
    assert client.get_object(Bucket=name, Key="a/b c")["Body"].read() == body
    assert client.get_object(Bucket=name, Key="a/b c", Range="bytes=10-19")["Body"].read() == body[10:20]
    assert client.head_object(Bucket=name, Key="a/b c")["ContentLength"] == len(body)
    assert [o["Key"] for o in client.list_objects_v2(Bucket=name)["Contents"]] == ["a/b c"]
    client.delete_object(Bucket=name, Key="a/b c")
    assert client.list_objects_v2(Bucket=name)["KeyCount"] == 0
    assert not faulty.faults
    assert [s.method for s in faulty.seen] == ["PUT", "GET", "GET", "HEAD", "GET", "DELETE", "GET"]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("slow_down", "SlowDown"),
        ("server_error", "InternalError"),
        ("throttled", "TooManyRequests"),
        ("bad_gateway", "502"),
        ("denied", "AccessDenied"),
        ("reset", "Connection (was closed|aborted|reset)|Could not connect"),
        ("lost", "Connection (was closed|aborted|reset)|Could not connect"),
        ("stall", "Read timeout"),
    ],
)
def test_each_fault_is_what_it_says(faulty, client, bucket, kind, error):
    faulty.burst(kind, requests=1, methods=("PUT",))
    name = bucket.removeprefix("s3://")
    with pytest.raises((botocore.exceptions.ClientError, botocore.exceptions.HTTPClientError), match=error):
        client.put_object(Bucket=name, Key="a", Body=b"12")
    found = client.list_objects_v2(Bucket=name)["KeyCount"]
    assert found == (1 if kind == "lost" else 0)
    assert faulty.faults == {kind: 1}


def test_a_cut_answer_ends_in_the_middle(faulty, client, bucket):
    name = bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="a", Body=b"12" * 50_000)
    faulty.burst("cut", requests=1)
    with pytest.raises((botocore.exceptions.BotoCoreError, botocore.exceptions.HTTPClientError, OSError)):
        client.get_object(Bucket=name, Key="a")["Body"].read()
    assert len(client.get_object(Bucket=name, Key="a")["Body"].read()) == 100_000


def test_faults_follow_from_the_seed_and_end_after_some_in_a_row(s3_endpoint):
    drawn = []
    for seed in (1, 1, 2):
        proxy = FaultyS3(s3_endpoint, share=0.5, seed=seed)
        drawn.append([proxy._choose("GET", f"/b/{i % 50}") for i in range(400)])
        proxy._server.server_close()
    assert drawn[0] == drawn[1] != drawn[2]
    assert 0.25 < sum(f is not None for f in drawn[0]) / 400 < 0.5
    proxy = FaultyS3(s3_endpoint, share=1.0, most_in_a_row=2)
    assert [proxy._choose("GET", "/b/a") is None for _ in range(6)] == [False, False, True, False, False, True]
    proxy._server.server_close()
