"""Does a selection take what was predicted? python experiments/cost/run.py > experiments/cost/RESULTS.md

1. `staff plan` on three tasks, then the work itself, stage by stage.
2. The sum (2 T f + 1) r + v for three pairs of models, beside what their runs took: operations and seconds.
3. What the sum says of the pairs of the paper.

Needs ${STAFF_DATA}, ${STAFF_MODELS} (DATA.md) and `python experiments/prepare.py`; take it on a machine that
does nothing else.
"""

import os
import shutil
import sys
from pathlib import Path

import staff
from staff import jobs
from staff import planning as plan
from staff.config import FinetuneConfig, PlanConfig, from_mapping
from staff.files import read_checked
from staff.planning import make_plan

TASKS = {
    "medquad": "runs/data/medquad-300.jsonl",
    "wiki": "runs/data/wiki-300.jsonl",
    "dialogue": "runs/data/dialogue-300.jsonl",
}
PAIRS = (("nano", "base"), ("small", "base"), ("nano", "small"))
SETTINGS = {"num_regions": 25, "verification_budget": 4, "draft_epochs": 1.0, "max_length": 512}
WORK = Path("runs/cost")

# of the models' own configurations: weights of the blocks' linear layers, and of the head, in billions
PAPER = {
    "Gemma-2b": (1.98, 0.524),
    "Gemma-7b": (7.75, 0.786),
    "Llama-2-7b": (6.48, 0.131),
    "Llama-2-13b": (12.69, 0.164),
    "Mistral-7B-v0.3": (6.98, 0.134),
    "Mistral-Nemo-12B": (10.91, 0.671),
    "Qwen2.5-3B": (2.77, 0.311),
    "Qwen2.5-7B": (6.53, 0.545),
    "Qwen2.5-14B": (13.21, 0.779),
    "Qwen2.5-32B": (31.21, 0.779),
}
PAPER_PAIRS = (
    ("Gemma-2b", "Gemma-7b"),
    ("Llama-2-7b", "Llama-2-13b"),
    ("Mistral-7B-v0.3", "Mistral-Nemo-12B"),
    ("Qwen2.5-3B", "Qwen2.5-32B"),
    ("Qwen2.5-7B", "Qwen2.5-32B"),
    ("Qwen2.5-14B", "Qwen2.5-32B"),
)
PAPER_POOL, PAPER_VERIFIED = 12_460, 500  # DialogSum's training rows; K x b_v at most
RESPONSES = 0.2  # share of tokens that the head meets


def model(name: str) -> str:
    return f"{os.environ['STAFF_MODELS']}/{name}"


def choose(task: str, draft: str, target: str) -> dict:
    """The stages of one run of `staff` and `direct`."""
    folder = WORK / f"{task}-{draft}-{target}"
    shutil.rmtree(folder, ignore_errors=True)
    runs = staff.select_grid(
        TASKS[task],
        target=model(target),
        draft=model(draft),
        methods=["staff", "direct"],
        pruning_rates=[0.8],
        output=str(folder),
        **SETTINGS,
    )
    return runs[0].cost


def planned(task: str) -> list[str]:
    models = {"data": TASKS[task], "target": model("base"), "draft": model("nano")}
    made = make_plan(from_mapping(PlanConfig, {**models, "epochs": 1.0, **SETTINGS}, "plan"))
    predicted = {row["method"]: row["stages"] for row in made["methods"]}
    expected = {
        **predicted["staff"],
        **predicted["direct"],
        "fine-tune the target on all": made["full_seconds"],
    }
    stages = choose(task, "nano", "base")["stages"]
    folder = WORK / f"{task}-all"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "data": TASKS[task],
        "model": model("base"),
        "epochs": 1.0,
        "max_length": 512,
        "output": str(folder),
    }
    jobs.finetune(from_mapping(FinetuneConfig, settings, "fine-tuning"))
    stages["fine-tune the target on all"] = (read_checked(folder / "manifest.json") or {})["cost"]
    lines = []
    for stage, seconds in expected.items():
        taken = stages[stage]["seconds"]
        lines.append(f"| {task} | {stage} | {seconds:.1f} | {taken:.1f} | {seconds / taken - 1:+.0%} |")
    sums = [
        sum(parts[stage] for stage in predicted["staff"])
        for parts in (expected, {s: stages[s]["seconds"] for s in expected})
    ]
    lines.append(
        f"| {task} | **choosing with staff, in all** "
        f"| {sums[0]:.1f} | {sums[1]:.1f} | {sums[0] / sums[1] - 1:+.0%} |"
    )
    return lines


def summed(draft: str, target: str) -> str:
    cost = choose("medquad", draft, target)
    stages, terms = cost["stages"], cost["sum"]
    own = [stages[name] for name in ("fine-tune the draft", "score on the draft", "verify on the target")]
    whole = stages["score on the target"]
    by_operations = sum(stage["flops"] for stage in own) / whole["flops"]
    by_clock = sum(stage["seconds"] for stage in own) / whole["seconds"]
    r_clock = stages["score on the draft"]["seconds"] / whole["seconds"]
    with_clock = plan.staff_passes(terms["epochs"], terms["share"], r_clock, terms["verified_share"])
    cells = [f"{terms['relative_cost']:.3f}", f"{terms['verified_share']:.3f}", f"{terms['passes']:.2f}"]
    cells += [
        f"{by_operations:.2f} ({terms['passes'] / by_operations - 1:+.0%})",
        f"{r_clock:.3f}",
        f"{with_clock:.2f}",
    ]
    cells.append(f"{by_clock:.2f} ({with_clock / by_clock - 1:+.0%})")
    return f"| {draft} for {target} | {' | '.join(cells)} |"


def of_the_paper(draft: str, target: str) -> str:
    def token(name: str) -> float:
        blocks, head = PAPER[name]
        return blocks + 2 * RESPONSES * head

    r, v = token(draft) / token(target), PAPER_VERIFIED / PAPER_POOL
    tuned, raw = plan.staff_passes(3, 1, r, v), plan.staff_passes(0, 1, r, v)
    cheaper = "direct" if tuned > 1 else "the draft"
    limit = plan.break_even(3, 1, v)
    return f"| {draft} for {target} | {r:.2f} | {tuned:.2f} | {raw:.2f} | {cheaper} | {limit:.2f} |"


def main() -> None:
    say = lambda line: print(line, flush=True)  # noqa: E731
    say("# Cost: predicted, summed, measured\n\n## `staff plan` against the work\n")
    say("`base` with draft `nano`, T = 1, seconds on this machine.\n")
    say("| task | stage | predicted | taken | off by |\n| --- | --- | ---: | ---: | ---: |")
    for task in TASKS:
        for line in planned(task):
            say(line)
    say(
        "\n## The sum against the work\n\n"
        "`medquad`, T = 1, f = 1; the cost of STAFF in passes of the target (U).\n"
    )
    say(
        "| pair | r by operations | v | the sum | operations counted "
        "| r by the clock | the sum with it | seconds taken |"
    )
    say("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for pair in PAIRS:
        say(summed(*pair))
    say(
        "\n## What the sum says of the paper's pairs\n\n"
        f"f = 1, v = {PAPER_VERIFIED} of {PAPER_POOL:,} samples; the target itself: 1.\n"
    )
    say(
        "| pair | r | T = 3 | T = 0 | cheaper at T = 3 | the draft pays below r |\n"
        "| --- | ---: | ---: | ---: | --- | ---: |"
    )
    for pair in PAPER_PAIRS:
        say(of_the_paper(*pair))


if __name__ == "__main__":
    sys.exit(main())
