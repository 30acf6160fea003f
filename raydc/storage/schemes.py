"""Which URIs raydc opens: an allow-list of schemes, no chains of them, and no service of the machine itself.

Settings may come from somebody else than the machine's owner, as in a service around raydc. fsspec knows some fifty
schemes; several of them read through another one, run a program, or reach whatever the machine can reach.
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

SCHEMES = (
    "file",
    "s3",
    "s3a",
    "s3n",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "az",
    "adl",
    "hdfs",
    "webhdfs",
    "hf",
    "http",
    "https",
    "lakefs",
    "oci",
    "oss",
)
"""Schemes that are opened; a plain path has none."""

ONE_PROCESS = "memory"
"""Opened for the process that wrote it, and refused in settings: no worker sees it."""

# fsspec reads `a::b` as: a, on top of b.
_CHAIN = re.compile(r"[\w+.-]*::")
_IPV6_HOST = re.compile(r"^\w+://\[[0-9a-f:.%]*\]", re.IGNORECASE)
_WITH_HOST = ("http", "https", "webhdfs", "hdfs")
# Names and addresses outside the link-local networks under which clouds tell a machine its credentials.
_METADATA_NAMES = ("metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal")
_METADATA_ADDRESSES = (ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200"))


def why_refused(uri: str) -> str | None:
    """Return why a URI is not opened, with what to do instead; None for one that is.

    Looks at the text alone. A name that resolves to a link-local address, or an answer that redirects there, is for the
    network's rules to stop.
    """
    scheme, separator, _ = uri.partition("://")
    # fsspec itself never sees the paths of local files and of S3.
    chained = separator and scheme not in ("file", "s3", "s3a", "s3n") and "::" in _IPV6_HOST.sub("", uri)
    if _CHAIN.match(uri) or chained:
        return "chains file systems by `::`. Give the file or folder itself"
    if not separator:
        return None
    if scheme not in (*SCHEMES, ONE_PROCESS):
        return f"has the scheme {scheme!r}. Use a path or one of {', '.join(SCHEMES)}"
    if scheme in _WITH_HOST and is_link_local(uri):
        return "names a link-local address, where a cloud keeps the credentials of the machine. Use another host"
    return None


def is_link_local(url: str) -> bool:
    """Return whether the host of a URL is a link-local address or the name of a cloud's metadata service."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".").lower()
    except ValueError:
        return True
    if host in _METADATA_NAMES:
        return True
    address = _address(host)
    if address is None:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address.sixtofour or address
    return address.is_link_local or address in _METADATA_ADDRESSES


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host is written as; None for a name.

    Resolvers take 2852039166, 0xa9fea9fe and 169.254.43518 for 169.254.169.254 as well.
    """
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None
