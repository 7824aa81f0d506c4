"""What every format needs of files: JSON of bounded size, a folder that is there as a whole or not at all, and of a
matrix in a file the part that is asked for."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MAX_JSON_BYTES = 2**24


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError for a file that is not there, too large, or something else."""
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"it has {size} bytes, expected {max_bytes} at most")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, expected an object")
        return value
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # what is not UTF-8 or not JSON is a ValueError too
        raise ValueError(f"{path} is damaged: {str(error).rstrip('.')}.") from None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, to be filled; then it takes its place, and what was there is removed.

    At every moment the old folder or the new one is there as a whole, under its name or under `previous`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync(*temporary.iterdir(), temporary)
        if folder.exists():
            shutil.rmtree(previous(folder), ignore_errors=True)
            os.rename(folder, previous(folder))
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder.parent)
    shutil.rmtree(previous(folder), ignore_errors=True)


def previous(folder: Path) -> Path:
    """Where the old folder is between the two renames of `new_folder`."""
    return folder.with_name(f".{folder.name}.minillama-previous")


def sync(*paths: Path) -> None:
    """Have the disk write these files and folders now."""
    for path in paths if os.name == "posix" else ():  # Windows cannot sync a folder
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def read_rows(path: Path, offset: int, row_bytes: int, rows: slice, columns: slice) -> np.ndarray:
    """Of a matrix of bytes that begins at `offset`, some rows and columns, (rows, columns) uint8. No others are read.

    Raises ValueError if the file is too short.
    """
    data = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.uint8)
    pieces = data[None] if data.shape[1] == row_bytes else data  # in the file, whole rows lie in one piece
    with open(path, "rb", buffering=0) as file:
        for i, piece in enumerate(pieces):
            file.seek(offset + (rows.start + i) * row_bytes + columns.start)
            if file.readinto(piece) != piece.nbytes:
                raise ValueError(f"{path} became shorter while it was read.")
    return data
