"""Load models, and say what a token costs in one. No torch until one is loaded."""

from __future__ import annotations

import atexit
import ctypes
import logging
import math
import os
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff.files import remove, seal, sealed
from staff.models.files import Source as Source
from staff.models.files import check_quantised
from staff.models.files import resolve as resolve

if TYPE_CHECKING:  # models are found and identified without torch: a finished run is recognised in no time
    import torch

    from staff.data.tokens import Pool

logger = logging.getLogger(__name__)


def pick_device(device: str, is_here: bool = True) -> torch.device:
    """The device asked for, or the best there is.

    Args:
        is_here: it must be one of this machine; a driver's workers may have others.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if device == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        if is_here:
            torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: not to be had here ({str(error).splitlines()[0]})") from None


def take_gpu(rank: int, threads: int) -> None:
    """Let "cuda" mean this process's GPU, one each in turn; and compute on so many CPU threads."""
    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


def pick_dtype(dtype: str, device: torch.device, is_here: bool = True) -> torch.dtype:
    """The type asked for; auto is bfloat16 where the hardware multiplies in it, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda" and not is_here and not torch.cuda.is_available():
        raise ValueError("--dtype auto: there is no GPU here to ask; say what the workers compute in")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    return torch.float32


def with_threads(threads: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Do something on so many CPU threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return work(*arguments)
    finally:
        torch.set_num_threads(before)


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What a manifest says of where and in what a model computed."""
    import torch

    is_known = device.type == "cuda" and torch.cuda.is_available()
    gpu = f" ({torch.cuda.get_device_name(device)})" if is_known else ""
    return {"device": f"{device}{gpu}", "dtype": str(dtype).removeprefix("torch.")}


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(
            capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16")
        )
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def _quietly(load: Callable[[], Any], source: Source) -> Any:
    """Run a loader of transformers' without its bars and advice; turn its errors into one line."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TQDM_DISABLE", "1")  # gguf's bar has no other switch
    errors = (OSError, ValueError, LookupError, ImportError, RuntimeError, AttributeError, TypeError)
    try:
        with _header_read_once() if source.gguf else nullcontext():
            return load()
    except (*errors, struct.error) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        cure = "; if the file was cut off, download it again" if source.gguf else ""
        raise ValueError(f"{source.name} can't be loaded: {reason}{cure}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def _header_read_once() -> Iterator[None]:
    """Let transformers read a .gguf file's header once, though it asks anew for the configuration, the
    tokenizer and the weights, and make the table of names once, though it asks anew for each module."""
    import gguf

    def reader(path: str) -> Any:
        return _header(path, os.stat(path).st_mtime_ns)

    ours = {"GGUFReader": reader, "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    before = {name: vars(gguf)[name] for name in ours}
    vars(gguf).update(ours)
    try:
        yield
    finally:
        vars(gguf).update(before)


@lru_cache(maxsize=1)
def _header(path: str, changed: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        """Slices a plain array: a memmap makes an object with a history of each of half a million."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Reader(path)


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    extra = {"gguf_file": source.gguf} if source.gguf and source.tokenizer == source.folder else {}
    return _quietly(
        lambda: AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=trust_remote_code, **extra),
        source,
    )


def check_model(
    source: Source, scope: str, load_in: str | None = None, trust_remote_code: bool = False
) -> None:
    """Can the model be loaded so, and has it the scope? Reads configurations, no weights: seconds, even for a
    large model.

    Raises:
        ValueError: a library that is missing, or a scope that can't be had; before anything is loaded or
            trained.
    """
    from staff.scoring import scopes

    check_quantised(source, load_in)
    model = without_weights(source, trust_remote_code)
    scopes.check_scope(scope)
    if scope == "lora":
        from staff.models.adapters import add_lora

        _quietly(partial(add_lora, model, 1, 1, 0), source)


def without_weights(source: Source, trust_remote_code: bool) -> torch.nn.Module:
    """The model as its configuration has it, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make() -> Any:
        extra = {"gguf_file": source.gguf} if source.gguf else {}
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code, **extra)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)

    return _quietly(make, source)


def check_room(
    source: Source, pool: Pool, numbers: np.ndarray, trust_remote_code: bool = False, answer: int = 0
) -> None:
    """Has a model embeddings for all tokens of a pool, and positions for its longest sample?

    By its configuration alone, before any work. More tokens than a model with rotary positions was made for
    are a warning: it computes something.

    Args:
        numbers: the rows of the data that the pool is of, those that it dropped perhaps among them.
        answer: tokens that may come behind a prompt.
    """
    from staff.models import anatomy

    model = without_weights(source, trust_remote_code)
    if len(numbers) > len(pool):
        numbers = np.delete(numbers, [place for place, _ in pool.dropped])
    rows, labels = (
        len(part.weight)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    )
    beyond = np.flatnonzero(pool.input_ids >= min(rows, labels))
    beyond = beyond[pool.is_response[beyond] | (pool.input_ids[beyond] >= rows)]
    if len(beyond):
        row = numbers[np.searchsorted(pool.offsets, beyond[0], "right") - 1]
        raise ValueError(
            f"{source.name}: row {row} of the data has token {pool.input_ids[beyond[0]]}, and the model "
            f"knows {min(rows, labels)} tokens: give it its own tokenizer, or resize its embeddings"
        )
    needed = np.maximum(pool.lengths, pool.lengths - pool.response_tokens() + answer)
    longest, (limit, is_table) = int(needed.max()), anatomy.positions(model)
    if limit and longest > limit:
        found = (
            f"{source.name}: row {numbers[np.argmax(needed)]} of the data has {longest} tokens"
            f"{', its answer included,' * bool(answer)} and the model has positions for {limit}"
        )
        if is_table:
            raise ValueError(f"{found}: --max-length {limit}")
        logger.warning("%s; what it makes of later ones is a guess: --max-length %d", found, limit)


def most_positions(source: Source, trust_remote_code: bool = False) -> int | None:
    """Positions that a model was made for, by its configuration; None for no end."""
    from staff.models import anatomy

    return anatomy.positions(without_weights(source, trust_remote_code))[0]


def _keep_freed_memory() -> None:
    """Have glibc hold on to up to 1 GiB of what is freed. It would give each large block back to the system,
    to get the next one page by page, zeroed anew: a third of the time of a small model on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(setting, 1 << 30)


def load_model(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    load_in: str | None = None,
    merge: bool = True,
    limits: Mapping[int | str, int] | None = None,
    kind: str = "AutoModelForCausalLM",
) -> torch.nn.Module:
    """The model, in eval mode, its parameters frozen.

    Args:
        load_in: "8bit" (LLM.int8) or "4bit" (NF4), by bitsandbytes as it loads; `dtype` is then what it
            computes in. LLM.int8 looks for outliers over a batch, so an 8-bit score depends a little on its
            batch.
        merge: fold a LoRA adapter into the base, in `dtype`: a plain model, cut, tuned and scored like any
            other. A quantised base keeps it apart, since folding would quantise its matrices too. False: keep
            it apart, as a PEFT model, to be scored in scope "lora".
        limits: place what the device does not hold on others, in CPU memory and on disk
            (`placement.place_blocks`); None: all of it is on the device.
        kind: transformers' class for models of its kind.

    Raises:
        ValueError: it can't be loaded; the reason in one line.
    """
    import transformers
    from transformers import BitsAndBytesConfig, GgufConfig

    from staff.models import placement

    # a CPU kernel is kept for each shape of batch, 1024 of them by default: over a large pool that is a
    # gigabyte
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    is_quantised = bool(check_quantised(source, load_in) or load_in)
    extra: dict[str, Any] = {"use_safetensors": True}
    if source.gguf:
        extra = {"gguf_file": source.gguf, "quantization_config": GgufConfig(dequantize=True)}
        if load_in:
            raise ValueError(
                f"{source.name}: --load-in {load_in} can't be had of a .gguf file itself: unpack it first"
            )
    elif load_in == "8bit":
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif load_in == "4bit":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if is_quantised:
        extra["device_map"] = {"": device}
    if limits is not None:
        if source.adapter or source.gguf or is_quantised:
            what = (
                "an adapter: fold it in first" if source.adapter else "no .gguf file and no quantised weights"
            )
            raise ValueError(f"--device-map auto loads {what} ({source.name})")
        empty = without_weights(source, trust_remote_code)
        extra["device_map"] = placement.place_blocks(empty, dtype, device, limits)
        extra["offload_folder"] = tempfile.mkdtemp(prefix="staff-")  # of weights that no file has as they are
        atexit.register(shutil.rmtree, extra["offload_folder"], ignore_errors=True)

    def load() -> Any:
        return getattr(transformers, kind).from_pretrained(
            source.folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told of below, by name
            **extra,
        )

    if device.type == "cpu" and limits is None:
        _keep_freed_memory()
    model, told = _quietly(load, source)
    _header.cache_clear()
    _check_weights(model, told, source)
    if is_quantised:
        for module in (
            model.modules()
        ):  # else bitsandbytes repacks 4-bit weights on a CPU so that no gradient gets through
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    elif limits is None:
        model = model.to(device)
    adapter = source.adapter
    if adapter:
        model = _quietly(lambda: _put_on(model, adapter, merge and not is_quantised), source)
    return model.eval().requires_grad_(False)


def merged(source: Source, adapter: Path, dtype: torch.dtype, trust_remote_code: bool) -> torch.nn.Module:
    """A model as it came, and a LoRA adapter that was trained on it folded in."""
    import torch

    model = load_model(source, dtype, torch.device("cpu"), trust_remote_code)
    return _quietly(lambda: _put_on(model, adapter, True), source)


def _check_weights(model: torch.nn.Module, told: dict[str, Any], source: Source) -> None:
    """All that the model has came out of its files, and is a number."""
    kind, missing = type(model).__name__, sorted(told["missing_keys"])
    if missing:
        named = f"{missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}"
        raise ValueError(
            f"{source.name}: its files lack weights that {kind} has ({named}): they hold a model of another "
            "kind (without a head, or with one that classifies), or some of them are lost"
        )
    for name, found, wanted in sorted(told["mismatched_keys"], key=str):
        raise ValueError(
            f"{source.name}: {name} is {tuple(found)} in the files and {tuple(wanted)} by config.json: they "
            "are not of one model"
        )
    for name, weight in model.named_parameters():
        if (
            weight.numel()
            and not weight.is_meta
            and weight.dtype.is_floating_point
            and weight.dtype.itemsize > 1
        ):
            low, high = (end.item() for end in weight.aminmax())
            if not math.isfinite(low + high):
                raise ValueError(
                    f"{source.name}: {name} holds nan or infinity: it overflows in {str(weight.dtype)[6:]}, "
                    "try --dtype float32 (or bfloat16); or its file is damaged"
                )


def _put_on(model: torch.nn.Module, adapter: Path, merge: bool) -> torch.nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # it fits another model
        warnings.filterwarnings(
            "ignore", message=".*fan_in_fan_out"
        )  # GPT-2's transposed weights: peft sees to them
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter))
        except UserWarning as warning:
            raise ValueError(f"the adapter does not fit its base: {warning}") from None
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = [part for part in (head, model.get_input_embeddings()) if hasattr(part, "base_layer")]  # type: ignore[operator]
    if merge and tied:  # what is merged into the one must not change the other
        own = getattr(head, "base_layer", head)
        own.weight = type(own.weight)(own.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return wrapped.merge_and_unload() if merge else wrapped


def unpack_gguf(source: Source, folder: Path, dtype: torch.dtype) -> Source:
    """Turn a .gguf file into a folder of safetensors once: its reader takes many seconds each time, even for
    a small model.

    Args:
        folder: where it goes; taken as it is where it is finished, its checksums hold and nothing is missing.

    Returns:
        the folder as a Source.
    """
    import torch

    if sealed(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        before = {path.name for path in folder.iterdir() if path.name == "key.json"}
        for left in folder.iterdir():  # of an unpacking that was killed
            if left.name not in before:
                left.unlink() if left.is_file() else remove(left)
        alone = replace(source, adapter=None)
        model, tokenizer = load_model(alone, dtype, torch.device("cpu")), load_tokenizer(alone)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        _quietly(lambda: model.save_pretrained(folder), source)
        tokenizer.save_pretrained(folder)
        seal(folder, sorted(path.name for path in folder.iterdir() if path.name not in before))
    return replace(source, folder=folder, gguf=None)


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

    def scoring_flops(self, tokens: int, response_tokens: int, scope: str = "last-value") -> float:
        """Of one pass: forward everywhere, and back again through the head and the blocks that the scope lies
        in."""
        back = self.below + self.last if scope in ("linear", "lora") else self.last
        return 2 * (tokens * (self.below + self.last + back) + response_tokens * 2 * self.head)

    def answering_flops(self, prompts: int, prefilled: int, generated: int) -> float:
        """Of answers: forward over the prompts' tokens and those generated; the head meets the latter."""
        return 2 * ((prefilled + generated) * (self.below + self.last) + (prompts + generated) * self.head)

    def training_flops(self, tokens: int, response_tokens: int) -> float:
        """Of one LoRA epoch: forward, and gradients of inputs; frozen weights need no third."""
        return 4 * (tokens * (self.below + self.last) + response_tokens * self.head)


def measure(model: torch.nn.Module) -> Size:
    """Count a loaded model's weights, adapters left out; of experts those that a token meets."""
    from staff.models import anatomy

    share = anatomy.share_of_experts(model)

    def count(block: torch.nn.Module) -> int:
        total = 0.0
        for name, module in block.named_modules():
            if "lora_" in name:
                continue
            if anatomy.is_linear(module):  # a quantised weight is packed: its own size says little
                total += math.prod(anatomy.weight_shape(module))
            else:
                total += sum(
                    p.numel() * (share if p.ndim >= 3 else 1)
                    for p in module.parameters(recurse=False)
                    if p.ndim >= 2
                )
        return round(total)

    each = [count(block) for block in anatomy.blocks(model)]
    return Size(sum(each[:-1]), each[-1], anatomy.inner(model).get_output_embeddings().weight.numel())
