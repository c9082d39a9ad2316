"""What a run is told: frozen dataclasses that become flags, YAML and the run's own config.yaml."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Reading:
    """How the data is read; the same for every command."""

    columns: str | None = None
    """Which columns hold what, as in prompt=question,response=answer; found by looking where not given."""
    train_on: Literal["last", "all"] = "last"
    """Take the loss on the last assistant turn of a conversation, or on every one."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that can't be used: stop, or leave it out, count it and list it."""
    dataset_info: str | None = None
    """LLaMA-Factory's dataset_info.json, or its folder; --data then names entries."""
    split: str | None = None
    """Split of a hub data set, or of a folder that holds several."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set."""

    def keywords(self) -> dict[str, Any]:
        """As `formats.read` takes them."""
        values = dataclasses.asdict(self)
        return {"config": values.pop("dataset_config"), **values}


def _own_first(kind: type) -> type:
    """A class decorator: its own fields before those it shares with others, as --help and config.yaml show them."""
    fields = dataclasses.fields(kind)
    shared = {name for base in kind.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    order = sorted(fields, key=lambda field: field.name in shared)
    setattr(kind, "__dataclass_fields__", {field.name: field for field in order})  # noqa: B010 -- mypy knows no such attribute
    return kind


@dataclass(frozen=True, kw_only=True)
class _Engine:
    """Where models compute and in what; what commands that load one have in common."""

    reading: Reading = Reading()
    """How the data is read."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    dtype: Dtype = "auto"
    """What models compute in; auto is bfloat16 where the hardware has it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along."""


@dataclass(frozen=True, kw_only=True)
class _Scoring(_Engine):
    """What an effort is, and how models are loaded to score."""

    scope: Literal["last-value", "last-block", "linear", "lora", "released"] = "last-value"
    """Which weights the effort is taken on."""
    loss: Literal["mean", "sum", "sqrt"] = "mean"
    """L of a sample: its response tokens' losses summed and divided by their number, by nothing, or by the number's root."""
    balance_layers: bool = False
    """Divide the gradient norm of each weight by its mean over the pool first, so that wide layers do not drown the others."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the models' weights as they load, with bitsandbytes."""
    batch_tokens: int | None = None
    """Padded tokens of a scoring batch at most; left out, what the device's memory bears."""


@dataclass(frozen=True, kw_only=True)
class _Training:
    """How a LoRA adapter is trained."""

    lora_rank: int = 8
    """Rank of the LoRA adapter, on all linear layers."""
    lora_alpha: int = 16
    """Scale of the adapter: its product is multiplied by alpha / rank."""
    learning_rate: float = 1e-4
    """Peak learning rate; warm-up, then cosine."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    batch_size: int = 8
    """Samples of a training step."""
    checkpoint_seconds: float = 60.0
    """How often fine-tuning is saved for a resume."""


@_own_first
@dataclass(frozen=True, kw_only=True)
class SelectConfig(_Training, _Scoring):
    """Choose the coreset of a pool: the main job."""

    data: tuple[str, ...] = ()
    """The pool: JSONL, JSON, CSV, TSV, Parquet or Arrow files, a folder, a hub data set, or - for standard input."""
    target: str = ""
    """The model the coreset is for: a hub id, a folder or a .gguf file."""
    draft: str | None = None
    """The small model that speculates, given like the target; or self:N, N of the target's own blocks."""
    scores: str | None = None
    """Scores of your own in place of a draft's: .npy in the data's order, or a table with row or id and score."""
    validation: str | None = None
    """A few rows of the task as it will be judged, for the method less."""
    pruning_rate: tuple[float, ...] = ()
    """Fraction of the pool removed, in [0, 1); several make a coreset each."""
    budget: int | None = None
    """Samples kept, in place of a pruning rate."""
    output: str | None = None
    """The run's folder. Typing the same command again goes on where it stopped."""
    format: Literal["jsonl", "same"] = "jsonl"
    """The coreset is JSON Lines; same: beside it also in the format the data came in."""
    push_to_hub: str | None = None
    """OWNER/NAME: upload the coreset to the Hugging Face hub, as a private data set."""
    method: tuple[str, ...] = ("staff",)
    """How samples are chosen; `staff methods` lists them. Several make a coreset each."""
    option: tuple[str, ...] = ()
    """Options of methods that have no flag of their own, as in num_strata=20 or part=bottom."""
    group_by: str | None = None
    """A column of the data: the budget is shared over its values by size, and selection runs inside each."""
    draft_epochs: float = 0.0
    """T, epochs of fine-tuning the draft before it scores; 0 scores it as it comes, the paper has 3."""
    draft_share: float = 1.0
    """f, share of the pool that the draft is fine-tuned on, drawn at random, in (0, 1]."""
    target_epochs: float = 3.0
    """Epochs of fine-tuning the target for the methods that score a fine-tuned one: grand, el2n, ccs, d2."""
    draft_blocks: Literal["first", "even", "last", "ends"] = "first"
    """Which blocks a self:N draft keeps: the first, spread evenly, the last, or half from either end."""
    num_regions: int = 50
    """K, intervals of equal width that the scores are cut into."""
    verification_budget: int = 10
    """b_v, samples of each region that the target scores."""
    hard_cutoff: float = 0.1
    """Fraction of the pool with the highest scores that is set aside first."""
    allocation: Literal["released", "paper"] = "released"
    """The budget rule over the regions: the authors' released code, or Eq. 4 as printed."""
    pick: Literal["top", "random"] = "top"
    """Which samples of a region are kept: the highest scores, or random ones."""
    max_length: int = 1024
    """Tokens of a sample at most; longer prompts lose their start."""
    seed: int = 42
    """One seed for the draft's sample and adapter, the draws, the picks and the fill."""

    def __post_init__(self):
        _as_paths(self)
        method, rates = self.method, self.pruning_rate
        object.__setattr__(
            self, "method", (method,) if isinstance(method, str) else tuple(dict.fromkeys(method))
        )
        object.__setattr__(
            self,
            "pruning_rate",
            (rates,) if isinstance(rates, (int, float)) else tuple(dict.fromkeys(rates or ())),
        )
        if self.pruning_rate and self.budget is not None:
            raise ValueError("give --pruning-rate or --budget, not both")
        for rate in self.pruning_rate:
            if not 0 <= rate < 1:
                raise ValueError(
                    f"--pruning-rate is the fraction of the pool removed, in [0, 1); found {rate}"
                )
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"--budget is a number of samples, 0 or more; found {self.budget}")
        _in_range(self, "draft_share", 0, 1, open_below=True)
        _in_range(self, "hard_cutoff", 0, 1, open_above=True)
        _in_range(self, "draft_epochs", 0, None)
        _in_range(self, "target_epochs", 0, None, open_below=True)
        for name in ("num_regions", "verification_budget"):
            _in_range(self, name, 1, None)
        _check_scoring(self)
        _check_training(self)


@_own_first
@dataclass(frozen=True, kw_only=True)
class ScoreConfig(_Scoring):
    """Score every sample of a pool on one model, and nothing else."""

    data: tuple[str, ...] = ()
    """The pool, in any format that `staff select` reads."""
    model: str = ""
    """A hub id, a folder or a .gguf file."""
    output: str | None = None
    """The Parquet file to write: row, id, effort, loss, el2n, entropy, tokens."""
    lora_rank: int = 8
    """Rank of the fresh adapter that scope lora looks at, where the model has none."""
    lora_alpha: int = 16
    """Scale of that adapter."""
    max_length: int = 1024
    """Tokens of a sample at most; longer prompts lose their start."""
    seed: int = 42
    """Seed of that adapter."""

    def __post_init__(self):
        _as_paths(self)
        _in_range(self, "lora_rank", 1, None)
        _check_scoring(self)
        _in_range(self, "max_length", 2, None)
        _in_range(self, "seed", 0, 2**32 - 1)


@_own_first
@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_Training, _Engine):
    """Fine-tune a model on a file with LoRA, loss on the responses alone."""

    data: tuple[str, ...] = ()
    """The examples, in any format that `staff select` reads: a coreset.jsonl, say."""
    model: str = ""
    """A hub id, a folder or a .gguf file."""
    output: str | None = None
    """Where the adapter goes. Typing the same command again goes on where it stopped."""
    epochs: float = 3.0
    """Passes over the data."""
    max_steps: int | None = None
    """Training steps in place of epochs, so that coresets of different sizes can be compared at equal updates."""
    max_length: int = 1024
    """Tokens of a sample at most; longer prompts lose their start."""
    seed: int = 42
    """Seed of the adapter and of the order of the samples."""

    def __post_init__(self):
        _as_paths(self)
        _in_range(self, "epochs", 0, None, open_below=True)
        if self.max_steps is not None:
            _in_range(self, "max_steps", 1, None)
        _check_training(self)


@_own_first
@dataclass(frozen=True, kw_only=True)
class PlanConfig(_Engine):
    """Predict what every method would take on this machine, before any work."""

    data: tuple[str, ...] = ()
    """The pool, in any format that `staff select` reads."""
    target: str = ""
    """The model the coreset is for: a hub id, a folder or a .gguf file."""
    draft: str | None = None
    """The small model that speculates, or self:N; without one, methods that need it are left out."""
    pruning_rate: tuple[float, ...] = (0.5, 0.8, 0.9)
    """Fractions of the pool removed, in [0, 1), to predict for."""
    epochs: float = 3.0
    """Epochs of fine-tuning the target on what is kept."""
    scope: Literal["last-value", "last-block", "linear", "lora", "released"] = "last-value"
    """Which weights the effort is taken on."""
    draft_epochs: float = 0.0
    """T, epochs of fine-tuning the draft before it scores."""
    draft_share: float = 1.0
    """f, share of the pool that the draft is fine-tuned on."""
    num_regions: int = 50
    """K, intervals that the scores are cut into."""
    verification_budget: int = 10
    """b_v, samples of each region that the target scores."""
    lora_rank: int = 8
    """Rank of the LoRA adapters."""
    batch_size: int = 8
    """Samples of a training step."""
    batch_tokens: int | None = None
    """Padded tokens of a scoring batch at most; left out, what the device's memory bears."""
    max_length: int = 1024
    """Tokens of a sample at most."""
    seed: int = 42
    """Seed of the samples that are timed."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the models' weights as they load, with bitsandbytes."""

    def __post_init__(self):
        _as_paths(self)
        object.__setattr__(self, "pruning_rate", tuple(self.pruning_rate))
        for rate in self.pruning_rate:
            if not 0 <= rate < 1:
                raise ValueError(
                    f"--pruning-rate is the fraction of the pool removed, in [0, 1); found {rate}"
                )
        _in_range(self, "epochs", 0, None, open_below=True)
        _in_range(self, "draft_epochs", 0, None)
        _in_range(self, "draft_share", 0, 1, open_below=True)
        for name in ("num_regions", "verification_budget", "lora_rank", "batch_size"):
            _in_range(self, name, 1, None)
        if self.batch_tokens is not None:
            _in_range(self, "batch_tokens", 1, None)
        _in_range(self, "max_length", 2, None)


@_own_first
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Engine):
    """Answer a test file with a model and compare with its references."""

    data: tuple[str, ...] = ()
    """The test examples, in any format that `staff select` reads; the last answer of each is its reference."""
    model: str = ""
    """A hub id, a folder (an adapter's too) or a .gguf file."""
    output: str | None = None
    """The per-example file to write, .jsonl or .parquet; the summary goes beside it. The same command goes on where it stopped."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    max_length: int = 1024
    """Tokens of prompt and answer at most; longer prompts lose their start."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the weights as they load, with bitsandbytes."""
    batch_tokens: int = 16384
    """Padded tokens of a batch at most, those of the answers included."""

    def __post_init__(self):
        _as_paths(self)
        for name in ("batch_tokens", "max_new_tokens"):
            _in_range(self, name, 1, None)
        _in_range(self, "max_length", 2, None)
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in --max-length {self.max_length}: "
                "lower the one or raise the other"
            )


def _check_scoring(config) -> None:
    if config.batch_tokens is not None:
        _in_range(config, "batch_tokens", 1, None)
    if config.balance_layers and config.scope in ("last-value", "released"):
        raise ValueError(
            f"--balance-layers needs a scope of several weights, as last-block or linear; {config.scope} has one"
        )


@dataclass(frozen=True)
class InspectConfig:
    """Show how a file is read, and what a model would see of it; no weights are loaded."""

    data: tuple[str, ...] = ()
    """What to look at, in any format that `staff select` reads."""
    model: str | None = None
    """A hub id, a folder or a .gguf file: its tokenizer and chat template say what is masked and what is truncated."""
    max_length: int = 1024
    """Tokens of a sample at most, as `staff select` takes it."""
    reading: Reading = Reading()
    """How the data is read; rows that can't be used are always listed and left out."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along."""

    def __post_init__(self):
        _as_paths(self)
        _in_range(self, "max_length", 2, None)


def check_named(config, *names: str) -> None:
    """Raise ValueError for the first of these settings that has nothing in it."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"name the {name} with --{name}")


def _as_paths(config) -> None:
    """One path as data is a tuple of one."""
    object.__setattr__(config, "data", (config.data,) if isinstance(config.data, str) else tuple(config.data))


def _check_training(config) -> None:
    for name in ("lora_rank", "batch_size"):
        _in_range(config, name, 1, None)
    _in_range(config, "max_length", 2, None)
    _in_range(config, "warmup", 0, 1)
    _in_range(config, "learning_rate", 0, None)
    _in_range(config, "checkpoint_seconds", 0, None)
    _in_range(config, "seed", 0, 2**32 - 1)


def _in_range(config, name: str, low, high, open_below: bool = False, open_above: bool = False) -> None:
    value = getattr(config, name)
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{flag} must be a number; found {value!r}")
    below = value <= low if open_below else value < low
    above = high is not None and (value >= high if open_above else value > high)
    if below or above or value != value:
        interval = f"{'(' if open_below else '['}{low}, {'inf' if high is None else high}{')' if open_above or high is None else ']'}"
        raise ValueError(f"{flag} must lie in {interval}; found {value}")


def flat(config) -> dict[str, Any]:
    """Every setting by its own name, those of a group (`reading`) among the rest."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def _groups(kind: type) -> dict[str, type]:
    """The fields of a config that are configs themselves."""
    return {
        field.name: type(field.default)
        for field in dataclasses.fields(kind)
        if dataclasses.is_dataclass(field.default)
    }


# several settings under one name; what else is given overrides them
PRESETS: dict[str, dict[str, Any]] = {
    # as the STAFF paper's experiments were run: arXiv:2410.01296, Section 4.1, and its released code
    "paper": {
        "draft_epochs": 3.0,
        "draft_share": 1.0,
        "num_regions": 50,
        "verification_budget": 10,
        "hard_cutoff": 0.1,
        "allocation": "released",
        "pick": "top",
    },
}


def from_mapping(kind: type, values: dict[str, Any], source: str):
    """A config of named settings, as a YAML file has them: flat, those of a group among the rest, "preset" a key of PRESETS.

    Raises:
        ValueError: a name that no field has, or a value of the wrong type; says what was meant.
    """
    groups = _groups(kind)
    own = {field.name: field for field in dataclasses.fields(kind) if field.name not in groups}
    fields = own | {field.name: field for group in groups.values() for field in dataclasses.fields(group)}
    clean: dict[str, Any] = {}
    values = dict(values)
    if "preset" in values and any(name in fields for preset in PRESETS.values() for name in preset):
        preset = values.pop("preset")
        if preset not in PRESETS:
            raise ValueError(f"{source}: there is no preset {preset!r}; there is {', '.join(PRESETS)}")
        values = {name: value for name, value in PRESETS[preset].items() if name in fields} | values
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            cure = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(fields)}"
            raise ValueError(f"{source}: there is no setting {name!r}; {cure}")
        clean[key] = _typed(value, str(fields[key].type), f"{source}: {name}")
    for name, group in groups.items():
        taken = {
            field.name: clean.pop(field.name) for field in dataclasses.fields(group) if field.name in clean
        }
        clean[name] = group(**taken)
    return kind(**clean)


def _typed(value: Any, type_name: str, where: str) -> Any:
    """A YAML value as the field's type has it; text is never read as a number, nor 3.0 refused for 3."""
    if value is None and "None" in type_name:
        return None
    if value is None and type_name.startswith("tuple"):
        return ()
    if type_name == "tuple[float, ...]":
        numbers = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_typed(number, "float", where) for number in numbers)
    if type_name.startswith("tuple"):
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where} must be text or a list of texts; found {value!r}")
        return tuple(map(expand, parts))
    base = type_name.split(" | ")[0]
    if base == "float" and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # YAML reads 1e-4 as text
    wanted: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "bool": (bool,)}
    if not isinstance(value, wanted.get(base, (str,))) or (base != "bool" and isinstance(value, bool)):
        raise ValueError(f"{where} must be {base if base in wanted else 'text'}; found {value!r}")
    if base not in wanted:
        value = expand(str(value))
        if base.startswith(("Literal", "Dtype")):
            choices = re.findall(r'["\']([\w-]+)["\']', type_name) or [
                "auto",
                "float32",
                "bfloat16",
                "float16",
            ]
            if value not in choices:
                raise ValueError(f"{where} must be one of {', '.join(choices)}; found {value!r}")
    return value


def expand(text: str) -> str:
    """${NAME} in a path from a YAML file, filled in from the environment.

    Raises:
        ValueError: the variable is not set.
    """

    def fill(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise ValueError(f"{text!r} needs the environment variable {match[1]}, which is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", fill, text)


def yaml_value(text: str) -> Any:
    """A value as YAML reads it: a number, true, null, or text."""
    import yaml

    return yaml.safe_load(text)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file; each is a flag typed earlier.

    Raises:
        ValueError: no such file, or not a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be lines of 'setting: value'; found {type(values).__name__}")
    return values


def to_yaml(config) -> str:
    """A config as YAML that `read_yaml` and `from_mapping` turn into the same config again."""
    import yaml

    values = {
        name: list(value) if isinstance(value, tuple) else value for name, value in flat(config).items()
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
