"""What `data` names -> files: folders, splits, standard input, hub ids, entries of a dataset_info.json."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from staff.data.layouts import Layout, from_factory, near, shown
from staff.files import marked_as

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
# .json files that hold no rows
DESCRIPTIONS = ("dataset_info", "dataset_infos", "dataset_dict", "state", "package", "config")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("dev", "val", "valid", "validation", "eval"),
}
STDIN, PIPE = "standard input", "pipe the rows in, as in: staff select --data - < rows.jsonl"
DATA_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Input:
    """What is to be read.

    Attributes:
        paths: files, in order.
        names: what messages call them.
        hub: id of a hub data set, in place of files.
        config, split, revision, folder: of the hub data set; `split` also of what `save_to_disk` wrote.
        layout: where a dataset_info.json entry gives one.
        samples: how many rows that entry wants of them, drawn at random.
        saved: the folder that `save_to_disk` wrote, if the files are of one.
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
    samples: int | None = None
    saved: Path | None = None
    keep: object = field(default=None, compare=False)


def locate(
    data: str | os.PathLike | Sequence[str | os.PathLike],
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    dataset_info: str | os.PathLike | None = None,
) -> Input:
    """Find what `data` names; see `rows.read` for the arguments.

    Raises:
        ValueError: it is not there, or it is several things at once; the message says what is near.
    """
    names = [os.fspath(d) for d in data] if isinstance(data, list | tuple) else [os.fspath(data)]  # type: ignore[arg-type]
    for name in names:
        if not name or "\0" in name:
            kinds = "a file, a folder, a hub data set (owner/name), or - for standard input"
            raise ValueError(f"data is {name!r}; give {kinds}")
    asked = Input(config=config, split=split, revision=revision)
    info = Path(dataset_info) if dataset_info is not None else None
    inputs = [_one(name, asked) if info is None else _factory(name, info, asked) for name in names]
    first = inputs[0]
    if len(inputs) == 1:
        return first
    for name, other in zip(names, inputs, strict=True):
        if not other.paths or other.keep or other.saved or other.samples is not None:
            cure = "read it alone, or save it to a file"
            raise ValueError(f"{name} can't be read together with other data; {cure}")
        if first.layout and other.layout and replace(other.layout, name=first.layout.name) != first.layout:
            raise ValueError(f"{names[0]} and {name} are laid out differently; select from each alone")
    paths = tuple(p for i in inputs for p in i.paths)
    twice = next((p for n, p in enumerate(paths) if p in paths[:n]), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice; name each file once")
    return Input(paths, tuple(n for i in inputs for n in i.names), layout=first.layout)


def _one(name: str, asked: Input) -> Input:
    if name == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(f"{STDIN} is a terminal; {PIPE}")
        return _spooled(sys.stdin.buffer, STDIN)
    if re.match(r"\w+://", name):
        cure = "download it first; a hub data set is named owner/name"
        raise ValueError(f"{name} is an address, not a file: {cure}")
    path = Path(name).expanduser()
    if path.is_fifo():  # such as <(zcat rows.jsonl.gz) gives
        with open(path, "rb") as pipe:
            return _spooled(pipe, name)
    if path.is_dir():
        return _folder(path, asked.split)
    if path.exists():
        if asked != Input():
            flags = "--split, --dataset-config and --revision are for hub data sets, --split also for folders"
            raise ValueError(f"{name} is a file: {flags}")
        return Input((path,), (name,))
    if DATA_ID.fullmatch(name) and suffix_of(path) not in SUFFIXES and not path.parent.is_dir():
        return replace(asked, hub=name)
    raise _missing(path)


def suffix_of(path: Path) -> str:
    """The extension in small letters, without a .gz behind it."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _missing(path: Path) -> ValueError:
    folder = path.parent
    if not folder.is_dir():
        match = difflib.get_close_matches(folder.name, _listing(folder.parent), n=1)
        hint = f"; did you mean {folder.parent / match[0] / path.name}?" if match else ""
        return ValueError(f"{path}: there is no folder {folder}{hint}")
    names = _listing(folder)
    same_stem = [n for n in names if n.split(".")[0] == path.name.split(".")[0]]
    if nearest := difflib.get_close_matches(path.name, names, n=1) or same_stem:
        return ValueError(f"there is no file or folder {path}; did you mean {folder / nearest[0]}?")
    data = [n for n in names if suffix_of(Path(n)) in SUFFIXES]
    there = f"; data files there: {', '.join(data[:8])}" if data else ""
    return ValueError(f"there is no file or folder {path}{there} (a hub data set is named owner/name)")


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []


def _spooled(stream: IO[bytes], name: str) -> Input:
    """A pipe as a temporary file: rows are read more than once. It goes away with the last who uses it.

    Where the system can reach an open file without a name it has none: nothing is left of a killed process.
    """
    nameless = Path("/proc/self/fd").is_dir()
    try:
        file = tempfile.TemporaryFile() if nameless else tempfile.NamedTemporaryFile(prefix="staff-")  # noqa: SIM115
        shutil.copyfileobj(stream, file, 1 << 20)
        file.flush()
    except OSError as error:
        what = f"{name} can't be read, or {tempfile.gettempdir()} not be written"
        raise ValueError(f"{what}: {error.strerror or error}") from None
    if file.tell() == 0:
        raise ValueError(f"{name} is empty; {PIPE}")
    path = Path(f"/proc/self/fd/{file.fileno()}" if nameless else file.name)
    return Input((path,), (name,), keep=file)


# ---- folders ----


def _folder(path: Path, split: str | None) -> Input:
    if marked_as(path) and (path / "coreset.jsonl").exists():
        raise ValueError(f"{path} is a run's folder; name its coreset: {path / 'coreset.jsonl'}")
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        for state in path.rglob("state.json"):
            try:
                shards = [str(entry["filename"]) for entry in read_json(state)["_data_files"]]
            except (KeyError, TypeError):
                cure = "save the data set again with save_to_disk"
                raise ValueError(f"{state} lists no data files; {cure}") from None
            for name in shards:
                inside(state.parent, name, state)
        files = tuple(sorted(path.rglob("*.arrow")))
        return Input(files, tuple(map(str, files)), split=split, saved=path)
    files = tuple(p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith((".", "_")))
    rowless = [f"{name}.json" for name in DESCRIPTIONS]
    files = tuple(p for p in files if suffix_of(p) in SUFFIXES and p.name not in rowless)
    if not files:
        inner = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        hint = f"; it has the folders {', '.join(inner[:8])}: name one of them" if inner else ""
        raise ValueError(f"{path} holds no data files ({', '.join(SUFFIXES)}, each also with .gz){hint}")
    splits = [_split_name(p.name) for p in files]
    if split is not None:
        wanted = _split_name(split) or split
        files, all_files = tuple(p for p, s in zip(files, splits, strict=True) if s == wanted), files
        if not files:
            names = ", ".join(p.name for p in all_files[:12])
            raise ValueError(f"{path} has no file of the split {split!r}; its files: {names}")
    elif len(several := {s for s in splits if s}) > 1:  # a test set must not get in because it lies beside
        names = ", ".join(sorted(several))
        cure = "choose with --split, or name the files"
        raise ValueError(f"{path} holds files of several splits ({names}); {cure}")
    return Input(files, tuple(map(str, files)))


def _split_name(name: str) -> str:
    words = re.split(r"[-_.\s]+", name.lower())
    return next((split for word in words for split, names in SPLIT_NAMES.items() if word in names), "")


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """A file that a description names, which must lie in the description's own folder.

    Raises:
        ValueError: it is somewhere else.
    """
    joined, root = os.path.abspath(folder / name), os.path.abspath(folder)
    if os.path.isabs(name) or "\0" in name or os.path.commonpath([root, joined]) != root:
        cure = "move the file there, or give its path as the data"
        raise ValueError(f"{said_by} names {name!r}, which lies outside its folder; {cure}")
    return Path(os.path.normpath(folder / name))


def read_json(path: Path) -> dict:
    """A small JSON file that holds one object.

    Raises:
        ValueError: it does not, or can't be read.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; correct it there") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {shown(value)}; it must be one object")
    return value


# ---- LLaMA-Factory ----


def _factory(name: str, info: Path, asked: Input) -> Input:
    info = info / "dataset_info.json" if info.is_dir() else info
    if not info.exists():
        raise _missing(info)
    key, entry = _entry_of(name, info)
    where = f"{info}, entry {key!r}"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {shown(entry)}; it must be an object with 'file_name'")
    layout = from_factory(entry, where)
    for key in ("file_name", "hf_hub_url", "subset", "split", "folder", "revision"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise ValueError(f"{where}: {key!r} is {shown(entry[key])}; it must be text")
    samples = entry.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise ValueError(f"{where}: 'num_samples' is {shown(samples)}; it must be a number of rows")
    asked = replace(asked, split=asked.split or entry.get("split"), layout=layout, samples=samples)
    hub, folder = entry.get("hf_hub_url"), entry.get("folder")
    if hub:
        # `datasets` takes names of its own builders, such as text, and folders for data sets too
        if not DATA_ID.fullmatch(hub) or os.path.exists(hub):
            raise ValueError(f"{where}: 'hf_hub_url' is {hub!r}; it must be a hub data set, owner/name")
        if folder and (os.path.isabs(folder) or ".." in Path(folder).parts or "://" in folder):
            raise ValueError(f"{where}: 'folder' is {folder!r}; it must be a folder of the hub data set")
        config, revision = asked.config or entry.get("subset"), asked.revision or entry.get("revision")
        return replace(asked, hub=hub, folder=folder, config=config, revision=revision)
    if not entry.get("file_name"):
        found = ", ".join(entry) or "nothing"
        raise ValueError(f"{where} has no 'file_name' (nor 'hf_hub_url'); found {found}")
    path = inside(info.parent, entry["file_name"], info)
    if not path.exists():
        raise ValueError(f"{where}: {_missing(path)}")
    source = _folder(path, asked.split) if path.is_dir() else Input((path,), (str(path),))
    return replace(source, layout=layout, samples=samples)


def _entry_of(name: str, info: Path) -> tuple[str, Any]:
    """The entry of that name, or the one that describes the file of that name."""
    entries = read_json(info)
    if name in entries:
        return name, entries[name]
    files = {key: entry.get("file_name") for key, entry in entries.items() if isinstance(entry, Mapping)}
    paths = {
        key: os.path.realpath(info.parent / file) for key, file in files.items() if isinstance(file, str)
    }
    fits = [key for key, path in paths.items() if path == os.path.realpath(name)]
    if not fits:
        names = ", ".join(list(entries)[:20])
        raise ValueError(f"{info} has no entry {name!r}{near(name, entries)}; its entries: {names}")
    if len(fits) > 1:
        cure = f"name the entry as the data: {', '.join(fits)}"
        raise ValueError(f"{info} describes {name} more than once; {cure}")
    return fits[0], entries[fits[0]]


# ---- what `datasets` loads ----


def load(source: Input) -> Any:
    """A hub data set or a folder of `save_to_disk`; all failures of `datasets` come out as one ValueError."""
    what, cure = str(source.saved), "save the data set again with save_to_disk"
    if source.hub:
        what = f"there is no file or folder {source.hub}, and as a hub data set it"
        cure = "check the name, --dataset-config, --split and --revision, and the connection"
    try:
        import datasets
    except ImportError:
        install = "pip install 'staff-coreset[datasets]'"
        raise ValueError(f"{what} can't be loaded without datasets: {install}") from None
    try:
        if source.saved is not None:
            loaded = datasets.load_from_disk(source.saved)
        else:
            options = {"revision": source.revision, "split": source.split}
            folder = {"data_dir": source.folder} if source.folder else {}
            loaded = datasets.load_dataset(source.hub, source.config, **options, **folder)
    except Exception as error:  # the network, the hub and the builders raise whatever they like
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} can't be loaded ({said[:300]}); {cure}") from None
    return split_of(loaded, source.split, source.hub or what)


def split_of(data: Any, split: str | None, name: str) -> Any:
    """The split asked for, else `train`, else the only one; a single Dataset is itself."""
    if not hasattr(data, "keys"):
        return data
    names = list(data)
    chosen = split or (names[0] if len(names) == 1 else "train")
    if chosen not in names:
        cure = f"name one with --split: {', '.join(names)}"
        raise ValueError(f"{name} has no split {chosen!r}{near(chosen, names)}; {cure}")
    return data[chosen]
