"""Files that are complete or absent: written under a temporary name and renamed, read only if their digest is right."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy
import torch
from torch import Tensor

from ..errors import RecordFileError

# The comment at the end of the zip archive: the type of file, and the SHA-256 of all bytes before this digest.
MARK = b"pyro_vae sha256 "
DIGEST = 64  # hexadecimal digits
PIECE = 2**20  # bytes that are hashed at a time
HEADER, ARRAY = "header.json", ".npy"
# Types of torch that NumPy lacks are stored as whole numbers of the same width.
WIDTHS = {1: torch.uint8, 2: torch.int16}


def check_path(path: Any) -> None:
    """Raise for a number, which would be the handle of an open file, such as standard output."""
    if not isinstance(path, (str, PathLike)):
        raise RecordFileError(f"expected the path of a file, got {path!r:.60}: pass a string or a pathlib.Path")


@contextmanager
def text_file(path: str | PathLike[str]) -> Iterator[TextIO]:
    """Open a file for writing text, without conversion of line ends.

    :raises RecordFileError: if it cannot be opened or written.
    """
    check_path(path)
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise RecordFileError(
            f"cannot write '{path}': {error.strerror or error}. Pass a path in a folder that exists, may be written and has "
            "room"
        ) from error


def write_whole(path: str | PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Write a file that is either complete or, after a failure, unchanged.

    `write` gets a temporary file in the same folder, open for reading and writing, with a random name. It is flushed to the
    disk and renamed, and the folder is flushed to the disk. Links are followed.

    :raises RecordFileError: if the file cannot be written, as on a full disk or in a folder that is read-only.
    """
    check_path(path)
    if "\0" in os.fsdecode(path):
        raise RecordFileError(f"cannot write {path!r}: a path cannot hold a null character. Pass one without")
    try:
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(16)}.tmp")
        try:
            with open(temporary, "x+b") as file:  # "x" does not open an existing file
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RecordFileError(
            f"cannot write '{path}': {error.strerror or error}. The old file is unchanged. Pass a path in a folder "
            "that exists, may be written and has room"
        ) from error
    with suppress(OSError):  # not every file system supports this; the file is complete and on the disk already
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_arrays(path: str | PathLike[str], header: Any, arrays: Mapping[str, Tensor]) -> None:
    """Write named tensors and a JSON header into one npz file, by `write_whole`.

    `numpy.load(path)` can read the tensors too. The file ends in a SHA-256 of its content. The same content gives the same
    bytes.

    :raises RecordFileError: if the file cannot be written.
    """
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in arrays.items()}
    text = json.dumps({"dtypes": dtypes, "content": header}, allow_nan=False).encode()

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo(HEADER), text)  # a ZipInfo has a fixed date
            for name, value in arrays.items():
                with archive.open(zipfile.ZipInfo(name + ARRAY), "w", force_zip64=True) as member:
                    numpy.lib.format.write_array(member, as_numpy(value), allow_pickle=False)
            archive.comment = MARK + b"0" * DIGEST
        end = file.seek(-DIGEST, os.SEEK_END)
        file.seek(0)
        digest = digest_of(file, end)
        file.seek(end)
        file.write(digest)

    write_whole(path, write)


def read_arrays(path: str | PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """Read the header and the tensors written by `write_arrays`, on the CPU.

    :raises RecordFileError: if the file cannot be opened, was not written by `write_arrays`, or has changed in any bit.
    """
    check_path(path)
    try:
        with open(path, "rb") as file:  # checked and read through one handle, so that the file cannot be replaced in between
            check_whole(path, file)
            with zipfile.ZipFile(file) as archive:
                header = json.loads(archive.read(HEADER))
                arrays = {name: read_tensor(archive, name, dtype) for name, dtype in header["dtypes"].items()}
            return header["content"], arrays
    except RecordFileError:
        raise
    except OSError as error:
        raise RecordFileError(
            f"cannot read '{path}': {error.strerror or error}. Pass the path of a file that save() wrote"
        ) from error
    except Exception as error:  # the digest is right, but the content is not that of write_arrays
        raise RecordFileError(f"'{path}' has no records: {error}. Pass a file that save() wrote") from error


def check_whole(path: str | PathLike[str], file: BinaryIO) -> None:
    """Raise for a file whose digest, at its end, is not that of its content; leaves the file at its start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - DIGEST - len(MARK), 0))
    end = file.read()
    if not end.startswith(MARK):
        raise RecordFileError(
            f"'{path}' ({size} bytes) does not end as a file of records does: it was cut short or damaged, or was not "
            "written by save(). Nothing was read. Save it again, or take a copy"
        )
    file.seek(0)
    if digest_of(file, size - DIGEST) != end[len(MARK) :]:
        raise RecordFileError(
            f"'{path}' is damaged: its content does not have the SHA-256 that was written with it. Nothing was read. Save "
            "it again, or take a copy"
        )
    file.seek(0)


def digest_of(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the next `size` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest().encode()


def as_numpy(value: Tensor) -> numpy.ndarray:
    try:
        return value.numpy()
    except TypeError:  # bfloat16 and the like, which NumPy lacks
        return value.contiguous().view(WIDTHS[value.element_size()]).numpy()


def read_tensor(archive: zipfile.ZipFile, name: str, dtype: str) -> Tensor:
    with archive.open(name + ARRAY) as member:
        value = torch.from_numpy(numpy.lib.format.read_array(member, allow_pickle=False))
    stored = getattr(torch, dtype)
    return value if value.dtype == stored else value.view(stored)
