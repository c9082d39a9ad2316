"""Several workers beside one: speed, what an engine costs a shard, memory; and selection on many scores.

    python benchmarks/scale.py workers [--rows 6000] [--rounds 3]     1 and 2 workers, alone and beside others
    python benchmarks/scale.py overhead [--shards 100]               what engines cost a shard
    python benchmarks/scale.py memory [--rows 1000000]               driver and workers, a stub for a model
    python benchmarks/scale.py select [--rows 20000000]              the method staff on stored scores
    python benchmarks/scale.py gpu                                   a worker a GPU, where there are several

Each prints a line of JSON. The model is a small random one (--width 64, 4 blocks), made here.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FORK = multiprocessing.get_context("fork")
WORDS = ["the", "cell", "takes", "sugar", "and", "gives", "off", "heat", "while", "light", "falls", "on"]


def make_inputs(folder: Path, rows: int, width: int, words: int) -> None:
    """A random model, its tokenizer of whole words, and a pool."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    shape = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, bos_token_id=1, eos_token_id=1, **shape)).save_pretrained(
        folder / "m"
    )
    made.save_pretrained(folder / "m")
    rng, lines = np.random.default_rng(0), []
    for _ in range(1000):
        told = [" ".join(rng.choice(WORDS, rng.integers(words // 2, words))) for _ in range(2)]
        lines.append(json.dumps({"prompt": told[0], "response": told[1]}) + "\n")
    with open(folder / "pool.jsonl", "w") as file:
        file.writelines(lines[row % len(lines)] for row in range(rows))


def rate(folder: Path, **settings) -> float:
    """Rows a second of a scoring pass, from the first rows that are done to the last."""
    receive, send = FORK.Pipe(duplex=False)

    def work() -> None:
        from staff import jobs
        from staff.config import ScoreConfig, from_mapping

        times: list[tuple[float, int]] = []

        def tell(stage: str, done: int, total: int) -> None:
            if stage.startswith("score"):
                times.append((time.monotonic(), done))

        plain = {"data": (str(folder / "pool.jsonl"),), "model": str(folder / "m"), "dtype": "float32"}
        with tempfile.TemporaryDirectory() as output:
            plain["output"] = f"{output}/scores.parquet"
            jobs.score(from_mapping(ScoreConfig, {**plain, **settings}, "benchmark"), on_progress=tell)
        (began, first), (ended, last) = times[0], times[-1]
        send.send((last - first) / (ended - began))
        os._exit(0)

    process = FORK.Process(target=work)
    process.start()
    found = receive.recv()
    process.join()
    return found


def busy() -> subprocess.Popen:
    """Another program that multiplies matrices on all cores."""
    code = "import numpy as np\na = np.ones((600, 600))\nwhile True: a @ a"
    return subprocess.Popen([sys.executable, "-c", code])


def workers(given: argparse.Namespace, folder: Path) -> dict:
    """1 worker of 1 thread, 2 of 1, 1 of 2, in alternation; then the last two beside a busy program."""
    make_inputs(folder, given.rows, given.width, 40)
    ways = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2)}
    found: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for name, (number, threads) in ways.items():
            found.setdefault(name, []).append(rate(folder, workers=number, threads=threads))
    for _ in range(given.rounds):
        other = busy()
        try:
            for name in ("1x1", "1x2", "2x1"):
                number, threads = ways[name]
                found.setdefault(f"{name} beside", []).append(rate(folder, workers=number, threads=threads))
        finally:
            other.kill()
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    return {
        "rows_a_second": {name: [round(r) for r in rates] for name, rates in found.items()},
        "2x1 over 1x1": round(
            statistics.median(b / a for a, b in zip(found["1x1"], found["2x1"], strict=True)), 2
        ),
        "2x1 over 1x2": round(
            statistics.median(b / a for a, b in zip(found["1x2"], found["2x1"], strict=True)), 2
        ),
        "kept beside": {name: round(middle[f"{name} beside"] / middle[name], 2) for name in ways},
        "load": os.getloadavg()[0],
    }


def overhead(given: argparse.Namespace, folder: Path) -> dict:
    """Seconds a shard beyond those of one process: little is to be done, so nearly all is the engine's."""
    from staff.scoring import shards

    shards.SHARD = 4
    make_inputs(folder, 4 * given.shards, 16, 6)
    plain = {"threads": 1}
    engines = {"in process": {}, "local": {"workers": 1}, "ray": {"workers": 1, "engine": "ray"}}
    seconds = {name: 4 / rate(folder, **plain, **of) for name, of in engines.items()}
    return {
        "seconds_a_shard": {name: round(value, 4) for name, value in seconds.items()},
        "share_of_10_s": {
            name: round((seconds[name] - seconds["in process"]) / 10, 4) for name in ("local", "ray")
        },
        "load": os.getloadavg()[0],
    }


def memory(given: argparse.Namespace, folder: Path) -> dict:
    """The peak of driver and workers, a stub in place of the model."""
    from staff import jobs
    from staff.config import ScoreConfig, from_mapping
    from staff.runs import crew, pieces, worker
    from staff.types import OF_ONE_PASS

    make_inputs(folder, given.rows, 16, given.words)

    class Stub:
        tokens_borne = 4096

        def scores(self, pool, positions, *_, **__):
            return {name: np.sin(positions).astype(np.float32) for name in OF_ONE_PASS}

    class Forked:
        def __init__(self, path, name, rank, count, threads):
            def begin():
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
                worker.work(Path(path), {"pass": pieces.open_offer}, name, 600)
                os._exit(0)

            self._process = FORK.Process(target=begin)
            self._process.start()
            self.poll, self.kill = lambda: self._process.exitcode, self._end

        def _end(self) -> None:
            peaks.append(peak(self._process.pid))
            self._process.kill()

    def peak(process: int | str) -> int:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024

    peaks: list[int] = []
    pieces.Pieces.scorer = lambda self, *_: Stub()
    pieces.Pieces._spend_pass = lambda *_: None
    crew.launch = Forked
    plain = {
        "data": (str(folder / "pool.jsonl"),),
        "model": str(folder / "m"),
        "output": str(folder / "s.parquet"),
    }
    began = time.monotonic()
    jobs.score(from_mapping(ScoreConfig, {**plain, "workers": 2, "threads": 1}, "benchmark"))
    mb = {"driver": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "workers": peaks}
    return {
        "rows": given.rows,
        "tokens_a_row": given.words * 1.5,
        "peak_MB": mb,
        "seconds": round(time.monotonic() - began),
    }


def select(given: argparse.Namespace, folder: Path) -> dict:
    """STAFF's selection on stored scores, verification a table look-up."""
    from staff.methods import METHODS

    rng = np.random.default_rng(0)
    scores = rng.gamma(2.0, 1.0, given.rows).astype(np.float32)
    began = time.monotonic()
    selection = METHODS["staff"].select(
        given.rows,
        budget=given.rows // 5,
        rng=rng,
        scores=scores,
        verify=lambda at: scores[at] * np.float32(1.5),
    )
    seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "rows": given.rows,
        "kept": len(selection.indices),
        "seconds": round(seconds, 1),
        "peak_GB": round(peak, 1),
    }


def gpu(given: argparse.Namespace, folder: Path) -> dict:
    """A worker a GPU beside one on one GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "there is no GPU here"}
    make_inputs(folder, given.rows, 1024, 200)
    count = torch.cuda.device_count()
    one, all_of_them = (rate(folder, workers=number, threads=1, device="cuda") for number in (1, count))
    return {"gpus": count, "device": torch.cuda.get_device_name(), "rows_a_second": [one, all_of_them]}


PARTS = {"workers": workers, "overhead": overhead, "memory": memory, "select": select, "gpu": gpu}
ROWS = {"workers": 6000, "memory": 1_000_000, "select": 20_000_000, "gpu": 20_000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--words", type=int, default=40, help="of a prompt and of a response, at most")
    given = parser.parse_args()
    given.rows = given.rows or ROWS.get(given.part, 0)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({given.part: PARTS[given.part](given, Path(folder))}))


if __name__ == "__main__":
    main()
