"""The pictures of a run and of a comparison as Vega-Lite specifications, built with Altair: a notebook and a
page show the same.

What is drawn comes in as records, or is named where a page holds it: a specification hangs on names and
titles alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from staff.report.facts import Record

Data = Sequence[Record] | str  # records, or the name under which a page has them

# told apart by those who see no red or green (after Okabe and Ito), on light and on dark
GREY, BLUE, RED = "#8b939d", "#1f83c6", "#d55e00"
SERIES = (BLUE, RED, "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7b6fd0", "#a0522d")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
WIDTH = 640  # in a notebook; a page is as wide as it is
MARGIN = 52  # what is left of every plot, so that those below one another share their axis


def _data(records: Data) -> Any:
    return alt.NamedData(records) if isinstance(records, str) else alt.InlineData(list(records))


def _tips(**titles: str) -> list[alt.Tooltip]:
    formats = {"share": ".0%", "of_pool": ".1%", "of_coreset": ".1%", "passes": ".2f"}
    formats |= dict.fromkeys(("ratio", "low", "high", "difference", "mean"), ".3g")
    of_text = ("name", "fate", "method", "rate", "outcome")
    return [
        alt.Tooltip(field=name, type="nominal" if name in of_text else "quantitative", title=title)
        if name not in formats
        else alt.Tooltip(field=name, type="quantitative", title=title, format=formats[name])
        for name, title in titles.items()
    ]


def _colors(colors: dict[str, str]) -> dict[str, Any]:
    return {"scale": alt.Scale(domain=[*colors], range=[*colors.values()])}


def _legend(**more: Any) -> alt.Legend:
    return alt.Legend(orient="top", **{"title": None, "symbolType": "square", "symbolOpacity": 0.9, **more})


def _count_axis(title: str, **more: Any) -> alt.Axis:
    return alt.Axis(title=title, minExtent=MARGIN, maxExtent=MARGIN, **more)


def _number(field: str, title: str, is_log: bool, **axis: Any) -> dict[str, Any]:
    scale = alt.Scale(type="log", nice=False, padding=8) if is_log else alt.Scale(zero=False, padding=8)
    return {
        "shorthand": f"{field}:Q",
        "title": title,
        "scale": scale,
        "axis": alt.Axis(tickCount=6, labelOverlap="greedy", grid=False, **axis),
    }


def _pick(field: str) -> Any:
    """What a click chooses."""
    return alt.selection_point(name="pick", fields=[field], on="click", clear=False, toggle=False)


# ---- of a run ----


def _of_regions(are_verified: bool) -> list[alt.Tooltip]:
    verified = {"verified": "verified", "ratio": "V", "low": "V, from", "high": "V, to"}
    verified |= {"even": "budget before verification"}
    titles = {"name": "region", "size": "samples", "kept": "kept", "share": "share kept", "budget": "budget"}
    return _tips(**titles, **verified if are_verified else {})


def _across_regions(title: str) -> alt.X:
    axis = alt.Axis(title=title, labelAngle=0, labelOverlap="greedy", ticks=False)
    return alt.X("from:N", sort=None, axis=axis)


def _bars(
    base: alt.Chart, pick: Any, field: str, series: str, colors: dict[str, str], opacity: float
) -> alt.Chart:
    drawn = base.transform_calculate(series=f"'{series}'").mark_bar(cursor="pointer")
    return drawn.encode(
        y=alt.Y(f"{field}:Q", stack=None, axis=_count_axis("samples", tickMinStep=1, tickCount=5)),
        color=alt.Color("series:N", legend=_legend(), **_colors(colors)),
        opacity=alt.when(pick).then(alt.value(opacity)).otherwise(alt.value(opacity / 3)),
    )


def region_sizes(records: Data, title: str, are_verified: bool = True) -> alt.LayerChart | alt.FacetChart:
    """How many samples each region holds, and how many of them were kept."""
    pick, colors = _pick("region"), {"pool": GREY, "kept": BLUE}
    base = alt.Chart(_data(records)).encode(x=_across_regions(title), tooltip=_of_regions(are_verified))
    pool = _bars(base, pick, "size", "pool", colors, 0.6).add_params(pick)
    about = "Bars: how many samples each region of the score holds, and how many of them were kept"
    kept = _bars(base, pick, "kept", "kept", colors, 1.0)
    return alt.layer(pool, kept).properties(width=WIDTH, height=220, description=about)


def region_budgets(records: Data, title: str) -> alt.LayerChart | alt.FacetChart:
    """The budget of each region, and what it would have been before verification."""
    pick, colors = _pick("region"), {"budget": BLUE, "before verification": RED}
    base = alt.Chart(_data(records)).encode(x=_across_regions(title), tooltip=_of_regions(True))
    before = base.transform_calculate(series="'before verification'").mark_tick(thickness=3, opacity=1)
    before = before.encode(y="even:Q", color=alt.Color("series:N", legend=_legend(), **_colors(colors)))
    every = base.mark_point(opacity=0, aria=False).encode(
        y=alt.datum(0)
    )  # what was set aside keeps its place
    after = _bars(base, pick, "budget", "budget", colors, 0.8).add_params(pick)
    about = "Bars: the budget of each region; lines: what it would have been before verification"
    return alt.layer(after, before, every).properties(width=WIDTH, height=130, description=about)


def region_ratios(records: Data, title: str) -> alt.LayerChart | alt.FacetChart:
    """V of each verified region, with its interval."""
    base = alt.Chart(_data(records)).encode(x=_across_regions(title), tooltip=_of_regions(True))
    y: Any = {"axis": _count_axis("V", tickCount=4), "scale": alt.Scale(zero=True, nice=True)}
    rule = base.mark_rule(color=RED, strokeWidth=2, opacity=0.6).encode(y=alt.Y("low:Q", **y), y2="high:Q")
    dot = base.mark_point(color=RED, filled=True, size=42, opacity=1).encode(y=alt.Y("ratio:Q", **y))
    every = base.mark_point(opacity=0, aria=False).encode(y=alt.datum(0))  # those without V keep their place
    about = "Points: the verification ratio V of each region, with its interval of 95 %"
    return alt.layer(every, rule, dot).properties(width=WIDTH, height=130, description=about)


def two_scores(records: Data, draft: str, target: str, is_log: bool) -> alt.Chart:
    """The verified samples: the draft's score against the target's."""
    fates = _colors({"kept": BLUE, "dropped": GREY})
    shapes = alt.Scale(domain=["kept", "dropped"], range=["circle", "square"])
    return (
        alt.Chart(_data(records))
        .mark_point(filled=True, size=46, opacity=0.8)
        .encode(
            x=alt.X(**_number("draft", draft, is_log)),
            y=alt.Y(**_number("target", target, is_log, minExtent=MARGIN)),
            color=alt.Color("fate:N", legend=_legend(symbolType=alt.Undefined), **fates),
            shape=alt.Shape("fate:N", legend=_legend(symbolType=alt.Undefined), scale=shapes),
            tooltip=_tips(row="row", draft=draft, target=target, fate="fate"),
        )
        .properties(
            width=WIDTH, height=280, description=f"Points: verified samples, {target} against {draft}"
        )
    )


def every_sample(
    records: Data, x: str, y: str, titles: tuple[str, str], logs: tuple[bool, bool]
) -> alt.Chart:
    """Every sample of the pool by two of its numbers, those kept above those dropped.

    Args:
        x, y: fields.
        titles: what they are called.
        logs: which axes are logarithmic.
    """
    return (
        alt.Chart(_data(records))
        .mark_circle(size=14, opacity=0.55)
        .encode(
            x=alt.X(**_number(x, titles[0], logs[0])),
            y=alt.Y(**_number(y, titles[1], logs[1], minExtent=MARGIN)),
            color=alt.Color(
                "fate:N", legend=_legend(symbolType="circle"), **_colors({"kept": BLUE, "dropped": GREY})
            ),
            tooltip=_tips(**{"row": "row", x: titles[0], y: titles[1], "fate": "fate"}),
        )
        .properties(
            width=WIDTH, height=320, description=f"Points: every sample, {titles[1]} against {titles[0]}"
        )
    )


def _shares(
    records: Data, along: Any, across: Any, is_wide: bool, are_asked: bool
) -> alt.LayerChart | alt.FacetChart:
    """Bars: shares of the pool; lines over them: shares of the coreset; diamonds: those asked for."""
    base, pick = alt.Chart(_data(records)), _pick("name")
    titles = {"name": "of", "size": "samples", "kept": "kept"}
    tips = _tips(**titles, of_pool="share of the pool", of_coreset="share of the coreset")
    colors = {"pool": GREY, "coreset": BLUE} | ({"asked for": RED} if are_asked else {})

    def drawn(chart: alt.Chart, field: str, series: str) -> alt.Chart:
        axis = (
            alt.Axis(format="%", title="share", tickCount=4)
            if is_wide
            else _count_axis("share", format="%", tickCount=4)
        )
        value = across(f"{field}:Q", axis=axis, stack=None)
        return chart.transform_calculate(series=f"'{series}'").encode(
            **{"x": value, "y": along} if is_wide else {"x": along, "y": value},
            color=alt.Color("series:N", legend=_legend(), **_colors(colors)),
            tooltip=tips,
        )

    bar = drawn(base.mark_bar(cursor="pointer"), "of_pool", "pool").add_params(pick)
    bar = bar.encode(opacity=alt.when(pick).then(alt.value(0.6)).otherwise(alt.value(0.2)))
    layers = [bar, drawn(base.mark_tick(thickness=3, opacity=1), "of_coreset", "coreset")]
    if are_asked:
        layers.append(drawn(base.mark_point(shape="diamond", size=50), "asked", "asked for"))
    return alt.layer(*layers)


def shares_along(records: Data, title: str) -> alt.LayerChart | alt.FacetChart:
    """What share of the pool, and of the coreset, lies in each bin of a number."""
    axis = alt.Axis(title=title, labelAngle=0, labelOverlap="greedy", ticks=False)
    chart = _shares(records, alt.X("from:N", sort=None, axis=axis), alt.Y, False, False)
    return chart.properties(
        width=WIDTH // 2, height=150, description=f"Shares of pool and coreset by {title}"
    )


def shares_by(records: Data, title: str, are_asked: bool = False) -> alt.LayerChart | alt.FacetChart:
    """What share of the pool, and of the coreset, each value of a column has."""
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=150, ticks=False))
    chart = _shares(records, y, alt.X, True, are_asked)
    about = f"Shares of pool and coreset by {title}"
    return chart.properties(width=WIDTH // 2, height=alt.Step(22), description=about)


# ---- of a comparison ----


def paired_differences(records: Data) -> alt.LayerChart | alt.FacetChart:
    """How much better each method is than random, paired, with its interval, and a line at no difference."""
    colors = _colors({"better": BLUE, "can't be told": GREY, "worse": RED})
    base = alt.Chart(_data(records)).encode(
        y=alt.Y("method:N", sort=None, title=None, axis=alt.Axis(labelLimit=180, ticks=False, grid=True)),
        yOffset=alt.YOffset("rate:O"),
        color=alt.Color("outcome:N", legend=_legend(), **colors),
        tooltip=_tips(
            method="method",
            rate="pruned",
            difference="difference to random",
            low="from",
            high="to",
            corrected="p (Holm)",
        ),
    )
    x: Any = {"title": "difference to random: to the right is better", "axis": alt.Axis(tickCount=6)}
    rule = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", **x), x2="high:Q")
    shape = alt.Shape(
        "rate:N",
        legend=_legend(title="pruned", titleOrient="left", symbolType=alt.Undefined),
        scale=alt.Scale(range=list(SHAPES)),
    )
    dot = base.mark_point(filled=True, size=60, opacity=1).encode(x=alt.X("difference:Q", **x), shape=shape)
    zero = (
        alt.Chart(alt.InlineData([{}]))
        .mark_rule(strokeWidth=1.5, color=GREY, aria=False)
        .encode(x=alt.datum(0))
    )
    about = "Points: how much better than random each method is, with intervals of 95 %"
    height = alt.Step(16, **{"for": "offset"})
    return alt.layer(zero, rule, dot).properties(width=WIDTH, height=height, description=about)


def qualities(
    records: Data, beside: Data, metric: str, by: str, title: str
) -> alt.LayerChart | alt.FacetChart:
    """A metric against the pruning rate or against the cost: a line a method, named at its end.

    Args:
        records: a method at a rate each; `is_last` of a method has its name, at the height `label`.
        beside: the full data and the untouched model.
        by: "pruning_rate" or "passes".
    """
    y = alt.Y("mean:Q", title=metric, scale=alt.Scale(zero=False), axis=alt.Axis(minExtent=MARGIN))
    axis = alt.Axis(format="%", tickCount=6) if by == "pruning_rate" else alt.Axis(tickCount=6)
    base = alt.Chart(_data(records)).encode(
        x=alt.X(f"{by}:Q", title=title, axis=axis, scale=alt.Scale(zero=False, padding=30)),
        y=y,
        color=alt.Color("method:N", scale=alt.Scale(range=list(SERIES)), legend=None),
        tooltip=_tips(method="method", rate="pruned", mean=metric, low="from", high="to", passes="passes"),
    )
    line = base.mark_line(strokeWidth=2).encode(order="pruning_rate:Q")
    dot = base.mark_point(filled=True, size=50, opacity=1)
    name = base.transform_filter("datum.is_last").mark_text(align="left", dx=8, fontWeight="bold")
    name = name.encode(text="method:N", y=alt.Y("label:Q"))
    level = alt.Chart(_data(beside)).encode(y=y)
    rule = level.mark_rule(strokeDash=[4, 4], strokeWidth=1.5, color=GREY)
    label = level.mark_text(align="left", dy=-7, color=GREY).encode(x=alt.value(4), text="method:N")
    layers = (rule, label, line, dot, name)
    return alt.layer(*layers).properties(
        width=WIDTH, height=320, description=f"{metric} of each method, {title}"
    )
