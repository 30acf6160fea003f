"""Credentials: found in URIs, refused there, and masked wherever a text of another library may carry them."""

import pytest

from raydc.config import parse_config
from raydc.errors import ConfigError
from raydc.storage.lake import Lake
from raydc.storage.secrets import has_credentials, masked

SECRET = "wJalrXUtnFEMI/K7MDENG"
CARRIERS = [
    "s3://AKIA123:{}@bucket/x",
    "s3://{}@bucket/x",
    "https://user:{}@host/x",
    "https://host/x?X-Amz-Algorithm=a&X-Amz-Signature={}",
    "https://host/x?X-Amz-Security-Token={}&b=c",
    "https://account.blob.core/x?sv=2021&sig={}",
    "https://host/x?token={}",
    "https://host/x?access_token={}",
    "gs://bucket/x?key={}",
    "https://host/x?AWSAccessKeyId={}",
    "https://host/x?password={}",
]


@pytest.mark.parametrize("uri", CARRIERS)
def test_uris_with_credentials_are_told_and_masked(uri):
    uri = uri.replace("{}", SECRET.replace("/", ""))
    assert has_credentials(uri)
    assert SECRET.replace("/", "") not in masked(f"cannot read {uri}: no such file")
    assert "***" in masked(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/x",
        "s3://bucket/a@b/x",
        "/data/user@host/x.parquet",
        "s3://bucket/part-?.parquet",
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/x?versionId=123",
        "gs://bucket/tokens/key=1/x.parquet",
        "https://host/x?page=2",
    ],
)
def test_other_uris_are_left_as_they_are(uri):
    assert not has_credentials(uri)
    if not uri.startswith("abfs"):
        assert masked(uri) == uri


def test_secrets_of_the_environment_are_masked_in_any_text(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "short")
    assert masked(f"the request {SECRET} was refused") == "the request *** was refused"
    assert masked("a short text") == "a short text"


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ({"input": {"path": "s3://key:hidden-value@bucket/x"}}, "input.path"),
        ({"input": {"path": ["/a", "s3://key:hidden-value@bucket/x"]}}, "input.path"),
        ({"output": "s3://key:hidden-value@bucket/x"}, "output"),
        ({"publish": {"delta": {"uri": "s3://key:hidden-value@bucket/x"}}}, "publish.delta.uri"),
        ({"storage": {"endpoint_url": "http://key:hidden-value@localhost:9000"}}, "storage.endpoint_url"),
    ],
)
def test_settings_with_credentials_are_refused_without_repeating_them(section, setting):
    with pytest.raises(ConfigError, match=f"{setting}=.*carries credentials.*AWS_SECRET_ACCESS_KEY") as caught:
        parse_config({"input": {"path": "/a"}} | section)
    assert "hidden-value" not in str(caught.value)


def test_an_unknown_secret_setting_is_refused_without_repeating_it():
    with pytest.raises(ConfigError, match="storage.secret: unknown setting") as caught:
        parse_config({"input": {"path": "/a"}, "storage": {"secret": "hidden-value"}})
    assert "hidden-value" not in str(caught.value)


def test_the_door_refuses_credentials_too():
    for call in (Lake().exists, Lake().read_bytes, Lake().list_parquet):
        with pytest.raises(ConfigError, match="carries credentials") as caught:
            call("s3://key:hidden-value@bucket/x")
        assert "hidden-value" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"storage": {"endpoint_url": "localhost:9000"}}, "storage.endpoint_url='localhost:9000' must begin with http"),
        ({"output": "memory://runs"}, "output=memory://runs lives in one process"),
        ({"storage": {"max_attempts": 0}}, "storage.max_attempts=0"),
        ({"storage": {"timeout_seconds": 0}}, "storage.timeout_seconds=0"),
    ],
)
def test_storage_that_cannot_work_is_refused_before_anything_starts(section, text):
    with pytest.raises(ConfigError, match=text):
        parse_config({"input": {"path": "/a"}} | section)
