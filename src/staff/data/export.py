"""The coreset on disk, and what TRL, LLaMA-Factory and Axolotl need to train on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import yaml

from staff.data.layouts import Layout
from staff.data.locate import read_json
from staff.data.rows import Rows
from staff.files import remove, write_json, write_text

ROWS_LOOKED_AT = 1_000

CALL = "function_call"
# LLaMA-Factory knows one name for each: our role, its default
FACTORY_TAGS = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("assistant", CALL),
    "system_tag": ("system", "system"),
}


def write_coreset(
    folder: Path, rows: Rows, positions: np.ndarray, model: str, same: bool = False
) -> list[str]:
    """Write the coreset, and what other trainers need to take it.

    coreset.jsonl, with `same` also in the format the rows came in; skipped.jsonl where rows were left out; an
    entry in dataset_info.json and train/llama_factory.yaml where LLaMA-Factory has words for such rows;
    train/trl.py and train/axolotl.yaml.

    Args:
        folder: where.
        rows: the pool.
        positions: (m,) of the coreset in the pool, ascending.
        model: a model that transformers loads, for the snippets.
        same: also in the format the rows came in.

    Returns:
        the files that hold rows, as paths in the folder.
    """
    coreset = folder / "coreset.jsonl"
    for old in [folder / "skipped.jsonl", *folder.glob("coreset.*")]:  # of a run with other settings
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
        _write_snippets(folder, coreset, rows, positions, model)
    return [path.relative_to(folder).as_posix() for path in files]


def _write_snippets(folder: Path, coreset: Path, rows: Rows, positions: np.ndarray, model: str) -> None:
    snippets = {"trl.py": trl(rows, coreset, model), "axolotl.yaml": axolotl(rows, coreset, model, positions)}
    if entry := factory_entry(rows, coreset, positions):
        write_factory_entry(entry, folder)
        snippets["llama_factory.yaml"] = llama_factory(rows, coreset, model, positions)
    for name, text in snippets.items():
        write_text(folder / "train" / name, text)


def factory_entry(
    rows: Rows, coreset: str | os.PathLike, positions: Iterable[int] | None = None
) -> dict | None:
    """What LLaMA-Factory's dataset_info.json must say about a coreset written by `Rows.write_jsonl`.

    Args:
        rows: where the coreset came from.
        coreset: its path; the entry names the file alone, since it lies beside dataset_info.json.
        positions: the coreset, to look at its columns and roles; None: the first rows.

    Returns:
        The entry; None where LLaMA-Factory has no words for the rows (text parts, OpenAI's tool calls,
        prompts that are lists of messages).
    """
    layout, entry = rows.layout, {"file_name": Path(coreset).name}
    some = list(islice(rows.raw(range(len(rows)) if positions is None else positions), ROWS_LOOKED_AT))
    if layout.text is not None:
        return {**entry, "columns": {"prompt": layout.text}}  # its pre-training stage
    present = {c for row in some for c in row}
    fields = ["prompt", "query", "response", "messages", "system", "history"] + ["tools"] * bool(
        layout.messages
    )
    columns = {f: getattr(layout, f) for f in fields if getattr(layout, f) in present}
    if layout.messages is None:
        is_chat = any(isinstance(row[c], list) for row in some for c in layout.required())
        return None if is_chat else {**entry, "columns": columns}
    turns = [turn for row in some for turn in row[layout.messages]]
    role_tag, content_tag = layout.tags(turns[0])
    if not all(isinstance(t.get(content_tag), str) and t.get("tool_calls") is None for t in turns):
        return None
    if "tools" in columns and any(not isinstance(row.get(layout.tools), str | None) for row in some):
        return None
    tags = {"role_tag": role_tag, "content_tag": content_tag}
    used = {t.get(role_tag) for t in turns}
    for tag, (role, default) in FACTORY_TAGS.items():
        is_call = tag == "function_tag"
        ours = [n for n, r in layout.roles.items() if r == role and n in used and (n == CALL) == is_call]
        if len(ours) > 1:
            return None
        tags[tag] = ours[0] if ours else default
    return {**entry, "formatting": "sharegpt", "columns": columns, "tags": tags}


def write_factory_entry(entry: dict, folder: str | os.PathLike, name: str = "coreset") -> Path:
    """Put an entry into a folder's dataset_info.json, beside those that are there.

    Raises:
        ValueError: what is there is no dataset_info.json.
    """
    path = Path(folder) / "dataset_info.json"
    entries = read_json(path) if path.exists() else {}
    write_json(path, {**entries, name: entry})
    return path


def push_to_hub(coreset: str | os.PathLike, repository: str, private: bool = True) -> str:
    """Upload a coreset to the Hugging Face hub as a data set of its own, with the user's own login.

    Args:
        coreset: the file; it becomes train.jsonl.
        repository: owner/name, made if it is not there.
        private: make it visible to its owner alone.

    Returns:
        The data set's address.

    Raises:
        ValueError: no login, no network, or a name that is taken.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        url = hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        hub.upload_file(
            path_or_fileobj=str(coreset), path_in_repo="train.jsonl", repo_id=repository, repo_type="dataset"
        )
    except Exception as error:  # the network and the hub raise whatever they like
        said = " ".join(str(error).split())
        raise ValueError(
            f"{coreset} can't be pushed to {repository} ({said[:300]}); "
            "log in with `hf auth login` and check the name"
        ) from None
    return str(url)


def llama_factory(
    rows: Rows,
    coreset: str | os.PathLike,
    model: str,
    positions: Iterable[int] | None = None,
    name: str = "coreset",
) -> str:
    """A LLaMA-Factory training file (`llamafactory-cli train FILE`), the coreset's entry in a comment."""
    entry = factory_entry(rows, coreset, positions)
    if entry is None:
        return "# LLaMA-Factory can't read rows laid out like these; see the snippet for TRL\n"
    settings = {
        "model_name_or_path": model,
        "stage": "pt" if rows.layout.text is not None else "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": name,
        "dataset_dir": str(Path(coreset).parent),
        "output_dir": "tuned",
        "mask_history": rows.train_on == "last",
    }
    if rows.layout.text is not None:
        del settings["mask_history"]
    else:
        settings["template"] = "TEMPLATE"
    told = json.dumps({name: entry})  # in ASCII: a line separator in a column's name would end the comment
    return f"# dataset_info.json beside the coreset: {told}\n{_yaml(settings)}"


def _yaml(settings: dict) -> str:
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    # the library's own reader folds some line separators in a text that is not escaped
    return text if yaml.safe_load(text) == settings else yaml.safe_dump(settings, sort_keys=False)


def axolotl(
    rows: Rows, coreset: str | os.PathLike, model: str, positions: Iterable[int] | None = None
) -> str:
    """An Axolotl configuration (`axolotl train FILE`) for the coreset."""
    layout = rows.layout
    data: dict = {"path": str(coreset), "ds_type": "json"}
    row = next(iter(rows.raw(islice(positions, 1) if positions is not None else [0])))
    if layout.text is not None:
        data |= {"type": "completion", "field": layout.text}
    elif layout.messages is None:
        instruction = {
            "field_instruction": layout.prompt,
            "field_output": layout.response,
            "format": "{instruction}\n",
        }
        if layout.query in row:
            instruction |= {
                "field_input": layout.query,
                "format": "{instruction}\n{input}\n",
                "no_input_format": "{instruction}\n",
            }
        if layout.system in row:
            instruction["field_system"] = layout.system
        data["type"] = instruction
    else:
        role_tag, content_tag = layout.tags(row[layout.messages][0])
        data |= {
            "type": "chat_template",
            "field_messages": layout.messages,
            "message_property_mappings": {"role": role_tag, "content": content_tag},
            "roles": {
                ours: [n for n, r in layout.roles.items() if r == ours]
                for ours in ("user", "assistant", "system", "tool")
            },
            "roles_to_train": ["assistant"],
        }
    settings = {
        "base_model": model,
        "datasets": [data],
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "sequence_len": 1024,
        "micro_batch_size": 1,
        "num_epochs": 3,
        "learning_rate": 1e-4,
        "output_dir": "tuned",
    }
    return _yaml(settings)


def trl(rows: Rows, coreset: str | os.PathLike, model: str) -> str:
    """A program that tunes a model on the coreset with TRL's SFTTrainer, the loss where STAFF takes it."""
    layout = rows.layout
    all_turns = rows.train_on == "all" and layout.messages is not None
    if layout.text is not None:
        body = f'    return {{"text": row[{layout.text!r}]}}'
    elif layout.messages is not None:
        body = _TRL_CHAT.format(messages=layout.messages, roles=dict(layout.roles))
        if layout.system is not None:
            body += f'    if row.get({layout.system!r}) and messages[0]["role"] != "system":\n'
            body += f'        messages.insert(0, {{"role": "system", "content": row[{layout.system!r}]}})\n'
        body += (
            '    return {"messages": messages}'
            if all_turns
            else '    return {"prompt": messages[:-1], "completion": messages[-1:]}'
        )
    else:
        body = _trl_pair(layout)
    return _TRL.format(
        body=body,
        coreset=str(coreset),
        model=model,
        options=", assistant_only_loss=True" if all_turns else "",
    )


_TRL = """from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def to_trl(row):
{body}


dataset = load_dataset("json", data_files={coreset!r}, split="train")
dataset = dataset.map(to_trl, remove_columns=dataset.column_names)
trainer = SFTTrainer(model={model!r}, args=SFTConfig(output_dir="tuned"{options}), train_dataset=dataset)
trainer.train()
"""

_TRL_CHAT = """    roles = {roles!r}
    messages = []
    for turn in row[{messages!r}]:
        content = turn.get("content") or turn.get("value") or ""
        if isinstance(content, list):
            content = "".join(part.get("text") or part.get("value") or "" for part in content)
        known = ("role", "from", "content", "value", "weight", "loss_weight")
        fields = {{k: v for k, v in turn.items() if v is not None and k not in known}}
        messages.append({{"role": roles[turn.get("role") or turn.get("from")], "content": content, **fields}})
"""


def _trl_pair(layout: Layout) -> str:
    lines = [f"    prompt, response = row[{layout.prompt!r}], row[{layout.response!r}]", "    before = []"]
    if layout.query is not None:
        lines.append(f'    prompt = "\\n".join(text for text in (prompt, row.get({layout.query!r})) if text)')
    if layout.system is not None:
        lines += [
            f"    if row.get({layout.system!r}):",
            f'        before.append({{"role": "system", "content": row[{layout.system!r}]}})',
        ]
    if layout.history is not None:
        lines.append(f"    for user, assistant in row.get({layout.history!r}) or []:")
        lines.append('        before.append({"role": "user", "content": user})')
        lines.append('        before.append({"role": "assistant", "content": assistant})')
    lines.append("    if isinstance(prompt, str):")
    lines.append('        prompt = [{"role": "user", "content": prompt}]')
    lines.append("    if isinstance(response, str):")
    lines.append('        response = [{"role": "assistant", "content": response}]')
    lines.append('    return {"prompt": before + prompt, "completion": response}')
    return "\n".join(lines)
