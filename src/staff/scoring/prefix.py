"""What all samples begin with, computed once: its keys and values serve every sample, as in a chat server
(exact for last-value).

Through causal blocks the tokens of a common start (system prompt, instruction, opening of the template) come
out the same for every sample. Only in the last block do samples differ there: in the gradient at the start's
values, since each sample's later tokens attend to them. So the values of that block are handed over as a leaf
of the graph, one copy a sample, and their gradients count as those of any other token. Nothing else of the
start has a gradient that the scope "last-value" looks at.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from staff.data.tokens import Pool
from staff.models import anatomy
from staff.scoring.gradnorm import Site

LEAST_TOKENS = 8  # tokens from which it pays
FIXED_ROPE = (
    "default",
    "linear",
    "llama3",
    "yarn",
    None,
)  # positions turn by the same angle however long a sample is


@dataclass(frozen=True, eq=False)
class Prefix:
    """The common start of a pool's samples. Axes: P its tokens, G key heads, D their width, I in, O out.

    Attributes:
        tokens: P.
        keys, values: of each block, (1, G, P, D).
        layer_input: (P, I), what goes into the value projection.
        layer_output: (P, O), what comes out of it; of a fused projection the value rows alone, zero
            elsewhere.
        rows: as in the Site.
        place: of the block of the value projection.
    """

    tokens: int
    keys: list[Tensor]
    values: list[Tensor]
    layer_input: Tensor
    layer_output: Tensor
    rows: Tensor | None
    place: int

    def for_batch(self, size: int) -> tuple[Cache, Tensor, Tensor]:
        """A cache of `size` samples that hold the start, and the call of the value projection that it stands
        for.

        Returns:
            the cache, (size, P, I) inputs, and (size, P, O) outputs: a leaf that the cache's values are made
            of.
        """
        leaf = self.layer_output.expand(size, -1, -1).clone().requires_grad_(True)
        values = list(self.values)
        of_values = leaf if self.rows is None else leaf[..., self.rows]
        _, groups, tokens, width = values[self.place].shape
        values[self.place] = of_values.view(size, tokens, groups, width).transpose(1, 2)
        cache = Cache(
            layers=[
                _Start(k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1))
                for k, v in zip(self.keys, values, strict=True)
            ]
        )
        return cache, self.layer_input.expand(size, -1, -1), leaf


class _Start(DynamicLayer):
    """A layer of a cache that never grows: what comes is put behind the start and handed back, and none of it
    is kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._start = keys, values
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        return torch.cat([self._start[0], key_states], -2), torch.cat([self._start[1], value_states], -2)


def length_of(pool: Pool) -> int:
    """Tokens that all samples of a pool begin with, up to the token before the first response; 0 for fewer
    than two samples."""
    if len(pool) < 2:
        return 0
    starts, lengths = pool.offsets[:-1], pool.lengths
    common = int(lengths.min()) - 1
    for place in range(common):
        if (pool.input_ids[starts + place] != pool.input_ids[starts[0] + place]).any() or pool.is_response[
            starts + place + 1
        ].any():
            return place
    return max(common, 0)


@torch.no_grad()
def find(model: torch.nn.Module, site: Site, pool: Pool) -> Prefix | None:
    """The common start of a pool run through a model; None where there is none to speak of, or the model's
    cache is of another kind."""
    config = anatomy.text_config(model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    takes_cache = "past_key_values" in inspect.signature(anatomy.decoder(model).forward).parameters
    if not takes_cache or rope.get("rope_type") not in FIXED_ROPE or not site.name.startswith("blocks."):
        return None
    length = length_of(pool)
    if length < LEAST_TOKENS:
        return None
    place = int(site.name.split(".")[1])
    calls: list[tuple[Tensor, Tensor]] = []
    handle = site.module.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    cache = DynamicCache(config=config)
    try:
        ids = torch.as_tensor(
            np.array(pool.ids(0)[:length]), dtype=torch.int64, device=next(model.parameters()).device
        )[None]
        anatomy.decoder(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    except ValueError:  # a model with a cache of its own kind: scored without the start
        return None
    finally:
        handle.remove()
    layers = cache.layers
    plain = len(layers) == len(anatomy.blocks(model)) and all(
        type(layer) is DynamicLayer and layer.get_seq_length() == length for layer in layers
    )
    if not plain or len(calls) != 1 or calls[0][0].shape[:-1].numel() != length:
        return None
    layer_input, output = (part.reshape(length, -1) for part in calls[0])
    keys, kept = (
        [part for layer in layers if (part := getattr(layer, name)) is not None]
        for name in ("keys", "values")
    )
    values = kept[place][0].transpose(0, 1).reshape(length, -1)  # with the adapter's part, where there is one
    if values.shape[1] != (output.shape[1] if site.rows is None else len(site.rows)):
        return None
    whole = values if site.rows is None else torch.zeros_like(output).index_copy_(1, site.rows, values)
    return Prefix(length, keys, kept, layer_input, whole.contiguous(), site.rows, place)
