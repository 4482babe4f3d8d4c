"""The synthetic corpus: rendered scenes as Records, made by the same steps as a real corpus.

A scene is rendered to an H.264 mp4 and measured as by OpenFace (csv text). From that csv the
paper's FER rules (peak frame, eqs. 1-3) annotate it. With a composed reason (ERI) it is a Record.
Every clip is a pure function of (seed, split, index): workers may make them in any order.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_shards.annotate.action_units import FerAnnotation, FerOptions, annotate_fer
from data_shards.annotate.openface import format_openface, read_openface
from data_shards.build.source_item import RecordFactory
from data_shards.media.video import encode_mp4
from data_shards.shards.record import Record, Video
from data_shards.sources.registry import Source
from data_shards.tasks import TASKS, Task
from data_shards.world import scene as world
from data_shards.world.expression import measure
from data_shards.world.face import Person, draw_person
from data_shards.world.grammar import TONE

SPLITS = ("train", "test")
# Separate streams of random numbers, so that splits share no identities.
_IDENTITY_STREAM = {"train": 11, "test": 12}
_CLIP_STREAM = {"train": 21, "test": 22}
_DIALOGUE_SHARE = 0.45
_REASON_SHARE = 0.75  # of the monologues: reasons are scarcer than labels, as in Table I


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticOptions:
    """Size and seed of the corpus: `clips` clips of `identities` people; splits share no people."""

    clips: int
    seed: int = 0
    split: str = "train"
    identities: int = 400

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split: must be one of {', '.join(SPLITS)}, found {self.split!r}")
        if self.clips < 1 or self.identities < 1:
            raise ValueError(
                "clips and identities: must be at least 1, "
                f"found {self.clips} and {self.identities}"
            )


def _person(options: SyntheticOptions, identity: int) -> Person:
    return draw_person(
        np.random.default_rng([options.seed, _IDENTITY_STREAM[options.split], identity])
    )


def make_scene(options: SyntheticOptions, index: int) -> tuple[world.Scene, np.random.Generator]:
    """The scene of a clip, and the generator from which its rendering draws next."""
    rng = np.random.default_rng([options.seed, _CLIP_STREAM[options.split], index])
    identity = int(rng.integers(options.identities))
    person = _person(options, identity)
    draw = world.draw_dialogue_scene if rng.random() < _DIALOGUE_SHARE else world.draw_monologue
    return draw(rng, identity, person), rng


def _openface_text(rng: np.random.Generator, film: world.Film) -> str:
    """OpenFace csv of the clip, in one of the two header styles."""
    tracks = [film.track] if film.background_track is None else [film.track, film.background_track]
    return format_openface(measure(rng, tracks, fps=world.FPS), spaced=bool(rng.random() < 0.5))


def compose_reason(scene: world.Scene, fer: FerAnnotation | None) -> str:
    """A reason in the paper's order: at most two facial clues, the words, the conclusion."""
    pronoun, kind = ("She", "woman") if scene.person.woman else ("He", "man")
    if fer is not None:
        clues = " and ".join(phrase.lower() for phrase in fer.phrases[:2])
        face = f"The {kind}'s face shows {clues}."
    else:
        face = f"The {kind}'s face stays still."
    words = f"The words sound {TONE[scene.words_emotion]}."
    cause = f" because of {scene.event}" if scene.event else ""
    return f"{face} {words} {pronoun} feels {scene.emotion}{cause}."


def make_record(options: SyntheticOptions, index: int) -> Record:
    """One clip of the corpus as a Record with its mp4 inside."""
    scene, rng = make_scene(options, index)
    film = world.film(rng, scene)
    faces = read_openface(_openface_text(rng, film))
    annotation = annotate_fer(faces, scene.emotion, FerOptions())
    fer = annotation if isinstance(annotation, FerAnnotation) else None
    dialogue = bool(scene.conversation)
    labels: dict[Task, bool] = {
        Task.MSA: not dialogue or rng.random() < 0.5,
        Task.ER: True,
        Task.FER: fer is not None,
        Task.ERI: not dialogue and bool(rng.random() < _REASON_SHARE),
        Task.ECPE: scene.pairs is not None,
    }
    return Record(
        key=f"syn-{options.split}-{index:06d}",
        source="synthetic",
        split=options.split,
        utterance=scene.utterance,
        speaker=scene.conversation[scene.target - 1].speaker if dialogue else "",
        conversation=scene.conversation,
        target=scene.target,
        sentiment=scene.sentiment if labels[Task.MSA] else None,
        emotion=scene.emotion,
        expressions=fer.phrases if fer is not None else None,
        reason=compose_reason(scene, fer) if labels[Task.ERI] else None,
        pairs=scene.pairs,
        tasks=tuple(task for task in TASKS if labels[task]),
        num_frames=len(film.frames),
        peak_frame=fer.peak_frame if fer is not None else None,
        notes={
            "identity": f"{options.split}-{scene.identity:04d}",
            "words": scene.words,
            "words_emotion": scene.words_emotion,
            "still_face": not scene.units,
            "two_faces": scene.background_person is not None,
        },
        media=Video(mp4=encode_mp4(film.frames, fps=world.FPS)),
    )


def synthetic_items(options: SyntheticOptions) -> Iterator[RecordFactory]:
    """One item per clip, in order."""
    return (partial(make_record, options, index) for index in range(options.clips))


# ----------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `emoverse build synthetic`."""
    add = parser.add_argument
    add("--clips", type=int, default=1000, help="number of clips (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the corpus (default: %(default)s)")
    add("--split", choices=SPLITS, default="train", help="people differ between splits")
    add("--identities", type=int, default=400, help="number of people (default: %(default)s)")


def open_source(args: argparse.Namespace) -> Source:
    """The corpus that the arguments describe."""
    options = SyntheticOptions(
        clips=args.clips, seed=args.seed, split=args.split, identities=args.identities
    )
    return Source(
        items=synthetic_items(options),
        total=options.clips,
        provenance={
            "source": "synthetic",
            "clips": options.clips,
            "seed": options.seed,
            "split": options.split,
            "identities": options.identities,
        },
    )
