"""The viewer's server: it listens only on the loopback address and answers only its own page.

A page of another site can make a browser send requests here, or have its own host name resolve to this address. The
former is visible in ``Sec-Fetch-Site``, the latter in ``Host``, and both are refused. The port is not compared, so that
a tunnel may use another one.
"""

from __future__ import annotations

import logging
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import maskattn
from maskattn.viewer.answers import Answer, Answers, refusal

__all__ = ["ViewerServer"]

_logger = logging.getLogger(__name__)
_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class ViewerServer(ThreadingHTTPServer):
    """Serves the viewer's answers at ``url``.

    Args:
        answers: the answers to serve, which are closed together with the server.
        port: port on the loopback address; 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, answers: Answers, port: int = 0) -> None:
        self.answers = answers
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """The page's URL."""
        return f"http://127.0.0.1:{self.server_port}/"

    def server_close(self) -> None:
        """Stop listening, and close every slide."""
        super().server_close()
        self.answers.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a broken connection at debug level only: it is not an error of the viewer."""
        _logger.debug("a connection ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: ViewerServer
    protocol_version = "HTTP/1.1"
    server_version = f"maskattn/{maskattn.__version__}"
    sys_version = ""
    # Nagle's algorithm would delay a small body until the header is acknowledged, by 40 ms.
    disable_nagle_algorithm = True
    timeout = 60.0  # an idle connection must not block its thread for ever

    def do_GET(self) -> None:
        self._send(self._answer())

    do_HEAD = do_GET

    def _answer(self) -> Answer:
        path = self.path.partition("#")[0].partition("?")[0]
        problem = self._problem_of_request(path)
        if problem is not None:
            return refusal(*problem)
        try:
            return self.server.answers.answer(path)
        except Exception as error:  # a failed request must not affect others
            _logger.warning("%s could not be answered: %s: %s", ascii(path[:200]), type(error).__name__, error)
            return refusal(500, f"this could not be answered: {type(error).__name__}; see the terminal for details")

    def _problem_of_request(self, path: str) -> tuple[int, str] | None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not _OWN_HOST.fullmatch(hosts[0].strip()):
            return 403, "a request must name this machine as its host, 127.0.0.1 or localhost; open the viewer there"
        site, mode = self.headers.get("Sec-Fetch-Site", "none"), self.headers.get("Sec-Fetch-Mode", "")
        # Another page may link to the viewer's page, but must not send any other request.
        if site not in ("none", "same-origin") and not (path == "/" and mode == "navigate"):
            return 403, "a request must come from the viewer's own page; open the viewer's URL itself"
        return None

    def _send(self, answer: Answer) -> None:
        self.request_version = "HTTP/1.1"  # HTTP 0.9 would send the body without headers
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        # URLs identify slides by number, so another run must not receive what was cached from this one.
        self.send_header("Cache-Control", "private, max-age=3600" if answer.lasting else "no-store")
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer an invalid request with a sentence, like every other error."""
        status = {501: 405, 505: 400}.get(int(code), int(code))  # the error is the client's
        answer = refusal(status, f"the viewer takes GET and HEAD of HTTP/1.1, got {message or 'something else'}")
        self.close_connection = True
        # The attributes that a response needs are not set if the request could not be parsed.
        self.command, self.requestline = getattr(self, "command", None) or "GET", ""
        self._send(answer)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Do not log requests, which would flood the terminal."""
