"""A model on a test file: greedy answers by its own chat template, metrics, the loss on the references."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff.config import EvaluateConfig, check_named, flat
from staff.data import metrics
from staff.data import rows as formats
from staff.files import (
    check_outputs,
    fingerprint,
    hash_file,
    remove,
    write_json,
    write_whole,
)
from staff.models.answering import said_by
from staff.runs import account
from staff.runs.store import content_of, open_run
from staff.types import Progress, Stage

if TYPE_CHECKING:
    from staff.data.tokens import Pool
    from staff.data.turns import Example

logger = logging.getLogger(__name__)

JUDGED_WITH = ("torch", "transformers", "rouge-score", "sacrebleu")
# known by content, or of no consequence
NO_MATTER = {"data", "model", "output", "device", "trust_remote_code"}
NO_MATTER |= {"workers", "engine", "ray_address", "worker_timeout", "device_map", "max_memory"}


def evaluate(
    config: EvaluateConfig, data: Any = None, *, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Answer every example of a test file and compare with its references; go on where a call was cut off.

    Leaves config.output, a row an example: row, id, the metrics (0 to 100), loss (mean over the reference's
    tokens), prompt_tokens, answer_tokens, cut (the answer had not ended after max_new_tokens), prediction,
    reference. Beside it the summary, `.summary.json`.

    Args:
        data: the examples, where they are in no files.
        on_progress: called with (stage, done, in all).

    Returns:
        the summary: n, metrics, loss, tokenisation of each metric, counts, seconds, settings, versions.

    Raises:
        ValueError: something that the user can mend.
    """
    check_named(config, data)
    output = Path(str(config.output))
    if output.suffix not in (".jsonl", ".parquet"):
        cure = "name a file that ends in .jsonl or .parquet"
        raise ValueError(f"--output {output}: the scores are written a row an example; {cure}")
    from staff.data.chat import template_of
    from staff.data.samples import prompts_of
    from staff.data.tokens import in_common, tokenise
    from staff.models import load as models
    from staff.models.files import tokenizer_fingerprint, with_date
    from staff.runs import answers

    metrics.judge_answers(["a word"], ["a word"])  # a package that is missing is known before the work
    source = models.resolve(config.model, "--model")
    rows = formats.read(list(config.data) if data is None else data, **config.reading.keywords())
    examples = list(rows.examples())
    for number, example in zip(rows.numbers, examples, strict=True):
        if example.turns[0].role == "text":
            raise ValueError(f"row {number} has a text and no prompt: there is nothing to answer")
    device, dtype, engine = answers.engine_of(config)
    check_outputs([output, summary_path(output)], {"--data": rows.paths, "--model": source.files()})
    unfinished = output.with_suffix(".unfinished")
    begun = unfinished / "work" / "begun.json"
    reading = with_date(config.reading, [source], begun if begun.exists() else summary_path(output))
    config = dataclasses.replace(config, reading=reading)
    with open_run(unfinished, "scores", on_progress) as run:
        inputs = {
            "data": hashlib.sha256(json.dumps(examples, ensure_ascii=True).encode()).hexdigest()[:12],
            "model": content_of(run, source),
            "tokenizer": tokenizer_fingerprint(source, reading.chat_template),
        }
        settings = {name: value for name, value in flat(config).items() if name not in NO_MATTER}
        if settings["threads"] is None:
            del settings["threads"]
        versions = engine["versions"] | {name: version(name) for name in JUDGED_WITH}
        engine |= {"versions": versions}
        made_of = fingerprint({"inputs": inputs, "settings": settings, **engine})
        summary = _finished(output, made_of)
        if summary is None:
            run.begin({**settings, **engine}, inputs, update=True)
            source = answers.unpacked(config, run, source, inputs["model"])
            trusts = config.engine.trust_remote_code
            tokenizer = models.load_tokenizer(source, trusts)
            tokenizer.chat_template = template_of(tokenizer, reading)
            pool = tokenise(examples, tokenizer, reading.max_length, None, reading, rows.where)
            left_out = {place for place, _ in pool.dropped}
            rows, pools = in_common(rows, {"": pool})
            examples = [example for place, example in enumerate(examples) if place not in left_out]
            models.check_room(source, pools[""], rows.numbers, trusts, config.max_new_tokens)
            folder = run.piece("answers", {"made_of": made_of})
            room = config.reading.max_length - config.max_new_tokens
            prompts, end, shortened = prompts_of(examples, tokenizer, room, config.reading, rows.numbers)
            if shortened:
                said = "%d prompts lost the start of their text: no room for an answer in --max-length %d"
                logger.warning(said, shortened, config.reading.max_length)
            asked = answers.Asked(prompts, pools[""], rows.numbers, end)
            made = answers.make_answers(config, run, folder, source, inputs["model"], asked)
            made["prompt_tokens"] = [len(prompt) for prompt in prompts]
            run.tell(Stage("judge"), 0, 1)
            references = _references(examples, pools[""], tokenizer)
            each, overall, how = metrics.judge_answers(made["prediction"], references)
            ids = {"row": rows.numbers.tolist(), "id": [example.id for example in examples]}
            values = {name: values.tolist() for name, values in each.items()}
            names = ("loss", "prompt_tokens", "answer_tokens", "cut", "prediction")
            of_answers = {name: made[name] for name in names}
            _write_table(output, {**ids, **values, **of_answers, "reference": references})
            summary = {
                "model": config.model,
                "data": list(config.data),
                "n": len(examples),
                "metrics": overall,
                "loss": float(np.mean(made["loss"])),
                "tokenisation": how,
                "answer_tokens": sum(made["answer_tokens"]),
                "cut": sum(made["cut"]),
                "shortened_prompts": shortened,
                "seconds": account.spent(run.work).get(Stage("answer"), {}).get("seconds", 0.0),
                "settings": json.loads(json.dumps(settings)),
                "dtype": str(dtype).removeprefix("torch."),
                "device": device.type,
                "versions": versions,
                "made_of": made_of,
                "scores": {"file": output.name, "sha256": hash_file(output)},
            }
            write_json(summary_path(output), summary)
    remove(unfinished)  # also what a kill between the summary and this line left
    return summary


def _references(examples: Sequence[Example], pool: Pool, tokenizer: Any) -> list[str]:
    """What answers are compared with: the file's own text, of tool calls the template's way to write them."""
    from staff.data.chat import scaffold

    mark, said, references = scaffold(tokenizer), said_by(tokenizer), []
    for i, example in enumerate(examples):
        turn = example.turns[-1]
        if (turn.fields or {}).get("tool_calls"):
            before = np.flatnonzero(~pool.response(i))
            references.append(said(pool.ids(i)[before[-1] + 1 :]))
        else:
            references.append((turn.text.rpartition(mark)[2] if mark else turn.text).strip())
    return references


def summary_path(output: str | Path) -> Path:
    """Where the summary of an evaluation lies: beside its per-example file."""
    return Path(output).with_suffix(".summary.json")


def _finished(output: Path, made_of: str) -> dict[str, Any] | None:
    try:
        summary = json.loads(summary_path(output).read_text(encoding="utf-8"))
        whole = summary["made_of"] == made_of and hash_file(output) == summary["scores"]["sha256"]
        return summary if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_table(path: Path, table: dict[str, Sequence[Any]]) -> None:
    if path.suffix == ".jsonl":
        lines = (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(path, lambda aside: aside.write_bytes(text.encode("utf-8", "replace")))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.array(values, pa.string() if name == "id" else None) for name, values in table.items()
    }
    write_whole(path, lambda aside: pq.write_table(pa.table(columns), aside))


def read_examples(path: str | Path) -> dict[str, list[Any]]:
    """The columns of a per-example file that `evaluate` wrote.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; `staff evaluate --output {path}` makes it")
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pydict()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {name: [line[name] for line in lines] for name in lines[0]} if lines else {}


def describe(summary: dict[str, Any], output: str | Path) -> str:
    """A summary as a person reads it."""
    lines = ["", f"examples   {summary['n']}"]
    if summary["cut"]:
        limit = summary["settings"]["max_new_tokens"]
        lines.append(f"           {summary['cut']} answers had not ended after --max-new-tokens {limit}")
    for name, value in summary["metrics"].items():
        lines.append(f"{name:11}{value:6.2f}   {summary['tokenisation'][name]}")
    lines += [f"loss       {summary['loss']:6.3f}   mean over the references' tokens, then over examples", ""]
    lines.append(f"scores are in {output}, a row an example, the summary in {summary_path(output)}")
    return "\n".join(lines)
