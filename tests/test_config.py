"""Settings: ranges, YAML there and back, names that are off by a letter."""

import pytest

from staff import config
from staff.config import FinetuneConfig, SelectConfig, Training, from_mapping


def test_a_config_comes_back_from_its_yaml(tmp_path):
    made = SelectConfig(
        training=Training(learning_rate=2e-4),
        data=("a.jsonl", "b.jsonl"),
        target="T",
        draft="self:8",
        pruning_rate=(0.2, 0.8),
        method=("staff", "ccs"),
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml(made))
    assert from_mapping(SelectConfig, config.read_yaml(tmp_path / "c.yaml"), "c.yaml") == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruning_rate": 1.2}, r"--pruning-rate .* found 1.2"),
        ({"pruning_rate": -0.1}, "--pruning-rate"),
        ({"pruning_rate": 0.5, "budget": 3}, "one of them"),
        ({"budget": -1}, "--budget"),
        ({"draft_share": 0.0}, r"--draft-share must lie in \(0, 1\]; found 0.0"),
        ({"hard_cutoff": 1.0}, r"--hard-cutoff must lie in \[0, 1\); found 1.0"),
        ({"num_regions": 0}, "--num-regions"),
        ({"verification_budget": 0}, "--verification-budget"),
        ({"max_length": 1}, "--max-length"),
        ({"batch_size": 0}, "--batch-size"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_out_of_range_are_named_with_their_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(SelectConfig, settings, "x.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prunning_rate": 0.8}, "did you mean 'pruning_rate'"),
        ({"pruning_rate": "high"}, "x.yaml: --pruning-rate must be a number; found 'high'"),
        ({"num_regions": 2.5}, "--num-regions must be a whole number; found 2.5"),
        ({"scope": "last-layer"}, "--scope must be one of last-value, .*; found 'last-layer'"),
        ({"data": [1]}, "--data must be text"),
        ({"target": "${STAFF_NO_SUCH}/m"}, "STAFF_NO_SUCH, which is not set"),
    ],
)
def test_wrong_settings_in_a_file_are_named_with_the_file(settings, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(SelectConfig, settings, "x.yaml")


def test_yaml_forms_are_understood(monkeypatch):
    monkeypatch.setenv("MODELS", "/m")
    made = from_mapping(
        SelectConfig,
        {"data": "one.jsonl", "target": "${MODELS}/t", "learning-rate": "1e-4", "draft_epochs": 2},
        "x",
    )
    assert (made.data, made.target, made.training.learning_rate, made.draft_epochs) == (
        ("one.jsonl",),
        "/m/t",
        1e-4,
        2,
    )


def test_unreadable_yaml_is_one_line(tmp_path):
    for text, message in [("a: [", "not valid YAML"), ("- a", "must be lines of"), (None, "can't be read")]:
        path = tmp_path / "bad.yaml"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=message):
            config.read_yaml(path)


def test_every_field_has_a_line_of_help():
    import ast
    import inspect

    for kind in (
        SelectConfig,
        FinetuneConfig,
        config.Reading,
        config.Scoring,
        config.Training,
        config.Engine,
    ):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        groups = (
            "reading",
            "scoring",
            "training",
            "engine",
            "spread",
            "launch",
            "trying",
        )  # their classes explain them
        fields = [
            i
            for i, node in enumerate(body)
            if isinstance(node, ast.AnnAssign) and node.target.id not in groups
        ]
        assert all(
            isinstance(body[i + 1], ast.Expr) and isinstance(body[i + 1].value.value, str) for i in fields
        )


def test_a_preset_is_overridden_by_what_else_is_given_and_takes_only_what_the_command_has():
    assert from_mapping(SelectConfig, {"preset": "paper"}, "x").draft_epochs == 3.0
    made = from_mapping(SelectConfig, {"num-regions": 7, "preset": "paper"}, "x")
    assert (made.num_regions, made.verification_budget, made.draft_epochs) == (7, 10, 3.0)
    assert from_mapping(config.PlanConfig, {"preset": "paper"}, "x").draft_epochs == 3.0
    assert (
        config.from_mapping(SelectConfig, config.flat(made), "x") == made
    )  # a run's own config.yaml names no preset


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"x.yaml: there is no preset 'papers'; there is paper"):
        from_mapping(SelectConfig, {"preset": "papers"}, "x.yaml")
    with pytest.raises(ValueError, match="there is no setting 'preset'"):
        from_mapping(FinetuneConfig, {"preset": "paper"}, "x")
