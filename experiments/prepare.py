"""Cut the files of an experiment out of the public data: runs/data/*.jsonl, from ${STAFF_DATA} (see DATA.md).

Rows stand there in the order of the SHA-256 of their ids, so the first N of a file are a fair sample of it.
"""

import json
import os
from itertools import islice
from pathlib import Path

LONGEST_ANSWER = 70  # words; what examples/medquad was cut by

SAMPLE = "examples/medquad"  # shipped


def any_row(row) -> bool:
    return True


def like_the_sample(row) -> bool:
    return row["source"].startswith("medquad") and len(row["response"].split()) <= LONGEST_ANSWER


FILES = {  # file -> source, rows at most, condition
    "medquad-600.jsonl": (f"{SAMPLE}/train.jsonl", 600, any_row),
    "medquad-300.jsonl": (f"{SAMPLE}/train.jsonl", 300, any_row),
    "medquad-test-100.jsonl": (f"{SAMPLE}/test.jsonl", 100, any_row),
    "medquad-test-50.jsonl": (f"{SAMPLE}/test.jsonl", 50, any_row),
    "medquad-validation-50.jsonl": ("biomedical_qa/validation.jsonl", 50, like_the_sample),
    "medquad-validation-32.jsonl": ("biomedical_qa/validation.jsonl", 32, like_the_sample),
    "medquad-validation.jsonl": ("biomedical_qa/validation.jsonl", 200, like_the_sample),
    "dialogue-300.jsonl": ("dialogue_summarization/train.jsonl", 300, any_row),
    "wiki-train.jsonl": ("wiki_paraphrase/train.jsonl", 2000, any_row),
    "wiki-600.jsonl": ("wiki_paraphrase/train.jsonl", 600, any_row),
    "wiki-300.jsonl": ("wiki_paraphrase/train.jsonl", 300, any_row),
    "wiki-validation-32.jsonl": ("wiki_paraphrase/validation.jsonl", 32, any_row),
    "wiki-validation.jsonl": ("wiki_paraphrase/validation.jsonl", 200, any_row),
    "wiki-test-100.jsonl": ("wiki_paraphrase/test.jsonl", 100, any_row),
}


def main() -> None:
    data, output = Path(os.environ["STAFF_DATA"]), Path("runs/data")
    output.mkdir(parents=True, exist_ok=True)
    for name, (source, most, wanted) in FILES.items():
        path = Path(source) if source.startswith("examples/") else data / source
        with open(path, encoding="utf-8") as lines:
            kept = list(islice((line for line in lines if wanted(json.loads(line))), most))
        text = "".join(kept)
        if (
            not (output / name).exists() or (output / name).read_text(encoding="utf-8") != text
        ):  # a run that reads it would stop
            (output / name).write_text(text, encoding="utf-8")
        print(f"{output / name}: {len(kept)} rows")


if __name__ == "__main__":
    main()
