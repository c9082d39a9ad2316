"""One pass over a pool: effort, loss, EL2N and entropy of every sample. Torch ends at the return of this file."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from staff.data.tokens import Batch, Pool, batches, collate
from staff.models import anatomy, attention
from staff.scoring import scopes
from staff.scoring.gradnorm import efforts, mean_by_sample, record_sites, response_scores
from staff.scoring.shards import SHARD, Fitting

if TYPE_CHECKING:  # it needs transformers' cache
    from staff.scoring.prefix import Prefix

logger = logging.getLogger(__name__)
QUANTITIES = ("effort", "loss", "el2n", "entropy")
FLOAT16_SCALES = (
    2.0**8,
    2.0**-4,
)  # what gradients are multiplied by on their way; the second for samples that overflow
CPU_TOKENS, MOST_TOKENS = 2048, 65536
CALIBRATION = 128  # samples that a model's layer means are taken over where it never sees the whole pool


def settled_tokens(model: torch.nn.Module, scope: str) -> int:
    """Padded tokens of a batch that a model's device bears, a power of two.

    On a CPU what keeps a block's numbers near its cache. On a GPU half of the memory that the weights leave, by a generous
    count of what a token takes in the widest block, or in all blocks that keep a graph; of the whole memory and not of
    what is free at the moment, so that machines alike cut alike.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return CPU_TOKENS
    config = anatomy.text_config(model)
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    kept = len(anatomy.blocks(model)) if scope in ("linear", "lora") else 1
    a_token = (12 * width + 6 * inner) * kept * parameter.element_size()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = (torch.cuda.get_device_properties(parameter.device).total_memory - weights) // 2
    return 2 ** int(np.log2(np.clip(room / a_token, 1024, MOST_TOKENS)))


class Scorer:
    """A model ready to score: its sites and head are found, its parameters frozen.

    Args:
        model: a causal language model, perhaps with an adapter, on its device.
        scope: a key of `scopes.SCOPES`.
        batch_tokens: padded tokens of a batch at most; None: `settled_tokens`.
        loss: a key of `gradnorm.LOSSES`.
        balance: keep the norm of each weight apart, so that `level` can divide it by its mean over the pool.
        reuse_prefix: compute what all samples of a pool begin with once, where scope and model allow it (see prefix.py).
        seed: of scope "released". A tuned draft loses its query and value matrices there, for good.

    Raises:
        ValueError: the model has no such scope, or an unknown head.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        scope: str = "last-value",
        batch_tokens: int | None = None,
        *,
        loss: str = "mean",
        balance: bool = False,
        reuse_prefix: bool = True,
        seed: int = 0,
    ):
        self.model = model.eval().requires_grad_(False)
        self.first_tokens = self.batch_tokens = (
            settled_tokens(model, scope) if batch_tokens is None else batch_tokens
        )
        self.loss, self.balance = loss, balance
        self.device = next(model.parameters()).device
        self.head = scopes.head_of(model)
        if scope == "released":
            scopes.drop_tuned_queries_and_values(model)
        self.sites = scopes.sites(model, scope, seed)
        self.with_features = False  # mean last hidden states of the responses besides, "features" (k, H)
        self.site_means: np.ndarray | None = None
        self._reuses = reuse_prefix and scope == "last-value"
        self._prefix: tuple[weakref.ref[Pool], Prefix | None] | None = None

    def calibrate(self, pool: Pool, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Take the mean norm of each weight over some samples; from here on efforts are levelled by them.

        For a model that scores single samples and never the whole pool, as the target does in verification.

        Returns:
            (sites,) float64.
        """
        self.site_means = None
        self.site_means = self.scores(pool, positions)["site_norms"].mean(0, dtype=np.float64)
        return self.site_means

    def scores(
        self,
        pool: Pool,
        positions: Sequence[int] | np.ndarray,
        on_samples: Callable[[int], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Score some samples of a pool.

        Args:
            positions: (k,) pool positions, in any order.
            on_samples: called after each batch with the number of its samples.

        Returns:
            each of QUANTITIES as (k,) float32 (float64 for a float64 model), in the order asked for. With `balance`
            "site_norms" (k, sites) besides, and "effort" levelled where the means are known.

        Raises:
            ValueError: a score is nan or infinite; the message names the positions.
        """
        positions = np.asarray(positions)
        is_float16 = self.head.module.weight.dtype == torch.float16
        first, *others = FLOAT16_SCALES if is_float16 else (None,)
        found = self._scores(pool, positions, first, on_samples)
        for scale in others:
            again = np.flatnonzero(~np.isfinite(found["effort"]))
            if len(again):
                for name, values in self._scores(pool, positions[again], scale).items():
                    found[name][again] = values
        bad = positions[~np.isfinite(found["effort"])]
        if len(bad):
            raise ValueError(
                f"{len(bad)} samples have an effort that is nan or infinite (positions {bad[:5].tolist()}): "
                "the model overflows on them; try --dtype float32"
            )
        if self.site_means is not None:
            found["effort"] = level(found["site_norms"], self.site_means)
        return found

    def _scores(self, pool, positions, grad_scale, on_samples=None) -> dict[str, np.ndarray]:
        cut = batches(pool.lengths[positions], self.batch_tokens)
        start = self._start_of(pool, grad_scale) if cut else None
        parts = []
        for places in cut:
            skip = start.tokens if start else 0
            parts.append(
                self._batch(
                    collate(pool, positions[places], self.device, skip=skip),
                    grad_scale,
                    start,
                )
            )
            if on_samples:
                on_samples(len(places))
        order = np.argsort(np.concatenate(cut)) if cut else np.empty(0, np.int64)
        empty = {name: np.empty(0, np.float32) for name in QUANTITIES}
        empty |= {"site_norms": np.empty((0, len(self.sites)), np.float32)} if self.balance else {}
        empty |= {"features": np.empty((0, 0), np.float32)} if self.with_features else {}
        return {
            name: torch.cat([part[name] for part in parts]).cpu().numpy()[order] if parts else none
            for name, none in empty.items()
        }

    def _start_of(self, pool: Pool, grad_scale: float | None) -> Prefix | None:
        """What a pool's samples begin with, once it has been seen that the model scores a sample the same with it."""
        if not self._reuses:
            return None
        from staff.scoring import prefix

        if self._prefix is None or self._prefix[0]() is not pool:
            start = prefix.find(self.model, self.sites[0], pool)
            for probe in (int(np.argmin(pool.lengths)), int(np.argmax(pool.lengths))) if start else ():
                plain, reused = (
                    self._batch(
                        collate(pool, [probe], self.device, skip=given.tokens if given else 0),
                        grad_scale,
                        given,
                    )["effort"]
                    for given in (None, start)
                )
                if not torch.allclose(
                    plain, reused, rtol=torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5, atol=0
                ):
                    logger.warning(
                        "%s scores differently with a cache: the samples' common start is computed anew each time",
                        self._name(),
                    )
                    start = None
                    break
            self._prefix = (weakref.ref(pool), start)
        return self._prefix[1]

    def _name(self) -> str:
        return type(anatomy.inner(self.model)).__name__

    def _forward(self, batch: Batch, cache=None) -> torch.Tensor:
        extra = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        with attention.short_samples():
            return anatomy.decoder(self.model)(input_ids=batch.input_ids, **extra).last_hidden_state

    def _batch(
        self, batch: Batch, grad_scale: float | None, start: Prefix | None = None
    ) -> dict[str, torch.Tensor]:
        states: list[torch.Tensor] = []
        cache, also = None, []
        if start:
            cache, layer_input, output = start.for_batch(len(batch.counts))
            also.append((0, layer_input, output))

        def forward():
            hidden = self._forward(batch, cache)
            if self.with_features:
                of_response = hidden.detach()[batch.sample_of, batch.before + 1].float()
                states.append(mean_by_sample(of_response, batch.sample_of, batch.counts[:, None]))
            return hidden

        found = efforts(forward, self.head, self.sites, batch, self.loss, grad_scale, also)
        return found | ({"features": states[0]} if states else {})

    def measure(
        self, batch: Batch, measure: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What a function makes of each site's gradients of a batch; see `gradnorm.record_sites`."""
        with torch.enable_grad(), record_sites(self.sites, measure) as recorded:
            hidden = self._forward(batch)[batch.sample_of, batch.before]
            losses = mean_by_sample(
                response_scores(hidden, self.head, batch.labels).loss, batch.sample_of, batch.counts
            )
            return recorded.measured(losses)


def level(site_norms: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Efforts with the norm of each weight divided by its mean, so that wide layers do not drown the others.

    Args:
        site_norms: (k, sites).
        means: (sites,); a weight whose mean is 0 never has a gradient, and is left out.

    Returns:
        (k,) sqrt of the sum of (norm / mean)^2, in the type of site_norms.
    """
    shares = np.divide(site_norms, means, out=np.zeros(site_norms.shape), where=means > 0)
    return np.sqrt(np.square(shares).sum(1)).astype(site_norms.dtype)


def score_shards(
    scorer: Callable[[], Scorer | Fitting],
    pool: Pool,
    load: Callable[[int], dict[str, np.ndarray] | None],
    save: Callable[[int, dict[str, np.ndarray]], None],
    on_samples: Callable[[int], None] | None = None,
    shard: int = SHARD,
) -> dict[str, np.ndarray]:
    """Score a pool shard by shard, taking from disk what is there.

    Args:
        scorer: called once, at the first shard that is missing.
        load, save: shard number -> its scores or None; keep a shard's scores. Shard j holds the positions
            j * shard to (j + 1) * shard.
        on_samples: called with the number of samples that were just done, those from disk included.

    Returns:
        each of QUANTITIES, (n,), and "features" (n, H) where the scorer takes them. Of a scorer with `balance`, "effort"
        is levelled by the mean norm of each weight over the pool; the norms themselves stay with the shards.
    """
    made: list[Scorer | Fitting] = []
    parts = []
    sums = np.zeros(0)
    for number, start in enumerate(range(0, len(pool), shard)):
        positions = np.arange(start, min(start + shard, len(pool)))
        part = load(number)
        if part is None:
            if not made:
                made.append(scorer())
            part = made[0].scores(pool, positions, on_samples)
            save(number, part)
        elif on_samples:
            on_samples(len(positions))
        if "site_norms" in part:
            sums = part["site_norms"].sum(0, dtype=np.float64) + (sums if number else 0)
        parts.append({name: values for name, values in part.items() if name != "site_norms"})
    names = parts[0] if parts else QUANTITIES
    found = {
        name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0, np.float32)
        for name in names
    }
    if len(sums):  # a second walk over the shards: all norms at once may not fit
        means = sums / len(pool)
        shards = (load(number) for number in range(len(parts)))
        found["effort"] = np.concatenate([level(part["site_norms"], means) for part in shards if part])
        assert len(found["effort"]) == len(pool), "a shard that was saved is gone"
    return found
