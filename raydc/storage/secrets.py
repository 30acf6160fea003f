"""Credentials stay out of what raydc writes: found in URIs, refused there, and masked in texts of other libraries."""

import os
import re

from raydc.errors import ConfigError

_MASK = "***"

# user:secret@ after a scheme, and the query parameters by which stores pass signatures and keys.
_USER_AND_SECRET = re.compile(r"(?<=://)[^/@\s]*@(?=[^\s])")
_SECRET_QUERY = re.compile(
    r"([?&](?:[\w.-]*(?:token|secret|signature|credential|password|passwd|access[_-]?key(?:id)?|api[_-]?key)"
    r"|sig|key|auth))=([^&#\s]+)",
    re.IGNORECASE,
)
# The container of Azure's abfs://container@account stands where others have a user.
_AZURE = re.compile(r"^(abfss?|az|adl|wasbs?)://[^/@:\s]*@")

_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
)
# A shorter value would also hit harmless text.
_SHORTEST_SECRET = 8


def has_credentials(uri: str) -> bool:
    """Return whether a URI carries a user and password, a key, a token or a signature."""
    with_user = _USER_AND_SECRET.search(uri) is not None and not _AZURE.match(uri)
    return with_user or _SECRET_QUERY.search(uri) is not None


def refuse_credentials(uri: str, setting: str) -> None:
    """Raise if a URI carries credentials; its text shows none of them.

    Raises:
        ConfigError: it does.
    """
    if has_credentials(uri):
        raise ConfigError(f"{setting}={masked(uri)} carries credentials. {REMEDY}")


REMEDY = (
    "URIs are written down in the run folder: take the secret out, and give it by environment (AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY, ...) or by a profile (storage.profile)."
)


def masked(text: str) -> str:
    """Return a text without credentials: those in URIs, and the values of the environment's secrets."""
    text = _USER_AND_SECRET.sub(f"{_MASK}@", text)
    text = _SECRET_QUERY.sub(rf"\1={_MASK}", text)
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, _MASK)
    return text
