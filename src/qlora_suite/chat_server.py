"""Serving the chat page: to this machine alone, or to others behind a password; a bounded queue; no files.

Gradio can do more than this page needs: uploads, files of its cache, proxies, an API for programs, sharing through a tunnel. What is not
on the list below is refused before Gradio sees it.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from qlora_suite.chat_access import is_loopback
from qlora_suite.chat_page import look

WAITING = 16
"""Messages that may wait for their answer; more are refused with a sentence."""
LARGEST_REQUEST = 2**20
"""Bytes."""
SERVED = ("/assets/", "/static/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/")
SERVED_EXACTLY = (
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/login", "/logout"),
    *(f"/gradio_api/{name}" for name in ("startup-events", "run/predict", "cancel", "reset", "login_check")),
)
HEADERS = {
    # no handler in an attribute runs, whatever a sanitiser lets through, and nothing is fetched from elsewhere
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; script-src-attr 'none'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    b"base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Guard:
    """ASGI middleware: what the page needs, and nothing else. `hosts`: names it may be called by (None: any).

    A page from elsewhere whose name was made to lead to this machine calls it by its own name.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: tuple[str, ...] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if why := self.complaint(scope["path"], scope["method"], {k.lower(): v.decode("latin-1") for k, v in scope["headers"]}):
            await PlainTextResponse(why + "\n", status_code=403)(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS.items()]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def complaint(self, path: str, method: str, headers: dict[bytes, str]) -> str:
        host = headers.get(b"host", "").rpartition(":")[0] or headers.get(b"host", "")
        if self.hosts and host.strip("[]").lower() not in self.hosts:
            return "this page is served to this machine alone"
        if ".." in path or not (path.startswith(SERVED) or path.rstrip("/") in SERVED_EXACTLY or path == "/"):
            return "not served here"
        length = headers.get(b"content-length", "")
        if method not in ("GET", "HEAD") and not (length.isdigit() and int(length) <= LARGEST_REQUEST):
            return f"a request has at most {LARGEST_REQUEST:,} bytes, and says how many"
        return ""


def serve(page: gr.Blocks, address: str, port: int | None, password: str | None) -> str:
    """Serve in the background, until `page.close()`. Returns the page's address. `port` None: the first free one from 7860.

    Raises OSError if the port is taken or there is no such address.
    """
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)  # read although allowed_paths is empty
    hosts = ("127.0.0.1", "localhost", "::1", address.lower()) if is_loopback(address) else None
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    _, url, _ = page.launch(
        server_name=address,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        auth=None if password is None else lambda _, given: hmac.compare_digest(given.encode(), password.encode()),
        auth_message="Any name, and the password that the page was started with.",
        show_error=False,
        allowed_paths=[],
        max_file_size="1b",
        strict_cors=True,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        state_session_capacity=200,
        app_kwargs={
            **{"docs_url": None, "redoc_url": None, "openapi_url": None},
            "middleware": [Middleware(Guard, hosts=hosts)],
        },
        **look(),
    )
    return url
