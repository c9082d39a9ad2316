"""The per-sample file: scores of a pool as Parquet out, anybody's scores in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.rows import Rows
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
    table = _read_table(path, f"--scores {path}")
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


def read_weights(
    path: str | Path, numbers: np.ndarray, ids: list[str | None], beside: set[Path]
) -> np.ndarray:
    """What each row counts in training: a run's scores.parquet for its coreset, or a table of one's own.

    Of a run the rows that it kept are taken, in their order. Rows without ids can't be told from another
    run's, so they must lie in the run's folder.

    Args:
        path: .parquet, .csv, .tsv or .jsonl with a column `weight` and one of `row` or `id`.
        numbers, ids: (m,) of the rows trained on.
        beside: the folders that they lie in.

    Returns:
        (m,) float64, each above 0.

    Raises:
        ValueError: no such file or column, another run's, or no weight above 0.
    """
    path, flag = Path(path), f"--weights {path}"
    if not path.is_file():
        raise ValueError(f"{flag}: there is no such file")
    table = _read_table(path, flag)
    if "weight" not in table or not {"row", "id"} & table.keys():
        raise ValueError(f"{flag}: needs columns weight and row or id; found {', '.join(table)}")
    if "selected" in table:
        kept = [place for place, is_kept in enumerate(table["selected"]) if is_kept]
        known = [_id(table["id"][place]) for place in kept] if "id" in table else [None] * len(kept)
        own = [_id(label) for label in ids]
        if len(kept) != len(own) or known != own:
            differ = "their ids differ" if len(kept) == len(own) else f"{len(kept)} rows were kept there"
            raise ValueError(f"{flag}: is not of the run that kept these {len(own)} rows: {differ}")
        if None in own and path.parent.resolve() not in beside:
            cure = "name the coreset in that run's own folder"
            raise ValueError(f"{flag}: rows without ids can't be told from another run's: {cure}")
        found = [table["weight"][place] for place in kept]
    else:
        key, wanted = ("row", numbers.tolist()) if "row" in table else ("id", [_id(label) for label in ids])
        labels = table[key] if key == "row" else map(_id, table[key])
        weight_of = dict(zip(labels, table["weight"], strict=True))
        if len(weight_of) < len(table[key]):
            raise ValueError(f"{flag}: a {key} stands twice")
        found = [weight_of.get(label) for label in wanted]
    try:
        weights = np.array([np.nan if weight is None else weight for weight in found], np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{flag}: the column weight holds something that is no number") from None
    bad = np.flatnonzero(~(weights > 0) | ~np.isfinite(weights))
    if len(bad):
        raise ValueError(f"{flag}: {len(bad)} rows have no weight above 0, row {numbers[bad[0]]} the first")
    return weights


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


def _read_table(path: Path, flag: str) -> dict[str, list]:
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
        kinds = [".npy"] * flag.startswith("--scores") + [*readers]
        raise ValueError(f"{flag}: must be one of {', '.join(kinds)}")
    try:
        return readers[path.suffix](str(path)).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: can't be read as {path.suffix[1:]}: {' '.join(str(error).split())[:200]}"
        ) from None


def column_qualities(rows: Rows, name: str) -> np.ndarray:
    """(n,) float64 qualities in a column of the data.

    Raises:
        ValueError: a row has none that is a number from 0 on.
    """
    flag, found = "--quality-column ", []
    for number, value in zip(rows.numbers, rows.column(name, flag), strict=True):
        try:
            found.append(float(value))
        except ValueError:
            found.append(math.nan)
        if not 0 <= found[-1] < math.inf:
            what = "qualities are numbers from 0 on: an answer of the target is worth a share of its row's"
            raise ValueError(f"{flag}{name}: row {number} has {value!r}; {what}")
    return np.array(found, np.float64)
