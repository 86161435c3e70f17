"""Run the application: HTTP in a thread, the loop of the model in the main one, to which mesh and signals belong."""

import errno
import ipaddress
import socket
import threading

import fastapi
import uvicorn

from llmjax.errors import UserError
from llmjax.serve.loop import Loop

_JOIN_SECONDS = 5.0


def listen(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A socket that listens; port 0: a free one.

    Raises UserError for an address that is not of this machine, or is in use, and for one that other machines can
    reach, without a key.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UserError(f"--host={host}: {error.strerror}; give an address of this machine, as 127.0.0.1") from None
    if not has_key and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"--host={host}: other machines can reach this address; set LLMJAX_API_KEY to a key that clients must send"
        )
    try:
        return socket.create_server((str(address[0]), port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port={port}: in use on {host}; end the program that uses it, or give another") from None
        raise UserError(f"--host={host} --port={port}: {error.strerror}; give others") from None


def run(app: fastapi.FastAPI, loop: Loop, listener: socket.socket) -> None:
    """Serve until an exception, such as that of a signal, ends the loop. The HTTP server has ended then, too."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    def serve_http() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            loop.close()

    thread = threading.Thread(target=serve_http, name="http", daemon=True)
    thread.start()
    try:
        loop.run()
    finally:
        server.should_exit = True
        thread.join(_JOIN_SECONDS)
    raise RuntimeError("the HTTP server has ended")
