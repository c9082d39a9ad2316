"""A conversation as the model's chat template renders it, and where its trained turns stand in that text."""

from __future__ import annotations

import datetime
import json
import logging
import re
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from staff.config import Reading
from staff.data.layouts import BadRow
from staff.data.turns import Example, Turn, text_of

logger = logging.getLogger(__name__)

USUAL = Reading()

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_CALL = re.compile(r"strftime_now\(\s*([\"'])(.*?)\1\s*\)")
REASONING = ("reasoning_content", "thinking", "reasoning")
QUESTION, ANSWER, THOUGHT = "QUESTION-PROBE", "ANSWER-PROBE", "THOUGHT-PROBE"


class Rendering(NamedTuple):
    """The text of a sample.

    Attributes:
        text: the template's own rendering of the conversation; of a plain text the text itself.
        spans: the characters of each trained turn, from and to, its end token included.
        stripped: the template leaves reasoning of a trained turn away.
        special: the tokenizer's own begin and end tokens go around it, as they do around plain texts.
    """

    text: str
    spans: list[tuple[int, int]]
    stripped: bool = False
    special: bool = False


def template_of(tokenizer: Any, reading: Reading) -> Any:
    """The chat template that holds: the model's own, that of a file, or none; as the tokenizer keeps it.

    Raises:
        ValueError: there is no such file.
    """
    if reading.chat_template in (None, "model"):
        return getattr(tokenizer, "chat_template", None)
    if reading.chat_template == "none":
        return None
    try:
        return Path(str(reading.chat_template)).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"can't be read ({getattr(error, 'strerror', None) or error})"
        cure = "name a file with a Jinja template, or none, or model"
        raise ValueError(f"--chat-template {reading.chat_template}: {reason}; {cure}") from None


def dated(template: str, date: str | None) -> str:
    """A template that writes this date (None: today) where it writes the day's, whatever day it is."""
    day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    fixed = DATE_CALL.sub(lambda call: repr(day.strftime(call[2])), template)
    if "strftime_now(" in fixed:
        raise ValueError(
            "the model's chat template writes the date in a way that can't be held fixed, so that no two "
            "runs would see the same text: give a template that doesn't with --chat-template FILE"
        )
    return fixed


def chat_of(tokenizer: Any, reading: Reading) -> Chat | None:
    """The chat template that holds, looked at; None where there is none."""
    template = template_of(tokenizer, reading)
    chat = Chat(tokenizer, template, reading.template_date) if template else None
    if chat and not chat.closing and not chat.ends:
        logger.warning("the chat template puts no end token behind an answer, so none is learnt")
    return chat


def scaffold(tokenizer: Any) -> str | None:
    """The last mark that a chat template puts before an answer, as </think> or <|message|>; None: none."""
    return Chat(tokenizer, tokenizer.chat_template).scaffold() if tokenizer.chat_template else None


def plain(example: Example, tokenizer: Any) -> Rendering:
    """Prompt, line break, response, end token; of a bare text the text and one end token.

    The begin token is the tokenizer's to set.
    """
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    text, spans = "", []
    for turn in example.turns:
        start = len(text)
        text += turn.text
        if turn.train:
            text += "" if end and text.endswith(end, start) else end
            spans.append((start, len(text)))
        text += "\n"
    return Rendering(text[:-1], spans, special=not (begin and text.startswith(begin)))


def plain_template(tokenizer: Any) -> str:
    """A chat template that writes what `plain` does, for trainers that take nothing else.

    Untrained answers have the weight 0; what the tokenizer sets round a text stands in the template itself.
    """
    begin, end = "(bos_token or '')", "''"
    if tokenizer:
        bare, whole = (tokenizer("a", add_special_tokens=some)["input_ids"] for some in (False, True))
        at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        ids = (whole[:at], [i for i in whole[at + len(bare) :] if i != tokenizer.eos_token_id])
        begin, end = (json.dumps("".join(tokenizer.convert_ids_to_tokens(part))) for part in ids)
    return (
        f"{{{{ '' if messages[0].content.startswith({begin}) else {begin} }}}}"
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' and m.weight != 0 and not m.content.endswith(eos_token or '') %}"
        "{{ eos_token }}{% endif %}"
        "{{ '\\n' if add_generation_prompt or not loop.last else '' }}{% endfor %}"
        f"{{{{ '' if add_generation_prompt else {end} }}}}"
    )


def control_tokens(tokenizer: Any) -> re.Pattern | None:
    """What finds a model's control tokens in text, such as <|im_end|>; None where it has none.

    Where a row's own text spells one, the tokenizer reads it as the control token, as it does in TRL and
    (unless `split_special_tokens` is set) in LLaMA-Factory. Scores must be of what will be trained on, so it
    is read so here too, but never silently: such rows are counted.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = (token.content for token in added if token.special)
    tokens = {token for token in (*tokenizer.all_special_tokens, *special) if token and not token.isspace()}
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered))) if tokens else None


def spells(control: re.Pattern | None, example: Example) -> bool:
    """Does an example spell one where the template should have the only ones? A bare text column may."""
    return control is not None and any(
        turn.role != "text" and control.search(text_of(turn.content)) for turn in example.turns
    )


class Chat:
    """A chat template and what looking at a few renderings tells of it.

    A trained turn's place: what the template's `{% generation %}` marks say. Else it begins where the whole
    departs from the rendering of what comes before it, the generation prompt included, and ends with the
    rendering of the conversation up to it. Where those are no beginnings of the whole, it is what changes
    when its content alone is changed. Blanks behind the end token are no part of it.
    """

    def __init__(self, tokenizer: Any, template: Any, date: str | None = None):
        named = template if isinstance(template, dict) else {"default": template}
        self.tokenizer = tokenizer
        self.named = {name: dated(text, date) for name, text in named.items()}
        self.parts = False
        question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        if not self._shows([question, answer]):
            self.parts = True  # as templates of models that see images do, which walk over a list of parts
            self.parts = self._shows([question, answer])
        self.merges_system = not self._shows([{"role": "system", "content": THOUGHT}, question])
        last = self._try([question, answer]) or ""
        behind = last[last.rfind(ANSWER) + len(ANSWER) :] if ANSWER in last else ""
        self.ends = bool(behind.strip())
        self.blanks = len(behind) - len(behind.rstrip())
        self.closing = self._closing(question, answer, behind)

    def _content(self, content: Any) -> Any:
        if not self.parts:
            return text_of(content)
        parts = [content] if isinstance(content, str) else content
        return [{"type": "text", "text": text_of([part])} for part in parts]

    def _template(self, tools: Any) -> str:
        return self.named["tool_use"] if tools and "tool_use" in self.named else self.named["default"]

    def apply(self, messages: list[dict], tools: Any = None, prompt: bool = False) -> str:
        """The template's rendering; BadRow where it refuses."""
        how = {"chat_template": self._template(tools), "tokenize": False, "add_generation_prompt": prompt}
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how)
        except Exception as error:  # a template is a program: jinja2's, and any that Python raises inside it
            raise _refusal(error) from None

    def _marked(self, messages: list[dict], tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The rendering, and the characters between `{% generation %}` marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        how: Any = {"chat_template": self._template(tools), "return_assistant_tokens_mask": True}
        names = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template([messages], tools, **how, **names)
        except Exception as error:
            raise _refusal(error) from None
        return rendered[0][0], rendered[1][0]

    def _try(self, messages: list[dict], prompt: bool = False) -> str | None:
        asked = [{**m, "content": self._content(m["content"])} for m in messages]
        try:
            return self.apply(asked, prompt=prompt)
        except BadRow:
            return None

    def _shows(self, messages: list[dict]) -> bool:
        rendered = self._try(messages)
        return rendered is not None and all(message["content"] in rendered for message in messages)

    def _closing(self, question: dict, answer: dict, behind: str) -> str:
        """What ends an answer that others follow: it stands between it and the opening of the next turn."""
        again = "AGAIN-PROBE"
        whole = self._try([question, answer, {"role": "user", "content": again}]) or ""
        if not all(probe in whole for probe in (QUESTION, ANSWER, again)):
            return ""
        control = control_tokens(self.tokenizer)

        def pieces(text: str) -> list[str]:
            return [piece for piece in re.split(f"({control.pattern})" if control else "(?!)", text) if piece]

        between = pieces(whole[whole.index(ANSWER) + len(ANSWER) : whole.rindex(again)])
        prompt, history = self._try([question], prompt=True) or "", self._try([question]) or ""
        opening = pieces(prompt[len(history) :]) if prompt.startswith(history) else []
        if opening and opening[0] in between:  # a control token that opens every turn
            return "".join(between[: between.index(opening[0])]).rstrip()
        before = pieces(whole[: whole.index(QUESTION)])
        pairs = enumerate(zip(between[::-1], before[::-1], strict=False))
        shared = next((i for i, (one, other) in pairs if one != other), min(len(between), len(before)))
        closing = "".join(between[: len(between) - shared]) if shared else ""
        return closing.rstrip() or "".join(between)[: _shared("".join(between), behind)].rstrip()

    def turns(self, example: Example) -> list[Turn]:
        """An example's turns; what the system says goes before the next turn where the template has no place
        for it."""
        first, *rest = example.turns
        if not (self.merges_system and first.role == "system" and rest):
            return [first, *rest]
        both = f"{text_of(first.content)}\n\n{text_of(rest[0].content)}"
        return [rest[0]._replace(content=both), *rest[1:]]

    def messages(self, turns: list[Turn]) -> list[dict]:
        """The turns as the template is given them."""
        return [{"role": t.role, "content": self._content(t.content), **(t.fields or {})} for t in turns]

    def render(self, example: Example) -> Rendering:
        """The whole conversation's text and its trained turns.

        Raises:
            BadRow: the template refuses the row, or a trained turn can't be found in the rendering.
        """
        turns = self.turns(example)
        messages, tools = self.messages(turns), example.tools or None
        trained = [place for place, turn in enumerate(turns) if turn.train]
        if GENERATION.search(self._template(tools)):
            text, marks = self._marked(messages, tools)
            spans = self._by_marks(text, marks, messages, tools, trained)
        else:
            text = self.apply(messages, tools)
            spans = [self._place(text, messages, tools, place) for place in trained]
        stripped = False
        for place, (start, end) in zip(trained, spans, strict=False):
            reasoning, answer = _said(turns[place])
            for call in (turns[place].fields or {}).get("tool_calls") or ():
                name = str((call.get("function") or call).get("name"))
                if name not in text[start:end]:
                    raise BadRow(
                        f"has a call of the tool {name!r} that the model's chat template does not show"
                    )
            stripped |= bool(reasoning) and reasoning not in text[start:end]
            if answer not in text[start:end]:  # written otherwise, or not where it should be
                begins, ends = self._changed(text, messages, tools, place)
                if begins < start or end < ends:
                    raise BadRow(_lost("writes the answer outside its own turn"))
        if any(first[1] > second[0] for first, second in pairwise(spans)):
            raise BadRow(_lost("renders answers that overlap"))
        return Rendering(text, spans, stripped)

    def _by_marks(self, text: str, marks: list, messages: list[dict], tools: Any, trained: list[int]) -> list:
        spans: list[tuple[int, int]] = []
        for start, end in marks:
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif end > start:
                spans.append((start, end))
        if self.closing:
            spans = [(s, e + len(self.closing) if text.startswith(self.closing, e) else e) for s, e in spans]
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(assistants):
            return [span for place, span in zip(assistants, spans, strict=True) if place in trained]
        if trained == assistants:
            return spans
        if trained == assistants[-1:]:
            history = self.apply(messages[: trained[0]], tools, prompt=True) if trained[0] else ""
            return [span for span in spans if span[1] > _shared(history, text)]
        raise BadRow(_lost(f"marks {len(spans)} answers where the conversation has {len(assistants)}"))

    def _place(self, text: str, messages: list[dict], tools: Any, place: int) -> tuple[int, int]:
        """The characters of one trained turn."""
        upto = text if place == len(messages) - 1 else self.apply(messages[: place + 1], tools)
        upto = upto[: len(upto) - min(self.blanks, len(upto) - len(upto.rstrip()))]
        end = len(upto) if text.startswith(upto) else self._end(text, messages, tools, place)
        if place:
            prompt = self.apply(messages[:place], tools, prompt=True)
            if text.startswith(prompt):
                return len(prompt), end
            history = self.apply(messages[:place], tools)
            if prompt.startswith(history) and text.startswith(history):
                # the prompt opens a block that the answer's rendering lacks; what both share is the prompt's
                shared = _shared(prompt, text)
                answer = text_of(messages[place]["content"]).strip()
                begins = text.find(answer, len(history), shared + len(answer)) if answer else -1
                by_chance = 0 <= begins < shared and not re.search(r"<[^<>\s]+>", text[begins:shared])
                return (begins if by_chance else shared), end
        return self._changed(text, messages, tools, place)[0], end

    def _end(self, text: str, messages: list[dict], tools: Any, place: int) -> int:
        """Where a turn ends that is rendered otherwise once others follow."""
        if messages[place].get("tool_calls") and self.closing:  # the last end token before the tool's answer
            following = self._changed(text, messages, tools, place + 1)[0]
            return text.rindex(self.closing, 0, following) + len(self.closing)
        return self._changed(text, messages, tools, place)[1]

    def _changed(self, text: str, messages: list[dict], tools: Any, place: int) -> tuple[int, int]:
        """Where the rendering changes when one turn's content is another, up to its end token."""
        turn = messages[place]
        if turn.get("tool_calls"):
            raise BadRow(_lost("renders a turn of tool calls otherwise once others follow"))
        said = text_of(turn["content"]).strip()
        other = ("Q" if said[:1] != "Q" else "Z") + "-other-" + ("X" if said[-1:] != "X" else "Y")
        fields = {name: other[::-1] for name in REASONING if turn.get(name)}
        swapped = [*messages]
        swapped[place] = {**turn, **fields, "content": self._content(other)}
        rendered = self.apply(swapped, tools)
        start = _shared(text, rendered)
        behind = _shared(text[start:][::-1], rendered[start:][::-1])
        if rendered[start : len(rendered) - behind].count(other) != 1:
            raise BadRow(_lost("does not show the answer once, in one place"))
        end = len(text) - behind
        return start, end + (len(self.closing) if text.startswith(self.closing, end) else 0)

    def scaffold(self) -> str | None:
        question = {"role": "user", "content": QUESTION}
        thought = dict.fromkeys(REASONING[:2], THOUGHT)
        for fields in (thought, {}):
            whole = self._try([question, {"role": "assistant", "content": ANSWER, **fields}])
            prompt = self._try([question], prompt=True)
            if whole is None or prompt is None or ANSWER not in whole:
                continue
            opening = whole[_shared(prompt, whole) : whole.index(ANSWER)]
            mark = re.search(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*\Z", opening)
            if mark:
                return mark[1]
            opened = re.search(r"<(\w+)>\s*\Z", prompt)
            if opened:
                return f"</{opened[1]}>"
        return None


def _said(turn: Turn) -> tuple[str, str]:
    """The reasoning and the answer of a turn, both without blanks around them."""
    content = text_of(turn.content)
    before, closed, behind = content.rpartition("</think>")
    fields = turn.fields or {}
    reasoning = next((fields[name] for name in REASONING if isinstance(fields.get(name), str)), "")
    if closed and not reasoning:
        reasoning = before.replace("<think>", "")
    return reasoning.strip(), behind.strip()


def _shared(one: str, other: str) -> int:
    """Characters that two texts share at their beginning."""
    shorter = range(min(len(one), len(other)))
    return bisect_left(shorter, True, key=lambda at: one[: at + 1] != other[: at + 1])


def _refusal(error: Exception) -> BadRow:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BadRow(f"is refused by the model's chat template: {said}")


def _lost(what: str) -> str:
    return (
        f"has an answer that can't be told apart: the model's chat template {what}. Give one with "
        "{% generation %} marks, with --chat-template FILE"
    )
