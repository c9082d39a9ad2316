"""One pass over a pool: every sample's effort, loss, EL2N, entropy, HES and UPD. Torch ends at the return of
this file."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from staff.data.tokens import Batch, Pool, batches, collate
from staff.models import anatomy, attention, placement
from staff.scoring import scopes
from staff.scoring.gradnorm import efforts, mean_by_sample, record_sites, response_scores
from staff.types import OF_ONE_PASS

if TYPE_CHECKING:  # it needs transformers' cache
    from staff.scoring.prefix import Prefix

logger = logging.getLogger(__name__)
# what gradients are multiplied by on their way; the second for samples that overflow
FLOAT16_SCALES = (2.0**8, 2.0**-4)
CPU_TOKENS, MOST_TOKENS = 2048, 65536
CALIBRATION = 128  # samples that layer means are taken over where a model never sees the whole pool


def settled_tokens(model: torch.nn.Module, scope: str) -> int:
    """Padded tokens of a batch that a model's device bears, a power of two.

    On a CPU what keeps a block's numbers near its cache. On a GPU half of the memory that the weights leave,
    by a generous count of what a token takes in the widest block, or in all blocks that keep a graph; of the
    whole memory and not of what is free at the moment, so that machines alike cut alike.
    """
    device = anatomy.device_of(model)
    if device.type != "cuda":
        return CPU_TOKENS
    parameters = [p for p in model.parameters() if p.device == device]
    config = anatomy.text_config(model)
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    kept = len(anatomy.blocks(model)) if scope in ("linear", "lora") else 1
    a_token = (12 * width + 6 * inner) * kept * parameters[0].element_size()
    weights = sum(p.numel() * p.element_size() for p in parameters)
    room = (torch.cuda.get_device_properties(device).total_memory - weights) // 2
    return 2 ** int(np.log2(np.clip(room / a_token, 1024, MOST_TOKENS)))


class Scorer:
    """A model ready to score: its sites and head are found, its parameters frozen.

    Args:
        model: a causal language model, perhaps with an adapter, on its device.
        scope: a key of `scopes.SCOPES`.
        loss: a key of `gradnorm.LOSSES`.
        balance: give the norm of each weight too, "site_norms", so that `shards.level` can divide it by its
            mean.
        reuse_prefix: compute what all samples of a pool begin with once, where scope and model allow it
            (prefix.py).
        seed: of scope "released". A tuned draft loses its query and value matrices there, for good.

    Raises:
        ValueError: the model has no such scope, or an unknown head.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scope: str = "last-value",
        *,
        loss: str = "mean",
        balance: bool = False,
        reuse_prefix: bool = True,
        seed: int = 0,
    ):
        self.model = model.eval().requires_grad_(False)
        self.loss, self.balance = loss, balance
        self.device = anatomy.device_of(model)
        self.head = scopes.head_of(model)
        if scope == "released":
            scopes.drop_tuned_queries_and_values(model)
        if placement.is_offloaded(model) and scope in ("linear", "lora"):
            raise ValueError(
                f"--scope {scope} goes back through every block, and --device-map keeps some in memory or on "
                "disk, to run forward alone: take last-block or last-value"
            )
        self.sites = scopes.sites(model, scope, seed)
        self.one_by_one = any(site.parameter for site in self.sites)
        self.tokens_borne = 1 if self.one_by_one else settled_tokens(model, scope)
        usual = not placement.is_split(model) and not any(site.parameter or site.twins for site in self.sites)
        self._reuses = reuse_prefix and usual and scope in ("last-value", "last-block")
        self._prefix: tuple[weakref.ref[Pool], Prefix | None] | None = None

    def scores(
        self,
        pool: Pool,
        positions: Sequence[int] | np.ndarray,
        batch_tokens: int | None = None,
        on_samples: Callable[[int], None] | None = None,
        *,
        features: bool = False,
    ) -> dict[str, np.ndarray]:
        """Score some samples of a pool.

        Args:
            positions: (k,) pool positions, in any order.
            batch_tokens: padded tokens of a batch at most; None: what the device bears.
            on_samples: called after each batch with the number of its samples.
            features: give the mean last hidden states of the responses too, "features" (k, H).

        Returns:
            each of OF_ONE_PASS as (k,) float32 (float64 for a float64 model), in the order asked for. With
            `balance` "site_norms" (k, sites) besides.

        Raises:
            ValueError: a score is nan or infinite; the message names the positions.
        """
        positions = np.asarray(positions)
        is_float16 = self.head.module.weight.dtype == torch.float16
        budget = 1 if self.one_by_one else batch_tokens or self.tokens_borne
        scores: dict[str, np.ndarray] = {}
        left = np.arange(len(positions))  # places to be scored: all of them, then those that overflowed
        for scale in FLOAT16_SCALES if is_float16 else (None,):
            start = self._start_of(pool, scale) if len(left) else None
            cut = [left[places] for places in batches(pool.lengths[positions[left]], budget)]
            parts = []
            for places in cut:
                parts.append(self._of_batch(pool, positions[places], scale, start, features))
                if on_samples and scale in (None, FLOAT16_SCALES[0]):
                    on_samples(len(places))
            for name in parts[0] if parts else ():
                values = torch.cat([part[name] for part in parts]).cpu().numpy()
                scores.setdefault(name, np.empty((len(positions), *values.shape[1:]), values.dtype))
                scores[name][np.concatenate(cut)] = values
            left = np.flatnonzero(~np.isfinite(scores["effort"])) if parts else left[:0]
        if len(left):
            where = f"(positions {positions[left[:5]].tolist()})"
            cure = "the model overflows on them; try --dtype float32"
            raise ValueError(f"{len(left)} samples have an effort that is nan or infinite {where}: {cure}")
        if not self.balance:
            scores.pop("site_norms", None)
        return scores or {name: np.empty(0, np.float32) for name in OF_ONE_PASS}

    def _start_of(self, pool: Pool, grad_scale: float | None) -> Prefix | None:
        """What a pool's samples begin with, once it has been seen that the model scores a sample the same
        with it."""
        if not self._reuses:
            return None
        from staff.scoring import prefix

        if self._prefix is None or self._prefix[0]() is not pool:
            start = prefix.find(self.model, self.sites, pool)
            rounding = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
            for probe in (pool.lengths.argmin(), pool.lengths.argmax()) if start else ():
                plain, reused = (
                    self._of_batch(pool, [int(probe)], grad_scale, given)["effort"] for given in (None, start)
                )
                if not torch.allclose(plain, reused, rtol=rounding, atol=0):
                    said = "%s scores differently with a cache: the samples' common start is computed anew"
                    logger.warning(f"{said} each time", type(anatomy.inner(self.model)).__name__)
                    start = None
                    break
            self._prefix = (weakref.ref(pool), start)
        return self._prefix[1]

    def _of_batch(
        self,
        pool: Pool,
        positions: Sequence[int] | np.ndarray,
        grad_scale: float | None,
        start: Prefix | None,
        features: bool = False,
    ) -> dict[str, torch.Tensor]:
        batch = collate(pool, positions, self.device, skip=start.tokens if start else 0)
        cache, also = start.for_batch(len(positions)) if start else (None, [])
        states: dict[str, torch.Tensor] = {}
        forward = partial(self._hidden, batch, cache, states if features else None)
        return {**efforts(forward, self.head, self.sites, batch, self.loss, grad_scale, also), **states}

    def _hidden(
        self, batch: Batch, cache: Any = None, states: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The final hidden states, (B, T, H); their mean over each response goes into `states`."""
        held = {} if cache is None else {anatomy.cache_argument(self.model): cache}
        extra: Any = {"use_cache": bool(held), **held}
        with attention.short_samples():
            hidden = anatomy.final_states(self.model, input_ids=batch.input_ids, **extra)
        if states is not None:
            of_response = hidden.detach()[batch.sample_of, batch.before + 1].float()
            states["features"] = mean_by_sample(of_response, batch.sample_of, batch.counts[:, None])
        return hidden

    @torch.no_grad()
    def states(self, batch: Batch) -> torch.Tensor:
        """The final hidden states of a batch, (B, T, H); nothing in particular at padding."""
        return self._hidden(batch)

    def measure(
        self, batch: Batch, measure: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What a function makes of each site's gradients of a batch; see `gradnorm.record_sites`."""
        with torch.enable_grad(), record_sites(self.sites, measure) as recorded:
            hidden = self._hidden(batch)[batch.sample_of, batch.before]
            losses = mean_by_sample(
                response_scores(hidden, self.head, batch.labels).loss, batch.sample_of, batch.counts
            )
            return recorded.measured(losses)
