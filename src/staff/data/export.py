"""The coreset on disk and in other trainers: its files, a LLaMA-Factory entry, and snippets for TRL, LLaMA-Factory and Axolotl."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import yaml

from staff.data.layouts import ROLES, Layout
from staff.data.locate import read_json
from staff.data.rows import Rows
from staff.data.writers import aside
from staff.files import remove, write_text, write_whole

ROWS_LOOKED_AT = 1_000

# LLaMA-Factory knows one name for each; the first is its default
FACTORY_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant", "chatgpt", "model"),
    "observation_tag": ("observation", "tool", "function"),
    "function_tag": ("function_call",),
    "system_tag": ("system", "developer"),
}


def write_coreset(
    folder: Path, rows: Rows, positions: np.ndarray, model: str, same: bool = False
) -> list[str]:
    """Write the coreset, and what other trainers need to take it.

    coreset.jsonl, with `same` also in the format the rows came in; skipped.jsonl where rows were left out; an entry in
    dataset_info.json and train/llama_factory.yaml where LLaMA-Factory has words for such rows; train/trl.py and
    train/axolotl.yaml.

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
    write_whole(coreset, lambda aside: rows.write_jsonl(aside, positions))
    files = [coreset]
    if same and rows.suffix == "":
        rows.write_same(folder / "coreset", positions)
        files += sorted((folder / "coreset").iterdir())
    elif same and rows.suffix != ".jsonl":
        files.append(folder / f"coreset{rows.suffix}")
        write_whole(files[-1], lambda aside: rows.write_same(aside, positions))
    if rows.skipped:
        write_whole(folder / "skipped.jsonl", rows.write_skipped)
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
        The entry; None where LLaMA-Factory has no words for the rows (text parts, OpenAI's tool calls, prompts that are lists of messages).
    """
    layout, entry = rows.layout, {"file_name": Path(coreset).name}
    some = list(islice(rows.raw(range(len(rows)) if positions is None else positions), ROWS_LOOKED_AT))
    present = {c for row in some for c in row}
    if layout.text is not None:
        return {**entry, "columns": {"prompt": layout.text}}  # its pre-training stage
    if layout.messages is None:
        if any(isinstance(row[c], list) for row in some for c in layout.required()):
            return None
        columns = {
            "prompt": layout.prompt,
            "query": layout.query,
            "response": layout.response,
            "system": layout.system,
            "history": layout.history,
        }
        return {**entry, "columns": {k: c for k, c in columns.items() if c in present}}
    turns = [turn for row in some for turn in row[layout.messages]]
    role_tag, content_tag = _tags(layout, turns)
    if not all(isinstance(t.get(content_tag), str) and t.get("tool_calls") is None for t in turns):
        return None
    tags = {"role_tag": role_tag, "content_tag": content_tag}
    used = {t.get(role_tag) for t in turns}
    known = layout.roles if layout.roles is not None else ROLES
    ours = {
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "assistant",
        "system_tag": "system",
    }
    for tag, names in FACTORY_TAGS.items():
        calls = FACTORY_TAGS["function_tag"]
        found = [
            n
            for n in known
            if n in used and known[n] == ours[tag] and ((n in calls) == (tag == "function_tag"))
        ]
        if len(found) > 1:
            return None
        tags[tag] = found[0] if found else names[0]
    columns = {"messages": layout.messages, "system": layout.system, "tools": layout.tools}
    columns = {k: c for k, c in columns.items() if c in present}
    if "tools" in columns and any(not isinstance(row.get(columns["tools"]), str | None) for row in some):
        return None
    return {**entry, "formatting": "sharegpt", "columns": columns, "tags": tags}


def _tags(layout: Layout, turns: list[Mapping]) -> tuple[str, str]:
    first = turns[0]
    role = layout.role_tag or ("role" if "role" in first or "from" not in first else "from")
    return role, layout.content_tag or ("content" if "content" in first or "value" not in first else "value")


def write_factory_entry(entry: dict, folder: str | os.PathLike, name: str = "coreset") -> Path:
    """Put an entry into a folder's dataset_info.json, beside those that are there.

    Raises:
        ValueError: what is there is no dataset_info.json.
    """
    path = Path(folder) / "dataset_info.json"
    entries = read_json(path) if path.exists() else {}
    entries[name] = entry
    with aside(path, ()) as file:
        file.write(json.dumps(entries, indent=2, ensure_ascii=False).encode() + b"\n")
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
            f"{coreset} can't be pushed to {repository} ({said[:300]}); log in with `hf auth login` and check the name"
        ) from None
    return str(url)


def llama_factory(
    rows: Rows,
    coreset: str | os.PathLike,
    model: str,
    positions: Iterable[int] | None = None,
    name: str = "coreset",
) -> str:
    """A LLaMA-Factory training file (`llamafactory-cli train FILE`) for the coreset; its dataset_info.json entry is in a comment."""
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
    told = json.dumps({name: entry}, ensure_ascii=False)
    return f"# dataset_info.json beside the coreset: {told}\n" + yaml.safe_dump(
        settings, sort_keys=False, allow_unicode=True
    )


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
        role_tag, content_tag = _tags(layout, row[layout.messages])
        known = layout.roles if layout.roles is not None else ROLES
        data |= {
            "type": "chat_template",
            "field_messages": layout.messages,
            "message_property_mappings": {"role": role_tag, "content": content_tag},
            "roles": {
                ours: [n for n, r in known.items() if r == ours]
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
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def trl(rows: Rows, coreset: str | os.PathLike, model: str) -> str:
    """A Python program that fine-tunes a model on the coreset with TRL's SFTTrainer, with the loss where STAFF takes it."""
    layout = rows.layout
    all_turns = rows.train_on == "all" and layout.messages is not None
    if layout.text is not None:
        body = f'    return {{"text": row[{layout.text!r}]}}'
    elif layout.messages is not None:
        body = _TRL_CHAT.format(
            messages=layout.messages, roles=dict(layout.roles if layout.roles is not None else ROLES)
        )
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
        lines.append(
            '        before += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]'
        )
    lines.append("    if isinstance(prompt, str):")
    lines.append('        prompt = [{"role": "user", "content": prompt}]')
    lines.append("    if isinstance(response, str):")
    lines.append('        response = [{"role": "assistant", "content": response}]')
    lines.append('    return {"prompt": before + prompt, "completion": response}')
    return "\n".join(lines)
