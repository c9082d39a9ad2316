"""What Python users call: every command as a function, in Python's words, shown where somebody looks on."""

import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import staff
from family import make_rows, write_pool
from staff import config, settings
from staff.words import in_words, python_words

TUNING = {"epochs": 1, "learning_rate": 1e-2, "dtype": "float32"}


@pytest.mark.parametrize(
    ("kind", "typed", "own"),
    [
        (config.SelectConfig, settings.SelectSettings, {"method", "pruning_rate", "preset"}),
        (config.ScoreConfig, settings.ScoreSettings, {"model"}),
        (config.FinetuneConfig, settings.FinetuneSettings, {"model"}),
        (config.EvaluateConfig, settings.EvaluateSettings, {"model"}),
        (config.InspectConfig, settings.InspectSettings, {"model"}),
        (config.PlanConfig, settings.PlanSettings, {"target"}),
    ],
)
def test_the_settings_that_are_typed_are_those_that_there_are(kind, typed, own):
    assert set(typed.__annotations__) | own == set(config.names_of(kind)) - {"data", "output"} | (
        {"preset"} & own
    )


@pytest.mark.parametrize(
    ("said", "in_python"),
    [
        ("name the pool with --data FILE", "name the pool with data=FILE"),
        ("--budget 5: the pool has only 3", "budget=5: the pool has only 3"),
        ("--draft self:8 keeps 8, --method direct scores", "draft='self:8' keeps 8, method='direct' scores"),
        ("lower --batch-size, and add --update", "lower batch_size, and add update=True"),
        ("--shares qa=0.5,rest: they", "shares='qa=0.5,rest': they"),
        ("type `staff select --config c.yaml`; --json", "type `staff select --config c.yaml`; --json"),
        (
            "--data x\ntrain: staff finetune --data x\n--seed 1",
            "data x\ntrain: staff finetune --data x\nseed=1",
        ),
        ("--load-in 4bit needs bitsandbytes", "load_in='4bit' needs bitsandbytes"),
    ],
)
def test_messages_are_in_pythons_words(said, in_python):
    assert in_words(said) == in_python


def test_every_function_says_what_is_wrong_in_pythons_words(family, tmp_path):
    rows, target = make_rows(6), str(family / "target")
    with pytest.raises(ValueError, match=r"pruning_rate is the fraction of the pool removed.*found 1.2"):
        staff.select(rows, method="random", pruning_rate=1.2)
    with pytest.raises(ValueError, match=r"^staff: max_length must be a whole number"):
        staff.score(rows, model=target, max_length="long")
    with pytest.raises(ValueError, match=r"^model=.*no-such-model"):
        staff.finetune(rows, model=str(tmp_path / "no-such-model"))
    with pytest.raises(ValueError, match="max_new_tokens=300 leaves no room for a prompt in max_length=256"):
        staff.evaluate(rows, model=target, max_new_tokens=300, max_length=256)
    with pytest.raises(ValueError, match=r"the comparison: needs tasks"):
        staff.compare({"target": target})


def test_warnings_and_findings_are_in_pythons_words_and_the_data_in_its_own(family, tmp_path, caplog):
    @python_words
    def warn():
        logging.getLogger("staff.elsewhere").warning("past %d: --max-length %d", 8, 8)
        logging.getLogger("other").warning("--max-length 8")

    warn()
    logging.getLogger("staff.elsewhere").warning("--max-length 8")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["past 8: max_length=8", "--max-length 8", "--max-length 8"]
    rows = [{"prompt": f"Which flag? {'--method x ' * 40}", "response": "--seed 1"} for _ in range(12)]
    found = staff.inspect(rows, model=str(family / "target"), max_length=999, on_long="drop")
    assert "with on_long='drop' such rows are left out" in repr(found)
    assert repr(found).count("--method x") >= 40
    run = staff.select(
        rows, method="staff", target=str(family / "target"), draft=str(family / "draft"), budget=4
    )
    assert "fewer num_regions" in run.summary()
    assert "-> --seed 1" in run.summary()
    assert "train on it: staff finetune --data" in run.summary()


def test_rows_in_memory_are_scored_tuned_on_and_answered(family, tmp_path):
    rows, target = make_rows(12), str(family / "target")
    stages = []
    scores = staff.score(rows, model=target, on_progress=lambda stage, *_: stages.append(stage))
    assert "score on the model" in stages
    assert scores.num_rows == 12
    assert {"row", "id", "effort", "loss", "response_tokens"} <= set(scores.column_names)
    adapter = staff.finetune(rows, model=target, **TUNING)
    assert (adapter / "adapter_model.safetensors").exists()
    again = staff.finetune(
        write_pool(tmp_path / "p.jsonl", 12), model=target, output=tmp_path / "a", **TUNING
    )
    assert (again / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()
    found = staff.evaluate(rows[:3], model=adapter, max_new_tokens=4, output=tmp_path / "answers.jsonl")
    assert found["n"] == 3
    assert "rougeL" in repr(found)
    assert (tmp_path / "answers.jsonl").exists()


def test_data_is_inspected_and_planned_for(family):
    rows = make_rows(12)
    found = staff.inspect([*rows, {"prompt": "none"}], model=str(family / "target"))
    assert (found["rows"], found["skipped"] and len(found["skipped"])) == (12, 1)
    assert "First rows as the model will see them" in repr(found)
    assert "[bold]" not in repr(found)
    made = staff.plan(rows, target=str(family / "target"), draft=str(family / "draft"))
    assert made["n"] == 12
    assert repr(made).lstrip().startswith("pool")


def test_a_run_says_itself_what_the_command_prints(family, tmp_path, monkeypatch):
    data = write_pool(tmp_path / "pool.jsonl", 20)
    run = staff.select(data, method="direct", target=str(family / "target"), budget=5, output=tmp_path / "x")
    assert "coreset    5 samples" in run.summary()
    monkeypatch.chdir(tmp_path.parent)
    assert staff.load_run(tmp_path / "x").summary() == run.summary()
    assert len(repr(run).splitlines()) < 6


def test_bars_are_drawn_in_a_terminal_alone(family, tmp_path, capfd):
    staff.select(make_rows(6), method="random", budget=2)
    assert capfd.readouterr().err == ""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(make_rows(6)))
    code = f"import staff; staff.select({str(rows)!r}, method='random', budget=2{{}})"
    for more, drawn in (("", True), (", quiet=True", False)):
        script = tmp_path / "s.py"
        script.write_text(code.format(more))
        # `script` gives it a terminal
        done = subprocess.run(
            ["script", "-qec", f"{sys.executable} {script}", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("read" in done.stdout) == drawn, done.stdout


def test_every_public_function_is_explained():
    for name in staff.__all__:
        assert inspect.getdoc(getattr(staff, name)), name


def test_a_coreset_as_a_dataset_has_what_trls_program_loads(family, tmp_path):
    datasets = pytest.importorskip("datasets")
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Kiel", "days": 2}}}]
    chat = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "Rain."},
        {"role": "assistant", "content": "Wet."},
    ]
    several = [
        {"messages": chat, "tools": [{"type": "function", "function": {"name": "weather"}}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    run = staff.select(several, method="random", budget=2, output=tmp_path / "chat")
    rows = run.dataset()
    assert isinstance(rows, datasets.Dataset)
    assert rows.column_names == ["prompt", "completion", "tools"]
    assert rows[0]["prompt"][1]["tool_calls"] == calls
    assert rows[0]["completion"] == [{"role": "assistant", "content": "Wet."}]
    assert rows[1]["prompt"] == several[1]["messages"][:1]
    assert json.loads(rows[0]["tools"]) == several[0]["tools"]
    assert rows[1]["tools"] is None
    several = [{"messages": [*several[1]["messages"], *several[1]["messages"]]}] * 2
    every = {"train_on": "all", "method": "random", "budget": 2}
    rows = staff.select(several, output=tmp_path / "all", **every).dataset()
    assert rows.column_names == ["messages"]
    several[0] = {
        "messages": [{**m, "weight": int(i != 1)} for i, m in enumerate(several[0]["messages"])] * 2
    }
    partly = staff.select(several, output=tmp_path / "partly", **every)
    with pytest.raises(ValueError, match="for which TRL has no words"):
        partly.dataset()
    texts = staff.select([{"text": "The Elbe."}, {"text": "Oder."}], method="random", budget=2).dataset()
    assert texts.to_list() == [{"text": "The Elbe."}, {"text": "Oder."}]


def test_the_notebook_runs(family, tmp_path, monkeypatch):
    notebook = json.loads((Path(__file__).parents[1] / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "train.jsonl", 40)
    write_pool(tmp_path / "test.jsonl", 4)
    names: dict = {"display": print}
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        code = "".join(cell["source"])
        for model in ("target", "draft"):
            code = code.replace(f'{model} = "HuggingFaceTB', f"{model} = {str(family / model)!r}  # ")
        exec(compile(code, f"cell {number}", "exec"), names)
    assert len(names["run"].coreset) == 8
    assert [len(each.indices) for each in names["runs"]] == [20, 8, 20, 8]
    assert names["answers"]["n"] == 4


def test_a_package_that_a_comparison_lacks_is_known_before_its_first_cell(family, tmp_path, monkeypatch):
    data = str(write_pool(tmp_path / "pool.jsonl", 8))
    given = {"tasks": {"one": {"train": data, "test": data}}, "target": str(family / "target")}
    given |= {"methods": {"random": {}}, "pruning_rates": [0.5], "seeds": [1]}
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="metrics need the rouge_score"):
        staff.compare(given, output=tmp_path / "c")
    assert not (tmp_path / "c").exists()
