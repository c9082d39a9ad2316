"""LoRA adapters: a fresh one, one from disk, and their products taken in few steps while one is trained."""

from __future__ import annotations

import contextlib
import logging
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from staff.models import anatomy

logger = logging.getLogger(__name__)


def add_lora(
    model: torch.nn.Module, rank: int, alpha: int, seed: int, targets: Sequence[str] = ()
) -> torch.nn.Module:
    """A fresh, seeded LoRA adapter on the linear layers of the blocks (the head stays out).

    Args:
        targets: the layers by name, as in q_proj, or all-linear: PEFT's own choice. None: that without those
            that PEFT can't wrap, which is said.

    Raises:
        ValueError: the model carries one already that could not be folded in, or has no such layers.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "peft_config"):
        raise ValueError(
            "quantised weights can't take in the model's own adapter, nor carry a second one: merge it first"
        )
    is_everything = not targets or list(targets) == ["all-linear"]
    wanted = "all-linear" if is_everything else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, task_type="CAUSAL_LM")
    linears = {name: module for name, module in model.named_modules() if anatomy.is_linear(module)}
    refused = _not_to_be_wrapped(model, linears, config) if list(targets) != ["all-linear"] else []
    named = sorted({name.rpartition(".")[2] for name in refused})
    if not targets and refused:
        config.exclude_modules = refused
        logger.warning("LoRA leaves out what PEFT can't wrap: %s", ", ".join(named))
    for target in () if is_everything else targets:
        places = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not places or set(places) & set(refused):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linears} - set(named)))
            what = "can't be wrapped by PEFT" if places else "is no linear layer of the model"
            raise ValueError(f"--lora-targets {target} {what}; there are {there}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GPT-2's transposed weights: peft sees to them and says so
            return get_peft_model(model, config)


def _not_to_be_wrapped(model: nn.Module, linears: dict[str, nn.Module], config: Any) -> list[str]:
    """Linear layers that hand out something other than their product (Llama 4's routers, DeepSeek-V4's
    groups), and those that PEFT says no to (Mamba's)."""
    from peft.tuners.lora import LoraModel

    refused = []
    says_no = getattr(LoraModel, "_check_target_module_compatiblity", None)
    for name in linears:
        try:
            if says_no:
                says_no(LoraModel, config, model, name.rpartition(".")[2])
        except ValueError:
            refused.append(name)

    def is_product(module: nn.Module, args: Any, output: Any) -> bool:
        outputs = anatomy.weight_shape(module)[0]
        return isinstance(output, Tensor) and output.shape == (*args[0].shape[:-1], outputs)

    handles = [
        module.register_forward_hook(
            lambda *call, name=name: None if is_product(*call) else refused.append(name)
        )
        for name, module in linears.items()
    ]
    ids = torch.arange(3, 7, device=anatomy.device_of(model))[None]
    try:
        if not ids.is_meta:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return refused


def load_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """A model with the adapter that `finetune` left in a folder."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(folder)).eval().requires_grad_(False)


@contextlib.contextmanager
def joined_products(model: nn.Module) -> Iterator[None]:
    """Within the block, each plain LoRA layer runs as one step of the graph (see `_Product`); every other
    stays as it is."""
    from peft.tuners.lora import Linear

    joined = [m for m in model.modules() if type(m) is Linear and _is_plain(m)]
    for layer in joined:
        layer.__dict__["forward"] = types.MethodType(_forward, layer)
    try:
        yield
    finally:
        for layer in joined:
            del layer.__dict__["forward"]


def _is_plain(layer: Any) -> bool:
    """One adapter that is merely added, over weights that are numbers, with nothing hooked in between."""
    names = list(layer.lora_A)
    if (
        len(names) != 1
        or layer.active_adapters != names
        or layer.lora_variant
        or layer.merged
        or layer.disable_adapters
    ):
        return False
    parts = (layer.base_layer, layer.lora_A[names[0]], layer.lora_B[names[0]])
    return (
        all(
            type(part) is nn.Linear and not part._forward_hooks and not part._forward_pre_hooks
            for part in parts
        )
        and parts[1].bias is None
        and parts[2].bias is None
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
    )


def _forward(self: Any, x: Tensor) -> Tensor:
    base, name = self.base_layer, self.active_adapters[0]
    matrices = self.lora_A[name].weight, self.lora_B[name].weight
    return _Product.apply(x, base.weight, base.bias, *matrices, self.scaling[name])


class _Product(torch.autograd.Function):
    """W x + bias + scale * B A x, in the type of W. The gradients of A and B come from x and A x, which alone
    are kept.

    As separate steps the adapter costs two more products and four walks over (tokens, O) that only add, scale
    or convert; here each product adds to what is there. Axes: T tokens, I in, O out, R rank.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)  # (T, I)
            ctx.dtypes = x.dtype, a.dtype, b.dtype
            a, b = a.to(weight.dtype), b.to(weight.dtype)
            inner = rows @ a.mT  # (T, R)
            found = nn.functional.linear(rows, weight, bias).addmm_(inner, b.mT, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scale = scale
        # not a view to autograd: some models go on to change it in place
        return torch.ops.aten._unsafe_view(found, (*x.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, inner = ctx.saved_tensors
        (grad,) = grads
        out = grad.reshape(-1, grad.shape[-1])  # (T, O)
        grad_inner = out @ b  # (T, R), to be scaled
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (
                (out @ weight)
                .addmm_(grad_inner, a, alpha=ctx.scale)
                .view(*grad.shape[:-1], -1)
                .to(ctx.dtypes[0])
            )
        grad_a = (grad_inner.mT @ rows).to(ctx.dtypes[1]).mul_(ctx.scale)
        grad_b = (
            (inner.mT @ out).mT.to(ctx.dtypes[2]).mul_(ctx.scale)
        )  # (R, O) first: the flat product is several times faster
        return grad_x, None, None, grad_a, grad_b, None
