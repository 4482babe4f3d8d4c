"""Video bytes to frames and back, by PyAV.

In: the bytes of one mp4 and the wanted frame indices (0-based, in presentation order).
Out: uint8 RGB frames [F, H, W, 3] at the clip's own size. Decoding uses one thread (decoder threads
inside data workers can hang) and skips packets on which no wanted frame depends; the result is
bit-identical to decoding every packet. A clip is untrusted input: memory and computation are
bounded, and only mp4 is opened (playlists refer to other files). Flow: reader -> here -> pixels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.error
import av.packet
import av.video.codeccontext
import av.video.frame
import av.video.reformatter
import av.video.stream
import numpy as np

from data_shards.media.mp4 import require_modest_claims

# The error is part of this module's interface.
from data_shards.media.packets import DamagedVideo as DamagedVideo
from data_shards.media.packets import (
    Frame,
    Packets,
    avc_length_bytes,
    decode_linear,
    decode_skipping,
    slice_kinds,
)


def clip_indices(num_frames: int, count: int) -> tuple[int, ...]:
    """Frame indices of a clip: the middles of `count` equal segments, with InternVL's rounding.

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

    `frames` may be a lazy iterable; one frame is in memory at a time. `gop` is the largest distance
    of keyframes, `b_frames` the most consecutive frames that are predicted from both sides.

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
                    f"encode_mp4: all frames must have the shape {shape}, found {rgb_HW3.shape}"
                )
            frame = av.video.frame.VideoFrame.from_ndarray(rgb_HW3, format="rgb24")
            # Converted on one thread; the encoder would convert on all cores.
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        if stream is None:
            raise ValueError("encode_mp4: a clip must have at least one frame, found none")
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _require_encodable(rgb_HW3: Frame) -> None:
    """yuv420p subsamples chroma by two on both axes, so sizes must be even."""
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
    # Macroblock tree reads uninitialized memory and approximates reciprocals: its output differs
    # between runs and between processors.
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
    copy: copy the packets instead of encoding. The packets from the keyframe before the start are
        included and hidden by an edit list. At the end a few frames too many may be shown: those
        that frames inside the span are predicted from.

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
        raise DamagedVideo("no frame is shown in the span")


def _copy_span(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    begin: int,
    end: int | None,
) -> bytes:
    buffer = io.BytesIO()
    shown, nal = False, avc_length_bytes(stream.codec_context)
    with av.open(
        buffer, mode="w", format="mp4", container_options={"fflags": "+bitexact"}
    ) as output:
        target = output.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.pts is None or packet.dts is None or packet.size == 0:
                continue
            if end is not None and packet.dts >= end:
                break
            if end is not None and packet.pts >= end and not slice_kinds(packet, nal).is_reference:
                continue
            shown = shown or (begin <= packet.pts and (end is None or packet.pts < end))
            packet.pts, packet.dts = packet.pts - begin, packet.dts - begin
            packet.stream = target
            output.mux(packet)
    if not shown:
        raise DamagedVideo("no frame is shown in the span")
    return buffer.getvalue()


def count_frames(mp4: bytes) -> int:
    """Number of frames that decoding shows; reads packets only.

    Raises:
        DamagedVideo: not a video, no video track, or cut short.
    """
    with _open_mp4(mp4, "read", probe=False) as container:
        return len(Packets.demux(container).shown)


@contextlib.contextmanager
def _open_mp4(
    mp4: bytes, verb: str, *, probe: bool = True
) -> Iterator[av.container.InputContainer]:
    """Open these bytes with the mp4 demuxer only: other formats can make libav open further files.

    verb: what the caller does with the video, for messages.
    probe: let libav decode the first pictures for parameters that the headers omit, as it does by
        default. Opening without is ten times as fast; the headers of H.264 in mp4 are complete.
    """
    try:
        require_modest_claims(mp4)
    except ValueError as error:
        raise DamagedVideo(str(error)) from error
    options = {} if probe else {"skip_frame": "all"}
    try:
        with av.open(io.BytesIO(mp4), mode="r", format="mp4", options=options) as container:
            yield container
    except (av.error.FFmpegError, UnicodeDecodeError) as error:  # tags need not be valid text
        raise DamagedVideo(f"cannot {verb} the video: {error}") from error


def decode_frames(
    mp4: bytes,
    indices: Sequence[int],
    *,
    num_frames: int | None = None,
    size: int | None = None,
    scale: Callable[[Frame], Frame] | None = None,
    out: Frame | None = None,
) -> Frame:
    """The frames `indices` (any order, repeats allowed) as uint8 RGB [F, H, W, 3].

    Args:
        num_frames: how many frames the video must have.
        size: scale to [size, size] with libswscale's bicubic filter, on the way from YUV to RGB:
            faster than `pixels.resize_frame` and not the same pixels.
        scale: applied to each wanted frame [H, W, 3] as it is decoded, which saves a copy of all
            frames at the clip's own size.
        out: array [F, H, W, 3] for the result; each frame is written to it when it is decoded.
            After an error it may hold some of them.

    Raises:
        DamagedVideo: unreadable, cut short, too few frames, or a frame that the decoder marks as
            corrupt.
        ValueError: an empty list or a negative index.
    """
    if len(indices) == 0 or min(indices) < 0:
        raise ValueError(f"decode_frames: indices must be 0 or more, found {list(indices)}")
    wanted = sorted(set(indices))
    rows: dict[int, int] = {}  # time stamp -> first index in the result

    def keep(pts: int, rgb_HW3: Frame) -> Frame:
        frame = rgb_HW3 if scale is None else scale(rgb_HW3)
        if out is None:
            return frame
        out[rows[pts]] = frame
        return out  # a non-None value: the frame itself is already in `out`

    with _open_mp4(mp4, "decode", probe=False) as container:
        packets = Packets.demux(container)
        _require_frames(packets, wanted[-1], num_frames)
        rows = {packets.shown[j]: indices.index(j) for j in wanted}
        frames = decode_skipping(packets, set(rows), size, keep)
    if frames is None:
        with _open_mp4(mp4, "decode") as container:
            frames = decode_linear(Packets.demux(container), set(rows), size, keep)
    by_index = {j: frames.get(packets.shown[j]) for j in wanted}
    missing = [j for j, image in by_index.items() if image is None]
    if missing:
        raise DamagedVideo(
            f"the decoder did not return the frames {missing} of {len(packets.shown)}"
        )
    if out is None:
        return np.stack([image for j in indices if (image := by_index[j]) is not None])
    for row, j in enumerate(indices):
        first = rows[packets.shown[j]]
        if row != first:
            out[row] = out[first]
    return out


def _require_frames(packets: Packets, last: int, expected: int | None) -> None:
    """Raise DamagedVideo unless the video has `expected` frames, if given, and the frame `last`."""
    actual = len(packets.shown)
    if expected is not None and expected != actual:
        raise DamagedVideo(f"must have {expected} frames, the video has {actual}")
    if last >= actual:
        raise DamagedVideo(f"frame {last} requested, the video has {actual} frames")
