"""Who may ask the studio's server for what: one person, in one browser, from the server's own pages.

Threats are another user of the machine, a web page that is open in the same browser, and names that a
foreign page makes point at this machine. Every request passes all of these checks, in this order:

1. `Host` is exactly one of the server's names with its port (a foreign name would be DNS rebinding).
2. A page that another site opens or embeds gets nothing: `Sec-Fetch-Site` must be `same-origin`, or `none`
   where the user opened a page itself.
3. The browser has the cookie of this server, which only the one-time address in a file of the user's gives.
4. A change (`POST`) has the server's own origin, port included, and the token that only its pages know.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 2**20
ENTER = "/enter"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_ENTERED = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Studio</title>'
    '<meta http-equiv="refresh" content="0; url=/"></head><body><a href="/">Open the studio</a></body></html>'
)
"""A page: a cookie that is strict about its site is not sent along a redirect that began at a file."""


class Guard:
    """ASGI middleware that lets only the user's own pages through.

    Args:
        app: the application.
        port: of the server.
        hosts: more names that the server is reached by, with their ports, such as those of a tunnel.
    """

    def __init__(self, app: ASGIApp, port: int, hosts: Iterable[str] = ()) -> None:
        self.app, self.cookie = app, f"mapo_fast_studio_{port}"
        self.hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}", *hosts})
        self.origins = frozenset(f"{scheme}://{host}" for host in self.hosts for scheme in ("http", "https"))
        self.once: str | None = secrets.token_urlsafe(32)
        """The one-time token of the address that opens the studio; None once it is used."""
        self._session, self.token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        """The cookie's value; and the token that a change needs."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(one for one in extra if one[0] not in names)]
            await send(message)

        request = Request(scope, receive)
        refused = self._refused(request)
        if refused is not None:
            await PlainTextResponse(refused, 403)(scope, receive, guarded)
        elif scope["path"] == ENTER:
            await self._enter(request)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def _refused(self, request: Request) -> str | None:
        headers = request.headers
        if headers.get("host") not in self.hosts or len(headers.getlist("host")) != 1:
            return "unknown host: open the studio by the address that it prints"
        if request.method not in ("GET", "POST"):
            return "only GET and POST"
        site = headers.get("sec-fetch-site")
        opens = request.method == "GET" and request.url.path in ("/", ENTER)
        if opens:
            # From a file the browser says cross-site; the one-time token stands against other sites there.
            if site not in (None, "none", "same-origin") and request.url.path != ENTER:
                return "the studio opens from its own pages only"
        elif site != "same-origin":
            return "only the studio's own pages may ask for this"
        if request.url.path == ENTER:
            return None
        if not _same(request.cookies.get(self.cookie, ""), self._session):
            return "this browser is not signed in: start mapo-fast studio again, or open its file once"
        return self._refused_change(headers) if request.method == "POST" else None

    def _refused_change(self, headers: Headers) -> str | None:
        if headers.get("origin") not in self.origins:
            return "a change needs the studio's own origin"
        if not _same(headers.get("x-studio-token", ""), self.token):
            return "a change needs the page's token: load the page again"
        length = headers.get("content-length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return "a request has a length of at most 1 MiB"
        return None

    def _enter(self, request: Request) -> PlainTextResponse | HTMLResponse:
        given, once = request.query_params.get("token", ""), self.once
        if request.method != "GET" or once is None or not _same(given, once):
            return PlainTextResponse("this address was used already: start mapo-fast studio again", 403)
        self.once = None
        response = HTMLResponse(_ENTERED)
        response.set_cookie(self.cookie, self._session, httponly=True, samesite="strict", path="/")
        return response


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
