"""Make the demo's draft: the first thirteen and the last three of SmolLM2-135M-Instruct's 30 blocks, healed.

python examples/make_draft.py FOLDER. experiments/fidelity/distil.py made the adapter in examples/draft.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel

from staff.files import remove
from staff.models import drafts, files, load

HERE = Path(__file__).parent
BLOCKS = [*range(13), *range(27, 30)]


def main(folder: Path) -> None:
    source = files.resolve(str(HERE / "SmolLM2-135M-Instruct.gguf"))
    model = drafts.cut(load.load_model(source, torch.bfloat16, torch.device("cpu")), BLOCKS)
    model = PeftModel.from_pretrained(model, HERE / "draft").merge_and_unload()
    vars(model.config).pop("quantization_config", None)
    aside = folder.with_suffix(".part")
    remove(aside)
    model.save_pretrained(aside)
    load.load_tokenizer(source).save_pretrained(aside)
    aside.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
