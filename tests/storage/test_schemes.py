"""URIs that are opened, and those that never are: chains, programs, and the machine's own services."""

import pytest

from raydc.config import parse_config
from raydc.errors import ConfigError
from raydc.storage.lake import Lake
from raydc.storage.schemes import SCHEMES, is_link_local, why_refused

OPENED = [
    "/data/x.parquet",
    "data/a::b.parquet",
    "data:x",
    "file:///data/x",
    "s3://bucket/a::b",
    "gs://bucket/x",
    "abfs://container@account.dfs.core.windows.net/x",
    "https://host.example/x.parquet",
    "http://10.0.0.1:9000/x",
    "http://[2001:db8::1]:9000/x",
]
REFUSED = [
    ("simplecache::memory://x", "chains"),
    ("simplecache::s3://bucket/x", "chains"),
    ("filecache::/data/x", "chains"),
    ("https://host/x::http://169.254.169.254/", "chains"),
    ("zip://a::file:///x", "chains"),
    ("gs://bucket/x::file:///etc", "chains"),
    ("reference://", "has the scheme 'reference'"),
    ("github://org/x", "has the scheme 'github'"),
    ("ssh://host/x", "has the scheme 'ssh'"),
    ("nowhere://bucket/x", "has the scheme 'nowhere'. Use a path or one of file, s3"),
    ("S3://bucket/x", "has the scheme 'S3'"),
    ("http://169.254.169.254/latest/meta-data", "link-local"),
    ("webhdfs://169.254.169.254:80/x", "link-local"),
]


@pytest.mark.parametrize("uri", OPENED)
def test_paths_and_stores_are_opened(uri):
    assert why_refused(uri) is None


@pytest.mark.parametrize(("uri", "reason"), REFUSED)
def test_chains_foreign_schemes_and_link_local_hosts_are_refused_by_settings_and_by_the_door(uri, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_config({"input": {"path": uri}})
    with pytest.raises(ConfigError, match=reason):
        Lake().exists(uri)


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.170.2:8080",
        "2852039166",
        "0xa9fea9fe",
        "169.254.43518",
        "[fe80::1]",
        "[fe80::1%25eth0]",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2::254]",
        "100.100.100.200",
        "metadata.google.internal",
        "METADATA.google.internal.",
        "user@169.254.169.254",
        "[broken",
    ],
)
def test_a_link_local_host_is_known_in_every_spelling(host):
    assert is_link_local(f"http://{host}/x")


@pytest.mark.parametrize("host", ["10.0.0.1", "127.0.0.1:9000", "localhost", "[::1]:9000", "minio", "169.253.0.1"])
def test_other_hosts_are_left_alone(host):
    assert not is_link_local(f"http://{host}/x")


@pytest.mark.parametrize(
    "settings",
    [
        {"storage": {"endpoint_url": "http://169.254.169.254"}},
        {"output": "simplecache::memory://runs"},
        {"publish": {"delta": {"uri": "reference://x"}}},
        {"fit": {"objective": "distill", "teacher": "ssh://host/runs/a"}},
        {"publish": {"iceberg": {"properties": {"type": "rest", "uri": "http://169.254.169.254/"}}}},
        {"publish": {"iceberg": {"properties": {"s3.endpoint": "http://[fe80::1]"}}}},
        {"input": {"embedding_columns": [{"npy": "tar://{stem}::x"}]}},
    ],
)
def test_every_setting_that_takes_a_uri_asks_the_same_list(settings):
    with pytest.raises(ConfigError, match="link-local|chains|scheme"):
        parse_config({"input": {"path": "/a"}} | settings)


def test_an_endpoint_on_this_machine_is_taken_in_ipv6_too():
    config = parse_config({"input": {"path": "/a"}, "storage": {"endpoint_url": "http://[::1]:9000"}})
    assert config.storage.endpoint_url == "http://[::1]:9000"


def test_names_with_colons_are_local_files(tmp_path):
    (tmp_path / "a::b").write_bytes(b"1")
    assert Lake().read_bytes(f"{tmp_path}/a::b") == b"1"
    assert Lake().read_bytes(f"file://{tmp_path}/a::b") == b"1"


def test_every_scheme_of_the_list_is_known_to_fsspec():
    from fsspec.registry import known_implementations

    known = {*known_implementations, "s3n"}
    assert set(SCHEMES) - known <= {"abfss"}
