"""Find and identify a model's files: a hub id, a folder, a LoRA adapter with its base, or a .gguf file. No
torch."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from staff.config import Reading

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    "tokenizer*",
    "*.jinja",
    "chat_template*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
DESCRIBES = ("config.json", "generation_config.json", *TOKENIZER)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# what a config.json calls its quantisation -> the package that transformers needs to load it, for the common
# ones
QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
    "hqq": "hqq",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "aqlm": "aqlm",
    "fp8": "triton",
    "mxfp4": "kernels",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        folder: what transformers loads from; the file's folder for a .gguf.
        gguf: the .gguf file's name, or None.
        adapter: the folder of a LoRA adapter on it, or None.
    """

    name: str
    folder: Path
    gguf: str | None = None
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: an adapter may bring its own."""
        return (
            self.adapter
            if self.adapter and (self.adapter / "tokenizer_config.json").is_file()
            else self.folder
        )

    def files(self) -> list[Path]:
        """The files that make the model what it is, adapter included; no two have the same name."""
        files = [self.folder / self.gguf] if self.gguf else _matching(self.folder, (*WEIGHTS, *DESCRIBES))
        if self.adapter:
            own = _matching(
                self.adapter, (*ADAPTER, *TOKENIZER) if self.tokenizer == self.adapter else ADAPTER
            )
            names = {path.name for path in own}
            files = [path for path in files if path.name not in names] + own
        return files


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


HEAD_BYTES = 1 << 26  # of a .gguf file: its tokenizer stands before the weights


def _tokenizer_bytes(source: Source, chat_template: str | None) -> Iterable[tuple[str, bytes]]:
    """Name and content of what makes a model's tokenizer and chat template, no weights."""
    if source.gguf and source.tokenizer == source.folder:
        with open(source.folder / source.gguf, "rb") as file:
            yield "gguf", file.read(HEAD_BYTES)
    else:
        for path in _matching(source.tokenizer, TOKENIZER):
            yield path.name, path.read_bytes()
    if chat_template not in (None, "model", "none"):
        yield "--chat-template", Path(str(chat_template)).expanduser().read_bytes()


def tokenizer_fingerprint(source: Source, chat_template: str | None = None) -> str:
    """What a pool of tokens depends on of a model: its tokenizer's own files, and the chat template given in
    their place."""
    digest = hashlib.sha256()
    for name, content in _tokenizer_bytes(source, chat_template):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:12]


def with_date(reading: Reading, sources: Iterable[Source], begun: Path) -> Reading:
    """The reading with the day that a chat template writes held fixed: the day of the first run, else today.

    Args:
        begun: the JSON file with the settings of the first run, where there was one.
    """
    templates = (
        content for source in sources for _, content in _tokenizer_bytes(source, reading.chat_template)
    )
    if reading.template_date or not any(b"strftime_now" in content for content in templates):
        return reading
    try:
        before = json.loads(begun.read_text(encoding="utf-8"))["settings"]["template_date"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    return replace(reading, template_date=before or datetime.date.today().isoformat())


def resolve(name: str, flag: str = "--target") -> Source:
    """Find a model's files; a hub id is fetched (or taken from the hub's cache) whole.

    A LoRA adapter is found with its base: the one its adapter_config.json names, a folder or .gguf file
        beside the adapter
    or below the working directory, or a hub id.

    Raises:
        ValueError: there is no such model, or a file of it is not whole; says what was tried.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{flag} {name}: there is no such file")
        source = Source(name, path.parent, path.name)
    else:
        source = _in_folder(name, folder_of(name, flag), flag)
    for path in source.files():
        wrong = _what_is_wrong_with(path)
        if wrong:
            raise ValueError(f"{flag} {name}: {path} {wrong}")
    return source


def _what_is_wrong_with(path: Path) -> str | None:
    """Of a model's file, by its head alone: a stand-in, cut off, or without the shards that it names."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(40)
        if head.startswith(b"version https://git-lfs"):
            return "is a pointer of Git LFS and not the file itself: fetch it, with git lfs pull"
        if path.suffix == ".gguf" and head[:4] != b"GGUF":
            return "is no .gguf file: download it again"
        if path.suffix == ".safetensors":
            file.seek(8)
            try:
                tensors = json.loads(file.read(min(int.from_bytes(head[:8], "little"), size)))
                ends = [about["data_offsets"][1] for name, about in tensors.items() if name != "__metadata__"]
            except (ValueError, TypeError, KeyError, AttributeError):
                return f"is cut off or damaged ({size} bytes): download it again"
            wanted = 8 + int.from_bytes(head[:8], "little") + max(ends, default=0)
            if size < wanted:
                return f"is cut off, at {size} bytes of {wanted}: download it again"
    if path.name.endswith(".safetensors.index.json"):
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()))
        lost = [name for name in shards if not (path.parent / name).is_file()]
        if lost:
            return f"names {len(lost)} of {len(shards)} shards that are not there ({lost[0]}): download them"
    return None


def folder_of(
    name: str, flag: str, patterns: tuple[str, ...] = (*WEIGHTS, *DESCRIBES, *ADAPTER, "*.py")
) -> Path:
    """A model's folder; of a hub id the files that fit the patterns are fetched, or in the hub's cache.

    Raises:
        ValueError: there is no such model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(name) or name.startswith((".", "/", "~")):
        raise ValueError(
            f"{flag} {name}: there is no such folder or .gguf file, and it is not a hub id (owner/model)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
        raise ValueError(
            f"{flag} {name}: no such folder here, and the hub did not give it ({reason[:200]})"
        ) from None


def is_at_hand(name: str) -> bool:
    """Is a model on this machine, so that looking at it downloads nothing?"""
    if Path(name).expanduser().exists() or not HUB_ID.fullmatch(name):
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _in_folder(name: str, folder: Path, flag: str) -> Source:
    has_weights = any(path.name != "adapter_model.safetensors" for path in folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").is_file() and not has_weights:
        return _with_base(name, folder, flag)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{flag} {name}: the folder has no config.json; name the folder that holds it")
    if not has_weights:
        raise ValueError(
            f"{flag} {name}: the folder has no .safetensors weights; convert the model (pickled weights are "
            f"not read)"
        )
    return Source(name, folder)


def _with_base(name: str, folder: Path, flag: str) -> Source:
    """A LoRA adapter and the base that it names."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag} {name}: its adapter_config.json is not valid JSON ({error})") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{flag} {name}: its adapter is of type {config.get('peft_type')}; only LoRA adapters are read"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{flag} {name}: the adapter has no adapter_model.safetensors (pickled weights are not read)"
        )
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{flag} {name}: its adapter_config.json names no base model; write it there as "
            f"base_model_name_or_path"
        )
    beside = folder / base
    try:
        found = resolve(str(beside) if beside.exists() else base, "its base model,")
    except ValueError as error:
        raise ValueError(f"{flag} {name}: {error}") from None
    if found.adapter:
        raise ValueError(
            f"{flag} {name}: its base model, {base}, is an adapter itself; merge that one into its own base "
            f"first"
        )
    return Source(name, found.folder, found.gguf, folder)


def check_quantised(source: Source, load_in: str | None = None) -> str | None:
    """How a folder's weights are quantised already, None where they aren't.

    Raises:
        ValueError: the library for it, for `load_in` or a .gguf file is missing; or it is asked for twice.
    """
    if source.gguf and find_spec("gguf") is None:
        raise ValueError("reading .gguf files needs the gguf package: pip install 'staff-coreset[gguf]'")
    config = source.folder / "config.json"
    settings = (
        json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
        if config.is_file()
        else None
    )
    method = settings.get("quant_method", "bitsandbytes") if settings else None
    if method and load_in:
        raise ValueError(f"{source.name} is quantised already ({method}): leave --load-in {load_in} away")
    if load_in and load_in not in ("8bit", "4bit"):
        raise ValueError(f"--load-in must be 8bit or 4bit; found {load_in!r}")
    package = QUANTISERS.get(method) if method else "bitsandbytes" if load_in else None
    if package and find_spec(package.split(".")[0]) is None:
        what = f"--load-in {load_in}" if load_in else f"{source.name} is quantised ({method}), which"
        raise ValueError(f"{what} needs the {package} package: pip install {package.replace('.', '-')}")
    return method
