"""Video bytes to frames and back: the only file that knows PyAV.

In: the bytes of one mp4 and the wanted frame numbers (0-based rank by presentation time).
Out: uint8 RGB frames [F, H, W, 3] at the clip's own size. Decoding uses one thread (decoder threads
inside data workers can hang) and skips packets that no wanted frame needs; what it returns is
bit-identical to decoding every packet. Flow: reader (bytes) -> here -> pixels (resize).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import av.container
import av.error
import av.packet
import av.video.codeccontext
import av.video.frame
import av.video.reformatter
import av.video.stream
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
# PyAV's type stubs make this class generic, at run time it is not.
Packet: TypeAlias = "av.packet.Packet[av.video.stream.VideoStream]"

_NAL_SLICE = 1
_NAL_IDR_SLICE = 5


class DamagedVideo(ValueError):
    """The bytes are not a clip from which the wanted frames can be read intact."""


def clip_indices(num_frames: int, count: int) -> tuple[int, ...]:
    """Frame numbers of a clip: the middles of `count` equal segments, InternVL's rounding.

    `int(seg / 2 + round(seg * i))` with `seg = (num_frames - 1) / count`, round half to even. The
    last frame is never reached by a long clip; a short clip repeats frames.
    """
    if num_frames < 1 or count < 1:
        raise ValueError(
            f"clip_indices: num_frames and count must be at least 1, found {num_frames} and {count}"
        )
    segment = (num_frames - 1) / count
    return tuple(int(segment / 2 + round(segment * i)) for i in range(count))


def encode_mp4(
    frames: Frame | Iterable[Frame],
    fps: int | Fraction,
    crf: int = 18,
    *,
    gop: int = 24,
    b_frames: int = 2,
) -> bytes:
    """H.264 yuv420p mp4 from uint8 RGB frames [H, W, 3]; the same frames give the same bytes.

    `frames` may be a lazy iterable, only one frame is held at a time. `gop` is the most frames
    between two keyframes, `b_frames` the most non-keyframes that are predicted from both sides.

    Raises:
        ValueError: no frame, an odd or changing size, or another dtype than uint8.
    """
    buffer = io.BytesIO()
    options = {"fflags": "+bitexact"}  # no encoder names with versions, no times in the header
    stream: av.video.stream.VideoStream | None = None
    shape: tuple[int, ...] = ()
    with av.open(buffer, mode="w", format="mp4", container_options=options) as container:
        for rgb_HW3 in frames:
            if stream is None:
                shape = rgb_HW3.shape
                _require_encodable(rgb_HW3)
                stream = _add_h264_stream(container, shape, fps, crf, gop, b_frames)
            elif rgb_HW3.shape != shape:
                raise ValueError(
                    f"encode_mp4: all frames need the shape {shape}, found {rgb_HW3.shape}"
                )
            frame = av.video.frame.VideoFrame.from_ndarray(rgb_HW3, format="rgb24")
            # Converted here, on one thread; left to the encoder it would use all cores.
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        if stream is None:
            raise ValueError("encode_mp4: a clip needs at least one frame, found none")
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _require_encodable(rgb_HW3: Frame) -> None:
    """yuv420p halves both colour axes, hence even sizes only."""
    shape = rgb_HW3.shape
    is_rgb = rgb_HW3.dtype == np.uint8 and len(shape) == 3 and shape[2] == 3
    if not is_rgb or shape[0] % 2 or shape[1] % 2:
        raise ValueError(
            "encode_mp4: frames must be uint8 [H, W, 3] with even H and W, "
            f"found {rgb_HW3.dtype} {list(shape)}"
        )


def _add_h264_stream(
    container: av.container.OutputContainer,
    shape: tuple[int, ...],
    fps: int | Fraction,
    crf: int,
    gop: int,
    b_frames: int,
) -> av.video.stream.VideoStream:
    # Macroblock tree reads memory it has not written and approximates reciprocals: other bytes from
    # run to run and from processor to processor.
    options = {"crf": str(crf), "preset": "veryfast", "mbtree": "0"}
    stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
    assert isinstance(stream, av.video.stream.VideoStream)
    stream.height, stream.width = shape[0], shape[1]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = 1  # x264 output depends on the number of threads
    context.gop_size = gop
    context.max_b_frames = b_frames
    return stream


def cut_clip(
    path: Path, start_s: float, end_s: float | None, *, copy: bool, crf: int = 18
) -> bytes:
    """The frames shown in [start_s, end_s) of a longer video as an mp4 without sound.

    start_s, end_s: seconds from the first frame; a negative start counts as 0, end None = the rest.
    copy: copy the packets instead of encoding. The packets from the keyframe before the start come
        along and an edit list hides them. At the end a few frames too many may be shown: those to
        which frames inside the span refer.

    Raises:
        DamagedVideo: unreadable, or no frame is shown in the span.
        FileNotFoundError: no such file.
    """
    try:
        with av.open(str(path), mode="r") as container:
            if not container.streams.video:
                raise DamagedVideo("the file has no video track")
            stream = container.streams.video[0]
            base, first = stream.time_base or Fraction(1), stream.start_time or 0
            # Times are rounded to the nearest tick, so that a frame's own time is inside the span.
            begin = first + round(max(0.0, start_s) / base)
            end = None if end_s is None else first + round(end_s / base)
            container.seek(begin, stream=stream)  # to the last keyframe not after it
            if copy:
                return _copy_span(container, stream, begin, end)
            rate = stream.average_rate or Fraction(25)
            return encode_mp4(_decode_span(container, stream, begin, end), rate, crf)
    except FileNotFoundError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise DamagedVideo(f"cannot cut the video: {error}") from error
    except DamagedVideo as error:
        span = f"{start_s:.3f} to {'the end' if end_s is None else f'{end_s:.3f}'} s"
        raise DamagedVideo(f"{span}: {error}") from error


def _decode_span(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    begin: int,
    end: int | None,
) -> Iterator[Frame]:
    stream.thread_type = "NONE"
    reformatter = av.video.reformatter.VideoReformatter()
    shown = False
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts < begin:
            continue
        if end is not None and frame.pts >= end:
            break
        if frame.is_corrupt:
            raise DamagedVideo(f"the frame at time stamp {frame.pts} is corrupt")
        rgb_HW3 = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        even_H, even_W = (size - size % 2 for size in rgb_HW3.shape[:2])
        yield np.ascontiguousarray(rgb_HW3[:even_H, :even_W]).astype(np.uint8, copy=False)
        shown = True
    if not shown:
        raise DamagedVideo("no frame is shown there")


def _copy_span(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    begin: int,
    end: int | None,
) -> bytes:
    buffer = io.BytesIO()
    shown, nal = False, _avc_length_bytes(stream.codec_context)
    with av.open(
        buffer, mode="w", format="mp4", container_options={"fflags": "+bitexact"}
    ) as output:
        target = output.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.pts is None or packet.dts is None or packet.size == 0:
                continue
            if end is not None and packet.dts >= end:
                break
            if end is not None and packet.pts >= end and not _slice_kinds(packet, nal).is_reference:
                continue
            shown = shown or (begin <= packet.pts and (end is None or packet.pts < end))
            packet.pts, packet.dts = packet.pts - begin, packet.dts - begin
            packet.stream = target
            output.mux(packet)
    if not shown:
        raise DamagedVideo("no frame is shown there")
    return buffer.getvalue()


def count_frames(mp4: bytes) -> int:
    """Number of frames that decoding shows; reads packets only.

    Raises:
        DamagedVideo: not a video, no video track, or cut short.
    """
    try:
        with av.open(io.BytesIO(mp4), mode="r") as container:
            return len(_Packets.demux(container).shown)
    except av.error.FFmpegError as error:
        raise DamagedVideo(f"cannot read the video: {error}") from error


def decode_frames(mp4: bytes, indices: Sequence[int]) -> Frame:
    """The frames `indices` (any order, repeats allowed) as uint8 RGB [F, H, W, 3].

    Raises:
        DamagedVideo: unreadable or cut short, fewer frames than asked, or a frame the decoder
            marks as corrupt.
        ValueError: an empty list or a negative number.
    """
    if len(indices) == 0 or min(indices) < 0:
        raise ValueError(f"decode_frames: need frame numbers of 0 or more, found {list(indices)}")
    wanted = sorted(set(indices))
    try:
        with av.open(io.BytesIO(mp4), mode="r") as container:
            packets = _Packets.demux(container)
            num_frames = len(packets.shown)
            if wanted[-1] >= num_frames:
                raise DamagedVideo(f"frame {wanted[-1]} asked, the video has {num_frames} frames")
            wanted_pts = {packets.shown[j] for j in wanted}
            found = _decode_skipping(packets, wanted_pts)
            if found is None:
                found = _decode_linear(packets, wanted_pts)
    except av.error.FFmpegError as error:
        raise DamagedVideo(f"cannot decode the video: {error}") from error
    by_rank = {j: found.get(packets.shown[j]) for j in wanted}
    missing = [j for j, image in by_rank.items() if image is None]
    if missing:
        raise DamagedVideo(f"frames {missing} of {num_frames} did not come out of the decoder")
    images = [image for j in indices if (image := by_rank[j]) is not None]
    if any(image.shape != images[0].shape for image in images):
        raise DamagedVideo("the picture size changes inside the clip")
    return np.stack(images)


@dataclass(frozen=True, slots=True)
class _Packets:
    """All packets of the video track in decode order, and the times at which frames are shown."""

    context: av.video.codeccontext.VideoCodecContext
    packets: tuple[Packet, ...]
    pts: tuple[int, ...]  # time stamp of each packet
    shown: tuple[int, ...]  # sorted time stamps of the packets that are shown: frame j is shown[j]

    @classmethod
    def demux(cls, container: av.container.InputContainer) -> _Packets:
        if not container.streams.video:
            raise DamagedVideo("the file has no video track")
        stream = container.streams.video[0]
        packets = tuple(p for p in container.demux(stream) if p.size > 0)
        if any(p.is_corrupt for p in packets):
            raise DamagedVideo("the file is cut short: a packet is incomplete")
        # Packets outside the edit list are decoded (others may need them) but never shown.
        shown = [p.pts for p in packets if not p.is_discard and p.pts is not None]
        pts = tuple(p.pts for p in packets if p.pts is not None)
        if not shown or len(pts) < len(packets):
            raise DamagedVideo("the video track is empty or has packets without a time stamp")
        if len(set(pts)) < len(pts):
            raise DamagedVideo("two frames of the video have the same time stamp")
        context = stream.codec_context
        context.thread_type = "NONE"  # decoder threads in data workers can hang
        context.thread_count = 1
        return cls(context, packets, pts, tuple(sorted(shown)))


class _Decoder:
    """One single-threaded decoder that keeps the frames with wanted time stamps as RGB."""

    def __init__(self, context: av.video.codeccontext.VideoCodecContext, wanted: set[int]) -> None:
        self.found: dict[int, Frame] = {}
        self.fault = ""  # first sign that the frames are not what the video shows
        self._context = context
        self._wanted = wanted
        self._last_pts: int | None = None
        self._reformatter = av.video.reformatter.VideoReformatter()  # one scaler for all frames

    def feed(self, packet: Packet | None) -> None:
        """Decode one packet; None drains the decoder and makes it ready for a new start."""
        for frame in self._context.decode(packet):
            self._check(frame)
            if frame.pts in self._wanted:
                rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
                self.found[frame.pts] = rgb.to_ndarray().astype(np.uint8, copy=False)
        if packet is None:
            self._context.flush_buffers()

    def _check(self, frame: av.video.frame.VideoFrame) -> None:
        """A broken reference spoils the frames after it, so unwanted frames are checked too."""
        if frame.is_corrupt and not self.fault:
            self.fault = f"the frame at time stamp {frame.pts} is corrupt"
        # Decoders put out pictures in the order in which they are shown.
        if frame.pts is None or (self._last_pts is not None and frame.pts <= self._last_pts):
            self.fault = self.fault or "the time stamps do not follow the order of the pictures"
        self._last_pts = frame.pts


def _decode_linear(packets: _Packets, wanted: set[int]) -> dict[int, Frame]:
    """Time stamp -> frame from decoding every packet; the truth that skipping must meet."""
    decoder = _Decoder(packets.context, wanted)
    for packet in packets.packets:
        decoder.feed(packet)
    decoder.feed(None)
    if decoder.fault:
        raise DamagedVideo(decoder.fault)
    return decoder.found


def _decode_skipping(packets: _Packets, wanted: set[int]) -> dict[int, Frame] | None:
    """Decode only the packets that wanted frames need; None if that cannot be done exactly.

    Groups of pictures (GOPs) are independent when each starts with an IDR picture and shows nothing
    before it. Inside one, a picture that no other refers to is dropped unless wanted, and decoding
    stops behind the last wanted packet.
    """
    length_bytes = _avc_length_bytes(packets.context)
    if length_bytes == 0:
        return None
    kinds = [_slice_kinds(p, length_bytes) for p in packets.packets]
    starts = [i for i, p in enumerate(packets.packets) if p.is_keyframe]
    if not starts or starts[0] != 0 or not all(kinds[i].is_idr for i in starts):
        return None
    gops = list(zip(starts, [*starts[1:], len(kinds)], strict=True))
    for start, end in gops:
        if min(packets.pts[start:end]) < packets.pts[start]:  # open GOP
            return None
    decoder = _Decoder(packets.context, wanted)
    for start, end in gops:
        targets = [i for i in range(start, end) if packets.pts[i] in wanted]
        if not targets:
            continue
        for i in range(start, targets[-1] + 1):
            if kinds[i].is_reference or packets.pts[i] in wanted:
                decoder.feed(packets.packets[i])
        decoder.feed(None)
    return decoder.found if len(decoder.found) == len(wanted) and not decoder.fault else None


def _avc_length_bytes(context: av.video.codeccontext.VideoCodecContext) -> int:
    """Bytes of the length in front of each NAL unit; 0 if this is not H.264 in mp4 (avcC)."""
    extradata = context.extradata
    if context.name != "h264" or extradata is None or len(extradata) < 5 or extradata[0] != 1:
        return 0
    return (extradata[4] & 3) + 1


@dataclass(frozen=True, slots=True)
class _SliceKinds:
    is_idr: bool
    is_reference: bool


def _slice_kinds(packet: Packet, length_bytes: int) -> _SliceKinds:
    """What the slices of a packet are; a packet that cannot be walked counts as a reference.

    libavformat's own `is_disposable` is not set for these files, so bits 5 and 6 (nal_ref_idc) of
    each slice's first byte are read (ISO/IEC 14496-10, 7.3.1).
    """
    data = bytes(packet)
    is_idr = is_reference = has_slice = False
    at = 0
    while at + length_bytes < len(data):
        size = int.from_bytes(data[at : at + length_bytes], "big")
        at += length_bytes
        kind = data[at] & 31
        if 1 <= kind <= _NAL_IDR_SLICE:
            has_slice = True
            is_idr = is_idr or kind == _NAL_IDR_SLICE
            is_reference = is_reference or kind != _NAL_SLICE or (data[at] & 0x60) != 0
        at += size
    return _SliceKinds(is_idr, is_reference or not has_slice or at != len(data))
