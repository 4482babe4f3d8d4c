"""The whole way of a rank's samples, composed; every step is a pure function of its number.

(1) plan     `sampler.share(step)`: which (record, task) stand at which positions, this rank's share
(2) read     `reader.read(shard, slot)`: one record's bytes, checksum verified
(3) decode   only now, only the frames that the task's view needs, and none that nobody wants
(4) Sample   record, task and uint8 frames [F, H, W, 3] at the model's size, ready to encode

`stream[step]` does all of it. Who knows only after (2) where frames should lie, a data worker that
packs samples into shared memory, asks for `read(step)` and has each sample decoded to its place.
A damaged record stops the run, or its position goes to the plan's next substitute of the same task.
Nothing is kept between steps: workers hold no state, any order of steps gives the same samples.
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

AHEAD_SAMPLES: Final = 512  # of the plan, for which remote shards are fetched ahead
MAX_ATTEMPTS: Final = 16  # substitutes tried for one position before the run stops


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewOptions:
    """What decoding needs to know."""

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
    """A record that was passed over: where it stood in the plan and on disk, and why."""

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
    frames: NDArray[np.uint8] | None  # F H W 3, of a peak its tiles; None: not wanted, or waiting
    waiting: int = 0  # F, if frames are wanted and not decoded yet
    placement: Placement | None = None  # what the plan says, or its substitute
    quarantine: tuple[Damage, ...] = ()  # damaged records that stood here before

    @property
    def replaced(self) -> int:
        """How many substitutes it took; 0 is the plan's own record."""
        return len(self.quarantine)


class DamagedSample(ValueError):
    """A position of the plan that cannot be filled."""

    def __init__(self, damage: Damage, advice: str) -> None:
        super().__init__(
            f"position {damage.position} (task {damage.task}): record {damage.key} in "
            f"{damage.shard} at byte {damage.offset} is damaged: {damage.cause}; {advice}"
        )
        self.damage = damage
        self.advice = advice

    def __reduce__(self) -> tuple[Any, ...]:
        """Crosses from data workers by its fields; the default would pass the message only."""
        return DamagedSample, (self.damage, self.advice)


def view_of(record: Record, task: Task, options: ViewOptions) -> View:
    """FER looks at the peak frame, the other tasks at the clip; `peak_frame` prefers the peak.

    A record of a single frame is a still image for every task, never a clip of equal frames.
    """
    if isinstance(record.media, Frames):
        has_peak = record.media.peak_jpeg is not None
    else:
        has_peak = record.peak_frame is not None
    prefers_peak = task is Task.FER or options.visual == "peak_frame" or record.num_frames == 1
    return "peak" if prefers_peak and has_peak else "clip"


def view_frames(view: View, options: ViewOptions) -> int | None:
    """F of a view, None if only decoding can tell: tiles follow the picture's aspect ratio."""
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
            assert out is None, "nobody knows beforehand how many tiles there will be"
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
    """Stored frames, straight into their places: uint8 [F, size, size, 3]."""
    frames = np.empty((len(jpegs), size, size, 3), dtype=np.uint8) if out is None else out
    for number, jpeg in enumerate(jpegs):
        try:
            jpeg_decode_into(jpeg, frames[number])
        except ValueError as error:
            member = "peak.jpg" if view == "peak" else f"f{number}.jpg"
            raise ValueError(f"{member}: {error}") from error
    return frames


def require_view(index: ShardIndex, options: ViewOptions) -> None:
    """Raise ValueError if the folder stores extracted frames that cannot serve the view."""
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


def _nobody_watches(record: str) -> None:
    """Takes the name of the record that is worked on; a data worker has a better use for it."""


class StepStream:
    """Map from step to this rank's samples; `stream[step]` is a pure function of the step.

    Args:
        wants_frames: asked with (key, view) before decoding; False leaves `Sample.frames` None
            (cached features, blank frames).

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
        self._expected = 0  # positions before this one were looked at for shards to fetch
        self.watch: Callable[[str], object] = _nobody_watches

    def __len__(self) -> int:
        return self.sampler.num_steps

    def __getitem__(self, step: int) -> list[Sample]:
        samples = self.read(step)
        for number, sample in enumerate(samples):
            while sample.waiting:
                sample = self.decode(sample)
            samples[number] = sample
        return samples

    def read(self, step: int) -> list[Sample]:
        """The samples of a step with their frames `waiting`: records are read and verified."""
        if not 0 <= step < len(self):
            raise IndexError(f"step must be 0..{len(self) - 1}, found {step}")
        share = self.sampler.share(step)
        if self.reader.index.places is not None:
            self._expect(step, share)
        return [self._sample(slot.position, slot.placement) for slot in share]

    def decode(self, sample: Sample, out: NDArray[np.uint8] | None = None) -> Sample:
        """A waiting sample with its frames, in `out` if that is given.

        If its media are damaged, the substitute for its position, which waits for its own frames
        and may have other ones; `out` is then rubbish.
        """
        placement = sample.placement
        assert sample.waiting and placement is not None
        self._say(sample.position, placement)
        try:
            frames = self._frames(sample.record, sample.view, placement, out)
        except DamagedRecord as error:
            instead = self._pass_over(sample.position, placement, sample.quarantine, error)
            return self._sample(sample.position, *instead)
        return replace(sample, frames=frames, waiting=0)

    def _expect(self, step: int, share: Sequence[Slot]) -> None:
        """Have the shards of this step and of the next ones fetched, in the order of the plan.

        The next ones are those of all ranks: they share the cache of their machine. What was
        looked at already is not looked at again; this only saves time, it changes no sample.
        """
        plan = self.sampler.stage_plan
        shards = dict.fromkeys(slot.placement.shard for slot in share)
        first = step * self.sampler.global_batch_size
        stop = min(first + max(AHEAD_SAMPLES, 2 * self.sampler.global_batch_size), plan.num_samples)
        begin = self._expected if first <= self._expected <= stop else first
        shards.update(dict.fromkeys(plan.at(position).shard for position in range(begin, stop)))
        self._expected = stop
        self.reader.expect(shards)

    def _sample(
        self, position: int, placement: Placement, quarantine: tuple[Damage, ...] = ()
    ) -> Sample:
        """The sample at a position, or the first substitute with an intact record."""
        while True:
            try:
                return self._read(position, placement, quarantine)
            except DamagedRecord as error:
                placement, quarantine = self._pass_over(position, placement, quarantine, error)

    def _pass_over(
        self,
        position: int,
        placement: Placement,
        quarantine: tuple[Damage, ...],
        error: DamagedRecord,
    ) -> tuple[Placement, tuple[Damage, ...]]:
        """What stands at a position instead of a damaged record, and all that stood there."""
        damage = Damage(
            position=position,
            task=placement.task,
            shard=error.shard,
            key=error.key,
            offset=error.offset,
            cause=error.cause,
        )
        return self._substitute(damage, len(quarantine) + 1), (*quarantine, damage)

    def _substitute(self, damage: Damage, attempt: int) -> Placement:
        """The plan's attempt-th stand-in at a damaged position; DamagedSample if none may come."""
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

    def _say(self, position: int, placement: Placement) -> None:
        index = self.reader.index
        key, tar = index.key(placement.shard, placement.slot), index.shards[placement.shard].name
        self.watch(f"record {key} in {tar}, position {position}")

    def _read(self, position: int, placement: Placement, quarantine: tuple[Damage, ...]) -> Sample:
        self._say(position, placement)
        record = self.reader.read(placement.shard, placement.slot)
        view = view_of(record, placement.task, self.view)
        wanted = self.wants_frames is None or self.wants_frames(record.key, view)
        waiting = view_frames(view, self.view) if wanted else 0
        return Sample(
            position=position,
            task=placement.task,
            record=record,
            view=view,
            frames=self._frames(record, view, placement) if waiting is None else None,
            waiting=waiting or 0,
            placement=placement,
            quarantine=quarantine,
        )

    def _frames(
        self,
        record: Record,
        view: View,
        placement: Placement,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        try:
            return decode_view(record, view, self.view, out=out)
        except ValueError as error:
            raise self.reader.damaged(placement.shard, placement.slot, str(error)) from error
