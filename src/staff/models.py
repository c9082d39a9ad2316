"""Find, identify and load models: a hub id, a folder, or a .gguf file; and which smaller sibling could be the draft."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # models are found and identified without torch: a finished run is recognised in no time
    import torch

# family -> (what its names look like, model types in a config.json, siblings smallest first)
FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "Qwen3": (r"qwen3(?!\.)", ("qwen3",), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B")),
    "Qwen2.5": (
        r"qwen2\.5",
        ("qwen2",),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B"),
    ),
    "Llama 3": (r"llama-?3", (), ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B")),
    "Llama 2": (r"llama-?2", (), ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf")),
    "Gemma 3": (
        r"gemma-?3(?!n)",
        ("gemma3", "gemma3_text"),
        ("google/gemma-3-270m", "google/gemma-3-1b-pt", "google/gemma-3-4b-pt", "google/gemma-3-12b-pt"),
    ),
    "Gemma 2": (r"gemma-?2-", ("gemma2",), ("google/gemma-2-2b", "google/gemma-2-9b")),
    "Gemma": (r"gemma-\d+b", ("gemma",), ("google/gemma-2b", "google/gemma-7b")),
    "Mistral": (r"mistral|ministral", ("mistral",), ("mistralai/Mistral-7B-v0.3",)),
    "Phi-3": (r"phi-?3", ("phi3",), ("microsoft/Phi-3-mini-4k-instruct",)),
    "SmolLM2": (r"smollm2", (), ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-1.7B")),
    "Pythia": (
        r"pythia",
        ("gpt_neox",),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-160m", "EleutherAI/pythia-410m", "EleutherAI/pythia-1b"),
    ),
    "GPT-2": (r"gpt-?2", ("gpt2",), ("openai-community/gpt2", "openai-community/gpt2-medium", "openai-community/gpt2-large")),
    "OPT": (r"opt-", ("opt",), ("facebook/opt-125m", "facebook/opt-350m", "facebook/opt-1.3b", "facebook/opt-2.7b")),
    "OLMo 2": (r"olmo-?2", ("olmo2",), ("allenai/OLMo-2-0425-1B", "allenai/OLMo-2-1124-7B")),
}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
DESCRIBES = ("config.json", "generation_config.json", "tokenizer*", "*.jinja", "special_tokens_map.json", "vocab*", "merges.txt", "*.model")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user gave it.
        folder: what transformers loads from; the file's folder for a .gguf.
        gguf: the .gguf file's name, or None.
    """

    name: str
    folder: Path
    gguf: str | None = None

    def files(self) -> list[Path]:
        """The files that make the model what it is, sorted."""
        if self.gguf:
            return [self.folder / self.gguf]
        return sorted({path for pattern in (*WEIGHTS, *DESCRIBES) for path in self.folder.glob(pattern) if path.is_file()})


def resolve(name: str, flag: str = "--target") -> Source:
    """Find a model's files; a hub id is fetched (or taken from the hub's cache) whole.

    Raises:
        ValueError: there is no such model; says what was tried.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{flag} {name}: there is no such file")
        return Source(name, path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            cure = "it is a LoRA adapter: merge it into its base first" if adapter else "name the folder that holds it"
            raise ValueError(f"{flag} {name}: the folder has no config.json; {cure}")
        if not any(path.glob("*.safetensors")):
            raise ValueError(f"{flag} {name}: the folder has no .safetensors weights; convert the model (pickled weights are not read)")
        return Source(name, path)
    if path.exists() or not HUB_ID.fullmatch(name) or name.startswith((".", "/", "~")):
        raise ValueError(f"{flag} {name}: there is no such folder or .gguf file, and it is not a hub id (owner/model)")
    return Source(name, _fetch(name, flag))


def _fetch(name: str, flag: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*WEIGHTS, *DESCRIBES, "*.py"]))
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{flag} {name}: no such folder here, and the hub did not give it ({type(error).__name__}: {reason[:200]})"
        ) from None


def self_blocks(draft: str | None) -> int | None:
    """N of "self:N", None for anything else.

    Raises:
        ValueError: "self" without a number of blocks.
    """
    if draft is None or not draft.startswith("self"):
        return None
    match = re.fullmatch(r"self:(\d+)", draft)
    if not match or int(match[1]) < 1:
        raise ValueError(f"--draft {draft}: say how many of the target's blocks to keep, as in self:8")
    return int(match[1])


def suggest_drafts(target: str) -> list[str]:
    """Hub ids of the known smaller siblings of a target's family, smallest first; empty for a family not known."""
    name = Path(target).name.lower() if Path(target).exists() else target.lower()
    model_type, size = None, None
    config = Path(target) / "config.json"
    if config.is_file():
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    size = _size(name)
    for pattern, model_types, siblings in FAMILIES.values():
        if re.search(pattern, name) or model_type in model_types:
            return [sibling for sibling in siblings if size is None or (_size(sibling) or 0) < size]
    return []


def _size(name: str) -> float | None:
    """Parameters as a model's name tells them, in billions."""
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", name.lower())
    return float(found[-1][0]) / (1000 if found[-1][1] == "m" else 1) if found else None


def pick_device(device: str) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: not to be had here ({str(error).splitlines()[0]})") from None


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type asked for; auto is bfloat16 where the hardware multiplies in it, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16"))
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def _quietly(load: Callable, source: Source):
    """Run a loader of transformers' without its bars and advice; turn its errors into one line."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TQDM_DISABLE", "1")  # gguf's bar has no other switch
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{source.name} can't be loaded: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_tokenizer(source: Source, trust_remote_code: bool = False):
    """The model's tokenizer.

    Raises:
        ValueError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    extra = {"gguf_file": source.gguf} if source.gguf else {}
    return _quietly(lambda: AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code, **extra), source)


def load_model(source: Source, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model, in eval mode, its parameters frozen.

    Raises:
        ValueError: it can't be loaded; the reason in one line.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    extra = {"gguf_file": source.gguf, "quantization_config": GgufConfig(dequantize=True)} if source.gguf else {"use_safetensors": True}

    def load():
        return AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, trust_remote_code=trust_remote_code, **extra)

    if source.gguf:
        _check_gguf()
    return _quietly(load, source).to(device).eval().requires_grad_(False)


def _check_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("reading .gguf files needs the gguf package: pip install 'staff-coreset[gguf]'") from None


def unpack_gguf(source: Source, folder: Path, dtype: torch.dtype) -> Source:
    """Turn a .gguf file into a folder of safetensors once: its reader takes many seconds each time, even for a small model.

    Args:
        folder: where it goes; taken as it is where it is finished.

    Returns:
        the folder as a Source.
    """
    import torch

    done = folder / "unpacked.json"
    if not done.exists():
        model, tokenizer = load_model(source, dtype, torch.device("cpu")), load_tokenizer(source)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        _quietly(lambda: model.save_pretrained(folder), source)
        tokenizer.save_pretrained(folder)
        done.write_text(json.dumps({"from": source.name}) + "\n", encoding="utf-8")
    return Source(source.name, folder)


@dataclass(frozen=True)
class Size:
    """What a token costs in a model, in parameters: two floating-point operations each, forward.

    Attributes:
        below, last: linear weights of the blocks below the last, and of the last.
        head: weights of the output embedding, which only response tokens meet.
    """

    below: int
    last: int
    head: int

    def scoring_flops(self, tokens: int, response_tokens: int) -> float:
        """Of one pass in the scopes of the last block: forward everywhere, last block and head back again."""
        return 2 * (tokens * (self.below + 2 * self.last) + response_tokens * 2 * self.head)

    def training_flops(self, tokens: int, response_tokens: int) -> float:
        """Of one LoRA epoch: forward, and gradients of inputs; frozen weights need no third."""
        return 4 * (tokens * (self.below + self.last) + response_tokens * self.head)


def measure(model: torch.nn.Module) -> Size:
    """Count a loaded model's weights, adapters left out."""
    from staff import scopes

    def count(module) -> int:
        return sum(parameter.numel() for name, parameter in module.named_parameters() if parameter.ndim >= 2 and "lora_" not in name)

    each = [count(block) for block in scopes.blocks(model)]
    return Size(sum(each[:-1]), each[-1], scopes.inner(model).get_output_embeddings().weight.numel())
