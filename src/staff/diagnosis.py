"""What is in a pool, by one pass of a small model, and what that means for choosing from it (`staff
diagnose`)."""

from __future__ import annotations

import dataclasses
import json
import shlex
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from staff import files
from staff.config import DiagnoseConfig, SelectConfig, check_named, flags_of
from staff.data import rows as reading
from staff.data.duplicates import find_duplicates, words_of
from staff.data.rows import Rows
from staff.data.turns import Example
from staff.jobs import opened
from staff.methods.features import at_unit_length
from staff.models.families import self_blocks
from staff.models.load import load_tokenizer, resolve
from staff.pipeline import content_of, ingredients
from staff.runs.account import spent
from staff.runs.outputs import fingerprint_rows
from staff.runs.store import Inputs, open_run
from staff.types import Need, Progress

SIMILARITY = 0.8  # of word triples, from which two rows say the same
ROWS_FOR_COPIES = 50_000  # past that the first ones stand for all
SHUFFLED = 200  # rows whose answers are exchanged, to see whether the model would tell
TELLS = 0.7  # area under the curve from which it does
GRAM = 8  # words, of which test rows and the pool have some in common
COPIED = 0.5  # share of a test row's word groups in one row of the pool, from which it counts as copied
USUAL_STRANGERS = 0.05  # of the validation rows themselves lie farther off than their like
MIXED = 0.2  # share of strangers, from which a pool counts as mixed
MANY = 0.05  # share of repeated or wrong rows from which something is to be gained by leaving them out
RIGHT = 0.5  # share of wrong ones among the suspects, at best, from which it pays to leave them out
MOST_SOURCES = 30  # values of a column that parts a pool into kinds
SHOWN = 5
SIGNS = ("leak", "copies", "suspects", "mixed")
FINDINGS = 1  # raised when the same pool would give other findings


def diagnose(config: DiagnoseConfig, on_progress: Progress | None = None) -> dict[str, Any]:
    """Look at a pool; config.output gets what is returned, as JSON.

    Returns:
        n, rows (looked at by the model), copies, lengths, scripts, sources, answers, strangers, validation,
        test (None for what was not asked for), `signs`, those of leak, copies, suspects and mixed that there
        are, `advice`, a sentence each, and what it took: flops, and passes of the model over the whole pool.

    Raises:
        ValueError: something that the user can mend.
    """
    check_named(config)
    output = Path(config.output)
    if output.suffix != ".json":
        raise ValueError(f"--output {output}: findings are written as JSON; name a file that ends in .json")
    unfinished, is_cut = output.with_suffix(".unfinished"), self_blocks(config.model) is not None
    model = (config.target or "") if is_cut else config.model
    if not model:
        raise ValueError(f"--model {config.model}: say whose blocks these are with --target")
    dated, pool, source = opened(dataclasses.replace(config, model=model), unfinished, [output])
    config = dataclasses.replace(dated, model=config.model)
    with open_run(unfinished, "scores", on_progress) as run:
        drawn = np.sort(np.random.default_rng(config.seed).permutation(len(pool))[: config.rows])
        some = dataclasses.replace(pool, numbers=pool.numbers[drawn])
        contents = {"draft": partial(content_of, run, source)}
        inputs = Inputs(contents, {"draft": f"--model {model}"})
        inputs["data"] = fingerprint_rows(some)
        shared: dict[str, Any] = {name: getattr(config, name) for name in ("seed", "reading", "engine")}
        stand_in = SelectConfig(draft=config.model, draft_blocks=config.draft_blocks, **shared)
        beside = {name: _others(config, name) for name in ("validation", "test")}
        contents_of = {name: fingerprint_rows(rows) for name, rows in beside.items() if rows}
        made_of = files.fingerprint([FINDINGS, ingredients(config), dict(inputs), len(pool), contents_of])
        if before := _finished(output, made_of):
            return before
        run.begin(ingredients(stand_in), inputs, update=True)
        found: dict[str, Any] = {"n": len(pool), "rows": len(some), "model": config.model}
        found |= {"skipped": len(pool.skipped), "copies": copies(pool), "sources": _sources(some)}
        found["scripts"] = _shares(map(script_of, some.examples()))
        found |= {name: other and copied_rows(pool, other, config.seed) for name, other in beside.items()}
        from staff.runs.pieces import Pieces  # torch comes in here

        wanted = [Need("raw_draft", "loss"), Need("raw_draft", "features")]
        pieces = Pieces(stand_in, run, some, {"draft": source}, inputs, wanted)
        some = pieces.usable_rows()
        found["lengths"] = _lengths(pieces.pool("raw_draft"))
        if config.target:
            found["target_lengths"] = _lengths(tokens_of(config, some, config.target, "--target"))
        features = pieces.array(wanted[1])
        found["answers"] = None
        if some.layout.text is None:
            ratios = pieces.loss_ratios()
            found["answers"] = _answers(some, ratios, _shuffled_ratios(config, some, pieces))
        queries = beside["validation"]
        of_queries = None
        if queries:
            of_queries = pieces.of_others(queries.examples(), fingerprint_rows(queries))["features"]
        found["strangers"] = None if of_queries is None else _strangers(some, features, of_queries)
        found["flops"] = sum(numbers.get("flops", 0.0) for numbers in spent(run.work).values())
        found["passes"] = found["flops"] / pieces.one_pass("raw_draft") * len(some) / len(pool)
        pieces.free()
        found["signs"] = _signs(found)
        found["advice"] = _advice(found, config)
        found["made_of"] = made_of
        files.write_json(output, found)
    files.remove(unfinished)
    return found


def _finished(output: Path, made_of: str) -> dict[str, Any] | None:
    try:
        found = json.loads(output.read_text(encoding="utf-8"))
        return found if found["made_of"] == made_of else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _others(config: DiagnoseConfig, name: str) -> Rows | None:
    path = getattr(config, name)
    return reading.read(path, **config.reading.keywords()) if path else None


def _shares(labels: Iterable[str]) -> dict[str, float]:
    """Label -> its share, the commonest first."""
    counts = Counter(labels)
    return {label: count / counts.total() for label, count in counts.most_common()}


# ---- the text alone ----


def copies(rows: Rows) -> dict[str, Any]:
    """How many rows repeat an earlier one, to the letter or nearly, and the largest clusters of them."""
    similarity = SIMILARITY if find_spec("datasketch") else None
    looked = min(len(rows), ROWS_FOR_COPIES)
    same = find_duplicates(rows.examples(0, looked), similarity)
    exact = same if similarity is None else find_duplicates(rows.examples(0, looked), None)
    sizes = Counter(same.values())
    members = defaultdict(list)
    for place, first in same.items():
        members[first].append(int(rows.numbers[place]))
    return {
        "looked_at": looked,
        "similarity": similarity,
        "exact": len(exact),
        "rows": len(same),
        "share": len(same) / looked,
        "clusters": len(sizes),
        "largest": [
            {"rows": size + 1, "first": int(rows.numbers[first]), "others": members[first][:SHOWN]}
            for first, size in sizes.most_common(SHOWN)
        ],
    }


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "other").split()[0].split("-")[0].capitalize()


def script_of(example: Example) -> str:
    """The script that most letters of a row are written in: Latin, Cyrillic, Cjk and so on; "none" without
    letters."""
    text = "".join(turn.text for turn in example.turns)
    letters = Counter(map(_script, islice(filter(str.isalpha, text), 500)))
    return letters.most_common(1)[0][0] if letters else "none"


def _sources(rows: Rows) -> dict[str, dict[str, float]]:
    """Column -> value -> share, of the columns that part the rows into a few groups and are no text of
    theirs."""
    taken, found = set(rows.layout.columns()), dict[str, Counter[str]]()
    for row in rows.raw(range(len(rows))):
        for name, value in row.items():
            if name not in taken and isinstance(value, str | int | bool):
                found.setdefault(str(name), Counter())[str(value)[:80]] += 1
    few = {name: counts for name, counts in found.items() if 1 < len(counts) <= MOST_SOURCES}
    return {name: _shares(counts.elements()) for name, counts in few.items()}


def _grams(example: Example) -> set[int]:
    """Hashes of a row's groups of GRAM words; of its whole text where that is shorter."""
    words = words_of("\n".join(turn.text for turn in example.turns))
    groups = {" ".join(words[i : i + GRAM]) for i in range(max(len(words) - GRAM + 1, 1))}
    return {zlib.crc32(group.encode(errors="replace")) for group in groups}


def copied_rows(pool: Rows, others: Rows, seed: int = 0) -> dict[str, Any]:
    """Which rows of another file stand in the pool too, whole or by half of their groups of eight words.

    What more than one in a hundred rows of either have, such as an instruction before all of them, says
    nothing.

    Returns:
        rows (of the other file), copied, examples: row, of (the pool's row), share.
    """
    grams = [_grams(example) for example in others.examples()]
    wanted, there = Counter(gram for own in grams for gram in own), Counter[int]()
    shared: list[tuple[int, set[int]]] = []
    for place, example in enumerate(pool.examples()):
        both = _grams(example) & wanted.keys()
        there.update(both)
        if both:
            shared.append((place, both))
    often = {g for g, count in there.items() if count > max(20, len(pool) // 100)}
    often |= {g for g, count in wanted.items() if count > max(5, len(others) // 100)}
    holders = defaultdict(list)
    for i, own in enumerate(grams):
        for gram in own - often:
            holders[gram].append(i)
    best: dict[int, tuple[float, int]] = {}
    for place, both in shared:
        for i, count in Counter(i for gram in both for i in holders.get(gram, ())).items():
            share = count / len(grams[i] - often)
            if share >= COPIED and share > best.get(i, (0.0, 0))[0]:
                best[i] = share, place
    examples = [
        {"row": int(others.numbers[i]), "of": int(pool.numbers[place]), "share": round(share, 3)}
        for i, (share, place) in sorted(best.items(), key=lambda pair: -pair[1][0])
    ]
    return {"rows": len(others), "copied": len(best), "examples": examples[: 4 * SHOWN]}


# ---- what the model makes of it ----


def tokens_of(config: Any, rows: Rows, model: str, flag: str) -> Any:
    """Rows in the tokens of a model, read as a configuration says; those that can't be used are left out."""
    from staff.data.chat import template_of
    from staff.data.tokens import tokenise

    how = dataclasses.replace(config.reading, on_bad_row="skip", on_long="cut-prompt")
    tokenizer = load_tokenizer(resolve(model, flag), config.engine.trust_remote_code)
    tokenizer.chat_template = template_of(tokenizer, how)
    return tokenise(rows.examples(), tokenizer, how.max_length, None, how)


def _lengths(pool: Any) -> dict[str, Any]:
    response = pool.response_tokens()
    parts = {"prompt": pool.lengths - response, "response": response}
    quantiles = (0.05, 0.5, 0.95, 1.0)
    told = {
        name: {f"{q:.0%}": int(v) for q, v in zip(quantiles, np.quantile(tokens, quantiles), strict=True)}
        for name, tokens in parts.items()
    }
    return {**told, **{name: len(rows) for name, rows in pool.remarkable().items()}}


def _shuffled_ratios(config: DiagnoseConfig, rows: Rows, pieces: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of some rows: their places, and the loss ratio of each one's answer behind another row's prompt."""
    places = np.random.default_rng([config.seed, 3]).permutation(len(rows))[:SHUFFLED]
    some = dataclasses.replace(rows, numbers=rows.numbers[places])
    right = list(some.examples())
    wrong = [
        prompt._replace(turns=(*prompt.turns[:-1], answer.turns[-1]))
        for prompt, answer in zip([*right[1:], right[0]], right, strict=True)
    ]
    found = pieces.of_others(wrong, files.fingerprint(["exchanged", fingerprint_rows(some)]), ratios=True)
    return places[found["places"]], found["ratios"]


def _answers(rows: Rows, ratios: np.ndarray, shuffled: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Which answers their prompts do not help, and how far this model is to be believed in that.

    Returns:
        suspects (loss ratio of 1 or more), share, of_shuffled (the share of shuffled answers that the same
        rule would catch), curve (area under the curve of shuffled against own answers, with its interval of
        95 %), tells, at_most (share of the pool's answers that can be like shuffled ones), right (how many
        of the suspects are such, at best; both None where it can't tell), examples.
    """
    places, wrong = shuffled
    own, draws = ratios[places], np.random.default_rng(0)

    def area(first: np.ndarray, second: np.ndarray) -> float:
        return float((first[:, None] < second).mean() + (first[:, None] == second).mean() / 2)

    resampled = []
    for _ in range(300):
        drawn = draws.integers(len(places), size=len(places))
        resampled.append(area(own[drawn], wrong[drawn]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    # past each limit lie at most so many of the pool as it has wrong ones, times the shuffled ones' share;
    # both with two standard errors to spare
    limits = np.quantile(wrong, np.linspace(0.1, 0.9, 17))
    most = min(_bound(ratios >= limit, 2) / _bound(wrong >= limit, -2) for limit in limits)
    value, suspects = area(own, wrong), np.flatnonzero(ratios >= 1)
    tells, most, caught = value >= TELLS, min(most, 1.0), float((wrong >= 1).mean())
    right = min(1.0, most * caught * len(ratios) / max(len(suspects), 1))
    worst = suspects[np.argsort(-ratios[suspects], kind="stable")][:SHOWN]
    return {
        "suspects": len(suspects),
        "share": len(suspects) / len(ratios),
        "of_shuffled": caught,
        "curve": [value, float(low), float(high)],
        "tells": tells,
        "at_most": most if tells else None,
        "right": right if tells else None,
        "examples": rows.numbers[worst].tolist(),
    }


def _bound(holds: np.ndarray, errors: float) -> float:
    """A share with so many of its standard errors added; of few, as if one more held and one more did not."""
    share = (holds.sum() + 1) / (len(holds) + 2)
    return float(share + errors * np.sqrt(share * (1 - share) / len(holds)))


def _strangers(rows: Rows, features: np.ndarray, queries: np.ndarray) -> dict[str, Any] | None:
    """Rows that lie farther from every validation row than one in twenty validation rows lies from the
    others; None of too few validation rows."""
    if len(queries) < 10:
        return None
    of_queries = at_unit_length(queries.astype(np.float64))
    among = of_queries @ of_queries.T
    np.fill_diagonal(among, -np.inf)
    limit = np.quantile(among.max(1), USUAL_STRANGERS)
    nearest = (at_unit_length(features.astype(np.float64)) @ of_queries.T).max(1)
    strangers = np.flatnonzero(nearest < limit)
    return {
        "rows": len(strangers),
        "share": len(strangers) / len(rows),
        "usual": USUAL_STRANGERS,
        "examples": rows.numbers[strangers[np.argsort(nearest[strangers], kind="stable")][:SHOWN]].tolist(),
    }


# ---- what it means ----


def _signs(found: Mapping[str, Any]) -> list[str]:
    answers, strangers = found["answers"], found["strangers"]
    is_so = {
        "leak": any(found[name] and found[name]["copied"] for name in ("test", "validation")),
        "copies": found["copies"]["share"] >= MANY,
        "suspects": bool(
            answers and answers["tells"] and answers["share"] >= MANY and answers["right"] >= RIGHT
        ),
        "mixed": bool(strangers and strangers["share"] >= MIXED),
    }
    return [name for name, holds in is_so.items() if holds]


def _advice(found: Mapping[str, Any], config: DiagnoseConfig) -> list[str]:
    """What it means, a sentence each, the gravest first."""
    signs, answers, lines = found["signs"], found["answers"], []
    for name in ("test", "validation"):
        if found[name] and (copied := found[name]["copied"]):
            pair = found[name]["examples"][0]
            lines.append(
                f"{copied} of {found[name]['rows']} {name} rows stand in the pool, whole or by half (row "
                f"{pair['row']} in row {pair['of']}): take them out of one of the two, or every later figure "
                f"is worthless"
            )
    if answers and not answers["tells"]:
        value = answers["curve"][0]
        lines.append(
            f"this model can't tell wrong answers: exchanged ones look no different to it (area under the "
            f"curve {value:.2f}, by chance 0.50); a larger --model may"
        )
    if "suspects" in signs:
        lines.append(f"{answers['share']:.0%} of the answers look mislabelled: --drop-suspects")
    if "copies" in signs:
        lines.append(f"{found['copies']['share']:.0%} of the rows repeat others: --dedup near")
    several = [name for name, shares in found["sources"].items() if len(shares) > 1]
    scripts = sum(share >= MANY for share in found["scripts"].values())
    what = "one clean task" if config.validation else "one clean task, no query"
    if "mixed" in signs:
        lines.append("a mixed pool with a query: --method rds or less, with this --validation")
    elif found["strangers"] is None and (several or scripts > 1):
        cure = f"--group-by {shlex.quote(several[0])} keeps each one's share; " if several else ""
        lines.append(
            f"several kinds of rows: {cure}ten rows or more of the task as it will be judged, --validation "
            f"FILE, say which of them matter"
        )
        what = "without such rows"
    elif found["strangers"]:
        what += ", with rows like its query"
    if not {"suspects", "copies", "mixed"} & set(signs):
        lines.append(
            f"{what}: selection will buy cost, not quality; expect a tie with random, and take --method "
            f"random, or it with --dedup near"
        )
    given = f" --validation {shlex.quote(config.validation)}" if config.validation else " --validation FILE"
    data = " ".join(map(shlex.quote, config.data))
    model, target = shlex.quote(config.model), shlex.quote(config.target or "T")
    lines.append(
        f"to find out on this data: staff try --data {data} --target {target} --draft {model}{given}"
        f"{flags_of(config.reading)} --pruning-rate 0.8 --output runs/x"
    )
    return lines


def describe_diagnosis(found: Mapping[str, Any], output: str) -> str:
    """The findings as a person reads them."""

    def entry(label: str, texts: Sequence[str]) -> list[str]:
        return [f"{'' if number else label:11}{text}" for number, text in enumerate(texts)]

    def parts(shares: Mapping[str, float]) -> str:
        most = list(shares.items())[:SHOWN]
        return ", ".join(f"{name} {share:.0%}" for name, share in most) + ", ..." * (len(shares) > SHOWN)

    n, looked, copied, answers = found["n"], found["rows"], found["copies"], found["answers"]
    of = "" if looked == n else f"; the model looked at {looked:,} of them, drawn at random"
    lines = ["", *entry("pool", [f"{n:,} rows{of}"])]
    told = [f"{copied['share']:.1%} of the rows repeat an earlier one ({copied['exact']} to the letter)"]
    if copied["similarity"] is None:
        told[0] += "; nearly equal ones were not looked for: pip install datasketch"
    if copied["looked_at"] < n:
        told[0] += f", of the first {copied['looked_at']:,}"
    for cluster in copied["largest"][:3]:
        others = ", ".join(map(str, cluster["others"]))
        told.append(f"{cluster['rows']} rows like row {cluster['first']}: {others}")
    lines += entry("copies", told)
    if answers:
        value, low, high = answers["curve"]
        told = [f"{answers['share']:.1%} are no likelier after their prompt than alone"]
        told[0] += f" (rows {', '.join(map(str, answers['examples']))})" if answers["examples"] else ""
        caught = f"{answers['of_shuffled']:.0%} of exchanged ones would be found so"
        told.append(f"{caught}; area under the curve {value:.2f} ({low:.2f} to {high:.2f})")
        if answers["at_most"] is not None:
            told.append(
                f"at most {answers['at_most']:.0%} of the pool's answers are like exchanged ones, at most "
                f"{answers['right']:.0%} of those found"
            )
        lines += entry("answers", told)
    if strangers := found["strangers"]:
        share, usual = strangers["share"], strangers["usual"]
        lines += entry(
            "strangers", [f"{share:.1%} are unlike the validation rows (of their like {usual:.0%})"]
        )
    for name, shares in found["sources"].items():
        lines += entry("sources", [f"{name}: {parts(shares)}"])
    lines += entry("scripts", [parts(found["scripts"])])
    for label in ("lengths", "target_lengths"):
        if label in found:
            told = []
            for part in ("prompt", "response"):
                spread = ", ".join(f"{q} {tokens:,}" for q, tokens in found[label][part].items())
                told.append(f"{part} tokens{' of the target' * (label != 'lengths')}: {spread}")
            cut = found[label].get("truncated", 0)
            told += [f"{cut} rows lose the start of their prompt's text"] if cut else []
            lines += entry("lengths", told)
    for name in ("test", "validation"):
        if found[name]:
            lines += entry(name, [f"{found[name]['copied']} of {found[name]['rows']} rows stand in the pool"])
    lines += ["", *found["advice"], "", f"findings are in {output}"]
    return "\n".join(lines)
