"""The page beside a server that reads the shards: for any number of rows, on this machine alone.

A page in a file cannot read parquet, and one with a million responses in it is gigabytes. The server holds the index,
some bytes an item, and reads the shards of the forty items that a list shows. It listens to the loopback interface,
answers nobody who does not know the address's secret part, and no request that a page from elsewhere has made.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from phimr_nemo.errors import UserError
from phimr_nemo.show.items import VERDICTS, View, Wanted, select
from phimr_nemo.show.page import index_json, item_json, page, view_json
from phimr_nemo.text.printable import say

LOOPBACK: Final = "127.0.0.1"
SECRET_BYTES: Final = 16
MOST_ITEMS: Final = 256
"""In one answer."""
LONGEST_SEARCH: Final = 1_000
LONGEST_NUMBER: Final = 9
PACKING: Final = 1


class ViewServer(ThreadingHTTPServer):
    """Serves views to browsers of this machine.

    Args:
        views: what it serves.
        title: of the page.
        port: 0 = any that is free.

    Raises:
        UserError: the port is taken or may not be used.
    """

    daemon_threads = True

    def __init__(self, views: Sequence[View], *, title: str, port: int = 0) -> None:
        self.views, self.title = views, title
        self.secret = secrets.token_urlsafe(SECRET_BYTES)
        # Shards are read one request after the other: their tables are shared.
        self.reading = threading.Lock()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UserError(
                f"port {port} cannot be listened to: {error.strerror}",
                rule="phimr show --serve listens to a port of this machine",
                remedy="leave --port out, so that a free one is taken",
            ) from error

    @property
    def host(self) -> str:
        """Address and port, as a browser names them."""
        return f"{LOOPBACK}:{self.server_port}"

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{self.host}/{self.secret}/"

    def answer(self, parts: Sequence[str], query: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
        """Content type and text of a path behind the secret; None where there is nothing.

        Args:
            parts: of the path.
            query: its parameters.
        """
        if list(parts) == [""]:
            facts = [{**view_json(view, len(view.index)), "chunks": []} for view in self.views]
            meta = {"views": facts, "verdicts": VERDICTS, "served": True}
            return "text/html", page(meta, [], title=self.title)
        answers: dict[str, Callable[[View, Mapping[str, Sequence[str]]], Any]] = {
            "index": lambda view, _: index_json(view.index, len(view.index)),
            "items": _items,
            "search": _search,
        }
        if len(parts) != 2 or parts[0] not in answers:
            return None
        number = _number(parts[1], len(self.views))
        if number is None:
            return None
        with self.reading:
            found = answers[parts[0]](self.views[number], query)
        return None if found is None else ("application/json", json.dumps(found, ensure_ascii=False))


def _number(text: str, below: int) -> int | None:
    is_one = text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER and int(text) < below
    return int(text) if is_one else None


def _items(view: View, query: Mapping[str, Sequence[str]]) -> list[dict[str, Any]] | None:
    given = "".join(query.get("n", [])).split(",")
    numbers = [number for text in given if (number := _number(text, len(view.index))) is not None]
    if len(numbers) != len(given) or len(numbers) > MOST_ITEMS:
        return None
    return [item_json(item) for item in view.fetch(numbers)]


def _search(view: View, query: Mapping[str, Sequence[str]]) -> list[int] | None:
    text = "".join(query.get("q", []))
    return select(view, Wanted(text)).tolist() if 0 < len(text) <= LONGEST_SEARCH else None


class _Handler(BaseHTTPRequestHandler):
    """Answers GET alone."""

    server: ViewServer
    server_version = "phimr"
    sys_version = ""

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        # "/SECRET/items/0" -> "", SECRET, "items", "0"
        before, secret, *parts = [*asked.path.split("/"), ""] if asked.path.count("/") < 2 else asked.path.split("/")
        # A name that another page made to lead here is no name of ours.
        is_ours = self.headers.get("Host") in (self.server.host, f"localhost:{self.server.server_port}")
        if before or not is_ours or not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        try:
            found = self.server.answer(parts, parse_qs(asked.query))
        except UserError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, text = found
        body = gzip.compress(text.encode("utf-8"), PACKING)
        self.send_response(HTTPStatus.OK)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Encoding": "gzip",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the reader's."""


def serve_views(views: Sequence[View], *, title: str, port: int) -> None:
    """Serve views until the process is told to stop, which is how it ends.

    Args:
        views, title, port: see :class:`ViewServer`.

    Raises:
        UserError: the port is taken.
    """
    with ViewServer(views, title=title, port=port) as server:
        say(f"{server.address} (Ctrl-C ends it; on another machine: ssh -L {server.server_port}:{server.host} HOST)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
