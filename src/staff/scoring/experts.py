"""Weights that are no linear layer's: experts with every product told of, products seen as they are made.
torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten


def is_known(module: nn.Module) -> bool:
    """Experts as transformers lays them out: each matrix of all experts in one tensor, (E, O, I) or (E, I,
    O)."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def matrices(module: nn.Module) -> tuple[str, str]:
    """The names of the tensors that a token meets, in order."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def forward(
    module: Any,
    tell: Callable[[str, int, Tensor, Tensor, Tensor], None],
    hidden: Tensor,
    *routing: Tensor,
) -> Tensor:
    """What the module's own forward computes, one expert after the other.

    Args:
        tell: called with the matrix's name, the expert, the tokens sent to it (n,), ascending, what went in
            and what came out, (n, I) and (n, O), bias included.
        hidden: (N, H).
        routing: the experts of each token, (N, k), and their shares.

    Returns:
        (N, H).
    """
    index, shares = routing
    places = index.flatten().argsort(stable=True)  # by expert, then by token
    counts = index.flatten().bincount(minlength=module.num_experts).tolist()
    into, out = matrices(module)
    result = torch.zeros_like(hidden)

    def product(name: str, expert: int, tokens: Tensor, states: Tensor) -> Tensor:
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        made = nn.functional.linear(states, weight.mT if module.is_transposed else weight, bias)
        tell(name, expert, tokens, states, made)
        return made

    for expert, part in enumerate(places.split(counts)[: module.num_experts]):
        if len(part):
            tokens = part // index.shape[1]
            states = product(into, expert, tokens, hidden[tokens])
            states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
            states = product(out, expert, tokens, states)
            if module.has_post_expert_norm:
                states = module.post_expert_norm(states)
            states = states * shares.flatten()[part, None]
            result = result.index_add(0, tokens, states.to(result.dtype))
    return result


class Products(TorchFunctionMode):
    """Within it, products by a weight of one shape are told of: a router has its weight to itself, in no
    linear layer.

    Args:
        shape: (O, I).
        tell: called with what went in and what came out.
    """

    def __init__(self, shape: torch.Size, tell: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self._shape, self._tell = shape, tell

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].shape == self._shape:
            self._tell(args[0], made)
        return made


# with the places of their arguments that are multiplied; convolutions are none
PRODUCTS = {
    **dict.fromkeys(
        ["linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "tensordot"], slice(2)
    ),
    **dict.fromkeys(["addmm", "addbmm", "baddbmm", "addmv"], slice(1, 3)),
    **dict.fromkeys(["einsum", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"], slice(None)),
}


class Multiplied(TorchFunctionMode):
    """Within it, which of some parameters go into a matrix product: themselves, or as a view or a copy.

    Attributes:
        shapes: of each parameter by name, what shape it had in each of its products.
    """

    def __init__(self, parameters: dict[str, Tensor]):
        super().__init__()
        self.shapes: dict[str, list[torch.Size]] = {name: [] for name in parameters}
        # by identity, with the tensor, so that no other gets its place
        self._known = {id(parameter): (name, parameter) for name, parameter in parameters.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        tensors = [
            t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.is_floating_point()
        ]
        known = [self._known[id(t)] for t in tensors if id(t) in self._known]
        if known and func.__name__ in PRODUCTS:
            factors = tree_flatten(args[PRODUCTS[func.__name__]])[0]
            for name, tensor in known:
                if any(tensor is factor for factor in factors):
                    self.shapes[name].append(tensor.shape)
        elif known and len(tensors) == 1:
            for part in tree_flatten(made)[0]:
                if isinstance(part, Tensor):
                    self._known[id(part)] = known[0][0], part
        return made
