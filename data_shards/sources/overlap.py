"""The training set of ECF re-annotates clips of MELD, also of its test set: the leakage rules.

In: ECF's conversations, the map of ECF utterances to MELD clips, and optionally MELD's rows. Out:
the conversations that a leakage rule keeps, and a report of the overlap. Whole conversations are
dropped, because every target of a conversation shows the words of all its turns.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

from data_shards.sources.ecf import MELD_FILE, Conversation, EcfCorpus, UtteranceId
from data_shards.sources.meld import MeldClipId, MeldRow

Leakage = Literal["paper", "no_meld_test", "no_meld_dev_test"]
DEFAULT_LEAKAGE: Final[Leakage] = "no_meld_test"
KEPT_CLEAN: Final[dict[Leakage, frozenset[str]]] = {
    "paper": frozenset(),
    "no_meld_test": frozenset({"test"}),
    "no_meld_dev_test": frozenset({"dev", "test"}),
}
MeldMap = Mapping[UtteranceId, MeldClipId]


def require_map(corpus: EcfCorpus, rule: Leakage) -> MeldMap:
    """The map to MELD clips; empty where the rule needs none.

    Raises ValueError if the rule needs the map and the folders lack its file.
    """
    if corpus.meld_of is None and KEPT_CLEAN[rule]:
        raise ValueError(
            f"leakage: {rule} needs {MELD_FILE}, which maps utterances of ECF to MELD clips, found "
            "none; add the folder that holds it (ECF 1.0), or set leakage to paper"
        )
    return corpus.meld_of or {}


def is_clean(conversation: Conversation, meld_of: MeldMap, rule: Leakage) -> bool:
    """Whether no utterance of the conversation belongs to a MELD split that must stay clean."""
    splits = {
        meld_of[utterance_id].split
        for u in conversation.utterances
        if (utterance_id := UtteranceId(conversation.id, u.number)) in meld_of
    }
    return not splits & KEPT_CLEAN[rule]


def kept(
    conversations: Sequence[Conversation], meld_of: MeldMap, rule: Leakage
) -> list[Conversation]:
    """The conversations that the rule keeps, in order."""
    return [c for c in conversations if is_clean(c, meld_of, rule)]


def overlap_report(
    conversations: Sequence[Conversation], meld_of: MeldMap, rows: Sequence[MeldRow] = ()
) -> dict[str, Any]:
    """How ECF's training conversations overlap with MELD, and what each rule keeps.

    Args:
        rows: MELD's rows, all splits; without them meld_share and the labels are left out.

    Returns:
        utterances, targets, pairs: counts of ECF per MELD split ('none' = not in MELD);
        rules: per leakage rule the conversations, targets and pairs kept and dropped;
        meld_share: per MELD split the utterances that are in ECF, all utterances, and those with
            the same emotion in both;
        test_targets_same_label: targets that are MELD test utterances with the same emotion;
        label_changes: the five most frequent changes of the emotion from MELD to ECF.
    """

    def split_of(conversation: Conversation, number: int) -> str:
        clip_id = meld_of.get(UtteranceId(conversation.id, number))
        return "none" if clip_id is None else clip_id.split

    counts: dict[str, Counter[str]] = {
        name: Counter() for name in ("utterances", "targets", "pairs")
    }
    for c in conversations:
        counts["utterances"].update(split_of(c, u.number) for u in c.utterances)
        counts["targets"].update(split_of(c, number) for number in c.targets())
        counts["pairs"].update(split_of(c, target) for target, _ in c.pairs)
    order = ("train", "dev", "test", "none")
    report: dict[str, Any] = {
        name: {split: by_split[split] for split in order} for name, by_split in counts.items()
    }
    totals = _totals(conversations)
    report["rules"] = {}
    for rule in get_args(Leakage):
        totals_kept = _totals(kept(conversations, meld_of, rule))
        report["rules"][rule] = {
            **totals_kept,
            **{f"{name}_dropped": totals[name] - count for name, count in totals_kept.items()},
        }
    if rows:
        report |= _label_agreement(conversations, meld_of, rows)
    return report


def _totals(conversations: Sequence[Conversation]) -> dict[str, int]:
    return {
        "conversations": len(conversations),
        "targets": sum(len(c.targets()) for c in conversations),
        "pairs": sum(len(c.pairs) for c in conversations),
    }


def _label_agreement(
    conversations: Sequence[Conversation], meld_of: MeldMap, rows: Sequence[MeldRow]
) -> dict[str, Any]:
    emotion_of = {row.clip_id: row.emotion for row in rows}
    in_ecf: Counter[str] = Counter()
    same: Counter[str] = Counter()
    changes: Counter[str] = Counter()
    same_targets = 0
    for c in conversations:
        targets = set(c.targets())
        for u in c.utterances:
            clip_id = meld_of.get(UtteranceId(c.id, u.number))
            if clip_id is None or clip_id not in emotion_of:
                continue
            in_ecf[clip_id.split] += 1
            if emotion_of[clip_id] == u.emotion:
                same[clip_id.split] += 1
                same_targets += clip_id.split == "test" and u.number in targets
            else:
                changes[f"{emotion_of[clip_id]} -> {u.emotion}"] += 1
    in_meld = Counter(row.split for row in rows)
    return {
        "meld_share": {
            split: {"in_ecf": in_ecf[split], "of": in_meld[split], "same_emotion": same[split]}
            for split in ("train", "dev", "test")
            if in_meld[split]
        },
        "test_targets_same_label": same_targets,
        "label_changes": dict(sorted(changes.items(), key=lambda item: (-item[1], item[0]))[:5]),
    }
