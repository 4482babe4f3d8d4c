"""The paper's result tables III to VIII as data, with the run and state that stands for each row.

No computation: `ablation_tables.py` lays our numbers beside them, `report_paper.py` shows those of
the main run. Numbers are percent as printed; None is "-" in print. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data_shards.tasks import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A printed column and the metric of ours that has the same definition."""

    title: str
    task: Task
    metric: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """A printed row; `ours` is the (variant, state) that repeats it, None where nothing does."""

    label: str
    values: tuple[float | None, ...]
    ours: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperTable:
    """One table; without rows it is not transcribed, and `note` says what is known."""

    number: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """A claim of the paper: `better` beats `worse` in one column by `paper` percent points."""

    table: str
    claim: str
    better: tuple[str, str]
    worse: tuple[str, str]
    task: Task
    metric: str
    paper: float


NN = Column(title="MOSEI Acc-2 N/N", task=Task.MSA, metric="acc2_nn")
NP = Column(title="MOSEI Acc-2 N/P", task=Task.MSA, metric="acc2_np")
ACC = Column(title="MELD accuracy", task=Task.ER, metric="accuracy")
ER_WF1 = Column(title="MELD W-F1", task=Task.ER, metric="weighted_f1")
ECF_WF1 = Column(title="ECF2 W-F1", task=Task.ECPE, metric="weighted_f1")
ECF_F1 = Column(title="ECF2 F1", task=Task.ECPE, metric="pair_f1")

MAIN = "m2se"
ZERO_SHOT, AFTER_1, AFTER_2 = (MAIN, "base"), (MAIN, "stage1"), (MAIN, "stage2")


def _rows(
    table: Mapping[str, tuple[float | None, ...]], ours: Mapping[str, tuple[str, str]]
) -> tuple[PaperRow, ...]:
    return tuple(
        PaperRow(label=label, values=values, ours=ours.get(label))
        for label, values in table.items()
    )


TABLES: tuple[PaperTable, ...] = (
    PaperTable(
        number="III",
        title="CMU-MOSEI",
        columns=(NN, NP),
        rows=_rows(
            {
                "TFN": (None, 82.5),
                "MulT": (None, 82.5),
                "Self-MM": (82.81, 85.17),
                "MMIM": (82.24, 85.97),
                "BBFN": (None, 86.20),
                "FDMER": (None, 86.10),
                "MISA": (83.60, 85.50),
                "ConKI": (82.73, 86.25),
                "ConFEDE": (81.65, 85.82),
                "DMD": (None, 86.60),
                "PMR": (None, 83.30),
                "MRC-D3AE": (83.10, 85.50),
                "LLaVA-Video": (None, 82.82),
                "InternVL2-4B": (None, 82.09),
                "InternVL2-8B": (None, 85.30),
                "EmoVerse-4B": (85.51, 87.80),
                "EmoVerse-8B": (85.93, 88.51),
            },
            {"InternVL2-4B": ZERO_SHOT, "EmoVerse-4B": AFTER_2},
        ),
        note="InternVL2-4B's 82.09 stands under N/P here and under N/N in Table VI; one of them "
        "is misprinted.",
    ),
    PaperTable(
        number="IV",
        title="MELD",
        columns=(ACC, ER_WF1),
        rows=(PaperRow(label="EmoVerse-4B", values=(67.78, 66.74), ours=AFTER_2),),
        note="Not transcribed: only the EmoVerse-4B row is known, from Tables VI and VIII. The "
        "rows of the other models (DialogueGCN, DialogueCRN, DAG-ERC, MM-DFN, EmoCaps, "
        "ERMC-DisGCN, MMGCN, GA2MIF, UniMSE, FacialMMT, LLaVA-Video, InternVL2) have no figure "
        "here.",
    ),
    PaperTable(
        number="V",
        title="ECF 2.0, target given",
        columns=(ECF_WF1, ECF_F1),
        rows=_rows(
            {
                "LLaVA-Video": (22.59, 22.78),
                "InternVL2-4B": (33.24, 33.35),
                "InternVL2-8B": (40.57, 40.51),
                "EmoVerse-4B": (72.30, 72.21),
                "EmoVerse-8B": (73.54, 73.62),
            },
            {"InternVL2-4B": ZERO_SHOT, "EmoVerse-4B": AFTER_2},
        ),
        note="The rule 'the target and the turn before it' scores W-F1 66.4, F1 66.5 on ECF 2.0.",
    ),
    PaperTable(
        number="VI",
        title="M2SE against tuning on a single task",
        columns=(NN, NP, ACC, ER_WF1, ECF_WF1, ECF_F1),
        rows=_rows(
            {
                "Z.S.": (82.09, 83.87, 39.46, 40.59, 33.24, 33.35),
                "MSA only": (83.96, 88.16, 48.12, 31.27, 41.67, 41.14),
                "ER only": (78.99, 80.17, 66.21, 65.71, 40.61, 38.23),
                "ECPE only": (83.27, 85.85, 32.38, 33.43, 72.59, 72.69),
                "M2SE": (85.51, 87.80, 67.78, 66.74, 72.30, 72.21),
            },
            {
                "Z.S.": ZERO_SHOT,
                "MSA only": ("msa_only", "stage2"),
                "ER only": ("er_only", "stage2"),
                "ECPE only": ("ecpe_only", "stage2"),
                "M2SE": AFTER_2,
            },
        ),
        note="The paper's MSA-only row on MELD (48.12, 31.27) is the score of 'Neutral.' to every "
        "clip.",
    ),
    PaperTable(
        number="VII",
        title="Rate of FER in stage 1, after stage 1",
        columns=(NN, NP),
        rows=_rows(
            {"lf (low)": (77.09, 87.47), "hf (high)": (82.61, 87.50)},
            {"lf (low)": ("fer_low", "stage1"), "hf (high)": AFTER_1},
        ),
    ),
    PaperTable(
        number="VIII",
        title="Tasks of stage 2",
        columns=(NN, NP, ACC, ER_WF1, ECF_WF1, ECF_F1),
        rows=_rows(
            {
                "f (after stage 1)": (82.61, 87.50, None, None, None, None),
                "t1 (ER)": (81.68, 87.20, 66.74, 66.24, 25.40, 26.69),
                "t3 (ER, ERI, ECPE)": (79.0, 86.78, 66.97, 65.67, 69.85, 69.95),
                "t4 (all four)": (85.51, 87.80, 67.78, 66.74, 72.30, 72.21),
            },
            {
                "f (after stage 1)": AFTER_1,
                "t1 (ER)": ("t1", "stage2"),
                "t3 (ER, ERI, ECPE)": ("t3", "stage2"),
                "t4 (all four)": AFTER_2,
            },
        ),
    ),
)


def _effect(
    table: str,
    claim: str,
    better: tuple[str, str],
    worse: tuple[str, str],
    column: Column,
    paper: float,
) -> Effect:
    return Effect(
        table=table,
        claim=claim,
        better=better,
        worse=worse,
        task=column.task,
        metric=column.metric,
        paper=paper,
    )


T1, T3, LOW = ("t1", "stage2"), ("t3", "stage2"), ("fer_low", "stage1")
ONLY = {task: (f"{task}_only", "stage2") for task in (Task.MSA, Task.ER, Task.ECPE)}

EFFECTS: tuple[Effect, ...] = (
    _effect("VI", "M2SE beats zero-shot on MOSEI", AFTER_2, ZERO_SHOT, NN, 3.42),
    _effect("VI", "M2SE beats zero-shot on MELD", AFTER_2, ZERO_SHOT, ER_WF1, 26.15),
    _effect("VI", "M2SE beats zero-shot on ECF2", AFTER_2, ZERO_SHOT, ECF_F1, 38.86),
    _effect("VI", "M2SE beats MSA alone on MOSEI N/N", AFTER_2, ONLY[Task.MSA], NN, 1.55),
    _effect("VI", "MSA alone beats M2SE on MOSEI N/P", ONLY[Task.MSA], AFTER_2, NP, 0.36),
    _effect("VI", "M2SE beats ER alone on MELD", AFTER_2, ONLY[Task.ER], ER_WF1, 1.03),
    _effect("VI", "ECPE alone beats M2SE on ECF2", ONLY[Task.ECPE], AFTER_2, ECF_F1, 0.48),
    _effect("VII", "a high FER rate lifts MOSEI N/N", AFTER_1, LOW, NN, 5.52),
    _effect("VIII", "ER alone in stage 2 lowers MOSEI", AFTER_1, T1, NN, 0.93),
    _effect("VIII", "ER, ERI, ECPE without MSA lower MOSEI", AFTER_1, T3, NN, 3.61),
    _effect("VIII", "all four tasks lift MOSEI above t3", AFTER_2, T3, NN, 6.51),
    _effect("VIII", "all four tasks lift MOSEI above stage 1", AFTER_2, AFTER_1, NN, 2.90),
    _effect("VIII", "ERI and ECPE bring ECF2", T3, T1, ECF_F1, 43.26),
    _effect("VIII", "all four tasks lift ECF2 above t3", AFTER_2, T3, ECF_F1, 2.26),
    _effect("VIII", "all four tasks lift MELD above t1", AFTER_2, T1, ER_WF1, 0.50),
)

# What the paper's numbers depend on, where it is known; compared with metrics.json's protocol.
CONDITIONS: dict[str, str] = {
    "data": "CMU-MOSEI, MELD and ECF 2.0 test sets",
    "model": "EmoVerse-4B (InternVL2-4B)",
    "leakage": "paper: ECF 2.0 training data re-annotates 2,535 of MELD's 2,610 test utterances",
    "give_emotion": "not published; probably the target's gold emotion is in the ECPE query",
    "ecpe protocol": "target_given; baseline models probably scored with the gold emotion copied",
    "parser": "exact texts; see the list of differences of the authors' script",
    "visual": "MOSEI by one peak-frame image",
}
NOT_TRANSCRIBED = "not transcribed"


def variants() -> tuple[str, ...]:
    """The runs that the tables need, the main one first; each has its overlay file."""
    named = (row.ours[0] for table in TABLES for row in table.rows if row.ours)
    return tuple(dict.fromkeys((MAIN, *named)))


def states_of(variant: str, tables: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The states of a variant that the tables (all of them by default) show, in training order."""
    found = {
        row.ours[1]
        for table in TABLES
        if not tables or table.number in tables
        for row in table.rows
        if row.ours and row.ours[0] == variant
    }
    return tuple(sorted(found))  # base, stage1, stage2


def paper_value(task: Task, metric: str) -> float | None:
    """The paper's EmoVerse-4B figure (Table VI, row M2SE) for a metric, percent."""
    table = next(one for one in TABLES if one.number == "VI")
    row = next(one for one in table.rows if one.label == "M2SE")
    for column, value in zip(table.columns, row.values, strict=True):
        if (column.task, column.metric) == (task, metric):
            return value
    return None
