"""Credentials: found in URIs, refused there, and masked wherever a text of another library may carry them."""

import pytest

from raydc.cli import main
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


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_STORAGE_CONNECTION_STRING",
        "HF_TOKEN",
        "DATABRICKS_TOKEN",
        "RAY_AUTH_TOKEN",
        "PYICEBERG_CATALOG__RAYDC__CREDENTIAL",
        "PYICEBERG_CATALOG__RAYDC__HEADER__AUTHORIZATION",
        "pgpassword",
    ],
)
def test_secrets_of_the_environment_are_masked_in_any_text(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    assert masked(f"the request {SECRET} was refused") == "the request *** was refused"
    # As a client shows it that had to put it into a URL.
    assert "K7MDENG" not in masked(f"GET /x/{SECRET.replace('/', '%2F')}/y")


def test_a_secret_of_several_lines_and_one_inside_another_are_masked_whole(monkeypatch):
    monkeypatch.setenv("MY_PRIVATE_KEY", "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQ\n-----END KEY-----\n")
    monkeypatch.setenv("SHORT_TOKEN", "abcdefgh")
    monkeypatch.setenv("LONG_TOKEN", "abcdefgh-ijklmnop")
    assert masked("bad key MIIEvQIBADANBg kqhkiG9w0BAQ") == "bad key *** ***"
    assert masked("of abcdefgh-ijklmnop and abcdefgh") == "of *** and ***"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SESSION_TOKEN", "short"),
        ("MAX_TOKENS", "86400000"),
        ("KEY_SHARE", "0.12345678"),
        ("GOOGLE_APPLICATION_CREDENTIALS", __file__),
        ("TOKEN_URL", "https://login.example/oauth2/token"),
        ("HOME_OF_NO_MATTER", "a plain value"),
    ],
)
def test_short_values_numbers_files_and_plain_urls_are_left_to_be_read(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert masked(f"the value {value} is wrong") == f"the value {value} is wrong"


def test_a_url_with_a_signature_and_a_number_as_a_password_are_masked(monkeypatch):
    monkeypatch.setenv("STORE_CONNECTION_STRING", "BlobEndpoint=https://x.example;SharedAccessSignature=sv=1&sig=abc")
    monkeypatch.setenv("DB_PASSWORD", "1234567890")
    assert masked("no BlobEndpoint=https://x.example;SharedAccessSignature=sv=1&sig=abc") == "no ***"
    assert masked("user me, 1234567890") == "user me, ***"


def test_the_command_masks_whatever_error_it_prints(monkeypatch, capsys):
    monkeypatch.setenv("SOME_TOKEN", "wJalrXUtnFEMI")
    with pytest.raises(SystemExit):
        main(["show", "/no/such/wJalrXUtnFEMI"])
    assert "/no/such/***: no run there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        ({"input": {"path": "s3://key:hidden-value@bucket/x"}}, "input.path"),
        ({"input": {"path": ["/a", "s3://key:hidden-value@bucket/x"]}}, "input.path"),
        ({"output": "s3://key:hidden-value@bucket/x"}, "output"),
        ({"publish": {"delta": {"uri": "s3://key:hidden-value@bucket/x"}}}, "publish.delta.uri"),
        ({"fit": {"objective": "distill", "teacher": "s3://key:hidden-value@bucket/x"}}, "fit.teacher"),
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
        ({"storage": {"max_wait_seconds": -1}}, "storage.max_wait_seconds=-1"),
        ({"storage": {"max_wait_seconds": 1800}}, "max_wait_seconds=1800 must be below assign.stall_seconds=1800"),
    ],
)
def test_storage_that_cannot_work_is_refused_before_anything_starts(section, text):
    with pytest.raises(ConfigError, match=text):
        parse_config({"input": {"path": "/a"}} | section)
