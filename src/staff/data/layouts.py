"""Which column of a row holds what: found by looking, told by --columns, or by LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property


class BadRow(ValueError):
    """One row can't be used; the message says why, the reader adds file, row and line."""


@dataclass(frozen=True)
class Layout:
    """Which column holds what. A row has `messages`, or `text`, or `prompt` and `response`; the other columns may be missing.

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
    roles: Mapping[str, str] | None = None
    named: tuple[str, ...] = ()

    @cached_property
    def bare(self) -> bool:
        """A row is a prompt and a response."""
        return self.messages is None and self.text is None

    @cached_property
    def extras(self) -> tuple[str, ...]:
        """The columns that add to a prompt and a response."""
        return tuple(c for c in (self.query, self.system, self.history, self.tools) if c is not None)

    def required(self) -> tuple[str, ...]:
        """The columns every row must have."""
        return tuple(c for c in (self.messages, self.text, self.prompt, self.response) if c is not None)

    def columns(self) -> tuple[str, ...]:
        """Every column that is looked at, required ones first."""
        optional = (self.query, self.system, self.history, self.tools, self.id)
        return tuple(dict.fromkeys((*self.required(), *(c for c in optional if c is not None))))


# Order matters in one place: `text` stands beside other columns in many files (Alpaca's own among them) and counts only alone.
LAYOUTS = {
    "messages": Layout("messages", messages="messages", tools="tools"),
    "ShareGPT": Layout("ShareGPT", messages="conversations", system="system", tools="tools"),
    "Alpaca": Layout(
        "Alpaca", prompt="instruction", query="input", response="output", system="system", history="history"
    ),
    "Dolly": Layout("Dolly", prompt="instruction", query="context", response="response"),
    "prompt/response": Layout(
        "prompt/response", prompt="prompt", response="response", system="system", tools="tools"
    ),
    "prompt/completion": Layout(
        "prompt/completion", prompt="prompt", response="completion", system="system", tools="tools"
    ),
    "question/answer": Layout("question/answer", prompt="question", response="answer"),
    "text": Layout("text", text="text"),
}

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}

# what --columns may name -> the Layout's field
COLUMN_KEYS = {
    "prompt": "prompt",
    "response": "response",
    "completion": "response",
    "input": "query",
    "query": "query",
    "system": "system",
    "history": "history",
    "messages": "messages",
    "tools": "tools",
    "text": "text",
    "id": "id",
}


def near(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'x'?)' where some known name is near, else nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: on one line, cut."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(columns: Iterable[object], limit: int = 12) -> str:
    names = [shown(c, 40) for c in columns]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def find(columns: Iterable[str], row: Mapping | None = None) -> Layout:
    """The layout of a file with these columns.

    Args:
        columns: names, of the first row or the header.
        row: the first row where there is one, for the cure.

    Raises:
        BadRow: none or several fit.
    """
    columns = [c for c in columns if isinstance(c, str)]
    fits = [layout for layout in LAYOUTS.values() if all(c in columns for c in layout.required())]
    if len(fits) > 1 and fits[-1].name == "text":
        fits.pop()
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = " or ".join(layout.name for layout in fits)
        raise BadRow(f"can be read as {names}; say which with --columns, for instance {_as_columns(fits[0])}")
    if not columns:
        raise BadRow("is an empty object; it needs for instance 'prompt' and 'response'")
    for key, value in (row or {}).items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(v, dict) for v in value[:3])
            and len(columns) <= 5
        ):
            raise BadRow(
                f"looks like a wrapper: its key {key!r} holds a list of rows; take it out first, as with jq '.{key}' FILE > rows.json"
            )
    wanted = [c for layout in LAYOUTS.values() for c in layout.required()]
    hint = next(
        (
            f" {c!r} looks like {m[0]!r}."
            for c in columns
            if (m := difflib.get_close_matches(c.strip().lower(), wanted, 1, 0.8))
        ),
        "",
    )
    raise BadRow(
        "has neither 'messages', 'conversations' nor 'text', nor a known pair such as 'prompt' and 'response'; "
        f"found {listed(columns)}.{hint} Name the columns: --columns prompt=NAME,response=NAME"
    )


def _as_columns(layout: Layout) -> str:
    keys = {v: k for k, v in reversed(COLUMN_KEYS.items())}
    fields = ("messages", "text", "prompt", "response")
    return ",".join(f"{keys[f]}={getattr(layout, f)}" for f in fields if getattr(layout, f) is not None)


def from_columns(columns: str) -> Layout:
    """The layout that `--columns prompt=NAME,response=NAME[,system=NAME...]` asks for.

    Raises:
        ValueError: unknown keys, keys named twice, or a set of them that makes no example.
    """
    fields: dict[str, str] = {}
    for part in columns.split(","):
        key, equals, name = part.partition("=")
        key, name = key.strip(), name.strip()
        if not equals or not name:
            raise ValueError(
                f"--columns {columns!r}: {part.strip()!r} is not of the form KEY=COLUMN; write for instance prompt=question,response=answer"
            )
        if key not in COLUMN_KEYS:
            raise ValueError(
                f"--columns {columns!r}: no key {key!r}{near(key, COLUMN_KEYS)}; there are {', '.join(COLUMN_KEYS)}"
            )
        if COLUMN_KEYS[key] in fields:
            raise ValueError(f"--columns {columns!r}: {key!r} is named twice; name each column once")
        fields[COLUMN_KEYS[key]] = name
    kinds = ["messages" in fields, "text" in fields, "prompt" in fields or "response" in fields]
    if sum(kinds) != 1 or ("prompt" in fields) != ("response" in fields):
        raise ValueError(f"--columns {columns!r}: name either prompt and response, or messages, or text")
    named = tuple(
        name for field, name in fields.items() if field in ("query", "system", "history", "tools", "id")
    )
    return Layout(columns, named=named, **{"id": "id", **fields})  # type: ignore[arg-type]


# LLaMA-Factory's defaults (src/llamafactory/data/parser.py): where an entry gives `columns`, those it leaves out are none
_FACTORY_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
}
_FACTORY_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "assistant"),
    "system_tag": ("system", "system"),
}


def from_factory(entry: Mapping, where: str) -> Layout:
    """The layout of a LLaMA-Factory `dataset_info.json` entry: its formatting, columns and tags.

    Args:
        entry: the parsed entry.
        where: names file and entry in messages.

    Raises:
        ValueError: an unknown formatting, preference data, images and the like, or columns that make no example.
    """
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FACTORY_COLUMNS:
        raise ValueError(
            f"{where}: formatting is {shown(formatting)}; it can be {', '.join(_FACTORY_COLUMNS)}"
        )
    if entry.get("ranking"):
        raise ValueError(
            f"{where}: 'ranking' is set: preference pairs have no single response to learn. Use a data set for supervised fine-tuning"
        )
    columns, tags = entry.get("columns"), entry.get("tags")
    for key, value in (("columns", columns), ("tags", tags)):
        if value is not None and not (
            isinstance(value, Mapping) and all(isinstance(v, str | None) for v in value.values())
        ):
            raise ValueError(
                f"{where}: {key!r} is {shown(value)}; it must be an object of names, as in {{'prompt': 'instruction'}}"
            )
    columns = {k: v for k, v in (_FACTORY_COLUMNS[formatting] if columns is None else columns).items() if v}
    media = [k for k in columns if k in ("images", "videos", "audios", "chosen", "rejected", "kto_tag")]
    if media:
        raise ValueError(f"{where}: it has {listed(media)}; only text with a single response can be used")
    known = ("prompt", "query", "response", "history", "messages", "system", "tools")
    for key in columns:
        if key not in known:
            raise ValueError(
                f"{where}: unknown column key {key!r}{near(key, known)}; there are {', '.join(known)}"
            )
    common = {"system": columns.get("system"), "tools": columns.get("tools")}
    if formatting == "alpaca":
        if "prompt" not in columns or "response" not in columns:
            raise ValueError(
                f"{where}: 'columns' must name 'prompt' and 'response'; found {listed(columns) or 'none'}"
            )
        fields = {k: columns.get(k) for k in ("prompt", "query", "response", "history")}
        return Layout(f"Alpaca ({where.rpartition(', ')[2]})", **fields, **common)  # type: ignore[arg-type]
    tags = dict(tags or {})
    roles = dict(ROLES) if formatting == "openai" else {}
    for tag, (default, role) in _FACTORY_TAGS.items():
        roles[tags.get(tag) or default] = role
    default_tags = ("role", "content") if formatting == "openai" else ("from", "value")
    return Layout(
        f"{'messages' if formatting == 'openai' else 'ShareGPT'} ({where.rpartition(', ')[2]})",
        messages=columns.get("messages") or _FACTORY_COLUMNS[formatting]["messages"],
        role_tag=tags.get("role_tag") or default_tags[0],
        content_tag=tags.get("content_tag") or default_tags[1],
        roles=roles,
        system=common["system"],
        tools=common["tools"],
    )
