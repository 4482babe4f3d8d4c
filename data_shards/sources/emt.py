"""MELD, CMU-MOSEI and ECF, each alone or joined to the Emotion Multitask dataset.

In: the folders as downloaded, which split, the leakage rule, a file of FER annotations. Out:
one recipe per clip, mixed in an order that depends on the keys alone, and a provenance with the
hashes of all files that were read, every choice, and a count of what was left out and why.
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

from data_shards.build.clip_record import Clip, Draft, MediaOptions, hash_file, make_record
from data_shards.build.source_item import FileRecipe
from data_shards.jsonl import read_rows
from data_shards.sources import Source
from data_shards.sources.ecf import (
    SPLITS_OF,
    EcfClips,
    Edition,
    Targets,
    ecf_drafts,
    episodes,
    load_ecf,
    own_clips,
)
from data_shards.sources.meld import (
    SPLITS,
    KnownBad,
    MeldClips,
    MeldRow,
    annotation_files,
    is_left_out,
    meld_draft,
    read_meld,
)
from data_shards.sources.mosei import EmotionRule, MoseiClips, Ties, load_mosei, mosei_draft
from data_shards.sources.overlap import (
    DEFAULT_LEAKAGE,
    KEPT_CLEAN,
    Leakage,
    kept,
    require_map,
)
from data_shards.tasks import TASKS, Task

CORPORA: Final = ("meld", "mosei", "ecf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `emoverse build meld | mosei | ecf | emt` that say which corpus."""
    add = parser.add_argument
    add("--meld", type=Path, metavar="DIR", help="MELD.Raw: csv files and clips")
    add("--mosei", type=Path, metavar="DIR", help="CMU-MOSEI: labels and clips or whole videos")
    add("--ecf", type=Path, nargs="+", default=[], metavar="DIR", help="files of ECF 2.0 and 1.0")
    add("--ecf-clips", type=Path, metavar="DIR", help="clips in ECF's own numbers, dia1utt2.mp4")
    add("--episodes", type=Path, metavar="DIR", help="whole episodes, *S01E01*: ECF clips are cut")
    add("--split", choices=SPLITS, default="train", help="default: %(default)s")
    add(
        *("--leakage",),
        choices=get_args(Leakage),
        default=DEFAULT_LEAKAGE,
        help="which MELD utterances training data may not show (default: %(default)s)",
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
    add("--check", choices=("frames", "packets"), default=media.check, help="how clips are tried")


def open_source(args: argparse.Namespace) -> Source:
    """The corpora of some arguments.

    Raises:
        FileNotFoundError, ValueError: a folder or file is missing or not as published, or the
            arguments do not fit the corpus.
    """
    _require_folders(args)
    left_out: dict[str, Counter[str]] = {name: Counter() for name in CORPORA}
    files: dict[str, list[dict[str, Any]]] = {}
    drafts: list[Draft] = []
    for corpus, read in (("meld", _meld), ("mosei", _mosei), ("ecf", _ecf)):
        if args.source in (corpus, "emt") and getattr(args, corpus):
            drafts += read(args, left_out[corpus], files)
    attached: dict[str, dict[str, int]] = {}
    if args.fer is not None:
        drafts, attached["fer"] = attach_fer(drafts, args.fer)
        files["fer"] = [hash_file(args.fer)]
    drafts.sort(key=lambda draft: hashlib.sha256(draft.key.encode()).digest())
    media = MediaOptions(cut=args.cut, crf=args.crf, check=args.check)
    return Source(
        items=[
            FileRecipe(make=partial(make_record, draft, media), path=draft.clip.path)
            for draft in drafts
        ],
        total=len(drafts),
        provenance={
            "source": args.source,
            "split": args.split,
            "leakage": args.leakage,
            "drafts": dict(Counter(draft.source for draft in drafts)),
            "left_out": {name: dict(counts) for name, counts in left_out.items() if counts},
            "attached": attached,
            "choices": _choices(args),
            "files": files,
        },
    )


def _require_folders(args: argparse.Namespace) -> None:
    given = [name for name in CORPORA if getattr(args, name)]
    if args.source != "emt" and args.source not in given:
        raise ValueError(f"build {args.source}: needs --{args.source} DIR")
    # MELD's folder is where clips of ECF come from; any other folder would be read for nothing.
    useless = [
        name
        for name in given
        if args.source not in (name, "emt") and not (args.source == "ecf" and name == "meld")
    ]
    if useless:
        raise ValueError(
            f"build {args.source}: --{useless[0]} is of no use here; build emt joins the corpora"
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


def _meld(args: argparse.Namespace, left_out: Counter[str], files: Files) -> Iterator[Draft]:
    rows = read_meld(args.meld)
    files["meld"] = [hash_file(path) for path in annotation_files(args.meld).values()]
    clips = MeldClips(args.meld)
    clean = _moments(rows, args.leakage) if args.split == "train" else frozenset()
    strangers = clips.without_annotation(rows)
    if strangers:
        left_out["file-without-annotation"] = len(strangers)
    for row in rows:
        if row.split != args.split:
            continue
        if is_left_out(row, args.known_bad):
            left_out["known-bad"] += 1
        elif row.identity in clean:
            left_out["leakage"] += 1
        else:
            yield meld_draft(row, clips, neutral_msa=args.neutral_msa == "keep")


def _moments(rows: list[MeldRow], rule: Leakage) -> frozenset[tuple[int, int, float, str]]:
    """The moments of the splits that the rule keeps clean: MELD train repeats one of test."""
    return frozenset(row.identity for row in rows if row.split in KEPT_CLEAN[rule])


def _mosei(args: argparse.Namespace, left_out: Counter[str], files: Files) -> Iterator[Draft]:
    corpus = load_mosei(args.mosei)
    files["mosei"] = [hash_file(path) for path in corpus.files]
    clips = MoseiClips(args.mosei)
    if not any(segment.text for segment in corpus.segments):
        raise ValueError(
            f"{args.mosei}: no segment has words; add the transcripts "
            "(Transcript/Segmented/Combined/*.txt), or MMSA's label.csv, which has them"
        )
    for name, number in corpus.joined.items():
        if name.startswith("videos_") and number:
            left_out[f"emotions-of-{name.replace('_', '-')}"] = number
    for segment in corpus.segments:
        if segment.split != args.split:
            continue
        draft = mosei_draft(
            segment,
            clips,
            rule=args.mosei_emotion,
            ties=args.mosei_ties,
            neutral_msa=args.neutral_msa == "keep",
            still=args.mosei_visual == "peak_frame",
        )
        if not segment.text:
            left_out["no-words"] += 1
        elif draft is None:
            left_out["no-task"] += 1
        else:
            yield draft


def _ecf(args: argparse.Namespace, left_out: Counter[str], files: Files) -> Iterator[Draft]:
    if args.split not in SPLITS_OF[args.ecf_edition]:
        if args.source == "ecf":
            splits = ", ".join(SPLITS_OF[args.ecf_edition])
            has = f"ECF {args.ecf_edition} has the splits {splits}"
            raise ValueError(f"--split: {has}, found {args.split}; see --ecf-edition")
        return
    corpus = load_ecf(args.ecf, edition=args.ecf_edition, splits=[args.split])
    files["ecf"] = [hash_file(path) for path in corpus.files]
    rule: Leakage = args.leakage if args.split == "train" else "paper"
    meld_of = require_map(corpus, rule)
    conversations = corpus.splits[args.split]
    clean = kept(conversations, meld_of, rule)
    if dropped := len(conversations) - len(clean):
        targets = [
            sum(len(c.targets(args.ecf_targets)) for c in part) for part in (conversations, clean)
        ]
        left_out["leakage-conversations"] = dropped
        left_out["leakage"] = targets[0] - targets[1]
    by_meld: dict[tuple[int, int], Clip] = {}
    if args.meld is not None:
        meld_clips = MeldClips(args.meld)
        by_meld = {
            place: meld_clips.clip(*found) for place, found in (corpus.meld_of or {}).items()
        }
    clips = EcfClips(
        own=own_clips(args.ecf_clips) if args.ecf_clips is not None else {},
        meld=by_meld,
        episodes=episodes(args.episodes) if args.episodes is not None else {},
    )
    for conversation in clean:
        yield from ecf_drafts(conversation, args.split, clips, targets=args.ecf_targets)


# ------------------------------------------------------------------------------------- annotations


def attach_fer(drafts: list[Draft], path: Path) -> tuple[list[Draft], dict[str, int]]:
    """The drafts with FER labels from a file, by key, and how many of its keys were used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not as `emoverse annotate fer` writes it, or a key comes twice.
    """
    faces = _faces(path)
    found = []
    used = 0
    for draft in drafts:
        if draft.key in faces:
            peak, phrases = faces[draft.key]
            used += 1
            tasks = tuple(t for t in TASKS if t in draft.tasks or t is Task.FER)
            draft = replace(draft, peak_frame=peak, expressions=phrases, tasks=tasks)
        found.append(draft)
    return found, {"used": used, "of_other_clips": len(faces) - used}


def _faces(path: Path) -> dict[str, tuple[int, tuple[str, ...]]]:
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for row in read_rows(path, "the JSONL of `emoverse annotate fer`"):
        peak, phrases = row.fields.get("peak_frame"), row.fields.get("phrases")
        if not isinstance(peak, int) or isinstance(peak, bool) or peak < 0:
            raise ValueError(f"{row.place}: peak_frame: must be 0 or more, found {peak!r}")
        if not isinstance(phrases, list) or not phrases or not all(map(_is_text, phrases)):
            raise ValueError(f"{row.place}: phrases: must be a list of texts, found {phrases!r}")
        key = row.text("key")
        if key in found:
            raise ValueError(f"{row.place}: key: must be unique, found {key!r} again")
        found[key] = (peak, tuple(phrases))
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
