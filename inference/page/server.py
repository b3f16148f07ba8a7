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
LOCAL = "127.0.0.1"
PORTS = range(7860, 7960)       # Gradio's.

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


def find_port(host: str, port: int | None) -> int:
    """The port at which the page is shown: the one that is asked for, or the first of PORTS that is free.

    Gradio would look for one itself, but it tries all ports also where the address is wrong, and waits at each.

    Raises:
        UserError: the port is taken, or all are, or the address is not one of this machine.
    """
    try:
        _try_port(host, 0)
    except (OSError, UnicodeError) as err:          # The latter of names that are no names.
        raise UserError(f"--host={host}: the page cannot be shown there ({err}): give an address of this "
                        "machine") from err
    reason = OSError()
    for candidate in PORTS if port is None else [port]:
        try:
            for address in (host, LOCAL):           # The server asks itself at the latter.
                _try_port(address, candidate)
            return candidate
        except OSError as err:
            reason = err
    if port is not None:
        raise UserError(f"--port={port}: the page cannot be shown there ({reason}): give another one, or leave it "
                        "out") from reason
    raise UserError(f"--host={host}: none of the ports {PORTS[0]} to {PORTS[-1]} is free there ({reason}): name "
                    "another one by --port, or end a program that has one of these")


def _try_port(host: str, port: int) -> None:
    """Take a port and give it back. Raises OSError: it is taken, or must not be used."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # As the server does.
        trial.bind(address)


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
    port = find_port(host, port)
    try:
        _, local, public = page.blocks.queue(default_concurrency_limit=4).launch(
            server_name=host, server_port=port, share=share, inbrowser=False, quiet=True, prevent_thread_lock=True,
            footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
            max_file_size=LARGEST_UPLOAD, theme=theme, css=STYLE,
            app_kwargs={"middleware": [Middleware(AskNobodyElse)]})
    except OSError:
        find_port(host, port)       # It raises the error for people if another program was faster.
        raise
    address: str = public or local
    if wait:
        print(f"{address}  (end with Ctrl-C)", flush=True)
        page.blocks.block_thread()
    return address
