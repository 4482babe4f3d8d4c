"""What is measured: the one table of the metrics of every task, built from `scoring.py`.

The first metric of a task is its primary metric. Torch-free. ECPE has two protocols: the paper's,
which gives the target and leaves out records without a true pair, and the official one of
SemEval-2024 task 3, which counts every conversation as one set.
"""

from __future__ import annotations

from data_shards.tasks import Task
from emoverse.evaluation import metrics as rules
from emoverse.evaluation.metrics import Metric

METRICS: dict[Task, tuple[Metric, ...]] = {
    Task.MSA: (
        Metric(name="acc2_nn", title="Acc-2 N/N", contribution=rules.acc2_nn),
        Metric(
            name="f1_nn",
            title="weighted F1 N/N",
            contribution=rules.f1_nn,
            finish=rules.weighted_f1,
        ),
        Metric(name="acc2_np", title="Acc-2 N/P", contribution=rules.acc2_np),
        Metric(
            name="f1_np",
            title="weighted F1 N/P",
            contribution=rules.f1_np,
            finish=rules.weighted_f1,
        ),
        *(
            Metric(
                name=f"acc{classes}",
                title=f"Acc-{classes}",
                contribution=rules.same_class(limit),
                needs="number",
            )
            for classes, limit in ((7, 3.0), (5, 2.0), (3, 1.0))
        ),
        Metric(
            name="mae",
            title="mean absolute error",
            contribution=rules.absolute_error,
            needs="number",
        ),
        Metric(
            name="corr",
            title="Pearson's r",
            contribution=rules.moments,
            finish=rules.pearson,
            needs="number",
        ),
    ),
    Task.ER: (
        Metric(name="accuracy", title="accuracy", contribution=rules.accuracy),
        Metric(
            name="weighted_f1",
            title="weighted F1",
            contribution=rules.emotion_counts,
            finish=rules.weighted_f1,
        ),
    ),
    Task.FER: (
        Metric(name="phrase_f1", title="phrase F1, mean of clips", contribution=rules.phrase_f1),
        Metric(
            name="phrase_f1_micro",
            title="phrase F1, pooled",
            contribution=rules.phrase_counts,
            finish=rules.weighted_f1,
        ),
        Metric(name="exact", title="all phrases right", contribution=rules.phrase_exact),
    ),
    Task.ERI: (
        Metric(
            name="emotion_agreement",
            title="emotion agreement",
            contribution=rules.emotion_agreement,
        ),
        Metric(name="rouge_l", title="ROUGE-L", contribution=rules.rouge),
        Metric(name="judge", title="judge model", contribution=rules.judged, needs="judge"),
    ),
    Task.ECPE: (
        Metric(
            name="pair_f1",
            title="pair F1, target given",
            contribution=rules.pair_counts,
            finish=rules.weighted_f1,
        ),
        Metric(
            name="weighted_f1",
            title="weighted pair F1, target given",
            contribution=rules.pair_counts_by_emotion,
            finish=rules.weighted_f1,
        ),
        Metric(
            name="cause_f1",
            title="cause F1, any emotion",
            contribution=rules.cause_counts,
            finish=rules.weighted_f1,
        ),
        Metric(
            name="official_weighted_f1",
            title="weighted pair F1, official",
            whole=rules.conversation_counts,
            finish=rules.official_weighted,
        ),
        Metric(
            name="official_f1",
            title="pair F1, official",
            whole=rules.conversation_counts,
            finish=rules.official_micro,
        ),
    ),
}


def primary(task: Task) -> Metric:
    """The metric that stands for a task in summaries."""
    return METRICS[task][0]
