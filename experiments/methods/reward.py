"""A reward model for want of one: `small` with one logit, that tells right answers from shuffled ones.

    python experiments/methods/reward.py    # after experiments/prepare.py; 2 minutes on one core

Leaves runs/reward, a sequence-classification model, and the pools with its judgement of every row in a
column: runs/data/*-600-quality.jsonl, `quality` = 1 / (1 + exp(-logit)). It is trained on rows that no pool
and no test file holds.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from staff.data import rows as formats
from staff.data.tokens import batches, tokenise

TASKS = {"medquad": "examples/medquad/train.jsonl", "wiki": "runs/data/wiki-train.jsonl"}
ROWS = slice(600, 1600)  # of each; the pools are the first 600
EPOCHS, BATCH, RATE = 2, 16, 1e-4
COLUMNS = "prompt=prompt,response=response,id=id"


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def shuffled(rows, rng):
    """The same rows, each with the answer of another."""
    order = rng.permutation(len(rows))
    others = np.empty_like(order)
    others[order] = np.roll(order, 1)
    return [row | {"response": rows[other]["response"]} for row, other in zip(rows, others, strict=True)]


def samples(rows, tokenizer):
    pool = tokenise(formats.read(rows, columns=COLUMNS).examples(), tokenizer, 512)
    return [torch.tensor(pool.ids(i)).long() for i in range(len(pool))]


def logits(model, ids):
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    known = torch.arange(padded.shape[1]) < torch.tensor([len(one) for one in ids])[:, None]
    return model(input_ids=padded, attention_mask=known.long()).logits[:, 0]


@torch.no_grad()
def judged(model, ids):
    found = np.empty(len(ids))
    for places in batches(np.array([len(one) for one in ids]), 4096):
        found[places] = logits(model, [ids[i] for i in places]).numpy()
    return found


def main():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    folder = Path(os.environ["STAFF_MODELS"]) / "small"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id or 0
    ids, labels = [], []
    for path in TASKS.values():
        right = lines(path)[ROWS]
        ids += samples(right + shuffled(right, rng), tokenizer)
        labels += [1.0] * len(right) + [0.0] * len(right)
    right_or_not = torch.nn.functional.binary_cross_entropy_with_logits
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    steps = EPOCHS * len(ids) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    order = np.concatenate([rng.permutation(len(ids)) for _ in range(EPOCHS)])
    model.train()
    for places in order[: steps * BATCH].reshape(steps, BATCH):
        told = torch.tensor([labels[i] for i in places])
        loss = right_or_not(logits(model, [ids[i] for i in places]), told)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    model.eval().save_pretrained("runs/reward")
    tokenizer.save_pretrained("runs/reward")
    for task in TASKS:
        right = lines(f"runs/data/{task}-validation.jsonl")
        of_right, of_wrong = (judged(model, samples(r, tokenizer)) for r in (right, shuffled(right, rng)))
        told = {
            "task": task,
            "right above 0": (of_right > 0).mean(),
            "shuffled above 0": (of_wrong > 0).mean(),
        }
        told |= {"right above its shuffled one": (of_right > of_wrong).mean()}
        print(json.dumps({name: str(value) for name, value in told.items()}))
        pool = lines(f"runs/data/{task}-600.jsonl")
        quality = 1 / (1 + np.exp(-judged(model, samples(pool, tokenizer))))
        text = "".join(
            json.dumps(row | {"quality": round(float(q), 6)}, ensure_ascii=False) + "\n"
            for row, q in zip(pool, quality, strict=True)
        )
        Path(f"runs/data/{task}-600-quality.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
