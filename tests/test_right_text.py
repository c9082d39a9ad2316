"""The rule: what is scored is the chat template's own rendering, tokenised whole, with the trained turns
marked."""

import json
import os
import re
from datetime import date
from itertools import groupby
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from family import TEMPLATE, make_tokenizer
from staff.config import Reading, SelectConfig
from staff.data.chat import scaffold
from staff.data.rows import read
from staff.data.samples import SHORTENED, STRIPPED, Sampler, prompts_of
from staff.data.tokens import in_common, tokenise
from staff.data.turns import Example, Turn
from staff.models.files import Source, tokenizer_fingerprint, with_date
from staff.pipeline import select

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
DAY = Reading(template_date="2025-12-31")
SOAK = bool(os.environ.get("STAFF_SOAK"))
WORDS = [
    "the",
    "of",
    "a",
    "is",
    "in",
    "river",
    "lake",
    "hill",
    "name",
    "Elbe",
    "Paris",
    "first",
    "second",
    "third",
    "question",
    "answer",
    "system",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def turn(role, content, train=False, **fields):
    return Turn(role, content, train, fields or None)


CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Kiel"}}}]
PLACE = {
    "type": "object",
    "properties": {"place": {"type": "string", "description": "where"}},
    "required": [],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "tells it", "parameters": PLACE}}
]
ASK, ANSWER = turn("user", "Name a river."), turn("assistant", "The Elbe.", True)
AGAIN, PARIS = turn("user", "Second question?"), turn("assistant", "Paris", True)
THOUGHT = "<think>\nEights add up.\n</think>\n\n48"
SHAPES = {
    "one turn": ((ASK, ANSWER), None),
    "all of several": (
        (ASK, ANSWER, AGAIN, PARIS, turn("user", "Third?"), turn("assistant", "A hill", True)),
        None,
    ),
    "last of several": ((ASK, ANSWER._replace(train=False), AGAIN, PARIS), None),
    "system": ((turn("system", "Be brief."), ASK, ANSWER), None),
    "thinking": ((turn("user", "Six times eight?"), turn("assistant", THOUGHT, True)), None),
    "thinking in a field": ((ASK, turn("assistant", "48", True, reasoning_content="Eights add up.")), None),
    "a call": ((ASK, turn("assistant", "", True, tool_calls=CALL)), TOOLS),
    "a call and its answer": (
        (ASK, turn("assistant", "", True, tool_calls=CALL), turn("tool", "Rain."), ANSWER),
        TOOLS,
    ),
}


def sentencepiece(prepend):
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if prepend:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    texts = [f"{one} {other}." for one in WORDS for other in WORDS]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *BYTES], show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made.to_str()


def word_pieces():
    words = ["[UNK]", *map(str.lower, WORDS)]
    letters = [chr(i).lower() for i in range(33, 127)]
    pieces = dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters)])
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made.to_str()


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made.to_str()


KINDS = {
    "byte-level": byte_level(),
    "Metaspace": sentencepiece(False),
    "Prepend": sentencepiece(True),
    "WordPiece": word_pieces(),
}


def make(kind, template, begins=False):
    made = Tokenizer.from_str(KINDS[kind])
    named = re.findall(r"<[^<>\s{}'\"]{1,30}>|\[[A-Z_/]{3,20}\]", template or "")
    made.add_special_tokens(list(dict.fromkeys(["<pad>", "<s>", "</s>", *named])))
    if begins:
        ids = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.chat_template = template
    return tokenizer


def dated(template):
    day = date(2025, 12, 31)
    return re.sub(r"strftime_now\(([\"'])(.*?)\1\)", lambda call: repr(day.strftime(call[2])), template)


def renderings(tokenizer, turns, tools):
    """What transformers makes of the conversation, given as text or as parts, its system turn apart or
    merged."""
    first, second, *rest = turns
    merged = [second._replace(content=f"{first.content}\n\n{second.content}"), *rest]
    for some in (turns, merged) if first.role == "system" else (turns,):
        for parts in (False, True):
            messages = [
                {
                    "role": t.role,
                    "content": [{"type": "text", "text": t.content}] if parts else t.content,
                    **(t.fields or {}),
                }
                for t in some
            ]
            try:
                template = dated(tokenizer.chat_template)
                yield tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=template, tokenize=False
                )
            except Exception:
                continue


def trained(tokenizer, pool, i=0):
    """The text of each run of trained tokens."""
    mask = pool.is_response[pool.offsets[i] : pool.offsets[i + 1]]
    runs = groupby(zip(pool.ids(i).tolist(), mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_trained, run in runs if is_trained]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_the_templates_own_rendering_tokenised_whole_or_is_refused_by_name(kind):
    names = TEMPLATES if SOAK else list(TEMPLATES)[:: 3 if kind == "byte-level" else 9]
    exact, refusals = 0, []
    for name in names:
        tokenizer = make(kind, TEMPLATES[name])
        for shape, (turns, tools) in SHAPES.items():
            try:
                pool = tokenise([Example(turns, None, tools)], tokenizer, 1 << 30, reading=DAY)
            except ValueError as error:
                refusals.append((shape, str(error)))
                continue
            ids = pool.ids(0).tolist()
            whole = [
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in renderings(tokenizer, turns, tools)
            ]
            assert any(ids == each[: len(ids)] for each in whole), (name, shape)
            if kind != "WordPiece":  # whose tokens are no text again
                said = trained(tokenizer, pool)
                assert len(said) == sum(t.train for t in turns), (name, shape, said)
                for t, text in zip((t for t in turns if t.train), said, strict=True):
                    assert t.content.rpartition("</think>")[2].strip() in text, (name, shape, said)
            exact += 1
    assert exact >= len(names) * sum("call" not in shape for shape in SHAPES)  # tools alone are refused
    assert exact + len(refusals) == len(SHAPES) * len(names)
    for shape, said in refusals:
        assert re.match("row 0 (is refused by|has an answer that|has a call of)", said), (shape, said)
        assert "tool" in said or "call" in shape, (shape, said)


@pytest.mark.parametrize("shape", ["one turn", "all of several", "system", "a call and its answer"])
def test_trained_turns_are_those_that_trl_marks_in_its_training_templates(shape):
    turns, tools = SHAPES[shape]
    compared = 0
    for name in TEMPLATES:
        training = TEMPLATES.get(f"{name}_training")
        # which after a tool's answer prompts for nothing: its model says the opening of the turn itself, as
        # TRL has it for a prompt and its completion, while TRL's marks leave it out
        if training is None or (name == "diffusion_gemma" and tools):
            continue
        ours, theirs = (
            make("byte-level", TEMPLATES[name] + training),
            make("byte-level", TEMPLATES[name] + training),
        )
        ours.chat_template, theirs.chat_template = TEMPLATES[name], training
        try:
            pools = [tokenise([Example(turns, None, tools)], t, 1 << 30, reading=DAY) for t in (ours, theirs)]
        except ValueError:
            continue
        texts = [
            tokenizer.decode(pool.ids(0)).rstrip()
            for tokenizer, pool in zip((ours, theirs), pools, strict=True)
        ]
        if texts[0] != texts[1]:
            continue  # TRL trains on another text
        for own, marked in zip(trained(ours, pools[0]), trained(theirs, pools[1]), strict=True):
            # theirs may begin with the opening of the turn or end with the blank behind its end token
            assert marked.rstrip().endswith(own.rstrip()), (
                name,
                own,
                marked,
            )
        compared += 1
    assert compared >= (10 if shape != "a call and its answer" else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_tokens_and_labels_of_trls_sfttrainer(kind):
    from trl.trainer.sft_trainer import common_prefix_length

    equal, refused = 0, 0
    for name, template in list(TEMPLATES.items())[:: 1 if SOAK else 8]:
        tokenizer = make(kind, dated(template))
        if "{% generation" in template or "{%- generation" in template:
            continue  # marks of its own
        chat = Sampler(tokenizer, Reading()).chat
        for shape, (turns, tools) in SHAPES.items():
            turns = tuple(t._replace(train=t is turns[-1]) for t in turns)
            example = Example(turns, None, tools)
            try:
                pool = tokenise([example], tokenizer, 1 << 30)
            except ValueError:
                refused += 1
                continue
            messages, tools = chat.messages(chat.turns(example)), {"tools": tools, "return_dict": False}
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **tools)
            whole = tokenizer.apply_chat_template(messages, **tools)
            ids, mask = pool.ids(0).tolist(), pool.response(0)
            assert ids == whole[: len(ids)]
            assert tokenizer.decode(whole[len(ids) :]).strip() == ""
            begins = common_prefix_length(prompt, whole)
            assert mask.tolist() == [i >= begins for i in range(len(ids))], (name, shape)
            equal += 1
    assert equal > 5 * refused


def test_a_long_sample_keeps_its_begin_token_its_system_turn_and_the_template():
    tokenizer = make("byte-level", "{{ bos_token }}" + TEMPLATE)
    question = turn("user", "Name a river that is long. " * 6)
    row = Example((turn("system", "In one word."), question, turn("assistant", "Elbe.", True)), None)
    pool = tokenise([row], tokenizer, 80)
    text = tokenizer.decode(pool.ids(0))
    assert text.startswith("<s><|im_start|>system\nIn one word.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("is long. <|im_end|>\n<|im_start|>assistant\nElbe.<|im_end|>")
    assert (len(pool.ids(0)), pool.marked(SHORTENED).tolist()) == (80, [0])
    tight = tokenizer.decode(tokenise([row], tokenizer, 55).ids(0))
    assert tight.startswith("<s><|im_start|>system\n")
    assert tight.endswith("<|im_start|>assistant\nElbe.<|im_end|>")
    with pytest.raises(ValueError, match=r"row 0 has 2.. tokens, more than --max-length 80"):
        tokenise([row], tokenizer, 80, reading=Reading(on_long="error"))
    left = tokenise([row, Example((ASK, ANSWER), None)], tokenizer, 80, reading=Reading(on_long="drop"))
    assert (len(left), [place for place, _ in left.dropped]) == (1, [0])
    (prompt,), _, cut = prompts_of([row], tokenizer, 70)
    assert (len(prompt), cut) == (70, 1)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


class InPairs(PreTrainedTokenizer):
    """Two letters a token, as a tokenizer written in Python has it."""

    vocab_size = 1 << 14

    def get_vocab(self):
        return {}

    def _tokenize(self, text):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        return sum(ord(letter) << 7 * i for i, letter in enumerate(token))

    def _convert_id_to_token(self, index):
        return "".join(chr(part) for part in (index & 127, index >> 7) if part)


def test_a_tokenizer_without_offsets_gives_the_same_sample_or_is_refused_by_name():
    slow, fast = ByT5Tokenizer(), make("byte-level", TEMPLATE)
    slow.chat_template = TEMPLATE
    row = Example((ASK, ANSWER, AGAIN, PARIS), None)
    ours, theirs = (tokenise([row], tokenizer, 1000) for tokenizer in (slow, fast))
    assert slow.decode(ours.ids(0)) == fast.decode(theirs.ids(0))
    assert trained(slow, ours) == trained(fast, theirs) == ["The Elbe.<|im_end|>", "Paris<|im_end|>"]
    text = tokenise([Example((turn("text", "The Elbe.", True),), None)], slow, 1000)
    assert slow.decode(text.ids(0)) == "The Elbe.</s>"
    long = Example((turn("user", "Name a river. " * 9), ANSWER), None)
    cut = tokenise([long], slow, 100)
    assert (cut.lengths.tolist(), cut.marked(SHORTENED).tolist()) == ([100], [0])
    assert slow.decode(cut.ids(0)).endswith(
        "Name a river. <|im_end|>\n<|im_start|>assistant\nThe Elbe.<|im_end|>"
    )
    pairs = InPairs(chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(ValueError, match=r"row 0 has an answer that .* Use the model's fast tokenizer"):
        tokenise([Example((turn("user", "ab"), turn("assistant", "cd", True)), None)], pairs, 1000)
    pool = tokenise([Example((turn("user", "abc"), turn("assistant", "cd", True)), None)], pairs, 1000)
    assert pairs.convert_ids_to_tokens(pool.ids(0)[pool.response(0)]) == ["cd"]


STRIPS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}"
    "<A>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("opening", ["", "<think>\\n"])
def test_reasoning_that_a_template_strips_is_counted_and_the_answer_is_learnt(opening):
    tokenizer = make("byte-level", STRIPS + "{% if add_generation_prompt %}<A>" + opening + "{% endif %}")
    row = Example((turn("user", "6 times 8?"), turn("assistant", THOUGHT, True)), None)
    pool = tokenise([row, Example((ASK, ANSWER), None)], tokenizer, 1000)
    assert trained(tokenizer, pool) == ["\n\n48</s>"]
    assert trained(tokenizer, pool, 1) == ["The Elbe.</s>"]
    assert pool.marked(STRIPPED).tolist() == [0]


ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}<t>{{ m.role }}\n{{ m.content }}</t>\n{% endfor %}"
    "{% if add_generation_prompt %}<t>assistant\n{% endif %}"
)


def test_a_row_that_the_template_refuses_is_named_and_can_be_skipped_in_the_pools_of_all_models():
    rows = read(
        [
            {"messages": [{"role": r, "content": r} for r in roles]}
            for roles in (["user", "assistant"], ["assistant", "user", "assistant"], ["user", "assistant"])
        ]
    )
    strict, lenient = make("byte-level", ALTERNATES), make("byte-level", TEMPLATE)
    with pytest.raises(
        ValueError, match="row 1 is refused by the model's chat template: take turns, or leave"
    ):
        tokenise(rows.examples(), strict, 1000)
    skip = Reading(on_bad_row="skip")
    pools = {
        i: tokenise(rows.examples(), t, 1000, None, skip, rows.where) for i, t in enumerate([strict, lenient])
    }
    assert (len(pools[0]), len(pools[1])) == (2, 3)
    left, pools = in_common(rows, pools)
    assert (len(pools[0]), len(pools[1]), left.numbers.tolist()) == (2, 2, [0, 2])
    assert [number for number, _ in left.skipped] == [1]
    assert [len(e.turns) for e in left.examples()] == [2, 2]


def test_a_template_that_walks_over_parts_gets_parts():
    walk = "{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    tokenizer = make("byte-level", TEMPLATE.replace("{{ m['content'] }}", walk))
    pool = tokenise([Example((ASK, ANSWER), None)], tokenizer, 1000)
    assert trained(tokenizer, pool) == ["The Elbe.<|im_end|>"]


@pytest.mark.parametrize("template", [None, "{{ bos_token }}" + TEMPLATE])
@pytest.mark.parametrize("text", ["The Elbe.", "The Elbe.</s>", "<s>The Elbe."])
def test_a_plain_text_has_one_begin_and_one_end_token_whatever_the_template(template, text):
    tokenizer = make("byte-level", template, begins=True)
    pool = tokenise([Example((turn("text", text, True),), None)], tokenizer, 1000)
    assert tokenizer.decode(pool.ids(0)) == "<s>The Elbe.</s>"


def test_every_answer_is_trained_where_earlier_ones_are_rendered_otherwise():
    last = (
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    )
    tokenizer = make("byte-level", TEMPLATE.replace("{{ m['content'] }}", last))
    pool = tokenise([Example((ASK, ANSWER, AGAIN, PARIS), None)], tokenizer, 1000)
    assert trained(tokenizer, pool) == ["The Elbe.<|im_end|>", "<think>\n\n</think>\n\nParis<|im_end|>"]
    assert "<|im_start|>user\nSecond question?<|im_end|>" in tokenizer.decode(pool.ids(0))


def test_a_template_that_shows_the_last_turns_alone_learns_a_row_of_one_answer_or_refuses_by_name():
    names = "{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = make("byte-level", names + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert trained(tokenizer, tokenise([Example((ASK, ANSWER), None)], tokenizer, 1000)) == ["The Elbe."]
    with pytest.raises(ValueError, match=r"row 0.*does not show"):
        tokenise([Example((ASK, ANSWER, AGAIN, PARIS), None)], tokenizer, 1000)


def test_no_blank_that_nobody_wrote_stands_before_the_answer():
    for template in (
        None,
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}",
    ):
        tokenizer = make("Metaspace", template, begins=True)
        pool = tokenise([Example((ASK, PARIS), None)], tokenizer, 1000)
        answer = [t for t, m in zip(pool.ids(0).tolist(), pool.response(0), strict=True) if m]
        assert not tokenizer.convert_ids_to_tokens(answer)[0].startswith("▁")
        assert tokenizer.decode(answer) == "Paris</s>"


def test_the_fields_of_a_turn_reach_the_template():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</call>"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make("byte-level", template)
    thinks = [
        {"role": "user", "content": "7 times 8?"},
        {"role": "assistant", "content": "56", "reasoning_content": "So."},
    ]
    calls = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": CALL},
    ]
    pool = tokenise(read([{"messages": thinks}, {"messages": calls}]).examples(), tokenizer, 1000)
    assert trained(tokenizer, pool) == ["<think>So.</think>56<|im_end|>"]
    assert trained(tokenizer, pool, 1) == ['<call>weather {"place": "Kiel"}</call><|im_end|>']


def test_a_row_where_nothing_is_predicted_is_a_bad_row():
    tokenizer = make("byte-level", None)
    tokenizer.eos_token = None
    texts = [Example((turn("text", text, True),), None) for text in ("a", "The Elbe.")]
    with pytest.raises(ValueError, match="row 0 has nothing to learn"):
        tokenise(texts, tokenizer, 1000)
    assert tokenise(texts, tokenizer, 1000, reading=Reading(on_bad_row="skip")).lengths.tolist() == [9]


def test_the_mark_before_an_answer_is_read_off_the_template():
    marks = {
        "qwen3": "</think>",
        "gptoss": "<|message|>",
        "glm4moe": "</think>",
        "llama3": None,
        "gemma": None,
    }
    for name, mark in marks.items():
        assert scaffold(make("byte-level", TEMPLATES[name])) == mark, name


def test_the_day_that_a_template_writes_is_held_fixed_and_said(tmp_path):
    tokenizer = make("byte-level", "{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    row = Example((ASK, ANSWER), None)
    assert tokenizer.decode(tokenise([row], tokenizer, 1000, reading=DAY).ids(0)).startswith(
        "31 Dec 2025<|im"
    )
    tokenizer.save_pretrained(tmp_path)
    source, begun = Source("x", tmp_path), tmp_path / "begun.json"
    assert with_date(Reading(), [source], begun).template_date is not None
    begun.write_text(json.dumps({"settings": {"template_date": "2024-02-29"}}))
    assert with_date(Reading(), [source], begun).template_date == "2024-02-29"
    assert with_date(DAY, [source], begun) == DAY


def test_a_chat_template_of_a_file_or_none_holds_in_place_of_the_models_own(tmp_path):
    tokenizer, row = make_tokenizer(), Example((ASK, ANSWER), None)
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}({{ m.content }}){% endfor %}")
    texts = [
        tokenizer.decode(tokenise([row], tokenizer, 1000, reading=Reading(chat_template=name)).ids(0))
        for name in (str(file), "none")
    ]
    assert texts == ["(Name a river.)(The Elbe.)", "Name a river.\nThe Elbe.<|im_end|>"]
    with pytest.raises(ValueError, match="--chat-template nowhere: can't be read"):
        tokenise([row], tokenizer, 1000, reading=Reading(chat_template="nowhere"))


def test_a_tokenizers_fingerprint_is_of_its_own_files_and_of_the_template_given(tmp_path):
    for name in ("one", "other"):
        make_tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_text(name)
    one, other = (tokenizer_fingerprint(Source(name, tmp_path / name)) for name in ("one", "other"))
    assert one == other
    (tmp_path / "chat.jinja").write_text("x")
    assert tokenizer_fingerprint(Source("one", tmp_path / "one"), str(tmp_path / "chat.jinja")) != one


def test_a_row_that_the_template_refuses_is_left_out_of_a_run_and_of_the_run_taken_up_again(family, tmp_path):
    from shutil import copytree

    for name in ("draft", "target"):
        copytree(family / name, tmp_path / name)
        tokenizer = make_tokenizer(ALTERNATES.replace("<t>", "<|im_start|>").replace("</t>", "<|im_end|>"))
        tokenizer.save_pretrained(tmp_path / name)
    roles = ["assistant", "user", "assistant"]
    chats = [
        [{"role": r, "content": f"{r} {i}"} for r in (roles if i == 3 else roles[1:])] for i in range(30)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    config = SelectConfig(
        data=(str(tmp_path / "chats.jsonl"),),
        target=str(tmp_path / "target"),
        method=("direct",),
        budget=20,
        num_regions=3,
        reading=Reading(on_bad_row="skip"),
        output=str(tmp_path / "x"),
    )
    for _ in range(2):
        (run,) = select(config)
    assert (run.manifest["n"], len(run.rows)) == (29, 29)
    assert [json.loads(line) for line in (tmp_path / "x" / "coreset.jsonl").read_text().splitlines()] == list(
        run.rows.raw(run.selection.indices)
    )
