"""The line that a run prints trains on the very tokens that were scored."""

import json
import shlex

import numpy as np
import pytest

import staff
from family import config_of, make_rows
from staff import jobs
from staff.config import FinetuneConfig, SelectConfig, from_mapping
from staff.data import tokens as tokenising
from staff.runs import summary as console

CHATS = [
    {"messages": [{"role": role, "content": f"{role} {i} {text}"} for role, text in turns]}
    for i in range(4)
    for turns in [
        [("user", "a"), ("assistant", "b"), ("user", "c c c c c c c c c c c c"), ("assistant", "d")]
    ]
]
PAIRS = [{"q1": row["prompt"], "a1": row["response"]} for row in make_rows(6)]


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        (PAIRS, {"columns": "prompt=q1,response=a1"}),
        (CHATS, {"train_on": "all", "max_length": 48}),
        (
            PAIRS,
            {
                "dataset_info": {
                    "mine": {"file_name": "pool.jsonl", "columns": {"prompt": "q1", "response": "a1"}}
                }
            },
        ),
    ],
)
def test_the_printed_line_trains_on_the_tokens_that_were_scored(rows, flags, family, tmp_path, monkeypatch):
    data = tmp_path / "pool.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "dataset_info" in flags:
        (tmp_path / "dataset_info.json").write_text(json.dumps(flags["dataset_info"]))
        flags, data = {"dataset_info": str(tmp_path)}, "mine"
    settings = {"target": str(family / "target"), "method": "loss", "draft": str(family / "draft"), **flags}
    run = staff.select(str(data), output=tmp_path / "x y", pruning_rate=0.25, **settings)
    (scored,) = (np.load(path) for path in (tmp_path / "x y").glob("work/pool-*/tokens.npz"))
    values = {**settings, "data": str(data), "method": ("loss",), "pruning_rate": (0.25,)}
    printed = console.summary(run, from_mapping(SelectConfig, values, "test")).splitlines()[-1]
    words = shlex.split(printed.partition("staff finetune ")[2])
    given = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(*[iter(words)] * 2, strict=True)
    }
    given["max_length"] = int(given.get("max_length", 1024))
    seen = []

    class Seen(Exception):
        pass

    def watch(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        raise Seen

    original = tokenising.tokenise
    monkeypatch.setattr(tokenising, "tokenise", watch)
    with pytest.raises(Seen):
        jobs.finetune(config_of(FinetuneConfig, **given))
    expected = [
        scored["input_ids"][scored["offsets"][i] : scored["offsets"][i + 1]] for i in run.selection.indices
    ]
    assert [seen[0].ids(i).tolist() for i in range(len(seen[0]))] == [ids.tolist() for ids in expected]


def test_the_printed_line_has_the_layers_that_were_tuned(family, tmp_path):
    data = tmp_path / "pool.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(9)))
    settings = {"target": str(family / "target"), "draft": str(family / "draft"), "method": "loss"}
    tuned = {}
    for targets in (("q_proj", "v_proj"), ()):
        values = {**settings, "lora_targets": targets, "draft_epochs": 0.5}
        run = staff.select(str(data), output=tmp_path / "x", pruning_rate=0.25, update=True, **values)
        config = {**values, "data": str(data), "method": ("loss",), "pruning_rate": (0.25,)}
        printed = console.summary(run, from_mapping(SelectConfig, config, "test")).splitlines()[-1]
        assert ("--lora-targets q_proj v_proj --output" in printed) == bool(targets)
        assert ("lora_targets: []" in (run.path / "config.yaml").read_text()) == (not targets)
        for path in run.path.glob("work/draft-*/adapter_config.json"):
            tuned[path.parent] = set(json.loads(path.read_text())["target_modules"])
    assert len(tuned) == 2
    assert {"q_proj", "v_proj"} in tuned.values()
