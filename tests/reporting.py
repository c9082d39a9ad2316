"""Finished runs for pages to be made of: real files, and scores from a formula in place of models."""

import json

import numpy as np

from staff.config import SelectConfig, to_yaml
from staff.data import rows as reading
from staff.files import write_csv, write_text
from staff.methods import METHODS
from staff.methods.fidelity import fidelity
from staff.runs import outputs
from staff.runs.aside import Aside
from staff.runs.store import open_run

HOSTILE = (
    "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'> {{7*7}} ${7*7} "
    "</textarea></script><!-- \u202eturned\u202c \x1b[31mred\x07 'quoted\" & <b>bold</b>"
)


def write_rows(path, n, words=20, **extra):
    """n rows of a prompt and a response, a few of them hostile.

    Args:
        extra: column -> function of the row number.
    """
    rng = np.random.default_rng(0)
    vocabulary = [f"word{i}" for i in range(500)]
    lines = []
    for i in range(n):
        said = " ".join(rng.choice(vocabulary, int(rng.integers(1, 2 * words))))
        row = {
            "id": f"r{i}",
            "prompt": f"Question {i}: {HOSTILE if i % 7 == 3 else 'why'}?",
            "response": said,
        }
        lines.append(json.dumps(row | {name: make(i) for name, make in extra.items()}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def finish_run(folder, data, noise=0.3, rate=0.8, **options):
    """A run of `staff` over a file, its draft's scores and its target's made up; as the pipeline leaves it.

    Args:
        noise: of the target's scores about the draft's.
    """
    config = SelectConfig(
        data=(str(data),), target="a/target", draft="a/draft", pruning_rate=(rate,), output=str(folder)
    )
    pool = reading.read(str(data))
    n, rng = len(pool), np.random.default_rng(1)
    scores = np.exp(rng.normal(1, 0.5, n)).astype(np.float32)
    target = (0.4 * scores * np.exp(rng.normal(0, noise, n))).astype(np.float32)
    selection = METHODS["staff"].select(
        n,
        budget=round((1 - rate) * n),
        rng=np.random.default_rng(0),
        scores=scores,
        verify=target.__getitem__,
        **options,
    )
    response = rng.integers(5, 200, n)
    values = {
        "effort": scores,
        "loss": scores / 2,
        "prompt_tokens": rng.integers(5, 60, n),
        "response_tokens": response,
    }
    about = {
        "score": "effort",
        "format": pool.format,
        "skipped": 0,
        "notes": [],
        "truncated": 3,
        "truncated_rows": [1, 2, 5],
    }
    if len(selection.verified):
        values["target_effort"] = np.full(n, np.nan, np.float32)
        values["target_effort"][selection.verified] = target[selection.verified]
        sizes = np.array([region.size for region in selection.regions])
        seen = selection.verified
        about["fidelity"] = fidelity(
            selection.region_of[seen], sizes, n, scores[seen], target[seen], response[seen]
        ).as_dict()
    every = np.arange(n)
    values |= {"region": selection.region_of, "verified": np.isin(every, selection.verified)}
    values |= {"weight": None, "selected": np.isin(every, selection.indices)}
    passes = {
        "score on the draft": ("score", "draft", 0.2, 60.0),
        "verify on the target": ("verify", "target", 0.1, 30.0),
    }
    stages = {
        name: {
            "kind": kind,
            "model": model,
            "part": "",
            "snapshot": "",
            "seconds": s,
            "passes": p,
            "tokens": 1e5,
        }
        for name, (kind, model, p, s) in passes.items()
    }
    cost = {
        "stages": stages,
        "seconds": 90.0,
        "passes": 0.3,
        "direct": {"passes": 1.0, "seconds": 300.0},
        "verdict": "the draft was the cheaper way",
    }
    with open_run(folder, "run") as run:
        contents = outputs.files.fingerprint([run.hash_file(path) for path in pool.paths])
        run.begin({}, {"data": contents}, False)
        write_text(run.path / "config.yaml", to_yaml(config))
        (coreset,) = outputs.coresets_of(config, run)
        about |= {"inputs": {"data": contents}, "settings": {"pick": "top"}, "seed": 42}
        return outputs.write(run, coreset, "key", config, Aside(pool), selection, values, cost, about)


def make_comparison(folder, tasks=("qa", "chat"), seeds=(1, 2)):
    """The results.csv of a comparison and its per-example files, numbers made up."""
    rng, lines = np.random.default_rng(3), []
    for task in tasks:
        ease = rng.normal(0, 5, 40)  # of a test row, for all methods
        cells = [("full data", "", seed) for seed in seeds] + [("untouched model", "", "")]
        cells += [
            (m, rate, seed) for seed in seeds for m in ("random", "staff", "ccs") for rate in (0.5, 0.8)
        ]
        for method, rate, seed in cells:
            place = folder / "cells" / task / f"{method}-{rate}-{seed}".replace(" ", "-")
            place.mkdir(parents=True)
            lift = {"staff": 3.0, "ccs": -3.0, "untouched model": -9.0}.get(method, 0.0)
            scores = 30 + lift + ease + rng.normal(0, 1, 40)
            rows = [{"rougeL": s, "loss": 3 - s / 30} for s in scores.tolist()]
            (place / "scores.jsonl").write_text(
                "".join(json.dumps({"row": i} | row) + "\n" for i, row in enumerate(rows))
            )
            passes = 2.0 if rate == "" else (1 - rate) * 6 + {"staff": 0.4, "ccs": 3.0}.get(method, 0.0)
            lines.append(
                [
                    task,
                    method,
                    rate,
                    seed,
                    100,
                    50,
                    0,
                    scores.mean(),
                    3 - scores.mean() / 30,
                    passes,
                    place.relative_to(folder),
                ]
            )
    header = [
        "task",
        "method",
        "pruning_rate",
        "seed",
        "n",
        "m",
        "verified",
        "rougeL",
        "loss",
        "total_passes",
        "folder",
    ]
    write_csv(folder / "results.csv", header, lines)
    return folder
