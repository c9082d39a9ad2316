"""Pools whose right answer is known: runs/data/regimes/, from ${STAFF_DATA} with one seed.

Short rows of the paraphrase task throughout, so that a cell is cheap; test and validation rows are clean and
are of that task alone. The validation file is split by `staff` itself: half of it steers, half judges.
"""

import json
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from staff.data.rows import read
from staff.tryout.run import halves

SEED = 7
LONGEST = 60  # words of prompt and response together
TASK, OTHERS = "wiki_paraphrase", ("biomedical_qa", "dialogue_summarization", "translation_turkic_en")
ROWS, SMALL = 1_200, 300
WRONG = 0.3  # share of the answers that are another row's
ORIGINALS = ROWS // 20  # that six sevenths of the pool are variants of
STRANGERS = 10  # rows of other tasks for each of the task's
VALIDATION, QUERY = 200, 50  # rows that auto splits into steering and judging ones; steering ones used
OUTPUT = Path("runs/data/regimes")


def rows_of(task: str, split: str) -> Iterator[dict]:
    path = Path(os.environ["STAFF_DATA"]) / task / f"{split}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if len(f"{row['prompt']} {row['response']}".split()) <= LONGEST:
            yield row


def take(task: str, split: str, count: int, first: int = 0) -> list[dict]:
    found = list(islice(rows_of(task, split), first, first + count))
    assert len(found) == count, f"{task}/{split} has {len(found)} such rows"
    return found


def shuffled(rows: list[dict], draws: random.Random) -> list[dict]:
    """Some answers exchanged among their rows, none left in its place; `wrong` says which."""
    places = sorted(draws.sample(range(len(rows)), round(WRONG * len(rows))))
    turned = [*places[1:], places[0]]
    answer_of = dict(zip(places, turned, strict=True))
    return [
        {**row, "response": rows[answer_of.get(i, i)]["response"], "wrong": i in answer_of}
        for i, row in enumerate(rows)
    ]


def variant(row: dict, number: int, draws: random.Random) -> dict:
    """The same row, a word of its answer said twice, perhaps with another end: a few word triples differ."""
    words = row["response"].split()
    place = draws.randrange(len(words))
    words.insert(place, words[place])
    response = " ".join(words)
    response = draws.choice([response, response.rstrip("."), response.rstrip(".") + " ."])
    return {**row, "id": f"{row['id']}-{number}", "response": response, "copy_of": row["id"]}


def copies(rows: list[dict], draws: random.Random) -> list[dict]:
    """Six sevenths of the pool are variants of its first rows."""
    count = ROWS * 6 // 7
    made = [variant(rows[i % ORIGINALS], i // ORIGINALS, draws) for i in range(count)]
    pool = rows[: ROWS - count] + made
    draws.shuffle(pool)
    return pool


def mixed(draws: random.Random) -> list[dict]:
    """The task's rows at one in ten among those of other tasks."""
    count = ROWS // (STRANGERS + 1)
    pool = take(TASK, "train", count)
    for number, other in enumerate(OTHERS):
        share = (ROWS - count) // len(OTHERS) + (number < (ROWS - count) % len(OTHERS))
        pool += take(other, "train", share)
    draws.shuffle(pool)
    return pool


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # a run that reads it would stop
        path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    clean = take(TASK, "train", ROWS)
    pools = {
        "clean": clean,
        "noisy": shuffled(clean[:SMALL], random.Random(SEED)),
        "copies": copies(clean, random.Random(SEED)),
        "mixed": mixed(random.Random(SEED)),
    }
    for name, rows in pools.items():
        write(OUTPUT / name / "train.jsonl", rows)
    write(OUTPUT / "test-60.jsonl", take(TASK, "test", 60))
    write(OUTPUT / "test-30.jsonl", take(TASK, "test", 30))
    # of the training file, behind the pool: the validation file has too few rows so short
    validation = take(TASK, "train", VALIDATION, first=ROWS)
    write(OUTPUT / "validation.jsonl", validation)
    write(OUTPUT / "validation-100.jsonl", validation[:100])
    # what steers auto steers rds and less too; 50 rows, the rest of that half is not needed
    steering, _ = halves(read(OUTPUT / "validation.jsonl"))
    write(OUTPUT / "query.jsonl", [validation[i] for i in steering[:QUERY]])


if __name__ == "__main__":
    main()
