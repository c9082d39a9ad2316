"""Workers as Ray's actors: the bytes of one process, and an actor that is killed is replaced."""

import os
import signal
import threading
import time

import pytest

import staff
from family import write_pool
from staff import files
from staff.scoring import shards

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as on_ray.py sets it before Ray is imported
ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not os.environ.get("STAFF_SOAK"), reason="half a minute: make soak PART=ends")


def test_ray_s_actors_make_the_same_bytes_and_one_that_is_killed_is_replaced(
    family, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(shards, "SHARD", 8)
    models = {"target": str(family / "target"), "draft": str(family / "draft"), "dtype": "float32"}
    plain = {
        **models,
        "method": "staff",
        "pruning_rate": 0.5,
        "num_regions": 4,
        "verification_budget": 3,
        "threads": 1,
    }
    data, output, killed = write_pool(tmp_path / "pool.jsonl"), tmp_path / "x", []
    alone = staff.select(data, output=tmp_path / "alone", **plain)

    def kill_one():
        while not killed:
            time.sleep(0.01)
            signs = [files.read_checked(path) for path in output.glob("work/workers/*.json")]
            killed.extend(sign["process"] for sign in signs if sign and sign["shard"] is not None)
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    try:
        run = staff.select(data, output=output, engine="ray", workers=1, **plain)
        for name in ("scores.parquet", "coreset.jsonl", "regions.csv"):
            assert (run.path / name).read_bytes() == (alone.path / name).read_bytes()
        assert "worker 0 ended (SIGKILL)" in caplog.text
        addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
        assert addresses == {"127.0.0.1"}, "nothing listens where another machine could reach it"
    finally:
        ray.shutdown()
