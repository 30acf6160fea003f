"""An HTTP proxy before an S3 server that answers a share of the requests wrongly, or not at all.

    with FaultyS3(s3_endpoint, share=0.1, seed=3) as faulty:        # any S3 server's URL
        lake = Lake(endpoint_url=faulty.url)                        # or AWS_ENDPOINT_URL=faulty.url in a subprocess
        faulty.burst("slow_down", seconds=5)                        # every request, for a while
        faulty.burst("reset", requests=20, methods=("PUT",))        # or a number of them
        faulty.share = 0                                            # healthy again
        assert faulty.faults["slow_down"] > 0                       # what was done, by kind
        faulty.seen                                                 # every request: Seen(method, path, fault)

Kinds of fault:
    slow_down, server_error, throttled, bad_gateway   an answer of 503, 500, 429, 502; the request goes no further
    reset     the connection is reset before the server has heard anything
    lost      the server has done what was asked, then the connection is reset before the answer
    cut       half of the answer's body, then a reset; of an answer without a body, the same as lost
    stall     no answer for `stall_seconds`, then a reset
    denied    403 AccessDenied: not a passing fault, drawn only where it is named
    kept, kept_denied    200 to a DELETE of many objects, but one was left there, for SlowDown or AccessDenied; likewise

Which request fails follows from (seed, method, path, how often this one was asked), not from the order of arrival. The
same request is answered well after at most `most_in_a_row` faults in a row; a burst has no such limit. Requests keep
the client's own Host header, so the signature stays right for servers that check it.
"""

import hashlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

PASSING = ("slow_down", "server_error", "throttled", "bad_gateway", "reset", "lost", "cut")

_LEFT = "<DeleteResult><Error><Key>a</Key><Code>{}</Code><Message>it is still there</Message></Error></DeleteResult>"
_ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "server_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "throttled": (429, "TooManyRequests", "Too many requests."),
    "bad_gateway": (502, None, "<html><body>Bad Gateway</body></html>"),
    "denied": (403, "AccessDenied", "Access Denied"),
    "kept": (200, None, _LEFT.format("SlowDown")),
    "kept_denied": (200, None, _LEFT.format("AccessDenied")),
}
# These belong to one connection and are not passed on.
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "proxy-connection",
}


@dataclass(frozen=True)
class Seen:
    """One request and what became of it."""

    method: str
    path: str
    """With its query."""

    fault: str | None


@dataclass
class _Burst:
    kind: str
    until: float
    requests: float
    methods: Sequence[str] | None
    part: str


class FaultyS3:
    """The proxy; a context manager. `share`, `kinds` and bursts may be changed while it runs."""

    def __init__(
        self,
        upstream: str,
        *,
        share: float = 0.0,
        seed: int = 0,
        kinds: Sequence[str] = PASSING,
        most_in_a_row: int = 2,
        stall_seconds: float = 30.0,
    ) -> None:
        self.share = share
        self.kinds = tuple(kinds)
        self.seen: list[Seen] = []
        self._upstream = urlsplit(upstream)
        self._seed = seed
        self._most_in_a_row = most_in_a_row
        self._stall_seconds = stall_seconds
        self._asked: Counter[tuple[str, str]] = Counter()
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._bursts: list[_Burst] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.block_on_close = False

    @property
    def url(self) -> str:
        """The endpoint to give to clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def faults(self) -> Counter[str]:
        """How often each kind of fault was made."""
        with self._lock:
            return Counter(s.fault for s in self.seen if s.fault)

    def burst(
        self,
        kind: str,
        *,
        seconds: float = float("inf"),
        requests: float = float("inf"),
        methods: Sequence[str] | None = None,
        part: str = "",
    ) -> None:
        """Make every request fail from now on, for a time or a number of requests.

        Of some methods or of all, and where the path with its query holds `part`.
        """
        with self._lock:
            self._bursts.append(_Burst(kind, time.monotonic() + seconds, requests, methods, part))

    def heal(self) -> None:
        """End all bursts and answer everything well."""
        with self._lock:
            self._bursts.clear()
            self.share = 0.0

    def __enter__(self) -> "FaultyS3":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _choose(self, method: str, path: str) -> str | None:
        key = (method, path)
        with self._lock:
            fault = self._of_a_burst(method, path)
            if fault is None and self.share and self.kinds and self._in_a_row[key] < self._most_in_a_row:
                drawn = hashlib.sha256(repr((self._seed, key, self._asked[key])).encode()).digest()
                if int.from_bytes(drawn[:8], "big") < self.share * 2**64:
                    fault = self.kinds[drawn[8] % len(self.kinds)]
            self._asked[key] += 1
            self._in_a_row[key] = self._in_a_row[key] + 1 if fault else 0
            self.seen.append(Seen(method, path, fault))
        return fault

    def _of_a_burst(self, method: str, path: str) -> str | None:
        now = time.monotonic()
        self._bursts = [b for b in self._bursts if b.until > now and b.requests > 0]
        for burst in self._bursts:
            if (burst.methods is None or method in burst.methods) and burst.part in path:
                burst.requests -= 1
                return burst.kind
        return None

    def _ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        assert self._upstream.hostname is not None
        connection = http.client.HTTPConnection(self._upstream.hostname, self._upstream.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                # The client may hang up, which is what many a test is about.
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def _pass_on(self) -> None:
                body = _body(self)
                fault = proxy._choose(self.command, self.path)
                if fault in _ANSWERS:
                    self._refuse(*_ANSWERS[fault])
                elif fault in ("reset", "stall"):
                    if fault == "stall":
                        proxy._stopped.wait(proxy._stall_seconds)
                    self._reset()
                else:
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
                    if self.headers.get("Transfer-Encoding"):
                        headers["Content-Length"] = str(len(body))
                    status, found, content = proxy._ask(self.command, self.path, headers, body)
                    if fault == "lost" or (fault == "cut" and (len(content) < 2 or self.command == "HEAD")):
                        self._reset()
                    else:
                        self._answer(status, found, content, cut=fault == "cut")

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

            def _refuse(self, status: int, code: str | None, text: str) -> None:
                content = text if code is None else f"<Error><Code>{code}</Code><Message>{text}</Message></Error>"
                body = content.encode()
                self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", len(body))], body)

            def _answer(self, status: int, headers: Sequence[tuple[str, Any]], body: bytes, cut: bool = False) -> None:
                self.send_response_only(status)
                kept = [(k, v) for k, v in headers if k.lower() not in _HOP_BY_HOP]
                if self.command != "HEAD" and status != 204:
                    kept = [(k, v) for k, v in kept if k.lower() != "content-length"] + [("Content-Length", len(body))]
                for name, value in kept:
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.wfile.flush()
                    # Long enough for the half to arrive: a reset throws away what was not read yet.
                    time.sleep(0.05)
                    self._reset()

            def _reset(self) -> None:
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RD)
                self.connection.close()

        return Handler


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in request.headers.get("Transfer-Encoding", ""):
        parts = []
        while size := int(request.rfile.readline().split(b";")[0], 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        while request.rfile.readline().strip():
            pass
        return b"".join(parts)
    return request.rfile.read(int(request.headers.get("Content-Length") or 0))
