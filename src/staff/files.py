"""Files whole or absent, with checksums so that damage is seen; and a full disk in one message."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import logging
import mmap
import os
import platform
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# in an .npz, the names of its arrays: each array has a checksum, but a lost one would not be missed
NAMES = "__names__"
SEAL = "finished.json"  # in a folder of files, says that all are there and what their checksums are
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
ASIDE = re.compile(r"\..+\.([0-9a-f]{6})-(\d+)\.staff")  # what `write_whole` writes beside a file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what zipfile and numpy raise over flipped bytes
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    OSError,
    EOFError,
    LookupError,
    RuntimeError,
    MemoryError,
)
OUT_OF_MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator|not enough memory|can't allocate memory|ALLOC_FAILED"
)


def write_whole(path: Path, write: Callable[[Path], object], lasts: bool = True) -> None:
    """Make a file or folder whole or not at all: written beside its place, flushed to disk, renamed over
    it.

    Args:
        lasts: it is to outlive a power cut; else it is not flushed, which may take a tenth of a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.staff")
    try:
        write(aside)
        if lasts and aside.is_file():
            with open(aside, "rb") as written:
                os.fsync(written.fileno())
        os.replace(aside, path)
    finally:
        remove(aside) if aside.is_dir() else aside.unlink(missing_ok=True)


def clear_asides(places: Iterable[Path], alone: bool) -> None:
    """Remove what killed processes were writing.

    Args:
        alone: nobody else writes there; without it, what living processes or other machines write stays.
    """
    for left in places:
        named = ASIDE.fullmatch(left.name)
        if (
            not named
            or left.is_symlink()
            or not (alone or (named[1] == HOST and not is_alive(int(named[2]))))
        ):
            continue
        remove(left) if left.is_dir() else left.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Is there a process of this number on this machine?"""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def write_text(path: Path, text: str, lasts: bool = True) -> None:
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"), lasts)


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """A table; numbers as Python writes them, so that they read back the same."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(lines)
    write_text(path, text.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a table that `write_csv` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def hold(path: Path, wait: bool = False) -> Iterator[bool]:
    """A lock among processes, dropped by the system with its process; yields whether it was available.

    Args:
        path: its file, made where there is none.
        wait: until whoever holds it lets go.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def write_json(path: Path, value: Any, lasts: bool = True) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", lasts)


def write_checked(path: Path, values: Mapping[str, Any], lasts: bool = True) -> None:
    """A mapping as JSON that `read_checked` takes up again, with a checksum of the rest."""
    write_json(path, {**values, "checksum": fingerprint(values)}, lasts)


def read_checked(path: Path) -> dict[str, Any] | None:
    """What `write_checked` wrote, or None where there is nothing whole, which is said."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("checksum") == fingerprint(values):
            return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    logger.warning("%s is damaged; it is made again", path)
    return None


def seal(folder: Path, files: Iterable[str], **about: Any) -> None:
    """Say that a folder's files are all there, with a checksum of each and what is told about them."""
    for name in files:
        with open(folder / name, "rb") as written:
            os.fsync(written.fileno())
    write_checked(folder / SEAL, {**about, "files": {name: hash_file(folder / name) for name in files}})


def sealed(folder: Path) -> dict[str, Any] | None:
    """What `seal` said of a folder; None where it is unfinished or a file has changed, which is said."""
    told = read_checked(folder / SEAL)
    if told is None:
        return None
    return None if changed_files(folder, told["files"]) else told


def changed_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The files that are gone or not as they were written, by checksum; a warning names each."""
    changed = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or hash_file(path) != digest:
            logger.warning("%s is %s; it is made again", path, "damaged" if path.exists() else "gone")
            changed.append(name)
    return changed


@contextlib.contextmanager
def failures_are_said(path: Path) -> Iterator[None]:
    """Turn a full disk, in us or in a library, into one message; an error of a file and lack of memory too.

    Raises:
        ValueError: the disk is full, a file can't be written or read, or memory ran out and no smaller
            batch helps.
    """
    try:
        yield
    except Exception as error:  # safetensors has an error class of its own, straight below Exception
        if _is_full(error):
            raise ValueError(
                f"{path}: the disk is full. Free some space; the same command goes on from here"
            ) from error
        if isinstance(error, OSError) and error.filename:
            raise ValueError(
                f"{error.filename}: {error.strerror}. The same command goes on from here"
            ) from error
        if is_out_of_memory(error):
            raise ValueError(
                "out of memory: lower --max-length, take a smaller model, or name another --device"
            ) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's error has its own class; the CPU's allocator and some kernels raise a plain RuntimeError."""
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error))))


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if type(error).__name__ == "SafetensorError" and re.search(
            r"os error (28|27|122)\b|code: (28|27|122)\b", str(error)
        ):
            return True
        # torch.save reports no errno: a write of its archive that did not go through has hardly another cause
        if isinstance(error, RuntimeError) and re.search(
            r"PytorchStreamWriter failed|file write failed|unexpected pos|iostream error", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], before: Callable[[str], object] | None = None
) -> None:
    """Named arrays as .npz: no pickle, a checksum for each inside, equal arrays give equal bytes.

    Args:
        before: called with the file's SHA-256 before it has its name.
    """

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{NAMES: np.array(list(arrays), dtype=np.str_)})
        if before:
            before(hash_file(aside))

    write_whole(path, write)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote, or None where there is nothing whole: then it is made again."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays[NAMES].tolist()}
    except DAMAGE:
        logger.warning("%s is damaged; it is made again", path)
        return None


def map_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """`read_arrays` without holding them: looked through once, then taken from the disk where they are used;
    processes of one machine share what of it is in memory."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as packed, open(path, "rb") as file:
            if packed.testzip() is not None:
                raise zipfile.BadZipFile
            arrays = {}
            for name in np.load(packed.open(f"{NAMES}.npy")).tolist():
                file.seek(packed.getinfo(f"{name}.npy").header_offset)
                file.seek(sum(struct.unpack("<26xHH", file.read(30))), os.SEEK_CUR)  # its name and what else
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                arrays[name] = (
                    np.memmap(path, dtype, "r", file.tell(), shape)
                    if np.prod(shape)
                    else np.empty(shape, dtype)
                )
            return arrays
    except DAMAGE:
        logger.warning("%s is damaged; it is made again", path)
        return None


def let_go(array: np.ndarray) -> None:
    """Of a mapped array, take out of memory what was looked at; it is read again where it is needed."""
    if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def fingerprint(key: Any) -> str:
    """12 hexadecimal digits of SHA-256 over a key's canonical JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def hash_file(path: Path, remembered: dict[str, list] | None = None) -> str:
    """SHA-256 of a file; taken from `remembered` where its size and modification time are the same."""
    status = path.stat()
    seen = [status.st_size, status.st_mtime_ns]
    name = str(path.resolve())
    if remembered is not None and name in remembered and remembered[name][:2] == seen:
        return remembered[name][2]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if remembered is not None:
        remembered[name] = [*seen, digest]
    return digest


def remove(path: Path) -> None:
    """Delete a folder of unfinished work; its mark goes last, so that what a kill leaves is known as ours."""
    for part in path.iterdir() if path.is_dir() else ():
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        elif part.name != MARK:
            part.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def check_outputs(outputs: Iterable[Path], inputs: Mapping[str, Iterable[Path]]) -> None:
    """See that nothing that is read would be written, unlinked or renamed, through links and hard links too.

    Args:
        outputs: files that will be written, and folders whose files may be.
        inputs: what messages call them -> files that are read.

    Raises:
        ValueError: one is both.
    """
    read = {}
    for name, paths in inputs.items():
        for path in paths:
            if path.exists():
                status = path.stat()
                read[status.st_dev, status.st_ino] = (name, path)
    for output in outputs:
        inside = [output, *output.rglob("*")] if output.is_dir() else [output]
        for path in inside:
            if path.is_file():
                status = path.stat()
                name, source = read.get((status.st_dev, status.st_ino), ("", None))
                if source is not None:
                    where = "the output itself" if path == output else f"in the output's folder, {output}"
                    raise ValueError(
                        f"{name} {source} is {where}: it would be overwritten; name another output"
                    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields of two mappings that differ, each as "name: before -> now"."""
    names = [*before, *(name for name in now if name not in before)]
    return [f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


MARK = ".staff.json"  # at the top of every folder of ours: without it nothing there is replaced or removed


def mark(folder: Path, kind: str) -> None:
    """Make a folder ours, where it isn't yet; `check_mark` comes first."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        write_json(folder / MARK, {"kind": kind, "version": 1})


def marked_as(folder: Path) -> str | None:
    """What a folder of ours is of: a run, a fine-tuning, a comparison; None where it has no mark."""
    try:
        return str(json.loads((folder / MARK).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_mark(folder: Path, kind: str, flag: str = "--output") -> None:
    """See that a folder is absent, empty, or one of ours of this kind.

    Raises:
        ValueError: it holds something else; nothing in it was touched.
    """
    halves = f".{MARK}."  # of a mark that was being written when its process was killed
    if not folder.exists() or (folder.is_dir() and all(p.name.startswith(halves) for p in folder.iterdir())):
        return
    found = marked_as(folder)
    if found != kind:
        holds = (
            f"what was made by another command ({found})"
            if found
            else f"files that are not a {kind}'s (there is no {MARK})"
        )
        raise ValueError(f"{folder} holds {holds}: name an empty or a new folder with {flag}")
