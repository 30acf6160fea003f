"""The S3 file system of raydc: s3fs with bounded retries of every request, and errors that say what to do.

All requests of s3fs, pages of listings included, go through one method, which is where both live. botocore's own
retries are off: its standard mode keeps a budget per client, which a burst of 503 uses up, and misses a 429 without a
code; its legacy mode misses connections that are reset; neither asks again when the body of an answer breaks off.
"""

import asyncio
import itertools
import logging
import os
import random
import time
from typing import Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    InvalidRegionError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from raydc.errors import StageError, StorageUnavailable
from raydc.storage.secrets import masked

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 20.0

# The first two are told in debug only: a 503 now and then is an object store's daily life.
_QUIET_ATTEMPTS = 2

_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_PASSING_CODES = {
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_PASSING_ERRORS = (
    HTTPClientError,
    ConnectionError,
    ResponseParserError,
    IncompleteReadError,
    ChecksumError,
    FlexibleChecksumError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
)
_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    TokenRetrievalError,
)

_RIGHTS = (
    "Grant the credentials in use the right to list, read and write there, or use others: storage.profile, or the "
    "environment. Without the right to list, a missing file looks forbidden, too."
)
_CREDENTIALS = "Renew the credentials in the environment or in the profile that storage.profile names."
_PLACE = "Check the bucket's name, storage.endpoint_url and storage.region."
_REMEDIES = {
    "AccessDenied": _RIGHTS,
    "AllAccessDisabled": _RIGHTS,
    "AccountProblem": _RIGHTS,
    "Forbidden": _RIGHTS,
    "403": _RIGHTS,
    "401": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "InvalidSecurity": _CREDENTIALS,
    "TokenRefreshRequired": _CREDENTIALS,
    "UnauthorizedAccess": _CREDENTIALS,
    "RequestTimeTooSkewed": "Set the clock of this machine.",
    "NoSuchBucket": _PLACE,
    "InvalidBucketName": _PLACE,
    "PermanentRedirect": _PLACE,
    "301": _PLACE,
    "AuthorizationHeaderMalformed": _PLACE,
    "IllegalLocationConstraintException": _PLACE,
    "QuotaExceeded": "Free space in the store; the same command continues.",
    "XMinioStorageFull": "Free space in the store; the same command continues.",
}


class PatientS3(S3FileSystem):
    """s3fs that asks again where another try may succeed, until `max_attempts` and `max_wait_seconds` are both used up.

    The pause doubles from half a second to twenty, each time by a random part of a half to the whole, so that workers
    which were refused together do not come back together.
    """

    # Ours is the only loop: s3fs would multiply it.
    retries = 1

    def __init__(
        self,
        *args: Any,
        max_attempts: int = 8,
        max_wait_seconds: float = 120.0,
        timeout_seconds: float = 30.0,
        **kwargs: Any,
    ) -> None:
        config: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": timeout_seconds,
            "read_timeout": timeout_seconds,
        }
        if kwargs.get("endpoint_url"):
            # Stores other than AWS's often refuse the checksums that botocore would add on its own. Where the
            # environment asks for them, it has its way.
            for setting in ("request_checksum_calculation", "response_checksum_validation"):
                if f"AWS_{setting.upper()}" not in os.environ:
                    config[setting] = "when_required"
        kwargs["config_kwargs"] = config | (kwargs.get("config_kwargs") or {})
        super().__init__(*args, **kwargs)
        self.max_attempts = max_attempts
        self.max_wait_seconds = max_wait_seconds

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        first_failure = None
        for attempt in itertools.count(1):
            try:
                return await self._ask(method, *akwarglist, **kwargs)
            except Exception as error:
                told = _of_botocore(error)
                if told is None:
                    raise
                if not _may_pass(told):
                    _refuse_for_good(told, method, kwargs)
                    raise
                where = f"{_place(kwargs)}: {method}: {masked(_text(told))}"
                first_failure = time.monotonic() if first_failure is None else first_failure
                waited = time.monotonic() - first_failure
                left = self.max_wait_seconds - waited
                if attempt >= self.max_attempts and left <= 0:
                    raise StorageUnavailable(
                        f"storage {where}, {attempt} times in a row within {waited:.0f} s. Check that the store at "
                        f"{masked(self.endpoint_url or 'its default endpoint')} is up and storage.endpoint_url is "
                        "right, or raise storage.max_wait_seconds or storage.max_attempts; the same command continues."
                    ) from None
                level = logging.WARNING if attempt > _QUIET_ATTEMPTS else logging.DEBUG
                log.log(level, "storage: %s; attempt %d of %d failed", where, attempt, self.max_attempts)
                # The last try of a long wait comes at its end, not up to a pause later.
                await asyncio.sleep(pause(attempt) if attempt < self.max_attempts else min(pause(attempt), left))
        raise AssertionError("unreachable")

    # What an open file asks with. That of s3fs is bound to its own method, which asks once.
    call_s3 = sync_wrapper(_call_s3)

    async def _ask(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        answer = await super()._call_s3(method, *akwarglist, **kwargs)
        if method == "get_object":
            # Read here, where a body that breaks off can be asked for again.
            body = answer["Body"]
            try:
                answer["Body"] = _Body(await body.read())
            finally:
                body.close()
        elif method == "delete_objects" and answer.get("Errors"):
            # The answer as a whole says 200.
            raise ClientError({"Error": answer["Errors"][0]}, "DeleteObjects")
        return answer


class _Body:
    """A body that has been read, in the place of the stream it came from."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    async def read(self, amount: int | None = None) -> bytes:
        """Return the next bytes, all that are left by default."""
        start = self._at
        self._at = len(self._content) if amount is None or amount < 0 else start + amount
        return self._content if start == 0 and self._at >= len(self._content) else self._content[start : self._at]

    def close(self) -> None:
        """Do nothing: the connection was given back when the body had been read."""


def pause(attempt: int) -> float:
    """Return the seconds to wait after the given failed attempt, the first being 1."""
    # Long waits have many attempts, whose powers of two no float holds.
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, 30))
    return longest * random.uniform(0.5, 1.0)


def _of_botocore(error: BaseException) -> BaseException | None:
    """Return what botocore said, under s3fs's translation of it; None where this is not an error of the store."""
    for found in (error, error.__cause__):
        if isinstance(found, (BotoCoreError, ClientError, *_PASSING_ERRORS)):
            return found
    return None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = error.response.get("Error", {}).get("Code", "")
        return status in _PASSING_STATUS or code in _PASSING_CODES or code in map(str, _PASSING_STATUS)
    if isinstance(error, (*_NO_CREDENTIALS, SSLError)):
        return False
    return isinstance(error, _PASSING_ERRORS)


def _refuse_for_good(error: BaseException, method: str, request: dict[str, Any]) -> None:
    """Raise a StageError with the remedy, if the error is one that a person has to mend; else return."""
    code, remedy = type(error).__name__, None
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        remedy = _REMEDIES.get(code)
        if code in ("PreconditionFailed", "412") and method == "get_object":
            remedy = "The file was replaced while it was being read. Let the input rest, and use a new --run-id."
    elif isinstance(error, _NO_CREDENTIALS):
        remedy = (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every machine, or storage.profile; or "
            "storage.anonymous=true for a public bucket."
        )
    elif isinstance(error, SSLError):
        remedy = "Check storage.endpoint_url, and the store's certificate (AWS_CA_BUNDLE names the authority's)."
    elif isinstance(error, InvalidRegionError):
        remedy = "Check storage.region."
    if remedy is not None:
        raise StageError(f"storage {_place(request)}: {method}: {masked(_text(error))} ({code}). {remedy}") from None


def _place(request: dict[str, Any]) -> str:
    key = request.get("Key") or request.get("Prefix") or ""
    return f"s3://{request.get('Bucket', '')}/{key}"


def _text(error: BaseException) -> str:
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        return found.get("Message") or f"error {found.get('Code', 'unknown')}"
    return (str(error).splitlines() or [""])[0] or type(error).__name__
