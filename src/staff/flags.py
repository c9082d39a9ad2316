"""Settings as flags: a config class as a parser, its help in named groups, and completion for a shell."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import shutil
import sys
import types
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from staff.config import names_of, type_of

# where a setting stands in the help; one of `reading` and so on stands with its group, others under selection
PLACES = {
    "data": "data validation test quality_column keep dedup drop_suspects suspect_ratio reading rows",
    "models": "model target draft draft_blocks scores candidates quality_model",
    "selection": "",
    "trying": "trying",
    "scoring": "scoring",
    "training": "eval_data weights epochs max_steps draft_epochs draft_share target_epochs training "
    "lora_rank lora_alpha lora_targets",
    "results": "output format merge report_to push_to_hub public license picture",
    "machine": "engine spread launch trust_remote_code",
    "others": "",
}
PLACE_OF = {name: place for place, names in PLACES.items() for name in names.split()}
KINDS = {
    "ways": "NAME", "metric_command": "COMMAND",
    "data": "FILE", "validation": "FILE", "test": "FILE", "keep": "FILE", "scores": "FILE", "picture": "FILE",
    "target": "MODEL", "draft": "MODEL", "model": "MODEL", "candidates": "MODEL", "output": "PATH",
    "quality_model": "MODEL", "quality_column": "COLUMN",
    "method": "NAME", "option": "NAME=VALUE", "columns": "PART=COLUMN,...", "group_by": "COLUMN",
    "eval_data": "FILE", "weights": "FILE", "chat_template": "FILE", "dataset_info": "FILE",
    "accelerate_config": "FILE", "dedup": "HOW", "shares": "VALUE=SHARE,...", "push_to_hub": "OWNER/NAME",
    "template_date": "DATE",
}  # fmt: skip
OURS = "the command itself"


class Parser(argparse.ArgumentParser):
    """Says what is wrong as a ValueError, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


@cache
def _explained(module: str) -> dict[str, dict[str, str]]:
    """class -> field -> the text below it, of a module's classes."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                    about = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
                    found.setdefault(node.name, {})[field.target.id] = about
    return found


def _plain(hint: Any) -> tuple[Any, bool, bool]:
    """A field's type without what is around it; may it be none, are there several?"""
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        hint = next(part for part in get_args(hint) if part is not type(None))
    several = get_origin(hint) is tuple
    hint = get_args(hint)[0] if several else hint
    return (get_args(hint)[0] if get_origin(hint) is Annotated else hint), optional, several


def _number(text: str) -> Any:
    """What a number's field is given; what is none is for the field's own check to say."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parser_of(program: str, about: str, kind: type | None = None) -> Parser:
    """A parser with a flag for every setting of a config class, in named groups; nothing has a default."""
    width = min(shutil.get_terminal_size().columns - 2, 108)
    required = getattr(kind, "REQUIRED", ())
    short = "".join(f" --{name.replace('_', '-')} {KINDS.get(name, 'X')}" for name in required)
    parser = Parser(
        program,
        usage=f"{program}{short} [settings]",
        description=inspect.cleandoc(about),
        formatter_class=lambda prog: _Formatter(prog, max_help_position=26, width=width),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {place: parser.add_argument_group(place) for place in PLACES}
    names = names_of(kind) if kind else {}
    others = "selection" if "pruning_rate" in names else "others"
    for name, group in names.items():
        owner: Any = kind if group == name else type_of(kind, group)  # type: ignore[arg-type]
        hint, optional, several = _plain(type_of(owner, name))
        default = owner.__dataclass_fields__[name].default
        about = _explained(owner.__module__)[owner.__name__][name].replace("%", "%%")
        if name in required:
            about = f"(required) {about}"
        elif default is not False and default not in (None, (), ""):
            shown = " ".join(map(str, default)) if several else default
            about += f" (default: {shown})"
        choices = get_origin(hint) is Literal and "{" + ",".join(get_args(hint)) + "}"
        shape: dict[str, Any] = {"metavar": KINDS.get(name) or choices or ("TEXT" if hint is str else "N")}
        if hint is bool:
            shape = {"action": argparse.BooleanOptionalAction}
        elif several:
            shape |= {"nargs": "*", "action": "extend"}
        if hint in (int, float):
            shape["type"] = _number
        elif optional and not several:
            shape["type"] = lambda text: None if text == "None" else text
        place = PLACE_OF.get(name) or PLACE_OF.get(group, others)
        groups[place].add_argument(f"--{name.replace('_', '-')}", help=about, **shape)
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """--no-X is not worth a word in a list; a choice is shown once."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.dest.upper()
        if action.nargs == 0:
            return ", ".join(flag for flag in action.option_strings if not flag.startswith("--no-"))
        several = " ..." if action.nargs == "*" else ""
        return f"{action.option_strings[-1]} {action.metavar or action.dest.upper()}{several}"


def parse(parser: Parser, words: Sequence[str]) -> dict[str, Any]:
    """What was given, by name.

    Raises:
        ValueError: a flag that there is not, with the nearest, or a word that belongs to none.
    """
    words = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    given, rest = parser.parse_known_args(words)
    for word in rest:
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag, flags_in(parser), 1)
        if flag.startswith("-"):
            cure = f"did you mean {near[0]}?" if near else f"{parser.prog} --help lists what there is"
            raise ValueError(f"there is no {flag}; {cure}")
        raise ValueError(f"{word!r} belongs to no flag; a value stands behind its own, as in --data {word}")
    return vars(given)


def overlaid(config: Any, given: dict[str, Any]) -> Any:
    """A config with other values of some settings, those of its groups by their own names."""
    names, own, grouped = names_of(type(config)), {}, {}  # type: ignore[var-annotated]
    for name, value in given.items():
        (own if names[name] == name else grouped.setdefault(names[name], {}))[name] = value
    own |= {group: dataclasses.replace(getattr(config, group), **some) for group, some in grouped.items()}
    return dataclasses.replace(config, **own)


def flags_in(parser: argparse.ArgumentParser) -> dict[str, tuple[str, str]]:
    """Flag -> its choices, or what it takes, and what is said of it."""
    return {
        flag: ("" if action.nargs == 0 else str(action.metavar or ""), str(action.help or ""))
        for action in parser._actions
        for flag in action.option_strings
    }


SHELLS = ("bash", "zsh", "fish")
BASH = """_staff() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
    case "${COMP_WORDS[1]} $before" in
%s
    esac
    if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "%s" -- "$word")); return; fi
    case "$word" in -*) ;; *) COMPREPLY=($(compgen -f -- "$word")); return ;; esac
    case "${COMP_WORDS[1]}" in
%s
    esac
}
complete -o filenames -F _staff staff
"""


def completion(shell: str, commands: dict[str, tuple[str, Parser]]) -> str:
    """A script that completes commands, flags and choices.

    Args:
        shell: one of SHELLS.
        commands: name -> what is said of it, and its parser.
    """
    if shell == "fish":
        lines = ["complete -c staff -f -n __fish_use_subcommand -a " + _quoted(name, about)
                 for name, (about, _) in commands.items()]  # fmt: skip
        for name, (_, parser) in commands.items():
            for flag, (takes, about) in flags_in(parser).items():
                choices = f" -x -a '{_choices(takes)}'" if _choices(takes) else " -r" if takes else ""
                if flag.startswith("--"):
                    where = f"-n '__fish_seen_subcommand_from {name}'"
                    lines.append(f"complete -c staff {where} -l {_quoted(flag[2:], about)}{choices}")
        return "\n".join(lines) + "\n"
    cases: list[str] = []
    flags: list[str] = []
    for name, (_, parser) in commands.items():
        known = flags_in(parser)
        flags.append(_case(name, known))
        cases += [_case(f"'{name} {flag}'", _choices(takes).split(), "; return")
                    for flag, (takes, _) in known.items() if _choices(takes)]  # fmt: skip
    script = BASH % ("\n".join(cases), " ".join(commands), "\n".join(flags))
    return "autoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh") + script


def _case(pattern: str, words: Iterable[str], end: str = "") -> str:
    return f'        {pattern}) COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word")){end} ;;'


def _choices(takes: str) -> str:
    return " ".join(takes[1:-1].split(",")) if takes.startswith("{") else ""


def _quoted(word: str, about: str) -> str:
    text = about.partition(". ")[0].replace("%%", "%").replace("\\", "").replace("'", "")
    return f"{word} -d '{text}'"
