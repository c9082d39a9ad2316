"""A family of tiny models on disk, tokenizer and chat template included, and a pool file for them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes as tokens: every text can be said, and a token is a character of plain English."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
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
        {"id": f"r{i}", "prompt": f"What is {i} times {i % 7}?", "response": f"It is {i * (i % 7)}, " + "you see " * (i % 5) + "and so on."}
        for i in range(n)
    ]


def write_pool(path: Path, n: int = 60) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(n)), encoding="utf-8")
    return path
