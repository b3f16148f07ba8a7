# SPDX-License-Identifier: Apache-2.0
"""The server that shows the page, on this machine and to nobody else unless it is asked to."""
import os
import socket

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dnnlib import UserError
from inference.page.app import STYLE, Page

LARGEST_UPLOAD = "64mb"

#----------------------------------------------------------------------------

class AskNobodyElse:
    """Answers tell the browser to load nothing from other machines."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.POLICY)]
            await send(message)
        await self.app(scope, receive, answer)


def require_place(host: str, port: int | None) -> None:
    """Refuse a place where no page can be shown. Gradio would try a hundred ports, and wait at each.

    Raises:
        UserError: the port is taken, or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # As the server does.
            trial.bind(address)
    except (OSError, UnicodeError) as err:          # The latter of names that are no names.
        where = f"--host={host}" + ("" if port is None else f" --port={port}")
        raise UserError(f"{where}: the page cannot be shown there ({err}): give another --port, or leave it out, and "
                        "an address of this machine as --host") from err


def serve(page: Page, host: str, port: int | None, share: bool, wait: bool = True) -> str:
    """Show the page to browsers.

    Args:
        page: The page.
        host: Address of this machine at which it is shown.
        port: None: the first one that is free, from 7860 on.
        share: Also at a public address, through Gradio's servers.
        wait: Until the program is interrupted.

    Returns:
        Its address.

    Raises:
        UserError: the port is taken or the address is not one of this machine.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    # Proxies are for other machines. Gradio asks its own server whether it answers.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(
        filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1", "localhost", host]))
    require_place(host, port)
    _, local, public = page.blocks.queue(default_concurrency_limit=4).launch(
        server_name=host, server_port=port, share=share, inbrowser=False, quiet=True, prevent_thread_lock=True,
        footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        max_file_size=LARGEST_UPLOAD, theme=theme, css=STYLE,
        app_kwargs={"middleware": [Middleware(AskNobodyElse)]})
    address: str = public or local
    if wait:
        print(f"{address}  (end with Ctrl-C)", flush=True)
        page.blocks.block_thread()
    return address
