"""What annotation folders hold, without any media, beside the paper's Table I.

In: folders of MELD, ECF and CMU-MOSEI. Out: a JSON object of counts, and the same for people.
Flow: sources -> here; `emoverse stats --meld DIR --ecf DIR [--mosei DIR]`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from data_shards.build.clip_record import hash_file
from data_shards.inspection.summary import cause_place, counted, summary
from data_shards.inspection.table_one import (
    MMSA_TRAIN,
    MOSEI_PART,
    TABLE_ONE,
    table_rows,
    table_text,
)
from data_shards.sources.ecf import Conversation, EcfCorpus, load_ecf
from data_shards.sources.meld import SPLITS, MeldRow, annotation_files, read_meld, repeats
from data_shards.sources.mosei import MoseiCorpus, emotion_of, load_mosei
from data_shards.sources.overlap import DEFAULT_LEAKAGE, KEPT_CLEAN, overlap_report

_TOP: Final = 8  # labels of one line for people
_LIMITS_S: Final = (2.0, 18.0, 20.0)  # lengths at which a clip might have been thrown away


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
        # Its faces are what FER was made of; how many keep a phrase only OpenFace can tell.
        by_source["mosei"] = {"msa": train, "er": er, "fer": None, "eri": None, "ecpe": 0}
    if meld is not None:
        rows = read_meld(meld)
        report["meld"] = meld_counts(rows)
        report["meld"]["files"] = [hash_file(path) for path in annotation_files(meld).values()]
        number = report["meld"]["rows"]["train"]
        by_source["meld"] = {"msa": number, "er": number, "fer": 0, "eri": None, "ecpe": 0}
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

    of = {split: [row for row in rows if row.split == split] for split in SPLITS}
    return {
        "rows": {split: len(part) for split, part in of.items()},
        "dialogues": {split: len({row.dialogue for row in part}) for split, part in of.items()},
        "emotions": {s: counted(row.emotion for row in part) for s, part in of.items()},
        "sentiments": {s: counted(row.sentiment for row in part) for s, part in of.items()},
        "group_speakers": counted(row.split for row in rows if row.is_group),
        "repeated_moments": {place: len(group) for place, group in repeats(rows).items()},
        "seconds": {s: summary([r.end_s - r.start_s for r in part]) for s, part in of.items()},
        "words": {s: summary([len(r.text.split()) for r in part]) for s, part in of.items()},
    }


def ecf_counts(corpus: EcfCorpus) -> dict[str, Any]:
    """Conversations, utterances, pairs, targets, labels, lengths per split."""
    return {
        "edition": corpus.edition,
        "splits": {split: _ecf_split(part) for split, part in corpus.splits.items()},
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
        "causes_per_target": counted(str(number) for number in causes.values()),
        "cause_place": counted(cause_place(t, c) for part in conversations for t, c in part.pairs),
        "turns": summary([len(c.utterances) for c in conversations]),
        "seconds": summary([u.end_s - u.start_s for u in utterances if u.episode]),
        "words": summary([len(u.text.split()) for u in utterances]),
    }


def mosei_counts(corpus: MoseiCorpus) -> dict[str, Any]:
    """Segments, signs of the sentiment, emotions, lengths per split, and what did not join."""
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
        # Strongest emotion, the first in the csd's order of equals; none without intensities.
        "emotions": {
            split: counted(emotion_of(s.intensities) or "" for s in part if s.intensities)
            for split, part in of.items()
            if any(s.intensities for s in part)
        },
        "joined": dict(corpus.joined),
        "seconds": {split: summary(values) for split, values in seconds.items()},
        "train_by_length": {
            name: number
            for limit in _LIMITS_S
            for name, number in (
                (f"below {limit:g} s", sum(v < limit for v in seconds.get("train", ()))),
                (f"above {limit:g} s", sum(v > limit for v in seconds.get("train", ()))),
            )
        },
        # Of the segments whose words are known: the per-segment table has none.
        "words": {
            split: summary([len(s.text.split()) for s in part if s.text])
            for split, part in of.items()
        },
        "files": [hash_file(path) for path in corpus.files],
    }


def _unexplained(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of Table I that no rule on the corpora's labels gives."""
    found: list[dict[str, Any]] = []
    here = report.get("mosei", {}).get("segments", {}).get("train")
    found.append(
        {
            "name": "mosei train segments",
            "paper": MOSEI_PART,
            "mmsa": MMSA_TRAIN,
            "found": here,
            "difference": MMSA_TRAIN - MOSEI_PART,
            "difference_found": None if here is None else here - MOSEI_PART,
            "note": "the paper does not say which segments it removed; no length limit gives it",
        }
    )
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
    found.append(
        {
            "name": "eri records",
            "paper": TABLE_ONE["eri"],
            "found": None,
            "nearest_sum_of_meld_train_emotions": nearest,
            "note": "reasons are made and curated by hand; annotation files cannot say how many",
        }
    )
    return found


def report_text(report: Mapping[str, Any]) -> str:
    """The counts for people."""
    lines: list[str] = []
    if "meld" in report:
        part = report["meld"]
        rows = ", ".join(f"{split} {number:,}" for split, number in part["rows"].items())
        lines.append(f"MELD rows: {rows}")
    if "ecf" in report:
        for split, part in report["ecf"]["splits"].items():
            lines.append(
                f"ECF {report['ecf']['edition']} {split}: {part['conversations']:,} conversations, "
                f"{part['utterances']:,} utterances, {part['pairs']:,} pairs, "
                f"{part['targets']:,} targets"
            )
    if "mosei" in report:
        rows = ", ".join(f"{split} {n:,}" for split, n in report["mosei"]["segments"].items())
        lines.append(f"MOSEI segments ({report['mosei']['edition']}): {rows}")
    lines += ["", *table_text(report["table_one"]), ""]
    lines += [f"  {row['name']}: {row['decomposition']}" for row in report["table_one"]]
    lines += ["", "what nothing explains"]
    for row in report["unexplained"]:
        numbers = [f"Table I {row['paper']:,}"]
        numbers += [f"{key} {row[key]:,}" for key in ("mmsa", "found") if row.get(key) is not None]
        lines.append(f"  {row['name']}: {', '.join(numbers)}: {row['note']}")
    if "overlap" in report:
        lines += ["", *overlap_text(report["overlap"])]
    lines += ["", "labels", *_label_lines(report)]
    lines += ["", f"{'lengths':<28}" + "".join(f"{name:>9}" for name in _COLUMNS)]
    for corpus, split, name, numbers in _parts(report, _LENGTHS):
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
    "cause_place": "place of the cause",
}


def _parts(report: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, str, str, Any]]:
    """(corpus, split, name, value) of the values with these names, in this order per corpus."""
    for corpus in ("meld", "mosei", "ecf"):
        found = report.get(corpus, {})
        for name in names:
            by_split = {split: part.get(name) for split, part in found.get("splits", {}).items()}
            for split, value in (by_split or found.get(name, {})).items():
                if value is not None:
                    yield corpus, split, name, value


def _label_lines(report: Mapping[str, Any]) -> Iterator[str]:
    for corpus, split, name, counts in _parts(report, _LABELS):
        listed = [f"{label} {number:,}" for label, number in counts.items()]
        more = f", and {len(listed) - _TOP} more" if len(listed) > _TOP else ""
        yield f"  {corpus} {split}, {_LABELS[name]}: {', '.join(listed[:_TOP])}{more}"


def overlap_text(report: Mapping[str, Any]) -> list[str]:
    """The overlap of ECF's training set with MELD, for people."""
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
            f"{report['test_targets_same_label']:,} targets carry MELD test's own emotion label"
        )
    lines.append("what each rule of --leakage keeps (conversations / targets / pairs)")
    for rule, part in report["rules"].items():
        kept = " / ".join(f"{part[n]:,}" for n in ("conversations", "targets", "pairs"))
        default = ", the default" if rule == DEFAULT_LEAKAGE else ""
        clean = " and ".join(f"MELD {name}" for name in sorted(KEPT_CLEAN[rule])) or "nothing"
        lines.append(
            f"  {rule:<18}{kept}, {part['conversations_dropped']} conversations dropped "
            f"(keeps {clean} clean{default})"
        )
    return lines
