"""From a step of the plan to this rank's samples; every step is a pure function of its index.

(1) plan     `sampler.share(step)`: this rank's positions and the (record, task) at each
(2) read     `reader.read(shard, slot)`: the bytes of one record, checksum verified
(3) decode   only the frames that the task's view shows
(4) Sample   record, task and uint8 frames [F, H, W, 3] at the model's size, ready to encode

`stream[step]` does all of it. `emoverse/data/pipeline.py` packs samples before their frames are
decoded; it calls `read(step)`, then `decode` with the memory for each sample's frames.
A damaged record is a value, `Damage`. `substitute` replaces it by the plan's next record of the
same task, or raises DamagedSample if the config forbids that.
Nothing is kept between steps: any order of steps, in any process, gives the same samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from data_shards.media.pixels import jpeg_decode_into, resize_frame, tile_image
from data_shards.media.video import clip_indices, decode_frames
from data_shards.plan.plan import Placement
from data_shards.plan.sampler import Slot, WeightedTaskSampler
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import DamagedRecord, ShardReader
from data_shards.shards.record import Frames, Record
from data_shards.tasks import Task

View = Literal["clip", "peak"]
OnDamage = Literal["stop", "replace"]

AHEAD_SAMPLES: Final = 512  # positions ahead for which remote shards are requested
MAX_ATTEMPTS: Final = 16  # substitutes tried for one position before the run stops


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewOptions:
    """Which frames are decoded, and to what size."""

    num_frames: int  # frames of a clip view
    image_size: int  # height and width of a frame in pixels
    visual: Literal["video", "peak_frame"] = "video"  # peak_frame: one frame where a record has it
    resize: Literal["exact", "fast"] = "exact"  # of clip views: Pillow's pixels, or libswscale's
    peak_tiles: int = 1  # of a peak view, at most, and a thumbnail; 1: one resize

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.image_size < 1:
            raise ValueError(
                "num_frames and image_size must be at least 1, found "
                f"{self.num_frames} and {self.image_size}"
            )
        if self.peak_tiles < 1:
            raise ValueError(f"peak_tiles must be at least 1, found {self.peak_tiles}")
        if self.visual not in ("video", "peak_frame"):
            raise ValueError(f"visual must be 'video' or 'peak_frame', found {self.visual!r}")
        if self.resize not in ("exact", "fast"):
            raise ValueError(f"resize must be 'exact' or 'fast', found {self.resize!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A record that cannot be used: its position in the plan, its place on disk, and the cause."""

    position: int
    task: Task
    shard: str
    key: str
    offset: int
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One record with exactly one task, at its position in the plan."""

    position: int
    task: Task
    record: Record
    view: View
    frames: NDArray[np.uint8] | None  # F H W 3, tiles of a peak; None: not wanted or not decoded
    undecoded: int = 0  # F, if frames are wanted and not decoded yet
    placement: Placement | None = None  # of the plan's record, or of its substitute
    quarantine: tuple[Damage, ...] = ()  # damaged records that this one replaces, in order

    @property
    def replaced(self) -> int:
        """How many substitutes were tried; 0 for the plan's own record."""
        return len(self.quarantine)


class DamagedSample(ValueError):
    """A position of the plan that has no intact record."""

    def __init__(self, damage: Damage, advice: str) -> None:
        super().__init__(
            f"position {damage.position} (task {damage.task}): record {damage.key} in "
            f"{damage.shard} at byte {damage.offset} is damaged: {damage.cause}; {advice}"
        )
        self.damage = damage
        self.advice = advice

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by its fields; the default would pass the message only."""
        return DamagedSample, (self.damage, self.advice)


def view_of(record: Record, task: Task, options: ViewOptions) -> View:
    """FER shows the peak frame, the other tasks the clip; `visual: peak_frame` prefers the peak.

    A record of a single frame is a still image for every task, never a clip of equal frames.
    """
    if isinstance(record.media, Frames):
        has_peak = record.media.peak_jpeg is not None
    else:
        has_peak = record.peak_frame is not None
    prefers_peak = task is Task.FER or options.visual == "peak_frame" or record.num_frames == 1
    return "peak" if prefers_peak and has_peak else "clip"


def view_frames(view: View, options: ViewOptions) -> int | None:
    """F of a view; None if it is known only after decoding (tiles depend on the aspect ratio)."""
    if view == "clip":
        return options.num_frames
    return 1 if options.peak_tiles == 1 else None


def decode_view(
    record: Record, view: View, options: ViewOptions, *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Frames of a clip view or tiles of a peak view, uint8 [F, size, size, 3].

    Args:
        out: memory of that shape to decode into, where `view_frames` knows F.

    Raises:
        ValueError: the media are damaged, or hold another number of frames than the view has.
    """
    if isinstance(record.media, Frames):
        jpegs = record.media.jpegs
        if view == "peak":
            assert record.media.peak_jpeg is not None, "a peak view needs a peak frame"
            jpegs = (record.media.peak_jpeg,)
        elif len(jpegs) != options.num_frames:
            raise ValueError(f"{len(jpegs)} extracted frames, the view has {options.num_frames}")
        return _decode_jpegs(jpegs, view, options.image_size, out)
    indices: tuple[int, ...] = clip_indices(record.num_frames, options.num_frames)
    if view == "peak":
        assert record.peak_frame is not None, "a peak view needs a peak frame"
        indices = (record.peak_frame,)
    size = options.image_size
    try:
        if view == "peak" and options.peak_tiles > 1:
            assert out is None, "the number of tiles is not known before decoding"
            peak_1HW3 = decode_frames(record.media.mp4, indices, num_frames=record.num_frames)
            return tile_image(peak_1HW3[0], max_tiles=options.peak_tiles, size=size)
        return decode_frames(
            record.media.mp4,
            indices,
            num_frames=record.num_frames,
            size=size if options.resize == "fast" else None,
            scale=None if options.resize == "fast" else lambda frame: resize_frame(frame, size),
            out=out,
        )
    except ValueError as error:
        raise ValueError(f"mp4: {error}") from error


def _decode_jpegs(
    jpegs: Sequence[bytes], view: View, size: int, out: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """Stored frames, decoded into `out` if it is given: uint8 [F, size, size, 3]."""
    frames = np.empty((len(jpegs), size, size, 3), dtype=np.uint8) if out is None else out
    for index, jpeg in enumerate(jpegs):
        try:
            jpeg_decode_into(jpeg, frames[index])
        except ValueError as error:
            member = "peak.jpg" if view == "peak" else f"f{index}.jpg"
            raise ValueError(f"{member}: {error}") from error
    return frames


def require_view(index: ShardIndex, options: ViewOptions) -> None:
    """Raise ValueError if the folder stores extracted frames that do not fit the view."""
    stored = index.options
    if stored.get("frames") == "extracted" and stored["frames_per_clip"] != options.num_frames:
        raise ValueError(
            f"frames_per_clip: shard folder {index.source} stores {stored['frames_per_clip']} "
            f"extracted frames per clip, found {options.num_frames}; set it to "
            f"{stored['frames_per_clip']} or build the folder again"
        )
    if stored.get("frames") == "extracted" and options.peak_tiles > 1:
        raise ValueError(
            f"peak_tiles: shard folder {index.source} stores extracted frames of the model's size, "
            f"which have no more detail for tiles, found {options.peak_tiles}; set it to 1 or "
            "build the folder with frames: video"
        )


def _no_report(record: str) -> None:
    """The default of `StepStream.report`: nobody listens."""


class StepStream:
    """Map from step to this rank's samples; `stream[step]` is a pure function of the step.

    Args:
        wants_frames: asked with (key, view) before decoding; False leaves `Sample.frames` None
            (cached features, blank frames).

    Attributes:
        report: called with the record that is being read or decoded, for error messages.

    Raises:
        ValueError: from the constructor if the shard folder cannot serve the view.
        DamagedSample: from a step, with position, task, shard, key, offset and cause.
    """

    def __init__(
        self,
        sampler: WeightedTaskSampler,
        reader: ShardReader,
        view: ViewOptions,
        *,
        on_damage: OnDamage = "stop",
        wants_frames: Callable[[str, View], bool] | None = None,
    ) -> None:
        if on_damage not in ("stop", "replace"):
            raise ValueError(f"on_damage must be 'stop' or 'replace', found {on_damage!r}")
        require_view(reader.index, view)
        self.sampler = sampler
        self.reader = reader
        self.view = view
        self.on_damage = on_damage
        self.wants_frames = wants_frames
        self.report: Callable[[str], object] = _no_report
        self._prefetched = 0  # the shards of all positions before this one were requested

    def __len__(self) -> int:
        return self.sampler.num_steps

    def __getitem__(self, step: int) -> list[Sample]:
        return [self.complete(sample) for sample in self.read(step)]

    def read(self, step: int) -> list[Sample]:
        """The samples of a step, records read and verified, frames not decoded yet."""
        if not 0 <= step < len(self):
            raise IndexError(f"step must be 0..{len(self) - 1}, found {step}")
        share = self.sampler.share(step)
        if self.reader.index.places is not None:
            self._prefetch(step, share)
        return [self._sample(slot.position, slot.placement) for slot in share]

    def decode(
        self, sample: Sample, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8] | Damage:
        """The frames [F, size, size, 3] of a sample that has none yet, in `out` if it is given.

        Returns Damage if the media are damaged; the content of `out` is then undefined.
        """
        placement = sample.placement
        assert sample.undecoded and placement is not None
        self._report(sample.position, placement)
        return self._decode(sample.record, sample.view, sample.position, placement, out)

    def substitute(self, sample: Sample, damage: Damage) -> Sample:
        """The next intact record of the plan for the position of a damaged sample.

        Its frames are not decoded yet, and may be more or fewer than those of `sample`.

        Raises:
            DamagedSample: `on_damage` is "stop", or no substitute is left.
        """
        quarantine = (*sample.quarantine, damage)
        return self._sample(sample.position, self._next_placement(quarantine), quarantine)

    def complete(self, sample: Sample) -> Sample:
        """The sample with its frames decoded, or its first substitute whose frames decode."""
        while sample.undecoded:
            frames = self.decode(sample)
            if isinstance(frames, Damage):
                sample = self.substitute(sample, frames)
            else:
                sample = replace(sample, frames=frames, undecoded=0)
        return sample

    def _prefetch(self, step: int, share: Sequence[Slot]) -> None:
        """Request the shards of this step and of the next ones, in the order of the plan.

        The next ones are those of all ranks, which share the cache of their machine. This saves
        time and changes no sample.
        """
        plan = self.sampler.stage_plan
        shards = dict.fromkeys(slot.placement.shard for slot in share)
        first = step * self.sampler.global_batch_size
        stop = min(first + max(AHEAD_SAMPLES, 2 * self.sampler.global_batch_size), plan.num_samples)
        begin = self._prefetched if first <= self._prefetched <= stop else first
        shards.update(dict.fromkeys(plan.at(position).shard for position in range(begin, stop)))
        self._prefetched = stop
        self.reader.expect(shards)

    def _sample(
        self, position: int, placement: Placement, quarantine: tuple[Damage, ...] = ()
    ) -> Sample:
        """The sample at a position, or the first substitute whose record is intact."""
        sample = self._read(position, placement, quarantine)
        while isinstance(sample, Damage):
            quarantine = (*quarantine, sample)
            sample = self._read(position, self._next_placement(quarantine), quarantine)
        return sample

    def _next_placement(self, quarantine: tuple[Damage, ...]) -> Placement:
        """The plan's substitute after all damaged records that stood at a position."""
        damage, attempt = quarantine[-1], len(quarantine)
        if self.on_damage == "stop":
            raise DamagedSample(
                damage,
                "set data.on_damage to 'replace' to train on without it, or build the shards again",
            )
        if attempt > MAX_ATTEMPTS:
            raise DamagedSample(
                damage, f"{MAX_ATTEMPTS} substitutes are damaged too; build the shards again"
            )
        try:
            return self.sampler.stage_plan.substitute(damage.position, attempt)
        except ValueError as error:  # no record of the task is left
            raise DamagedSample(damage, str(error)) from error

    def _read(
        self, position: int, placement: Placement, quarantine: tuple[Damage, ...]
    ) -> Sample | Damage:
        """The sample of one record. Frames whose number only decoding tells are decoded here."""
        self._report(position, placement)
        try:
            record = self.reader.read(placement.shard, placement.slot)
        except DamagedRecord as error:
            return _damage(position, placement, error)
        view = view_of(record, placement.task, self.view)
        wanted = self.wants_frames is None or self.wants_frames(record.key, view)
        num_frames = view_frames(view, self.view) if wanted else 0
        frames = None
        if num_frames is None:
            decoded = self._decode(record, view, position, placement)
            if isinstance(decoded, Damage):
                return decoded
            frames = decoded
        return Sample(
            position=position,
            task=placement.task,
            record=record,
            view=view,
            frames=frames,
            undecoded=num_frames or 0,
            placement=placement,
            quarantine=quarantine,
        )

    def _decode(
        self,
        record: Record,
        view: View,
        position: int,
        placement: Placement,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8] | Damage:
        try:
            return decode_view(record, view, self.view, out=out)
        except ValueError as error:
            located = self.reader.damaged(placement.shard, placement.slot, str(error))
            return _damage(position, placement, located)

    def _report(self, position: int, placement: Placement) -> None:
        index = self.reader.index
        key, tar = index.key(placement.shard, placement.slot), index.shards[placement.shard].name
        self.report(f"record {key} in {tar}, position {position}")


def _damage(position: int, placement: Placement, error: DamagedRecord) -> Damage:
    return Damage(
        position=position,
        task=placement.task,
        shard=error.shard,
        key=error.key,
        offset=error.offset,
        cause=error.cause,
    )
