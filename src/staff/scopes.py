"""Which weights a score looks at, found by a model's structure and not by a list of names. torch alone.

A scope is the phi of STAFF's Eq. 2. `SCOPES` says what there is; a pass over the pool costs about the same for the
first two, and a backward pass through the whole model for "lora".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from staff.gradnorm import Head, Site

SCOPES = {
    "last-value": "the last block's value projection: the cheapest, and the default",
    "last-block": "every linear weight of the last block, at about the same price",
    "lora": "the trainable LoRA matrices of the whole model: a backward pass through every block",
}


def is_linear(module: nn.Module) -> bool:
    """A module with one weight matrix: nn.Linear and what derives from it, GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def inner(model: nn.Module) -> nn.Module:
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model: nn.Module) -> nn.Module:
    """The part below the head: tokens to final hidden states."""
    return inner(model).get_decoder()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks: its outermost ModuleList with one entry a layer.

    Raises:
        ValueError: there is none.
    """
    causal = inner(model)
    config = causal.config.get_text_config() if hasattr(causal.config, "get_text_config") else causal.config
    lists = [(name.count("."), module) for name, module in causal.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(depth, module) for depth, module in lists if len(module) == config.num_hidden_layers]
    if not fitting:
        raise ValueError(
            f"found no list of {config.num_hidden_layers} blocks in {type(causal).__name__}: this architecture is not supported"
        )
    return min(fitting, key=lambda pair: pair[0])[1]


def _linears(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """All linear layers below a module, adapters left out."""
    return [(prefix + name, m) for name, m in module.named_modules() if is_linear(m) and "lora_" not in name]


def value_projection(model: nn.Module) -> Site:
    """The value projection of the last block that has one; of a fused projection, its value rows.

    Found by two probes. With one token, softmax is over a single key and so 1: queries and keys get no gradient.
    With two tokens and a loss on the second, the first token's outputs matter only where attention carries them
    over: its query, its output projection and its MLP get none. What is left in both is the value projection. A block
    that shares an earlier block's values has none of its own, and the earlier one is found.

    Raises:
        ValueError: no block has one.
    """
    all_blocks = blocks(model)
    for index in reversed(range(len(all_blocks))):
        named = _linears(all_blocks[index], f"blocks.{index}.")
        alone = _moves_last_token(model, [module for _, module in named], num_tokens=1)
        carried = _moves_last_token(model, [module for _, module in named], num_tokens=2)
        is_value = {place: alone[place] & carried[place] for place in alone if place in carried}
        found = [place for place in is_value if is_value[place].any()]
        if found:
            place = found[-1]  # of a chain of projections the one run last, next to the attention
            name, module = named[place]
            return Site(module, None if is_value[place].all() else torch.nonzero(is_value[place])[:, 0], name)
    raise ValueError(f"found no value projection in {type(inner(model)).__name__}; try --scope last-block")


def _moves_last_token(model: nn.Module, modules: list[nn.Module], num_tokens: int) -> dict[int, Tensor]:
    """Which outputs of each module, at the first token, move the last token's hidden state.

    Returns:
        place in `modules` -> (O,) bool, in the order in which they ran. Modules that did not run, or saw their tokens
        out of order (routed experts), are left out.
    """
    outputs: dict[int, Tensor] = {}

    def keep(place):
        def hook(module, args, output):
            outputs[place] = output if output.requires_grad else output.requires_grad_(True)

        return hook

    causal = inner(model)
    device = next(model.parameters()).device
    handles = [module.register_forward_hook(keep(place)) for place, module in enumerate(modules)]
    implementation = causal.config._attn_implementation
    is_plain = implementation in ("sdpa", "eager")
    try:
        # the mathematical kernel: there the softmax of one key has a gradient of exactly 0
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            if not is_plain:
                causal.set_attn_implementation("eager")
            ids = torch.arange(3, 3 + num_tokens, device=device)[None]
            last = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
            if not last.requires_grad:
                return {}
            direction = torch.linspace(-1, 1.3, last.numel(), device=device).cos()
            grads = torch.autograd.grad((last * direction).sum(), list(outputs.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        if not is_plain:
            causal.set_attn_implementation(implementation)
    by_place = zip(outputs, grads, strict=True)
    return {place: grad[0, 0] != 0 for place, grad in by_place if grad is not None and grad.ndim == 3}


def sites(model: nn.Module, scope: str) -> list[Site]:
    """The weights of a scope.

    Args:
        model: a causal language model, perhaps with a LoRA adapter.
        scope: a key of `SCOPES`.

    Raises:
        ValueError: unknown scope, or the model does not have what it needs.
    """
    if scope == "last-value":
        return [value_projection(model)]
    if scope == "last-block":
        last = len(blocks(model)) - 1
        found = _linears(blocks(model)[last], f"blocks.{last}.")
        _check_experts(blocks(model)[last], scope)
        return [Site(module, None, name) for name, module in found]
    if scope == "lora":
        found = [(name, m) for name, m in model.named_modules() if is_linear(m) and (".lora_A." in name or ".lora_B." in name)]
        if not found:
            raise ValueError("scope 'lora' needs a model with a LoRA adapter; this one has none")
        return [Site(module, None, name) for name, module in found]
    raise ValueError(f"scope must be one of {', '.join(SCOPES)}; found {scope!r}")


def _check_experts(block: nn.Module, scope: str) -> None:
    """Weights of experts are three-dimensional or see a part of the tokens: the scope can't be had there."""
    for name, module in block.named_modules():
        if "expert" in type(module).__name__.lower() or (isinstance(module, nn.ModuleList) and "expert" in name):
            raise ValueError(
                f"scope {scope!r} needs plain linear weights, but the last block routes tokens to experts ({name}); use --scope last-value"
            )


def head_of(model: nn.Module) -> Head:
    """The head, checked against the model's own logits on a probe.

    Raises:
        ValueError: the model does something else to its logits than a scale and a soft cap.
    """
    causal = inner(model)
    config = causal.config.get_text_config() if hasattr(causal.config, "get_text_config") else causal.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    head = Head(causal.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))
    with torch.no_grad():
        device = next(model.parameters()).device
        ids = torch.arange(3, 7, device=device)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = head.module(hidden).float() * head.scale
        if head.cap is not None:
            ours = torch.tanh(ours / head.cap) * head.cap
    if not torch.allclose(ours, logits, atol=0.02 * logits.abs().max().item(), rtol=0):
        raise ValueError(f"{type(causal).__name__} makes its logits in a way that is not known here: it can't be scored")
    return head
