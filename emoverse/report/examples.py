"""The clips of the report as HTML: video, peak frame, question, truth, every system's answer.

`Clip`s of `report_clips.py` go in, the sections "Clips" and "Hardest" come out.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from data_shards.tasks import IDENTIFIER
from emoverse.report.clips import Clip, Said
from emoverse.report.sections import system_title, task_name


def clips_section(clips: Sequence[Clip]) -> str:
    """Examples that were chosen by rule, with a filter by task."""
    shown = [(i, clip) for i, clip in enumerate(clips) if not clip.hard]
    if not shown:
        return '<p class="empty">No answers to show yet.</p>'
    tasks = list(dict.fromkeys(clip.task for _, clip in shown))
    buttons = '<button type="button" data-filter="" aria-pressed="true">All</button>' + "".join(
        f'<button type="button" data-filter="{task}" aria-pressed="false">{task.upper()}</button>'
        for task in tasks
    )
    return (
        '<p class="quiet">Chosen by rule, alternately right and wrong answers of the scored state, '
        "so the mix says nothing about the scores.</p>"
        f'<div class="filter" role="group" aria-label="Show the clips of one task">{buttons}</div>'
        f'<div class="clips">{"".join(_clip(i, clip) for i, clip in shown)}</div>'
    )


def hardest_section(clips: Sequence[Clip]) -> str:
    """The clips that most systems get wrong, all answers side by side."""
    shown = [(i, clip) for i, clip in enumerate(clips) if clip.hard]
    if not shown:
        return '<p class="empty">No wrong answer to show.</p>'
    return (
        '<p class="quiet">Per task the wrong answers that most systems share; among equals those '
        "of which the model was surest.</p>"
        f'<div class="clips">{"".join(_clip(i, clip) for i, clip in shown)}</div>'
    )


def _clip(number: int, clip: Clip) -> str:
    if clip.mp4 is None:
        screen = f'<div class="novideo">{escape(clip.note)}</div>'
        note = ""
    else:
        data = base64.b64encode(clip.mp4).decode("ascii")
        screen = (
            f'<div class="screen"><video controls muted loop playsinline preload="auto" '
            f'aria-label="Clip {escape(clip.key)}" src="data:video/mp4;base64,{data}"></video>'
            '<button type="button" class="play" aria-label="Play the clip" hidden></button></div>'
        )
        note = f'<p class="note">{escape(clip.note)}</p>' if clip.note else ""
    if clip.peak is not None:
        still = base64.b64encode(clip.peak).decode("ascii")
        screen += (
            f'<figure class="peak"><img src="data:image/jpeg;base64,{still}" '
            f'alt="{escape(clip.peak_text)}"><figcaption>{escape(clip.peak_text)}</figcaption>'
            "</figure>"
        )
    rows = "".join(_said(one) for one in clip.answers)
    question = escape(clip.question)
    for identifier in IDENTIFIER.values():
        question = question.replace(escape(identifier), f"<mark>{escape(identifier)}</mark>")
    return (
        f'<article class="clip card" data-task="{clip.task}" aria-labelledby="clip-{number}">'
        f'<div class="media">{screen}</div><div><h3 id="clip-{number}">{task_name(clip.task)}</h3>'
        f'<p class="key">{escape(clip.key)}</p>{note}'
        f'<p class="question" tabindex="0">{question}</p><table class="said"><tbody>'
        f'<tr class="truth"><th scope="row">truth</th><td>{_text(clip.truth)}</td><td></td></tr>'
        f"{rows}</tbody></table></div></article>"
    )


def _said(one: Said) -> str:
    sign = {"right": "&#10003;", "partly": "&#8776;", "wrong": "&#10007;"}[one.verdict]
    return (
        f'<tr><th scope="row">{escape(system_title(one.system))}</th><td>{_text(one.text)}</td>'
        f'<td class="verdict {one.verdict}"><span aria-hidden="true">{sign}</span>'
        f'<span class="sr">{one.verdict}</span></td></tr>'
    )


def _text(text: str) -> str:
    return escape(text) if text.strip() else '<span class="quiet">(empty)</span>'
