"""The coreset on disk, and what TRL, LLaMA-Factory and Axolotl need to train on it as it was scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from staff.config import FinetuneConfig, Reading
from staff.data.chat import GENERATION, dated, plain_template, template_of, text_of
from staff.data.rows import Rows
from staff.data.samples import SHORTENED, Sampler
from staff.data.tokens import Pool
from staff.data.turns import Example, build
from staff.data.writers import dumps, write_lines
from staff.files import remove, write_json, write_text, write_whole

if TYPE_CHECKING:
    import datasets

TRAIN = (
    *("coreset-messages.jsonl", "coreset-texts.jsonl", "coreset-tokens.jsonl", "chat_template.jinja"),
    *("with_trl.py", "axolotl.yaml", "llama_factory.yaml", "dataset_info.json"),
)
FACTORY_TAGS = {
    **{"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    **{"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"},
}
BEHIND = 8  # tokens behind the last turn at most, a line break mostly: LLaMA-Factory trains on them too
RECIPE = FinetuneConfig()  # of the line that a run prints
# what a trainer may have no words for
SEVERAL, MASKED, TOOLS = "several answers are trained on", "some answers are not", "tools"
MORE, IN_PARTS, TURNS = "a turn is more than role and text", "a text is in parts", "turns do not alternate"
NO_WORDS = "some rows train on several answers and not on all of them, for which TRL has no words"
NO_SYSTEM = "the template has no place for the system"


def write_coreset(
    folder: Path,
    rows: Rows,
    positions: np.ndarray,
    model: str | None,
    reading: Reading,
    tokenizer: Any = None,
    pool: Pool | None = None,
    same: bool = False,
) -> list[str]:
    """Write the coreset, and what other trainers need to take it.

    coreset.jsonl, with `same` also in the format the rows came in; skipped.jsonl where rows were left out;
    the files of `write_train` in train/.

    Args:
        folder: where.
        rows: the pool.
        positions: (m,) of the coreset in the pool, ascending.
        model, reading, tokenizer, pool: as `write_train` takes them.
        same: also in the format the rows came in.

    Returns:
        the files that hold rows, as paths in the folder.
    """
    coreset, train = folder / "coreset.jsonl", folder / "train"
    # of a run with other settings
    lists = (folder / "skipped.jsonl", folder / "dropped.jsonl")
    for old in [*lists, *folder.glob("coreset.*"), *(train / name for name in TRAIN)]:
        old.unlink(missing_ok=True)
    remove(folder / "coreset")
    rows.write_jsonl(coreset, positions)
    files = [coreset]
    if same and rows.suffix != ".jsonl":
        path = folder / f"coreset{rows.suffix}"
        rows.write_same(path, positions)
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    if rows.skipped:
        rows.write_skipped(folder / "skipped.jsonl")
    if len(positions):
        write_train(train, rows, positions, model, reading, tokenizer, pool)
    return [path.relative_to(folder).as_posix() for path in files]


def write_train(
    folder: Path,
    rows: Rows,
    positions: np.ndarray,
    model: str | None,
    reading: Reading,
    tokenizer: Any = None,
    pool: Pool | None = None,
) -> None:
    """Write the coreset as it was scored, and for each trainer a file that trains on it as `staff finetune`.

    coreset-messages.jsonl has `messages` as the chat template was given them, `tools` as JSON text, and the
    weight 0 on answers that are not trained on; plain texts go to coreset-texts.jsonl. chat_template.jinja is
    the template that held, its date fixed. Over these go with_trl.py, axolotl.yaml and, where LLaMA-Factory
    has words for such rows, llama_factory.yaml with dataset_info.json. TRL gets the tokens themselves,
    coreset-tokens.jsonl, where it would put the loss elsewhere: on several answers it takes a template of its
    own.

    Args:
        rows, positions: the pool, and the coreset in it.
        model: one that transformers loads; None: it is named when the training starts.
        reading: how the rows were read and scored.
        tokenizer, pool: the model's, and the rows' samples in it, where they are known; what long prompts
            lost in it is left away here too.
    """
    sampler = Sampler(tokenizer, reading) if tokenizer else None
    examples, found = _as_scored(rows, positions, reading, sampler, pool), set[str]()
    keys = {"role": True, "content": True}  # of messages, in the order in which they came
    is_text = rows.layout.text is not None
    if is_text:
        data, template = folder / "coreset-texts.jsonl", None
        made: Iterator[dict] = ({"text": text_of(example.turns[0].content)} for example in examples)
    else:
        data, template = folder / "coreset-messages.jsonl", template_of(tokenizer, reading)
        made = (_messages(example, sampler, found, keys) for example in examples)
    data, own = data.absolute(), template
    folder.mkdir(exist_ok=True)
    write_whole(data, lambda aside: write_lines(aside, map(dumps, made)))
    if isinstance(template, str):
        template = dated(template, reading.template_date)
    elif not template and not is_text and (tokenizer or reading.chat_template == "none"):
        template = plain_template(tokenizer)
    if isinstance(template, str):
        write_text(folder / "chat_template.jinja", template)
    else:
        template = None  # the model's own: one of several names, or not known
    if pool is not None and (SEVERAL in found or GENERATION.search(template or "")):
        tokens = folder / "coreset-tokens.jsonl"
        write_whole(tokens, lambda aside: write_lines(aside, map(dumps, _tokens(pool, positions))))
        found.add(tokens.name)
    write_text(folder / "with_trl.py", _trl(data, model, reading, template, found))
    if IN_PARTS not in found:
        how = "axolotl train axolotl.yaml" + " --base-model MODEL" * (not model)
        write_text(
            folder / "axolotl.yaml", _yaml(how, _axolotl(data, model, reading, template, sampler, keys))
        )
    is_own = reading.chat_template in (None, "model") and template in (None, own)
    if sampler and sampler.chat and sampler.chat.merges_system:
        found.add(NO_SYSTEM)  # which LLaMA-Factory asks it for
    if is_own and not found & {MORE, IN_PARTS, TURNS, NO_SYSTEM} and not found >= {SEVERAL, MASKED}:
        columns = {"prompt": "text"} if is_text else {"messages": "messages"}
        columns |= {"tools": "tools"} if TOOLS in found else {}
        entry: dict[str, Any] = {"file_name": data.name, "columns": columns}
        if not is_text:  # not "openai", which adds words of its own to what the system says
            entry |= {"formatting": "sharegpt", "tags": FACTORY_TAGS}
        write_json(folder / "dataset_info.json", {"coreset": entry})
        how = "llamafactory-cli train llama_factory.yaml" + " model_name_or_path=MODEL" * (not model)
        how += "\n# where the hardware has bfloat16, add: bf16: true"
        settings = _llama_factory(data, model, reading, is_text, found)
        write_text(folder / "llama_factory.yaml", _yaml(how, settings))


def _as_scored(
    rows: Rows, positions: np.ndarray, reading: Reading, sampler: Sampler | None, pool: Pool | None
) -> Iterator[Example]:
    long = set(pool.marked(SHORTENED).tolist()) if pool is not None else set()
    for place, row in zip(positions.tolist(), rows.raw(positions), strict=True):
        example = build(rows.layout, row, rows.train_on)
        if sampler and place in long:
            (sample,) = sampler.samples([sampler.rendered(example)])
            assert not isinstance(sample, ValueError)
            example = sampler.fitted(example, sample, reading.max_length)[0]
        yield example


def _messages(example: Example, sampler: Sampler | None, found: set[str], keys: dict[str, bool]) -> dict:
    """A row of coreset-messages.jsonl; notes what it has."""
    chat = sampler.chat if sampler else None
    turns = chat.turns(example) if chat else list(example.turns)
    if chat:
        messages = chat.messages(turns)
    elif sampler:  # as `plain` writes them
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    else:
        messages = [{"role": t.role, "content": text_of(t.content), **(t.fields or {})} for t in turns]
    if any(len(message) > 2 for message in messages):
        found.add(MORE)
    if not all(isinstance(message["content"], str) for message in messages):
        found.add(IN_PARTS)
    for turn, message in zip(turns, messages, strict=True):
        if turn.role == "assistant" and not turn.train:
            message["weight"] = 0
            found.add(MASKED)
        keys |= dict.fromkeys(message, True)
    if sum(turn.train for turn in turns) > 1:
        found.add(SEVERAL)
    roles = [turn.role for turn in turns[turns[0].role == "system" :]]
    if len(roles) % 2 or any(
        (role == "assistant") != i % 2 or role == "system" for i, role in enumerate(roles)
    ):
        found.add(TURNS)
    if not example.tools or not (chat or not sampler):
        return {"messages": messages}
    found.add(TOOLS)
    return {"messages": messages, "tools": json.dumps(example.tools, ensure_ascii=False)}


def dataset_of(train: Path) -> datasets.Dataset:
    """What `write_train` wrote, as with_trl.py takes it: the rows of a `datasets.Dataset` for SFTTrainer.

    Raises:
        ValueError: a package is missing or too old, or TRL has no words for these rows.
    """
    try:
        from datasets import Dataset, Features, Json, List, Value
    except ImportError as error:
        raise ValueError(
            f"this needs datasets 4.8 or newer ({error}): pip install -U 'staff-coreset[datasets]'"
        ) from None
    path = next((train / name for name in TRAIN[2::-1] if (train / name).exists()), None)
    if path is None:
        raise ValueError(f"{train} holds no rows: the coreset is empty, or the files were moved")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    if path.name != "coreset-messages.jsonl":
        return Dataset.from_list(rows)
    answers = [[m.get("weight", 1) for m in row["messages"] if m["role"] == "assistant"] for row in rows]
    parts = ["prompt", "completion"]
    if any(sum(weights) > 1 for weights in answers):
        if not all(map(all, answers)):
            raise ValueError(NO_WORDS)
        parts = ["messages"]
    else:
        ends = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        rows = [
            end | {"tools": row["tools"]} if "tools" in row else end
            for end, row in zip(ends, rows, strict=True)
        ]
    features: dict[str, Any] = {part: List(Json()) for part in parts}
    has_tools = any("tools" in row for row in rows)
    return Dataset.from_list(
        rows, features=Features(features | ({"tools": Value("string")} if has_tools else {}))
    )


def _tokens(pool: Pool, positions: np.ndarray) -> Iterator[dict]:
    for i in positions.tolist():
        ids = pool.ids(i)
        yield {"input_ids": ids.tolist(), "labels": np.where(pool.response(i), ids, -100).tolist()}


def _yaml(how: str, settings: dict) -> str:
    """A trainer's file; a comment says how it is used."""
    settings = {name: value for name, value in settings.items() if value is not None}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    # the library's own reader folds some line separators in a text that is not escaped
    text = text if yaml.safe_load(text) == settings else yaml.safe_dump(settings, sort_keys=False)
    return f"# {how}\n{text}"


def _llama_factory(data: Path, model: str | None, reading: Reading, is_text: bool, found: set[str]) -> dict:
    """A LLaMA-Factory training file (`llamafactory-cli train FILE`); it works the model's chat template out
    where no `template` is named."""
    training = RECIPE.training
    return {
        "model_name_or_path": model,
        "stage": "pt" if is_text else "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": training.lora_rank,
        "lora_alpha": training.lora_alpha,
        "lora_target": "all",
        "dataset": "coreset",
        "dataset_dir": str(data.parent),
        **({"packing": False} if is_text else {"mask_history": SEVERAL not in found}),
        "cutoff_len": reading.max_length + BEHIND,
        "num_train_epochs": RECIPE.epochs,
        "per_device_train_batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": training.warmup,
        "seed": RECIPE.seed,
        "output_dir": _tuned(data, "llama_factory"),
    }


def _tuned(data: Path, trainer: str) -> str:
    """Where a trainer leaves its adapter: beside the coreset that it is of."""
    return str(data.parent / f"tuned_{trainer}")


def _axolotl(
    data: Path,
    model: str | None,
    reading: Reading,
    template: str | None,
    sampler: Sampler | None,
    keys: Iterable[str],
) -> dict:
    """An Axolotl configuration (`axolotl train FILE`)."""
    training, chat = RECIPE.training, sampler.chat if sampler else None
    rows: dict[str, Any] = {"path": str(data), "ds_type": "json"}
    settings: dict[str, Any] = {"base_model": model, "datasets": [rows]}
    if data.name == "coreset-texts.jsonl":
        rows |= {"type": "completion", "field": "text"}
    else:
        rows |= {
            "type": "chat_template",
            "field_messages": "messages",
            "message_property_mappings": {key: key for key in keys},  # others don't reach the template
            "message_field_training": "weight",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }
        settings["chat_template"] = "tokenizer_default" if template is None else "jinja"
        if template is not None:
            settings["chat_template_jinja"] = template
        if chat and chat.closing in chat.tokenizer.get_vocab() and chat.closing != chat.tokenizer.eos_token:
            settings["eot_tokens"] = [chat.closing]
    return settings | {
        "adapter": "lora",
        "lora_r": training.lora_rank,
        "lora_alpha": training.lora_alpha,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "sequence_len": reading.max_length,
        "excess_length_strategy": "truncate",
        "micro_batch_size": training.batch_size,
        "gradient_accumulation_steps": 1,
        "num_epochs": RECIPE.epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler": "cosine",
        "warmup_ratio": training.warmup,
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "val_set_size": 0,
        "seed": RECIPE.seed,
        "output_dir": _tuned(data, "axolotl"),
    }


def _trl(data: Path, model: str | None, reading: Reading, template: str | None, found: set[str]) -> str:
    """A program that trains with TRL's SFTTrainer."""
    training, tools = RECIPE.training, ', "tools": Value("string")' * (TOOLS in found)
    features, split, every_answer = "", "", False
    if "coreset-tokens.jsonl" in found:
        data = data.with_name("coreset-tokens.jsonl")
    elif found >= {SEVERAL, MASKED}:
        return f"raise SystemExit({NO_WORDS!r})\n"
    elif data.name == "coreset-messages.jsonl":
        features = f', features=Features({{"messages": List(Json()){tools}}})'
        every_answer = SEVERAL in found
        split = "" if every_answer else _TRL_SPLIT.format(tools=tools)
    return _TRL.format(
        data=str(data),
        model=repr(model) if model else _TRL_NAMED,
        imports="" if model else "import sys\n\n",
        tuned=_tuned(data, "trl"),
        features=features,
        split=split,
        template="" if template is None else _TRL_TEMPLATE.format(str(data.with_name("chat_template.jinja"))),
        max_length=reading.max_length,
        epochs=RECIPE.epochs,
        seed=RECIPE.seed,
        every_answer=every_answer,
        **{f.name: getattr(training, f.name) for f in fields(training)},
    )


_TRL = '''"""Fine-tunes a model with TRL on the coreset as it was scored; recipe: `staff finetune`."""

{imports}from datasets import Features, Json, List, Value, load_dataset
from peft import LoraConfig
from torch import cuda
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

model = {model}
tokenizer = AutoTokenizer.from_pretrained(model)
{template}rows = load_dataset("json", data_files={data!r}, split="train"{features})
{split}settings = SFTConfig(
    output_dir={tuned!r},
    max_length={max_length},
    assistant_only_loss={every_answer},
    num_train_epochs={epochs},
    per_device_train_batch_size={batch_size},
    learning_rate={learning_rate},
    lr_scheduler_type="cosine",
    warmup_steps={warmup},  # a share of all steps
    bf16=cuda.is_available() and cuda.is_bf16_supported(),
    seed={seed},
)
lora = LoraConfig(r={lora_rank}, lora_alpha={lora_alpha}, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
if __name__ == "__main__":
    trainer.train()
    trainer.save_model()
'''
_TRL_NAMED = 'sys.argv[1] if sys.argv[1:] else sys.exit("python with_trl.py MODEL: name the model to train")'
_TRL_TEMPLATE = 'tokenizer.chat_template = open({!r}, encoding="utf-8").read()\n'
_TRL_SPLIT = """rows = rows.map(
    lambda row: {{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}},
    remove_columns="messages",
    features=Features({{"prompt": List(Json()), "completion": List(Json()){tools}}}),
)
"""
