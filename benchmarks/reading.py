"""How fast rows are read before tokenising, and in how much memory: `python benchmarks/reading.py [rows]`.

Makes files of rows of about 500 bytes that all differ, then opens each in a process of its own: once over
every row with its check (`read`), once over every example. Rates are per second of wall time and of processor
time.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = [
    "select",
    "draft",
    "target",
    "effort",
    "regions",
    "sampled",
    "budget",
    "learn",
    "gradient",
    "naïve",
    "scores",
    "pruned",
    "kept",
]


def rows(n):
    rng = random.Random(0)
    for i in range(n):
        text = " ".join(rng.choices(WORDS, k=60))
        yield {
            "id": f"row-{i}",
            "prompt": f"Rewrite sentence {i}.\n{text[:300]}",
            "response": text[300:],
            "source": "made up",
        }


def write(folder, n):
    def chat(row):
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }

    with (
        open(folder / "pairs.jsonl", "w") as pairs,
        open(folder / "chat.jsonl", "w") as chats,
        open(folder / "pairs.json", "w") as whole,
    ):
        for i, row in enumerate(rows(n)):
            pairs.write(json.dumps(row, ensure_ascii=False) + "\n")
            chats.write(json.dumps(chat(row), ensure_ascii=False) + "\n")
            whole.write(("[" if i == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        whole.write("]\n")
    for name, made in (("pairs.parquet", rows(n)), ("chat.parquet", map(chat, rows(n)))):
        writer = None
        while part := list(islice(made, 100_000)):
            table = pa.Table.from_pylist(part)
            writer = writer or pq.ParquetWriter(folder / name, table.schema)
            writer.write_table(table)
        writer.close()


def measure(path):
    from staff.data.rows import read

    def peak():
        status = Path("/proc/self/status").read_text()  # getrusage's figure begins with the parent's
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024

    figures = {
        "file": Path(path).name,
        "file_mib": Path(path).stat().st_size >> 20,
        "memory_at_start_mib": peak(),
    }
    for what in ("read", "examples"):
        wall, used = time.perf_counter(), time.process_time()
        if what == "read":
            opened = read(path)
        else:
            assert sum(1 for _ in opened.examples()) == len(opened)
        wall, used = time.perf_counter() - wall, time.process_time() - used
        figures |= {
            f"{what}_rows_per_second": round(len(opened) / wall),
            f"{what}_rows_per_cpu_second": round(len(opened) / used),
        }
    print(json.dumps(figures | {"rows": len(opened), "peak_memory_mib": peak()}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].isdigit():
        measure(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
            for file in sorted(Path(folder).iterdir()):
                subprocess.run([sys.executable, __file__, str(file)], check=True)
