"""Decoding of a few frames of a video track, skipping the packets that they do not depend on.

In: an open mp4 and the time stamps of the wanted frames. Out: these frames as uint8 RGB, or
`DamagedVideo` at the first sign of damage. H.264 packets on which no wanted frame depends are not
decoded; the result is bit-identical to decoding every packet. Flow: video (opens the file) -> here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import av
import av.container
import av.packet
import av.video.codeccontext
import av.video.frame
import av.video.reformatter
import av.video.stream
import numpy as np
from numpy.typing import NDArray

from data_shards.media.pixels import MAX_PIXELS

Frame = NDArray[np.uint8]
Keep = Callable[[int, Frame], Frame]
"""(time stamp, pixels) of a wanted frame -> the array to keep."""

# PyAV's type stubs make this class generic, at run time it is not.
Packet: TypeAlias = "av.packet.Packet[av.video.stream.VideoStream]"

MAX_DECODED_PIXELS: Final = 2**33
"""Most pixels decoded for one clip, about two minutes of one core. Unlike a time limit, this bound
is the same on every machine."""

_NAL_SLICE = 1
_NAL_IDR_SLICE = 5


class DamagedVideo(ValueError):
    """The bytes are not a clip from which the wanted frames can be read intact."""


@dataclass(frozen=True, slots=True)
class Packets:
    """All packets of the video track in decode order, and the time stamps of the shown frames."""

    context: av.video.codeccontext.VideoCodecContext
    packets: tuple[Packet, ...]
    pts: tuple[int, ...]  # time stamp of each packet
    shown: tuple[int, ...]  # sorted time stamps of the packets that are shown: frame j is shown[j]

    @classmethod
    def demux(cls, container: av.container.InputContainer) -> Packets:
        """The packets of the first video track. Raises DamagedVideo if it cannot be decoded."""
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
        if context is None:
            raise DamagedVideo("the codec of the video track is not supported")
        if context.width * context.height > MAX_PIXELS:
            raise DamagedVideo(
                f"the picture has {context.width}x{context.height} pixels, at most {MAX_PIXELS} "
                "are accepted"
            )
        context.options = {"max_pixels": str(MAX_PIXELS)}  # headers inside the stream may differ
        context.thread_type = "NONE"  # decoder threads in data workers can hang
        context.thread_count = 1
        return cls(context, packets, pts, tuple(sorted(shown)))


class Decoder:
    """A single-threaded decoder that keeps the frames with wanted time stamps as RGB."""

    def __init__(
        self,
        context: av.video.codeccontext.VideoCodecContext,
        wanted: set[int],
        size: int | None,
        keep: Keep,
    ) -> None:
        self.frames: dict[int, Frame] = {}  # time stamp -> what `keep` returned
        self.fault = ""  # first sign of damage
        self._context = context
        self._wanted = wanted
        self._size = size
        self._keep = keep
        self._shape: tuple[int, int] | None = None  # of the wanted frames so far
        self._pixels_left = MAX_DECODED_PIXELS
        self._last_pts: int | None = None
        self._reformatter = av.video.reformatter.VideoReformatter()  # one scaler for all frames

    def feed(self, packet: Packet | None) -> None:
        """Decode one packet; None drains and resets the decoder."""
        for frame in self._context.decode(packet):
            self._check(frame)
            if frame.pts in self._wanted:
                if (frame.height, frame.width) != self._shape and self.frames:
                    self.fault = self.fault or "the picture size changes inside the clip"
                self._shape = frame.height, frame.width
                rgb = self._reformatter.reformat(
                    frame,
                    width=self._size,
                    height=self._size,
                    format="rgb24",
                    interpolation=av.video.reformatter.Interpolation.BICUBIC,
                    threads=1,
                )
                rgb_HW3 = rgb.to_ndarray().astype(np.uint8, copy=False)  # a view of `rgb`
                self.frames[frame.pts] = self._keep(frame.pts, rgb_HW3)
        if packet is None:
            self._context.flush_buffers()

    def _check(self, frame: av.video.frame.VideoFrame) -> None:
        """Check a frame, also an unwanted one: frames after it may be predicted from it."""
        self._pixels_left -= frame.width * frame.height
        if self._pixels_left < 0:
            raise DamagedVideo(
                f"more than {MAX_DECODED_PIXELS} pixels would have to be decoded for one clip"
            )
        if frame.is_corrupt and not self.fault:
            self.fault = f"the frame at time stamp {frame.pts} is corrupt"
        # Decoders return pictures in presentation order.
        if frame.pts is None or (self._last_pts is not None and frame.pts <= self._last_pts):
            self.fault = self.fault or "the time stamps do not follow the order of the pictures"
        self._last_pts = frame.pts


def decode_linear(
    packets: Packets,
    wanted: set[int],
    size: int | None,
    keep: Keep,
) -> dict[int, Frame]:
    """Time stamp -> frame, by decoding every packet: the reference for `decode_skipping`."""
    decoder = Decoder(packets.context, wanted, size, keep)
    for packet in packets.packets:
        decoder.feed(packet)
    decoder.feed(None)
    if decoder.fault:
        raise DamagedVideo(decoder.fault)
    return decoder.frames


def decode_skipping(
    packets: Packets,
    wanted: set[int],
    size: int | None,
    keep: Keep,
) -> dict[int, Frame] | None:
    """Time stamp -> frame, by decoding the packets on which wanted frames depend.

    None if that cannot be done exactly. Groups of pictures (GOPs) are independent when each starts
    with an IDR picture and shows no frame before it. Inside a GOP, a picture that is not a
    reference is dropped unless wanted, and decoding stops after the last wanted packet.
    """
    length_bytes = avc_length_bytes(packets.context)
    if length_bytes == 0:
        return None
    kinds = [slice_kinds(p, length_bytes) for p in packets.packets]
    starts = [i for i, p in enumerate(packets.packets) if p.is_keyframe]
    if not starts or starts[0] != 0 or not all(kinds[i].is_idr for i in starts):
        return None
    gops = list(zip(starts, [*starts[1:], len(kinds)], strict=True))
    for start, end in gops:
        if min(packets.pts[start:end]) < packets.pts[start]:  # open GOP
            return None
    decoder = Decoder(packets.context, wanted, size, keep)
    for start, end in gops:
        targets = [i for i in range(start, end) if packets.pts[i] in wanted]
        if not targets:
            continue
        for i in range(start, targets[-1] + 1):
            if kinds[i].is_reference or packets.pts[i] in wanted:
                decoder.feed(packets.packets[i])
        decoder.feed(None)
    return decoder.frames if len(decoder.frames) == len(wanted) and not decoder.fault else None


def avc_length_bytes(context: av.video.codeccontext.VideoCodecContext) -> int:
    """Bytes of the length in front of each NAL unit; 0 if this is not H.264 in mp4 (avcC)."""
    extradata = context.extradata
    if context.name != "h264" or extradata is None or len(extradata) < 5 or extradata[0] != 1:
        return 0
    return (extradata[4] & 3) + 1


@dataclass(frozen=True, slots=True)
class SliceKinds:
    """What the H.264 slices of a packet are."""

    is_idr: bool
    is_reference: bool


def slice_kinds(packet: Packet, length_bytes: int) -> SliceKinds:
    """What the slices of a packet are; a packet that cannot be parsed counts as a reference.

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
    return SliceKinds(is_idr, is_reference or not has_slice or at != len(data))
