"""Calibration of the answers for the report: how sure the model was against how often it was right.

Scored predictions in, one diagram with its table per task out. Probabilities are those of the whole
answer, stored by `evaluate`; older files without them give a sentence instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_shards.tasks import Task
from emoverse.evaluation.tables import Calibration, calibration
from emoverse.report.charts import Series, line_chart
from emoverse.report.summary import Evaluation, TaskSummary


def calibration_section(lines: Sequence[TaskSummary], evaluated: Mapping[str, Evaluation]) -> str:
    """Every task whose answers can be right as a whole, in its scored state."""
    blocks = []
    for line in lines:
        if line.scored is None:
            continue
        answers = [
            (one.row, one.confidence)
            for one in evaluated[line.scored].predictions
            if one.row.task is line.task
        ]
        found = calibration(answers)
        if found is not None:
            blocks.append(_block(line.task, line.scored, found))
    if not blocks:
        return (
            '<p class="empty">No answer has a probability; run emoverse evaluate again to store '
            "them.</p>"
        )
    return (
        f'<div class="columns">{"".join(blocks)}</div><p class="quiet">Answers in ten bins of the '
        "probability that the model gave to them; on the diagonal it is as often right as it "
        "thinks. ECE is the mean distance from it. Free text (ERI) is never right as a whole.</p>"
    )


def _block(task: Task, state: str, found: Calibration) -> str:
    filled = [one for one in found.bins if one.n]
    series = [
        Series(
            name=task.upper(),
            color=str(task),
            xs=[one.confidence for one in filled],
            ys=[one.right for one in filled],
        ),
        Series(name="as sure as right", color="majority", xs=[0.0, 1.0], ys=[0.0, 1.0]),
    ]
    body = "".join(
        f'<tr><th scope="row">{one.low:.1f} to {one.high:.1f}</th><td class="num">{one.n}</td>'
        f'<td class="num">{one.confidence:.3f}</td><td class="num">{one.right:.3f}</td></tr>'
        for one in filled
    )
    chart = line_chart(
        f"{task.upper()}, {state}: ECE {found.error:.3f}",
        series,
        x_label="probability of the answer",
        y_label="share of right answers",
        table='<table><thead><tr><th scope="col">probability</th>'
        '<th scope="col" class="num">answers</th><th scope="col" class="num">mean</th>'
        f'<th scope="col" class="num">right</th></tr></thead><tbody>{body}</tbody></table>',
    )
    return f'<div class="card calibration">{chart}</div>'
