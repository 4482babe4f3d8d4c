"""MELD, CMU-MOSEI and ECF, each alone or joined to the Emotion Multitask dataset.

In: the folders as downloaded, a split, the leakage rule, a file of FER annotations. Out: one item
per clip, in an order that mixes the corpora and depends on the keys only, and a provenance with the
hashes of all files that were read, every option, and counts of what was left out and why.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

from data_shards.build.clip_record import Clip, MediaOptions, PendingRecord, hash_file, make_record
from data_shards.build.source_item import FileItem
from data_shards.jsonl import read_rows
from data_shards.shards.record import shorten_key
from data_shards.sources.ecf import (
    SPLITS_OF,
    EcfClips,
    Edition,
    Targets,
    UtteranceId,
    ecf_records,
    episodes,
    load_ecf,
    own_clips,
)
from data_shards.sources.meld import (
    SPLITS,
    KnownBad,
    MeldClips,
    annotation_files,
    is_left_out,
    meld_record,
    read_meld,
)
from data_shards.sources.mosei import EmotionRule, MoseiClips, Ties, load_mosei, mosei_record
from data_shards.sources.overlap import (
    DEFAULT_LEAKAGE,
    KEPT_CLEAN,
    Leakage,
    kept,
    require_map,
)
from data_shards.sources.registry import Source
from data_shards.tasks import TASKS, Task

CORPORA: Final = ("meld", "mosei", "ecf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `emoverse build meld | mosei | ecf | emt`."""
    add = parser.add_argument
    add("--meld", type=Path, metavar="DIR", help="MELD.Raw: csv files and clips")
    add("--mosei", type=Path, metavar="DIR", help="CMU-MOSEI: labels and clips or whole videos")
    add("--ecf", type=Path, nargs="+", default=[], metavar="DIR", help="files of ECF 2.0 and 1.0")
    add("--ecf-clips", type=Path, metavar="DIR", help="clips named by ECF's numbers, dia1utt2.mp4")
    add("--episodes", type=Path, metavar="DIR", help="whole episodes, *S01E01*, to cut clips from")
    add("--split", choices=SPLITS, default="train", help="default: %(default)s")
    add(
        "--leakage",
        choices=get_args(Leakage),
        default=DEFAULT_LEAKAGE,
        help="which MELD utterances training data must not contain (default: %(default)s)",
    )
    add("--fer", type=Path, metavar="FILE", help="JSONL of `emoverse annotate fer`")
    add("--neutral-msa", choices=("keep", "drop"), default="keep", help="neutral clips serve MSA")
    add("--known-bad", choices=get_args(KnownBad), default="skip-train", help="MELD's broken clips")
    add("--mosei-emotion", choices=get_args(EmotionRule), default="strongest", help="of several")
    add("--mosei-ties", choices=get_args(Ties), default="first", help="equally strong emotions")
    add(
        "--mosei-visual", choices=("video", "peak_frame"), default="video", help="clip or one frame"
    )
    add("--ecf-edition", choices=get_args(Edition), default="2", help="ECF 2.0 (default) or 1.0")
    add("--ecf-targets", choices=get_args(Targets), default="with_cause", help="which utterances")
    media = MediaOptions()
    add(
        "--cut", choices=("encode", "copy"), default=media.cut, help="how clips are cut from videos"
    )
    add("--crf", type=int, default=media.crf, help="quality of cut clips (default: %(default)s)")
    add("--check", choices=("frames", "packets"), default=media.check, help="how clips are checked")


def open_source(args: argparse.Namespace) -> Source:
    """The corpora that the arguments describe.

    Raises:
        FileNotFoundError, ValueError: a folder or file is missing or not as published, or the
            arguments do not fit the corpus.
    """
    _require_folders(args)
    left_out: dict[str, Counter[str]] = {name: Counter() for name in CORPORA}
    files: dict[str, list[dict[str, Any]]] = {}
    unplaced: dict[str, list[str]] = {}
    records: list[PendingRecord] = []
    mosei = partial(_mosei, unplaced=unplaced)
    for corpus, read in (("meld", _meld), ("mosei", mosei), ("ecf", _ecf)):
        if args.source in (corpus, "emt") and getattr(args, corpus):
            records += read(args, left_out[corpus], files)
    records = [replace(record, key=shorten_key(record.key)) for record in records]
    attached: dict[str, dict[str, int]] = {}
    if args.fer is not None:
        records, attached["fer"] = attach_fer(records, args.fer)
        files["fer"] = [hash_file(args.fer)]
    records.sort(key=lambda record: hashlib.sha256(record.key.encode()).digest())
    media = MediaOptions(cut=args.cut, crf=args.crf, check=args.check)
    return Source(
        items=[
            FileItem(make=partial(make_record, record, media), path=record.clip.path)
            for record in records
        ],
        total=len(records),
        provenance={
            "source": args.source,
            "split": args.split,
            "leakage": args.leakage,
            "drafts": dict(Counter(record.source for record in records)),
            "left_out": {name: dict(counts) for name, counts in left_out.items() if counts},
            **({"unplaced": unplaced} if unplaced else {}),
            "attached": attached,
            "choices": _choices(args),
            "files": files,
        },
    )


def _require_folders(args: argparse.Namespace) -> None:
    given = [name for name in CORPORA if getattr(args, name)]
    if args.source != "emt" and args.source not in given:
        raise ValueError(f"build {args.source}: needs --{args.source} DIR")
    # The folder of MELD also has clips of ECF; any other folder would not be used.
    unused = [
        name
        for name in given
        if args.source not in (name, "emt") and not (args.source == "ecf" and name == "meld")
    ]
    if unused:
        raise ValueError(
            f"build {args.source}: --{unused[0]} is not used here; build emt joins the corpora"
        )
    if not given:
        raise ValueError("build emt: needs one or more of --meld, --mosei and --ecf")


def _choices(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        *("neutral_msa", "known_bad", "mosei_emotion", "mosei_ties", "mosei_visual"),
        *("ecf_edition", "ecf_targets", "cut", "crf", "check"),
    )
    return {name: getattr(args, name) for name in names}


Files = dict[str, list[dict[str, Any]]]


def _meld(
    args: argparse.Namespace, left_out: Counter[str], files: Files
) -> Iterator[PendingRecord]:
    rows = read_meld(args.meld)
    files["meld"] = [hash_file(path) for path in annotation_files(args.meld).values()]
    clips = MeldClips(args.meld)
    # MELD's training set repeats a moment of its test set.
    protected = {row.moment for row in rows if row.split in KEPT_CLEAN[args.leakage]}
    if unannotated := clips.without_annotation(rows):
        left_out["file-without-annotation"] = len(unannotated)
    for row in rows:
        if row.split != args.split:
            continue
        if is_left_out(row, args.known_bad):
            left_out["known-bad"] += 1
        elif args.split == "train" and row.moment in protected:
            left_out["leakage"] += 1
        else:
            yield meld_record(row, clips, neutral_msa=args.neutral_msa == "keep")


def _mosei(
    args: argparse.Namespace, left_out: Counter[str], files: Files, unplaced: dict[str, list[str]]
) -> Iterator[PendingRecord]:
    corpus = load_mosei(args.mosei)
    files["mosei"] = [hash_file(path) for path in corpus.files]
    clips = MoseiClips(args.mosei)
    if not any(segment.text for segment in corpus.segments):
        raise ValueError(
            f"{args.mosei}: no segment has words; add the transcripts "
            "(Transcript/Segmented/Combined/*.txt), or MMSA's label.csv, which has them"
        )
    for name, count in corpus.joined.items():
        if name.startswith("videos_") and count:
            left_out[f"emotions-of-{name.replace('_', '-')}"] = count
    if in_no_fold := corpus.joined.get("segments_in_no_fold"):
        left_out["segments-in-no-fold"] = in_no_fold
    for why, videos in corpus.unplaced.items():
        left_out[why] = len(videos)
        unplaced[why] = list(videos)
    for segment in corpus.segments:
        if segment.split != args.split:
            continue
        record = mosei_record(
            segment,
            clips,
            rule=args.mosei_emotion,
            ties=args.mosei_ties,
            neutral_msa=args.neutral_msa == "keep",
            still=args.mosei_visual == "peak_frame",
        )
        if not segment.text:
            left_out["no-words"] += 1
        elif record is None:
            left_out["no-task"] += 1
        else:
            yield record


def _ecf(args: argparse.Namespace, left_out: Counter[str], files: Files) -> Iterator[PendingRecord]:
    splits = SPLITS_OF[args.ecf_edition]
    if args.split not in splits:
        if args.source == "ecf":
            rule = f"ECF {args.ecf_edition} has the splits {', '.join(splits)}"
            raise ValueError(f"--split: {rule}, found {args.split}; see --ecf-edition")
        return
    corpus = load_ecf(args.ecf, edition=args.ecf_edition, splits=[args.split])
    files["ecf"] = [hash_file(path) for path in corpus.files]
    leakage: Leakage = args.leakage if args.split == "train" else "paper"
    conversations = corpus.splits[args.split]
    clean = kept(conversations, require_map(corpus, leakage), leakage)
    if dropped := len(conversations) - len(clean):
        before, after = (
            sum(len(conversation.targets(args.ecf_targets)) for conversation in part)
            for part in (conversations, clean)
        )
        left_out["leakage-conversations"] = dropped
        left_out["leakage"] = before - after
    of_meld: dict[UtteranceId, Clip] = {}
    if args.meld is not None:
        meld_clips = MeldClips(args.meld)
        of_meld = {
            utterance_id: meld_clips.clip(clip_id)
            for utterance_id, clip_id in (corpus.meld_of or {}).items()
        }
    clips = EcfClips(
        own=own_clips(args.ecf_clips) if args.ecf_clips is not None else {},
        meld=of_meld,
        episodes=episodes(args.episodes) if args.episodes is not None else {},
    )
    for conversation in clean:
        yield from ecf_records(conversation, args.split, clips, targets=args.ecf_targets)


# ------------------------------------------------------------------------------------- annotations


def attach_fer(
    records: list[PendingRecord], path: Path
) -> tuple[list[PendingRecord], dict[str, int]]:
    """Add the FER labels of a file to the records with the same key; count its used keys.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not as `emoverse annotate fer` writes it, or a key comes twice.
    """
    labels = _fer_labels(path)
    labelled = []
    used = 0
    for record in records:
        if record.key in labels:
            peak, phrases = labels[record.key]
            used += 1
            tasks = tuple(t for t in TASKS if t in record.tasks or t is Task.FER)
            record = replace(record, peak_frame=peak, expressions=phrases, tasks=tasks)
        labelled.append(record)
    return labelled, {"used": used, "of_other_clips": len(labels) - used}


def _fer_labels(path: Path) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Key -> peak frame and phrases."""
    labels: dict[str, tuple[int, tuple[str, ...]]] = {}
    for row in read_rows(path, "the JSONL of `emoverse annotate fer`"):
        peak, phrases = row.fields.get("peak_frame"), row.fields.get("phrases")
        if not isinstance(peak, int) or isinstance(peak, bool) or peak < 0:
            raise ValueError(f"{row.place}: peak_frame: must be 0 or more, found {peak!r}")
        if not isinstance(phrases, list) or not phrases or not all(map(_is_text, phrases)):
            raise ValueError(f"{row.place}: phrases: must be a list of texts, found {phrases!r}")
        key = row.text("key")
        if key in labels:
            raise ValueError(f"{row.place}: key: must be unique, found {key!r} again")
        labels[key] = (peak, tuple(phrases))
    return labels


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
