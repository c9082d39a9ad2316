"""Heal a draft cut out of SmolLM2-135M-Instruct: some of its first blocks and its last ones, with LoRA, so
that they say what the whole model says.

python experiments/fidelity/distil.py states | target | train [--front 13 --back 3 ...], in that order; works
in runs/distil, goes on where it was stopped. Learns from the MedQuAD rows of ${STAFF_DATA}/biomedical_qa (CC
BY 4.0; DATA.md) that are neither in the demo's pool nor in its test file. `--seconds` are the processor's.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from staff.data import rows
from staff.data.tokens import Pool, batches, collate, tokenise
from staff.methods.fidelity import fidelity, within
from staff.models import anatomy, drafts, files, load
from staff.models.adapters import joined_products
from staff.scoring import scopes
from staff.scoring.scorer import Scorer

GGUF, FOLDER = "examples/SmolLM2-135M-Instruct.gguf", Path("runs/distil")
TRAIN, TEST = Path("examples/medquad/train.jsonl"), Path("examples/medquad/test.jsonl")
SHARD, WINDOW, STEP_TOKENS, WARM_UP = 200, 64, 1024, 20
NOTHING = (np.nan,) * 3
WORDS = 8192  # the commonest of the responses, which probabilities are compared over


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=("states", "target", "train"))
    parser.add_argument("--front", type=int, default=13)
    parser.add_argument("--back", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--begin", type=Path, help="an earlier state to begin with")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--shards", type=int, default=4, help="of 200 rows to learn from")
    parser.add_argument("--seconds", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=250, help="of the demo's pool, to judge by")
    parser.add_argument("--score-at", type=int, nargs="*", default=[])
    args = parser.parse_args()
    {"states": states, "target": score_target, "train": train}[args.job](args)


def target() -> tuple[Any, Any]:
    """Model and tokenizer, in bfloat16."""
    source = load.unpack_gguf(files.resolve(GGUF), FOLDER / "target", torch.bfloat16)
    return load.load_model(source, torch.bfloat16, torch.device("cpu")), load.load_tokenizer(source)


def learning_pool(tokenizer: Any) -> Pool:
    """The rows to learn from, tokenised."""
    lines = [*TRAIN.read_text().splitlines()[:1000], *TEST.read_text().splitlines()]
    left_out = {json.loads(line)["id"] for line in lines}
    data = Path(os.path.expandvars("${STAFF_DATA}")) / "biomedical_qa" / "train.jsonl"
    medquad = [row for row in map(json.loads, data.open()) if row["source"].startswith("medquad")]
    return tokenise(rows.read([r for r in medquad if r["id"] not in left_out]).examples(), tokenizer, 512)


def states(args: argparse.Namespace) -> None:
    """Keep the target's last states of the rows, a shard a file."""
    model, tokenizer = target()
    pool, began = learning_pool(tokenizer), time.process_time()
    for shard in range(min(args.shards, -(-len(pool) // SHARD))):
        path = FOLDER / f"states-2-{shard:02d}.safetensors"
        if path.exists() or time.process_time() - began > args.seconds:
            continue
        places = np.arange(shard * SHARD, min(len(pool), (shard + 1) * SHARD))
        last: dict[int, torch.Tensor] = {}
        for batch in batches(pool.lengths[places], 2048):
            with torch.no_grad():
                told = anatomy.final_states(model, input_ids=collate(pool, places[batch]).input_ids)
            last |= {place: told[row, : pool.lengths[places[place]]] for row, place in enumerate(batch)}
        write(path, {"last": torch.cat([last[place] for place in range(len(places))])})
        print(f"shard {shard}: {time.process_time() - began:.0f} s", flush=True)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A file whole or absent."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def steps(pool: Pool) -> Iterator[np.ndarray]:
    """Batches of rows of like length out of random windows, for ever."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(pool))
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            cut = batches(pool.lengths[window], STEP_TOKENS)
            yield from (window[cut[place]] for place in rng.permutation(len(cut)))


def train(args: argparse.Namespace) -> None:
    """Bring the student's probabilities to the target's, those of the commonest words."""
    name = FOLDER / f"{args.front}-{args.back}-r{args.rank}-lr{args.lr:g}-{args.tokens}"
    name.mkdir(parents=True, exist_ok=True)
    model, tokenizer = target()
    pool = learning_pool(tokenizer)
    last = torch.cat([load_file(path)["last"] for path in sorted(FOLDER.glob("states-*.safetensors"))])
    pool = pool.take(np.arange(np.searchsorted(pool.offsets, len(last), "right") - 1))
    words = np.bincount(pool.input_ids[pool.is_response])
    words = np.sort(np.argsort(-words, kind="stable")[: min(WORDS, np.count_nonzero(words))])
    head = model.lm_head.weight[torch.from_numpy(words)].detach().clone()
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=linears, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    total = model.config.num_hidden_layers
    kept = [*range(args.front), *range(total - args.back, total)]
    tuned = get_peft_model(drafts.cut(model, kept), config)
    adapters = {key: parameter for key, parameter in tuned.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    seen, step, scored, state = 0, 0, list[int](), name / "state.pt.safetensors"
    if state.exists():
        stored = load_file(state)
        for key, parameter in adapters.items():
            parameter.data.copy_(stored[key])
            means = {"exp_avg": stored[f"{key}:m"], "exp_avg_sq": stored[f"{key}:v"]}
            optimizer.state[parameter] = {"step": stored["step"].float(), **means}
        seen, step, scored = int(stored["seen"]), int(stored["step"]), stored["scored"].tolist()
    elif args.begin:
        stored = load_file(args.begin)
        for key, parameter in adapters.items():
            parameter.data.copy_(stored[key])
    began, told, order = time.process_time(), list[float](), islice(steps(pool), step, None)
    offsets = torch.from_numpy(pool.offsets)
    while seen < args.tokens and time.process_time() - began < args.seconds:
        places = next(order)
        batch, lengths = collate(pool, places), torch.from_numpy(pool.lengths[places])
        rate = args.lr * min(1, (step + 1) / WARM_UP) * (1 - 0.95 * seen / args.tokens)
        optimizer.param_groups[0]["lr"] = rate
        with joined_products(tuned):
            mine = anatomy.final_states(tuned, input_ids=batch.input_ids, use_cache=False)
        of_target = torch.cat([last[offsets[place] : offsets[place + 1]] for place in places])
        starts = (lengths.cumsum(0) - lengths)[batch.sample_of]
        mine = log_softmax((mine[batch.sample_of, batch.before] @ head.T).float(), -1)
        theirs = log_softmax((of_target[starts + batch.before] @ head.T).float(), -1)
        loss = kl_div(mine, theirs, reduction="none", log_target=True).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
        seen, step = seen + int(lengths.sum()), step + 1
        told.append(loss.item())
        if step % 20 == 0:
            seconds = time.process_time() - began
            print(f"step {step} seen {seen} kl {np.mean(told[-20:]):.3f} {seconds:.0f} s", flush=True)
        due = [mark for mark in args.score_at if mark <= seen and mark not in scored]
        if due or seen >= args.tokens:
            scored += due
            report(tuned, tokenizer, f"{name.name} seen {seen}")
        if step % 50 == 0 or seen >= args.tokens or time.process_time() - began >= args.seconds:
            means = {
                f"{key}:{short}": optimizer.state[parameter][long]
                for key, parameter in adapters.items()
                for short, long in (("m", "exp_avg"), ("v", "exp_avg_sq"))
            }
            counts = {"seen": seen, "step": step, "scored": scored or [0]}
            numbers = {key: torch.tensor(value, dtype=torch.float64) for key, value in counts.items()}
            write(state, {**{key: p.data for key, p in adapters.items()}, **means, **numbers})
    tuned.save_pretrained(name)


def demo_pool(tokenizer: Any, count: int) -> Pool:
    return tokenise(islice(rows.read([TRAIN]).examples(), count), tokenizer, 512)


def efforts(model: nn.Module, pool: Pool) -> dict[str, torch.Tensor]:
    """Effort in both scopes, loss and length of each sample."""
    scorer = Scorer(model, "last-block", balance=True)  # the norm of each weight besides
    value = [site.name for site in scorer.sites].index(scopes.value_projection(model).name)
    scores = scorer.scores(pool, np.arange(len(pool)))
    norms = scores["site_norms"]
    arrays = {"last-value": norms[:, value].copy(), "last-block": scores["effort"]}
    arrays |= {"loss": scores["loss"], "response": pool.response_tokens()}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def score_target(args: argparse.Namespace) -> None:
    """Keep the target's efforts on the rows to judge by."""
    model, tokenizer = target()
    write(FOLDER / "target.safetensors", efforts(model, demo_pool(tokenizer, args.rows)))


def report(tuned: PeftModel, tokenizer: Any, name: str) -> None:
    """How faithful the student is, as it stands, over rows of the demo's pool; intervals as for a tenth of
    a pool, drawn at random."""
    theirs = {key: tensor.numpy() for key, tensor in load_file(FOLDER / "target.safetensors").items()}
    n = len(theirs["loss"])
    mine = efforts(deepcopy(tuned).merge_and_unload(), demo_pool(tokenizer, n))
    arrays = {key: tensor.numpy() for key, tensor in mine.items()}
    free = arrays["response"], arrays["loss"]
    print(f"FIDELITY {name}: loss {free[1].mean():.2f}, the target's {theirs['loss'].mean():.2f}", flush=True)
    for scope in ("last-value", "last-block"):
        told = fidelity(np.zeros(n, int), np.array([10 * n]), 10 * n, arrays[scope], theirs[scope], *free)
        rest, *beside = (within(part or NOTHING) for part in (told.without_length, told.length, told.loss))
        alone = f"length alone {beside[0]}, loss alone {beside[1]}"
        print(f"  {scope}: {told.verdict}, {told.shown()}, without length {rest}; {alone}", flush=True)


if __name__ == "__main__":
    main()
