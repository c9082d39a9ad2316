"""Families that people fine-tune, and which smaller sibling could be the draft at what cost. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """Models of one kind, trained on much the same text.

    Attributes:
        names: what their names look like, a regular expression.
        types: model types of config.json that are this family's alone.
        members: hub id -> billions of parameters, smallest first. Base and instruction-tuned ones are
            siblings alike.
    """

    names: str
    types: tuple[str, ...]
    members: dict[str, float]


FAMILIES = {
    "Qwen3": Family(
        r"qwen3(?!\.)",
        ("qwen3",),
        {
            "Qwen/Qwen3-0.6B": 0.6,
            "Qwen/Qwen3-1.7B": 1.7,
            "Qwen/Qwen3-4B": 4.0,
            "Qwen/Qwen3-8B": 8.2,
            "Qwen/Qwen3-14B": 14.8,
            "Qwen/Qwen3-32B": 32.8,
        },
    ),
    "Qwen2.5": Family(
        r"qwen2\.5",
        ("qwen2",),
        {
            "Qwen/Qwen2.5-0.5B": 0.49,
            "Qwen/Qwen2.5-1.5B": 1.54,
            "Qwen/Qwen2.5-3B": 3.09,
            "Qwen/Qwen2.5-7B": 7.62,
            "Qwen/Qwen2.5-14B": 14.8,
            "Qwen/Qwen2.5-32B": 32.8,
            "Qwen/Qwen2.5-72B": 72.7,
        },
    ),
    "Llama 3": Family(
        r"llama-?3",
        (),
        {
            "meta-llama/Llama-3.2-1B": 1.24,
            "meta-llama/Llama-3.2-3B": 3.21,
            "meta-llama/Llama-3.1-8B": 8.03,
            "meta-llama/Llama-3.1-70B": 70.6,
        },
    ),
    "Llama 2": Family(
        r"llama-?2",
        (),
        {
            "meta-llama/Llama-2-7b-hf": 6.74,
            "meta-llama/Llama-2-13b-hf": 13.0,
            "meta-llama/Llama-2-70b-hf": 69.0,
        },
    ),
    "Gemma 3": Family(
        r"gemma-?3(?!n)",
        ("gemma3", "gemma3_text"),
        {
            "google/gemma-3-270m": 0.27,
            "google/gemma-3-1b-pt": 1.0,
            "google/gemma-3-4b-pt": 4.3,
            "google/gemma-3-12b-pt": 12.2,
            "google/gemma-3-27b-pt": 27.4,
        },
    ),
    "Gemma 2": Family(
        r"gemma-?2-",
        ("gemma2",),
        {"google/gemma-2-2b": 2.61, "google/gemma-2-9b": 9.24, "google/gemma-2-27b": 27.2},
    ),
    "Gemma": Family(r"gemma-\d+b", ("gemma",), {"google/gemma-2b": 2.51, "google/gemma-7b": 8.54}),
    "Mistral": Family(
        r"mistral|ministral",
        ("mistral",),
        {
            "mistralai/Ministral-8B-Instruct-2410": 8.02,
            "mistralai/Mistral-Nemo-Base-2407": 12.2,
            "mistralai/Mistral-Small-24B-Base-2501": 23.6,
        },
    ),
    "Phi-3": Family(
        r"phi-?3",
        ("phi3",),
        {"microsoft/Phi-3-mini-4k-instruct": 3.82, "microsoft/Phi-3-medium-4k-instruct": 14.0},
    ),
    "SmolLM3": Family(r"smollm3", ("smollm3",), {"HuggingFaceTB/SmolLM3-3B": 3.08}),
    "SmolLM2": Family(
        r"smollm2",
        (),
        {
            "HuggingFaceTB/SmolLM2-135M": 0.135,
            "HuggingFaceTB/SmolLM2-360M": 0.362,
            "HuggingFaceTB/SmolLM2-1.7B": 1.71,
        },
    ),
    "Pythia": Family(
        r"pythia",
        ("gpt_neox",),
        {
            "EleutherAI/pythia-70m": 0.07,
            "EleutherAI/pythia-160m": 0.162,
            "EleutherAI/pythia-410m": 0.405,
            "EleutherAI/pythia-1b": 1.01,
            "EleutherAI/pythia-1.4b": 1.41,
            "EleutherAI/pythia-2.8b": 2.78,
            "EleutherAI/pythia-6.9b": 6.86,
            "EleutherAI/pythia-12b": 11.8,
        },
    ),
    "GPT-2": Family(
        r"gpt-?2(?![.\d])",
        ("gpt2",),
        {
            "openai-community/gpt2": 0.124,
            "openai-community/gpt2-medium": 0.355,
            "openai-community/gpt2-large": 0.774,
            "openai-community/gpt2-xl": 1.56,
        },
    ),
    "OPT": Family(
        r"opt-",
        ("opt",),
        {
            "facebook/opt-125m": 0.125,
            "facebook/opt-350m": 0.331,
            "facebook/opt-1.3b": 1.32,
            "facebook/opt-2.7b": 2.65,
            "facebook/opt-6.7b": 6.66,
        },
    ),
    "OLMo 2": Family(
        r"olmo-?2",
        ("olmo2",),
        {
            "allenai/OLMo-2-0425-1B": 1.48,
            "allenai/OLMo-2-1124-7B": 7.3,
            "allenai/OLMo-2-1124-13B": 13.7,
            "allenai/OLMo-2-0325-32B": 32.2,
        },
    ),
    "Falcon3": Family(
        r"falcon-?3",
        (),
        {"tiiuae/Falcon3-1B-Base": 1.67, "tiiuae/Falcon3-3B-Base": 3.23, "tiiuae/Falcon3-7B-Base": 7.46},
    ),
}


def self_blocks(draft: str | None) -> int | None:
    """N of "self:N", None for anything else.

    Raises:
        ValueError: "self" without a number of blocks.
    """
    if draft is None or not re.match(r"self(:|$)", draft):
        return None
    match = re.fullmatch(r"self:(\d+)", draft)
    if not match or int(match[1]) < 1:
        raise ValueError(f"{draft}: say how many of the target's blocks to keep, as in self:8")
    return int(match[1])


def suggest_drafts(target: str) -> dict[str, float | None]:
    """The known smaller siblings of a target's family, smallest first; empty for a family not known.

    Returns:
        hub id -> r, its cost per token relative to the target's, by parameters; None where the target's size
        is not known from its name.
    """
    name = Path(target).name.lower() if Path(target).exists() else target.lower()
    model_type = None
    config = Path(target) / "config.json"
    if config.is_file():
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    for family in FAMILIES.values():
        if re.search(family.names, name) or model_type in family.types:
            sizes = {sibling.lower().rpartition("/")[2]: own for sibling, own in family.members.items()}
            size = sizes.get(name.rpartition("/")[2], _billions(name))
            return {
                sibling: own / size if size else None
                for sibling, own in family.members.items()
                if size is None or own < 0.9 * size
            }
    return {}


def billions_of(name: str) -> float | None:
    """Billions of parameters of a model on the hub, by the table or else by its name; None: neither says."""
    for family in FAMILIES.values():
        for member, size in family.members.items():
            if member.lower() == name.lower():
                return size
    return _billions(name.lower())


def _billions(name: str) -> float | None:
    """Parameters as a model's name tells them."""
    match = re.findall(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", name)
    return float(match[-1][0]) / (1000 if match[-1][1] == "m" else 1) if match else None
