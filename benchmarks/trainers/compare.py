"""Holds what three trainers train on against what was scored, row by row; writes tables to docs/trainers.md.

`make trainers` makes their environments and runs this. A tiny random model with a tokenizer of bytes, and
pools of every kind of row. What is compared is each trainer's own tokens and labels, as they come out of its
collator, its recipe, and its loss in the first of three steps beside that of `staff finetune`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from family import make_tokenizer
from staff import jobs
from staff.config import FinetuneConfig, Reading
from staff.data.export import write_train
from staff.data.rows import read
from staff.data.tokens import tokenise
from test_export import CASES

ROOT = Path(__file__).parents[2]
FILES = {"trl": "with_trl.py", "llama-factory": "llama_factory.yaml", "axolotl": "axolotl.yaml"}
BEGINS, ENDS = "<!-- measured: make trainers -->", "<!-- end -->"
RECIPE = {
    **{"learning_rate": 1e-4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    **{"num_train_epochs": 3, "weight_decay": 0, "max_grad_norm": 1, "seed": 42},
    **{"rank": 8, "alpha": 16, "dropout": 0},
}


def make(folder: Path, case: str) -> None:
    """A model, the files handed out, and in ours.json what was scored and the losses of three steps."""
    given, template, settings = CASES[case]
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(vocab_size=260, max_position_embeddings=4096, **shape, **ends)
    model, data = folder / "model", folder / "pool.jsonl"
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    reading = Reading(**settings)
    rows = read(data, **reading.keywords())
    pool = tokenise(rows.examples(), tokenizer, reading.max_length, reading=reading)
    every = np.arange(len(rows))
    write_train(folder / "train", rows, every, str(model), reading, tokenizer, pool)
    tuned = FinetuneConfig(data=(str(data),), model=str(model), output=str(folder / "tuned"), reading=reading)
    log = (jobs.finetune(tuned) / "log.jsonl").read_text().splitlines()
    labels = [np.where(pool.response(i), pool.ids(i), -100).tolist() for i in every]
    ours = {
        "rows": [{"input_ids": pool.ids(i).tolist(), "labels": labels[i]} for i in every],
        "losses": [json.loads(line)["loss"] for line in log],
    }
    (folder / "train" / "ours.json").write_text(json.dumps(ours))


def differences(ours: dict[str, Any], found: dict[str, Any], tokenizer: Any) -> list[str]:
    """What a trainer's rows are other than ours in, in words; the first of its kind stands for all rows."""
    if "error" in found:
        return [f"stopped: {found['error']}"]
    said: dict[str, str] = {}
    if len(found["rows"]) != len(ours["rows"]):
        said["rows"] = f"{len(found['rows'])} rows, not {len(ours['rows'])}"
    sent, scored = (sorted(each["rows"], key=lambda row: row["input_ids"]) for each in (found, ours))
    for theirs, own in zip(sent, scored, strict=False):  # Axolotl shuffles
        ids, labels, n = theirs["input_ids"], theirs["labels"], len(own["input_ids"])
        if ids[:n] != own["input_ids"]:
            said["tokens"] = (
                f"other text: {tokenizer.decode(ids)!r} for {tokenizer.decode(own['input_ids'])!r}"
            )
        elif ids[n:]:
            behind = "trained on" if any(label != -100 for label in labels[n:]) else "not trained on"
            said["behind"] = f"{tokenizer.decode(ids[n:])!r} behind the last turn, {behind}"
        wrong = [i for i in range(1, min(n, len(ids))) if (labels[i] == -100) != (own["labels"][i] == -100)]
        if wrong and "tokens" not in said:
            added = tokenizer.decode([ids[i] for i in wrong if labels[i] != -100])
            lost = tokenizer.decode([ids[i] for i in wrong if labels[i] == -100])
            said["labels"] = f"trains on {added!r} too" if added else f"does not train on {lost!r}"
    step, own_step = found["losses"][0], ours["losses"][0]
    if not said and abs(step - own_step) > 1e-3:
        said["loss"] = f"the loss of the first step is {step:.4f}, ours {own_step:.4f}"
    return list(said.values())


def recipe_differences(found: dict[str, Any]) -> list[str]:
    recipe = found.get("recipe", {})
    return [
        f"{name} {recipe[name]}"
        for name, value in RECIPE.items()
        if name in recipe and float(recipe[name]) != value
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "out" / "trainers"))
    parser.add_argument("--envs", default=str(ROOT / "benchmarks" / ".envs"))
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--trainers", nargs="*", default=list(FILES))
    given = parser.parse_args()
    output = Path(given.output).absolute()
    shutil.rmtree(output, ignore_errors=True)
    folders = {case: output / re.sub(r"\W+", "-", case) for case in given.cases}
    for case, folder in folders.items():
        make(folder, case)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told: dict[str, dict[str, str]] = {case: {} for case in folders}
    versions, recipes = {}, {}
    for trainer in given.trainers:
        python, file = Path(given.envs).absolute() / trainer / "bin" / "python", FILES[trainer]
        wanted = [folder / "train" for folder in folders.values() if (folder / "train" / file).exists()]
        with open(output / f"{trainer}.log", "w") as log:
            command = [python, Path(__file__).with_name("spy.py"), trainer, *wanted]
            subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
        for case, folder in folders.items():
            path = folder / "train" / f"{trainer}.json"
            if not path.exists():
                told[case][trainer] = "not handed out" if folder / "train" not in wanted else "stopped"
                continue
            ours, found = (json.loads(p.read_text()) for p in (folder / "train" / "ours.json", path))
            tokenizer = make_tokenizer(CASES[case][1])
            told[case][trainer] = "; ".join(differences(ours, found, tokenizer)) or "equal"
            versions[trainer] = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
            if "recipe" in found:
                recipes.setdefault(trainer, "; ".join(recipe_differences(found)) or "equal")
    lines = [f"| rows | {' | '.join(given.trainers)} |", "| --- |" + " --- |" * len(given.trainers)]
    for case, cells in told.items():
        shown = " | ".join(
            cells[trainer].replace("|", "\\|").replace("\n", "\\n") for trainer in given.trainers
        )
        lines.append(f"| {case} | {shown} |")
    lines += [
        "",
        *(f"* {trainer}: {text}; recipe {recipes.get(trainer)}" for trainer, text in versions.items()),
    ]
    lines += [f"* Python {platform.python_version()}, {platform.machine()}, no GPU"]
    table = "\n".join(lines)
    print(table)
    page = ROOT / "docs" / "trainers.md"
    if list(given.cases) == list(CASES) and list(given.trainers) == list(FILES) and page.exists():
        text = page.read_text(encoding="utf-8")
        before, after = text.split(BEGINS)[0], text.split(ENDS)[1]
        page.write_text(f"{before}{BEGINS}\n{table}\n{ENDS}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
