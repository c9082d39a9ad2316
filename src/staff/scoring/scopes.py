"""Which weights a score looks at, found by a model's structure and not by a list of names. torch alone.

A scope is the phi of STAFF's Eq. 2; `SCOPES` says what there is and what each costs, in passes over the pool
forward through the whole model.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from staff.models import anatomy
from staff.scoring import experts
from staff.scoring.gradnorm import Head, Site, record_sites

logger = logging.getLogger(__name__)
SCOPES = {
    "last-value": "the last block's value projection, the paper's: the price of forward, and back through it",
    "last-block": "every linear weight of the last block: about the same price; the default",
    "linear": "every linear weight of the blocks, no embeddings, no head; 2 to 3 times the price",
    "lora": "the trainable LoRA matrices of the whole model: back through every block; twice the price",
    "released": "lora_B of a fresh LoRA on that projection, as the authors have it: the price of last-value",
}
RELEASED_RANK, RELEASED_ALPHA = 81, 16
# settings of a model that its logits are multiplied or divided by, and of their soft cap
SCALES = ("logit_scale", "lm_head_multiplier", "logits_scaling", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE = (2, 16)  # samples and tokens of the batch that shows how layers see their input


def _linears(module: nn.Module, prefix: str) -> list[Site]:
    """All linear layers below a module, adapters left out."""
    return [
        Site(m, None, prefix + name)
        for name, m in module.named_modules()
        if anatomy.is_linear(m) and not anatomy.is_router(m) and "lora_" not in name
    ]


def _weights(block: nn.Module, prefix: str) -> list[Site]:
    """Linear weights of a block where they usually are: linear layers, routers, each expert's matrices."""
    weights = _linears(block, prefix)
    for name, module in block.named_modules():
        if experts.is_known(module):
            for which in product(experts.matrices(module), range(module.num_experts)):
                weights.append(Site(module, None, f"{prefix}{name}.{which[0]}.{which[1]}", expert=which))
        elif anatomy.is_router(module):
            weights.append(Site(module, None, prefix + name))
    return weights


def value_projection(model: nn.Module) -> Site:
    """The value projection of the last block that has one; of a fused projection, its value rows.

    Found by two probes. With one token, softmax is over a single key and so 1: queries and keys get no
    gradient. With two tokens and a loss on the second, the first token's outputs matter only where attention
    carries them over: its query, its output projection and its MLP get none. What is left in both is the
    value projection; what has a gradient in the second alone is the keys. Where a convolution or a state
    space carries tokens too, what is left may also be what hangs on the keys, behind the attention: not that.
    A block that shares an earlier block's values has none of its own, and the earlier one is found; so it is
    with blocks whose attention has no softmax. Where values are made in two steps (multi-head latent
    attention) it is the second.

    Raises:
        ValueError: no block has one.
    """
    all_blocks, config = anatomy.blocks(model), anatomy.text_config(model)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    heads = {"num_attention_heads", config.attribute_map.get("num_attention_heads")} & config.to_dict().keys()
    for index in reversed(range(len(all_blocks))):
        if not heads or (kinds and not _is_softmax(kinds[index])):
            continue  # no softmax to tell values by: a state space or a linear attention
        linears = _linears(all_blocks[index], f"blocks.{index}.")
        one, two = (_probe(model, all_blocks[index], [site.module for site in linears], n) for n in (1, 2))
        alone, carried = one(None), two(None)
        in_both = [place for place in alone if place in carried]
        is_value = {place: alone[place] & carried[place] for place in in_both}
        keys = {place: ~alone[place] & carried[place] for place in in_both}
        for place in reversed(in_both):  # of a chain of projections the one run last, next to the attention
            if is_value[place].any() and not any((keys[p] & hangs).any() for p, hangs in two(place).items()):
                rows = None if is_value[place].all() else torch.nonzero(is_value[place])[:, 0]
                return _with_twins(model, [replace(linears[place], rows=rows)])[0]
    what = f"{type(anatomy.inner(model)).__name__}, which has no block with softmax attention"
    raise ValueError(f"found no value projection in {what}: use --scope last-block")


def _with_twins(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Each weight once, with all the layers that share it (Zamba's blocks of attention)."""
    sharing: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if anatomy.is_linear(module) and isinstance(module.weight, Tensor):
            sharing.setdefault(id(module.weight), []).append(module)
    found: dict[Any, Site] = {}
    for site in sites:
        weight = id(weight_of(site))
        twins = tuple(module for module in sharing.get(weight, ()) if module is not site.module)
        if twins and not site.expert:
            found.setdefault(weight, replace(site, twins=twins))
        else:
            found[site] = site
    return list(found.values())


def _is_softmax(kind: str) -> bool:
    return kind in ("attention", "hybrid") or (kind.endswith("_attention") and not kind.startswith("linear"))


def _probe(
    model: nn.Module, block: nn.Module, modules: list[nn.Module], num_tokens: int
) -> Callable[[int | None], dict[int, Tensor]]:
    """A pass over a few tokens, and which outputs of each module at the first token move others at the last.

    Returns:
        a function of a place in `modules`, whose output is moved, or None for the block's, to place -> (O,)
        bool, in the order in which they ran. Modules that did not run, or saw their tokens out of order
        (routed experts), are left out.
    """
    outputs: dict[int, Tensor] = {}
    from_block: list[Tensor] = []

    def keep_block(module: nn.Module, args: Any, output: Any) -> None:
        from_block.append(output[0] if isinstance(output, tuple | list) else output)

    def keep(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # a router may hand out more
                outputs[place] = output if output.requires_grad else output.requires_grad_(True)

        return hook

    causal = anatomy.inner(model)
    device = anatomy.device_of(model)
    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    handles.append(block.register_forward_hook(keep_block))
    sinks = [parameter for name, parameter in block.named_parameters() if "sink" in name]
    before = [parameter.clone() for parameter in sinks]
    implementation = causal.config._attn_implementation
    is_plain = implementation in ("sdpa", "eager")
    try:
        # the mathematical kernel: there the softmax of one key has a gradient of exactly 0
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            if not is_plain:
                causal.set_attn_implementation("eager")
            for parameter in sinks:  # a key beside the tokens': softmax over one would not be 1
                parameter.data.fill_(-1e4)
            ids = torch.arange(3, 3 + num_tokens, device=device)[None]
            anatomy.final_states(model, input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, values in zip(sinks, before, strict=True):
            parameter.data.copy_(values)
        if not is_plain:
            causal.set_attn_implementation(implementation)

    def moved(target: int | None) -> dict[int, Tensor]:
        if target is None:  # one sample; several streams come before it or behind its tokens
            states = from_block[-1]
            last = states[:, -1] if len(states) == 1 else states[..., -1, :]
        else:
            last = outputs[target].reshape(num_tokens, -1)[-1]
        last = last.flatten().float()
        if not last.requires_grad:
            return {}
        direction = torch.linspace(-1, 1.3, last.numel(), device=device).cos()
        how: Any = {"allow_unused": True, "retain_graph": True}
        with torch.enable_grad():
            grads = torch.autograd.grad((last * direction).sum(), list(outputs.values()), **how)
        return {
            place: grad.reshape(num_tokens, -1)[0] != 0
            for place, grad in zip(outputs, grads, strict=True)
            if grad is not None and grad.ndim >= 3 and len(grad) == 1 and grad[..., 0].numel() == num_tokens
        }

    return moved


def sites(model: nn.Module, scope: str, seed: int = 0) -> list[Site]:
    """The weights of a scope.

    Args:
        model: a causal language model, perhaps with a LoRA adapter.
        scope: a key of `SCOPES`.
        seed: of the fresh adapter of scope "released".

    Raises:
        ValueError: unknown scope, or the model does not have what it needs.
    """
    check_scope(scope)
    if scope in ("last-value", "released"):
        site = value_projection(model) if scope == "last-value" else _released(model, seed)
        if not site.name.startswith(f"blocks.{len(anatomy.blocks(model)) - 1}."):
            logger.warning("the last block has no values of its own: scope '%s' takes %s", scope, site.name)
        return [site]
    if scope == "lora":
        within: dict[str, nn.Module] = {"": anatomy.inner(model)}
        usual = [
            Site(m, None, name)
            for name, m in anatomy.inner(model).named_modules()
            if anatomy.is_linear(m) and (".lora_A." in name or ".lora_B." in name)
        ]
        if not usual:
            raise ValueError("scope 'lora' needs a model with a LoRA adapter; this one has none")
    else:
        every = {f"blocks.{index}.": block for index, block in enumerate(anatomy.blocks(model))}
        within = every if scope == "linear" else dict([list(every.items())[-1]])
        usual = [site for prefix, block in within.items() for site in _weights(block, prefix)]
    matrices = {
        prefix + name: (module, name.rsplit(".", 1)[-1])
        for prefix, block in within.items()
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and parameter.is_floating_point() and ("lora_" in name) == (scope == "lora")
        for module in [block.get_submodule(name.rpartition(".")[0])]
    }
    return _that_run(model, _with_twins(model, usual), matrices, scope)


def counted(sites: list[Site]) -> list[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """The weights of some sites: name, parameter, and what of the parameter's gradient counts.

    An effort is the root of the sum of the squares of what counts.
    """

    def part(grad: Tensor, site: Site) -> Tensor:
        if site.expert:
            return grad[site.expert[1]]
        grad = grad.mT if hasattr(site.module, "nf") else grad  # GPT-2's lie on their side
        grad = grad if site.rows is None else grad[site.rows]
        return grad if site.sketch is None else grad @ site.sketch.to(grad.dtype).mT

    return [(site.name, weight_of(site), partial(part, site=site)) for site in sites]


def weight_of(site: Site) -> Any:
    """The parameter that a site is of, or is a part of; None where a layer has its weight packed."""
    module: Any = getattr(site.module, "base_layer", site.module)
    return getattr(module, site.parameter or (site.expert[0] if site.expert else "weight"), None)


def check_scope(scope: str) -> None:
    """Raise ValueError where there is no such scope."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}; found {scope!r}")


def _that_run(
    model: nn.Module, usual: list[Site], matrices: dict[str, tuple[nn.Module, str]], scope: str
) -> list[Site]:
    """The weights that a forward pass multiplies by: those of the usual layers that see all tokens of a batch
    in order; every other one as a parameter, whose gradient is taken whole, one sample at a time. All experts
    of a layer, whichever of them the pass meets.

    Raises:
        ValueError: a layer of packed weights sees its tokens otherwise.
    """
    samples, tokens = PROBE
    ids = torch.arange(3, 3 + samples * tokens, device=anatomy.device_of(model))
    ids = (ids % anatomy.text_config(model).vocab_size).reshape(PROBE)
    parameters = {name: getattr(module, own) for name, (module, own) in matrices.items()}
    with torch.no_grad(), experts.Multiplied(parameters) as multiplied, record_sites(usual) as recorded:
        anatomy.final_states(model, input_ids=ids, use_cache=False)
        calls = recorded.input_shapes()
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: list[Site] = []
    covered: set[int] = set()
    ran = {site.module for site, seen in zip(usual, calls, strict=True) if seen}
    for site, seen in zip(usual, calls, strict=True):
        weight = weight_of(site)
        shapes = multiplied.shapes[names[id(weight)]] if id(weight) in names else None
        whole = shapes is None or shapes == [weight.shape] * len(seen)
        in_order = all(shape[0] == samples or shape[:-1] == (samples * tokens,) for shape in seen)
        if site.expert or (seen and whole and in_order):
            if site.module in ran:
                found.append(site)
            covered.add(id(weight))
        elif seen and shapes is None:
            what = f"sees {tuple(seen[0])} of a batch of {samples} x {tokens} tokens"
            raise ValueError(f"scope {scope!r} is not available: {site.name}, of packed weights, {what}")
    met = {_any_of_a_list(name) for name, shapes in multiplied.shapes.items() if shapes}
    alone = [
        Site(module, None, name, parameter=own)
        for name, (module, own) in matrices.items()
        if _any_of_a_list(name) in met and id(parameters[name]) not in covered
    ]
    idle = [site.name for site, seen in zip(usual, calls, strict=True) if not (seen or site.expert)]
    idle = [name for name in idle if f"{name}.weight" not in {site.name for site in alone}]
    if idle:
        more = f" (and {len(idle) - 1} more)" if len(idle) > 1 else ""
        logger.warning("%s%s takes no part in a pass: it does not count in scope '%s'", idle[0], more, scope)
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        said = "sees its tokens in a way of its own: scope '%s' takes one sample at a time, slower"
        logger.warning(f"%s: %s%s {said}", type(anatomy.inner(model)).__name__, alone[0].name, more, scope)
    return found + alone


def _any_of_a_list(name: str) -> str:
    """A name without the places in lists: an expert that no token is sent to counts as those beside it."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


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
    return replace(site, sketch=drawn.to(anatomy.device_of(model)))


def drop_tuned_queries_and_values(model: nn.Module) -> list[str]:
    """Undo the tuning of the query and value projections, in place, as the authors' script does without
    saying so.

    It puts its fresh adapter under the name of the tuned one, on "q_proj" and "v_proj": there the tuned
    matrices are lost, everywhere else they stay. In a model with a fused projection it is that one, queries,
    keys and values.

    Returns:
        the names of the layers; none where the model has no adapter.
    """
    layers = model.named_modules()
    tuned = {name: m for name, m in layers if hasattr(m, "lora_B") and hasattr(m, "base_layer")}
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
        ValueError: the model does something else to its logits than a scale and a soft cap, does not run on
            text alone, or lets a token see those after it.
    """
    causal = anatomy.inner(model)
    name = type(causal).__name__
    with torch.no_grad():
        ids = torch.arange(3, 7, device=anatomy.device_of(model))[None]
        try:
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = "does not run on a few tokens of text alone, so it can't be scored"
            raise ValueError(f"{name} {what}: {error}") from error
        with anatomy.head_inputs(model) as kept:
            causal(input_ids=ids, use_cache=False)
        unknown = ValueError(f"{name} makes its logits in a way that is not known here: it can't be scored")
        if len(kept) != 1 or kept[0].shape[:-1] != ids.shape:
            raise unknown
        hidden = kept[0][0]
        ids[0, -1] = 2  # what comes later changes nothing
        before = anatomy.final_states(model, input_ids=ids, use_cache=False)[0]
        head = _like(logits, hidden, causal.get_output_embeddings(), anatomy.text_config(model))
    if not logits.isfinite().all():
        raise ValueError(f"{name} overflows in {hidden.dtype}: try --dtype float32 (or bfloat16)")
    if head is None:
        raise unknown
    if not torch.allclose(before[:-1], hidden[:-1], atol=_rounding(hidden), rtol=0):
        raise ValueError(
            f"{name} lets a token see those after it: no causal language model, so it can't be scored "
            "(a BERT-like decoder needs is_decoder in its configuration)"
        )
    return head


def _like(logits: Tensor, hidden: Tensor, module: nn.Module, config: Any) -> Head | None:
    """The head whose scale and soft cap, of those that the configuration names, give a model's own logits."""
    named = [getattr(config, name, None) for name in SCALES]
    scales = [scale for value in named if value for scale in (value, 1 / value)] + [1.0]
    caps = [cap for name in CAPS if (cap := getattr(config, name, None))] + [None]
    weight: Any = module.weight  # as the losses will take it
    raw = nn.functional.linear(hidden.to(weight.dtype), weight, getattr(module, "bias", None)).float()
    tolerance = _rounding(logits, hidden.dtype)
    for scale, cap in product(scales, caps):
        ours = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
        if ours.shape == logits.shape and (ours - logits).abs().max() <= tolerance:
            return Head(module, scale, cap)
    return None


def _rounding(values: Tensor, dtype: torch.dtype | None = None) -> float:
    """How far apart values of a type may be that are the same but for rounding."""
    eps = max(torch.finfo(kind).eps for kind in (dtype or values.dtype, torch.float32))
    return eps ** (2 / 3) * values.abs().max().item()
