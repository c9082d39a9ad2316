"""A family of tiny models on disk, tokenizer and chat template included, and a pool file for them."""

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from staff.config import from_mapping

SETTINGS = {
    "method": "staff",
    "pruning_rate": 0.7,
    "num_regions": 5,
    "verification_budget": 3,
    "draft_epochs": 1,
    "learning_rate": 1e-2,
    "batch_tokens": 512,
}
RESULTS = ("coreset.jsonl", "indices.npy", "regions.csv", "scores.parquet")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]


def config_of(kind, **settings):
    """A config of settings by name, those of its groups among the rest."""
    return from_mapping(kind, settings, "test")


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes as tokens: every text can be said, and a token is a character of plain English."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    made.chat_template = template
    return made


def make_family(folder: Path) -> Path:
    """folder/draft and folder/target: Llama layouts of 2 and 4 blocks, float32."""
    for seed, (name, blocks, width) in enumerate([("draft", 2, 16), ("target", 4, 32)]):
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LlamaForCausalLM(config).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def make_rows(n: int) -> list[dict]:
    return [
        {
            "id": f"r{i}",
            "prompt": f"What is {i} times {i % 7}?",
            "response": f"It is {i * (i % 7)}, " + "you see " * (i % 5) + "and so on.",
        }
        for i in range(n)
    ]


def write_pool(path: Path, n: int = 60) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(n)), encoding="utf-8")
    return path


def start(
    data: Path,
    output: Path,
    family: Path,
    pause: float = 0.0,
    at: Callable[[str, int], bool] = lambda stage, done: True,
    before: Callable[[], object] | None = None,
    **settings,
):
    """A selection in a process of its own, forked so that nothing is imported again, and a pipe that tells
    its progress.

    Args:
        pause: seconds it rests after each word of progress.
        at: (stage, done) -> it rests after this word.
        before: called in the process first: to put faults in its way.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def tell(stage, done, total):
        send.send((stage, done))
        time.sleep(pause if at(stage, done) else 0)

    def work():
        import staff

        gc.freeze()  # a collection would write to every page that is shared with the parent
        models = {"target": str(family / "target"), "draft": str(family / "draft")}
        if before:
            before()
        try:
            staff.select(
                str(data),
                output=output,
                on_progress=tell,
                **{**models, **SETTINGS, "draft_epochs": 1.25, "checkpoint_seconds": 0, **settings},
            )
        except ValueError as error:
            send.send(error)
            os._exit(2)

    process = context.Process(target=work)
    process.start()
    send.close()
    return process, receive


def finish(process, receive) -> str | None:
    """Wait for the end of what `start` began: its error's message, None where all went well."""
    message = None
    with contextlib.suppress(EOFError):  # the pipe closes with the process
        while True:
            told = receive.recv()
            message = str(told) if isinstance(told, ValueError) else message
    process.join()
    assert process.exitcode == (2 if message else 0)
    return message


def run_staff(*arguments, cwd: Path | None = None, given: str = "") -> subprocess.CompletedProcess:
    """The command line in a process of its own, forked so that nothing is imported again.

    Args:
        given: on standard input.
    """
    with contextlib.ExitStack() as stack:
        out, err, stdin = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        stdin.write(given)
        stdin.seek(0)

        def work():
            from staff import cli

            gc.freeze()
            os.dup2(stdin.fileno(), 0)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.stdin = os.fdopen(0, closefd=False)
            sys.argv = ["staff", *map(str, arguments)]
            os.chdir(cwd or ".")
            logging.getLogger().handlers.clear()  # pytest's own
            code = 0
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except Exception:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(120)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read(), err.read())


def results(folder: Path) -> dict:
    """The bytes of all that a selection ends with."""
    found: dict = {name: (folder / name).read_bytes() for name in RESULTS}
    (adapter,) = (folder / "work").glob("draft-*/adapter_model.safetensors")
    pieces = (folder / "work").glob("[ps]*-*/*.npz")
    return found | {
        "adapter": adapter.read_bytes(),
        "pieces": {path.relative_to(folder): path.read_bytes() for path in pieces},
    }


@contextlib.contextmanager
def comparison_file(family: Path, folder: Path, text: str, test_rows: int):
    """A comparison's YAML beside a pool of 40 rows and the test rows that follow them, with the variables
    that it names set."""
    write_pool(folder / "pool.jsonl", 40)
    rows = make_rows(40 + test_rows)[40:]
    rows[0]["response"] += "\u2028 More.\x85"  # separators of lines that end no row
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAFF_MODELS", str(family))
        patch.setenv("STAFF_DATA", str(folder))
        yield folder / "c.yaml"
