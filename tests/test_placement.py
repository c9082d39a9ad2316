"""A model with blocks on disk: the same scores, in less memory than its weights take."""

import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import staff
from family import write_pool
from staff.config import Spread, memory_limits
from staff.models import anatomy, load, placement
from staff.models.files import resolve
from staff.scoring.scorer import Scorer
from tiny import make_model, make_pool

CPU = torch.device("cpu")
BLOCKS, WIDTH = 20, 512  # 4 million weights a block


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a model of 300 MB."""
    config = LlamaConfig(
        **{
            "vocab_size": 97,
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": BLOCKS,
        },
        **{"num_attention_heads": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
    )
    folder = tmp_path_factory.mktemp("large")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100MB")
    return folder


def memory(name):
    """Of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def in_a_fork(work):
    """What a function gives, and by how much memory grew at most meanwhile."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def begin():
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory("VmRSS")
        found = work()
        send.send((found, memory("VmHWM") - before))
        os._exit(0)

    process = context.Process(target=begin)
    process.start()
    send.close()
    told = receive.recv()
    process.join()
    return told


def test_blocks_on_disk_give_the_same_scores_in_less_memory_than_the_weights_take(large):
    pool = make_pool()
    weights = sum(path.stat().st_size for path in large.glob("*.safetensors"))

    def scored(limits):
        model = load.load_model(resolve(str(large)), torch.float32, CPU, limits=limits)
        return Scorer(model, "last-block").scores(pool, np.arange(len(pool)), 64), getattr(
            model, "hf_device_map", {}
        )

    (plain, _), whole = in_a_fork(lambda: scored(None))
    (offloaded, places), peak = in_a_fork(lambda: scored(memory_limits("cpu=60MB")))
    assert sorted(set(places.values())) == ["cpu", "disk"]
    assert [places[f"model.layers.{i}"] for i in (0, 1, BLOCKS - 2, BLOCKS - 1)] == [
        "cpu",
        "cpu",
        "disk",
        "cpu",
    ]
    assert {name: values.tobytes() for name, values in plain.items()} == {
        name: values.tobytes() for name, values in offloaded.items()
    }
    sys.stdout.write(  # pytest shows it with -rP
        f"weights {weights / 1e6:.0f} MB, all in memory {whole / 1e6:.0f} MB, offloaded {peak / 1e6:.0f} MB\n"
    )
    assert peak < weights < whole


def test_a_scope_that_goes_back_through_blocks_on_disk_is_refused(large):
    model = load.load_model(resolve(str(large)), torch.float32, CPU, limits={"cpu": 60 * 10**6})
    assert placement.is_offloaded(model)
    assert anatomy.device_of(model) == CPU
    with pytest.raises(ValueError, match="--scope linear goes back through every block"):
        Scorer(model, "linear")


def test_what_must_be_on_the_device_and_does_not_fit_is_said(large):
    with pytest.raises(
        ValueError, match=r"last block, embeddings and head take 0\.0\d+ GB and 0.001 are free on cpu"
    ):
        load.load_model(resolve(str(large)), torch.float32, CPU, limits={"cpu": 10**6})


def test_a_selection_verifies_on_a_target_whose_blocks_lie_on_disk(family, tmp_path):
    data = write_pool(tmp_path / "pool.jsonl", 40)
    models = {"target": str(family / "target"), "draft": str(family / "draft"), "dtype": "float32"}
    plain = {**models, "pruning_rate": 0.5, "num_regions": 4, "verification_budget": 2, "scope": "last-block"}
    one = staff.select(data, output=tmp_path / "one", **plain)
    two = staff.select(data, output=tmp_path / "two", device_map="auto", max_memory="cpu=90KB", **plain)
    assert (one.path / "scores.parquet").read_bytes() == (two.path / "scores.parquet").read_bytes()


def test_limits_are_read_by_device():
    assert memory_limits("0=20GB, cpu=1.5GB,1=300MiB") == {0: 20 * 10**9, "cpu": 1500 * 10**6, 1: 3 * 10**8}
    for text, cure in [("20GB", "write 0=20GB,cpu=60GB"), ("cpu=20", "write 0=20GB")]:
        with pytest.raises(ValueError, match=cure):
            Spread(device_map="auto", max_memory=text)
    with pytest.raises(ValueError, match="goes with --device-map auto"):
        Spread(max_memory="0=20GB")


def score_sharded(rank, folder, send):
    """The scores of one of two processes, each of which holds half of the weights of the blocks below."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model, pool = make_model("llama", torch.float32), make_pool()
    for block in anatomy.blocks(model)[:-1]:
        fully_shard(block, mesh=mesh)
    held = sum(p.to_local().numel() for block in anatomy.blocks(model)[:-1] for p in block.parameters())
    send.send((held, Scorer(model, "last-block").scores(pool, np.arange(len(pool)), 64)))
    os._exit(0)


def test_a_target_that_two_processes_hold_halves_of_gives_the_same_scores(tmp_path):
    model, pool = make_model("llama", torch.float32), make_pool()
    plain = Scorer(model, "last-block").scores(pool, np.arange(len(pool)), 64)
    below = sum(p.numel() for block in anatomy.blocks(model)[:-1] for p in block.parameters())
    context = multiprocessing.get_context("fork")
    ends, processes = [], []
    for rank in range(2):
        receive, send = context.Pipe(duplex=False)
        processes.append(context.Process(target=score_sharded, args=(rank, tmp_path, send)))
        processes[-1].start()
        send.close()
        ends.append(receive)
    for receive, process in zip(ends, processes, strict=True):
        assert receive.poll(60)
        held, scores = receive.recv()
        process.join()
        assert held == below // 2
        assert {name: values.tobytes() for name, values in scores.items()} == {
            name: values.tobytes() for name, values in plain.items()
        }
