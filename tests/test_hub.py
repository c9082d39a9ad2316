"""A coreset on the hub: private unless it was said, never into a public data set unasked, with a card. No network."""

import pytest

import staff
from family import make_rows
from staff.config import SelectConfig
from staff.runs.summary import summary

ROWS = make_rows(12)
HALF = {"method": "random", "pruning_rate": 0.5}


@pytest.fixture
def hub(monkeypatch):
    """The hub's calls on a dict: data set -> is_private, and its files."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import RepositoryNotFoundError

    private, files = {}, {}

    class Api:
        def repo_info(self, name, *, repo_type):
            if name not in private:
                raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
            return type("Info", (), {"private": private[name]})

        def create_repo(self, name, *, repo_type, private: bool, exist_ok):
            assert (repo_type, exist_ok) == ("dataset", True)
            hub.private.setdefault(name, private)
            return f"https://hub/datasets/{name}"

        def file_exists(self, name, file, *, repo_type):
            return file in files.get(name, {})

        def create_commit(self, name, operations, *, commit_message, repo_type):
            for part in operations:
                with part.as_file() as file:
                    files.setdefault(name, {})[part.path_in_repo] = file.read()

    hub = type("Hub", (), {"private": private, "files": files, "Api": Api})
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return hub


def test_a_coreset_goes_there_privately_with_a_card_and_again_from_a_finished_run(hub, tmp_path):
    run = staff.select(ROWS, output=tmp_path / "x", **HALF)
    assert not hub.files
    staff.select(ROWS, output=tmp_path / "x", push_to_hub="me/mine", **HALF)
    assert hub.private == {"me/mine": True}
    assert hub.files["me/mine"]["train.jsonl"] == (run.path / "coreset.jsonl").read_bytes()
    card = hub.files["me/mine"]["README.md"].decode()
    assert card.startswith("---\nlicense: unknown\n")
    assert "6 of 12 rows" in card
    assert "by the method `random`, pruning rate 0.5, seed 42" in card
    said = summary(run, SelectConfig(pruning_rate=(0.5,), push_to_hub="me/mine"))
    assert "it is on the hub as the data set me/mine" in said
    grid = {"methods": ["random"], "pruning_rates": [0.5, 0.75]}
    staff.select_grid(ROWS, output=tmp_path / "y", push_to_hub="me/mine", **grid)
    assert {"me/mine-random-0.5", "me/mine-random-0.75"} < set(hub.files)


def test_the_card_names_files_by_their_last_part_and_the_licence_that_was_said(hub, tmp_path, pool_file):
    settings = {"push_to_hub": "me/mine", "license": "cc-by-4.0", "public": True}
    staff.select(str(pool_file), output=tmp_path / "x", **settings, **HALF)
    card = hub.files["me/mine"]["README.md"].decode()
    assert hub.private == {"me/mine": False}
    assert "license: cc-by-4.0" in card
    assert "* data: `pool.jsonl`" in card
    assert str(tmp_path) not in card


def test_a_public_data_set_is_refused_before_any_work_and_before_the_upload(hub, tmp_path, monkeypatch):
    hub.private["me/open"] = False
    with pytest.raises(ValueError, match=r"me/open': this data set is public.*add public=True"):
        staff.select("nowhere.jsonl", output=tmp_path / "x", push_to_hub="me/open", **HALF)
    assert not (tmp_path / "x").exists()
    staff.select(ROWS, output=tmp_path / "x", push_to_hub="me/open", public=True, **HALF)
    assert "train.jsonl" in hub.files["me/open"]
    made = hub.Api.create_repo

    def published_meanwhile(self, name, **options):
        made(self, name, **options)
        hub.private[name] = False

    monkeypatch.setattr(hub.Api, "create_repo", published_meanwhile)
    with pytest.raises(ValueError, match="this data set is public"):
        staff.select(ROWS, output=tmp_path / "y", push_to_hub="me/late", **HALF)
    assert "me/late" not in hub.files


def test_a_card_that_is_there_stays(hub, tmp_path, caplog):
    hub.private["me/mine"], hub.files["me/mine"] = True, {"README.md": b"my own"}
    staff.select(ROWS, output=tmp_path / "x", push_to_hub="me/mine", **HALF)
    assert hub.files["me/mine"]["README.md"] == b"my own"
    assert "me/mine has a README.md already: it stays as it is" in caplog.text


@pytest.mark.parametrize("name", ["mine", "me/", "a/b/c", "https://huggingface.co/me/mine"])
def test_a_name_without_owner_is_told_before_any_work(name, hub, tmp_path):
    with pytest.raises(ValueError, match="give OWNER/NAME"):
        staff.select("nowhere.jsonl", output=tmp_path / "x", push_to_hub=name, **HALF)


def test_no_network_is_one_message_before_any_work(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.Api, "repo_info", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"can't ask whether it is public \(division by zero\); log in with"):
        staff.select("nowhere.jsonl", output=tmp_path / "x", push_to_hub="me/mine", **HALF)
