"""In a trainer's own environment: runs the files that STAFF wrote for it, and writes down what it trained on.

    python spy.py TRAINER FOLDER ...

Each folder is one that `staff.data.export.write_train` made. The trainer is started on its file as its own
command starts it; only `transformers.Trainer.train`, which all three come to, is wrapped, so that it first
sends each row through the trainer's own collator, by itself. FOLDER/TRAINER.json is left: rows (input_ids
and labels, padding taken away), the losses of the steps, the recipe, versions; or the error that stopped it.
"""

import importlib.metadata
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

FILES = {"trl": "with_trl.py", "llama-factory": "llama_factory.yaml", "axolotl": "axolotl.yaml"}
PACKAGES = {"trl": "trl", "llama-factory": "llamafactory", "axolotl": "axolotl"}
RECIPE = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("lr_scheduler_type", "weight_decay", "max_grad_norm", "optim", "adam_beta2", "seed", "bf16", "fp16"),
)
os.environ |= {
    **{"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"},
    **{"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DATASET_NUM_PROC": "1"},
}


def start(trainer: str, file: Path) -> None:
    if trainer == "trl":
        runpy.run_path(str(file), run_name="__main__")
    elif trainer == "llama-factory":
        from llamafactory.cli import main

        sys.argv = ["llamafactory-cli", "train", str(file)]
        main()
    else:
        import torch
        from axolotl.cli.train import do_cli

        # kernels that it turns on by itself, and which want a GPU
        kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
        do_cli(config=str(file), **({} if torch.cuda.is_available() else kernels))


def watched(found: dict):
    """Let `found` fill with what is trained on and how."""
    import transformers

    train = transformers.Trainer.train

    def look(self, *args, **kwargs):
        found["rows"] = []
        for row in self.train_dataset:
            batch = self.data_collator([row])
            there = batch["attention_mask"][0] != 0
            found["rows"].append({name: batch[name][0][there].tolist() for name in ("input_ids", "labels")})
        self.args.logging_steps, self.args.logging_strategy = 1, "steps"
        self.state.logging_steps = 1
        try:
            return train(self, *args, **kwargs)
        finally:
            found["losses"] = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            found["recipe"] = {name: str(getattr(self.args, name)) for name in RECIPE}
            found["recipe"]["warmup"] = self.args.get_warmup_steps(self.state.max_steps)
            lora = self.accelerator.unwrap_model(self.model).peft_config["default"]
            found["recipe"] |= {"rank": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout}
            found["recipe"]["layers"] = sorted(
                {name.split(".")[-2] for name, _ in self.model.named_modules() if name.endswith(".lora_A")}
            )
            found["recipe"]["dtype"] = sorted({str(p.dtype) for p in self.model.parameters()})

    transformers.Trainer.train = look


def main() -> None:
    trainer, *folders = sys.argv[1:]
    versions = {
        name: importlib.metadata.version(name)
        for name in (PACKAGES[trainer], "transformers", "peft", "datasets", "torch")
    }
    found = {}
    watched(found)
    if trainer == "llama-factory":
        import llamafactory.train.tuner  # noqa: F401
    elif trainer == "axolotl":
        import axolotl.cli.train  # noqa: F401
    for folder in map(Path, folders):
        if child := os.fork():  # a trainer leaves much behind it
            os.waitpid(child, 0)
            continue
        work = folder / f"{trainer}-work"
        work.mkdir(exist_ok=True)
        os.chdir(work)
        try:
            start(trainer, folder / FILES[trainer])
        except BaseException as error:
            traceback.print_exc()
            found["error"] = f"{type(error).__name__}: {error}"[:300]
        (folder / f"{trainer}.json").write_text(json.dumps({**found, "versions": versions}))
        os._exit(0)


if __name__ == "__main__":  # Axolotl starts processes that import it again
    main()
