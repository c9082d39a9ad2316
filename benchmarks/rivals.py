"""Ways to efforts that benchmarks/scoring.py times: ours, the authors' loop, plain autograd, libraries.

Each is a function of (model, pool, batch_tokens) to a function of pool positions to their scores. All but the
authors' take the gradient of the last block's value projection alone, freeze everything else so that the
graph begins there, and cut batches as we do. Where a library leaves the loss to its user, the head runs over
response tokens alone, as ours does.
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch.nn import functional as F

from staff.data.tokens import batches, collate
from staff.models import anatomy
from staff.scoring import scopes
from staff.scoring.gradnorm import mean_by_sample
from staff.scoring.scorer import Scorer


def ours(model, pool, batch_tokens, scope="last-value"):
    """`staff.scoring.scorer.Scorer`, the way the tool itself scores."""
    scorer = Scorer(model, scope)
    return lambda positions: scorer.scores(pool, positions, batch_tokens)["effort"]


def released(model, pool, batch_tokens, freeze=True):
    """The loop of the authors' script (selection/effort_score.py, effort_baseline_utils.py) on a CPU.

    A sample at a time, padded on the left to a multiple of 8; a fresh LoRA through peft; the model's own
    loss, so logits of every position; everything frozen but the matrix B that is measured; two backward
    passes that add up, halved here. Left out: the trainer around it, and 8-bit weights, which need a GPU. Its
    torch.compile is without effect: the trainer keeps the model it had.

    Args:
        freeze: as released. False: the whole adapter is trainable; gradients go through every block.
    """
    from peft import LoraConfig, get_peft_model

    rank, alpha = scopes.RELEASED_RANK, scopes.RELEASED_ALPHA
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0,
        target_modules=["q_proj", "v_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    name = _value_projection(model)
    wrapped = get_peft_model(model, config).train()
    layer = model.get_submodule(name)
    measured = layer.lora_B["default"].weight
    if freeze:
        for parameter in wrapped.parameters():
            parameter.requires_grad_(parameter is measured)

    def score(positions):
        found = []
        for i in positions:
            ids, labels = _left_padded(pool, i)
            loss = wrapped(
                input_ids=ids,
                labels=labels,
                attention_mask=(torch.arange(ids.shape[1]) >= ids.shape[1] - len(pool.ids(i)))[None],
            ).loss
            loss.mean().backward(retain_graph=True)
            loss.mean().backward()
            found.append(torch.norm(measured.grad.reshape(1, -1), dim=1).item() / 2)
            wrapped.zero_grad()
        return np.array(found)

    score.sketch = layer.lora_A["default"].weight.detach().float() * (alpha / rank)
    return score


def released_unfrozen(model, pool, batch_tokens):
    return released(model, pool, batch_tokens, freeze=False)


def vmapped(model, pool, batch_tokens):
    """torch.func's per-sample gradients: vmap of grad, the model's logits of every position.

    With eager attention: under vmap SDPA on a CPU falls back to a loop over the samples, and takes a third
    longer.
    """
    model.set_attn_implementation("eager")
    name = _value_projection(model) + ".weight"
    weight = model.requires_grad_(False).get_parameter(name)

    def loss(weight, ids, labels):
        logits = torch.func.functional_call(model, {name: weight}, (ids[None],), {"use_cache": False}).logits[
            0, :-1
        ]
        return F.cross_entropy(logits.float(), labels[1:])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def of_batch(positions):
        return gradients(weight, *_padded(pool, positions)).float().flatten(1).norm(dim=1)

    return _in_batches(of_batch, pool, batch_tokens)


def opacus(model, pool, batch_tokens):
    """Opacus's ghost norms: no gradient per sample is formed."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    weight = _value_weight_alone(model.train())  # its hooks do nothing in eval mode; the model has no dropout
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", strict=False)

    def of_batch(positions):
        _mean_losses(model, collate(pool, positions)).sum().backward()
        weight.grad = None
        return wrapped.get_norm_sample()

    return _in_batches(of_batch, pool, batch_tokens)


def dattri(model, pool, batch_tokens):
    """dattri's part for language models (LoGra) with identity for its projections, in the loop of `cache`.

    Its other way, `TracInAttributor.self_attribute`, is vmap of grad.
    """
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    _value_weight_alone(model)
    names = [_value_projection(model)]
    identity = {"proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity", "device": "cpu"}
    probe = {"input_ids": torch.arange(3, 35)[None]}
    compressors = setup_model_compressors(model, names, identity, identity, probe)
    hooks = HookManager(model, names)
    hooks.set_compressors(compressors)

    def of_batch(positions):
        _mean_losses(
            model, collate(pool, positions)
        ).mean().backward()  # it multiplies by the size of the batch
        return hooks.get_compressed_grads()[0].float().norm(dim=1)

    return _in_batches(of_batch, pool, batch_tokens)


def bergson(model, pool, batch_tokens):
    """bergson's collector on one module, its own loop and loss; a subclass keeps norms, not gradients."""
    from bergson import CollectorComputer, IndexConfig
    from bergson.collector.gradient_collectors import TraceCollector
    from datasets import Dataset

    _value_weight_alone(
        model
    )  # bergson itself has the embeddings require gradients, and so goes back through every block

    class Norms(TraceCollector):
        def backward_hook(self, module, g):
            self.mod_grads["norms"].append(self._compute_gradient(module, g).float().norm(dim=1))

    def score(positions):
        parts = batches(pool.lengths[positions], batch_tokens)
        labels = [np.where(pool.response(i), pool.ids(i), -100).tolist() for i in positions]
        data = Dataset.from_dict({"input_ids": [pool.ids(i).tolist() for i in positions], "labels": labels})
        with tempfile.TemporaryDirectory(suffix=".part") as folder:
            config = IndexConfig(run_path=folder.removesuffix(".part"), loss_reduction="mean")
            collector = Norms(
                model=model, target_modules={_value_projection(model)}, device="cpu", dtype=torch.float32
            )
            cut = [part.tolist() for part in parts]
            CollectorComputer(
                model, data, collector=collector, batches=cut, cfg=config
            ).run_with_collector_hooks()
        return _in_order(parts, collector.mod_grads["norms"])

    return score


def forward_all_logits(model, pool, batch_tokens):
    """No score: the model's forward pass with logits of every position."""
    return _forward(lambda ids: model(input_ids=ids, use_cache=False).logits, pool, batch_tokens)


def forward_no_logits(model, pool, batch_tokens):
    """No score: the forward pass without the head."""
    return _forward(
        lambda ids: anatomy.final_states(model, input_ids=ids, use_cache=False),
        pool,
        batch_tokens,
    )


def oracle(model, pool, batch_tokens):
    """A sample at a time, plain autograd; for a float64 model."""
    weight = _value_weight_alone(model)

    def score(positions):
        found = []
        for i in positions:
            ids, labels = _padded(pool, [i])
            loss = F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], labels[0, 1:])
            found.append(torch.autograd.grad(loss, weight)[0].norm().item())
        return np.array(found)

    return score


def _value_projection(model) -> str:
    """Its name in the model."""
    site = scopes.value_projection(model)
    return next(name for name, module in model.named_modules() if module is site.module)


def _value_weight_alone(model):
    weight = model.requires_grad_(False).get_submodule(_value_projection(model)).weight
    return weight.requires_grad_(True)


def _mean_losses(model, batch):
    """(B,) each sample's mean loss, through a head over response tokens alone."""
    hidden = anatomy.final_states(model, input_ids=batch.input_ids, use_cache=False)
    logits = model.get_output_embeddings()(hidden[batch.sample_of, batch.before])
    return mean_by_sample(
        F.cross_entropy(logits.float(), batch.labels, reduction="none"), batch.sample_of, batch.counts
    )


def _padded(pool, positions):
    """(B, T) token ids and labels, -100 where no loss is taken."""
    length = int(pool.lengths[positions].max())
    ids = torch.zeros(len(positions), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, i in enumerate(positions):
        sample = torch.from_numpy(pool.ids(i).astype(np.int64))
        ids[row, : len(sample)] = sample
        labels[row, : len(sample)] = torch.where(torch.from_numpy(pool.response(i)), sample, -100)
    return ids, labels


def _left_padded(pool, i):
    ids, labels = _padded(pool, [i])
    more = -ids.shape[1] % 8
    return F.pad(ids, (more, 0)), F.pad(labels, (more, 0), value=-100)


def _in_order(parts, found):
    return torch.cat(list(found)).detach().float().numpy()[np.argsort(np.concatenate(parts))]


def _in_batches(of_batch, pool, batch_tokens):
    def score(positions):
        parts = batches(pool.lengths[positions], batch_tokens)
        return _in_order(parts, [of_batch(positions[part]).detach() for part in parts])

    return score


def _forward(run, pool, batch_tokens):
    @torch.no_grad()
    def score(positions):
        for part in batches(pool.lengths[positions], batch_tokens):
            run(collate(pool, positions[part]).input_ids)

    return score
