"""What other trainers are handed: the text that was scored, in their own words; TRL's program is run."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import staff
from family import TEMPLATE, make_tokenizer
from staff.config import Reading
from staff.data.export import write_coreset
from staff.data.rows import read
from staff.data.samples import SHORTENED
from staff.data.tokens import tokenise

DATA = Path(__file__).parent / "data" / "formats"
FILES = sorted(
    p.name
    for p in DATA.iterdir()
    if p.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet") and p.stem != "dataset_info"
)
NAMED = {"column_named_response.json": "prompt=prompt,response=translation"}


def write(folder, rows, model="MODEL", reading=None, tokenizer=None, pool=None):
    """train/ of all rows but the last, as a run leaves it."""
    folder.mkdir(exist_ok=True)
    write_coreset(folder, rows, range_of(rows), model, reading or Reading(), tokenizer, pool)
    return folder / "train"


def range_of(rows):
    import numpy as np

    return np.arange(max(1, len(rows) - 1))


def messages_of(train):
    return [json.loads(line) for line in (train / "coreset-messages.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("train_on", ["last", "all"])
def test_the_messages_read_back_as_the_examples_that_were_scored(name, train_on, tmp_path):
    rows = read(DATA / name, columns=NAMED.get(name), train_on=train_on)
    train = write(tmp_path / "x", rows, reading=Reading(train_on=train_on))
    entry = ("coreset", train) if (train / "dataset_info.json").exists() else None
    for data, info in ((train / "coreset-messages.jsonl", None), *([entry] if entry else [])):
        again = read(data, dataset_info=info, train_on=train_on)
        for one, other in zip(again.examples(), rows.examples(), strict=False):
            assert [(t.role, t.text, t.train) for t in one.turns] == [
                (t.role, t.text, t.train) for t in other.turns
            ]
            assert one.tools == other.tools
    assert entry or name in ("openai_messages.jsonl", "openai_messages_multiturn.jsonl") or "tool" in name


CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Kiel", "days": 2}}}]
OTHER = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": ["CET", 1]}}}]
TOOLS = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in (("weather", {"a": 1}),)]
WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    + TEMPLATE.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}",
    )
)
MARKED = TEMPLATE.replace(
    "{{ m['content'] }}<|im_end|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
PARTS = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}",
)
PAIRS = [{"question": f"Name {i} rivers.", "answer": "Elbe, Oder."} for i in range(3)]
SYSTEM = [
    {
        "instruction": "And?",
        "input": f"{i}",
        "output": "Oder.",
        "system": "Be brief.",
        "history": [["Name", "Elbe"]],
    }
    for i in range(3)
]
CHATS = [
    {
        "messages": [
            {"role": r, "content": f"{r} {i}"} for r in ("system", "user", "assistant", "user", "assistant")
        ]
    }
    for i in range(3)
]
PARTLY = [{"messages": [*row["messages"], *row["messages"][1:3]]} for row in CHATS]
PARTLY = [
    {
        "messages": [
            {**t, "weight": int(i != 4)} if t["role"] == "assistant" else t
            for i, t in enumerate(row["messages"])
        ]
    }
    for row in PARTLY
]
TOOL_CALLS = [
    {
        "messages": [
            {"role": "user", "content": "How is it?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            *([{"role": "tool", "content": "Rain."}, {"role": "assistant", "content": "Wet."}] if i else []),
        ],
        "tools": TOOLS if i < 2 else [],
    }
    for i, calls in enumerate([CALLS, OTHER, CALLS])
]
LONG = [{"prompt": "Name a river that is long. " * 6, "response": f"Elbe {i}."} for i in range(3)]
CASES = {
    "pairs": (PAIRS, TEMPLATE, {}),
    "columns that were named": ([{"q": "Say", "a": "b"}] * 2, TEMPLATE, {"columns": "prompt=q,response=a"}),
    "input, system and history": (SYSTEM, TEMPLATE, {}),
    "messages": (CHATS, TEMPLATE, {}),
    "tool calls": (TOOL_CALLS, WITH_TOOLS, {}),
    "marks before the answer": (PAIRS, MARKED.replace("{% generation %}", "{% generation %}\n"), {}),
    "the last answer of marked ones": (CHATS, MARKED.replace("{% generation %}", "{% generation %}\n"), {}),
    "every answer": (CHATS, MARKED, {"train_on": "all"}),
    "every answer without marks": (CHATS, TEMPLATE, {"train_on": "all"}),
    "some answers": (PARTLY, TEMPLATE, {"train_on": "all"}),
    "a template without a place for the system": (SYSTEM, NO_SYSTEM, {}),
    "a template that wants parts": (PAIRS, PARTS, {}),
    "a template that writes the day": (
        PAIRS,
        "{{ strftime_now('%d %b') }}" + TEMPLATE,
        {"template_date": "2025-01-31"},
    ),
    "prompts that lose text": (LONG, TEMPLATE, {"max_length": 90}),
    "no template": (SYSTEM, None, {}),
    "no template asked for": (SYSTEM, TEMPLATE, {"chat_template": "none"}),
    "plain texts": ([{"text": f"The Elbe {i}."} for i in range(3)], TEMPLATE, {}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=260, **shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_trls_program_trains_on_the_tokens_and_labels_that_were_scored(case, model, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    given, template, settings = CASES[case]
    reading = Reading(**settings)
    rows = read([*given, given[0]], **reading.keywords())
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(model)
    pool = tokenise(rows.examples(), tokenizer, reading.max_length, reading=reading)
    assert bool(pool.marked(SHORTENED).size) == (case == "prompts that lose text")
    train = write(tmp_path / "x", rows, str(model), reading, tokenizer, pool)
    sent = runpy.run_path(str(train / "with_trl.py"))["trainer"].train_dataset
    assert len(sent) == len(rows) - 1
    for i, row in enumerate(sent):
        ids, mask = pool.ids(i).tolist(), pool.response(i).tolist()
        assert row["input_ids"][: len(ids)] == ids
        assert tokenizer.decode(row["input_ids"][len(ids) :]).strip() == ""
        labels = [label != -100 for label in row["labels"][: len(ids)]]
        assert labels[1:] == mask[1:], (case, tokenizer.decode(ids))


def test_trls_program_runs_by_itself_on_what_a_run_leaves(family, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    rows = [{"q1": f"Name river {i}.", "a1": "Elbe."} for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "target": str(family / "target"),
        "columns": "prompt=q1,response=a1",
        "budget": 4,
        "num_regions": 2,
    }
    run = staff.select(str(data), output=tmp_path / "run", method="direct", max_length=100, **settings)
    program = run.path / "train" / "with_trl.py"
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = json.loads((run.path / "train" / "tuned_trl" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (8, 16)


def test_what_a_trainer_has_no_words_for_is_not_handed_to_it(tmp_path):
    rows = read(PARTLY, train_on="all")
    train = write(tmp_path / "partly", rows, reading=Reading(train_on="all"))
    assert [m.get("weight") for m in messages_of(train)[0]["messages"]].count(0) == 1
    with pytest.raises(SystemExit, match="train on several answers and not on all of them"):
        runpy.run_path(str(train / "with_trl.py"))
    assert not (train / "llama_factory.yaml").exists()
    assert (
        yaml.safe_load((train / "axolotl.yaml").read_text())["datasets"][0]["message_field_training"]
        == "weight"
    )
    train = write(tmp_path / "parts", read(PAIRS), tokenizer=make_tokenizer(PARTS))
    assert not (train / "axolotl.yaml").exists()
    for name, given, tokenizer in (
        ("calls", TOOL_CALLS, make_tokenizer(WITH_TOOLS)),
        ("dated", PAIRS, make_tokenizer("{{ strftime_now('%d') }}" + TEMPLATE)),
        ("plain", PAIRS, make_tokenizer(None)),
        ("no system", SYSTEM, make_tokenizer(NO_SYSTEM)),
    ):
        train = write(tmp_path / name, read(given), reading=Reading(), tokenizer=tokenizer)
        assert not (train / "llama_factory.yaml").exists(), name
        axolotl = yaml.safe_load((train / "axolotl.yaml").read_text())["datasets"][0]
        assert ("tool_calls" in axolotl["message_property_mappings"]) == (name == "calls")


def test_every_trainer_is_told_what_the_selection_was_told(tmp_path):
    template = TEMPLATE.replace("<|im_end|>", "<|stop|>")
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    rows = read(CHATS, train_on="all")
    train = write(tmp_path / "x", rows, "a/model", Reading(train_on="all", max_length=77), tokenizer)
    axolotl, factory = (
        yaml.safe_load((train / f"{n}.yaml").read_text()) for n in ("axolotl", "llama_factory")
    )
    assert (axolotl["base_model"], factory["model_name_or_path"]) == ("a/model", "a/model")
    assert axolotl["datasets"][0]["path"] == str(train / "coreset-messages.jsonl")
    assert axolotl["chat_template_jinja"] == template == (train / "chat_template.jinja").read_text()
    assert axolotl["eot_tokens"] == ["<|stop|>"]
    assert (axolotl["sequence_len"], factory["cutoff_len"]) == (77, 85)
    assert [given["output_dir"] for given in (axolotl, factory)] == [
        str(train / f"tuned_{name}") for name in ("axolotl", "llama_factory")
    ]
    assert (axolotl["lora_r"], factory["lora_rank"], axolotl["lora_alpha"], factory["lora_alpha"]) == (
        8,
        8,
        16,
        16,
    )
    assert (axolotl["micro_batch_size"], factory["per_device_train_batch_size"]) == (8, 8)
    assert (factory["dataset_dir"], factory["mask_history"]) == (str(train), False)
    program = (train / "with_trl.py").read_text()
    assert "max_length=77" in program
    assert "assistant_only_loss=True" in program, "the pool is not known"
    write(tmp_path / "x", read(CHATS), "a/model", Reading(chat_template="none"))
    assert "mask_history" not in {path.name for path in train.iterdir()}
    assert not (train / "llama_factory.yaml").exists(), "that of the run before is gone"


def test_a_model_that_is_not_known_is_named_when_the_training_starts(tmp_path, monkeypatch):
    train = write(tmp_path / "x", read(PAIRS), None)
    for file, how in (
        ("axolotl.yaml", "--base-model MODEL"),
        ("llama_factory.yaml", "model_name_or_path=MODEL"),
    ):
        assert (train / file).read_text().splitlines()[0].endswith(how)
        assert not {"base_model", "model_name_or_path"} & yaml.safe_load((train / file).read_text()).keys()
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.setattr(sys, "argv", ["with_trl.py"])
    with pytest.raises(SystemExit, match=r"python with_trl.py MODEL: name the model to train"):
        runpy.run_path(str(train / "with_trl.py"))


def test_trainers_are_handed_what_a_gguf_target_was_unpacked_to(family, tmp_path):
    from test_gguf import write_gguf

    target = tmp_path / "t.gguf"
    write_gguf(family / "target", target)
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Name {i}.", "response": "Elbe."}) + "\n" for i in range(6))
    )
    run = staff.select(
        str(data), output=tmp_path / "run", method="direct", target=str(target), budget=4, num_regions=2
    )
    axolotl = yaml.safe_load((run.path / "train" / "axolotl.yaml").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(axolotl["base_model"])
    assert Path(axolotl["base_model"]).parent == run.path / "work"


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\n"])
def test_a_line_separator_in_a_name_writes_no_key_into_a_trainers_file(separator, tmp_path):
    name = f"m{separator}trust_remote_code: true #"
    train = write(tmp_path / "x", read(PAIRS), name)
    for file in ("axolotl.yaml", "llama_factory.yaml"):
        settings = yaml.safe_load((train / file).read_text())
        assert "trust_remote_code" not in settings
        assert name in settings.values()
    compile((train / "with_trl.py").read_text(), "with_trl.py", "exec")
