"""Efforts of whole pools on drafts and target, for the studies of fidelity and of verification.

python experiments/fidelity/efforts.py [TASK/MODEL ...] writes runs/fidelity/TASK-MODEL.npz: effort in both
scopes, loss, tokens of the response, and what a pass costs; what is there is not done again. Needs
${STAFF_DATA} and ${STAFF_MODELS} (DATA.md), and `make demo`'s model for TASK/smollm2 and its self-made
drafts.
"""

import os
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from staff.data import rows
from staff.data.tokens import tokenise
from staff.models import drafts, files, load
from staff.scoring import scopes
from staff.scoring.scorer import Scorer

ROWS, ROWS_SMOLLM2 = 2000, 500
TASKS = {
    "medquad": "examples/medquad/train.jsonl",
    "biomedical": "${STAFF_DATA}/biomedical_qa/train.jsonl",
    "dialogue": "${STAFF_DATA}/dialogue_summarization/train.jsonl",
    "translation": "${STAFF_DATA}/translation_turkic_en/train.jsonl",
    "wiki": "${STAFF_DATA}/wiki_paraphrase/train.jsonl",
}
GGUF = "examples/SmolLM2-135M-Instruct.gguf"
MODELS = {  # name -> where it is, blocks kept
    "base": ("${STAFF_MODELS}/base", None),
    "small": ("${STAFF_MODELS}/small", None),
    "nano": ("${STAFF_MODELS}/nano", None),
    "base-self2": ("${STAFF_MODELS}/base", 2),
    "base-self4": ("${STAFF_MODELS}/base", 4),
    "smollm2": (GGUF, None),
    "smollm2-self2": (GGUF, 2),
    "smollm2-self4": (GGUF, 4),
    "smollm2-self8": (GGUF, 8),
}
WANTED = [
    f"{t}/{m}"
    for m in ("base", "nano", "small", "base-self2", "base-self4")
    for t in TASKS
    if t != "biomedical"
]
WANTED += [f"medquad/{m}" for m in MODELS if m.startswith("smollm2")]


def main() -> None:
    folder = Path("runs/fidelity")
    folder.mkdir(parents=True, exist_ok=True)
    for wanted in sys.argv[1:] or WANTED:
        task, name = wanted.split("/")
        path = folder / f"{task}-{name}.npz"
        if path.exists():
            continue
        where, blocks = MODELS[name]
        source = files.resolve(os.path.expandvars(where))
        dtype = (
            torch.bfloat16
            if where == GGUF and load.pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
            else torch.float32
        )
        if source.gguf:
            unpacked = folder / "unpacked"
            unpacked.mkdir(exist_ok=True)
            source = load.unpack_gguf(source, unpacked, dtype)
        model = load.load_model(source, dtype, torch.device("cpu"), False)
        model = drafts.cut(model, blocks) if blocks else model
        examples = list(
            islice(
                rows.read([os.path.expandvars(TASKS[task])]).examples(),
                ROWS_SMOLLM2 if where == GGUF else ROWS,
            )
        )
        pool = tokenise(examples, load.load_tokenizer(source, False), 512)
        size = load.measure(model)
        tokens, response = pool.lengths, pool.response_tokens()
        scorer = Scorer(model, "last-block", balance=True)
        value = [site.name for site in scorer.sites].index(scopes.value_projection(model).name)
        began = time.perf_counter()
        scores = scorer.scores(pool, np.arange(len(pool)), features=True)
        seconds = time.perf_counter() - began
        arrays = {
            "last-value": scores["site_norms"][:, value],
            "last-block": scores["effort"],
            "loss": scores["loss"],
            "entropy": scores["entropy"],
            "features": scores["features"].astype(np.float16),
            "tokens": tokens,
            "response": response,
            "flops": size.scoring_flops(int(tokens.sum()), int(response.sum())),
        }
        np.savez(path.with_suffix(".part.npz"), **arrays)
        path.with_suffix(".part.npz").rename(path)
        print(f"{wanted}: {len(pool)} rows in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
