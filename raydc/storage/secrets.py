"""Credentials stay out of what raydc writes: found in URIs, refused there, and masked in texts of other libraries."""

import os
import re
from urllib.parse import quote

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

_SECRET_NAME = re.compile(
    "TOKEN|SECRET|KEY|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CONNECTION_STRING|AUTHORIZATION|SIGNATURE", re.IGNORECASE
)
_PLAIN_URL = re.compile(r"https?://[^\s;?#@]+")
_PASSWORD_NAME = re.compile("PASS", re.IGNORECASE)
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
    for secret in _secrets():
        text = text.replace(secret, _MASK)
    text = _USER_AND_SECRET.sub(f"{_MASK}@", text)
    return _SECRET_QUERY.sub(rf"\1={_MASK}", text)


def _secrets() -> list[str]:
    """Return the values of all variables whose name sounds like a secret, the longest first.

    A value of several lines, such as a key file, counts line by line, because texts are often joined to one line.
    Errors of HTTP clients show a value as it stands in a URL.
    """
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not _is_harmless(name, value):
            for line in value.splitlines():
                found |= {line.strip(), quote(line.strip(), safe="")}
    return sorted((s for s in found if len(s) >= _SHORTEST_SECRET), key=len, reverse=True)


def _is_harmless(name: str, value: str) -> bool:
    """Return whether a value is a place (a file, a plain URL) or a number, whatever its variable's name sounds like."""
    if _PLAIN_URL.fullmatch(value):
        return True
    if value.replace(".", "", 1).isdigit():
        return not _PASSWORD_NAME.search(name)
    return value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value))
