"""A row -> the turns a model will see, by TRL's and LLaMA-Factory's conventions; or why it can't be used."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from staff.data.layouts import BadRow, Layout, listed, near, shown

_WEIGHTS = ("weight", "loss_weight")


# a frozen dataclass takes three times as long to make: a million rows make three million
class Turn(NamedTuple):
    """One turn of a chat.

    Attributes:
        role: "system", "user", "assistant" or "tool", whatever the file calls them; "text" for a bare `text`
            column.
        content: what is said: text, or a list of text parts as the file has them. Never empty where `train`
            is set, unless the turn calls tools.
        train: the loss is taken on it.
        fields: the turn's other keys as they are (reasoning_content, tool_calls, name, ...), nulls taken out;
            None where it has none.
    """

    role: str
    content: str | list
    train: bool
    fields: Mapping | None = None

    @property
    def text(self) -> str:
        """What is said as one text, tool calls behind it as JSON, one a line: for lengths and for people."""
        calls = (self.fields or {}).get("tool_calls") or ()
        return "\n".join(filter(None, (text_of(self.content), *map(_call_text, calls))))


class Example(NamedTuple):
    """One usable row as the model will see it.

    Attributes:
        turns: the last one is trained on, and is the assistant's (or the only one, with role "text").
        id: the row's own label, if it has one. Identity is the row number.
        tools: the tools that the row offers, if it offers any.
    """

    turns: tuple[Turn, ...]
    id: str | None
    tools: list | None = None


def build(layout: Layout, row: Mapping, train_on: str = "last") -> Example:
    """A row's turns.

    Args:
        layout: which column holds what.
        row: column -> value.
        train_on: "last" takes the loss on the last assistant turn, "all" on every one. A turn's own `weight`
            or `loss_weight` of 0 (OpenAI's and LLaMA-Factory's way to say "not this one") takes it off; what
            follows the last trained turn is left away.

    Returns:
        The example; its last turn is trained on.

    Raises:
        BadRow: says what is wrong with the row and the cure.
    """
    label = row.get(layout.id) if layout.id is not None else None
    if label is not None and not (label.__class__ is str and label.isascii()):
        label = label_of(label)
    if layout.extras is not None:  # the same as below, for the rows that most files are made of
        prompt, response = row.get(layout.prompt), row.get(layout.response)
        if isinstance(prompt, str) and isinstance(response, str):
            filled = prompt and response and not prompt.isspace() and not response.isspace()
            if filled and layout.extras.isdisjoint(row):
                prompt = prompt if prompt.isascii() else _clean(prompt, repr(layout.prompt))
                response = response if response.isascii() else _clean(response, repr(layout.response))
                return Example((Turn("user", prompt, False), Turn("assistant", response, True)), label)
    if layout.text is not None:
        return Example((Turn("text", _said(_value(row, layout.text), repr(layout.text)), True),), label)
    chat = layout.messages
    turns = _pair(layout, row) if chat is None else _chat(layout, _value(row, chat), chat)
    if (system := _optional(row, layout.system)) and turns[0].role != "system":
        turns.insert(0, Turn("system", system, False))
    return Example(_trained(turns, train_on), label, _tools(row, layout.tools))


def label_of(value: object) -> str | None:
    """An id as text, the same for 7 and 7.0; None where it is no text or number."""
    if isinstance(value, str):  # half a surrogate pair can be written nowhere
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else None


def _pair(layout: Layout, row: Mapping) -> list[Turn]:
    assert layout.prompt is not None
    assert layout.response is not None
    turns: list[Turn] = []
    if layout.history is not None and (history := row.get(layout.history)):
        for i, pair in enumerate(history if isinstance(history, list | tuple) else [history]):
            where = f"{layout.history!r}: entry {i}"
            if not (isinstance(pair, list | tuple) and len(pair) == 2):
                raise BadRow(f"{where} is {shown(pair)}; it must be a pair of texts, [user, assistant]")
            turns.append(Turn("user", _said(pair[0], f"{where}, user,"), False))
            turns.append(Turn("assistant", _said(pair[1], f"{where}, assistant,"), True))
    prompt, response = _value(row, layout.prompt), _value(row, layout.response)
    if _is_chat(prompt):
        turns += [t._replace(train=False) for t in _chat(layout, prompt, layout.prompt)]
    else:
        query = _optional(row, layout.query)
        if query and isinstance(prompt, str):  # Alpaca: either half may be empty
            prompt = f"{prompt}\n{query}" if prompt and not prompt.isspace() else query
        turns.append(Turn("user", _said(prompt, repr(layout.prompt)), False))
    if _is_chat(response):
        turns += _chat(layout, response, layout.response)
    else:
        turns.append(Turn("assistant", _said(response, repr(layout.response)), True))
    return turns


def _is_chat(value: object) -> bool:
    """TRL's conversational prompt and completion."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _trained(turns: list[Turn], train_on: str) -> tuple[Turn, ...]:
    """Marks what is trained on; the turns end with the last of it."""
    assistants = [i for i, t in enumerate(turns) if t.role == "assistant"]
    if not assistants:
        raise BadRow("has no assistant turn, so there is nothing to learn; add the answer")
    if turns[-1].role != "assistant":
        raise BadRow(f"ends with a {turns[-1].role} turn; take the turns after the last assistant turn away")
    trained = [i for i in assistants if turns[i].train]
    if not trained:
        raise BadRow("takes the loss on no turn: every assistant turn has weight 0; set one to 1")
    last = trained[-1]
    if train_on == "last" and len(trained) > 1:
        turns = [t._replace(train=False) if t.train and i != last else t for i, t in enumerate(turns)]
    return tuple(turns[: last + 1])


def _value(row: Mapping, column: str) -> object:
    try:
        return row[column]
    except KeyError:
        raise BadRow(f"has no {column!r}{near(column, row)}; found {listed(row)}") from None


def _said(value: object, what: str) -> str:
    """A text that must be there."""
    if isinstance(value, str):
        if not value or value.isspace():
            raise BadRow(f"{what} is empty; fill it in")
        return _clean(value, what)
    raise BadRow(f"{what} is {_kind(value)}; it must be text: {_text_cure(value)}")


def _clean(value: str, what: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (\\u{ord(value[error.start]):04x})"
        raise BadRow(f"{what} has {half} at character {error.start}; replace it") from None
    return value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _optional(row: Mapping, column: str | None) -> str:
    """A text that may be missing, null or empty."""
    value = row.get(column)
    if column is None or _is_missing(value):
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is {_kind(value)}; it must be text or left away")
    return _clean(value, repr(column)) if value and not value.isspace() else ""


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if _is_missing(value):
        return "NaN"
    names = {int: "the number", float: "the number", list: "a list,", dict: "an object,", bytes: "bytes,"}
    name = next((n for t, n in names.items() if isinstance(value, t)), f"a {type(value).__name__},")
    return f"{name} {shown(value)}"


def _text_cure(value: object) -> str:
    if _is_missing(value):
        return "fill it in"
    return "put it in quotation marks" if isinstance(value, int | float) else "make it one"


def _chat(layout: Layout, messages: object, column: str) -> list[Turn]:
    """The turns of a column; `train` is set on assistant turns unless their weight is 0."""
    if isinstance(messages, str):
        cure = "it must be a list of turns (where it holds JSON, parse it first)"
        raise BadRow(f"{column!r} is text, {shown(messages)}; {cure}")
    example = "such as {'role': 'user', 'content': '...'}"
    if not isinstance(messages, list | tuple):
        raise BadRow(f"{column!r} is {_kind(messages)}; it must be a list of turns {example}")
    if not messages:
        raise BadRow(f"{column!r} is an empty list; fill it in")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRow(f"{column!r}: turn {i} is {_kind(message)}; it must be an object {example}")
        try:
            turns.append(_turn(layout, message))
        except BadRow as error:
            name = message.get(layout.tags(message)[0])
            who = f" ({name})" if isinstance(name, str) and name in layout.roles else ""
            raise BadRow(f"{column!r}: turn {i}{who}{error}") from None
    return turns


def _turn(layout: Layout, message: Mapping) -> Turn:
    """One turn; what is wrong with it goes behind its name."""
    role_tag, content_tag = layout.tags(message)
    name, content = message.get(role_tag), message.get(content_tag)
    role = layout.roles.get(name) if isinstance(name, str) else None
    if role is None:
        if name is None:
            raise BadRow(f" has no {role_tag!r}; found {listed(message)}")
        if not isinstance(name, str):
            raise BadRow(f" has the role {shown(name)}, which is no text")
        known = f"{near(name, layout.roles)}; known: {', '.join(layout.roles)}"
        raise BadRow(f" has the unknown role {shown(name)}{known}")
    if content_tag not in message and not message.get("tool_calls"):
        raise BadRow(f" has no {content_tag!r}; found {listed(message)}")
    fields, train = None, role == "assistant"
    if len(message) > 2 or content_tag not in message:
        fields = _fields(message, role_tag, content_tag)
        train = train and _weight(message)
    calls = role == "assistant" and fields is not None and bool(fields.get("tool_calls"))
    if content is None and (calls or role in ("system", "tool")):
        content = ""
    if isinstance(content, list):
        content = [_part(part) for part in content]
    elif not isinstance(content, str):
        raise BadRow(f" is {_kind(content)}; it must be text: {_text_cure(content)}")
    said = text_of(content)
    if not said.isascii():
        _clean(said, "")
    if (not said or said.isspace()) and not calls and role in ("user", "assistant"):
        raise BadRow(" is empty; fill it in")
    return Turn(role, content, train, fields)


def _part(part: object) -> object:
    """A part of a turn's content, which is text, or an object that holds text."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise BadRow(f" has a part that is {_kind(part)}; a part is {{'type': 'text', 'text': '...'}}")
    if part.get("type", "text") != "text":
        raise BadRow(f" has a part of type {shown(part.get('type'))}; only text can be used")
    if not isinstance(part.get("text") if part.get("text") is not None else part.get("value"), str):
        raise BadRow(f" has a text part without 'text'; found {listed(part)}")
    return without_nulls(part)


def text_of(content: str | list) -> str:
    """The text of a turn's content, which may be parts."""
    if isinstance(content, str):
        return content
    return "".join(
        part if isinstance(part, str) else part.get("text") or part.get("value") or "" for part in content
    )


def without_nulls(value: Any) -> Any:
    """A value without keys that hold null, as TRL has it: Arrow gives a struct every key of its type."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _fields(message: Mapping, role_tag: str, content_tag: str) -> Mapping | None:
    known = (role_tag, content_tag, *_WEIGHTS)
    fields = without_nulls({key: value for key, value in message.items() if key not in known})
    calls = fields.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(c, Mapping) for c in calls)):
        raise BadRow(f": 'tool_calls' is {_kind(calls)}; it must be a list of objects")
    for call in calls or ():
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f": a tool call has no name; found {shown(call)}")
    if fields:
        _as_json(fields, "")
    return fields or None


def _call_text(call: Mapping) -> str:
    """A call as ShareGPT's function_call turns write it."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # a model's malformed call is still what it said
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _weight(message: Mapping) -> bool:
    for key in _WEIGHTS:
        value = message.get(key)
        if value is None:
            continue
        if isinstance(value, str | list | dict) or value not in (0, 1):
            raise BadRow(f": {key!r} is {shown(value)}; only 0 (no loss on this turn) and 1 can be used")
        return bool(value)
    return True


def _tools(row: Mapping, column: str | None) -> list | None:
    value = row.get(column) if column is not None else None
    if _is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError):
            cure = "it must be a JSON list of tools or left away"
            raise BadRow(f"{column!r} is not valid JSON: {shown(value)}; {cure}") from None
    if not isinstance(tools, list):
        raise BadRow(f"{column!r} is {_kind(value)}; it must be a list of tools, or JSON text of one")
    _as_json(tools, repr(column))
    return without_nulls(tools) or None


def _as_json(value: object, what: str) -> None:
    """What templates write as JSON must be writable as such."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, RecursionError, ValueError):
        raise BadRow(f"{what} can't be written as JSON: {shown(value)}") from None
