"""What a token of LoRA fine-tuning takes.

    python benchmarks/finetune.py [ROW ...] --model FOLDER [--data FILE ...] [--output RESULTS.md]

Side by side, each row in a process of its own, LoRA of rank 8 on all linear layers, batches of 8, bfloat16.
So that losses can be compared, all but `bare` take the same samples in the same steps, drawn at random by the
seed, and all have STAFF's schedule of the learning rate (a rise over a tenth of the steps, then a cosine):

    transformers   its Trainer, for the rest as its defaults come: logits of every position
    trl            its SFTTrainer, the same, and activations computed twice (checkpointing)
    bare           a loop by hand: batches of like length, head on response tokens alone, peft's own layers
    bare, ours     a loop by hand over our steps: no padding, our attention and adapter products
    ours           `staff.models.finetune`, through the Trainer
    floor          the products of two forward passes and the adapters', at the rate that plain ones reach

tokens/s are of the samples' own tokens, padding not counted, over the steps after the first two. `loss` is
the mean over the response tokens of 64 rows that nobody trained on, after --steps steps, and the spread over
--seeds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

ROWS = ("transformers", "trl", "bare", "bare, ours", "ours", "floor")
BATCH, RANK, ALPHA, RATE, WARMUP, LENGTH, HELD_OUT, WARM = 8, 8, 16, 1e-3, 0.1, 512, 64, 2


def load(model: str):
    from staff.models import load as models

    source, device = models.resolve(model), torch.device("cpu")
    return models.load_model(source, models.pick_dtype("auto", device), device, False), models.load_tokenizer(
        source, False
    )


def read(data: str, rows: int):
    from staff.data import rows as formats

    return list(islice(formats.read([data]).examples(), rows))


class Clock:
    """Tokens and seconds of the steps after the first few; told at the end of each."""

    def __init__(self):
        self.times, self.tokens = [], []

    def step(self, tokens: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(tokens)

    def rate(self) -> float:
        return sum(self.tokens[WARM:]) / (self.times[-1] - self.times[WARM - 1])


@torch.no_grad()
def held_out_loss(model, pool) -> float:
    """Mean over response tokens, by the model's own loss, a row at a time."""
    model.eval()
    total = 0.0
    for i in range(len(pool)):
        ids, response = (
            torch.tensor(pool.ids(i), dtype=torch.int64)[None],
            torch.tensor(pool.response(i))[None],
        )
        total += model(input_ids=ids, labels=ids.where(response, -100)).loss.item() * int(response.sum())
    return total / float(pool.response_tokens().sum())


def run_library(name: str, model, tokenizer, pool, steps: int, seed: int) -> tuple[float, torch.nn.Module]:
    """transformers' or TRL's trainer with its own defaults, but for the schedule and the samples drawn."""
    import transformers

    from staff.models.adapters import add_lora

    clock = Clock()
    order = np.concatenate(our_steps(len(pool), steps, seed))
    samples = [
        {"input_ids": pool.ids(i).tolist(), "labels": np.where(pool.response(i), pool.ids(i), -100).tolist()}
        for i in order
    ]
    seen: list[int] = []

    class Tell(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.step(sum(seen))
            seen.clear()

    collate = transformers.DataCollatorForSeq2Seq(tokenizer)

    def counted(features):
        seen.append(sum(len(feature["input_ids"]) for feature in features))
        return collate([{"input_ids": f["input_ids"], "labels": f["labels"]} for f in features])

    shared = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(WARMUP * steps),
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "bf16": True,
        "disable_tqdm": True,
    }
    callbacks = [Tell()]
    if name == "transformers":
        model = add_lora(model, RANK, ALPHA, seed)
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(**shared),
            train_dataset=samples,
            data_collator=counted,
            callbacks=callbacks,
        )
    else:
        import datasets
        import peft
        import trl

        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = datasets.Dataset.from_list(samples)
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**shared),
            train_dataset=rows,
            data_collator=counted,
            peft_config=lora,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.train()
    return clock.rate(), trainer.model


def of_like_length(lengths: np.ndarray, seed: int) -> np.ndarray:
    """Steps of samples of like length, in random order: (steps, BATCH) places."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))[: len(lengths) // BATCH * BATCH]
    in_steps = shuffled[np.argsort(-lengths[shuffled], kind="stable")].reshape(-1, BATCH)
    return in_steps[rng.permutation(len(in_steps))]


def our_steps(samples: int, steps: int, seed: int) -> list[np.ndarray]:
    from staff.models.finetune import sample_order

    epochs = [sample_order(samples, seed, epoch) for epoch in range(-(-steps * BATCH // samples))]
    return [order[start : start + BATCH] for order in epochs for start in range(0, samples, BATCH)][:steps]


def run_bare(as_ours: bool, model, pool, steps: int, seed: int) -> tuple[float, torch.nn.Module]:
    """A loop by hand; the head on response tokens alone."""
    import contextlib

    from transformers import get_cosine_schedule_with_warmup

    from staff.models import anatomy, attention
    from staff.models.adapters import add_lora, joined_products
    from staff.models.finetune import GIVEN, step_of

    head = model.get_output_embeddings()
    model = add_lora(model, RANK, ALPHA, seed).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    clock = Clock()
    epochs = range(-(-steps * BATCH // len(pool)))
    sorted_steps = [step for epoch in epochs for step in of_like_length(pool.lengths, 1000 * seed + epoch)]
    with joined_products(model) if as_ours else contextlib.nullcontext():
        for places in our_steps(len(pool), steps, seed) if as_ours else sorted_steps[:steps]:
            step = step_of(pool, places, packs=as_ours)
            given = {name: step[name] for name in GIVEN if name in step}
            attending = attention.short_samples(step["lengths"]) if as_ours else contextlib.nullcontext()
            with torch.autocast("cpu", torch.bfloat16), attending:
                hidden = anatomy.final_states(model, **given, use_cache=False)
                logits = head(hidden[step["row"], step["before"]])
            torch.nn.functional.cross_entropy(logits.float(), step["response_ids"]).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.step(int(pool.lengths[places].sum()))
    return clock.rate(), model


def run_ours(model, pool, steps: int, seed: int) -> tuple[float, torch.nn.Module]:
    from staff.models.finetune import train_lora

    clock = Clock()
    in_batches = [int(pool.lengths[step].sum()) for step in our_steps(len(pool), steps, seed)]
    with tempfile.TemporaryDirectory() as folder:
        model = train_lora(
            model,
            pool,
            np.arange(len(pool)),
            Path(folder),
            epochs=1,
            max_steps=steps,
            batch_size=BATCH,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            learning_rate=RATE,
            warmup=WARMUP,
            seed=seed,
            on_progress=lambda done, total: clock.step(in_batches[done - 1]),
        )
    return clock.rate(), model


def measure_floor(model, pool) -> float:
    """Tokens/s if only the products of linear layers and adapters ran, each as fast as it does alone."""
    from staff.models import anatomy

    dtype = next(model.parameters()).dtype
    tokens, share = int(BATCH * pool.lengths.mean()), pool.response_tokens().sum() / pool.lengths.sum()
    shapes: dict[tuple[int, int, int, bool], int] = {}
    for block in anatomy.blocks(model):
        for module in block.modules():
            if anatomy.is_linear(module):
                outputs, inputs = anatomy.weight_shape(module)
                shapes[tokens, inputs, outputs, True] = shapes.get((tokens, inputs, outputs, True), 0) + 1
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    shapes[int(tokens * share), hidden, vocabulary, False] = 1
    seconds = 0.0
    for (rows, inputs, outputs, adapted), count in shapes.items():
        x, weight, grad = (
            torch.randn(shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        a, b, inner = (
            torch.randn(shape, dtype=dtype) for shape in ((RANK, inputs), (outputs, RANK), (rows, RANK))
        )
        products = [lambda x=x, w=weight: x @ w.mT, lambda g=grad, w=weight: g @ w]
        if adapted:
            products += [
                lambda x=x, a=a: x @ a.mT,
                lambda i=inner, b=b: i @ b.mT,
                lambda g=grad, b=b: g @ b,
                lambda i=inner, a=a: i @ a,
            ]
            products += [lambda x=x, i=inner: i.mT @ x, lambda g=grad, i=inner: i.mT @ g]
        seconds += count * sum(least_seconds(product) for product in products)
    return tokens / seconds


def least_seconds(work, times: int = 12) -> float:
    """The median of the faster half: what it takes when nobody is in the way."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return float(np.median(sorted(taken)[: times // 2]))


def run_row(row: str, arguments, data: str, seed: int) -> dict:
    from staff.data.tokens import tokenise

    torch.manual_seed(seed)
    model, tokenizer = load(arguments.model)
    examples = read(data, arguments.rows + HELD_OUT)
    whole_steps = (len(examples) - HELD_OUT) // BATCH * BATCH
    pool = tokenise(examples[HELD_OUT : HELD_OUT + whole_steps], tokenizer, LENGTH)
    if row == "floor":
        return {"rate": measure_floor(model, pool), "loss": None}
    steps = arguments.steps
    if row in ("transformers", "trl"):
        rate, model = run_library(row, model, tokenizer, pool, steps, seed)
    elif row == "ours":
        rate, model = run_ours(model, pool, steps, seed)
    else:
        rate, model = run_bare(row == "bare, ours", model, pool, steps, seed)
    return {"rate": rate, "loss": held_out_loss(model, tokenise(examples[:HELD_OUT], tokenizer, LENGTH))}


def table(found: dict, arguments) -> str:
    lines = []
    for data in arguments.data:
        lines += ["", f"`{Path(data).parent.name}/{Path(data).name}`", ""]
        lines += [
            "| row | tokens/s | of the bare loop | of the floor | loss after |",
            "| --- | --- | --- | --- | --- |",
        ]
        rates = {
            row: float(np.median([one["rate"] for one in found[data, row]]))
            for row in ROWS
            if (data, row) in found
        }
        for row in rates:
            losses = [one["loss"] for one in found[data, row] if one["loss"] is not None]
            loss = f"{np.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if losses else ""
            of_bare = f"{rates[row] / rates['bare']:.2f}" if "bare" in rates else ""
            of_floor = f"{rates[row] / rates['floor']:.0%}" if "floor" in rates else ""
            lines.append(f"| {row} | {rates[row]:.0f} | {of_bare} | {of_floor} | {loss} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help=f"rows to run, of {', '.join(ROWS)}; all where none is named"
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", default=["examples/medquad/train.jsonl"])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a row of its own process: JSON of row, data, seed
    arguments = parser.parse_intermixed_args()
    if arguments.one:
        one = json.loads(arguments.one)
        print("RESULT " + json.dumps(run_row(one["row"], arguments, one["data"], one["seed"])))
        return
    found: dict = {}
    for seed in arguments.seeds:
        for data in arguments.data:
            for row in arguments.names or ROWS:
                if row == "floor" and seed != arguments.seeds[0]:
                    continue
                command = [
                    sys.executable,
                    *sys.argv,
                    "--one",
                    json.dumps({"row": row, "data": data, "seed": seed}),
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
                if line is None:
                    raise SystemExit(f"{row} failed:\n{done.stderr[-3000:]}")
                result = json.loads(line[len("RESULT ") :])
                found.setdefault((data, row), []).append(result)
                print(
                    f"{Path(data).parent.name}, seed {seed}: {row}: {result['rate']:.0f} tokens/s, "
                    f"loss {result['loss']}",
                    flush=True,
                )
    text = table(found, arguments)
    print(text)
    if arguments.output:
        about = f"`{Path(arguments.model).name}`, {arguments.steps} steps of {BATCH} samples, "
        about += f"seeds {arguments.seeds}, "
        about += f"torch {torch.__version__}, {torch.get_num_threads()} threads"
        Path(arguments.output).write_text(f"# Fine-tuning\n\n{about}\n{text}\n")


if __name__ == "__main__":
    main()
