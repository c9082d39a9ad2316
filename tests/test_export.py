"""Snippets are run through the libraries' own loaders where they are installed, and agree with what STAFF
itself reads."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from staff.data.export import axolotl, factory_entry, llama_factory, push_to_hub, trl, write_factory_entry
from staff.data.rows import read

DATA = Path(__file__).parent / "data" / "formats"
FILES = sorted(
    p.name
    for p in DATA.iterdir()
    if p.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet") and p.stem != "dataset_info"
)
NAMED = {"column_named_response.json": "prompt=prompt,response=translation"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    if importlib.util.find_spec("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def coreset_of(name, tmp_path, **options):
    rows = read(DATA / name, columns=NAMED.get(name), **options)
    rows.write_jsonl(tmp_path / "coreset.jsonl", range(len(rows) - 1))
    return rows, tmp_path / "coreset.jsonl"


@pytest.mark.parametrize("name", FILES)
def test_the_entry_of_a_coreset_reads_back_the_same_examples(name, tmp_path):
    rows, coreset = coreset_of(name, tmp_path)
    entry = factory_entry(rows, coreset, range(len(rows) - 1))
    if name == "openai_messages_parts.jsonl":
        assert entry is None, "LLaMA-Factory reads content parts by no entry"
        return
    write_factory_entry({"file_name": "other.json"}, tmp_path, "other")
    assert write_factory_entry(entry, tmp_path) == tmp_path / "dataset_info.json"
    assert set(json.loads((tmp_path / "dataset_info.json").read_text())) == {"other", "coreset"}
    again = read("coreset", dataset_info=tmp_path)
    assert [e.turns for e in again.examples()] == [e.turns for e in rows.examples(0, len(rows) - 1)]
    assert [e.tools for e in again.examples()] == [e.tools for e in rows.examples(0, len(rows) - 1)]


def test_an_entry_gives_a_name_to_each_tag_and_only_columns_that_are_there():
    assert factory_entry(read(DATA / "alpaca.json"), "x/c.jsonl") == {
        "file_name": "c.jsonl",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    }
    assert factory_entry(read(DATA / "messages.parquet"), "c.jsonl")["tags"]["assistant_tag"] == "assistant"
    mixed = [
        {"conversations": [{"from": u, "value": "x"}, {"from": "gpt", "value": "y"}]}
        for u in ("human", "user")
    ]
    assert factory_entry(read(mixed), "c.jsonl") is None, "two names for one role"
    assert factory_entry(read([{"text": "t"}]), "c.jsonl") == {
        "file_name": "c.jsonl",
        "columns": {"prompt": "text"},
    }


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("train_on", ["last", "all"])
def test_the_trl_program_makes_the_examples_that_staff_makes(name, train_on, tmp_path):
    pytest.importorskip("datasets", reason="the program loads the coreset with datasets")
    rows, coreset = coreset_of(name, tmp_path, train_on=train_on)
    dataset = trl_dataset(trl(rows, coreset, "MODEL"))
    assert len(dataset) == len(rows) - 1
    for row, example in zip(dataset, rows.examples(), strict=False):
        turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        assert [(t["role"], t["content"]) for t in turns] == [(t.role, t.text) for t in example.turns]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\n"])
def test_a_line_separator_in_a_columns_name_writes_no_key_into_a_trainers_file(separator):
    name = f"q{separator}trust_remote_code: true #"
    rows = read([{name: "p", "answer": "a"}], columns=f"prompt={name},response=answer")
    for text in (llama_factory(rows, "c.jsonl", "MODEL"), axolotl(rows, "c.jsonl", "MODEL")):
        assert "trust_remote_code" not in yaml.safe_load(text)
    assert yaml.safe_load(axolotl(rows, "c.jsonl", "M"))["datasets"][0]["type"]["field_instruction"] == name
    compile(trl(rows, "c.jsonl", "MODEL"), "snippet", "exec")


def trl_dataset(program):
    """Runs the program up to its trainer."""
    loading = program[: program.index("trainer = ")].replace("from trl import SFTConfig, SFTTrainer\n", "")
    names: dict = {}
    exec(compile(loading, "snippet", "exec"), names)
    return names["dataset"]


def test_the_trl_program_runs_to_its_trainer_with_the_loss_on_the_response(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("trl", reason="TRL is not installed")
    transformers = pytest.importorskip("transformers")
    import tokenizers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {"<unk>": 0, "<s>": 1, "</s>": 2, "user": 3, "assistant": 4, "system": 5}, unk_token="<unk>"
        )
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=template,
    )
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows, coreset = coreset_of("alpaca_system_history.json", tmp_path)
    program = trl(rows, coreset, str(tmp_path / "model")).replace("trainer.train()", "")
    program = program.replace(
        'output_dir="tuned"', 'output_dir="tuned", use_cpu=True, bf16=False, report_to="none"'
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(program, "snippet", "exec"), names)
    row = next(iter(names["trainer"].train_dataset))
    mask = row.get("completion_mask") or [int(label != -100) for label in row["labels"]]
    assert 0 < sum(mask) < len(mask), "the loss is on the completion alone"


def test_a_coreset_is_pushed_with_the_hubs_own_calls(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append((name, options))
            return f"https://hub/datasets/{name}"

        def upload_file(self, **options):
            calls.append(options)

    monkeypatch.setattr(hub, "HfApi", Api)
    assert push_to_hub(tmp_path / "coreset.jsonl", "me/mine") == "https://hub/datasets/me/mine"
    assert calls[0] == ("me/mine", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert calls[1]["path_in_repo"] == "train.jsonl"
    monkeypatch.setattr(Api, "upload_file", lambda self, **options: 1 / 0)
    with pytest.raises(ValueError, match=r"can't be pushed to me/mine \(division by zero\); log in with"):
        push_to_hub(tmp_path / "coreset.jsonl", "me/mine")


@pytest.mark.parametrize("name", FILES)
def test_the_other_snippets_are_valid_files(name, tmp_path):
    rows, coreset = coreset_of(name, tmp_path)
    settings = yaml.safe_load(axolotl(rows, coreset, "MODEL"))
    (data,) = settings["datasets"]
    assert data["path"] == str(coreset)
    columns = set(next(rows.raw([0])))
    named = {
        v
        for k, v in (data["type"] if isinstance(data["type"], dict) else data).items()
        if k.startswith("field_")
    }
    assert named <= columns
    told = llama_factory(rows, coreset, "MODEL", range(len(rows) - 1))
    if name == "openai_messages_parts.jsonl":
        assert "see the snippet for TRL" in told
    else:
        entry = json.loads(told.splitlines()[0].partition(": ")[2])["coreset"]
        assert entry == factory_entry(rows, coreset, range(len(rows) - 1))
        assert yaml.safe_load(told)["dataset_dir"] == str(tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("axolotl") is None, reason="Axolotl is not installed (it pins its own torch)"
)
def test_axolotls_own_schema_takes_the_snippet(tmp_path):
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    for name in FILES:
        rows, coreset = coreset_of(name, tmp_path)
        validate_config(DictDefault(yaml.safe_load(axolotl(rows, coreset, "MODEL"))))


@pytest.mark.skipif(
    importlib.util.find_spec("llamafactory") is None,
    reason="LLaMA-Factory is not installed (it pins its own transformers)",
)
def test_llama_factorys_own_parser_takes_the_entry(tmp_path):
    from llamafactory.data.parser import get_dataset_list

    for name in FILES:
        rows, coreset = coreset_of(name, tmp_path)
        if entry := factory_entry(rows, coreset):
            write_factory_entry(entry, tmp_path)
            (attributes,) = get_dataset_list(["coreset"], str(tmp_path))
            assert attributes.dataset_name == "coreset.jsonl"
