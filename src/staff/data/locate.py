"""What `data` names -> files: folders, splits, standard input, hub ids, entries of LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from staff.data.layouts import Layout, from_factory, near, shown
from staff.data.scanners import suffix_of

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
NOT_DATA = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "package.json",
    "config.json",
)
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "eval": "validation",
}
STDIN = "standard input"


@dataclass(frozen=True)
class Input:
    """What is to be read.

    Attributes:
        paths: files, in order.
        names: what messages call them.
        hub: id of a hub data set, in place of files.
        config, split, revision, folder: of the hub data set.
        layout: where a dataset_info.json entry gives one.
        saved: the folder that `save_to_disk` wrote, if the files are of one.
        notes: what a user should know, a sentence each.
        keep: holds a temporary file until the last user lets go.
    """

    paths: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    folder: str | None = None
    layout: Layout | None = None
    saved: Path | None = None
    notes: tuple[str, ...] = ()
    keep: object = field(default=None, compare=False)


def locate(
    data: str | os.PathLike | Sequence[str | os.PathLike],
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    dataset_info: str | os.PathLike | None = None,
) -> Input:
    """Find what `data` names; see `formats.read` for the arguments.

    Raises:
        ValueError: it is not there, or it is several things at once; the message says what is near.
    """
    given = [os.fspath(d) for d in data] if isinstance(data, list | tuple) else [os.fspath(data)]  # type: ignore[arg-type]
    for name in given:
        if not name or "\0" in name:
            raise ValueError(
                f"data is {name!r}; give a file, a folder, a hub data set (owner/name), or - for standard input"
            )
    if dataset_info is not None:
        inputs = [_factory(name, Path(dataset_info), split, config, revision) for name in given]
    else:
        inputs = [_one(name, split, config, revision) for name in given]
    if len(inputs) == 1:
        return inputs[0]
    for name, found in zip(given, inputs, strict=True):
        if found.hub is not None or found.keep is not None:
            raise ValueError(
                f"{name} can't be read together with other data; read it alone, or save it to a file"
            )
        if (
            found.layout is not None
            and inputs[0].layout is not None
            and found.layout != inputs[0].layout
            and _shape(found) != _shape(inputs[0])
        ):
            raise ValueError(f"{given[0]} and {name} are laid out differently; select from each alone")
    paths = tuple(p for i in inputs for p in i.paths)
    twice = next((p for n, p in enumerate(paths) if p in paths[:n]), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice; name each file once")
    notes = tuple(n for i in inputs for n in i.notes)
    return Input(paths, tuple(n for i in inputs for n in i.names), layout=inputs[0].layout, notes=notes)


def _shape(found: Input) -> tuple:
    assert found.layout is not None  # all of them have one, or none
    return (found.layout.columns(), found.layout.role_tag, found.layout.content_tag, found.layout.roles)


def _one(name: str, split: str | None, config: str | None, revision: str | None) -> Input:
    if name == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(
                f"{STDIN} is a terminal; pipe the rows in, as in: staff select --data - < rows.jsonl"
            )
        return _spooled(sys.stdin.buffer, STDIN)
    if re.match(r"\w+://", name):
        raise ValueError(
            f"{name} is an address, not a file: download it first; a hub data set is named owner/name"
        )
    path = Path(name).expanduser()
    if path.is_fifo():  # such as <(zcat rows.jsonl.gz) gives
        with open(path, "rb") as pipe:
            return _spooled(pipe, name)
    if path.is_dir():
        return _folder(path, split)
    if path.exists():
        if split is not None or config is not None or revision is not None:
            raise ValueError(
                f"{name} is a file: --split, --dataset-config and --revision are for hub data sets, --split also for folders"
            )
        return Input((path,), (name,))
    is_id = (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)
        and suffix_of(path) not in SUFFIXES
        and not path.parent.is_dir()
    )
    if is_id:
        return Input(hub=name, config=config, split=split, revision=revision)
    raise _missing(path)


def _missing(path: Path) -> ValueError:
    folder = path.parent
    if not folder.is_dir():
        near_folder = (
            difflib.get_close_matches(folder.name, _listing(folder.parent), n=1)
            if folder.parent.is_dir()
            else []
        )
        hint = f"; did you mean {folder.parent / near_folder[0] / path.name}?" if near_folder else ""
        return ValueError(f"{path}: there is no folder {folder}{hint}")
    match = difflib.get_close_matches(path.name, _listing(folder), n=1, cutoff=0.6)
    same_stem = [n for n in _listing(folder) if n.split(".")[0] == path.name.split(".")[0]]
    nearest = match or same_stem
    if nearest:
        return ValueError(f"there is no file or folder {path}; did you mean {folder / nearest[0]}?")
    data = [n for n in _listing(folder) if suffix_of(Path(n)) in SUFFIXES]
    there = f"; data files there: {', '.join(data[:8])}" if data else ""
    return ValueError(f"there is no file or folder {path}{there} (a hub data set is named owner/name)")


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []


def _spooled(stream: IO[bytes], name: str) -> Input:
    """A pipe as a temporary file: rows are read more than once. It goes away with the last who uses it."""
    file = tempfile.NamedTemporaryFile(prefix="staff-", delete=False)  # noqa: SIM115
    path = Path(file.name)
    keep = _Kept()
    weakref.finalize(keep, _unlink, path, os.getpid())
    try:
        with file:
            shutil.copyfileobj(stream, file, 1 << 20)
    except OSError as error:
        raise ValueError(
            f"{name} can't be read, or {path.parent} not be written: {error.strerror or error}"
        ) from None
    if path.stat().st_size == 0:
        raise ValueError(f"{name} is empty; pipe the rows in, as in: staff select --data - < rows.jsonl")
    return Input((path,), (name,), keep=keep)


class _Kept:
    """Something a temporary file can be tied to."""


def _unlink(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker that was forked with a copy
        path.unlink(missing_ok=True)


# ---- folders ----


def _folder(path: Path, split: str | None) -> Input:
    if (path / "dataset_dict.json").is_file():
        names = read_json(path / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not names:
            raise ValueError(
                f"{path / 'dataset_dict.json'} lists no splits; save the data set again with save_to_disk"
            )
        chosen = split or ("train" if "train" in names else names[0] if len(names) == 1 else None)
        if chosen is None or chosen not in names:
            found = f"has no split {chosen!r}{near(chosen, names)}" if chosen else "holds several splits"
            raise ValueError(f"{path} {found}; name one with --split: {', '.join(names)}")
        return _saved(inside(path, chosen, path / "dataset_dict.json"))
    if (path / "state.json").is_file():
        return _saved(path)
    files = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith((".", "_"))]
    files = [p for p in files if suffix_of(p) in SUFFIXES and p.name not in NOT_DATA]
    if not files:
        inner = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        hint = f"; it has the folders {', '.join(inner[:8])}: name one of them" if inner else ""
        raise ValueError(f"{path} holds no data files ({', '.join(SUFFIXES)}, each also with .gz){hint}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_name(file), []).append(file)
    if split is not None:
        wanted = SPLIT_NAMES.get(split, split)
        if wanted not in by_split:
            raise ValueError(
                f"{path} has no file of the split {split!r}; its files: {', '.join(p.name for p in files[:12])}"
            )
        files = by_split[wanted]
    elif (
        len([s for s in by_split if s]) > 1
    ):  # a test set must not get into the coreset because it lies beside
        raise ValueError(
            f"{path} holds files of several splits ({', '.join(sorted(s for s in by_split if s))}); choose with --split, or name the files"
        )
    return Input(tuple(files), tuple(str(f) for f in files))


def _split_name(path: Path) -> str:
    words = re.split(r"[-_.\s]+", path.name.lower())
    return next((SPLIT_NAMES[w] for w in words if w in SPLIT_NAMES), "")


def _saved(path: Path) -> Input:
    """A folder written by `Dataset.save_to_disk`: state.json lists its Arrow files."""
    if not (path / "state.json").is_file():
        raise ValueError(f"{path} has no state.json; save the data set again with save_to_disk")
    state = read_json(path / "state.json")
    entries = state.get("_data_files")
    if (
        not isinstance(entries, list)
        or not all(isinstance(e, Mapping) and isinstance(e.get("filename"), str) for e in entries)
        or not entries
    ):
        raise ValueError(
            f"{path / 'state.json'} lists no data files; save the data set again with save_to_disk"
        )
    if state.get("_indices_files"):
        raise ValueError(
            f"{path} was saved with an index beside its rows; call flatten_indices() and save it again"
        )
    files = [inside(path, e["filename"], path / "state.json") for e in entries]
    gone = next((f for f in files if not f.is_file()), None)
    if gone is not None:
        raise ValueError(
            f"{path / 'state.json'} names {gone.name}, which is not there; copy the whole folder, or save the data set again"
        )
    return Input(tuple(files), tuple(str(f) for f in files), saved=path)


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """A file that a description names, which must lie in the description's own folder.

    Raises:
        ValueError: it is somewhere else.
    """
    joined = os.path.normpath(folder / name)
    root = os.path.normpath(folder)
    if (
        os.path.isabs(name)
        or "\0" in name
        or os.path.commonpath([os.path.abspath(root), os.path.abspath(joined)]) != os.path.abspath(root)
    ):
        raise ValueError(
            f"{said_by} names {name!r}, which lies outside its folder; move the file there, or give its path as the data"
        )
    return Path(joined)


def read_json(path: Path) -> dict:
    """A small JSON file that holds one object.

    Raises:
        ValueError: it does not, or can't be read.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); write it again as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; correct it there") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {shown(value)}; it must be one object")
    return value


# ---- LLaMA-Factory ----


def _factory(name: str, info: Path, split: str | None, config: str | None, revision: str | None) -> Input:
    info = info / "dataset_info.json" if info.is_dir() else info
    if not info.exists():
        raise _missing(info)
    entries = read_json(info)
    entry_name = name
    if name not in entries:
        real = os.path.realpath(name)
        fits = [
            k
            for k, v in entries.items()
            if isinstance(v, Mapping)
            and isinstance(v.get("file_name"), str)
            and os.path.realpath(info.parent / v["file_name"]) == real
        ]
        if not fits:
            raise ValueError(
                f"{info} has no entry {name!r}{near(name, entries)}; its entries: {', '.join(list(entries)[:20])}"
            )
        if len(fits) > 1:
            raise ValueError(
                f"{info} describes {name} more than once; name the entry as the data: {', '.join(fits)}"
            )
        entry_name = fits[0]
    entry, where = entries[entry_name], f"{info}, entry {entry_name!r}"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {shown(entry)}; it must be an object with 'file_name'")
    layout = from_factory(entry, where)
    for key in ("file_name", "hf_hub_url", "subset", "split", "folder", "revision"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise ValueError(f"{where}: {key!r} is {shown(entry[key])}; it must be text")
    notes = []
    if entry.get("num_samples") is not None:
        notes.append(
            f"{where}: num_samples ({shown(entry['num_samples'])}) is not applied, all rows are read"
        )
    if entry.get("hf_hub_url"):
        return Input(
            hub=entry["hf_hub_url"],
            config=config or entry.get("subset"),
            split=split or entry.get("split"),
            revision=revision or entry.get("revision"),
            folder=entry.get("folder"),
            layout=layout,
            notes=tuple(notes),
        )
    if not entry.get("file_name"):
        raise ValueError(
            f"{where} has no 'file_name' (nor 'hf_hub_url'); found {', '.join(entry) or 'nothing'}"
        )
    path = inside(info.parent, entry["file_name"], info)
    if not path.exists():
        raise ValueError(f"{where}: {_missing(path)}")
    found = _folder(path, split) if path.is_dir() else Input((path,), (str(path),))
    return Input(found.paths, found.names, layout=layout, saved=found.saved, notes=tuple(notes))


# ---- the hub ----


def load_hub(found: Input) -> Any:
    """The data set, through `datasets.load_dataset`. Every failure of that library comes out as one ValueError."""
    name = found.hub
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"there is no file or folder {name}; to load it from the hub: pip install 'staff-coreset[datasets]'"
        ) from None
    options: dict[str, Any] = {"revision": found.revision, "split": found.split}
    if found.folder:
        options["data_dir"] = found.folder
    try:
        return datasets.load_dataset(name, found.config, **options)
    except Exception as error:  # the network, the hub and the builders raise whatever they like
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"there is no file or folder {name}, and as a hub data set it can't be loaded ({type(error).__name__}: {said[:300]}); "
            "check the name, --dataset-config, --split and --revision, and the connection"
        ) from None
