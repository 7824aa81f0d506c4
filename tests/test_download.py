"""Downloads, from a server of our own that cuts, lies, stalls, leads elsewhere, or is not there."""

import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import HTTPRedirectHandler, Request

import pytest

from minillama import download
from minillama.cli import main
from minillama.download import FILES, File, fetch

ROOT = Path(__file__).resolve().parents[1]
CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """It answers with `behave(handler, start)`; `asked` has the Range of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.behave: Callable[[Handler, int], None] = honest
        self.url = f"http://127.0.0.1:{self.server_port}/file"

    def handle_error(self, request, client_address) -> None:
        pass  # a client that goes away


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        self.server.behave(self, int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0)

    def log_message(self, *_: object) -> None:
        pass

    def head(self, start: int, length: int | None = None, status: int | None = None) -> None:
        self.send_response(status or (206 if start else 200))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start if length is None else length))
        self.end_headers()


def honest(handler: Handler, start: int) -> None:
    handler.head(start)
    handler.wfile.write(CONTENT[start:])


def cutting(handler: Handler, start: int) -> None:
    handler.head(start)
    handler.wfile.write(CONTENT[start : start + 70_000])


def stalling(handler: Handler, start: int) -> None:
    cutting(handler, start)
    handler.wfile.flush()
    time.sleep(1.5)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds if seconds == 1.5 else 0))
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def file_at(server: Server, **changes: object) -> File:
    return File(**{"name": "a.txt", "url": server.url, "size": len(CONTENT), "sha256": SHA256, **changes})  # type: ignore


def assert_whole(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["a.txt"] and (folder / "a.txt").read_bytes() == CONTENT


def test_a_file_comes_whole_and_is_not_fetched_again(server, tmp_path):
    assert fetch(file_at(server), tmp_path / "new") == tmp_path / "new" / "a.txt"
    assert_whole(tmp_path / "new")
    fetch(file_at(server), tmp_path / "new")
    assert server.asked == [None]


def test_what_is_cut_off_goes_on_where_it_stopped(server, tmp_path):
    server.behave = cutting
    fetch(file_at(server), tmp_path)
    assert_whole(tmp_path)
    assert server.asked == [None, *(f"bytes={n}-" for n in (70_000, 140_000, 210_000, 280_000))]


def test_a_server_that_falls_silent_is_asked_again(server, tmp_path):
    server.behave = stalling
    started = time.monotonic()
    fetch(file_at(server), tmp_path, patience=0.2)
    assert_whole(tmp_path)
    assert len(server.asked) == 5 and time.monotonic() - started < 20


def test_a_server_that_never_speaks_is_given_up(server, tmp_path):
    server.behave = lambda handler, start: time.sleep(1.5)
    with pytest.raises(ValueError, match=r"cannot be reached \(timed out\): try again when online, or put the file"):
        fetch(file_at(server), tmp_path, patience=0.2, attempts=3)
    assert len(server.asked) == 3 and not list(tmp_path.iterdir())


def test_a_server_that_hangs_up_without_a_byte_is_given_up(server, tmp_path):
    server.behave = lambda handler, start: handler.head(start)
    with pytest.raises(ValueError, match=r"cannot be reached \(it broke off at byte 0 of 300000\)"):
        fetch(file_at(server), tmp_path, attempts=3)
    assert len(server.asked) == 3 and not list(tmp_path.glob("a.txt"))


def test_a_server_that_knows_no_ranges_begins_anew(server, tmp_path):
    (tmp_path / "a.txt.partial").write_bytes(b"x" * 1000)
    server.behave = lambda handler, start: honest(handler, 0)
    fetch(file_at(server), tmp_path)
    assert_whole(tmp_path)
    assert server.asked == ["bytes=1000-"]


def test_another_range_than_the_one_asked_for_begins_anew(server, tmp_path):
    (tmp_path / "a.txt.partial").write_bytes(CONTENT[:1000])
    server.behave = lambda handler, start: honest(handler, start and 500)
    fetch(file_at(server), tmp_path)
    assert_whole(tmp_path)
    assert server.asked == ["bytes=1000-", None]


@pytest.mark.parametrize("size, status", [(len(CONTENT), None), (len(CONTENT) + 5, 416)])
def test_what_an_earlier_run_left_is_used_or_thrown_away(server, tmp_path, size, status):
    def behave(handler: Handler, start: int) -> None:
        if start >= len(CONTENT):
            handler.send_error(416)
        else:
            honest(handler, start)

    server.behave = behave
    (tmp_path / "a.txt.partial").write_bytes((CONTENT + b"xxxxx")[:size])
    fetch(file_at(server), tmp_path)
    assert_whole(tmp_path)
    assert len(server.asked) == (2 if status else 0)


def test_a_beginning_that_is_not_this_files_ends_in_a_wrong_sum_and_is_deleted(server, tmp_path):
    (tmp_path / "a.txt.partial").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=f"SHA-256 .*, expected {SHA256}: deleted"):
        fetch(file_at(server), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_content_of_the_right_size_is_refused_and_deleted(server, tmp_path):
    with pytest.raises(ValueError, match=f"sent has SHA-256 {SHA256}, expected 000: deleted"):
        fetch(file_at(server, sha256="000"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_length_than_promised_is_refused_before_anything_is_taken(server, tmp_path):
    server.behave = lambda handler, start: handler.head(start, len(CONTENT) + 1)
    with pytest.raises(ValueError, match="offers 300001 bytes from byte 0 on, expected 300000"):
        fetch(file_at(server), tmp_path)
    assert len(server.asked) == 1 and not list(tmp_path.iterdir())


def test_a_server_that_sends_without_end_is_stopped(server, tmp_path):
    def behave(handler: Handler, start: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(CONTENT)

    server.behave = behave
    with pytest.raises(ValueError, match="sends more than the 300000 bytes that were expected: deleted"):
        fetch(file_at(server), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_redirect_is_followed_with_its_range(server, tmp_path):
    def behave(handler: Handler, start: int) -> None:
        if handler.path == "/file":
            handler.send_response(302)
            handler.send_header("Location", server.url + "/elsewhere")
            handler.end_headers()
        else:
            cutting(handler, start)

    server.behave = behave
    fetch(file_at(server), tmp_path)
    assert_whole(tmp_path)
    assert server.asked[:4] == [None, None, "bytes=70000-", "bytes=70000-"]


def test_a_redirect_from_https_to_http_is_refused():
    handler = download._SafeRedirects()
    request = Request("https://example.com/a")
    assert isinstance(handler, HTTPRedirectHandler)
    with pytest.raises(ValueError, match="https://example.com/a leads to http://example.com/b, which is not encrypted"):
        handler.redirect_request(request, None, 302, "", {}, "http://example.com/b")
    assert handler.redirect_request(request, None, 302, "", {}, "https://example.com/b").full_url.endswith("/b")


@pytest.mark.parametrize("status, times, expected", [(404, 1, "answers 404 Not Found"), (503, 3, "cannot be reached")])
def test_an_error_of_the_server_is_one_sentence(server, tmp_path, status, times, expected):
    server.behave = lambda handler, start: handler.send_error(status)
    with pytest.raises(ValueError, match=expected) as refused:
        fetch(file_at(server), tmp_path, attempts=3)
    assert len(server.asked) == times and str(tmp_path / "a.txt") in str(refused.value) and SHA256 in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file", "https://nowhere.invalid/file"])
def test_without_a_network_the_message_says_what_to_do(server, tmp_path, monkeypatch, url):
    def no_names(host: str, *rest: object, known=socket.getaddrinfo, **more: object) -> object:
        if host == "127.0.0.1":
            return known(host, *rest, **more)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    with pytest.raises(ValueError, match=f"{url} cannot be reached .* or put the file there by hand, as ") as refused:
        fetch(file_at(server, url=url), tmp_path)
    assert f"{tmp_path / 'a.txt'}: 300000 bytes, SHA-256 {SHA256}." in str(refused.value)


def test_another_file_of_that_name_is_left_alone(server, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"a\.txt is not the file that .* is: delete it"):
        fetch(file_at(server), tmp_path)
    assert (tmp_path / "a.txt").read_bytes() == b"mine" and server.asked == []


def test_the_table_names_files_that_can_be_told_from_others():
    files = [file for some in FILES.values() for file in some]
    assert {name: len(some) for name, some in FILES.items()} == {"tinyshakespeare": 1, "tinystories": 2}
    for file in files:
        assert file.url.startswith("https://") and re.fullmatch(r"[\da-f]{64}", file.sha256) and file.size > 10**6
    assert len({file.name for file in files}) == len({file.sha256 for file in files}) == 3


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code or 0, *capsys.readouterr()  # type: ignore[return-value]


def test_fetch_prints_where_the_file_is(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FILES, "tinyshakespeare", (file_at(server),))
    code, out, _ = run(capsys, "fetch", "tinyshakespeare", "--out", tmp_path)
    assert (code, out) == (0, f"{tmp_path / 'a.txt'}\n")
    assert_whole(tmp_path)


def test_fetch_of_an_unknown_text_is_one_sentence(capsys):
    code, out, err = run(capsys, "fetch", "tinystorys")
    assert (code, out) == (2, "") and "no text 'tinystorys', expected tinyshakespeare or tinystories" in err


CHILD = """
import sys
from minillama import download
from minillama.cli import main
download.FILES["tinyshakespeare"] = (download.File("a.txt", sys.argv[1], int(sys.argv[2]), sys.argv[3]),)
main(["fetch", "tinyshakespeare", "--out", sys.argv[4]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
def test_ctrl_c_keeps_what_has_come(server, tmp_path):
    server.behave = lambda handler, start: (cutting(handler, start), handler.wfile.flush(), threading.Event().wait(30))
    command = [sys.executable, "-c", CHILD, server.url, str(len(CONTENT)), SHA256, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "*"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    partial, deadline = tmp_path / "a.txt.partial", time.monotonic() + 60
    try:
        while not server.asked:
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        threading.Event().wait(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and errors.endswith(b"minillama: stopped; the same command goes on from here.\n")
    assert b"Traceback" not in errors and CONTENT.startswith(partial.read_bytes())
    server.behave = honest
    fetch(file_at(server), tmp_path)
    assert_whole(tmp_path)
