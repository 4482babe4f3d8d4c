"""The page of the ablations: the paper's tables with ours in the same cells, effects, conditions.

The dict of `ablation_tables.py` goes in, one static HTML document comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from emoverse.report.page_frame import document

VERDICT_CLASS = {"appears": "good", "opposite": "bad", "not resolved": "flat", "not run": "flat"}


def render_ablations(result: Mapping[str, Any]) -> str:
    """The whole document. `failed` of the result, where it has one: variant -> why it failed."""
    verdicts = [one["verdict"] for one in result["effects"]]
    run = len(verdicts) - verdicts.count("not run")
    intro = (
        '<div class="intro"><h1>Ablations</h1><p class="lead">'
        f"<strong>{verdicts.count('appears')} of {run} effects</strong> of the paper that were run "
        f"appear here, {verdicts.count('opposite')} are the other way round, "
        f"{verdicts.count('not resolved')} lie within two standard errors.</p></div>"
    )
    sections = [
        ("tables", "Tables", _warnings(result) + "".join(map(_table, result["tables"]))),
        ("effects", "Effects", _effects(result)),
        ("conditions", "Conditions", _conditions(result["conditions"])),
    ]
    return document("ablations", intro, sections, "emoverse ablate")


def _warnings(result: Mapping[str, Any]) -> str:
    """What makes a row another one than it seems."""
    unfinished = result["conditions"]["unfinished"]
    lines = [
        f"{name} failed, its rows are missing or of an earlier run: {reason}"
        for name, reason in result.get("failed", {}).items()
    ]
    if unfinished:
        lines.append(f"Evaluated before the stage was finished: {', '.join(unfinished)}.")
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in lines)


def _table(table: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col" class="num">{escape(name)}</th>' for name in table["columns"])
    body = "".join(_row(row) for row in table["rows"])
    note = f'<p class="quiet">{escape(table["note"])}</p>' if table["note"] else ""
    return (
        f'<div class="card scroll"><table class="paper"><caption>Table {table["number"]}: '
        f'{escape(table["title"])} <span class="quiet">paper, ours with its 95% interval; percent'
        f'</span></caption><thead><tr><th scope="col">row</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>{note}</div>"
    )


def _row(row: Mapping[str, Any]) -> str:
    cells = ""
    for paper, ours in zip(row["paper"], row["ours"], strict=True):
        printed = "-" if paper is None else f"{paper:.2f}"
        cells += f'<td class="num"><span class="printed">{printed}</span>{_ours(ours)}</td>'
    run = f"<small>{escape(row['run'])}</small>" if row["run"] else ""
    return f'<tr><th scope="row">{escape(row["label"])}{run}</th>{cells}</tr>'


def _ours(ours: Mapping[str, Any] | None) -> str:
    if ours is None:
        return '<b class="flat">-</b>'
    interval = "" if ours["low"] is None else f"{ours['low']:.1f} to {ours['high']:.1f}"
    return f"<b>{ours['value']:.2f}</b><small>{interval}</small>"


def _effects(result: Mapping[str, Any]) -> str:
    body = ""
    for one in result["effects"]:
        ours = "-"
        if one["ours"] is not None:
            ours = f"{one['ours']:+.2f}<small>&plusmn; {2 * one['standard_error']:.2f}</small>"
        body += (
            f'<tr><th scope="row">{escape(one["claim"])}<small>Table {one["table"]}, '
            f"{escape(one['better'])} against {escape(one['worse'])}</small></th>"
            f'<td class="num">{one["paper"]:+.2f}</td><td class="num">{ours}</td>'
            f'<td><b class="{VERDICT_CLASS[one["verdict"]]}">{one["verdict"]}</b></td></tr>'
        )
    return (
        '<div class="card scroll"><table class="effects"><thead><tr><th scope="col">the paper says'
        '</th><th scope="col" class="num">paper</th><th scope="col" class="num">ours</th>'
        f'<th scope="col">here</th></tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="quiet">Percent points; ours is the paired difference on the same clips, plus or '
        "minus two standard errors. One seed per run: the spread between seeds is not in it.</p>"
    )


def _conditions(conditions: Mapping[str, Any]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(line["what"])}</th><td>{escape(line["paper"])}</td>'
        f"<td>{escape(line['ours'])}</td></tr>"
        for line in conditions["lines"]
    )
    mixed = ", ".join(conditions["unequal_protocols"])
    warning = (
        f'<p class="warning">The runs differ among each other in {escape(mixed)}.</p>'
        if mixed
        else ""
    )
    return (
        f'{warning}<div class="card scroll"><table class="conditions"><thead><tr>'
        '<th scope="col">condition</th><th scope="col">paper</th><th scope="col">ours</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )
