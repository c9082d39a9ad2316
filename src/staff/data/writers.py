"""Rows -> files: written aside and renamed, as JSON Lines or in the format they came in."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.locate import read_json


@contextlib.contextmanager
def aside(path: str | os.PathLike, inputs: Sequence[Path]) -> Iterator[Any]:
    """A file that gets its name once it is complete, and is not there at all if something fails."""
    path = Path(path)
    if any(path.exists() and p.exists() and path.samefile(p) for p in inputs):
        raise ValueError(f"{path} is the input itself; write to another file")
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def dumps(row: Mapping) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError):
        return json.dumps(_plain_json(row), allow_nan=False).encode()


def _plain_json(value: Any) -> Any:
    """A value JSON can hold; see Rows.write_jsonl."""
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(k): _plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def write_table(path: Path, source: Any, numbers: np.ndarray, inputs: Sequence[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) < 0) + 1):
            for _, batch in source.batches(None, run):
                yield from batch.to_batches() if isinstance(batch, pa.Table) else [batch]

    if source.saved is not None:
        _write_saved(path, source, numbers, batches())
        return
    with aside(path, inputs) as file:
        if source.kind == "Arrow":
            new = pa.ipc.new_stream if source.stream else pa.ipc.new_file
            with new(file, source.schema) as arrow:
                for batch in batches():
                    arrow.write_batch(batch)
        else:
            with pq.ParquetWriter(file, source.schema) as parquet:
                for batch in batches():
                    parquet.write_batch(batch)


def _write_saved(path: Path, source: Any, numbers: np.ndarray, batches: Iterable[Any]) -> None:
    """A folder as `Dataset.save_to_disk` writes it, made from the one that was read."""
    import pyarrow as pa

    if path.exists():
        raise ValueError(
            f"{path} is there already; a data set saved to disk is a folder of its own: name a new one"
        )
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with (
            open(partial / "data-00000-of-00001.arrow", "wb") as file,
            pa.ipc.new_stream(file, source.schema) as arrow,
        ):
            for batch in batches:
                arrow.write_batch(batch)
        state = read_json(source.saved / "state.json")
        state["_data_files"] = [{"filename": "data-00000-of-00001.arrow"}]
        # the library caches by fingerprint: other rows need another one
        state["_fingerprint"] = hashlib.sha256(
            str(state.get("_fingerprint")).encode() + numbers.tobytes()
        ).hexdigest()[:16]
        (partial / "state.json").write_text(json.dumps(state, indent=2))
        if (source.saved / "dataset_info.json").is_file():
            info = read_json(source.saved / "dataset_info.json")
            info = {
                k: v for k, v in info.items() if k not in ("splits", "dataset_size", "size_in_bytes")
            }  # sizes of the whole
            (partial / "dataset_info.json").write_text(json.dumps(info, indent=2))
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
