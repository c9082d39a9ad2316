"""Efforts taken on the way, during the last epoch of a fine-tuning: no pass of their own, but of a model that still moves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from staff import scopes
from staff.gradnorm import Site, squared_norm_of_products
from staff.store import write_arrays

FILE = "running.npz"


@dataclass(eq=False)
class _Piece:
    """Samples of one forward pass: their positions (B,), what their gradients are multiplied by (B,), their squared norms (B,)."""

    positions: Tensor
    scale: Tensor
    squares: Tensor | None = None


class Running:
    """Per-sample gradient norms at some weights, from the backward passes that a trainer makes anyway.

    A step's loss is the mean over its N response tokens, and samples do not see each other: what arrives at the output
    of a layer for sample i is n_i / N times the gradient of its own mean loss. The weights are those of the moment, so
    samples are met by models up to an epoch apart, dropout at work where the model has any: never to be mixed with
    scores of the finished model.

    Args:
        model: a causal language model with its adapter.
        scope: last-value, last-block or linear; in the others the gradients do not pass by.
        positions: (k,) pool positions that are trained on.
        kept: of a run that was cut off, its efforts so far; nan where there is none yet.
    """

    def __init__(self, model: torch.nn.Module, scope: str, positions: np.ndarray, kept: np.ndarray | None = None):
        self.positions = positions
        self.efforts = np.full(len(positions), np.nan, np.float32) if kept is None else kept
        wrapped = {id(layer.base_layer): layer for layer in model.modules() if hasattr(layer, "base_layer")}
        self._pieces: list[_Piece] = []
        for site in scopes.sites(model, scope):  # an adapter adds to what its layer gives: the gradient there is the same
            wrapped.get(id(site.module), site.module).register_forward_hook(self._watch(site))

    def begin(self, sample_of: Tensor, positions: Tensor, tokens: int) -> None:
        """The next forward pass is of these samples, part of a step of `tokens` response tokens, and their efforts count."""
        counts = torch.bincount(sample_of, minlength=len(positions))
        self._pieces.append(_Piece(positions, tokens / counts))

    def end(self) -> None:
        """The backward pass is done: keep what it brought."""
        for piece in self._pieces:
            if piece.squares is not None:
                places = np.searchsorted(self.positions, piece.positions.cpu().numpy())
                self.efforts[places] = piece.squares.sqrt().float().cpu().numpy()
        self._pieces.clear()

    def save(self, folder: Path) -> None:
        write_arrays(folder / FILE, {"effort": self.efforts})

    def _watch(self, site: Site):
        def keep(module, args, output):
            if not self._pieces or not output.requires_grad:
                return
            piece, layer_input = self._pieces[-1], args[0].detach()

            def arrived(grad: Tensor) -> None:
                a = layer_input.reshape(len(piece.scale), -1, layer_input.shape[-1])
                g = grad.reshape(len(piece.scale), -1, grad.shape[-1])
                squares = squared_norm_of_products(a, g if site.rows is None else g[..., site.rows]) * piece.scale**2
                piece.squares = squares if piece.squares is None else piece.squares + squares

            output.register_hook(arrived)

        return keep
