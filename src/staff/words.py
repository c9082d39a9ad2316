"""What is said in flags, said in Python's words: target='T' for --target T."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from staff import config
from staff.config import names_of, type_of

Given = ParamSpec("Given")
Made = TypeVar("Made")

COMMAND = re.compile(r"(`[^`]*`|\bstaff [a-z]+ --.*)")
# a flag, and the word behind it
FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)\b(?:[ =]((?:'[^']*'|\"[^\"]*\"|[^\s;()])+))?")
VALUE = re.compile(r"[-+]?\d[\d.e+-]*|[A-Z][A-Z./]*|.*[/.:=].*\w.*|'.*'|\".*\"")


@functools.cache
def _flags() -> dict[str, tuple[bool, tuple[str, ...]]]:
    """Every setting by name: is it a switch, and which words it may be given."""
    known: dict[str, tuple[bool, tuple[str, ...]]] = {"update": (True, ()), "quiet": (True, ())}
    kinds = [kind for _, kind in inspect.getmembers(config, inspect.isclass) if hasattr(kind, "REQUIRED")]
    for kind in kinds:
        for name, group in names_of(kind).items():
            hint = type_of(kind if group == name else type_of(kind, group), name)
            choices = [hint, *get_args(hint)]
            words = [word for part in choices if get_origin(part) is Literal for word in get_args(part)]
            known[name] = hint is bool, tuple(words)
    return known


def in_words(text: str) -> str:
    """A message in Python's words; commands stay as they are: between backticks, or to the end of a line."""
    parts = COMMAND.split(text)
    return "".join(part if place % 2 else FLAG.sub(_said, part) for place, part in enumerate(parts))


def _said(match: re.Match[str]) -> str:
    from staff.methods import METHODS

    name, word = match[1].replace("-", "_"), match[2] or ""
    if name not in _flags():
        return match[0]
    is_switch, choices = _flags()[name]
    behind = word[len(word.rstrip(",:.")) :]
    value = word.removesuffix(behind) if behind else word
    if is_switch:
        return f"{name}=True{f' {word}' if word else ''}"
    if value in choices or (name == "method" and value in METHODS) or VALUE.fullmatch(value):
        is_bare = re.fullmatch(r"[-+]?[\d.e+-]+|[A-Z][A-Z./]*|['\"].*", value)
        return f"{name}={value if is_bare else repr(value)}{behind}"
    return f"{name}{f' {word}' if word else ''}"


def python_words(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """The same function, its ValueErrors and its warnings in Python's words."""

    @functools.wraps(function)
    def call(*args: Given.args, **settings: Given.kwargs) -> Made:
        try:
            with _warnings_in_words():
                return function(*args, **settings)
        except ValueError as error:
            error.args = tuple(in_words(arg) if isinstance(arg, str) else arg for arg in error.args)
            raise

    return call


@contextlib.contextmanager
def _warnings_in_words() -> Iterator[None]:
    before = logging.getLogRecordFactory()

    def make(*about: Any, **more: Any) -> logging.LogRecord:
        record = before(*about, **more)
        if record.name.startswith("staff."):
            record.msg, record.args = in_words(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


class Findings(dict[str, Any]):
    """What was found, as plain data; shown, it is what the command line prints, in Python's words.

    Attributes:
        quoted: the text's end, of the data's own words.
    """

    def __init__(self, values: dict[str, Any], text: str, quoted: str = ""):
        super().__init__(values)
        self._text = in_words(text) + quoted

    def __repr__(self) -> str:
        return self._text
