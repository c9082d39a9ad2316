"""One row of benchmarks/scoring.py, in a process of its own: python benchmarks/scoring_row.py CASE FOLDER

CASE is JSON; FOLDER holds the pool and takes what is found: answer.json, and scores as NAME.npy.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import rivals
import torch

from staff.data.tokens import Pool, batches
from staff.models import anatomy
from staff.models.load import load_model, resolve
from staff.scoring.gradnorm import CHUNK_BYTES, Site
from staff.scoring.prefix import length_of
from staff.scoring.scorer import Scorer
from staff.scoring.shards import make_shards, score_by_shards, shards_of

LONG = 2048  # tokens of the sample whose memory is measured
Q_K_V = ("q_proj", "k_proj", "v_proj")  # what nothing flows back through


def resident(what: str) -> int:
    """Bytes that this process holds ("VmRSS") or held at most ("VmHWM")."""
    return int(Path("/proc/self/status").read_text().partition(what + ":")[2].split()[0]) * 1024


def load(folder: str, dtype: str):
    """The model, its weights used once, and the bytes that the process then holds; the peak begins anew."""
    model = load_model(resolve(folder), getattr(torch, dtype), torch.device("cpu"))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 19)[None], use_cache=False)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return model, resident("VmRSS")


def load_pool(path: Path) -> Pool:
    with np.load(path) as arrays:
        return Pool(**arrays)


def run_rival(case: dict, folder: Path) -> dict:
    """Time one way to score the pool; its scores, and ours where it takes others, go into files."""
    pool = load_pool(folder / "pool.npz")
    model, before = load(case["model"], case["dtype"])
    score = getattr(rivals, case["function"])(model, pool, case["batch_tokens"], **case["options"])
    positions = np.arange(len(pool))
    cut = batches(pool.lengths, case["batch_tokens"])
    for part in (cut[0], cut[-1]):
        score(part)
    start, used = time.perf_counter(), time.process_time()
    scores = score(positions)
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    found |= {
        "peak_bytes": resident("VmHWM") - before,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if case["scores"]:
        np.save(folder / f"{case['name']}.npy", scores)
    if hasattr(score, "sketch") and case["compare"]:
        model, _ = load(case["model"], "float32")
        scorer = Scorer(model, "last-value")
        scorer.sites = [Site(site.module, site.rows, site.name, score.sketch) for site in scorer.sites]
        np.save(
            folder / f"{case['name']}-reference.npy",
            scorer.scores(pool, positions, case["batch_tokens"])["effort"],
        )
    return found


def run_oracle(case: dict, folder: Path) -> dict:
    model, _ = load(case["model"], "float64")
    np.save(
        folder / "oracle.npy",
        rivals.oracle(model, load_pool(folder / "pool.npz"), 0)(np.arange(case["rows"])),
    )
    return {}


def run_memory(case: dict, folder: Path) -> dict:
    """The peak while one sample of LONG tokens is scored, all but its first a response: the most there is."""
    ids = np.resize(load_pool(folder / "pool.npz").input_ids, LONG)
    pool = Pool(ids, np.arange(LONG) > 0, np.array([0, LONG]))
    model, before = load(case["model"], case["dtype"])
    start = time.perf_counter()
    rivals.ours(model, pool, LONG, case["scope"])(np.arange(1))
    return {"seconds": time.perf_counter() - start, "peak_bytes": resident("VmHWM") - before}


def run_floor(case: dict, folder: Path) -> dict:
    """Seconds that the products of the default scope take at the speed of plain ones."""
    pool = load_pool(folder / "pool.npz")
    model, _ = load(case["model"], case["dtype"])
    dtype = model.dtype
    cut = batches(pool.lengths, case["batch_tokens"])
    batch = int(np.median([len(part) * pool.lengths[part].max() for part in cut]))
    tokens = int(pool.lengths.sum()) - (len(pool) - 1) * length_of(
        pool
    )  # what all samples begin with needs to be read once
    responses = int(pool.response_tokens().sum())
    every = [
        [(name, anatomy.weight_shape(m)) for name, m in block.named_modules() if anatomy.is_linear(m)]
        for block in anatomy.blocks(model)
    ]
    head = model.get_output_embeddings().weight
    products = [(shape, batch, False, tokens) for block in every for _, shape in block]
    products += [(shape, batch, True, tokens) for name, shape in every[-1] if not name.endswith(Q_K_V)]
    chunk = min(max(1, CHUNK_BYTES // (len(head) * 4)), responses)
    products += [(tuple(head.shape), chunk, back, responses) for back in (False, True)]

    def rate(shape, rows, back):
        """Operations a second of (rows, I) x (I, O), or of (rows, O) x (O, I) on the way back."""
        weight = torch.randn(shape, dtype=dtype)
        given = torch.randn(rows, shape[0 if back else 1], dtype=dtype)
        seconds = []
        while len(seconds) < 5 or sum(seconds) < 0.5:
            start = time.perf_counter()
            _ = given @ weight if back else torch.nn.functional.linear(given, weight)
            seconds.append(time.perf_counter() - start)
        return 2 * rows * weight.numel() / float(np.median(seconds[1:]))

    with torch.no_grad():
        rates = {product: rate(*product) for product in dict.fromkeys(product[:3] for product in products)}
    operations = sum(2 * count * shape[0] * shape[1] for shape, _, _, count in products)
    seconds = sum(
        2 * count * shape[0] * shape[1] / rates[shape, rows, back] for shape, rows, back, count in products
    )
    listed = [
        {"shape": list(s), "rows": rows, "back": back, "gflops": rates[s, rows, back] / 1e9}
        for s, rows, back in rates
    ]
    return {"seconds": seconds, "operations": operations, "rates": listed}


def run_scaling(case: dict, folder: Path) -> dict:
    """Score n samples in shards, as the tool does."""
    pool = load_pool(folder / "pool.npz")
    model, before = load(case["model"], case["dtype"])
    scorer = Scorer(model, "last-value")
    scorer.scores(pool, np.argsort(-pool.lengths, kind="stable")[:1])
    start = time.perf_counter()
    make = lambda: (partial(scorer.scores, pool), case["batch_tokens"])  # noqa: E731
    with tempfile.TemporaryDirectory() as shards:
        path = Path(shards) / "scores.npz"
        of = shards_of(pool.lengths, path)
        score_by_shards(of, path, lambda missing: make_shards(make, of, missing))
    return {"seconds": time.perf_counter() - start, "peak_bytes": resident("VmHWM") - before}


RUNS = {
    "rival": run_rival,
    "oracle": run_oracle,
    "memory": run_memory,
    "floor": run_floor,
    "scaling": run_scaling,
}


if __name__ == "__main__":
    case, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    found = RUNS[case["kind"]](case, folder)
    (folder / "answer.json").write_text(json.dumps(found))
