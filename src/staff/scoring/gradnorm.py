"""Per-sample gradient norms from one pass over a batch (STAFF, Eq. 2). torch alone.

The gradient of a linear weight W (O, I) on one sample is G = sum over tokens of g_t a_t^T, with a_t what goes
into the layer and g_t the loss gradient at what comes out. Both are there after an ordinary backward pass, so
the norm of G needs no gradient per sample to be stored. No other parameter needs a gradient: the graph begins
at the first site.

Axes: B batch, T tokens, I in, O out, N response tokens of a batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from staff.models import anatomy
from staff.scoring import experts

if TYPE_CHECKING:
    from staff.data.tokens import Batch

# what the summed cross-entropy of a sample's response tokens is divided by: their number to this power
LOSSES = {"mean": 1.0, "sum": 0.0, "sqrt": 0.5}
# float32 working memory of one step of a chunked product: on a CPU it stays near the cache
CHUNK_BYTES = 32 * 2**20


@cache
def chunk_bytes_on(device: torch.device) -> int:
    """Working memory of a step of a chunked product: on a GPU a 64th of its memory, 1 GiB at most, so that
    few steps fill it."""
    if device.type != "cuda":
        return CHUNK_BYTES
    return max(CHUNK_BYTES, min(2**30, torch.cuda.get_device_properties(device).total_memory // 64))


@dataclass(frozen=True, eq=False)
class Site:
    """A linear weight whose gradient counts.

    Attributes:
        module: maps (B, T, I) to (B, T, O) by a weight; (O, I) or transposed, the norm is the same.
        rows: (R,) int64 outputs that count, None for all: a fused projection holds queries and keys too.
        name: where it is, for messages.
        sketch: (R, I), None for none: the norm is of G sketch^T, the gradient of the matrix B of an adapter
            that adds B sketch a to the layer's output.
        expert: the name of a tensor of all experts' matrices and which of them; `module` is the layer of
            experts.
        parameter: the name of a weight of `module` that is multiplied in a way not known here, None for
            others: its gradient is taken whole, so a batch must be of one sample.
        twins: other layers that have the same weight; their calls are calls of this one.
    """

    module: nn.Module
    rows: Tensor | None = None
    name: str = ""
    sketch: Tensor | None = None
    expert: tuple[str, int] | None = None
    parameter: str | None = None
    twins: tuple[nn.Module, ...] = ()

    @property
    def is_router(self) -> bool:
        """A module that has its weight to itself, and hands out more than its product."""
        return self.expert is None and anatomy.is_router(self.module)


class _Call(NamedTuple):
    """What went into a site and what came out; of an expert `rows` (n,), the tokens sent to it, of how
    many."""

    input: Tensor
    output: Tensor
    rows: Tensor | None = None
    tokens: int = 0


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits: cap * tanh(z / cap) of z = scale * (W h + bias).

    Attributes:
        module: the output embedding, with `weight` (V, H) and perhaps `bias` (V,).
        scale: a constant on the logits (Cohere, Granite); 1 for most.
        cap: the soft cap of the logits (Gemma 2); None for most.
    """

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None


class record_sites:
    """Within the block, keep what goes into each site and what comes out of it; `squared_norms` ends the
    pass.

        with record_sites(sites) as recorded:
            losses = ...           # one a sample, of a forward pass through the model
            squares = recorded.squared_norms(losses)

    No parameter may require a gradient; those that are sites of their own do within. The first site's output
    becomes the leaf of the graph, so everything below it runs as under no_grad. A module that a forward pass
    calls more than once has its calls added up.
    """

    def __init__(self, sites: Sequence[Site], measure: Callable[[int, Tensor, Tensor], Tensor] | None = None):
        self._sites = sites
        self._measure = measure or (lambda place, a, g: squared_norm_of_products(a, g))
        self._calls: list[list[_Call]] = [[] for _ in sites]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaced: dict[nn.Module, dict[tuple[str, int], list[_Call]]] = {}

    def __enter__(self) -> record_sites:
        for site, calls in zip(self._sites, self._calls, strict=True):
            if site.parameter:
                getattr(site.module, site.parameter).requires_grad_(True)
            elif site.expert:
                self._replaced.setdefault(site.module, {})[site.expert] = calls
            elif site.is_router:
                self._handles += _keep_products(site.module, calls)
            else:
                for module in (site.module, *site.twins):
                    self._handles.append(module.register_forward_hook(partial(_keep, calls)))
        for module, calls_of in self._replaced.items():
            module.forward = _experts_forward(module, calls_of)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        for site in self._sites:
            if site.parameter:
                getattr(site.module, site.parameter).requires_grad_(False)
        for calls in self._calls:
            # a hook on an output holds all of them: without this they'd wait for the garbage collector
            calls.clear()

    def also(self, place: int, layer_input: Tensor, output: Tensor) -> None:
        """Count a call of a site that does not run here: (B, T, I) went in, and (B, T, O), a leaf of the
        graph, came out."""
        self._calls[place].append(_Call(layer_input, output))

    def input_shapes(self) -> list[list[torch.Size]]:
        """Of each site's calls so far."""
        return [[call.input.shape for call in calls] for calls in self._calls]

    def squared_norms(self, losses: Tensor) -> Tensor:
        """Squared gradient norm of each sample at each site, (B, sites); see `measured`."""
        return torch.stack(self.measured(losses), 1)

    def measured(self, losses: Tensor) -> list[Tensor]:
        """What `measure` makes of each site's gradients: by default the squared norm of each sample's.

        A site's gradients are used and let go as they come, so that a scope of many layers keeps few of them
        at once.

        Args:
            losses: (B,), one loss a sample. The samples must not see each other.

        Returns:
            for each site measure(place, a, g), of what went into it, (B, T, I), and the gradient at what came
            out, (B, T, O); (B,) in float32, or float64 where the model is.
        """
        batch = len(losses)
        found: list[Tensor] = [losses.new_zeros(0) for _ in self._sites]

        def of_site(place: int, grads: list) -> Tensor:
            return self._measure(place, *_operands(self._sites[place], self._calls[place], grads, batch))

        def arrived(place: int, call: int, grad: Tensor) -> None:
            waiting[place][call] = grad
            if all(grad is not None for grad in waiting[place]):
                found[place] = of_site(place, waiting[place])
                waiting[place].clear()

        waiting: list[list[Tensor | None]] = [[None] * len(calls) for calls in self._calls]
        leaves = []
        for place, (site, calls) in enumerate(zip(self._sites, self._calls, strict=True)):
            if site.parameter:
                assert batch == 1, f"the gradient of {site.name} is that of all samples together"
                weight = getattr(site.module, site.parameter)
                calls.append(_Call(weight.new_ones(1, 1, 1), weight))
                waiting[place].append(None)
            if not calls and site.expert:  # no token of this batch was sent to it
                found[place] = of_site(place, [])
            elif not calls:
                where = site.name or "a site"
                raise ValueError(f"{where} was not reached by the forward pass: no gradient to measure")
            for call, output in enumerate(part.output for part in calls):
                if output.is_leaf:
                    leaves.append((place, call, output))
                else:
                    output.register_hook(partial(arrived, place, call))
        grads = torch.autograd.grad(losses.sum(), [output for *_, output in leaves], allow_unused=True)
        for (place, call, output), grad in zip(leaves, grads, strict=True):
            arrived(place, call, torch.zeros_like(output) if grad is None else grad)
        for place, calls in enumerate(self._calls):
            if waiting[place]:  # some of its calls do not matter to the loss
                seen = zip(waiting[place], calls, strict=True)
                known = [torch.zeros_like(call.output) if grad is None else grad for grad, call in seen]
                found[place] = of_site(place, known)
        return found


def _kept(layer_input: Tensor, output: Tensor, rows: Tensor | None = None, tokens: int = 0) -> _Call:
    if not output.requires_grad:
        output.requires_grad_(True)  # the graph begins here
    return _Call(layer_input.detach(), output, rows, tokens)


def _keep_products(module: Any, calls: list[_Call]) -> list[torch.utils.hooks.RemovableHandle]:
    mode = experts.Products(module.weight.shape, lambda *call: calls.append(_kept(*call)))
    return [
        module.register_forward_pre_hook(lambda *_: mode.__enter__() and None),
        module.register_forward_hook(lambda *_: mode.__exit__(None, None, None), always_call=True),
    ]


def _keep(calls: list[_Call], module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    calls.append(_kept(args[0], output))


def _experts_forward(module: nn.Module, calls: dict[tuple[str, int], list[_Call]]) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        def tell(name: str, expert: int, tokens: Tensor, states: Tensor, made: Tensor) -> None:
            if (name, expert) in calls:
                calls[name, expert].append(_kept(states, made, tokens, len(hidden)))

        return experts.forward(module, tell, hidden, *routing, *named.values())

    return forward


def _operands(site: Site, calls: list[_Call], grads: list[Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """All calls of a site as one (B, T, I) and one (B, T, O); a layer may see (B * T, I) or more axes
    between."""
    if site.expert and not calls:
        weight = getattr(site.module, site.expert[0])
        *_, inputs, outputs = weight.shape if site.module.is_transposed else weight.mT.shape
        return weight.new_zeros(batch, 1, inputs), weight.new_zeros(batch, 1, outputs)
    if site.parameter:  # as one row, which is its own gradient
        return grads[0].reshape(1, 1, -1), calls[0].input
    a = torch.cat([_by_sample(call.input, call, batch) for call in calls], 1)
    g = torch.cat([_by_sample(grad, call, batch) for grad, call in zip(grads, calls, strict=True)], 1)
    if site.rows is not None:
        g = g[..., site.rows]
    if site.sketch is not None:
        wide = torch.promote_types(g.dtype, torch.float32)
        a = a.to(wide) @ site.sketch.to(wide).mT
    return a, g


def _by_sample(states: Tensor, call: _Call, batch: int) -> Tensor:
    """(B, T, width) of a call's tokens; an expert's are those of each sample that were sent to it, then
    zeros."""
    if call.rows is None:
        return states.reshape(batch, -1, states.shape[-1])
    sample = call.rows // (call.tokens // batch)
    counts = sample.bincount(minlength=batch)
    place = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]
    return states.new_zeros(batch, int(counts.max()), states.shape[-1]).index_put((sample, place), states)


def gradient_matrix(place: int, layer_input: Tensor, grad_output: Tensor) -> Tensor:
    """The gradients themselves, sum_t g_t a_t^T for each sample: (B, O, I) in float32 or wider. For a few
    samples."""
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    return grad_output.to(wide).mT @ layer_input.to(wide)


def inner_products(directions: Sequence[Tensor]) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A measure for `record_sites`: each sample's <gradient, direction> with each of q, and its squared norm.

    With one direction <sum_t g_t a_t^T, D> = sum_t g_t . (D a_t), and no gradient is formed; with several,
    they are, few at once.

    Args:
        directions: D, (q, O, I) for each site.

    Returns:
        a function to (B, q + 1).
    """

    def measure(place: int, layer_input: Tensor, grad_output: Tensor) -> Tensor:
        if len(directions[place]) == 1:
            (direction,) = directions[place]
            a, g = layer_input.to(direction.dtype), grad_output.to(direction.dtype)
            along = torch.linalg.vecdot(a @ direction.mT, g).sum(1)
            square = squared_norm_of_products(layer_input, grad_output).to(direction.dtype)
            return torch.stack([along, square], 1)
        direction = directions[place].flatten(1)
        step = max(1, chunk_bytes_on(direction.device) // (direction.shape[1] * direction.itemsize))
        parts = []
        for start in range(0, len(layer_input), step):
            part = slice(start, start + step)
            gradients = gradient_matrix(place, layer_input[part], grad_output[part]).flatten(1)
            squares = gradients.square().sum(1, keepdim=True)
            parts.append(torch.cat([gradients @ direction.mT, squares], 1))
        return torch.cat(parts)

    return measure


def squared_norm_of_products(layer_input: Tensor, grad_output: Tensor) -> Tensor:
    """Squared Frobenius norm of sum_t g_t a_t^T for each sample, by the cheaper of two ways.

    Instantiated: form the (O, I) matrix, 2 T O I operations. Gram: <A A^T, G G^T> over the (T, T) products of
    the tokens, 2 T^2 (I + O). Same number; short samples and wide layers favour the second.

    Args:
        layer_input: a, (B, T, I).
        grad_output: g, (B, T, O), zero at padding.

    Returns:
        (B,) in float32, or float64 where the inputs are. Sums are taken in that type whatever the model's.
    """
    batch, tokens, inner = layer_input.shape
    outer = grad_output.shape[-1]
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    gram = tokens * (inner + outer) < outer * inner
    floats_a_sample = 2 * tokens * tokens if gram else outer * inner
    floats_a_sample += tokens * (inner + outer)
    step = max(1, chunk_bytes_on(grad_output.device) // (floats_a_sample * wide.itemsize))
    squares = []
    for start in range(0, batch, step):
        a = layer_input[start : start + step].to(wide)
        g = grad_output[start : start + step].to(wide)
        if gram:
            product = (a @ a.mT).mul_(g @ g.mT).sum((1, 2))
            squares.append(product.clamp_(min=0))  # a sum of squares; rounding must not make it negative
        else:
            squares.append((g.mT @ a).square_().sum((1, 2)))
    return torch.cat(squares)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What the head says of each response token, all (N,), in float32 or float64.

    Attributes:
        loss: cross-entropy, -log p(label).
        el2n: ||p - onehot(label)||_2, on probabilities, each predicted by the token before it.
        entropy: -sum p log p, in nats.
    """

    loss: Tensor
    el2n: Tensor
    entropy: Tensor


def response_scores(
    hidden: Tensor, head: Head, labels: Tensor, chunk_bytes: int | None = None, grad_scale: float = 1.0
) -> TokenScores:
    """Cross-entropy, EL2N and entropy of response tokens, the gradient in closed form.

    With p = softmax(W h), dloss/dh = W^T (p - onehot). Both are taken chunk by chunk, so that no (tokens x
    vocabulary) matrix is ever whole, and the graph keeps (N, H) alone.

    Args:
        hidden: (N, H), the final hidden state at the token *before* each response token.
        head: the output embedding; its weight gets no gradient.
        labels: (N,) int64, the response tokens.
        chunk_bytes: float32 working memory for a chunk of logits; None: by the device.
        grad_scale: the gradient that flows back is this many times the loss's own. A power of two above 1
            keeps small probabilities from vanishing in float16.

    Returns:
        TokenScores; `loss` alone is differentiable, with respect to `hidden`.
    """
    weight = head.module.weight
    bias = getattr(head.module, "bias", None)
    room = chunk_bytes or chunk_bytes_on(hidden.device)
    return TokenScores(
        *_ResponseScores.apply(hidden, weight, bias, labels, head.scale, head.cap, room, grad_scale)
    )


class _ResponseScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        cap: float | None,
        chunk_bytes: int,
        grad_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = ctx.needs_input_grad[0]
        num_tokens = len(labels)
        loss, el2n, entropy = (torch.empty(num_tokens, dtype=wide, device=hidden.device) for _ in range(3))
        grad = torch.empty_like(hidden) if needs_grad else None
        step = max(1, chunk_bytes // (len(weight) * wide.itemsize))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, num_tokens, step):
                part = slice(start, start + step)
                label = labels[part, None]
                states = hidden[part].to(weight.dtype)
                logits = nn.functional.linear(states, weight, bias).to(wide)
                if scale != 1.0:
                    logits *= scale
                if cap is not None:
                    logits.div_(cap).tanh_().mul_(cap)
                top = logits.amax(-1, keepdim=True)
                # of the soft cap
                slope = None if cap is None or grad is None else 1 - (logits / cap).square()
                logits -= top
                # e = exp(z - max z), the label's apart: p is e / total, and 1 - p(label) keeps its digits
                # near 0
                log_e_label = logits.gather(-1, label)
                e_label = log_e_label.exp()
                e = logits.exp().scatter_(-1, label, 0.0)
                others = e.sum(-1, keepdim=True)
                total = others + e_label
                loss[part] = (total.log() - log_e_label)[:, 0]
                of_logits = torch.linalg.vecdot(e, logits)[:, None] + e_label * log_e_label
                entropy[part] = (total.log() - of_logits / total)[:, 0]
                el2n[part] = torch.hypot(others[:, 0], torch.linalg.vector_norm(e, dim=-1)) / total[:, 0]
                if grad is not None:
                    of_label = weight[label[:, 0]].to(wide) * (others / total)
                    if slope is not None:
                        e *= slope
                        of_label *= slope.gather(-1, label)
                    if weight.dtype == torch.float16:  # total may lie beyond its range
                        e /= total
                        total = torch.ones_like(total)
                    from_others = (e.to(weight.dtype) @ weight).to(wide) / total
                    grad[part] = ((from_others - of_label) * (scale * grad_scale)).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(el2n, entropy)
        return loss, el2n, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0][:, None].to(grad.dtype), *[None] * 7)


def mean_by_sample(values: Tensor, sample_of: Tensor, counts: Tensor) -> Tensor:
    """(B,) mean of token values over each sample.

    Args:
        values: (N,), or (N, H) where counts is (B, 1).
        sample_of, counts: of a `tokens.Batch`.
    """
    return values.new_zeros(len(counts), *values.shape[1:]).index_add(0, sample_of, values) / counts


def highest_entropies(entropy: Tensor, sample_of: Tensor, counts: Tensor) -> Tensor:
    """(B,) the sum of each sample's highest entropies, of 1 in 200 response tokens and at least one (HES).

    Args:
        entropy: (N,), in nats.
        sample_of, counts: of a `tokens.Batch`.
    """
    place = torch.arange(len(entropy), device=entropy.device) - (counts.cumsum(0) - counts)[sample_of]
    by_sample = entropy.new_zeros(len(counts), int(counts.max())).index_put((sample_of, place), entropy)
    kept = (counts // 200).clamp(min=1)[:, None]
    highest = by_sample.topk(int(kept.max()), dim=1).values
    return highest.masked_fill(torch.arange(highest.shape[1], device=entropy.device) >= kept, 0).sum(1)


def efforts(
    forward: Callable[[], Tensor],
    head: Head,
    sites: Sequence[Site],
    batch: Batch,
    loss: str = "mean",
    grad_scale: float | None = None,
    also: Sequence[tuple[int, Tensor, Tensor]] = (),
) -> dict[str, Tensor]:
    """One pass over a batch: effort, loss, EL2N, entropy, HES and UPD of each sample.

    Args:
        forward: runs the blocks over the batch and returns the final hidden states, (B, T, H).
        head: what makes logits of them.
        sites: where the gradient is measured.
        batch: a `tokens.Batch`.
        loss: a key of `LOSSES`, what L is of the cross-entropies of a sample's response tokens.
        grad_scale: for float16, a power of two that gradients are multiplied by on their way and divided by
            at the end; the division by the tokens of a sample waits until then too. None: neither is needed.
        also: calls of sites that were made before; see `record_sites.also`.

    Returns:
        "effort": ||dL/dphi||_2, "loss": L, "el2n", "entropy", "hes": the sum of the highest entropies, "upd":
        the mean over response tokens of sigmoid(loss) * max(0, 1 - entropy / log V); each (B,), L one of its
        own for each sample, so a score does not depend on the batch. "site_norms": (B, sites), ||dL/dW||_2 of
        each site; effort^2 is the sum of their squares.
    """
    with torch.enable_grad(), record_sites(sites) as recorded:
        for call in also:
            recorded.also(*call)
        hidden = forward()[batch.sample_of, batch.before]
        if not hidden.requires_grad:
            raise ValueError("the model's blocks keep no graph (reversible ones don't): it can't be scored")
        tokens = response_scores(hidden, head, batch.labels, grad_scale=grad_scale or 1.0)
        means = mean_by_sample(tokens.loss, batch.sample_of, batch.counts)
        counts = batch.counts.to(means.dtype)
        grown = torch.ones_like(means) if grad_scale is None else counts.log2().ceil().exp2()
        squares = recorded.squared_norms(means if grad_scale is None else means * grown)
    to_loss = counts ** (1 - LOSSES[loss])
    weight: Any = head.module.weight
    sure = (1 - tokens.entropy / math.log(len(weight))).clamp(min=0)
    norms = squares.sqrt()
    effort = squares.sum(1).sqrt()
    if grad_scale is not None:
        norms, effort = norms / (grown * grad_scale)[:, None], effort / (grown * grad_scale)
    return {
        "effort": effort * to_loss,
        "loss": means.detach() * to_loss,
        "el2n": mean_by_sample(tokens.el2n, batch.sample_of, batch.counts),
        "entropy": mean_by_sample(tokens.entropy, batch.sample_of, batch.counts),
        "hes": highest_entropies(tokens.entropy, batch.sample_of, batch.counts),
        "upd": mean_by_sample(tokens.loss.detach().sigmoid() * sure, batch.sample_of, batch.counts),
        "site_norms": norms * to_loss[:, None],
    }
