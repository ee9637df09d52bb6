"""What a client of `conta serve` sees; the segmenter is a function on bytes here."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from starlette.testclient import TestClient

from flows import serve
from wsss_core.errors import DataError, InputError, TooLargeError

TOKEN = "s3cret-ü"  # noqa: S105
KNOWN = {"Authorization": f"Bearer {TOKEN}".encode()}


def segment(photo):
    if photo == b"wide":
        raise TooLargeError("the photo has 60 megapixels")
    if photo != b"photo":
        raise DataError("the photo is empty")
    return b"mask"


@pytest.fixture
def client():
    app = serve.build_app(segment, ("background", "cat", "böse"), token=TOKEN)
    with TestClient(app) as client:
        yield client


def test_segment__photo_in_mask_out(client):
    answer = client.post("/segment", content=b"photo", headers=KNOWN)
    assert (answer.status_code, answer.content) == (200, b"mask")
    assert answer.headers["content-type"] == "image/png"
    assert client.get("/labels", headers=KNOWN).text == "background\ncat\nböse\n"


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"],
)
def test_segment__unknown_token_is_401(client, given):
    headers = {"Authorization": given.encode()}
    for answer in (
        client.post("/segment", content=b"photo", headers=headers),
        client.get("/labels", headers=headers),
    ):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.text.count("\n") == 1
    assert client.get("/health", headers=headers).json() == {"status": "ok"}


def test_segment__scheme_in_any_case(client):
    headers = {"Authorization": f"bearer {TOKEN}".encode()}
    assert client.post("/segment", content=b"photo", headers=headers).status_code == 200


def test_segment__bad_uploads_say_why_in_one_line(client):
    answer = client.post("/segment", content=b"text", headers=KNOWN)
    assert (answer.status_code, answer.text) == (400, "the photo is empty\n")
    answer = client.post("/segment", content=b"wide", headers=KNOWN)
    assert (answer.status_code, answer.text) == (413, "the photo has 60 megapixels\n")
    answer = client.post("/segment", files={"photo": b"photo"}, headers=KNOWN)
    assert answer.status_code == 400
    assert answer.text == (
        "this is a form; send the photo's file as the body (curl --data-binary @photo.jpg)\n"
    )
    assert client.get("/segment", headers=KNOWN).status_code == 405
    assert client.get("/nowhere", headers=KNOWN).status_code == 404


def test_segment__too_many_bytes_declared_or_sent(client, monkeypatch):
    monkeypatch.setattr(serve, "LIMIT_BYTES", 5)
    assert client.post("/segment", content=b"photo", headers=KNOWN).status_code == 200
    answer = client.post("/segment", content=b"photo!", headers=KNOWN)
    assert (answer.status_code, answer.text.count("\n")) == (413, 1)

    def endless():  # no length in its head
        for _ in range(4):
            yield b"abc"

    assert client.post("/segment", content=endless(), headers=KNOWN).status_code == 413


def test_segment__one_at_a_time(monkeypatch):
    inside, most = [], []

    def slow(photo):
        inside.append(photo)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return photo

    with TestClient(serve.build_app(slow, (), token=TOKEN)) as client:
        threads = [
            threading.Thread(
                target=lambda: client.post("/segment", content=b"photo", headers=KNOWN)
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1, 1, 1]


def test_choose_token__a_network_needs_one_of_yours(monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    made_up = {serve.choose_token(host) for host in ("127.0.0.1", "localhost", "::1")}
    assert len(made_up) == 3
    assert all(new and len(token) >= 24 for token, new in made_up)
    for given in ("", "  "):
        monkeypatch.setenv(serve.TOKEN, given)
        for host in ("0.0.0.0", "::", "192.168.1.2", "lab.example"):  # noqa: S104
            with pytest.raises(InputError, match=f"{host} can be seen .* set CONTA_TOKEN, or"):
                serve.choose_token(host)
    monkeypatch.setenv(serve.TOKEN, "mine")
    assert serve.choose_token("0.0.0.0") == ("mine", False)  # noqa: S104


def test_open_socket__taken_or_senseless():
    with serve.open_socket("127.0.0.1", 0) as first:
        taken = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", taken)):
            pass
        with pytest.raises(InputError, match=f"127.0.0.1 port {taken} cannot be served"):
            serve.open_socket("127.0.0.1", taken)
    for host, port in (("127.0.0.1", 70_000), ("203.0.113.9", 0)):
        with pytest.raises(InputError, match="cannot be served"):
            serve.open_socket(host, port)
