"""Counts of annotation folders, without any media, compared with the paper's Table I.

In: folders of MELD, ECF and CMU-MOSEI. Out: a JSON object of counts, and the same as text.
Flow: sources -> here; `emoverse stats --meld DIR --ecf DIR [--mosei DIR]`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Final

from data_shards.build.clip_record import hash_file
from data_shards.inspection.counts import (
    MMSA_TRAIN,
    MOSEI_PART,
    TABLE_ONE,
    cause_position,
    counted,
    summary,
    table_rows,
    table_text,
)
from data_shards.sources.ecf import Conversation, EcfCorpus, load_ecf
from data_shards.sources.meld import SPLITS, MeldRow, annotation_files, read_meld, repeats
from data_shards.sources.mosei import MoseiCorpus, emotion_of, load_mosei
from data_shards.sources.overlap import DEFAULT_LEAKAGE, KEPT_CLEAN, overlap_report

_SHOWN_LABELS: Final = 8  # of one line of text; the JSON has all
_LIMITS_S: Final = (2.0, 18.0, 20.0)  # durations that might have been the paper's limits


def corpus_stats(
    *, meld: Path | None = None, ecf: Sequence[Path] = (), mosei: Path | None = None
) -> dict[str, Any]:
    """Count what the folders hold.

    Raises:
        FileNotFoundError, ValueError: a folder lacks its annotation, or a file is not as published.
    """
    report: dict[str, Any] = {}
    by_source: dict[str, dict[str, int | None]] = {}
    rows: list[MeldRow] = []
    if mosei is not None:
        report["mosei"] = mosei_counts(load_mosei(mosei))
        train = report["mosei"]["segments"].get("train", 0)
        emotions = report["mosei"]["emotions"].get("train")
        er = None if emotions is None else sum(emotions.values())
        # FER was made from its faces, but only OpenFace shows how many records get a phrase.
        by_source["mosei"] = {"msa": train, "er": er, "fer": None, "eri": None, "ecpe": 0}
    if meld is not None:
        rows = read_meld(meld)
        report["meld"] = meld_counts(rows)
        report["meld"]["files"] = [hash_file(path) for path in annotation_files(meld).values()]
        train = report["meld"]["rows"]["train"]
        by_source["meld"] = {"msa": train, "er": train, "fer": 0, "eri": None, "ecpe": 0}
    if ecf:
        corpus = load_ecf(ecf)
        report["ecf"] = ecf_counts(corpus)
        report["overlap"] = _overlap(corpus, rows)
        targets = report["ecf"]["splits"]["train"]["targets"]
        by_source["ecf"] = {"msa": 0, "er": 0, "fer": 0, "eri": 0, "ecpe": targets}
    distinct = sum(max(n or 0 for n in tasks.values()) for tasks in by_source.values())
    report["table_one"] = table_rows(by_source, distinct)
    report["unexplained"] = _unexplained(report)
    return report


def _overlap(corpus: EcfCorpus, rows: Sequence[MeldRow]) -> dict[str, Any]:
    if corpus.meld_of is None:
        return {"missing": "all_data_pair_ECFvsMELD.txt (of ECF 1.0) is in none of the folders"}
    return overlap_report(corpus.splits["train"], corpus.meld_of, rows)


def meld_counts(rows: Sequence[MeldRow]) -> dict[str, Any]:
    """Rows, dialogues, labels, lengths per split; rows that repeat a moment of the series."""
    by_split = {split: [row for row in rows if row.split == split] for split in SPLITS}

    def per_split(count: Callable[[list[MeldRow]], Any]) -> dict[str, Any]:
        return {split: count(of_split) for split, of_split in by_split.items()}

    return {
        "rows": per_split(len),
        "dialogues": per_split(lambda rows: len({row.dialogue for row in rows})),
        "emotions": per_split(lambda rows: counted(row.emotion for row in rows)),
        "sentiments": per_split(lambda rows: counted(row.sentiment for row in rows)),
        "group_speakers": counted(row.split for row in rows if row.is_group),
        "repeated_moments": {splits: len(group) for splits, group in repeats(rows).items()},
        "seconds": per_split(lambda rows: summary([row.end_s - row.start_s for row in rows])),
        "words": per_split(lambda rows: summary([len(row.text.split()) for row in rows])),
    }


def ecf_counts(corpus: EcfCorpus) -> dict[str, Any]:
    """Conversations, utterances, pairs, targets, labels, lengths per split."""
    return {
        "edition": corpus.edition,
        "splits": {split: _ecf_split(listed) for split, listed in corpus.splits.items()},
        "files": [hash_file(path) for path in corpus.files],
    }


def _ecf_split(conversations: Sequence[Conversation]) -> dict[str, Any]:
    utterances = [u for c in conversations for u in c.utterances]
    emotion = {(c.id, u.number): u.emotion for c in conversations for u in c.utterances}
    causes = Counter((c.id, target) for c in conversations for target, _ in c.pairs)
    return {
        "conversations": len(conversations),
        "conversations_without_pairs": sum(not c.pairs for c in conversations),
        "utterances": len(utterances),
        "emotional_utterances": sum(u.emotion != "neutral" for u in utterances),
        "pairs": sum(causes.values()),
        "targets": len(causes),
        "emotions": counted(u.emotion for u in utterances),
        "pair_emotions": counted(emotion[c.id, t] for c in conversations for t, _ in c.pairs),
        "causes_per_target": counted(str(count) for count in causes.values()),
        "cause_place": counted(
            cause_position(target, cause) for c in conversations for target, cause in c.pairs
        ),
        "turns": summary([len(c.utterances) for c in conversations]),
        "seconds": summary([u.end_s - u.start_s for u in utterances if u.episode]),
        "words": summary([len(u.text.split()) for u in utterances]),
    }


def mosei_counts(corpus: MoseiCorpus) -> dict[str, Any]:
    """Segments, signs of the sentiment, emotions, lengths per split; results of the join."""
    splits = sorted({segment.split for segment in corpus.segments})
    of = {split: [s for s in corpus.segments if s.split == split] for split in splits}
    seconds = {
        split: [s.end_s - s.start_s for s in part if s.start_s is not None and s.end_s is not None]
        for split, part in of.items()
    }
    return {
        "edition": corpus.edition,
        "segments": {split: len(part) for split, part in of.items()},
        "videos": {split: len({s.video for s in part}) for split, part in of.items()},
        "signs": {
            split: counted(
                "negative" if s.sentiment < 0 else "positive" if s.sentiment > 0 else "zero"
                for s in part
            )
            for split, part in of.items()
        },
        # The strongest emotion, of equal ones the first in the csd's order.
        "emotions": {
            split: counted(emotion_of(s.intensities) or "" for s in part if s.intensities)
            for split, part in of.items()
            if any(s.intensities for s in part)
        },
        "joined": dict(corpus.joined),
        "seconds": {split: summary(values) for split, values in seconds.items()},
        "train_by_length": {
            name: count
            for limit in _LIMITS_S
            for name, count in (
                (f"below {limit:g} s", sum(v < limit for v in seconds.get("train", ()))),
                (f"above {limit:g} s", sum(v > limit for v in seconds.get("train", ()))),
            )
        },
        # Only of segments with known words: the per-segment table has none.
        "words": {
            split: summary([len(s.text.split()) for s in part if s.text])
            for split, part in of.items()
        },
        "files": [hash_file(path) for path in corpus.files],
    }


def _unexplained(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of Table I that follow from no rule on the corpora's labels."""
    segments = report.get("mosei", {}).get("segments", {}).get("train")
    nearest = None
    if "meld" in report:
        emotions: dict[str, int] = report["meld"]["emotions"]["train"]
        sums = {
            names: sum(emotions[name] for name in names)
            for size in range(1, len(emotions) + 1)
            for names in combinations(sorted(emotions), size)
        }
        best = min(sums, key=lambda names: abs(sums[names] - TABLE_ONE["eri"]))
        nearest = {"emotions": list(best), "sum": sums[best]}
    return [
        {
            "name": "mosei train segments",
            "paper": MOSEI_PART,
            "mmsa": MMSA_TRAIN,
            "found": segments,
            "difference": MMSA_TRAIN - MOSEI_PART,
            "difference_found": None if segments is None else segments - MOSEI_PART,
            "note": "the paper does not say which segments it removed; no length limit gives it",
        },
        {
            "name": "eri records",
            "paper": TABLE_ONE["eri"],
            "found": None,
            "nearest_sum_of_meld_train_emotions": nearest,
            "note": "reasons are made and curated by hand; annotation files do not contain them",
        },
    ]


def report_text(report: Mapping[str, Any]) -> str:
    """The counts as tables of text."""
    lines: list[str] = []
    if "meld" in report:
        lines.append(f"MELD rows: {_listed(report['meld']['rows'])}")
    if "ecf" in report:
        for split, counts in report["ecf"]["splits"].items():
            lines.append(
                f"ECF {report['ecf']['edition']} {split}: {counts['conversations']:,} "
                f"conversations, {counts['utterances']:,} utterances, {counts['pairs']:,} pairs, "
                f"{counts['targets']:,} targets"
            )
    if "mosei" in report:
        segments = _listed(report["mosei"]["segments"])
        lines.append(f"MOSEI segments ({report['mosei']['edition']}): {segments}")
    lines += ["", *table_text(report["table_one"]), ""]
    lines += [f"  {row['name']}: {row['decomposition']}" for row in report["table_one"]]
    lines += ["", "not explained by any rule"]
    for row in report["unexplained"]:
        numbers = [f"Table I {row['paper']:,}"]
        numbers += [f"{key} {row[key]:,}" for key in ("mmsa", "found") if row.get(key) is not None]
        lines.append(f"  {row['name']}: {', '.join(numbers)}: {row['note']}")
    if "overlap" in report:
        lines += ["", *overlap_text(report["overlap"])]
    lines += ["", "labels", *_label_lines(report)]
    lines += ["", f"{'lengths':<28}" + "".join(f"{name:>9}" for name in _COLUMNS)]
    for corpus, split, name, numbers in _values(report, _LENGTHS):
        if numbers:
            row = "".join(f"{numbers[column]:>9g}" for column in _COLUMNS)
            lines.append(f"  {f'{corpus} {split} {name}':<26}{row}")
    return "\n".join(lines)


_COLUMNS: Final = ("min", "mean", "median", "p95", "max")
_LENGTHS: Final = ("seconds", "words", "turns")
_LABELS: Final = {
    "emotions": "emotions",
    "sentiments": "sentiment",
    "signs": "sentiment",
    "pair_emotions": "pairs by emotion",
    "causes_per_target": "targets by causes",
    "cause_place": "position of the cause",
}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _values(report: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, str, str, Any]]:
    """(corpus, split, name, value) of the values with these names, in this order per corpus."""
    for corpus in ("meld", "mosei", "ecf"):
        counts = report.get(corpus, {})
        for name in names:
            by_split = {split: of.get(name) for split, of in counts.get("splits", {}).items()}
            for split, value in (by_split or counts.get(name, {})).items():
                if value is not None:
                    yield corpus, split, name, value


def _label_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for corpus, split, name, counts in _values(report, _LABELS):
        shown = _listed(dict(islice(counts.items(), _SHOWN_LABELS)))
        hidden = len(counts) - _SHOWN_LABELS
        more = f", and {hidden} more" if hidden > 0 else ""
        yield f"  {corpus} {split}, {_LABELS[name]}: {shown}{more}"


def overlap_text(report: Mapping[str, Any]) -> list[str]:
    """The overlap of ECF's training set with MELD, as lines of text."""
    if "missing" in report:
        return [f"overlap of ECF with MELD: unknown, {report['missing']}"]
    lines = ["overlap of ECF's training set with MELD (utterances / targets / pairs)"]
    for split in ("train", "dev", "test", "none"):
        numbers = " / ".join(f"{report[n][split]:,}" for n in ("utterances", "targets", "pairs"))
        lines.append(f"  {'not in MELD' if split == 'none' else 'MELD ' + split:<12}{numbers}")
    if "test_targets_same_label" in report:
        share = report["meld_share"]["test"]
        lines.append(
            f"  {share['in_ecf']:,} of MELD test's {share['of']:,} utterances are in it; "
            f"{report['test_targets_same_label']:,} targets have the emotion label of MELD test"
        )
    lines.append("kept by each rule of --leakage (conversations / targets / pairs)")
    for rule, counts in report["rules"].items():
        kept = " / ".join(f"{counts[n]:,}" for n in ("conversations", "targets", "pairs"))
        default = ", the default" if rule == DEFAULT_LEAKAGE else ""
        clean = " and ".join(f"MELD {name}" for name in sorted(KEPT_CLEAN[rule])) or "nothing"
        lines.append(
            f"  {rule:<18}{kept}, {counts['conversations_dropped']} conversations dropped "
            f"(keeps {clean} clean{default})"
        )
    return lines
