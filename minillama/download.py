"""Files from the network (chapter 16): whole and as promised, or not at all.

A download goes to `NAME.partial` and has its own name only when its size and its SHA-256 are right. What breaks off is
taken up again where it stopped.
"""

import contextlib
import hashlib
import http.client
import os
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

CHUNK = 2**16


@dataclass(frozen=True)
class File:
    """A file to fetch: its name, where it is, and what must come: so many bytes, with this SHA-256."""

    name: str
    url: str
    size: int
    sha256: str


# Sizes and sums are those that others, who have the files, publish with their code; for TinyStories they are also what
# the hub's own pages say.
_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
FILES = {
    "tinyshakespeare": (
        File("tinyshakespeare.txt", _SHAKESPEARE, 1_115_394,
             "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    ),
    "tinystories": (
        File("TinyStoriesV2-GPT4-train.txt", f"{_STORIES}/TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
             "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
        File("TinyStoriesV2-GPT4-valid.txt", f"{_STORIES}/TinyStoriesV2-GPT4-valid.txt", 22_502_601,
             "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    ),
}  # fmt: skip


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        if req.type == "https" and not newurl.startswith("https:"):
            raise ValueError(
                f"{req.full_url} leads to {newurl:.80}, which is not encrypted: nothing was taken from it."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(file: File, folder: str | Path, *, patience: float = 30.0, attempts: int = 5) -> Path:
    """Download a file into `folder`, or find it there; return its path.

    patience: the seconds of silence after which a connection counts as broken. attempts: how often in a row one may
    break without a single byte, before this gives up; the pauses between grow.

    Ctrl-C keeps what has come. Raises ValueError, in one sentence, when the address cannot be reached, or the server
    offers or sends anything but what is expected; the same for a file of that name that is something else.
    """
    folder = Path(folder)
    path, partial = folder / file.name, folder / f"{file.name}.partial"
    by_hand = f"or put the file there by hand, as {path}: {file.size} bytes, SHA-256 {file.sha256}"
    if path.exists():
        if path.stat().st_size != file.size or sha256_of(path) != file.sha256:
            raise ValueError(f"{path} is not the file that {file.url} is: delete it, {by_hand}.")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    failures = 0
    with tqdm(total=file.size, unit="B", unit_scale=True, dynamic_ncols=True, desc=file.name) as bar:
        while (before := _size(partial)) != file.size:
            try:
                _receive(file, partial, patience, bar)
                continue
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise ValueError(f"{file.url} answers {error.code} {error.reason}: try later, {by_hand}.") from None
                problem: BaseException = error
            except (OSError, http.client.HTTPException) as error:
                problem = getattr(error, "reason", error)
                if isinstance(problem, (socket.gaierror, ConnectionRefusedError)):
                    failures = attempts  # there is no network, or nobody at that address
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= attempts:
                raise ValueError(f"{file.url} cannot be reached ({problem}): try again when online, {by_hand}.")
            time.sleep(min(patience, 2.0**failures / 2))
    if (found := sha256_of(partial)) != file.sha256:
        partial.unlink()
        raise ValueError(f"what {file.url} sent has SHA-256 {found}, expected {file.sha256}: deleted; try later.")
    os.replace(partial, path)
    return path


def _receive(file: File, partial: Path, patience: float, bar: tqdm) -> None:
    """Add to the partial file what one connection brings. Raises OSError where it breaks off."""
    start = _size(partial)
    headers = {"User-Agent": "minillama", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(file.url, headers=headers)
    with contextlib.ExitStack() as stack:
        try:
            answer = stack.enter_context(urllib.request.build_opener(_SafeRedirects).open(request, timeout=patience))
        except urllib.error.HTTPError as error:
            if error.code != 416 or not start:
                raise
            partial.unlink()  # it has more than there is
            return
        if answer.status == 206:
            expected = f"bytes {start}-{file.size - 1}/{file.size}"
            if answer.headers.get("Content-Range", "").strip() != expected:
                partial.unlink(missing_ok=True)  # not what was asked for: begin anew, with the next connection
                return
        else:
            start = 0  # the server begins anew, so do we
        promised = answer.headers.get("Content-Length")
        if promised is not None and promised != str(file.size - start):
            raise ValueError(
                f"{file.url} offers {promised:.40} bytes from byte {start} on, expected {file.size - start}: "
                "the file there is another one than it was; nothing was taken from it."
            )
        bar.n = start
        bar.refresh()
        _copy(answer, stack.enter_context(open(partial, "ab" if start else "wb")), file, start, bar)


def _copy(answer: http.client.HTTPResponse, to: IO[bytes], file: File, start: int, bar: tqdm) -> None:
    received = start
    while data := answer.read1(CHUNK):  # which does not wait for a whole chunk
        received += len(data)
        if received > file.size:
            to.close()
            os.unlink(to.name)
            raise ValueError(
                f"{file.url} sends more than the {file.size} bytes that were expected: deleted; try later."
            )
        to.write(data)
        bar.update(len(data))
    if received < file.size:
        raise ConnectionError(f"it broke off at byte {received} of {file.size}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()
