"""How fast samples are scored, beside the authors' loop, libraries, a forward pass and the machine's limit.

    benchmarks/make_envs.sh                                      an environment a library; once
    python benchmarks/scoring.py --model FOLDER                  the table; --output FILE writes it there too
    python benchmarks/scoring.py --model FOLDER ours floor       these rows alone
    python benchmarks/scoring.py --model FOLDER --scaling --data A B --limit 20000

Every row runs in a process of its own, over the same tokens in batches cut alike; a first pass over the
longest and the shortest batch is not timed. Memory is the peak of the process above what it held once the
weights were loaded and used (Linux). In a library's environment ours is timed again: ratios never cross
environments; in the table they cross no dtypes either. Errors are against our float32 scores, ours against
float64 autograd a sample at a time; the authors' adapter has a random matrix of its own, so its scores are
compared with ours of that matrix. The floor has a ratio below 1: the share of our time that it takes.

The floor: operations that the scope can't do without (every linear layer forward, over tokens without
padding, what all samples begin with counted once; those behind the value projection of the last block once
more, backward; two products with the head over response tokens; no attention, norms or softmax), each at the
speed that a plain matrix product of its shape reaches in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16")
ORACLE_ROWS = 8
LONG = 2048  # as in scoring_row.py
SIZES = (500, 1_000, 2_000, 5_000, 10_000, 20_000)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        function: of rivals.py.
        package: whose environment it runs in; None for the interpreter that runs this.
        scores: it measures what ours does.
    """

    label: str
    function: str
    package: str | None = None
    scores: bool = True
    options: dict[str, str] = field(default_factory=dict)


ROWS = {
    "ours": Row("ours", "ours"),
    "last-block": Row("ours, scope last-block", "ours", scores=False, options={"scope": "last-block"}),
    "released": Row("1. the authors' loop", "released"),
    "unfrozen": Row("1b. the same, whole adapter trainable", "released_unfrozen"),
    "vmap": Row("2. vmap of grad", "vmapped"),
    "opacus": Row("3. Opacus, ghost norms", "opacus", "opacus"),
    "bergson": Row("3. bergson", "bergson", "bergson"),
    "dattri": Row("3. dattri", "dattri", "dattri"),
    "forward": Row("4. forward pass, all logits", "forward_all_logits", scores=False),
    "base": Row("4. forward pass, no logits", "forward_no_logits", scores=False),
}
OTHERS = ("floor", "memory")


def cases(wanted: list[str], dtypes: list[str]) -> list[dict]:
    """What to run, in order; ours before each library's rows, in its environment."""
    found = []
    for dtype in dtypes:
        for name, row in ROWS.items():
            if name in wanted:
                if row.package:
                    found.append({"row": "ours", "dtype": dtype, "library": row.package})
                found.append({"row": name, "dtype": dtype, "library": row.package})
        if "floor" in wanted:
            found.append({"row": "floor", "dtype": dtype, "library": None})
    return found


class Children:
    """Runs cases in processes of their own; what they leave lies in a folder."""

    def __init__(self, folder: Path, arguments: argparse.Namespace):
        self.folder = folder
        self._common = {"model": str(Path(arguments.model).resolve()), "batch_tokens": arguments.batch_tokens}

    def run(self, library: str | None = None, **case) -> dict:
        """What the case finds, or {"failed": why}."""
        python = HERE / ".envs" / library / "bin" / "python" if library else Path(sys.executable)
        if library and not (HERE / ".envs" / library / "ready").exists():
            log = HERE / ".envs" / f"{library}.log"
            last = log.read_text().strip().splitlines()[-1] if log.exists() else "run benchmarks/make_envs.sh"
            return {"failed": f"not installed: {last}"}
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        command = [
            str(python),
            str(HERE / "scoring_row.py"),
            json.dumps(self._common | case),
            str(self.folder),
        ]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if child.returncode or not answer.exists():
            said = child.stderr.strip().splitlines() or [f"ended with {child.returncode}"]
            return {"failed": said[-1], "traceback": said[-20:]}
        return json.loads(answer.read_text())

    def scores(self, name: str) -> np.ndarray | None:
        path = self.folder / f"{name}.npy"
        return np.load(path) if path.exists() else None


def make_pool(data: list[str], model: str, max_length: int, rows: int, path: Path) -> dict:
    """Rows in turn from each file, shuffled, from its start again where it ends; as a pool in a file."""
    from staff.data import rows as formats
    from staff.data.tokens import tokenise
    from staff.models.load import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(model))
    pools = [tokenise(formats.read(name).examples(), tokenizer, max_length) for name in data]
    orders = [np.random.default_rng(0).permutation(len(pool)) for pool in pools]
    taken = [(pools[k % len(pools)], orders[k % len(pools)]) for k in range(rows)]
    samples = [(pool, int(order[k // len(pools) % len(order)])) for k, (pool, order) in enumerate(taken)]
    ids = np.concatenate([pool.ids(i) for pool, i in samples])
    response = np.concatenate(
        [pool.is_response[pool.offsets[i] : pool.offsets[i + 1]] for pool, i in samples]
    )
    lengths = [len(pool.ids(i)) for pool, i in samples]
    np.savez(path, input_ids=ids, is_response=response, offsets=np.cumsum([0, *lengths]))
    responses = sum(int(pool.response(i).sum()) for pool, i in samples)
    return {"rows": rows, "tokens": len(ids), "response_tokens": responses, "longest": max(lengths)}


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(scores)) for scores in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def measure(children: Children, wanted: list[str], dtypes: list[str], size: dict, repeats: int) -> list[dict]:
    """Every case, all of them before any is repeated."""
    found: dict[str, dict] = {}
    for repeat in range(repeats):
        for case in cases(wanted, dtypes):
            name = "-".join(filter(None, [case["row"], case["dtype"], case["library"]]))
            if "failed" in found.get(name, {}):
                continue
            row = ROWS.get(case["row"])
            more = (
                {"kind": "rival", "function": row.function, "options": row.options, "scores": row.scores}
                if row
                else {"kind": case["row"]}
            )
            answer = children.run(name=name, compare=repeat == 0, **more, **case)
            seconds = [
                *found.get(name, {}).get("all_seconds", []),
                *([answer["seconds"]] if "seconds" in answer else []),
            ]
            found[name] = case | {"name": name} | answer | {"all_seconds": seconds}
            if seconds:
                found[name]["seconds"] = float(np.median(seconds))
                found[name]["tokens_per_second"] = size["tokens"] / found[name]["seconds"]
            print(
                f"{name}: {answer.get('failed') or format(answer['seconds'], '.1f') + ' s'}",
                file=sys.stderr,
                flush=True,
            )
    reference = children.scores("ours-float32")
    for name, row in found.items():
        own = found.get("-".join(filter(None, ["ours", row["dtype"], row["library"]])))
        if own and "seconds" in row and "seconds" in own:
            row["ratio"] = row["seconds"] / own["seconds"]
        scores, of_same = children.scores(name), children.scores(f"{name}-reference")
        against = reference if of_same is None else of_same
        if name == "ours-float32":
            oracle_rows = min(ORACLE_ROWS, size["rows"])
            children.run(kind="oracle", rows=oracle_rows)
            against, scores = children.scores("oracle"), scores[:oracle_rows]
        if scores is not None and against is not None:
            row["largest_error"] = float(np.max(np.abs(scores - against) / against))
            row["spearman"] = 1.0 if name == "ours-float32" else spearman(scores, against)
    return list(found.values())


def table(rows: list[dict]) -> list[str]:
    lines = [
        "| row | environment | dtype | seconds | tokens/s | times ours | peak GB | largest error | Spearman |"
    ]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        label = ROWS[row["row"]].label if row["row"] in ROWS else "5. the floor"
        if "failed" in row:
            why = row["failed"].replace("|", "/")[:150]
            lines.append(f"| {label} | {row['library'] or 'own'} | {row['dtype']} | can't: {why} | | | | | |")
            continue
        shown = [f"{row['seconds']:.1f}", f"{row['tokens_per_second']:,.0f}"]
        formats = {"ratio": "{:.2f}", "peak_bytes": "{:.2f}", "largest_error": "{:.1e}", "spearman": "{:.5f}"}
        values = {name: row[name] / (1e9 if name == "peak_bytes" else 1) for name in formats if name in row}
        shown += [formats[name].format(values[name]) if name in values else "" for name in formats]
        lines.append(f"| {label} | {row['library'] or 'own'} | {row['dtype']} | {' | '.join(shown)} |")
    return lines


def targets(rows: list[dict], memory: list[dict]) -> list[str]:
    """Each target with what was found: reached, missed, or not measured."""
    by_name = {row["name"]: row for row in rows if "failed" not in row}

    def line(what, value, wanted, unit="", least=True):
        if value is None:
            return f"- {what}: {'at least' if least else 'less than'} {wanted:g}{unit} wanted; not measured"
        reached = value >= wanted if least else value < wanted
        word = "reached" if reached else "MISSED"
        bound = "at least" if least else "less than"
        return f"- {what}: {value:.5g}{unit}; {bound} {wanted:g}{unit} wanted: {word}"

    def value(name, what):
        return by_name.get(name, {}).get(what)

    ours = value("ours-bfloat16", "seconds")
    found = []
    for dtype, wanted in (("float32", 8), ("bfloat16", 3.5)):
        theirs = value(f"released-{dtype}", "seconds")
        found.append(
            line(
                f"the authors' loop in {dtype} over ours in bfloat16",
                theirs / ours if theirs and ours else None,
                wanted,
                " times",
            )
        )
    found.append(line("Spearman of bfloat16 with float32 scores", value("ours-bfloat16", "spearman"), 0.999))
    for dtype in DTYPES:
        ratios = [
            row["ratio"]
            for row in by_name.values()
            if ROWS.get(row["row"], ROWS["ours"]).package and row["dtype"] == dtype and "ratio" in row
        ]
        found.append(line(f"the fastest library over ours, {dtype}", min(ratios, default=None), 2, " times"))
    for dtype in DTYPES:
        share = value(f"floor-{dtype}", "ratio")
        found.append(line(f"share of the floor, {dtype}", share and 100 * share, 65, " %"))
    for row in memory:
        what = f"memory at {LONG:,} tokens, {row['scope']}, {row['dtype']}"
        found.append(
            line(
                what,
                row["peak_bytes"] / 1e9 if "peak_bytes" in row else None,
                1,
                " GB above the weights",
                least=False,
            )
        )
    return found


def scaling(children: Children, arguments: argparse.Namespace) -> tuple[list[str], list[dict]]:
    """Seconds against n, and how straight the line is."""
    rows = []
    lines = [
        "| n | dtype | seconds | samples/s | tokens/s | peak GB | off the line |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    fits = []
    for dtype in arguments.dtypes or ["bfloat16"]:
        of_dtype = []
        for n in (n for n in SIZES if n <= arguments.limit):
            size = make_pool(
                arguments.data, arguments.model, arguments.max_length, n, children.folder / "pool.npz"
            )
            seconds = []
            for _ in range(arguments.repeats):
                answer = children.run(kind="scaling", dtype=dtype)
                if "failed" in answer:
                    sys.exit("\n".join(answer["traceback"]))
                seconds.append(answer["seconds"])
            of_dtype.append(
                size
                | answer
                | {"n": n, "dtype": dtype, "seconds": float(np.median(seconds)), "all_seconds": seconds}
            )
            print(f"{n} {dtype}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
        n, seconds = (np.array([row[name] for row in of_dtype]) for name in ("n", "seconds"))
        slope, start = np.polyfit(n, seconds, 1) if len(n) > 1 else (seconds[0] / n[0], 0.0)
        off = seconds - (slope * n + start)
        for row, residual in zip(of_dtype, off, strict=True):
            row["residual_seconds"] = float(residual)
            cells = [
                f"{row['n']:,}",
                dtype,
                f"{row['seconds']:.1f}",
                f"{row['n'] / row['seconds']:.1f}",
                f"{row['tokens'] / row['seconds']:,.0f}",
            ]
            lines.append(
                "| "
                + " | ".join(
                    [*cells, f"{row['peak_bytes'] / 1e9:.2f}", f"{100 * residual / row['seconds']:+.1f} %"]
                )
                + " |"
            )
        worst = int(np.argmax(np.abs(off)))
        share = 100 * abs(off[worst]) / seconds[worst]
        line = f"{dtype}: {1000 * slope:.3g} ms a sample and {start:.2g} s"
        fits.append(f"{line}; largest residual {abs(off[worst]):.2g} s, {share:.1f} % at n = {n[worst]:,}.")
        rows += of_dtype
    return [*lines, "", *fits], rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help=f"rows to run, of {', '.join([*ROWS, *OTHERS])}; all where none is named"
    )
    parser.add_argument(
        "--model",
        help="a folder of safetensors; staff.models.load.unpack_gguf makes one of the demo's .gguf file",
    )
    parser.add_argument(
        "--data", nargs="+", default=[str(HERE.parent / "examples" / "medquad" / "train.jsonl")]
    )
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1, help="the median is taken")
    parser.add_argument("--scaling", action="store_true", help="seconds against n in place of the table")
    parser.add_argument("--limit", type=int, default=SIZES[-1], help="largest n of --scaling")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="both; of --scaling bfloat16")
    parser.add_argument("--output", type=Path, help="a Markdown file for what is printed")
    arguments = parser.parse_intermixed_args()
    wanted = arguments.names or [*ROWS, *OTHERS]
    dtypes = arguments.dtypes or [*DTYPES]
    if not arguments.model or not {*wanted} <= {*ROWS, *OTHERS}:
        parser.error(f"--model is needed, and rows are of {', '.join([*ROWS, *OTHERS])}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
    machine += f"load before the start {os.getloadavg()[0]:.1f}"
    kind = "scaling" if arguments.scaling else "scoring"
    with tempfile.TemporaryDirectory() as folder:
        children = Children(Path(folder), arguments)
        memory: list[dict] = []
        if arguments.scaling:
            size = {}
            body, rows = scaling(children, arguments)
        else:
            size = make_pool(
                arguments.data,
                arguments.model,
                arguments.max_length,
                arguments.rows,
                Path(folder) / "pool.npz",
            )
            rows = measure(children, wanted, dtypes, size, arguments.repeats)
            pairs = (
                [(scope, dtype) for scope in ("last-value", "last-block") for dtype in dtypes]
                if "memory" in wanted
                else []
            )
            memory = [
                {"scope": scope, "dtype": dtype} | children.run(kind="memory", scope=scope, dtype=dtype)
                for scope, dtype in pairs
            ]
            body = [*table(rows), "", *targets(rows, memory)]
    about = f"Commit {commit}; {machine}; {Path(arguments.model).name}, "
    about += f"batches of {arguments.batch_tokens:,} tokens, "
    about += f"samples of {arguments.max_length:,} at most"
    about += (
        f"; {size['rows']:,} rows, {size['tokens']:,} tokens, {size['response_tokens']:,} of them responses."
        if size
        else "."
    )
    text = "\n".join([about, "", *body])
    print(text)
    out = HERE / "out" / f"{kind}.json"
    out.parent.mkdir(exist_ok=True)
    settings = {
        "commit": commit,
        "machine": machine,
        "size": size,
        "batch_tokens": arguments.batch_tokens,
        "repeats": arguments.repeats,
    }
    out.write_text(json.dumps(settings | {"rows": rows, "memory": memory}, indent=1) + "\n")
    if arguments.output:
        against = ", against their number" * (kind == "scaling")
        arguments.output.write_text(f"# How fast samples are scored{against}\n\n{text}\n")


if __name__ == "__main__":
    main()
