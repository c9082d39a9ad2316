"""Several workers beside one: speed, what an engine costs a shard, memory; and selection on many scores.

    python benchmarks/scale.py workers [--rows 2048] [--rounds 2]     1 and 2 workers, alone and beside others
    python benchmarks/scale.py overhead [--shards 8] [--seconds 10]   what engines cost a shard of so long
    python benchmarks/scale.py memory [--rows 1000000]               driver and workers, a stub for a model
    python benchmarks/scale.py select [--rows 20000000]              the method staff on stored scores
    python benchmarks/scale.py gpu                                   a worker a GPU, where there are several

Each prints a line of JSON, and takes less than 4 minutes on 2 quiet cores. The model is a small random one
(--width 64, 4 blocks) and the rows are made up, where --model and --data name no others.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

BEGAN = time.monotonic()
FORK = multiprocessing.get_context("fork")
WORDS = ["the", "cell", "takes", "sugar", "and", "gives", "off", "heat", "while", "light", "falls", "on"]


def make_inputs(given: argparse.Namespace, folder: Path, rows: int, width: int, words: int) -> None:
    """A random model, its tokenizer of whole words, and a pool; or those that are named."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *sorted(set(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    torch.set_num_threads(1)  # no threads before the forks
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
    if given.model:
        shutil.rmtree(folder / "m")
        shutil.copytree(given.model, folder / "m")
    rng, lines = np.random.default_rng(0), []
    if given.data:
        lines = Path(given.data).read_text().splitlines(keepends=True)
    for _ in range(0 if lines else 1000):
        told = [" ".join(rng.choice(WORDS, rng.integers(words // 2, words))) for _ in range(2)]
        lines.append(json.dumps({"prompt": told[0], "response": told[1]}) + "\n")
    with open(folder / "pool.jsonl", "w") as file:
        file.writelines(lines[row % len(lines)] for row in range(rows))


def rate(folder: Path, **settings) -> float:
    """Rows a second of a scoring pass, from the first rows that are done to the last."""
    (began, first), *_, (ended, last) = progress(folder, **settings)
    found = (last - first) / (ended - began)
    print(f"{settings}: {found:.1f} rows a second, {time.monotonic() - BEGAN:.0f} s in", file=sys.stderr)
    return found


def progress(folder: Path, fork: bool = True, **settings) -> list[tuple[float, int]]:
    """When a scoring pass said that how many rows were done.

    Args:
        fork: the driver is a process of its own.
    """
    receive, send = FORK.Pipe(duplex=False)

    def work() -> None:
        from staff import jobs
        from staff.config import ScoreConfig, from_mapping
        from staff.runs import crew

        crew.launch = Forked
        times: list[tuple[float, int]] = []

        def tell(stage: str, done: int, total: int) -> None:
            if stage.startswith("score"):
                times.append((time.monotonic(), done))

        plain = {"data": (str(folder / "pool.jsonl"),), "model": str(folder / "m"), "dtype": "float32"}
        with tempfile.TemporaryDirectory() as output:
            plain["output"] = f"{output}/scores.parquet"
            jobs.score(from_mapping(ScoreConfig, {**plain, **settings}, "benchmark"), on_progress=tell)
        send.send(times)
        if fork:
            os._exit(0)

    if not fork:
        work()
        return receive.recv()
    process = FORK.Process(target=work)
    process.start()
    send.close()  # one that fails ends the wait
    found = receive.recv()
    process.join()
    return found


def busy() -> subprocess.Popen:
    """Another program that multiplies matrices on all cores."""
    code = "import numpy as np\na = np.ones((600, 600))\nwhile True: a @ a"
    return subprocess.Popen([sys.executable, "-c", code])


class Forked:
    """A worker as `crew.launch` starts it, without importing everything again."""

    def __init__(self, path, name, rank, count, threads):
        def begin():
            from staff.runs import pieces, worker

            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
            worker.work(Path(path), pieces.OPENERS, name, 600)
            os._exit(0)

        self._process = FORK.Process(target=begin)
        self._process.start()

    def poll(self):
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def workers(given: argparse.Namespace, folder: Path) -> dict:
    """1 worker of 1 thread, 2 of 1, 1 of 2, in alternation; then the same beside a busy program."""
    from staff.scoring import shards

    shards.SHARD = 128
    make_inputs(given, folder, given.rows, given.width, 40)
    ways = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2)}
    found: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for name, (number, threads) in ways.items():
            found.setdefault(name, []).append(rate(folder, workers=number, threads=threads))
    beside = argparse.Namespace(**{**vars(given), "data": folder / "pool.jsonl"})
    make_inputs(beside, folder / "b", given.rows // 4, given.width, 40)
    for _ in range(given.rounds):
        other = busy()
        try:
            for name, (number, threads) in ways.items():
                rates = found.setdefault(f"{name} beside", [])
                rates.append(rate(folder / "b", workers=number, threads=threads))
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


def stand_in(seconds: float = 0.0) -> None:
    """A stub in place of every model, which takes so long over a shard."""
    from staff.models import load
    from staff.runs import pieces
    from staff.types import OF_ONE_PASS

    class Stub:
        tokens_borne = 4096

        def scores(self, pool, positions, tokens=None, on_samples=None, **_):
            time.sleep(seconds)
            if on_samples:
                on_samples(len(positions))
            return {name: 2 + np.sin(positions, dtype=np.float32) for name in OF_ONE_PASS}

    pieces.Pieces.scorer = lambda *_: Stub()
    pieces.Pieces._size = lambda *_: load.Size(1000, 500, 200)


def overhead(given: argparse.Namespace, folder: Path) -> dict:
    """What a shard of so many seconds takes beyond them, with 2 workers, from their first to their last."""
    from staff.scoring import shards

    shards.SHARD = 4
    stand_in(given.seconds)
    make_inputs(given, folder, 4 * given.shards, 16, 6)
    beyond = {}
    for engine in given.engines:
        if engine == "ray":
            os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0"}
            import ray

            from staff.runs.on_ray import start_here

            hook = {"worker_process_setup_hook": lambda: stand_in(given.seconds)}
            here = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False}
            start_here(ray.init, num_cpus=2, runtime_env=hook, **here)
        told = progress(folder, workers=2, threads=1, engine=engine, fork=engine != "ray")
        first, last = (next(at for at, done in told if done >= rows) for rows in (8, 4 * given.shards))
        beyond[engine] = (last - first) / (given.shards // 2 - 1) - given.seconds
    return {
        "seconds_a_shard": given.seconds,
        "beyond": {engine: round(value, 3) for engine, value in beyond.items()},
        "share": {engine: round(value / given.seconds, 4) for engine, value in beyond.items()},
        "load": os.getloadavg()[0],
    }


def held(process: int, what: str = "VmHWM") -> int:
    """MB that a process held at most, files that it looked at counted; "RssAnon": what is its own now."""
    told = Path(f"/proc/{process}/status").read_text()
    return int(told.partition(f"{what}:")[2].split()[0]) // 1024


class Fresh:
    """A worker with a stub for a model, in a process that shares nothing with the driver's."""

    peaks: ClassVar[dict[str, int]] = {}

    def __init__(self, path, name, rank, count, threads):
        told = f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import scale; scale.stand_in()"
        code = f"import sys; {told}; from staff.cli import main; sys.exit(main())"
        ranks = {"RANK": rank, "WORLD_SIZE": count, "OMP_NUM_THREADS": threads}
        environment = {**os.environ, **{key: str(value) for key, value in ranks.items()}}
        command = [sys.executable, "-c", code, "worker", "--run", str(path), "--name", name, "--quiet"]
        self._rank, self._process = rank, subprocess.Popen(command, env=environment)

    def poll(self):
        return self._process.poll()

    def kill(self) -> None:
        self.peaks[f"worker {self._rank}"] = held(self._process.pid)
        self._process.kill()


def memory(given: argparse.Namespace, folder: Path) -> dict:
    """The peak of driver and workers, a stub in place of each model, and the seconds of each stage."""
    maker = FORK.Process(target=make_inputs, args=(given, folder, given.rows, 16, given.words))
    maker.start()
    maker.join()
    shutil.copytree(folder / "m", folder / "d")

    from staff import pipeline
    from staff.config import SelectConfig, from_mapping
    from staff.runs import crew

    stand_in()
    crew.launch = Fresh
    stages: list[tuple[str, float, float, int, int]] = []

    def tell(stage: str, done: int = 0, total: int = 1) -> None:
        name = f"behind: {stage}" if done == total else stage
        if not stages or stages[-1][0] != name:
            mb = [held(os.getpid(), what) for what in ("VmHWM", "RssAnon")]
            stages.append((name, time.monotonic(), time.process_time(), *mb))

    plain = {"data": (str(folder / "pool.jsonl"),), "target": str(folder / "m"), "draft": str(folder / "d")}
    plain |= {"method": ("staff",), "pruning_rate": (0.8,), "output": str(folder / "x")}
    tell("begin")
    config = from_mapping(SelectConfig, {**plain, "workers": 2, "threads": 1}, "benchmark")
    (run,) = pipeline.select(config, on_progress=tell)
    tell("end")
    spent = [
        {"stage": name, "seconds": round(at - began), "cpu": round(cpu - before), "MB": peak, "own_MB": own}
        for (name, began, before, *_), (_, at, cpu, peak, own) in itertools.pairwise(stages)
    ]
    return {
        "rows": given.rows,
        "tokens_a_row": given.words * 1.5,
        "kept": len(run.indices),
        "peak_MB": {"driver": held(os.getpid()), **Fresh.peaks},
        "stages": spent,
        "load": os.getloadavg()[0],
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
    make_inputs(given, folder, given.rows, 1024, 200)
    count = torch.cuda.device_count()
    one, all_of_them = (rate(folder, workers=number, threads=1, device="cuda") for number in (1, count))
    return {"gpus": count, "device": torch.cuda.get_device_name(), "rows_a_second": [one, all_of_them]}


PARTS = {"workers": workers, "overhead": overhead, "memory": memory, "select": select, "gpu": gpu}
ROWS = {"workers": 2048, "memory": 1_000_000, "select": 20_000_000, "gpu": 20_000}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--words", type=int, default=40, help="of a prompt and of a response, at most")
    parser.add_argument("--model", help="a folder, in place of a random model")
    parser.add_argument("--data", help="JSON lines, in place of made-up rows")
    given = parser.parse_args()
    given.rows = given.rows or ROWS.get(given.part, 0)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({given.part: PARTS[given.part](given, Path(folder))}))


if __name__ == "__main__":
    main()
