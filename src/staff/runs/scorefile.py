"""The per-sample file: scores of a pool as Parquet out, anybody's scores in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.turns import label_of

VALUES = ("effort", "score", "draft_effort")  # columns taken as the score, the first that is there


def write_scores(path: Path, columns: Mapping[str, Any]) -> None:
    """Columns of n values each as one Parquet file, a row a sample; equal columns give equal bytes, the file
    is whole or absent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from staff.files import write_whole

    # from_pandas: nan is a score that there is not
    arrays = {
        name: pa.array(values, pa.string() if name == "id" else None, from_pandas=True)
        for name, values in columns.items()
    }
    write_whole(path, lambda aside: pq.write_table(pa.table(arrays), aside))


def read_scores(path: str | Path, numbers: np.ndarray, ids: list[str | None]) -> np.ndarray:
    """Scores from a file, matched to the pool by row number, by id, or by order.

    Args:
        path: .npy of (n,) numbers in the pool's order; or .parquet, .csv, .tsv or .jsonl with a column of
            scores (effort, score or draft_effort) and one of `row` (0-based, as counted in the input) or
            `id`.
        numbers: (n,) row numbers of the pool.
        ids: the pool's ids, None where a row has none.

    Returns:
        (n,) float64.

    Raises:
        ValueError: no such file or column, a row without a score, an id that stands twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--scores {path}: there is no such file")
    if path.suffix == ".npy":
        return _in_order(path, len(numbers))
    table = _read_table(path)
    name = next((value for value in VALUES if value in table), None)
    if name is None:
        raise ValueError(
            f"{path}: needs a column of scores named {', '.join(VALUES[:-1])} or {VALUES[-1]}; found "
            f"{', '.join(table)}"
        )
    if "row" in table:
        key = "row"
        wanted: list[Any] = numbers.tolist()
    elif "id" in table:
        key, wanted = "id", [_id(label) for label in ids]
        table["id"] = [_id(label) for label in table["id"]]
    else:
        raise ValueError(
            f"{path}: needs a column row (0-based row number in the data) or id to match by; found "
            f"{', '.join(table)}"
        )
    score_of: dict[Any, Any] = {}
    for place, (label, score) in enumerate(zip(table[key], table[name], strict=True)):
        if label in score_of:
            raise ValueError(f"{path}: row {place}: the {key} {label!r} stands twice")
        score_of[label] = score
    missing = [number for number, label in zip(numbers, wanted, strict=True) if score_of.get(label) is None]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(numbers)} rows of the data have no score there, row "
            f"{missing[0]} the first (matched by {key})"
        )
    try:
        return np.array([score_of[label] for label in wanted], np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: column {name} holds something that is no number") from None


def _id(label: Any) -> str | None:
    """An id by its value, whatever its type: 7, 7.0 and "7" are one."""
    text = label_of(label)
    return text and re.sub(r"^(-?\d+)\.0+$", r"\1", text)


def _in_order(path: Path, n: int) -> np.ndarray:
    try:
        scores = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        raise ValueError(f"{path}: not a .npy file of numbers") from None
    if scores.shape != (n,) or scores.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: holds {scores.dtype} of shape {scores.shape}; the data has {n} usable rows, so ({n},) "
            f"numbers are needed"
        )
    return scores.astype(np.float64)


def _read_table(path: Path) -> dict[str, list]:
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    as_text, tabs = csv.ConvertOptions(column_types={"id": pa.string()}), csv.ParseOptions(delimiter="\t")
    readers = {
        ".parquet": parquet.read_table,
        ".csv": partial(csv.read_csv, convert_options=as_text),
        ".tsv": lambda name: csv.read_csv(name, convert_options=as_text, parse_options=tabs),
        ".jsonl": json.read_json,
    }
    if path.suffix not in readers:
        raise ValueError(f"--scores {path}: must be one of .npy, {', '.join(readers)}")
    try:
        return readers[path.suffix](str(path)).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: can't be read as {path.suffix[1:]}: {' '.join(str(error).split())[:200]}"
        ) from None
