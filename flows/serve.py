"""A segmenter behind an address: the file of a photo in, a palette PNG of its size out.

Whoever asks needs the token. One photo is segmented at a time; the others wait for their turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from flows.servers import until_told
from wsss_core.config import is_loopback
from wsss_core.errors import DataError, InputError, TooLargeError

TOKEN = "CONTA_TOKEN"  # noqa: S105 - the name of the variable
LIMIT_BYTES = 32_000_000  # a photo of 50 megapixels takes less
MOST_CONNECTIONS = 16  # each may hold a photo in memory
GRACE_S = 10
REST_BYTES, REST_S = (
    2 * LIMIT_BYTES,
    10,
)  # of what is refused: a closed socket would lose the reason


def build_app(segment: Callable[[bytes], bytes], labels: Sequence[str], *, token: str) -> Starlette:
    """The application: POST /segment, GET /labels, and GET /health, which asks for no token.

    What is refused gets one line: 401 without the token, 413 for too many bytes or pixels, 400 for
    what is no photo.

    Args:
        segment: From the content of a photo's file to that of its mask's; raises `DataError`.
        labels: Names of the mask's values, background first.
        token: What `Authorization: Bearer` has to hold.
    """
    turn = asyncio.Lock()

    async def answer_segment(request: Request) -> Response:
        check_token(request, token)
        photo = await read_photo_file(request)
        try:
            async with turn:
                mask = await run_in_threadpool(segment, photo)
        except TooLargeError as error:
            raise HTTPException(413, str(error)) from None
        except DataError as error:
            raise HTTPException(400, str(error)) from None
        return Response(mask, media_type="image/png")

    async def answer_labels(request: Request) -> Response:
        check_token(request, token)
        return PlainTextResponse("".join(f"{label}\n" for label in labels))

    async def answer_health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/segment", answer_segment, methods=["POST"]),
            Route("/labels", answer_labels),
            Route("/health", answer_health),
        ],
        exception_handlers={HTTPException: _say_why},
    )


def check_token(request: Request, token: str) -> None:
    """Refuse whoever does not know the token, before the photo is read.

    Raises:
        HTTPException: 401.
    """
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # headers come as latin-1, whatever they were sent as
    known = secrets.compare_digest(given.strip(" ").encode("latin-1"), token.encode())
    if scheme.lower() != "bearer" or not known:
        raise HTTPException(
            401,
            "send the token that `conta serve` printed: Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer"},
        )


async def read_photo_file(request: Request) -> bytes:
    """The body of a request, which is the photo's file itself.

    Raises:
        HTTPException: 413 above `LIMIT_BYTES`, declared or sent; 400 for a form or nothing.
    """
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise HTTPException(
            400, "this is a form; send the photo's file as the body (curl --data-binary @photo.jpg)"
        )
    too_large = HTTPException(
        413, f"the photo's file is larger than {LIMIT_BYTES / 1e6:g} MB; send it smaller"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > LIMIT_BYTES:
        raise too_large
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > LIMIT_BYTES:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(400, "the photo's file did not come whole") from None
    return bytes(content)


def choose_token(host: str) -> tuple[str, bool]:
    """The token, and whether it was made up now.

    Raises:
        InputError: If a network shall be served and CONTA_TOKEN is not set.
    """
    given = os.environ.get(TOKEN, "").strip()
    if given:
        return given, False
    if not is_loopback(host):
        raise InputError(
            f"{host} can be seen from the network, so the token has to be yours; set {TOKEN}, or "
            "leave --host out"
        )
    return secrets.token_urlsafe(24), True


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        InputError: If that cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{host} port {port} cannot be served ({reason}); choose by --host and --port"
        ) from None


def serve(
    app: Starlette, listener: socket.socket, *, hint: str, say: Callable[[str], None]
) -> None:
    """Answer until Ctrl-C or SIGTERM; what is under way then has `GRACE_S` to finish.

    Args:
        app: What `build_app` gave.
        listener: A socket that listens; closed in the end.
        hint: The token as a person writes it on a command line.
        say: Gets the lines for the user.
    """
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"serves {url}/segment until Ctrl-C; ask it by\n")
    say(
        f'  curl -H "Authorization: Bearer {hint}" --data-binary @photo.jpg {url}/segment '
        "-o mask.png\n"
    )
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
    )
    with listener, until_told():
        uvicorn.Server(config).run(sockets=[listener])


async def _say_why(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if "expect" not in request.headers:  # such a client listens before it sends
        await _read_off(request)
    return PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)


async def _read_off(request: Request) -> None:
    """Let a client send the rest of its body, or it would not hear the answer."""
    left = REST_BYTES
    with contextlib.suppress(ClientDisconnect, TimeoutError, RuntimeError):  # the last: all is read
        async with asyncio.timeout(REST_S):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return
