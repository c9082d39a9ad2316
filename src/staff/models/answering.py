"""Greedy answers of a model, in batches where it answers the same in them, and its loss on references."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from staff.data.tokens import Pool

logger = logging.getLogger(__name__)

PADS = 16  # of a prompt of random tokens, to see whether a model heeds padding


def said_by(tokenizer: Any) -> Callable[[np.ndarray], str]:
    """What an answer's tokens say, without control tokens, and without what the template puts before it, such
    as a think block."""
    from staff.data.chat import control_tokens, scaffold

    mark, control = scaffold(tokenizer), control_tokens(tokenizer)

    def said(tokens: np.ndarray) -> str:
        whole = tokenizer.decode(tokens)
        if mark and mark in whole and control:
            return control.sub("", whole.rpartition(mark)[2]).strip()
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

    return said


class Answerer:
    """A model ready to answer and to say what it makes of the references.

    Args:
        end: the last token of a reference in the model's template; a control token ends an answer.
        batch_tokens: padded tokens of a batch at most, those of the answer included.
    """

    def __init__(self, model: Any, tokenizer: Any, end: int, max_new_tokens: int, batch_tokens: int):
        from transformers import GenerationConfig

        from staff.models import anatomy

        self.said = said_by(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.on_batch: Callable[[], object] | None = None  # called after each: a sign of life
        self.device = next(model.parameters()).device
        causal: Any = anatomy.inner(model)
        known = causal.generation_config.eos_token_id
        stop = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        stop |= {end} & {*tokenizer.all_special_ids, *special}
        self.stop = sorted(stop - {None})
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else [*self.stop, 0][0]
        # a generation_config.json may ask for sampling or penalties: all of its wishes go
        greedy = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        ends = {"eos_token_id": self.stop or None, "pad_token_id": self.pad}
        causal.generation_config = GenerationConfig(**greedy, **ends)
        beside = {"any": PADS, "of one length": 0}  # prompts that may be answered in one batch
        self.together = next((kind for kind, more in beside.items() if self._is_the_same(more)), "one by one")
        if self.together != "any":
            said = "%s answers otherwise beside other prompts or padding: prompts are taken %s"
            logger.warning(said, type(causal).__name__, self.together)

    def answer(self, prompts: list[np.ndarray]) -> dict[str, list[Any]]:
        """Greedy answers in the prompts' order: prediction, answer_tokens, cut."""
        from staff.data.tokens import batches

        lengths = np.array([len(prompt) for prompt in prompts]) + self.max_new_tokens
        n = len(prompts)
        answers: dict[str, list[Any]] = {"prediction": [""] * n, "answer_tokens": [0] * n, "cut": [False] * n}

        def run(places: np.ndarray) -> None:
            found = self._generate([prompts[i] for i in places])
            behind = max(len(prompts[i]) for i in places)
            for place, tokens in zip(places, found[:, behind:].cpu().numpy(), strict=True):
                ends = np.flatnonzero(np.isin(tokens, self.stop))
                own = tokens[: ends[0]] if len(ends) else tokens
                answers["prediction"][place] = self.said(own)
                answers["answer_tokens"][place] = len(own)
                answers["cut"][place] = not len(ends)

        alike = {"any": 0 * lengths, "of one length": lengths, "one by one": np.arange(n)}[self.together]
        together = [np.flatnonzero(alike == kind) for kind in np.unique(alike)]

        def cut(budget: int) -> list[np.ndarray]:
            return [places[part] for places in together for part in batches(lengths[places], budget)]

        self._within_memory(cut, run)
        return answers

    def _is_the_same(self, more: int) -> bool:
        """Are a prompt's next tokens the same alone and beside one of so many more, padded on the left?"""
        import torch

        known = self.model.get_input_embeddings().weight
        short, long = np.arange(3, 8) % len(known), np.arange(9, 14 + more) % len(known)
        asked = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
        alone, padded = (self._generate(prompts, **asked).logits for prompts in ([short], [short, long]))
        for one, other in zip(alone, padded, strict=False):  # the first may end an answer
            off = (other[0] - one[0]).float().norm() / one[0].float().norm()
            if not off < torch.finfo(known.dtype).eps ** 0.5:
                return False
        return True

    def _generate(self, prompts: Sequence[np.ndarray], **asked: Any) -> Any:
        """What the model's `generate` gives of prompts padded on the left."""
        import torch

        length = max(map(len, prompts))
        ids = np.full((len(prompts), length), self.pad, np.int64)
        attends = np.zeros((len(prompts), length), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            attends[row, length - len(prompt) :] = 1
        arrays = {"input_ids": ids, "attention_mask": attends}
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        with torch.inference_mode():
            return self.model.generate(**tensors, **asked)

    def losses(self, pool: Pool, positions: np.ndarray) -> np.ndarray:
        """(k,) mean cross-entropy of each reference's tokens, float64 of what the model computes in."""
        import torch

        from staff.data.tokens import batches, collate
        from staff.models import anatomy
        from staff.scoring import scopes
        from staff.scoring.gradnorm import mean_by_sample, response_scores

        head = scopes.head_of(self.model)
        losses = np.zeros(len(positions))

        def run(places: np.ndarray) -> None:
            with torch.inference_mode():
                batch = collate(pool, positions[places], self.device)
                hidden = anatomy.final_states(self.model, input_ids=batch.input_ids, use_cache=False)
                each = response_scores(hidden[batch.sample_of, batch.before], head, batch.labels).loss
                losses[places] = mean_by_sample(each, batch.sample_of, batch.counts).cpu().numpy()

        self._within_memory(lambda budget: batches(pool.lengths[positions], budget), run)
        return losses

    def _within_memory(
        self, cut: Callable[[int], list[np.ndarray]], run: Callable[[np.ndarray], None]
    ) -> None:
        """Run batch by batch; out of memory, all again with half the tokens, and no more from there on."""
        from staff.scoring.shards import is_out_of_memory

        while True:
            parts = cut(self.batch_tokens)
            try:
                for places in parts:
                    run(places)
                    if self.on_batch:
                        self.on_batch()
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if all(len(places) == 1 for places in parts):
                cure = "lower --max-length or --max-new-tokens"
                raise ValueError(f"an example does not fit into memory alone: {cure}")
            self.batch_tokens //= 2
            logger.warning("out of memory: a batch holds %d tokens at most from here on", self.batch_tokens)
