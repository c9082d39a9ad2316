"""Which column of a row holds what: found by looking, or told by --columns or a dataset_info.json."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

ROLES: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}


class BadRow(ValueError):
    """One row can't be used; the message says why, the reader adds file, row and line."""


@dataclass(frozen=True)
class Layout:
    """Which column holds what: `messages`, or `text`, or `prompt` and `response`; others may be missing.

    Attributes:
        name: what people call it.
        prompt, response, text, messages: column names; None where the layout has no such column.
        query: appended to the prompt after a line break (Alpaca's input).
        system, history, tools, id: optional columns. `history` is a list of (user, assistant) pairs.
        role_tag, content_tag: keys of a turn; None: role/content or from/value, whichever the turn has.
        roles: names of roles in the file -> ours.
        named: the optional columns that a user named, which therefore must occur.
    """

    name: str
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    messages: str | None = None
    query: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    id: str | None = "id"
    role_tag: str | None = None
    content_tag: str | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    named: tuple[str, ...] = ()

    @cached_property
    def extras(self) -> frozenset[str] | None:
        """The columns that add to a prompt and a response; None where a row is no such pair."""
        if self.messages is not None or self.text is not None:
            return None
        return frozenset(c for c in (self.query, self.system, self.history, self.tools) if c is not None)

    def tags(self, turn: Mapping) -> tuple[str, str]:
        """The keys of a turn's role and content."""
        role = self.role_tag or ("role" if "role" in turn or "from" not in turn else "from")
        content = "content" if "content" in turn or "value" not in turn else "value"
        return role, self.content_tag or content

    def required(self) -> tuple[str, ...]:
        """The columns every row must have."""
        return tuple(c for c in (self.messages, self.text, self.prompt, self.response) if c is not None)

    def columns(self) -> tuple[str, ...]:
        """Every column that is looked at, required ones first."""
        optional = (self.query, self.system, self.history, self.tools, self.id)
        return tuple(dict.fromkeys((*self.required(), *(c for c in optional if c is not None))))


# `text` stands last: it is beside other columns in many files (Alpaca's own among them) and counts only alone
_ALPACA: dict[str, Any] = {"prompt": "instruction", "query": "input", "response": "output"}
LAYOUTS = (
    Layout("messages", messages="messages", tools="tools"),
    Layout("ShareGPT", messages="conversations", system="system", tools="tools"),
    Layout("Alpaca", **_ALPACA, system="system", history="history"),
    Layout("Dolly", prompt="instruction", query="context", response="response"),
    Layout("prompt/response", prompt="prompt", response="response", system="system", tools="tools"),
    Layout("prompt/completion", prompt="prompt", response="completion", system="system", tools="tools"),
    Layout("question/answer", prompt="question", response="answer"),
    Layout("text", text="text"),
)
REQUIRED = tuple(dict.fromkeys(column for layout in LAYOUTS for column in layout.required()))
# columns that belong to the prompt in the files that have them: a layout without them would leave them out
_BEFORE = ("input", "context", "passage", "instruction", "system", "system_prompt", "history", "tools")
_MEDIA = ("choices", "options", "image", "images", "video", "videos", "audio", "audios")
PROMPT_COLUMNS = frozenset[str](_BEFORE + _MEDIA)

# what --columns may name -> the Layout's field
COLUMN_KEYS = {"prompt": "prompt", "response": "response", "completion": "response", "input": "query"}
COLUMN_KEYS |= {k: k for k in ("query", "system", "history", "messages", "tools", "text", "id")}
_AS_KEY = {"system_prompt": "system", "context": "input", "passage": "input"}


def near(name: str, known: Iterable[object]) -> str:
    """' (did you mean 'x'?)' where some known name is near, else nothing."""
    match = difflib.get_close_matches(name, [k for k in known if isinstance(k, str)], n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: on one line, cut."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def visible(text: str) -> str:
    """A text with what a terminal would obey (escapes, carriage returns, turned writing) spelled out."""
    obeyed = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return "".join(
        repr(c)[1:-1] if c in obeyed or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") else c
        for c in text
    )


def listed(columns: Iterable[object], limit: int = 12) -> str:
    names = [shown(c, 40) for c in columns]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def find_layout(row: Mapping) -> Layout:
    """The layout of a file whose first row has these columns.

    Raises:
        BadRow: none or several fit.
    """
    columns = [c for c in row if isinstance(c, str)]
    fits = [layout for layout in LAYOUTS if all(c in columns for c in layout.required())]
    if len(fits) > 1 and fits[-1].text is not None:
        fits.pop()
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = " or ".join(layout.name for layout in fits)
        raise BadRow(f"can be read as {names}; say which with --columns, for instance {_as_columns(fits[0])}")
    if not columns:
        raise BadRow("is an empty object; it needs for instance 'prompt' and 'response'")
    for key in columns:
        value = row[key]
        if not (isinstance(value, list) and value and all(isinstance(v, dict) for v in value[:3])):
            continue
        if {"role", "from"} & value[0].keys():
            raise BadRow(f"has its turns in {key!r}; name that column: --columns messages={key}")
        if value[0].keys() == {"input", "output"}:
            cure = "list of {'role': 'user', 'content': ...} and {'role': 'assistant', 'content': ...}"
            what = "the turns of one conversation; make them a"
            raise BadRow(f"has pairs of input and output in {key!r}, {what} {cure}")
        if len(columns) <= 5:
            cure = f"take it out first, as with jq '.{key}' FILE > rows.json"
            raise BadRow(f"looks like a wrapper: its key {key!r} holds a list of rows; {cure}")
    hint = ""
    for column in columns:
        match = difflib.get_close_matches(column.strip().lower(), REQUIRED, 1, 0.8)
        if match and column not in REQUIRED:
            nested = isinstance(row[column], dict | list)
            hint = f" {column!r} looks like {match[0]!r}"
            hint += f", but holds {shown(row[column], 40)}: take the text out of it first." if nested else "."
            break
    raise BadRow(
        "has neither 'messages', 'conversations' nor 'text', nor a known pair such as 'prompt' and "
        f"'response'; found {listed(columns)}.{hint} Name the columns: --columns prompt=NAME,response=NAME"
    )


def left_out(layout: Layout, row: Mapping) -> str:
    """Why a row can't be read in a layout that was only guessed: a column of the prompt would be left out."""
    used = layout.columns()
    column = next((c for c in row if c in PROMPT_COLUMNS and c not in used and row[c]), None)
    if column is None or layout.text is not None:
        return ""
    told = _as_columns(layout, row)
    key = _AS_KEY.get(column, column)
    more = f",{key}={column}" if key in COLUMN_KEYS and getattr(layout, COLUMN_KEYS[key]) not in row else ""
    cure = f"to read it too: --columns {told}{more}; " if more else ""
    return (
        f"has the column {column!r}, which {layout.name} has no place for: the prompt would be read "
        f"without it; {cure}to leave it out: --columns {told}"
    )


def _as_columns(layout: Layout, row: Mapping | None = None) -> str:
    keys = {v: k for k, v in reversed(COLUMN_KEYS.items())}
    fields = ("messages", "text", "prompt", "response", "query", "system", "history", "tools")
    present = {*layout.required(), *(row or ())}
    return ",".join(f"{keys[f]}={getattr(layout, f)}" for f in fields if getattr(layout, f) in present)


def from_columns(columns: str) -> Layout:
    """The layout that `--columns prompt=NAME,response=NAME[,system=NAME...]` asks for.

    Raises:
        ValueError: unknown keys, keys named twice, or a set of them that makes no example.
    """
    fields, where = dict[str, str](), f"--columns {columns!r}"
    for part in columns.split(","):
        key, _, name = (word.strip() for word in part.partition("="))
        if not name:
            cure = "write for instance prompt=question,response=answer"
            raise ValueError(f"{where}: {part.strip()!r} is not of the form KEY=COLUMN; {cure}")
        if key not in COLUMN_KEYS:
            known = f"{near(key, COLUMN_KEYS)}; there are {', '.join(COLUMN_KEYS)}"
            raise ValueError(f"{where}: no key {key!r}{known}")
        if COLUMN_KEYS[key] in fields:
            raise ValueError(f"{where}: {key!r} is named twice; name each column once")
        fields[COLUMN_KEYS[key]] = name
    kinds = ["messages" in fields, "text" in fields, "prompt" in fields or "response" in fields]
    if sum(kinds) != 1 or ("prompt" in fields) != ("response" in fields):
        raise ValueError(f"{where}: name either prompt and response, or messages, or text")
    optional = ("query", "system", "history", "tools", "id")
    named = tuple(name for key, name in fields.items() if key in optional)
    return Layout(columns, named=named, **{"id": "id", **fields})  # type: ignore[arg-type]


# LLaMA-Factory's defaults (its data/parser.py): where an entry gives `columns`, what it leaves out is none
_CHATS = {"sharegpt": {"messages": "conversations"}, "openai": {"messages": "messages"}}
_FACTORY_COLUMNS = {"alpaca": _ALPACA, **_CHATS}
_FACTORY_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "assistant"),
    "system_tag": ("system", "system"),
}
_FACTORY_KEYS = ("prompt", "query", "response", "history", "messages", "system", "tools")


def from_factory(entry: Mapping, where: str) -> Layout:
    """The layout of a LLaMA-Factory `dataset_info.json` entry: its formatting, columns and tags.

    Args:
        entry: the parsed entry.
        where: names file and entry in messages.

    Raises:
        ValueError: an unknown formatting, preference data, images, or columns that make no example.
    """
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FACTORY_COLUMNS:
        known = ", ".join(_FACTORY_COLUMNS)
        raise ValueError(f"{where}: formatting is {shown(formatting)}; it can be {known}")
    if entry.get("ranking"):
        why = "preference pairs have no single response to learn. Use a data set for supervised fine-tuning"
        raise ValueError(f"{where}: 'ranking' is set: {why}")
    for key in ("columns", "tags"):
        value = entry.get(key) or {}
        if not (isinstance(value, Mapping) and all(isinstance(v, str | None) for v in value.values())):
            example = "as in {'prompt': 'instruction'}"
            raise ValueError(f"{where}: {key!r} is {shown(value)}; it must be an object of names, {example}")
    columns = entry.get("columns")
    columns = {k: v for k, v in (_FACTORY_COLUMNS[formatting] if columns is None else columns).items() if v}
    media = [k for k in columns if k in ("images", "videos", "audios", "chosen", "rejected", "kto_tag")]
    if media:
        raise ValueError(f"{where}: it has {listed(media)}; only text with a single response can be used")
    for key in columns:
        if key not in _FACTORY_KEYS:
            known = f"{near(key, _FACTORY_KEYS)}; there are {', '.join(_FACTORY_KEYS)}"
            raise ValueError(f"{where}: unknown column key {key!r}{known}")
    name = where.rpartition(", ")[2]
    if formatting == "alpaca":
        if list(columns) == ["prompt"]:  # of its pre-training stage
            return Layout(f"text ({name})", text=columns["prompt"])
        if "prompt" not in columns or "response" not in columns:
            found = listed(columns) or "none"
            raise ValueError(f"{where}: 'columns' must name 'prompt' and 'response'; found {found}")
        fields: dict[str, Any] = {key: column for key, column in columns.items() if key != "messages"}
        return Layout(f"Alpaca ({name})", **fields)
    tags, is_openai = entry.get("tags") or {}, formatting == "openai"
    roles = {tags.get(tag) or default: role for tag, (default, role) in _FACTORY_TAGS.items()}
    role_tag, content_tag = ("role", "content") if is_openai else ("from", "value")
    return Layout(
        f"{'messages' if is_openai else 'ShareGPT'} ({name})",
        messages=columns.get("messages") or _FACTORY_COLUMNS[formatting]["messages"],
        role_tag=tags.get("role_tag") or role_tag,
        content_tag=tags.get("content_tag") or content_tag,
        roles={**ROLES, **roles} if is_openai else roles,
        system=columns.get("system"),
        tools=columns.get("tools"),
    )
