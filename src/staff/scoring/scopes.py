"""Which weights a score looks at, found by a model's structure and not by a list of names. torch alone.

A scope is the phi of STAFF's Eq. 2; `SCOPES` says what there is and what each costs, in passes over the pool
forward through the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from staff.models import anatomy
from staff.scoring import experts
from staff.scoring.gradnorm import Head, Site, record_sites

SCOPES = {
    "last-value": "the last block's value projection: forward, and back through the last block; the default",
    "last-block": "every linear weight of the last block: about the same price",
    "linear": "every linear weight of the blocks, no embeddings, no head; 2 to 3 times the price",
    "lora": "the trainable LoRA matrices of the whole model: back through every block; twice the price",
    "released": "lora_B of a fresh LoRA on that projection, as the authors have it: the price of last-value",
}
RELEASED_RANK, RELEASED_ALPHA = 81, 16
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE = (2, 16)  # samples and tokens of the batch that shows how layers see their input


def _linears(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """All linear layers below a module, adapters left out."""
    return [
        (prefix + name, m)
        for name, m in module.named_modules()
        if anatomy.is_linear(m) and not anatomy.is_router(m) and "lora_" not in name
    ]


def _weights(block: nn.Module, prefix: str) -> list[Site]:
    """Every linear weight of a block: its linear layers, its routers, each expert's matrices."""
    weights = [Site(module, None, name) for name, module in _linears(block, prefix)]
    for name, module in block.named_modules():
        if experts.is_known(module):
            weights += [
                Site(module, None, f"{prefix}{name}.{matrix}.{expert}", expert=(matrix, expert))
                for matrix in experts.matrices(module)
                for expert in range(module.num_experts)
            ]
        elif anatomy.is_router(module):
            weights.append(Site(module, None, prefix + name))
    return weights


def value_projection(model: nn.Module) -> Site:
    """The value projection of the last block that has one; of a fused projection, its value rows.

    Found by two probes. With one token, softmax is over a single key and so 1: queries and keys get no
    gradient. With two tokens and a loss on the second, the first token's outputs matter only where attention
    carries them
    over: its query, its output projection and its MLP get none. What is left in both is the value projection.
        A block
    that shares an earlier block's values has none of its own, and the earlier one is found; so it is with
    blocks that have no attention. Where values are made in two steps (multi-head latent attention) it is the
    second.

    Raises:
        ValueError: no block has one.
    """
    all_blocks, config = anatomy.blocks(model), anatomy.text_config(model)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    for index in reversed(range(len(all_blocks))):
        if not hasattr(config, "num_attention_heads") or (kinds and not _is_softmax(kinds[index])):
            continue  # no softmax to tell values by: a state space or a linear attention
        named = _linears(all_blocks[index], f"blocks.{index}.")
        alone = _moves_last_token(model, all_blocks[index], [module for _, module in named], num_tokens=1)
        carried = _moves_last_token(model, all_blocks[index], [module for _, module in named], num_tokens=2)
        is_value = {place: alone[place] & carried[place] for place in alone if place in carried}
        found = [place for place in is_value if is_value[place].any()]
        if found:
            place = found[-1]  # of a chain of projections the one run last, next to the attention
            name, module = named[place]
            return Site(module, None if is_value[place].all() else torch.nonzero(is_value[place])[:, 0], name)
    raise ValueError(
        f"found no value projection in {type(anatomy.inner(model)).__name__}; try --scope last-block"
    )


def _is_softmax(kind: str) -> bool:
    return kind in ("attention", "hybrid") or (kind.endswith("_attention") and not kind.startswith("linear"))


def _moves_last_token(
    model: nn.Module, block: nn.Module, modules: list[nn.Module], num_tokens: int
) -> dict[int, Tensor]:
    """Which outputs of each module, at the first token, move what comes out of their block at the last token.

    Returns:
        place in `modules` -> (O,) bool, in the order in which they ran. Modules that did not run, or saw
        their tokens out of order (routed experts), are left out.
    """
    outputs: dict[int, Tensor] = {}
    from_block: list[Tensor] = []

    def keep_block(module, args, output):
        from_block.append(output[0] if isinstance(output, tuple | list) else output)

    def keep(place):
        def hook(module, args, output):
            if isinstance(output, Tensor):  # a router may hand out more
                outputs[place] = output if output.requires_grad else output.requires_grad_(True)

        return hook

    causal = anatomy.inner(model)
    device = next(model.parameters()).device
    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    handles.append(block.register_forward_hook(keep_block))
    implementation = causal.config._attn_implementation
    is_plain = implementation in ("sdpa", "eager")
    try:
        # the mathematical kernel: there the softmax of one key has a gradient of exactly 0
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            if not is_plain:
                causal.set_attn_implementation("eager")
            ids = torch.arange(3, 3 + num_tokens, device=device)[None]
            anatomy.decoder(model)(input_ids=ids, use_cache=False)
            states = from_block[
                0
            ]  # one sample; with several streams, those come before it or behind its tokens
            last = (states[:, -1] if len(states) == 1 else states[..., -1, :]).flatten().float()
            if not last.requires_grad:
                return {}
            direction = torch.linspace(-1, 1.3, last.numel(), device=device).cos()
            grads = torch.autograd.grad((last * direction).sum(), list(outputs.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        if not is_plain:
            causal.set_attn_implementation(implementation)
    in_order = {
        place: grad.reshape(num_tokens, -1)[0]
        for place, grad in zip(outputs, grads, strict=True)
        if grad is not None and grad.ndim >= 3 and len(grad) == 1 and grad[..., 0].numel() == num_tokens
    }
    return {place: grad != 0 for place, grad in in_order.items()}


def sites(model: nn.Module, scope: str, seed: int = 0) -> list[Site]:
    """The weights of a scope.

    Args:
        model: a causal language model, perhaps with a LoRA adapter.
        scope: a key of `SCOPES`.
        seed: of the fresh adapter of scope "released".

    Raises:
        ValueError: unknown scope, or the model does not have what it needs.
    """
    check_scope(model, scope)
    if scope == "last-value":
        return [value_projection(model)]
    if scope == "released":
        return [_released(model, seed)]
    if scope == "lora":
        found = [
            Site(m, None, name)
            for name, m in model.named_modules()
            if anatomy.is_linear(m) and (".lora_A." in name or ".lora_B." in name)
        ]
        if not found:
            raise ValueError("scope 'lora' needs a model with a LoRA adapter; this one has none")
    else:
        counted = _counted_blocks(model, scope)
        found = [site for name, block in counted.items() for site in _weights(block, f"{name}.")]
    return _that_run(model, found, scope)


def counted(sites: list[Site]) -> list[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """The weights of some sites: name, parameter, and what of the parameter's gradient counts.

    An effort is the root of the sum of the squares of what counts, but for the sketch of scope "released".
    """

    def part(grad: Tensor, site: Site) -> Tensor:
        if site.expert:
            return grad[site.expert[1]]
        if site.rows is None:
            return grad
        return (
            grad[:, site.rows] if hasattr(site.module, "nf") else grad[site.rows]
        )  # GPT-2's lie on their side

    weights: list[tuple[str, Tensor, Callable[[Tensor], Tensor]]] = []
    for site in sites:
        module: Any = getattr(site.module, "base_layer", site.module)
        weight: Any = getattr(module, site.expert[0] if site.expert else "weight", None)
        weights.append((site.name, weight, partial(part, site=site)))
    return weights


def check_scope(model: nn.Module, scope: str) -> None:
    """Can the scope be had? Looks at the structure alone, so a model on the meta device will do.

    Raises:
        ValueError: no such scope, or it takes in weights that are no plain linear layers.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; found {scope!r}")
    wrapped = [name for name, module in model.named_modules() if type(module).__name__ == "ParamWrapper"]
    if scope == "lora" and wrapped:
        where = f"its adapter changes experts from within ({wrapped[-1]})"
        raise ValueError(f"scope 'lora' can't be had, {where}: use --scope last-value or released")
    if scope not in ("last-block", "linear"):
        return
    for block_name, block in _counted_blocks(model, scope).items():
        for name, module in block.named_modules():
            if experts.is_known(module):
                continue
            routed = isinstance(module, nn.ModuleList) and "expert" in name
            fused = "expert" in type(module).__name__.lower() and any(
                True for _ in module.parameters(recurse=False)
            )
            cubes = [p for p in module.parameters(recurse=False) if p.ndim >= 3]
            if routed or fused or (cubes and not isinstance(module, (nn.Conv1d, nn.Conv2d))):
                raise ValueError(
                    f"scope {scope!r} needs plain linear weights, but {block_name}.{name} of "
                    f"{type(anatomy.inner(model)).__name__} sends tokens to "
                    "experts, whose weights see a part of them: use --scope last-value, lora or released"
                )


def _counted_blocks(model: nn.Module, scope: str) -> dict[str, nn.Module]:
    """The blocks of scopes "last-block" and "linear" by name."""
    every = {f"blocks.{index}": block for index, block in enumerate(anatomy.blocks(model))}
    return every if scope == "linear" else dict([list(every.items())[-1]])


def _that_run(model: nn.Module, candidates: list[Site], scope: str) -> list[Site]:
    """Those weights that a forward pass meets, each with all tokens of the batch in order; all experts of a
    layer.

    Raises:
        ValueError: a layer sees its tokens otherwise.
    """
    samples, tokens = PROBE
    ids = torch.arange(3, 3 + samples * tokens, device=next(model.parameters()).device)
    ids = (ids % anatomy.text_config(model).vocab_size).reshape(PROBE)
    with torch.no_grad(), record_sites(candidates) as recorded:
        anatomy.decoder(model)(input_ids=ids, use_cache=False)
        shapes = recorded.input_shapes()
    met = {site.module for site, seen in zip(candidates, shapes, strict=True) if seen}
    for site, seen in zip(candidates, shapes, strict=True):
        for shape in seen if not site.expert else ():
            if shape[0] != samples and shape[:-1] != (samples * tokens,):
                raise ValueError(
                    f"scope {scope!r} is not available: {site.name} sees {tuple(shape)} of a batch of "
                    f"{samples} x {tokens} tokens"
                )
    return [site for site in candidates if site.module in met]


def _released(model: nn.Module, seed: int) -> Site:
    """The weight that the authors' script takes the norm on: `lora_B` of a fresh LoRA on the last value
    projection.

    Reproduced from selection/effort_score.py: rank 81, alpha 16, no dropout, matrix A drawn as PEFT draws it
    (uniform within 1 / sqrt(I)), B = 0, so that the model computes what it did without. The gradient of B is
    (alpha / rank) G A^T, with G that of the value projection: no adapter has to be there. Left out: the
    script adds the same gradient twice before it takes the norm, a factor of 2 that no ratio or region sees;
    and it finds the layer by a number for each of five model names. A is ours to draw: the script has no
    seed.
    """
    site = value_projection(model)
    inputs = anatomy.weight_shape(site.module)[1]
    drawn = torch.rand(RELEASED_RANK, inputs, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    drawn *= RELEASED_ALPHA / RELEASED_RANK / math.sqrt(inputs)
    return Site(site.module, site.rows, site.name, drawn.to(next(model.parameters()).device))


def drop_tuned_queries_and_values(model: nn.Module) -> list[str]:
    """Undo the tuning of the query and value projections, in place, as the authors' script does without
    saying so.

    It puts its fresh adapter under the name of the tuned one, on "q_proj" and "v_proj": there the tuned
    matrices are lost, everywhere else they stay. In a model with a fused projection it is that one, queries,
    keys and values.

    Returns:
        the names of the layers; none where the model has no adapter.
    """
    tuned = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_B") and hasattr(module, "base_layer")
    }
    if not tuned:
        return []
    wanted = {"q_proj", "v_proj", value_projection(model).name.removesuffix(".base_layer").rsplit(".", 1)[-1]}
    dropped = [name for name in tuned if name.rsplit(".", 1)[-1] in wanted]
    for name in dropped:
        for matrix in tuned[name].lora_B.values():
            nn.init.zeros_(matrix.weight)
    return dropped


def head_of(model: nn.Module) -> Head:
    """The head, checked against the model's own logits on a probe.

    Raises:
        ValueError: the model does something else to its logits than a scale and a soft cap.
    """
    causal = anatomy.inner(model)
    config = anatomy.text_config(model)
    scale = (getattr(config, "logit_scale", None) or 1.0) * (
        getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scale /= getattr(config, "logits_scaling", None) or 1.0
    caps = (getattr(config, name, None) for name in CAPS)
    head = Head(causal.get_output_embeddings(), scale, next((cap for cap in caps if cap), None))
    name = type(causal).__name__
    with torch.no_grad():
        ids = torch.arange(3, 7, device=next(model.parameters()).device)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = anatomy.decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        ids[0, -1] = 2  # what comes later changes nothing
        before = anatomy.decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = head.module(hidden).float() * head.scale
        if head.cap is not None:
            ours = torch.tanh(ours / head.cap) * head.cap
    if not logits.isfinite().all():
        raise ValueError(f"{name} overflows in {hidden.dtype}: try --dtype float32 (or bfloat16)")
    rounding = max(torch.finfo(dtype).eps for dtype in (hidden.dtype, torch.float32)) ** (2 / 3)
    if not torch.allclose(ours, logits, atol=rounding * logits.abs().max().item(), rtol=0):
        raise ValueError(f"{name} makes its logits in a way that is not known here: it can't be scored")
    if not torch.allclose(before[:-1], hidden[:-1], atol=rounding * hidden.abs().max().item(), rtol=0):
        raise ValueError(
            f"{name} lets a token see those after it: no causal language model, so it can't be scored "
            "(a BERT-like decoder needs is_decoder in its configuration)"
        )
    return head
