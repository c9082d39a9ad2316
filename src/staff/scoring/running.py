"""Efforts taken on the way, during the last epoch of a fine-tuning: no pass of their own, but of a model that still moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from staff.files import write_arrays
from staff.scoring import scopes
from staff.scoring.gradnorm import Site, squared_norm_of_products

FILE = "running.npz"


class Running:
    """Per-sample gradient norms at some weights, from the backward passes that a trainer makes anyway.

    A batch's loss is the mean over its N response tokens, and samples do not see each other: what arrives at the output
    of a layer for sample i is n_i / N times the gradient of its own mean loss. The weights are those of the moment, so
    samples are met by models up to an epoch apart, dropout at work where the model has any: never to be mixed with
    scores of the finished model.

    Args:
        model: a causal language model with its adapter.
        scope: last-value, last-block or linear; in the others the gradients do not pass by.
        positions: (k,) pool positions that are trained on.
        kept: of a run that was cut off, its efforts so far; nan where there is none yet.
    """

    def __init__(
        self, model: torch.nn.Module, scope: str, positions: np.ndarray, kept: np.ndarray | None = None
    ):
        self.positions = positions
        self.efforts = np.full(len(positions), np.nan, np.float32) if kept is None else kept
        wrapped = {id(layer.base_layer): layer for layer in model.modules() if hasattr(layer, "base_layer")}
        self._batch: tuple[Tensor, Tensor, np.ndarray, list[int] | None] | None = None
        self._squares: Tensor | None = None
        for site in scopes.sites(
            model, scope
        ):  # an adapter adds to what its layer gives: the gradient there is the same
            wrapped.get(id(site.module), site.module).register_forward_hook(self._watch(site))

    def begin(self, sample_of: Tensor, positions: Tensor, lengths: list[int] | None) -> None:
        """The next forward pass is of these samples, and their efforts count; `lengths` where they stand behind one another."""
        counts = torch.bincount(sample_of, minlength=len(positions))
        self._batch = (counts, len(sample_of) / counts, positions.cpu().numpy(), lengths)
        self._squares = None

    def end(self) -> None:
        """The backward pass is done: keep what it brought."""
        if self._batch is None or self._squares is None:
            return
        places = np.searchsorted(self.positions, self._batch[2])
        self.efforts[places] = self._squares.sqrt().float().cpu().numpy()
        self._batch = self._squares = None

    def save(self, folder: Path) -> None:
        write_arrays(folder / FILE, {"effort": self.efforts})

    def _watch(self, site: Site):
        def keep(module, args, output):
            if self._batch is None or not output.requires_grad:
                return
            counts, scale, _, lengths = self._batch
            layer_input = args[0].detach()

            def by_sample(states: Tensor) -> Tensor:
                """(B, T, width), zero behind a sample's end."""
                if lengths is None:
                    return states.reshape(len(counts), -1, states.shape[-1])
                return torch.nn.utils.rnn.pad_sequence(
                    states.reshape(-1, states.shape[-1]).split(lengths), batch_first=True
                )

            def arrived(grad: Tensor) -> None:
                of_rows = grad if site.rows is None else grad[..., site.rows]
                squares = squared_norm_of_products(by_sample(layer_input), by_sample(of_rows)) * scale**2
                self._squares = squares if self._squares is None else self._squares + squares

            output.register_hook(arrived)

        return keep
