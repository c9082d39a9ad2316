"""Several methods and rates in one run: what they share is done once, and every method of the table runs
through."""

import csv
import json

import numpy as np
import pytest

import staff
from family import make_rows, write_pool
from staff.config import SelectConfig
from staff.data.tokens import Pool
from staff.methods import METHODS
from staff.methods.groups import share_by_size
from staff.runs.summary import grid_table, summary

SMALL = {
    "num_regions": 4,
    "verification_budget": 2,
    "draft_epochs": 1,
    "target_epochs": 1,
    "learning_rate": 1e-2,
    "batch_tokens": 512,
}


FOR_MODS = {
    "quality_column": "quality",
    "columns": "prompt=prompt,response=response,id=id",
    "option": ["alpha=1"],
    "max_new_tokens": 4,
}


def choose(family, data, output, **settings):
    return staff.select_grid(
        data,
        output=output,
        **{"target": str(family / "target"), "draft": str(family / "draft"), **SMALL, **settings},
    )


def choose_one(family, data, output, method="staff", pruning_rate=None, **settings):
    (run,) = choose(family, data, output, methods=[method], pruning_rates=[pruning_rate], **settings)
    return run


@pytest.fixture(scope="module")
def everything(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    data = folder / "pool.jsonl"
    rows = [row | {"quality": i % 9} for i, row in enumerate(make_rows(48))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = write_pool(folder / "validation.jsonl", 4)
    runs = choose(
        family,
        str(data),
        folder / "x",
        methods=list(METHODS),
        pruning_rates=[0.5, 0.75],
        validation=str(validation),
        **FOR_MODS,
    )
    return folder / "x", runs


def test_every_method_of_the_table_makes_its_coreset_at_every_rate(everything):
    folder, runs = everything
    assert [(run.manifest["method"], run.manifest["pruning_rate"], len(run.indices)) for run in runs] == [
        (method, rate, m) for method in METHODS for rate, m in [(0.5, 24), (0.75, 12)]
    ]
    for run in runs:
        assert len((run.path / "coreset.jsonl").read_text().splitlines()) == len(run.indices)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "work",
        *(run.path.name for run in runs),
    }


def test_one_pass_over_a_model_serves_every_method_and_rate(everything):
    _, runs = everything
    stages = runs[-1].cost["stages"]
    for stage in (
        "score on the draft",
        "score on the target",
        "score on the tuned target",
        "score on the raw draft",
        "gradients of the draft",
        "gradients of the draft kept apart",
        "hidden states of the draft",
    ):
        assert stages[stage]["samples"] == 48, stage
    for quantity in ("similarity", "similarities", "rds"):  # the cost of each method is its own
        assert stages[f"look at the validation rows for {quantity}"]["samples"] == 4
    for number in (1, 2, 3, 4):
        assert stages[f"score on the draft at {number}/4"]["samples"] == 48
    assert stages["hidden states of the draft over prompts"]["samples"] == 48
    assert stages["fine-tune the target on the seed"]["samples"] == 2  # a twentieth
    assert stages["answer on the target tuned on the seed"]["samples"] == 36 - 2  # those above alpha, once
    # 24 by five before three questions, of either half; and once for both rates
    assert stages["answer on the draft"]["samples"] == stages["answer on the target"]["samples"] == 2 * 5 * 3
    assert stages["fine-tune the draft"]["samples"] == stages["fine-tune the target"]["samples"] == 48


def test_methods_choose_by_their_own_number_and_not_by_effort(everything):
    folder, runs = everything
    chosen = {run.path.name: set(run.selection.indices.tolist()) for run in runs}
    (scores,) = (
        path
        for path in folder.glob("work/scores-*/scores.npz")
        if "features" in np.load(path).files and _is_draft(path)
    )
    loss, entropy = np.load(scores)["loss"], np.load(scores)["entropy"]
    assert chosen["loss-0.75"] == set(np.argsort(-loss, kind="stable")[:12].tolist())
    assert chosen["entropy-0.75"] == set(np.argsort(-entropy, kind="stable")[:12].tolist())


def _is_draft(path):
    return (
        '"epochs"' in (path.parent / "key.json").read_text()
        and '"share"' in (path.parent / "key.json").read_text()
        and len(np.load(path)["features"][0]) == 16
    )  # the draft is 16 wide


def test_the_tables_say_how_alike_and_how_nested_the_coresets_are(everything):
    folder, runs = everything
    with open(folder / "overlap.csv") as file:
        pairs = {(row["first"], row["second"]): row for row in csv.DictReader(file)}
    assert (
        float(pairs["loss-0.75", "loss-0.5"]["overlap"]) == 1.0
    )  # the highest twelve lie within the highest 24
    assert len(pairs) == len(METHODS) + len(METHODS) * (len(METHODS) - 1)
    with open(folder / "cells.csv") as file:
        assert [row["folder"] for row in csv.DictReader(file)] == [run.path.name for run in runs]


def test_a_cell_added_later_reuses_what_is_there_and_a_finished_run_is_taken_as_it_is(
    everything, family, monkeypatch
):
    from staff.scoring import scorer as score

    folder, runs = everything
    monkeypatch.setattr(score.Scorer, "__init__", lambda *_, **__: pytest.fail("a model was loaded again"))
    validation = str(folder.parent / "validation.jsonl")
    data = str(folder.parent / "pool.jsonl")
    again = choose(
        family,
        data,
        folder,
        methods=list(METHODS),
        pruning_rates=[0.5, 0.75],
        validation=validation,
        **FOR_MODS,
    )
    assert [run.indices.tolist() for run in again] == [run.indices.tolist() for run in runs]
    more = choose(
        family,
        data,
        folder,
        methods=["loss", "el2n", "random"],
        pruning_rates=[0.25],
        validation=validation,
        columns=FOR_MODS["columns"],
        update=True,
    )
    assert [len(run.indices) for run in more] == [36, 36, 36]
    one = staff.load_run(str(folder / "loss-0.25"))
    assert one.indices.tolist() == more[0].indices.tolist()


def test_less_prefers_samples_like_the_validation_rows(everything, family):
    """Cosines out of the pass against gradients formed one by one."""
    import torch

    from staff.data.tokens import tokenise
    from staff.models import load as models
    from staff.scoring.less import directions, mean_direction, similarities, similarity
    from staff.scoring.scorer import Scorer

    source = models.resolve(str(family / "draft"))
    tokenizer, model = (
        models.load_tokenizer(source),
        models.load_model(source, torch.float64, torch.device("cpu")),
    )
    rows = staff.data.rows.read(make_rows(9))
    pool = tokenise(rows.examples(), tokenizer, 256)
    scorer = Scorer(model, "last-block")
    rows, every = pool_of(pool, [7, 8]), np.arange(9)
    found = similarity(scorer, pool, mean_direction(scorer, rows), every, 300)["similarity"]
    apart = similarities(scorer, pool, directions(scorer, rows), every, 300)["similarities"]

    def gradient(i):
        weights = [site.module.weight.requires_grad_(True) for site in scorer.sites]
        ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
        labels = torch.where(torch.tensor(pool.response(i)), ids[0], -100)
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, :-1], labels[1:], ignore_index=-100
        )
        flat = torch.cat([grad.ravel() for grad in torch.autograd.grad(loss, weights)])
        model.requires_grad_(False)
        return flat / flat.norm()

    expected = np.array([[float(gradient(i) @ gradient(v)) for v in (7, 8)] for i in range(9)])
    np.testing.assert_allclose(apart, expected, rtol=1e-6)  # kept in float32
    np.testing.assert_allclose(found, expected.mean(1), rtol=1e-6)


def test_rds_is_the_cosine_of_states_weighted_by_their_position(family):
    import torch

    from staff.data.tokens import tokenise
    from staff.models import load as models
    from staff.scoring.rds import cosines, embed
    from staff.scoring.scorer import Scorer

    source = models.resolve(str(family / "draft"))
    model = models.load_model(source, torch.float64, torch.device("cpu"))
    rows = staff.data.rows.read(make_rows(9))
    pool = tokenise(rows.examples(), models.load_tokenizer(source), 256)

    def embedded(i):
        ids = torch.tensor(pool.ids(i), dtype=torch.int64)[None]
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        mean = sum((t + 1) * state for t, state in enumerate(states))
        return (mean / mean.norm()).numpy()

    every = np.array([embedded(i) for i in range(9)])
    scorer, positions = Scorer(model), np.array([5, 0, 8, 3])
    for batch_tokens in (1, 300, 5000):
        queries = embed(scorer, pool, np.array([7, 2]), batch_tokens)
        np.testing.assert_allclose(queries, every[[7, 2]], rtol=1e-5, atol=1e-7)
        found = cosines(scorer, pool, queries, positions, batch_tokens)["rds"]
        np.testing.assert_allclose(found, every[positions] @ every[[7, 2]].T, rtol=1e-5, atol=1e-6)


def pool_of(pool, positions):
    ids = [pool.ids(i) for i in positions]
    masks = [pool.response(i) for i in positions]
    return Pool(
        np.concatenate(ids),
        np.concatenate(masks),
        np.concatenate([[0], np.cumsum([len(sample) for sample in ids])]),
    )


def test_responses_alone_keep_one_token_to_predict_the_first_from():
    pool = Pool(
        np.arange(9, dtype=np.int32), np.array([0, 0, 1, 1, 0, 1, 1, 0, 1], bool), np.array([0, 4, 7, 9])
    )
    alone = pool.responses_alone()
    assert [alone.ids(i).tolist() for i in range(3)] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert alone.response_tokens().tolist() == pool.response_tokens().tolist() == [2, 2, 1]


def test_a_group_gets_its_share_and_a_missing_column_is_named(family, tmp_path):
    rows = [{**row, "source": "a" if i % 3 else "b"} for i, row in enumerate(make_rows(30))]
    run = choose_one(family, rows, tmp_path / "x", method="direct", pruning_rate=0.5, group_by="source")
    shares = share_by_size(np.array([20, 10]), 15)
    kept = [rows[i]["source"] for i in run.indices]
    assert [kept.count("a"), kept.count("b")] == shares.tolist()
    with pytest.raises(ValueError, match="group_by topic: row 0 has no such column"):
        choose_one(family, rows, tmp_path / "y", method="direct", pruning_rate=0.5, group_by="topic")


def test_a_method_with_groups_of_its_own_makes_none_where_the_user_has_some(family, tmp_path, monkeypatch):
    monkeypatch.setattr(staff.graph, "derive", lambda *_: pytest.fail("clusters that nobody asked for"))
    rows = [{**row, "source": "a" if i % 3 else "b"} for i, row in enumerate(make_rows(30))]
    run = choose_one(family, rows, tmp_path / "x", method="ltd", pruning_rate=0.5, group_by="source")
    assert sorted(rows[i]["source"] for i in run.indices) == ["a"] * 10 + ["b"] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "less"}, "validation=FILE"),
        ({"method": "rds"}, "validation=FILE"),
        ({"option": ["num_strata=3"]}, "the options of staff, there are"),
        ({"method": "ccs", "option": ["num_strata"]}, "give name=value"),
    ],
)
def test_what_a_method_lacks_is_named(settings, message, family, tmp_path):
    with pytest.raises(ValueError, match=message):
        choose_one(family, make_rows(10), tmp_path / "x", **{"pruning_rate": 0.5, **settings})


def test_options_without_a_flag_reach_their_method(family, tmp_path):
    high = choose_one(
        family, make_rows(20), tmp_path / "x", method="loss", pruning_rate=0.5, option=["part=bottom"]
    )
    low = choose_one(family, make_rows(20), tmp_path / "y", method="loss", pruning_rate=0.5)
    assert not set(high.indices) & set(low.indices)


def test_a_method_that_follows_a_tuning_asks_for_one_before_any_model_loads(tmp_path):
    with pytest.raises(ValueError, match=r"method='s2l' follows the draft through its tuning.*draft_epochs"):
        staff.select(
            "nowhere.jsonl",
            output=tmp_path / "x",
            target="nowhere",
            draft="nowhere",
            method="s2l",
            pruning_rate=0.5,
        )


def test_a_grid_says_how_faithful_the_draft_is_and_what_was_not_verified(everything, family, tmp_path):
    _, runs = everything
    config = SelectConfig(target="target")
    told = grid_table(runs, config)
    of_staff = next(run for run in runs if run.manifest["method"] == "staff")
    verdict = of_staff.fidelity.verdict
    assert [line.split()[-1] for line in told.splitlines() if line.startswith("staff-0.")][:2] == [
        verdict
    ] * 2
    assert told.count(of_staff.fidelity.reason) == 1
    assert "verified none" not in told
    (tmp_path / "scores.csv").write_text("row,score\n" + "".join(f"{i},{i}\n" for i in range(48)))
    settings = {"scores": str(tmp_path / "scores.csv"), "output": tmp_path / "x"}
    (run,) = staff.select_grid(make_rows(48), methods=["staff"], pruning_rates=[0.5], **settings)
    assert "none verified, for there is no --target" in summary(run, SelectConfig())
    assert "try fewer --num-regions" in summary(run, SelectConfig(target="target"))
