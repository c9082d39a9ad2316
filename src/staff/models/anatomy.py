"""What a model is made of, read off its structure and not off a list of names. torch alone."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, device, nn


def is_linear(module: nn.Module) -> bool:
    """A module with one weight matrix: nn.Linear and what derives from it, GPT-2's Conv1D, quantised layers
    of either kind."""
    if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
        return True
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes) and next(module.children(), None) is None


def is_router(module: nn.Module) -> bool:
    """A module that is no linear layer and has one weight matrix to itself, which sends tokens to experts."""
    weight, kind = module._parameters.get("weight"), type(module).__name__.lower()
    named = "router" in kind or ("gat" in kind and not is_linear(module))  # Phi's is a linear layer besides
    return named and weight is not None and weight.ndim == 2


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, whatever way its weight is packed."""
    return (module.nf, module.nx) if hasattr(module, "nf") else (module.out_features, module.in_features)  # type: ignore[return-value]


def inner(model: nn.Module) -> nn.Module:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: nn.Module) -> device:
    """Where a model takes its tokens and leaves its logits, though some of its blocks may lie elsewhere."""
    head = inner(model).get_output_embeddings()  # a classifier has none
    end: nn.Module = inner(model).get_input_embeddings() if head is None else head
    return next(end.parameters()).device


def cache_argument(model: nn.Module) -> str | None:
    """What a model's forward calls its cache (transformers 5.24 renamed it); None where it takes none."""
    parameters = inspect.signature(inner(model).forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in parameters), None)


@contextlib.contextmanager
def head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, what a pass hands to the head is put into the list, and the head computes nothing.

    So whatever a model does between its blocks and its head (a norm, a dense layer, a factor) is in it.
    """
    head, kept = inner(model).get_output_embeddings(), []
    own = head.__dict__.get("forward")  # accelerate's, where a model lies on several devices

    def keep(states: Tensor) -> Tensor:
        kept.append(states)
        return states[..., :1]

    head.forward = keep
    try:
        yield kept
    finally:
        del head.forward
        if own:
            head.forward = own


def final_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The final hidden states, (B, T, H): what goes into the head."""
    with head_inputs(model) as kept:
        inner(model)(**inputs)
    (states,) = kept
    return states


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks: its outermost ModuleList with one entry a layer, of text before that of images.

    Raises:
        ValueError: there is none.
    """
    causal, config = inner(model), text_config(model)
    lengths = [
        getattr(config, name, None) for name in ("num_hidden_layers", "num_layers", "num_layers_per_stack")
    ]
    for within in (causal.get_decoder(), causal):
        lists = [(name.count("."), m) for name, m in within.named_modules() if isinstance(m, nn.ModuleList)]
        for length in lengths:
            fitting = [pair for pair in lists if len(pair[1]) == length]
            if fitting:
                return min(fitting, key=lambda pair: pair[0])[1]
    raise ValueError(
        f"found no list of blocks in {type(causal).__name__}: this architecture is not supported"
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, of a model that sees images too."""
    config = inner(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions(model: nn.Module) -> tuple[int | None, bool]:
    """How many positions a model was made for, None for no end, and whether they lie in a table."""
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limit = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if not isinstance(limit, int):
        return None, False
    tables = {
        name.rpartition(".")[0]: tensor
        for name, tensor in (*inner(model).named_parameters(), *inner(model).named_buffers())
        if tensor.ndim == 2 and ("pos" in name or "wpe" in name) and limit <= len(tensor) <= limit + 8
    }
    for name, tensor in tables.items():
        padding = getattr(inner(model).get_submodule(name), "padding_idx", None)
        counts_from = 0 if padding is None or len(tensor) > limit else padding + 1
        return limit - counts_from, True
    if not rope:  # MPT's attention biases are a table too
        return (limit, True) if hasattr(config, "max_seq_len") else (None, False)
    if rope.get("rope_type") == "dynamic":
        return None, False
    stretched = rope.get("factor", 1) * rope.get("original_max_position_embeddings", 0)
    return max(limit, round(stretched)), False


def share_of_experts(model: nn.Module) -> float:
    """The share of its experts that a token meets; 1 for a model without any."""
    config = text_config(model)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return (getattr(config, "num_experts_per_tok", None) or total) / total if total else 1.0
