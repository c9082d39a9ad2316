"""What all samples begin with, computed once: its keys and values serve every sample, as in a chat server
(exact for last-value and last-block).

Through causal blocks the tokens of a common start (system prompt, instruction, opening of the template) come
out the same for every sample. Only in the last block do samples differ there: in the gradient at the start's
keys and values, since each sample's later tokens attend to them. So the last block's keys and values of the
start are handed over as leaves of the graph, one copy a sample; what arrives at them goes back through the
start's own graph to the outputs of the weights they were made by, and counts as the gradient of those
weights' calls. Nothing else of the start has a gradient that these scopes look at: its queries, its
attention's output and what follows change nothing that a later token sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from staff.data.tokens import Pool
from staff.models import anatomy
from staff.scoring.gradnorm import Site

LEAST_TOKENS = 8  # tokens from which it pays
# positions turn by the same angle however long a sample is
FIXED_ROPE = ("default", "linear", "llama3", "yarn", None)


@dataclass(frozen=True, eq=False)
class Prefix:
    """The common start of a pool's samples. Axes: P its tokens, G key heads, D their width, I in, O out.

    Attributes:
        tokens: P.
        keys, values: of each block, (1, G, P, D).
        block: whose keys and values have a gradient; they are `made`, with their graph.
        made: its keys and values, (1, G, P, D) each, or one of them.
        places: the sites that these hang on.
        inputs, outputs: of those sites, (1, P, I) and (1, P, O), nodes of the graph.
    """

    tokens: int
    keys: list[Tensor]
    values: list[Tensor]
    block: int
    made: tuple[Tensor, Tensor]
    places: list[int]
    inputs: list[Tensor]
    outputs: list[Tensor]

    def for_batch(self, size: int) -> tuple[Cache, list[tuple[int, Tensor, Tensor]]]:
        """A cache of `size` samples that hold the start, and the calls of sites that it stands for.

        Returns:
            the cache, and for each site that the last block's keys and values hang on its place, (size, P, I)
            inputs, and (size, P, O) outputs: leaves that the cache is made of.
        """
        leaves = [out.detach().expand(size, -1, -1).clone().requires_grad_(True) for out in self.outputs]
        whole = zip(self.keys, self.values, strict=True)
        copies = [tuple(part.expand(size, -1, -1, -1) for part in pair) for pair in whole]
        copies[self.block] = _OfStart.apply(self, *leaves)
        inputs = [part.expand(size, -1, -1) for part in self.inputs]
        cache = Cache(layers=[_Start(*pair) for pair in copies])
        return cache, list(zip(self.places, inputs, leaves, strict=True))

    def pull_back(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients at copies of the keys and values, (B, G, P, D), as those at the outputs, (B, P, O)."""
        made = [part for part in self.made if part.requires_grad]
        of_each = [grad[:, None] for part, grad in zip(self.made, grads, strict=True) if part.requires_grad]
        how = {"retain_graph": True, "is_grads_batched": True, "materialize_grads": True}
        return [part[:, 0] for part in torch.autograd.grad(made, self.outputs, of_each, **how)]


class _OfStart(torch.autograd.Function):
    """A block's keys and values of the start, one copy a sample, as a function of the outputs they are made
    of."""

    @staticmethod
    def forward(ctx: Any, start: Prefix, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.start = start
        return tuple(part.detach().expand(len(leaves[0]), -1, -1, -1).clone() for part in start.made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.start.pull_back(grads)


class _Start(DynamicLayer):
    """A layer of a cache that never grows: what comes is put behind the start and handed back, and none of it
    is kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._start = keys, values
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self._start[0], key_states], -2), torch.cat([self._start[1], value_states], -2)


def length_of(pool: Pool) -> int:
    """Tokens that all samples of a pool begin with, up to the token before the first response; 0 for fewer
    than two samples."""
    if len(pool) < 2:
        return 0
    starts, common = pool.offsets[:-1], int(pool.lengths.min()) - 1
    for place in range(common):
        tokens = pool.input_ids[starts + place]
        if (tokens != tokens[0]).any() or pool.is_response[starts + place + 1].any():
            return place
    return max(common, 0)


def find(model: torch.nn.Module, sites: Sequence[Site], pool: Pool) -> Prefix | None:
    """The common start of a pool run through a model; None where there is none to speak of, or the model's
    cache is of another kind."""
    config = anatomy.text_config(model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    argument = anatomy.cache_argument(model)
    of_blocks = {site.name.split(".")[1] if site.name.startswith("blocks.") else None for site in sites}
    if not argument or rope.get("rope_type") not in FIXED_ROPE or len(of_blocks) != 1 or None in of_blocks:
        return None
    block, blocks = int(of_blocks.pop() or 0), anatomy.blocks(model)
    length = length_of(pool)
    if length < LEAST_TOKENS or (len(sites) > 1 and block != len(blocks) - 1):
        return None
    calls: list[tuple[int, Tensor, Any]] = []  # a site's place, what went in, what came out
    handles = [
        site.module.register_forward_hook(
            lambda module, args, output, place=place: calls.append((place, args[0], output))
        )
        for place, site in enumerate(sites)
    ]
    handles.append(blocks[block].register_forward_pre_hook(_begin_graph, with_kwargs=True))
    cache = DynamicCache(config=config)
    device = anatomy.device_of(model)
    ids = torch.as_tensor(np.array(pool.ids(0)[:length]), dtype=torch.int64, device=device)[None]
    try:
        with torch.enable_grad():
            anatomy.final_states(model, input_ids=ids, use_cache=True, **{argument: cache})
    except ValueError:  # a model with a cache of its own kind: scored without the start
        return None
    finally:
        for handle in handles:
            handle.remove()
    layers = cache.layers
    usual = all(type(layer) is DynamicLayer and layer.get_seq_length() == length for layer in layers)
    if len(layers) != len(blocks) or not usual:
        return None
    keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
    made = keys[block], values[block]
    nodes = [call for call in calls if isinstance(call[2], Tensor)]
    wanted = [part for part in made if part.requires_grad]
    if not nodes or not wanted:
        return None
    ones = [torch.ones_like(part) for part in wanted]
    of_nodes = [output for *_, output in nodes]
    grads = torch.autograd.grad(wanted, of_nodes, ones, retain_graph=True, allow_unused=True)
    hang = [node for node, grad in zip(nodes, grads, strict=True) if grad is not None]
    if not hang:
        return None
    places, inputs, outputs = map(list, zip(*hang, strict=True))
    whole = all(part.dim() == 3 and part.shape[1] == length for part in (*inputs, *outputs))
    if len(set(places)) < len(places) or not whole:
        return None
    keys, values = ([part.detach() for part in parts] for parts in (keys, values))
    start = Prefix(length, keys, values, block, made, places, [part.detach() for part in inputs], outputs)
    try:
        start.pull_back([torch.zeros_like(part) for part in made])
    except RuntimeError:  # an operation of the model's own that can't be gone back through for a whole batch
        return None
    return start


def _begin_graph(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What goes into a block, as a leaf of a graph."""
    if args:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}
