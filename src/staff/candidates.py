"""Which draft is faithful, at what cost: candidates against the target on a few hundred rows (`staff
drafts`)."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff import files
from staff.config import DraftsConfig, SelectConfig, check_named, check_whole, flags_of, unnamed
from staff.methods.fidelity import Fidelity, fidelity, within
from staff.methods.strata import split
from staff.methods.verification import default_regions
from staff.planning import most_verified, staff_passes
from staff.types import Progress

if TYPE_CHECKING:
    from staff.data.tokens import Pool

BOTH_SCOPES = ("last-value", "last-block")  # both fall out of one pass
PAPER_EPOCHS = 3.0
TARGET = ""  # no candidate is named so
RANKS = ("good", "usable", "unknown", "poor")


def compare_drafts(config: DraftsConfig, on_progress: Progress | None = None) -> dict[str, Any]:
    """Score some rows on the target and on every candidate, untuned, and judge each.

    Returns:
        rows, n, verified_share; for each candidate and scope a line of `drafts`: candidate, scope,
        relative_cost (r by operations), clock (r by seconds), passes (r + v), tuned_passes (T = 3), pays,
        fidelity; and `advice`, a sentence with the command to type.

    Raises:
        ValueError: something that the user can mend.
    """
    from staff.data import rows as reading
    from staff.data.locate import locate
    from staff.data.tokens import in_common, tokenise
    from staff.models import families, load

    if config.target and not config.candidates:
        known = ", ".join(families.suggest_drafts(config.target)) or "self:8, a hub id or a folder"
        check_whole([*unnamed(config, "data"), f"name drafts to compare with --candidates, as {known}"])
    check_named(config)
    candidates, engine = tuple(dict.fromkeys(config.candidates)), config.engine
    sources, pools = {TARGET: load.resolve(config.target, "--target")}, {}
    for name in candidates:
        own = families.self_blocks(name)
        sources[name] = sources[TARGET] if own else load.resolve(name, "--candidates")
    how = config.reading
    located = locate(list(config.data), how.split, how.dataset_config, how.revision, how.dataset_info)
    if config.picture:
        given = {name or "--target": source.files() for name, source in sources.items()}
        files.check_outputs([Path(config.picture)], {**given, "--data": located.paths})
    for source in sources.values():
        load.check_model(source, "last-value", engine.load_in, engine.trust_remote_code)
    pool = reading.read(located, **how.keywords())
    n = len(pool)
    drawn = np.sort(np.random.default_rng(config.seed).permutation(n)[: config.rows])
    some = dataclasses.replace(pool, numbers=pool.numbers[drawn])
    apart = {id(source): source for source in sources.values()}  # blocks of the target's own are of its files
    for key, source in apart.items():
        tokenizer = load.load_tokenizer(source, engine.trust_remote_code)
        pools[key] = tokenise(some.examples(), tokenizer, how.max_length, None, how, some.where)
    some, pools = in_common(some, pools)
    for key, source in apart.items():
        load.check_room(source, pools[key], some.numbers, engine.trust_remote_code)
    told, of_target = {}, pools[id(sources[TARGET])]
    device = load.pick_device(engine.device)
    dtype = load.pick_dtype(engine.dtype, device)
    with tempfile.TemporaryDirectory(prefix="staff-") as folder:
        for key, source in apart.items():
            if source.gguf:
                (Path(folder) / str(key)).mkdir()
                apart[key] = load.unpack_gguf(source, Path(folder) / str(key), dtype)
        for label in (*candidates, TARGET):  # the dearest last
            key = id(sources[label])
            how_loaded = dtype, device, engine.trust_remote_code, engine.load_in
            told[label] = _score(load.load_model(apart[key], *how_loaded), label, pools[key], on_progress)
    target, lines = told[TARGET], []
    share = most_verified(n, None, None, SelectConfig.hard_cutoff) / n
    for name in candidates:
        draft = told[name]
        relative = draft["flops"] / target["flops"]
        for scope in BOTH_SCOPES:
            if scope not in draft or scope not in target:
                continue
            passes = staff_passes(0, 1, relative, share)
            lines.append(
                {
                    "candidate": name,
                    "scope": scope,
                    "relative_cost": relative,
                    "clock": draft["seconds"] / target["seconds"],
                    "passes": passes,
                    "tuned_passes": staff_passes(PAPER_EPOCHS, 1, relative, share),
                    "pays": passes < 1,
                    "fidelity": _faithful(draft, target, scope, of_target, n).as_dict(),
                }
            )
    found = {"rows": len(some), "n": n, "verified_share": share, "drafts": lines}
    return found | {"advice": _advice(lines, config)}


def _score(model: Any, label: str, pool: Pool, on_progress: Progress | None) -> dict[str, Any]:
    """Efforts in both scopes, loss, seconds and operations of a model, cut as its label says."""
    from staff.models import drafts, families, load
    from staff.scoring import scopes, selfcheck
    from staff.scoring.scorer import Scorer

    blocks = families.self_blocks(label)
    model = drafts.cut(model, blocks) if blocks else model
    stage = f"score on {label or 'target'}"
    done = 0

    def tell(samples: int) -> None:
        nonlocal done
        done += samples
        if on_progress:
            on_progress(stage, done, len(pool))

    try:
        scorer = Scorer(model, "last-block", balance=True)
    except ValueError:  # its last block can't be taken whole
        scorer = Scorer(model, "last-value", balance=True)
    selfcheck.check(scorer, pool)
    sites = [site.name for site in scorer.sites]
    value = scopes.value_projection(model).name
    every = np.arange(len(pool))
    began = time.perf_counter()
    scores = scorer.scores(pool, every, None, tell)
    seconds = time.perf_counter() - began
    result: dict[str, Any] = {"loss": scores["loss"], "seconds": seconds}
    if value in sites:
        result["last-value"] = scores["site_norms"][:, sites.index(value)]
    if len(sites) > 1:
        result["last-block"] = scores["effort"]
    tokens, response = int(pool.lengths.sum()), int(pool.response_tokens().sum())
    return result | {"flops": load.measure(model).scoring_flops(tokens, response)}


def _faithful(
    draft: Mapping[str, Any], target: Mapping[str, Any], scope: str, pool: Pool, n: int
) -> Fidelity:
    """Of rows drawn evenly from a pool of n."""
    scores, length, loss = np.asarray(draft[scope], np.float64), pool.response_tokens(), draft["loss"]
    partition = split(scores, default_regions(len(scores)))[1]
    drawn_from = np.zeros(len(scores), np.int64), np.array([n])
    return fidelity(*drawn_from, n, scores, target[scope], length, loss, partition)


def _advice(lines: list[dict[str, Any]], config: DraftsConfig) -> str:
    """What to take and what to type: the most trusted draft that costs less than scoring the target."""
    data = " ".join(map(shlex.quote, config.data))
    line = f"staff select --data {data} --target {shlex.quote(config.target)}"
    line += flags_of(config.reading) + flags_of(config.engine)
    line += " --pruning-rate 0.8 --output runs/x"
    trusted = [row for row in lines if row["pays"] and row["fidelity"]["verdict"] in RANKS[:2]]
    if not trusted:
        reason = "none of these drafts is both faithful and cheaper than the target itself"
        return f"{reason}: score it directly (1 pass), or take --method random\n  {line} --method direct"
    best = min(
        trusted, key=lambda row: (RANKS.index(row["fidelity"]["verdict"]), row["passes"], row["scope"])
    )
    verdict, passes = best["fidelity"]["verdict"], best["passes"]
    return (
        f"{best['candidate']} in scope {best['scope']}: {verdict}, at {passes:.2f} passes of the target with "
        f"--method staff in place of 1\n  {line} --draft {shlex.quote(best['candidate'])} "
        f"--scope {best['scope']}"
    )


def describe_drafts(found: Mapping[str, Any]) -> str:
    """The table as a person reads it."""
    header = f"{'draft':28}{'scope':12}{'verdict':9}{'Spearman':24}{'length out':24}"
    share = found["verified_share"]
    lines = [
        "",
        f"{found['rows']} of {found['n']} rows; passes: r + v, v = {share:.2f}; the target itself takes 1",
        "",
        f"{header}{'r':>6}{'clock':>7}{'passes':>8}{'T = 3':>7}",
    ]
    for row in found["drafts"]:
        told = row["fidelity"]
        spearman, rest = (within(told[key]) if told[key] else "" for key in ("spearman", "without_length"))
        lines.append(
            f"{row['candidate'][-27:]:28}{row['scope']:12}{told['verdict']:9}{spearman:24}{rest:24}"
            f"{row['relative_cost']:6.2f}{row['clock']:7.2f}{row['passes']:8.2f}{row['tuned_passes']:7.2f}"
        )
    reasons = {f"{row['candidate']}, {row['scope']}: {row['fidelity']['reason']}" for row in found["drafts"]}
    return "\n".join([*lines, "", *sorted(reasons), "", found["advice"]])


def draw_drafts(found: Mapping[str, Any], path: Path) -> bool:
    """A picture of fidelity against cost; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for scope, marker, colour in zip(BOTH_SCOPES, ("o", "s"), ("#0072b2", "#d55e00"), strict=True):
        rows = [row for row in found["drafts"] if row["scope"] == scope and row["fidelity"]["spearman"]]
        if not rows:
            continue
        value, low, high = np.array([row["fidelity"]["spearman"] for row in rows]).T
        cost = [row["passes"] for row in rows]
        spread = np.abs([value - low, high - value])
        axes.errorbar(cost, value, spread, fmt=marker, color=colour, capsize=3, label=scope)
        for row, x, y in zip(rows, cost, value, strict=True):
            axes.annotate(row["candidate"], (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="#666666", linestyle=":")
    axes.annotate("scoring the target itself", (1, axes.get_ylim()[0]), rotation=90, fontsize=8, va="bottom")
    axes.set_xlabel("cost of choosing, passes of the target")
    axes.set_ylabel("rank correlation with the target, 95 %")
    axes.legend()
    files.write_whole(path, partial(figure.savefig, format="png", dpi=120))
    return True
