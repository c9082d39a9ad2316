"""LoRA supervised fine-tuning on transformers' Trainer: loss on the responses alone, exact resume."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from staff.data.tokens import Pool, collate
from staff.files import SEAL, is_out_of_memory, seal, sealed, write_text
from staff.models import anatomy, attention
from staff.models.adapters import add_lora, joined_products
from staff.models.files import ADAPTER as ADAPTER
from staff.scoring import scopes
from staff.scoring.gradnorm import Head, response_scores

OnStep = Callable[[int, int, str], object]  # steps done, steps in all, figures in words
LATEST = 20  # steps that the tokens a second are of
CHECKPOINTS = 2  # kept: one that turns out damaged has another before it
WEIGHTS_MOST = 5.0  # times the mean: what a sample counts at most
GIVEN = ("input_ids", "position_ids", "attention_mask")  # to the model, of what a step has


def sample_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in one epoch, at random; (samples,) int64 places, a step's worth after the
    other.

    A pure function of its arguments, so that a resumed epoch goes on with the very steps it was on. Lengths
    do not enter: steps of like length would be quicker to run and learn less (docs/speed.md).
    """
    return np.random.default_rng([seed, epoch]).permutation(samples)


def levelled(weights: np.ndarray) -> np.ndarray:
    """The weights of the samples trained on over their mean, none above WEIGHTS_MOST, and over the mean of
    that.

    So the learning rate means what it means without weights, and no single sample takes a step over.
    """
    weights = np.minimum(weights / weights.mean(), WEIGHTS_MOST)
    return weights / weights.mean()


class _Shuffled(Sampler):
    """`sample_order` as the Trainer takes it; it says which epoch it is on before each one."""

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed, self.epoch = samples, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        return iter(sample_order(self.samples, self.seed, self.epoch).tolist())


class _Positions(Dataset):
    def __init__(self, positions: np.ndarray):
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, place: int) -> int:
        return int(self.positions[place])


class _WholeSteps(DataLoader):
    """Steps of samples, the same in every process; its order follows the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]


class _ResponseTrainer(Trainer):
    """The Trainer with our order of samples, and a head that sees response tokens alone."""

    def __init__(self, *args: Any, head: Head, order: _Shuffled, held_out: Pool | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head, self._order, self._held_out = head, order, held_out
        self.loss_is_scaled_for_ga = False

    def get_train_dataloader(self) -> Any:
        """Where several processes share a step, each gets the whole step, and takes its part of it."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        assert self.train_dataset is not None
        return _WholeSteps(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            sampler=self._order,
            collate_fn=self.data_collator,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._order

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the step's response tokens, each times its sample's weight where there are any."""
        each, outputs = self._losses(model, inputs)
        each = each * inputs["weight"] if "weight" in inputs else each
        # gradients are meaned over processes, so each counts its part of the whole step's tokens
        world = self.args.world_size
        loss = each.mean() if world == 1 else each.sum() * (world / inputs["counted"])
        if not loss.isfinite():
            raise _diverged(self.args.learning_rate, f"the loss is nan at step {self.state.global_step + 1}")
        return (loss, outputs) if return_outputs else loss

    def _losses(self, model: Any, inputs: Any) -> tuple[torch.Tensor, Any]:
        """(R,) of the response tokens, and what the model gave."""
        assert isinstance(self.model, torch.nn.Module)
        given = {name: inputs[name] for name in GIVEN if name in inputs}
        # picked up inside the model's own forward, so that wrappers for several GPUs work
        with attention.short_samples(inputs["lengths"]), anatomy.head_inputs(self.model) as kept:
            outputs = model(**given, use_cache=False)
        hidden = kept.pop()[inputs["row"], inputs["before"]]
        return response_scores(hidden, self._head, inputs["response_ids"]).loss, outputs

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._began, self._tokens = time.monotonic(), inputs["tokens"]
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"tokens": self._tokens, "seconds": time.monotonic() - self._began}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """The mean over all response tokens that were held out, as the loss of a step is."""
        pool, total = self._held_out, 0.0
        assert pool is not None
        assert self.model is not None
        order = np.argsort(pool.lengths, kind="stable")
        self.model.eval()
        for start in range(0, len(order), self.args.per_device_train_batch_size):
            places = order[start : start + self.args.per_device_train_batch_size]
            inputs = self._prepare_inputs(step_of(pool, places, packs=False))  # type: ignore[arg-type]
            with torch.no_grad(), self.compute_loss_context_manager():
                total += float(self._losses(self.model, inputs)[0].double().sum())
        found = {"eval_loss": total / int(pool.response_tokens().sum())}
        self.log(found)
        return found


def _diverged(learning_rate: float, how: str) -> ValueError:
    return ValueError(
        f"fine-tuning diverged, {how}: lower --learning-rate (now {learning_rate:g}), and add --update; or "
        "tune in another --dtype"
    )


class _Watch(TrainerCallback):
    """Tells the progress and writes it down, saves by the clock, and keeps the adapter as it is at even steps
    through the run."""

    def __init__(
        self,
        checkpoint_seconds: float,
        on_progress: OnStep | None,
        output: Path,
        snapshots: int,
        log: Path | None,
    ):
        self._seconds, self._on_progress, self._saved = checkpoint_seconds, on_progress, time.monotonic()
        self._output, self._snapshots, self._log = output, snapshots, log
        self._latest: deque[tuple[int, float]] = deque(maxlen=LATEST)  # tokens and seconds of steps
        self._held_out = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._log and state.is_world_process_zero:  # what a kill left behind the last checkpoint goes
            write_log(self._log, state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told = state.log_history[-1]
        if self._log and state.is_world_process_zero and (line := _log_line(told)):
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(line)
        if "eval_loss" in told:
            self._held_out = f", held out {told['eval_loss']:.3f}"
        if "loss" in told and self._on_progress:
            self._latest.append((told["tokens"], told["seconds"]))
            tokens, seconds = map(sum, zip(*self._latest, strict=True))
            figures = f"loss {told['loss']:.3f}{self._held_out}, rate {told['learning_rate']:.1e}"
            figures += f", {tokens / max(seconds, 1e-9):,.0f} tokens/s"
            self._on_progress(state.global_step, state.max_steps, figures)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for number in range(1, self._snapshots + 1 if state.is_world_process_zero else 0):
            if state.global_step == max(1, round(number * state.max_steps / self._snapshots)):
                model.save_pretrained(self._output / "snapshots" / str(number))
        is_due = time.monotonic() - self._saved >= self._seconds and state.global_step < state.max_steps
        if args.world_size > 1:  # the first one's clock counts for all
            (is_due,) = broadcast_object_list([is_due])
        control.should_save = control.should_save or is_due

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(checkpoint, sorted(path.name for path in checkpoint.iterdir()))
        # by step: the Trainer's own rotation goes by time of change, and drops the newest where the clock
        # went back
        for old in sorted(checkpoint.parent.glob("checkpoint-*"), key=_step)[:-CHECKPOINTS]:
            shutil.rmtree(old)


def write_log(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """log.jsonl: a line a step (step, epoch, loss, learning_rate, grad_norm, tokens, seconds), and one each
    time that what is held out was looked at (step, epoch, eval_loss)."""
    write_text(path, "".join(map(_log_line, history)))


def _log_line(told: dict[str, Any]) -> str:
    is_line = "loss" in told or "eval_loss" in told
    return json.dumps({"step": told["step"], **told}) + "\n" if is_line else ""


def train_lora(
    model: torch.nn.Module,
    pool: Pool,
    positions: np.ndarray,
    output: Path,
    *,
    epochs: float,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_targets: Sequence[str] = (),
    learning_rate: float = 1e-4,
    warmup: float = 0.1,
    batch_size: int = 8,
    seed: int = 42,
    checkpoint_seconds: float = 60.0,
    max_steps: int | None = None,
    snapshots: int = 0,
    weights: np.ndarray | None = None,
    log: Path | None = None,
    held_out: Pool | None = None,
    report: Mapping[str, Any] | None = None,
    on_progress: OnStep | None = None,
) -> torch.nn.Module:
    """Fine-tune a model with LoRA on some samples of a pool, or finish a fine-tuning that was cut off.

    Cosine learning rate after a linear warm-up, AdamW, no weight decay, no dropout; the loss is the mean over
    a step's response tokens, whose samples are drawn at random; they go through the model behind one another,
    without padding, where it can tell them apart so (`attention.can_pack`). Checkpoints lie in
    output/checkpoints while it runs; when it ends, adapter_config.json and adapter_model.safetensors are
    there, and a seal with their checksums (`store.sealed`).

    Args:
        model: as loaded, without an adapter; it is changed.
        positions: (k,) pool positions trained on.
        output: a folder of this fine-tuning's own.
        epochs: T > 0, passes over the samples; fractions count.
        lora_targets: as in `adapters.add_lora`.
        max_steps: steps in place of epochs, as many passes as they take.
        snapshots: how many times the adapter is kept on the way, at even steps, in output/snapshots/1 and on.
        weights: (n,) what each sample of the pool counts in the loss, `levelled` over those trained on; None:
            all the same.
        log: a JSON Lines file that can be followed, see `write_log`; whole again when it ends.
        held_out: samples whose loss is taken before the first step and after every epoch.
        report: of TrainingArguments, what tells others how it goes: report_to, run_name, project.
        on_progress: called with (steps done, steps in all, figures of the last ones in words).

    Returns:
        the model with its adapter.

    Raises:
        ValueError: no samples, the memory does not hold a step, or the loss is no number any more.
    """
    if len(positions) == 0:
        raise ValueError("there is nothing to fine-tune on: no samples")
    if weights is not None:
        weights = weights.astype(np.float64)
        weights[positions] = levelled(weights[positions])
    device = next(model.parameters()).device
    head = scopes.head_of(model)
    _silence(model)
    model = add_lora(model, lora_rank, lora_alpha, seed, lora_targets)
    steps_an_epoch = -(-len(positions) // batch_size)
    steps = max_steps or max(1, round(epochs * steps_an_epoch))
    checkpoints = output / "checkpoints"
    begun = _last_finished(checkpoints)
    halves = next(model.parameters()).dtype
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # processes, of apart.py
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(warmup * steps),
        seed=seed,
        save_strategy="no",  # `_Watch` saves by the clock
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="epoch" if held_out else "no",
        eval_on_start=held_out is not None and begun is None,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if several and device.type == "cpu" else None,
        ddp_find_unused_parameters=False if several else None,
        bf16=halves == torch.bfloat16,
        fp16=halves == torch.float16,
        dataloader_pin_memory=device.type == "cuda",
        label_names=["response_ids"],
        **{"report_to": "none", **(report or {})},
    )

    shortest = positions[np.argsort(pool.lengths[positions], kind="stable")[:2]]
    packs = attention.can_pack(model, [pool.ids(i) for i in shortest], int(pool.lengths[positions].max()))

    trainer = _ResponseTrainer(
        model=model,
        args=arguments,
        train_dataset=_Positions(positions),
        eval_dataset=_Positions(np.arange(len(held_out))) if held_out else None,
        data_collator=lambda places: _part_of_step(pool, places, packs, weights, arguments),
        head=head,
        order=_Shuffled(len(positions), seed),
        held_out=held_out,
        callbacks=[_Watch(checkpoint_seconds, on_progress, output, snapshots, log)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with joined_products(model):
            trainer.train(resume_from_checkpoint=begun)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory while fine-tuning with --batch-size {batch_size}: lower it, or --max-length, "
            f"and add --update"
        ) from error
    if not all(p.isfinite().all() for name, p in model.named_parameters() if "lora_" in name):
        raise _diverged(learning_rate, "the adapter is nan")
    kept = {}
    if arguments.world_size > 1:  # of several, the first writes
        kept = {"state_dict": trainer.accelerator.get_state_dict(trainer.model_wrapped)}
        if arguments.process_index:
            return model
    if log:
        write_log(log, trainer.state.log_history)
    aside = output / ".adapter"
    model.save_pretrained(aside, **kept)
    for name in ADAPTER:
        os.replace(aside / name, output / name)
    shutil.rmtree(aside)
    parts = sorted(str(part.relative_to(output)) for part in output.glob("snapshots/*/*") if part.is_file())
    seal(
        output,
        [*ADAPTER, *parts],
        samples=len(positions),
        steps=steps,
        epochs=steps / steps_an_epoch if max_steps else epochs,
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return model.eval().requires_grad_(False)


def _silence(model: torch.nn.Module) -> None:
    """Turn off the model's own dropout and router noise, which training mode would switch on: kept as a
    layer's p, or as a
    number of a module that its forward hands on."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _part_of_step(
    pool: Pool, places: Sequence[int], packs: bool, weights: np.ndarray | None, arguments: TrainingArguments
) -> dict:
    """What this process does of a step: all of it, or every so manyth sample."""
    rank, world = arguments.process_index, arguments.world_size
    if world == 1:
        return step_of(pool, places, packs, weights)
    own = places[rank::world]
    step = step_of(pool, own or places[:1], packs, weights)
    if not own:  # a last step of fewer samples than processes: one that counts nothing
        step["weight"] = torch.zeros(len(step["response_ids"]))
    return step | {
        "counted": int(pool.response_tokens(places).sum()),
        "tokens": int(pool.lengths[list(places)].sum()),
    }


def step_of(pool: Pool, places: Sequence[int], packs: bool, weights: np.ndarray | None = None) -> dict:
    """One step's samples as the model takes them, and where their responses lie.

    Args:
        places: (B,) pool positions.
        packs: the samples one behind the other in a single row, not padded (`attention.packed`).

    Returns:
        what the model is given (those of GIVEN that it needs); tokens, their number; lengths, of the samples
        where they are packed, else None; and for each of R response tokens response_ids (R,), the token, row
        and before (R,), where in the output it is foretold, and sample_of (R,), whose it is; with weights,
        weight (R,), that one's.
    """
    batch = collate(pool, places)
    step = {"input_ids": batch.input_ids, "row": batch.sample_of, "before": batch.before, "lengths": None}
    if packs:
        samples = [pool.ids(i) for i in places]
        lengths = [len(sample) for sample in samples]
        starts = torch.as_tensor(np.cumsum([0, *lengths[:-1]]))
        step = attention.packed(samples) | {"lengths": lengths}
        step |= {"row": torch.zeros_like(batch.sample_of), "before": starts[batch.sample_of] + batch.before}
    if weights is not None:
        step["weight"] = torch.from_numpy(weights[places].astype(np.float32))[batch.sample_of]
    tokens = int(pool.lengths[places].sum())
    return step | {"response_ids": batch.labels, "sample_of": batch.sample_of, "tokens": tokens}


def _last_finished(checkpoints: Path) -> str | None:
    """The newest checkpoint whose files are all there and as they were written; unfinished and damaged ones
    are removed."""
    for path in sorted(checkpoints.glob("checkpoint-*"), key=_step, reverse=True):
        if (path / SEAL).exists() and sealed(path):
            return str(path)
        shutil.rmtree(path)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
