"""What a run is told: frozen dataclasses that become flags, YAML and the run's own config.yaml.

A value is checked once, by its field's type and the `Range` beside it, whether it came as a flag, from a YAML
file or from Python, so the message is the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import types
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

DEFAULT_METHOD = "spread"  # what chooses where --method is not given
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Metric = Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact"]
Scope = Literal["last-value", "last-block", "linear", "lora", "released"]


@dataclass(frozen=True)
class Range:
    """Where a number must lie: from `low` to `high`, an open end left out.

    Attributes:
        about: what the number is, where the message would not be clear without it.
    """

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False
    about: str = ""

    def check(self, value: float, flag: str) -> None:
        """Raise ValueError where a value lies outside."""
        below = value <= self.low if self.open_low else value < self.low
        above = value >= self.high if self.open_high else value > self.high
        if below or above or value != value or value == float("inf"):
            left = "(" if self.open_low else "["
            right = ")" if self.open_high or self.high == float("inf") else "]"
            about = f"is {self.about}, in" if self.about else "must lie in"
            raise ValueError(f"{flag} {about} {left}{self.low:g}, {self.high:g}{right}; found {value}")


Share = Annotated[float, Range(0, 1, open_low=True)]
Epochs = Annotated[float, Range(0)]
SomeEpochs = Annotated[float, Range(0, open_low=True)]
Count = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
PruningRate = Annotated[float, Range(0, 1, open_high=True, about="the fraction of the pool removed")]


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _checked(value: Any, hint: Any, flag: str) -> Any:
    """A value as its field's type has it: a single one where several may stand, a whole number where 3.0 is
    meant.

    Raises:
        ValueError: another type, another choice, or a number out of range.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        values = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_checked(part, get_args(hint)[0], flag) for part in values)
    if get_origin(hint) is Annotated:
        base, *ranges = get_args(hint)
        number = _checked(value, base, flag)
        for limit in ranges:
            limit.check(number, flag)
        return number
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{flag} must be one of {', '.join(get_args(hint))}; found {value!r}")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float):
        if isinstance(value, str) and hint is float and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            return float(value)  # YAML reads 1e-4 as text
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and (hint is float or value % 1 == 0):
            return int(value) if hint is int else float(str(value))  # a whole number may be past any float
        raise ValueError(f"{flag} must be a {'whole ' * (hint is int)}number; found {value!r}")
    if hint is str and isinstance(value, (str, os.PathLike)):
        return str(value)
    raise ValueError(f"{flag} must be {'true or false' if hint is bool else 'text'}; found {value!r}")


class _Checked:
    """Checks every field by its type as a config is made, and takes one value where several may stand."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            if not dataclasses.is_dataclass(hint):  # a group has checked itself
                flag = "--" + name.replace("_", "-")
                object.__setattr__(self, name, _checked(getattr(self, name), hint, flag))


@dataclass(frozen=True)
class Reading(_Checked):
    """How the data is read; the same for every command."""

    columns: str | None = None
    """Which columns hold what, as in prompt=question,response=answer; found by looking where not given."""
    train_on: Literal["last", "all"] = "last"
    """Take the loss on the last assistant turn of a conversation, or on every one."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that can't be used: stop, or leave it out, count it and list it."""
    max_length: Annotated[int, Range(2)] = 1024
    """Tokens of a sample at most; longer prompts lose the start of their text."""
    on_long: Literal["cut-prompt", "drop", "error"] = "cut-prompt"
    """A sample longer than that: shorten its prompt's text, leave it out, or stop; counted in any case."""
    chat_template: str | None = None
    """A file with a chat template; none: as without one; model, or left out: the model's own."""
    template_date: str | None = None
    """The day, as 2025-12-31, that a chat template writes as today's; left out, that of the first run."""
    dataset_info: str | None = None
    """LLaMA-Factory's dataset_info.json, or its folder; --data then names entries."""
    split: str | None = None
    """Split of a hub data set, or of a folder that holds several."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set."""
    max_unpacked: Count = 100
    """How many times its own size a gzipped file may unpack to, beyond 8 MiB."""

    def keywords(self) -> dict[str, Any]:
        """As `rows.read` takes them; the others are of texts and tokens."""
        names = ("columns", "train_on", "on_bad_row", "dataset_info", "split", "revision", "max_unpacked")
        return {name: getattr(self, name) for name in names} | {"config": self.dataset_config}


@dataclass(frozen=True)
class Engine(_Checked):
    """Where models compute and in what."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    dtype: Dtype = "auto"
    """What models compute in; auto is bfloat16 where the hardware has it, else float32."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the models' weights as they load, with bitsandbytes: LLM.int8, or NF4."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along."""


@dataclass(frozen=True)
class Spread(_Checked):
    """Who does what is done sample by sample."""

    workers: Count | None = None
    """Processes that work side by side: one a GPU, else the cores shared out; left out, this one alone."""
    threads: Count | None = None
    """CPU threads of each: the same number gives the same bytes, however many workers there are. Left out,
    the cores shared out; 1 where there are no workers and the model is small."""
    engine: Literal["local", "files", "ray"] = "local"
    """Who starts them: this command, you with `staff worker --run`, or Ray."""
    ray_address: str | None = None
    """A Ray cluster's address, or auto; left out, Ray is started on this machine."""
    worker_timeout: Annotated[float, Range(0, open_low=True)] = 600.0
    """Seconds without a batch after which a worker's shard is done again."""
    device_map: Literal["auto"] | None = None
    """auto: a target larger than its device lies on other GPUs, in CPU memory and on disk, to be scored."""
    max_memory: str | None = None
    """What device_map may take, as 0=20GB,cpu=60GB; of what is not named, what is free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "ray" and not self.workers:
            raise ValueError("--engine ray: say how many actors with --workers")
        if self.max_memory:
            memory_limits(self.max_memory)
            if not self.device_map:
                raise ValueError("--max-memory goes with --device-map auto")


@dataclass(frozen=True)
class Scoring(_Checked):
    """What an effort is, and how it is taken."""

    scope: Scope = "last-block"
    """Which weights the effort is taken on. last-block: every linear weight of the last block; last-value:
    its value projection alone, as in the paper; linear: those of every block; lora: an adapter's; released: a
    random sketch of the value projection, as in the paper's code."""
    loss: Literal["mean", "sum", "sqrt"] = "mean"
    """L of a sample: its response tokens' losses summed and divided by their number, by nothing, or by its
    root."""
    balance_layers: bool = False
    """Divide the gradient norm of each weight by its mean over the pool, so that wide layers do not drown
    others."""
    batch_tokens: Count | None = None
    """Padded tokens of a scoring batch at most; left out, what the device's memory bears."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance_layers and self.scope in ("last-value", "released"):
            needs = "needs a scope of several weights, as last-block or linear"
            raise ValueError(f"--balance-layers {needs}; {self.scope} has one")


@dataclass(frozen=True)
class Training(_Checked):
    """How a LoRA adapter is trained."""

    lora_rank: Count = 8
    """Rank of the LoRA adapter."""
    lora_alpha: int = 16
    """Scale of the adapter: its product is multiplied by alpha / rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers with an adapter, by name, as q_proj v_proj, or all-linear; left out, all that PEFT can wrap."""
    learning_rate: Annotated[float, Range(0)] = 1e-4
    """Peak learning rate; warm-up, then cosine."""
    warmup: Annotated[float, Range(0, 1)] = 0.1
    """Share of the steps in which the learning rate rises."""
    batch_size: Count = 8
    """Samples of a training step."""
    checkpoint_seconds: Annotated[float, Range(0)] = 60.0
    """How often fine-tuning is saved for a resume."""


@dataclass(frozen=True)
class Launch(_Checked):
    """Who fine-tunes."""

    processes: Count = 1
    """Processes that share each training step, one a GPU: started with accelerate launch."""
    accelerate_config: str | None = None
    """accelerate's configuration file, for FSDP say (examples/fsdp.yaml)."""


@dataclass(frozen=True)
class Trying(_Checked):
    """How --method auto and `staff try` find out which way of choosing helps."""

    ways: tuple[str, ...] = ()
    """Methods to try beside random, and dedup and drop-suspects; left out, what fits what is in the pool."""
    try_cost: Annotated[float, Range(0, open_low=True)] = 0.1
    """What the try-outs may cost, as a share of one fine-tuning on all data."""
    full_epochs: SomeEpochs = 3.0
    """Epochs of that fine-tuning, and of the coreset's own."""
    metric: Literal["rougeL", "rouge1", "rouge2", "bleu", "chrf", "exact", "loss"] = "rougeL"
    """What try-outs are judged by; loss hardly goes with a task's own metric across methods."""
    metric_command: str | None = None
    """A judge of your own: reads answers and references as JSON Lines, prints a number a row, higher is
    better."""
    answer_tokens: Count = 64
    """Tokens of an answer that is judged, at most."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig(_Checked):
    """Choose the coreset of a pool: the main job."""

    REQUIRED = ("data", "output")

    data: tuple[str, ...] = ()
    """The pool: JSONL, JSON, CSV, TSV, Parquet or Arrow files, a folder, a hub data set, or - for standard
    input."""
    target: str = ""
    """The model the coreset is for: a hub id, a folder or a .gguf file. Required, but for methods that look
    at no model."""
    draft: str | None = None
    """The small model that speculates, given like the target; or self:N, N of the target's own blocks.
    Required, but for --method direct, random and others that need none, and with --scores."""
    scores: str | None = None
    """Scores of your own in place of a draft's: .npy in the data's order, or a table with row or id and
    score."""
    validation: str | None = None
    """A few rows of the task as it will be judged, for less, less_round_robin and rds."""
    quality_model: str | None = None
    """For mods, a reward model: a sequence-classification model of one logit, a hub id or a folder."""
    quality_column: str | None = None
    """For mods, in place of a quality model: a column of the data that says how good a row is, from 0 on."""
    pruning_rate: tuple[PruningRate, ...] = ()
    """Fraction of the pool removed, in [0, 1); several make a coreset each. This, --budget or
    --budget-tokens is required."""
    budget: Annotated[int, Range(0, about="a number of samples")] | None = None
    """Samples kept, in place of a pruning rate."""
    budget_tokens: Count | None = None
    """Tokens kept at most, in the target's tokens, prompts and responses: as many samples as go into that."""
    output: str | None = None
    """The run's folder. Typing the same command again goes on where it stopped."""
    format: Literal["jsonl", "same"] = "jsonl"
    """The coreset is JSON Lines; same: beside it also in the format the data came in."""
    push_to_hub: str | None = None
    """OWNER/NAME: upload the coreset to the Hugging Face hub, as a private data set with a card."""
    public: bool = False
    """The coreset may be public there: without it, a data set that is public is refused."""
    license: str = "unknown"
    """What the card says of the rows' licence, as the hub names it: apache-2.0, cc-by-4.0 and so on."""
    method: tuple[str, ...] = (DEFAULT_METHOD,)
    """How samples are chosen; `staff methods` lists them, auto tries some. Several make a coreset each."""
    option: tuple[str, ...] = ()
    """Options of methods that have no flag of their own, as in num_strata=20 or part=bottom."""
    dedup: str | None = None
    """Set repeated rows aside first, the first of each stays: exact, near, or near:0.9 for 90 % of word
    triples shared."""
    keep: str | None = None
    """A file of rows that are always in, counted among those kept: known by id, else by their text."""
    drop_suspects: bool = False
    """Leave out rows whose answer the draft, as it comes, finds no likelier with its prompt than without."""
    suspect_ratio: Annotated[float, Range(0, open_low=True)] = 1.0
    """Such are rows whose loss is this many times that of the answer alone, or more."""
    group_by: str | None = None
    """A column of the data: the budget is shared over its values by size, and selection runs inside each."""
    shares: str | None = None
    """Shares of the coreset by those values in place of their sizes, as in qa=0.5,chat=0.3,rest: the others
    get what is left, by size."""
    draft_epochs: Epochs = 0.0
    """T, epochs of fine-tuning the draft before it scores; 0 scores it as it comes, the paper has 3."""
    draft_share: Share = 1.0
    """f, share of the pool that the draft is fine-tuned on, drawn at random, in (0, 1]."""
    target_epochs: SomeEpochs = 3.0
    """Epochs of fine-tuning the target for the methods that score a fine-tuned one, grand, el2n, ccs and d2;
    and for mods, which tunes one on its seed."""
    draft_blocks: Literal["first", "even", "last", "ends"] = "first"
    """Which blocks a self:N draft keeps: the first, spread evenly, the last, or half from either end."""
    num_regions: Count | None = None
    """K, intervals of equal width that the scores are cut into; left out, it follows the pool: 20 for 2,000
    samples, 50 from 12,500 on."""
    verification_budget: Count | None = None
    """b_v, samples of each region that the target scores; left out, 10 or fewer, a tenth of the pool in
    all."""
    verification: Literal["fixed", "adaptive"] = "fixed"
    """Score b_v samples of every region on the target; or at most as many, where it is least certain what it
    says."""
    verification_error: Share = 0.03
    """Where adaptive verification stops: the errors of the V_i together, as a share of their sum."""
    hard_cutoff: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """Fraction of the pool with the highest scores that is set aside first."""
    allocation: Literal["released", "paper"] = "released"
    """The budget rule over the regions: the authors' released code, or Eq. 4 as printed."""
    pick: Literal["top", "random"] = "top"
    """Which samples of a region are kept: the highest scores, or random ones."""
    likeness: Metric = "rougeL"
    """How like an answer is to a row's own, for whisper and for mods without a quality model."""
    max_new_tokens: Count = 256
    """Tokens of an answer at most, for mods and whisper."""
    seed: Seed = 42
    """One seed for the draft's sample and adapter, the draws, the picks and the fill."""
    trying: Trying = Trying()
    reading: Reading = Reading()
    scoring: Scoring = Scoring()
    training: Training = Training()
    engine: Engine = Engine()
    spread: Spread = Spread()
    launch: Launch = Launch()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("method", "pruning_rate"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.dedup is not None:
            near_similarity(self.dedup)
        if self.shares is not None:
            parse_shares(self.shares)
            if self.group_by is None:
                raise ValueError(f"--shares {self.shares}: name the column of these values with --group-by")
        if self.quality_model and self.quality_column:
            raise ValueError("give --quality-model or --quality-column, one of them")
        if [bool(self.pruning_rate), self.budget is not None, self.budget_tokens is not None].count(True) > 1:
            raise ValueError("give --pruning-rate, --budget or --budget-tokens, one of them")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(_Checked):
    """Score every sample of a pool on one model, and nothing else."""

    REQUIRED = ("data", "model", "output")

    data: tuple[str, ...] = ()
    """The pool, in any format that `staff select` reads."""
    model: str = ""
    """A hub id, a folder or a .gguf file."""
    output: str | None = None
    """The Parquet file to write: row, id, effort, loss, el2n, entropy, hes, upd, prompt_tokens and so on."""
    lora_rank: Count = 8
    """Rank of the fresh adapter that scope lora looks at, where the model has none."""
    lora_alpha: int = 16
    """Scale of that adapter."""
    lora_targets: tuple[str, ...] = ()
    """Layers that it is on, by name; left out, all linear layers that PEFT can wrap."""
    seed: Seed = 42
    """Seed of that adapter."""
    reading: Reading = Reading()
    scoring: Scoring = Scoring()
    engine: Engine = Engine()
    spread: Spread = Spread()


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_Checked):
    """Fine-tune a model on a file with LoRA, loss on the responses alone."""

    REQUIRED = ("data", "model", "output")

    data: tuple[str, ...] = ()
    """The examples, in any format that `staff select` reads: a coreset.jsonl, say."""
    model: str = ""
    """A hub id, a folder or a .gguf file."""
    output: str | None = None
    """Where the adapter goes. Typing the same command again goes on where it stopped."""
    weights: str | None = None
    """The scores.parquet of the run that chose --data, or a table of row or id and weight: each sample's loss
    counts so much, over their mean, 5 times it at most."""
    epochs: SomeEpochs = 3.0
    """Passes over the data."""
    max_steps: Count | None = None
    """Training steps in place of epochs, so that coresets of different sizes can be compared at equal
    updates."""
    eval_data: tuple[str, ...] = ()
    """Examples that are held out: their loss is taken before the first step and after every epoch."""
    merge: bool = False
    """Leave the model with the adapter folded in, too, in OUTPUT/merged: for who loads no adapters."""
    report_to: Literal["wandb", "trackio", "tensorboard"] | None = None
    """Tell one of these of every step, too."""
    seed: Seed = 42
    """Seed of the adapter and of the order of the samples."""
    reading: Reading = Reading()
    training: Training = Training()
    engine: Engine = Engine()
    launch: Launch = Launch()


@dataclass(frozen=True, kw_only=True)
class PlanConfig(_Checked):
    """Predict what a selection would take on this machine, and what it would verify, before any work."""

    REQUIRED = ("data", "target")

    data: tuple[str, ...] = ()
    """The pool, in any format that `staff select` reads."""
    target: str = ""
    """The model the coreset is for: a hub id, a folder or a .gguf file."""
    draft: str | None = None
    """The small model that speculates, or self:N; without one, methods that need it are left out."""
    pruning_rate: tuple[PruningRate, ...] = (0.5, 0.8, 0.9)
    """Fractions of the pool removed, in [0, 1), to predict for."""
    epochs: SomeEpochs = 3.0
    """Epochs of fine-tuning the target on what is kept."""
    draft_epochs: Epochs = 0.0
    """T, epochs of fine-tuning the draft before it scores."""
    draft_share: Share = 1.0
    """f, share of the pool that the draft is fine-tuned on."""
    draft_blocks: Literal["first", "even", "last", "ends"] = "first"
    """Which blocks a self:N draft keeps."""
    num_regions: Count | None = None
    """K, intervals that the scores are cut into; left out, it follows the pool."""
    verification_budget: Count | None = None
    """b_v, samples of each region that the target scores; left out, it follows the pool."""
    verification: Literal["fixed", "adaptive"] = "fixed"
    """b_v samples of every region, or at most as many, where it is least certain what the target says."""
    verification_error: Share = 0.03
    """Where adaptive verification stops: the errors of the V_i together, as a share of their sum."""
    hard_cutoff: Annotated[float, Range(0, 1, open_high=True)] = 0.1
    """Fraction of the pool with the highest scores that is set aside first."""
    group_by: str | None = None
    """A column of the data: selection runs inside each of its values."""
    seed: Seed = 42
    """Seed of the samples that are timed."""
    reading: Reading = Reading()
    scoring: Scoring = Scoring()
    training: Training = Training()
    engine: Engine = Engine()


@dataclass(frozen=True, kw_only=True)
class DraftsConfig(_Checked):
    """Compare drafts with the target on a few hundred rows: how faithful each is, and what it costs."""

    REQUIRED = ("data", "target", "candidates")

    data: tuple[str, ...] = ()
    """The pool, in any format that `staff select` reads."""
    target: str = ""
    """The model the coreset is for: a hub id, a folder or a .gguf file."""
    candidates: tuple[str, ...] = ()
    """Drafts to compare: hub ids, folders, .gguf files, or self:N, N of the target's own blocks."""
    rows: Annotated[int, Range(20)] = 300
    """Rows of the pool, drawn at random, that every model scores."""
    picture: str | None = None
    """A PNG file to write: rank correlation against cost."""
    seed: Seed = 42
    """Seed of the rows that are drawn."""
    reading: Reading = Reading()
    engine: Engine = Engine()


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(_Checked):
    """Look at what is in a pool, with one pass of a small model, and say what that means."""

    REQUIRED = ("data", "model")

    data: tuple[str, ...] = ()
    """The pool, in any format that `staff select` reads."""
    model: str = ""
    """The draft that looks at it: a hub id, a folder or a .gguf file; or self:N, N of the target's own
    blocks."""
    draft_blocks: Literal["first", "even", "last", "ends"] = "first"
    """Which blocks self:N keeps: the first, spread evenly, the last, or half from either end."""
    validation: str | None = None
    """A few rows of the task as it will be judged: which rows of the pool are unlike them?"""
    test: str | None = None
    """The file that models will be judged on: which rows of it stand in the pool?"""
    target: str | None = None
    """The model the coreset is for: lengths are told in its tokens too; its weights are loaded for self:N
    alone."""
    output: str = "diagnosis.json"
    """The file that the findings are written to."""
    rows: Annotated[int, Range(20)] = 2_000
    """Rows of the pool, drawn at random, that the model looks at."""
    seed: Seed = 42
    """Seed of the rows that are drawn."""
    reading: Reading = Reading()
    engine: Engine = Engine()


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_Checked):
    """Answer a test file with a model and compare with its references."""

    REQUIRED = ("data", "model", "output")

    data: tuple[str, ...] = ()
    """The test examples, in any format that `staff select` reads; the last answer of each is its
    reference."""
    model: str = ""
    """A hub id, a folder (an adapter's too) or a .gguf file."""
    output: str | None = None
    """The per-example file to write, .jsonl or .parquet; the summary goes beside it."""
    max_new_tokens: Count = 256
    """Tokens of an answer at most; --max-length then is that of prompt and answer together."""
    batch_tokens: Count = 16384
    """Padded tokens of a batch at most, those of the answers included."""
    reading: Reading = Reading()
    engine: Engine = Engine()
    spread: Spread = Spread()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread.device_map:
            raise ValueError("--device-map is for scoring: a model that answers lies on its device whole")
        length = self.reading.max_length
        if self.max_new_tokens >= length:
            why = f"leaves no room for a prompt in --max-length {length}: lower the one or raise the other"
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} {why}")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(_Checked):
    """Show how a file is read, and what a model would see of it; no weights are loaded."""

    REQUIRED = ("data",)

    data: tuple[str, ...] = ()
    """What to look at, in any format that `staff select` reads. Bad rows are always listed and left out."""
    model: str | None = None
    """A hub id, a folder or a .gguf file: its tokenizer and chat template say what is masked and
    truncated."""
    trust_remote_code: bool = False
    """Run Python code that a model's repository brings along."""
    reading: Reading = Reading()


def parse_shares(text: str) -> tuple[dict[str, Fraction], bool]:
    """What --shares asks for: value -> its share, exactly; and whether the rest was named.

    Raises:
        ValueError: no numbers, a value twice, or shares that do not make up the whole.
    """
    shares: dict[str, Fraction] = {}
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        name, _, number = part.rpartition("=")
        if part == "rest":
            continue
        if not re.fullmatch(r"\d*\.?\d+", number) or not 0 <= Fraction(number) <= 1:
            raise ValueError(f"--shares {text}: {part!r} is no value with a share of 0 to 1, as in qa=0.5")
        if name in shares:
            raise ValueError(f"--shares {text}: {name!r} stands twice")
        shares[name] = Fraction(number)
    total, rest = sum(shares.values()), "rest" in parts
    if total > 1 or (total < 1 and not rest):
        cure = "lower some" if total > 1 else f"give the others what is left with {text},rest"
        raise ValueError(f"--shares {text}: they make {float(total):g} in all; {cure}")
    return shares, rest


def near_similarity(dedup: str) -> float | None:
    """How alike rows are that --dedup takes for one: 0.8 for near, None for exact.

    Raises:
        ValueError: it is neither.
    """
    how, _, share = dedup.partition(":")
    if dedup == "exact":
        return None
    if how != "near" or not re.fullmatch(r"(\d*\.?\d+)?", share) or dedup == "near:":
        raise ValueError(f"--dedup must be exact, near or near:0.8; found {dedup!r}")
    similarity = float(share or 0.8)
    Range(0.1, 1, about="the share of word triples in common").check(similarity, "--dedup near")
    return similarity


def memory_limits(text: str) -> dict[int | str, int]:
    """What --max-memory says: "0=20GB,cpu=60GB" -> bytes by GPU, and of CPU memory.

    Raises:
        ValueError: it is not of that form.
    """
    limits: dict[int | str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+|cpu)=(\d+\.?\d*)([KMG])I?B\s*", part, re.IGNORECASE)
        if not match:
            raise ValueError(f"--max-memory {text}: write 0=20GB,cpu=60GB, for each GPU and for CPU memory")
        device = match[1].lower() if match[1].lower() == "cpu" else int(match[1])
        limits[device] = int(float(match[2]) * 1000 ** (1 + "KMG".index(match[3].upper())))
    return limits


# several settings under one name; what else is given overrides them
PRESETS: dict[str, dict[str, Any]] = {
    # as the STAFF paper's experiments were run: arXiv:2410.01296, Section 4.1, and its released code
    "paper": {
        "method": ("staff",),
        "draft_epochs": 3.0,
        "draft_share": 1.0,
        "num_regions": 50,
        "verification_budget": 10,
        "verification": "fixed",
        "scope": "last-value",
        "hard_cutoff": 0.1,
        "allocation": "released",
        "pick": "top",
    },
}


ASKED = {
    "data": "the data with --data FILE",
    "model": "the model with --model MODEL",
    "target": "the model that the coreset is for with --target MODEL",
    "candidates": "drafts to compare with --candidates MODEL, self:8 for eight of the target's own blocks",
    "output": "where the results go with --output PATH",
}


def unnamed(config: Any, *names: str) -> list[str]:
    """A sentence for each of these settings that has nothing in it."""
    return [f"name {ASKED[name]}" for name in names if not getattr(config, name)]


def check_named(config: Any, data: Any = None) -> None:
    """Raise ValueError for the required settings that have nothing in them.

    Args:
        data: rows that are in no files.
    """
    check_whole(unnamed(config, *(name for name in config.REQUIRED if name != "data" or data is None)))


def check_whole(missing: list[str]) -> None:
    """Raise ValueError for all that is missing, at once.

    Args:
        missing: a sentence for each thing.
    """
    if missing:
        raise ValueError(
            "\n  ".join(["several things are missing:", *missing]) if missing[1:] else missing[0]
        )


def flags_of(group: Any, *names: str) -> str:
    """What of a group of settings is not as it is by itself, as flags to type; of all of it, or of some."""
    default, words = type(group)(), []
    for name in names or [field.name for field in dataclasses.fields(group)]:
        value = getattr(group, name)
        if value is not None and value != getattr(default, name):
            given = "" if value is True else f" {shlex.quote(str(value))}"
            words.append(f" --{name.replace('_', '-')}{given}")
    return "".join(words)


def type_of(kind: type, name: str) -> Any:
    """The type of a field, with its range."""
    return _hints(kind)[name]


def flat(config: Any) -> dict[str, Any]:
    """Every setting by its own name, those of the groups (`reading`, `scoring`, ...) among the rest."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def names_of(kind: type) -> dict[str, str]:
    """Every setting of a config by name -> the field of the config itself that it lies in."""
    groups = {name: hint for name, hint in _hints(kind).items() if dataclasses.is_dataclass(hint)}
    own = {field.name: field.name for field in dataclasses.fields(kind) if field.name not in groups}
    return own | {field.name: name for name, group in groups.items() for field in dataclasses.fields(group)}


def from_mapping(kind: type, values: dict[str, Any], source: str) -> Any:
    """A config of named settings, as a YAML file has them: flat, those of a group among the rest.

    "preset" is a key of PRESETS; ${NAME} in a text is filled in from the environment.

    Raises:
        ValueError: a name that no field has, or a value of the wrong type; says what was meant.
    """
    names, values = names_of(kind), dict(values)
    if "preset" in values and any(name in names for preset in PRESETS.values() for name in preset):
        preset = values.pop("preset")
        if preset not in PRESETS:
            raise ValueError(f"{source}: there is no preset {preset!r}; there is {', '.join(PRESETS)}")
        values = {name: value for name, value in PRESETS[preset].items() if name in names} | values
    own: dict[str, Any] = {}
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key not in names:
            raise ValueError(f"{source}: there is no setting {name!r}; {meant(key, names)}")
        if value is None and _hints(kind).get(key) is str:
            continue
        place = own if names[key] == key else grouped.setdefault(names[key], {})
        place[key] = expand(value)
    try:
        groups = {name: _hints(kind)[name](**settings) for name, settings in grouped.items()}
        return kind(**own, **groups)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def meant(name: str, known: Iterable[str]) -> str:
    """The cure for a name that isn't known: the nearest one, else all there are."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def expand(text: Any) -> Any:
    """${NAME} in the texts of a value from a YAML file, filled in from the environment.

    Raises:
        ValueError: the variable is not set.
    """
    if isinstance(text, (list, tuple)):
        return [expand(part) for part in text]
    if isinstance(text, dict):
        return {name: expand(part) for name, part in text.items()}
    if not isinstance(text, str):
        return text

    def fill(match: re.Match[str]) -> str:
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
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be lines of 'setting: value'")
    return values


PATHS = {"data", "target", "draft", "model", "scores", "weights", "validation", "keep", "eval_data", "output"}
PATHS |= {"chat_template", "dataset_info", "candidates", "picture", "test"}
NO_PATHS = ("none", "model", "-")  # words that stand where a path may


def anywhere(config: Any) -> dict[str, Any]:
    """Every setting by its own name; paths that are there are absolute, so that it holds in any folder."""

    def whole(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(whole, value))
        if not isinstance(value, str) or value in NO_PATHS or not value:
            return value
        path = Path(value).expanduser()
        return str(path.absolute()) if path.exists() else value

    return {name: whole(value) if name in PATHS else value for name, value in flat(config).items()}


def to_yaml(config: Any) -> str:
    """A config as YAML that `read_yaml` and `from_mapping` turn into the same config again, in any folder."""
    import yaml

    values = {
        key: list(value) if isinstance(value, tuple) else value for key, value in anywhere(config).items()
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
