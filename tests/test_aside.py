"""Rows that are set aside before a method looks at the pool: repeated ones."""

import json
import subprocess
import sys

import numpy as np
import pytest

import staff
from family import make_rows
from staff import pipeline
from staff.config import SelectConfig, from_mapping, read_yaml
from staff.data.duplicates import find_duplicates
from staff.data.rows import read
from staff.runs.summary import summary

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TEXTS = [
    "a quick brown fox jumps over the lazy dog near the river bank today",
    "an entirely other text that shares no three words in a row with it",
    "A quick brown fox jumps over the LAZY dog near the river bank\ntoday",  # 0 but for case and space
    "a quick brown fox jumps over the lazy dog near the river bank today",  # 0
    "a quick brown fox jumps over the lazy dog near the river bank yesterday",  # 10 of 12 triples of 0
    "a quick brown cat jumps over the lazy dog near the river bank yesterday",
]


def rows_of(texts, **columns):
    return [{"id": f"r{i}", "prompt": "p", "response": text, **columns} for i, text in enumerate(texts)]


def dropped(run):
    return [json.loads(line) for line in (run.path / "dropped.jsonl").read_text().splitlines()]


def test_equal_rows_go_whatever_their_id_and_nearly_equal_ones_by_the_share_of_triples():
    pool = list(read(rows_of(TEXTS)).examples())
    assert find_duplicates(pool, None) == {3: 0}
    assert find_duplicates(pool, 0.8) == {2: 0, 3: 0, 4: 0}
    assert find_duplicates(pool, 0.95) == {2: 0, 3: 0}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    other = read(
        [
            {"messages": [{"role": role, "content": "hi"}, {"role": "assistant", "content": "ho"}], **more}
            for role, more in [("user", {}), ("system", {}), ("user", {"tools": tools}), ("user", {})]
        ]
    )
    assert find_duplicates(other.examples(), None) == {3: 0}


def test_a_script_without_spaces_is_compared_by_letters():
    texts = ["今天天气很好我们去公园散步吧", "今天天气很好我们去公园散步", "他昨天买了一本关于历史的书"]
    assert find_duplicates(read(rows_of(texts)).examples(), 0.8) == {1: 0}


def test_what_repeats_is_the_first_row_that_stays_and_pairs_agree_with_all_compared():
    draws = np.random.default_rng(0)
    texts = []
    for i in range(120):
        words = [f"w{k}" for k in draws.integers(0, 400, 40)] if i % 3 == 0 else texts[-1].split()
        texts.append(" ".join(f"x{i}" if draws.random() < 0.02 else word for word in words))
    triples = [{tuple(("p " + text).split()[j : j + 3]) for j in range(39)} for text in texts]
    firsts, expected = [], {}
    for i, own in enumerate(triples):
        like = next((j for j in firsts if len(own & triples[j]) >= 0.8 * len(own | triples[j])), None)
        if like is None:
            firsts.append(i)
        else:
            expected[i] = like
    found = find_duplicates(read(rows_of(texts)).examples(), 0.8)
    assert len(expected) > 40
    assert sum(found.get(i) == like for i, like in expected.items()) >= 0.95 * len(expected)
    assert set(found.values()).isdisjoint(found)


def test_dedup_and_random_is_one_command_and_counts_the_rows_before(tmp_path):
    rows = rows_of(TEXTS * 2)
    run = staff.select(rows, method="random", dedup="near", budget=2, output=tmp_path / "x")
    assert run.manifest["n"] == 12
    assert run.manifest["m"] == 2
    assert run.manifest["dropped"] == {"near-duplicate": 9}
    assert dropped(run)[:2] == [
        {"row": 2, "reason": "near-duplicate", "of": 0},
        {"row": 3, "reason": "near-duplicate", "of": 0},
    ]
    assert set(run.indices) <= {0, 1, 5}
    assert run.coreset == [rows[i] for i in run.indices]
    table = run.scores.to_pydict()
    assert table["row"] == list(range(12))
    assert table["duplicate_of"][:7] == [None, None, 0, 0, 0, None, 0]
    assert np.flatnonzero(table["selected"]).tolist() == run.indices.tolist()
    config = SelectConfig(method=("random",), dedup="near", budget=2, output=str(tmp_path / "x"))
    assert "9 near-duplicates were set aside before the choice" in summary(run, config)
    again = pipeline.select(config, rows)[0]
    assert again.manifest["files"] == run.manifest["files"]
    assert again.selection.indices.tolist() == run.indices.tolist()
    with pytest.raises(ValueError, match="dedup: 'near' -> 'exact'"):
        staff.select(rows, method="random", dedup="exact", budget=2, output=tmp_path / "x")
    other = staff.select(rows, method="random", budget=2, output=tmp_path / "x", update=True)
    assert not (other.path / "dropped.jsonl").exists()
    assert "duplicate_of" not in other.scores.column_names


def test_more_than_is_left_is_an_error_that_says_what_would_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"budget=4: 4 of 6 rows, and 3 are left without 3 near-dup.*0\.5 or more"
    ):
        staff.select(rows_of(TEXTS), method="random", dedup="near", budget=4, output=tmp_path / "x")
    run = staff.select(rows_of(TEXTS), method="random", dedup="near", pruning_rate=0.5, output=tmp_path / "y")
    assert run.indices.tolist() == [0, 1, 5]


@pytest.mark.parametrize("text", ["nearly", "near:", "near:x", "exact:0.5", "near:0", "near:1.5"])
def test_other_words_for_dedup_are_refused(text):
    with pytest.raises(ValueError, match="dedup"):
        SelectConfig(dedup=text)


def test_near_wants_its_library_before_any_work_and_no_torch(monkeypatch, tmp_path):
    code = (
        f"import sys, staff; staff.select({rows_of(TEXTS)!r}, method='random', dedup='near', budget=2, "
        f"output={str(tmp_path / 'x')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"staff-coreset\[inspect\]"):
        staff.select("nowhere.jsonl", method="random", dedup="near", budget=2, output=tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_draft_never_sees_what_was_set_aside(family, tmp_path):
    rows = make_rows(30)
    rows = rows[:20] + [{**row, "id": f"again {row['id']}"} for row in rows[:10]] + rows[20:]
    models = {"target": str(family / "target"), "draft": str(family / "draft")}
    small = {"method": "staff", "num_regions": 3, "verification_budget": 2, "batch_tokens": 512}
    settings = {**models, **small, "dedup": "exact", "pruning_rate": 0.5}
    run = staff.select(rows, output=tmp_path / "x", **settings)
    assert run.cost["stages"]["score on the draft"]["samples"] == 30
    assert len(run.indices) == 20
    assert set(range(20, 30)).isdisjoint(run.indices)
    table = run.scores.to_pydict()
    aside = [i for i, of in enumerate(table["duplicate_of"]) if of is not None]
    assert aside == list(range(20, 30))
    for name in ("effort", "loss", "region", "prompt_tokens", "target_effort"):
        assert {table[name][i] for i in aside} == {None}
    assert not any(table["verified"][i] for i in aside)
    assert table["region"][30:] == run.selection.region_of[30:].tolist()
    plain = staff.select(make_rows(30), budget=20, output=tmp_path / "y", **models, **small)
    assert [rows[i] for i in run.indices] == plain.coreset


SMALL = {"num_regions": 3, "verification_budget": 2, "batch_tokens": 512}


@pytest.fixture(scope="module")
def models(family):
    return {"target": str(family / "target"), "draft": str(family / "draft")}


def test_suspects_are_those_whose_prompt_does_not_help_and_no_method_takes_one(models, tmp_path):
    rows = make_rows(30)
    rows[5] = {**rows[4], "id": "again"}
    ratios, told = {}, {"dedup": "exact", "drop_suspects": True, **models, **SMALL}
    runs = staff.select_grid(
        rows,
        methods=["staff", "random", "kcenter"],
        output=tmp_path / "x",
        suspect_ratio=1.0,
        budget=8,
        **told,
    )
    for run in runs:
        lines = dropped(run)
        assert lines[[line["row"] for line in lines].index(5)] == {"row": 5, "reason": "duplicate", "of": 4}
        ratios = {line["row"]: line["ratio"] for line in lines if line["reason"] == "suspect"}
        assert 0 < len(ratios) < 20
        assert min(ratios.values()) >= 1
        assert run.manifest["dropped"] == {"duplicate": 1, "suspect": len(ratios)}
        assert len(run.indices) == 8
        assert set(run.indices).isdisjoint([5, *ratios])
        assert set(run.selection.verified).isdisjoint([5, *ratios])
    assert runs[0].cost["stages"]["score on the raw draft without prompts"]["samples"] == 29
    table = runs[0].scores.to_pydict()
    assert all(table["effort"][i] > 0 and not table["selected"][i] for i in ratios)

    # the ratios are those of two passes by themselves
    ifd = staff.select(rows, method="ifd", budget=8, output=tmp_path / "y", **models, **SMALL)
    scored = [dict(np.load(path)) for path in (ifd.path / "work").glob("scores-*/scores.npz")]
    losses = sorted((scores["loss"] for scores in scored), key=lambda loss: loss[0])
    either = [losses[0] / losses[1], losses[1] / losses[0]]
    assert any(
        sorted(set(np.flatnonzero(ratio >= 1)) - {5}) == sorted(ratios)
        and np.allclose(ratio[sorted(ratios)], [ratios[i] for i in sorted(ratios)], rtol=1e-3)
        for ratio in either
    )
    more = staff.select(
        rows, method="random", output=tmp_path / "z", suspect_ratio=0.01, budget=0, **told
    ).manifest["dropped"]
    assert more == {"duplicate": 1, "suspect": 29}
    with pytest.raises(ValueError, match="29 suspects"):
        staff.select(rows, method="random", output=tmp_path / "w", suspect_ratio=0.01, budget=1, **told)


def test_suspects_are_left_out_inside_groups_too(models, tmp_path):
    rows = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(make_rows(30))]
    told = {
        "method": "staff",
        "drop_suspects": True,
        "group_by": "source",
        "pruning_rate": 0.7,
        **models,
        **SMALL,
    }
    run = staff.select(rows, output=tmp_path / "x", **told)
    suspects = {line["row"] for line in dropped(run)}
    assert suspects
    assert len(run.indices) == 9
    assert suspects.isdisjoint(run.indices)
    assert {run.selection.region_of[i] for i in suspects} == {-1}


def test_suspects_need_prompts_and_a_draft(models, tmp_path):
    texts = [{"text": f"so many words {i}"} for i in range(9)]
    with pytest.raises(ValueError, match="drop_suspects=True weighs what prompts help"):
        staff.select(texts, method="random", budget=2, drop_suspects=True, output=tmp_path / "x", **models)
    with pytest.raises(ValueError, match="drop_suspects=True needs a small draft"):
        staff.select(
            make_rows(9),
            method="random",
            budget=2,
            drop_suspects=True,
            target=models["target"],
            output=tmp_path / "x",
        )


def test_shares_are_met_and_shown_beside_the_pools_own(tmp_path):
    sources = ["qa"] * 60 + ["chat"] * 6 + ["code"] * 24 + ["law"] * 10
    rows = [{**row, "source": source} for row, source in zip(make_rows(100), sources, strict=True)]
    told = {"method": "random", "group_by": "source", "shares": "chat=0.3,qa=0.3,rest", "budget": 40}
    run = staff.select(rows, output=tmp_path / "x", **told)
    kept = [row["source"] for row in run.coreset]
    # chat has 6 of 12; qa, code and law share 34 as 0.3 to 0.282 to 0.118: 14.57, 13.71, 5.71
    assert {source: kept.count(source) for source in set(sources)} == {
        "qa": 14,
        "chat": 6,
        "code": 14,
        "law": 6,
    }
    assert run.manifest["groups"][0] == {"group": "chat", "rows": 6, "left": 6, "selected": 6, "asked": 0.3}
    config = SelectConfig(**{**told, "method": ("random",)})
    text = summary(run, config)
    assert "qa: 60.0% of the pool, 30.0% asked for, 35.0% of the coreset" in text
    assert "chat has only 6 of the 12 rows asked for: what it lacks went to the others" in text
    again = from_mapping(SelectConfig, read_yaml(run.path / "config.yaml"), "test")
    assert again.shares == config.shares
    for shares, message in [
        ("qa=0.5,chat=0.3", "they make 0.8 in all; give the others what is left"),
        ("qa=0.8,chat=0.3,rest", "they make 1.1 in all"),
        ("qa=half,rest", "'qa=half' is no value with a share"),
        ("qa=0.1,qa=0.2,rest", "stands twice"),
        ("caht=0.5,rest", "no row's source is 'caht'; did you mean 'chat'"),
    ]:
        with pytest.raises(ValueError, match=message):
            staff.select(rows, output=tmp_path / "y", **{**told, "shares": shares})
    with pytest.raises(ValueError, match="name the column of these values with --group-by"):
        SelectConfig(shares="qa=1")


def test_weights_stand_beside_every_row_that_could_be_drawn(tmp_path):
    rows = [{**row, "source": "aab"[i % 3]} for i, row in enumerate(rows_of(TEXTS[1:] + TEXTS[:1]))]
    run = staff.select(rows, method="random", dedup="exact", budget=2, output=tmp_path / "x")
    assert run.scores["weight"].to_pylist() == [2.5, 2.5, 2.5, 2.5, 2.5, None]
    rows = [{**row, "source": "aab"[i % 3]} for i, row in enumerate(make_rows(30))]
    told = {"method": "random", "group_by": "source", "shares": "a=0.2,b=0.8"}
    run = staff.select(rows, budget=10, output=tmp_path / "y", **told)
    weights = run.scores["weight"].to_pylist()
    assert weights == [10.0 if row["source"] == "a" else 1.25 for row in rows]
    assert sum(weights[i] for i in run.indices) == 30
    again = staff.select(rows, budget=10, output=tmp_path / "y", **told)
    assert again.selection.weights.tolist() == weights
    longest = staff.select(rows, method="random", pruning_rate=0, output=tmp_path / "z")
    assert set(longest.scores["weight"].to_pylist()) == {1.0}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_to_keep_are_always_in_found_by_id_or_text(models, tmp_path):
    rows = make_rows(30)
    rows[20] = {**rows[4], "id": "again"}
    wanted = [{"id": "r7", "prompt": "p", "response": "edited"}, {**rows[3], "id": "x"}, rows[20], rows[7]]
    keep = write_rows(tmp_path / "keep.jsonl", wanted)
    told = {"keep": keep, "dedup": "exact", "drop_suspects": True, **models, **SMALL}
    runs = staff.select_grid(
        rows, methods=["staff", "random"], pruning_rates=[0.8, 0.9], output=tmp_path / "x", **told
    )
    for run in runs:
        assert {3, 4, 7} <= set(run.indices)
        assert len(run.indices) == {0.8: 6, 0.9: 3}[run.manifest["pruning_rate"]]
        assert {3, 4, 7}.isdisjoint(line["row"] for line in dropped(run))
        assert {run.scores["weight"][i].as_py() for i in (3, 4, 7)} == {1.0}
    assert "3 samples, 10% of the pool, 3 of them from --keep" in summary(runs[1], SelectConfig())
    plain = staff.select(rows, method="random", budget=6, keep=keep, output=tmp_path / "y")
    assert {3, 7, 20} <= set(plain.indices)
    with pytest.raises(ValueError, match="has 3 rows, and only 2 are kept"):
        staff.select(rows, method="random", budget=2, keep=keep, output=tmp_path / "z")
    other = write_rows(tmp_path / "other.jsonl", [rows[1], {"id": "no", "prompt": "p", "response": "no"}])
    with pytest.raises(ValueError, match=r"other\.jsonl: row 1 is not in the data"):
        staff.select(rows, method="random", budget=6, keep=other, output=tmp_path / "z")
    write_rows(tmp_path / "keep.jsonl", wanted[:1])
    with pytest.raises(ValueError, match="keep changed"):
        staff.select(rows, method="random", budget=6, keep=keep, output=tmp_path / "y")


def test_of_rows_that_share_an_id_the_one_with_the_text_is_kept(tmp_path):
    rows = [{**row, "id": "r"} for row in make_rows(6)]
    keep = write_rows(tmp_path / "keep.jsonl", [rows[4], {**rows[5], "response": "edited"}])
    run = staff.select(rows, method="random", budget=2, keep=keep, output=tmp_path / "x")
    assert run.indices.tolist() == [0, 4]  # of an edited row the first with its id


def test_more_than_duplicates_leave_is_found_before_anything_is_begun(models, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("staff.models.load.load_model", load)
    monkeypatch.setattr("staff.models.load.load_tokenizer", load)
    with pytest.raises(
        ValueError, match=r"budget=5: 5 of 6 rows, and 4 are left without 2 duplicates: keep 4 at most"
    ):
        staff.select(make_rows(4) + make_rows(2), budget=5, dedup="exact", output=tmp_path / "x", **models)
    assert not (tmp_path / "x").exists()


def test_chance_is_told_from_the_rows_that_could_be_chosen(tmp_path):
    rows = make_rows(20) + make_rows(10)
    keep = write_rows(tmp_path / "keep.jsonl", rows[:4])
    told = {"methods": ["random"], "pruning_rates": [0.6, 0.8], "dedup": "exact", "keep": keep}
    staff.select_grid(rows, output=tmp_path / "x", **told)
    line = (tmp_path / "x" / "overlap.csv").read_text().splitlines()[1].split(",")
    # 12 and 6 of 20, four of them always: 4 + 8 * 2 / 16 are shared by chance, of 6
    assert float(line[4]) == pytest.approx(5 / 6)


def test_rows_to_keep_count_in_the_share_of_their_group(tmp_path):
    rows = [{**row, "source": "aaab"[i % 4]} for i, row in enumerate(make_rows(40))]
    keep = write_rows(tmp_path / "keep.jsonl", [row for row in rows if row["source"] == "b"][:4])
    told = {"method": "random", "group_by": "source", "keep": keep}
    for shares, m, expected in [(None, 20, 5), (None, 8, 4), ("a=0.4,b=0.6", 10, 6), ("a=1,b=0", 10, 4)]:
        run = staff.select(rows, budget=m, shares=shares, output=tmp_path / f"{shares}-{m}", **told)
        assert len(run.indices) == m
        assert sum(row["source"] == "b" for row in run.coreset) == expected
        assert sum(group["selected"] for group in run.manifest["groups"]) == m
    every = write_rows(tmp_path / "every.jsonl", rows)
    run = staff.select(rows, budget=40, output=tmp_path / "all", **{**told, "keep": every})
    assert len(run.indices) == 40


def test_a_budget_of_tokens_takes_as_many_samples_as_go_into_it(models, tmp_path):
    rows = make_rows(30)
    every = {"pruning_rate": 0, "target": models["target"], "draft": models["draft"]}
    table = staff.select(rows, output=tmp_path / "every", **every).scores
    tokens = np.array(table["prompt_tokens"]) + np.array(table["response_tokens"])
    for method in ("random", "staff", "length"):
        told = {"method": method, "target": models["target"], **SMALL}
        told |= {"draft": models["draft"]} if method != "random" else {}
        run = staff.select(rows, budget_tokens=500, output=tmp_path / method, **told)
        m = len(run.indices)
        plain = {
            size: staff.select(rows, budget=size, output=tmp_path / f"{method}-{size}", **told)
            for size in (m, m + 1)
        }
        assert plain[m].indices.tolist() == run.indices.tolist()
        kept = tokens[run.indices].sum()
        assert kept == run.manifest["kept_tokens"] <= 500 < tokens[plain[m + 1].indices].sum()
    config = SelectConfig(method=("random",), budget_tokens=500, target=models["target"])
    assert f"{run.manifest['kept_tokens']} of 500 tokens" in summary(run, config)
    told = {"method": "random", "target": models["target"]}
    assert len(staff.select(rows, budget_tokens=10**6, output=tmp_path / "all", **told).indices) == 30
    with pytest.raises(ValueError, match=r"budget_tokens=3: the first sample has \d+ tokens"):
        staff.select(rows, budget_tokens=3, output=tmp_path / "few", **told)
    keep = write_rows(tmp_path / "keep.jsonl", rows[:9])
    with pytest.raises(ValueError, match="budget_tokens=300: keep alone has"):
        staff.select(rows, budget_tokens=300, keep=keep, output=tmp_path / "kept", **told)
    with pytest.raises(ValueError, match="--budget or --budget-tokens, one of them"):
        SelectConfig(budget=3, budget_tokens=3)
