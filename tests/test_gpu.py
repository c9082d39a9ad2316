"""What only a GPU can show: `make gpu`. Skipped where there is none."""

import numpy as np
import pytest
import torch

import staff
from family import write_pool
from staff.scoring.scorer import Scorer
from tiny import make_model, make_pool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
RESULTS = ("coreset.jsonl", "scores.parquet", "regions.csv")


@pytest.mark.parametrize("layout", ["llama", "gpt2", "mixtral"])
def test_efforts_on_a_gpu_are_those_of_the_cpu(layout):
    pool, every = make_pool(), np.arange(7)
    on_cpu = Scorer(make_model(layout), "last-block").scores(pool, every)["effort"]
    on_gpu = Scorer(make_model(layout).to("cuda"), "last-block").scores(pool, every)["effort"]
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-10)


@pytest.mark.parametrize("way", [{"workers": 2}, {"device_map": "auto", "max_memory": "0=10GB,cpu=10GB"}])
def test_workers_and_placed_blocks_give_the_bytes_of_one_process_on_a_gpu(way, family, tmp_path):
    data = write_pool(tmp_path / "pool.jsonl")
    models = {"target": str(family / "target"), "draft": str(family / "draft"), "device": "cuda"}
    plain = {**models, "dtype": "float32", "pruning_rate": 0.5, "num_regions": 4, "verification_budget": 3}
    one, other = (
        staff.select(data, output=tmp_path / name, **plain, **of)
        for name, of in [("one", {}), ("other", way)]
    )
    assert all((one.path / name).read_bytes() == (other.path / name).read_bytes() for name in RESULTS)


def test_memory_runs_out_on_a_gpu_and_the_shard_is_done_in_smaller_batches(family, tmp_path):
    data = write_pool(tmp_path / "pool.jsonl", 400)
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        models = {"target": str(family / "target"), "device": "cuda", "dtype": "float32"}
        run = staff.select(
            data, output=tmp_path / "x", pruning_rate=0.5, method="direct", batch_tokens=2**20, **models
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(run.indices) == 200
