"""The frame rule, and that skipping packets never changes a byte of a frame."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.media import packets
from data_shards.media.pixels import resize_frame
from data_shards.media.video import (
    DamagedVideo,
    clip_indices,
    count_frames,
    decode_frames,
    encode_mp4,
)


def moving_frames(num_frames: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Textured frames that move, so that the encoder uses references. F H W 3."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width + num_frames, 3))
    smooth = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) // 3
    return np.stack([smooth[:, j : j + width] for j in range(num_frames)]).astype(np.uint8)


def encode_with_times(
    times: list[int], options: dict[str, str], frames: np.ndarray, codec: str = "libx264"
) -> bytes:
    """An mp4 whose frame j is shown at times[j] thousandths of a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, rgb in zip(times, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode_linear(mp4: bytes) -> np.ndarray:
    """Every frame in order of presentation, by PyAV's plain loop."""
    with av.open(io.BytesIO(mp4)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (1, (0, 0, 0, 0, 0, 0, 0, 0)),
        (2, (0, 0, 0, 0, 0, 1, 1, 1)),
        (4, (0, 0, 1, 1, 2, 2, 2, 3)),
        (10, (0, 1, 2, 3, 4, 6, 7, 8)),
        (60, (3, 10, 18, 25, 33, 40, 47, 55)),
        (90, (5, 16, 27, 38, 49, 61, 72, 83)),
        (150, (9, 28, 46, 65, 83, 102, 121, 139)),
        (250, (15, 46, 77, 108, 139, 171, 202, 233)),
    ],
)
def test_clip_indices_equal_internvl(num_frames: int, expected: tuple[int, ...]) -> None:
    assert clip_indices(num_frames, 8) == expected


@settings(deadline=None)
@given(num_frames=st.integers(1, 2000), count=st.integers(1, 32))
def test_clip_indices_are_sorted_frames_of_the_clip(num_frames: int, count: int) -> None:
    indices = clip_indices(num_frames, count)
    segment = (num_frames - 1) / count
    assert indices == tuple(int(segment / 2 + np.round(segment * i)) for i in range(count))
    assert list(indices) == sorted(indices) and 0 <= indices[0] <= indices[-1] < num_frames


@pytest.mark.parametrize(
    ("rule", "apart"),
    [
        (lambda n: [int((n - 1) / 8 * (i + 0.5)) for i in range(8)], 875),
        (lambda n: [int((n - 1) / 16 + int((n - 1) / 8 * i + 0.5)) for i in range(8)], 625),
        (lambda n: np.linspace(0, n - 1, 8).round().astype(int).tolist(), 999),
    ],
    ids=["middles", "round-half-up", "linspace"],
)
def test_rules_that_look_alike_are_others(rule: Callable[[int], list[int]], apart: int) -> None:
    """On how many of the lengths 1 to 1000 they choose another frame; counted independently."""
    assert sum(rule(n) != list(clip_indices(n, 8)) for n in range(1, 1001)) == apart


def test_clip_indices_refuse_an_empty_clip() -> None:
    with pytest.raises(ValueError, match="must be at least 1, found 0 and 8"):
        clip_indices(0, 8)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_decoding_equals_linear_decoding(data: st.DataObject) -> None:
    """Over lengths, groups of pictures, B-frames and uneven times of presentation."""
    num_frames = data.draw(st.integers(1, 40))
    gaps = data.draw(st.lists(st.integers(1, 90), min_size=num_frames, max_size=num_frames))
    options = {
        "crf": data.draw(st.sampled_from(["10", "30"])),
        "g": str(data.draw(st.integers(1, 30))),
        "bf": str(data.draw(st.integers(0, 4))),
        "x264-params": data.draw(
            st.sampled_from(["b-pyramid=strict", "b-pyramid=none", "open-gop=1", "interlaced=1"])
        ),
        "threads": "1",
        "preset": "veryfast",
    }
    mp4 = encode_with_times(np.cumsum(gaps).tolist(), options, moving_frames(num_frames, 32, 32))
    linear = decode_linear(mp4)
    assert len(linear) == count_frames(mp4) == num_frames
    indices = data.draw(st.lists(st.integers(0, num_frames - 1), min_size=1, max_size=9))
    np.testing.assert_array_equal(decode_frames(mp4, indices), linear[indices])
    out = np.zeros_like(linear[indices])
    assert decode_frames(mp4, indices, out=out) is out
    np.testing.assert_array_equal(out, linear[indices])


def test_scaling_on_the_way_out_changes_nothing() -> None:
    mp4 = encode_mp4(moving_frames(30), 25, b_frames=3)
    native = decode_frames(mp4, [28, 3, 3])
    scaled = decode_frames(mp4, [28, 3, 3], scale=lambda frame: resize_frame(frame, 28))
    np.testing.assert_array_equal(scaled, [resize_frame(frame, 28) for frame in native])


def test_headers_that_say_less_change_nothing() -> None:
    """Opening a clip here looks at no picture in advance, so headers are all that is known then.

    Every bit of the parameter set is flipped once, those that announce how far pictures are put
    in another order among them: what leaves the plain loop's frames as they are, leaves ours.
    """
    options = {"bf": "3", "x264-params": "b-pyramid=normal", "threads": "1", "preset": "medium"}
    mp4 = encode_with_times(list(range(0, 800, 40)), options, moving_frames(20, 32, 32))
    linear = decode_linear(mp4)
    start = mp4.index(b"avcC") + 4 + 8  # behind version, profile, number and length of the set
    parameters = mp4[start : start + int.from_bytes(mp4[start - 2 : start], "big")]
    assert parameters[0] & 31 == 7, "a sequence parameter set"
    harmless = 0
    for bit in range(8 * len(parameters)):
        spoiled = bytearray(parameters)
        spoiled[bit // 8] ^= 128 >> bit % 8
        other = mp4.replace(parameters, spoiled)
        try:
            same = np.array_equal(decode_linear(other), linear)
        except (av.error.FFmpegError, ValueError):
            continue
        if same:
            harmless += 1
            np.testing.assert_array_equal(decode_frames(other, [1, 6, 17]), linear[[1, 6, 17]])
    assert harmless > 50


def test_skipping_drops_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    mp4 = encode_mp4(moving_frames(60), 25, gop=20, b_frames=3)
    fed = []
    feed = packets.Decoder.feed
    monkeypatch.setattr(
        packets.Decoder, "feed", lambda self, packet: (fed.append(packet), feed(self, packet))[1]
    )
    decode_frames(mp4, [21])
    given = [packet for packet in fed if packet is not None]
    assert given[0].is_keyframe and len(given) <= 4  # one group of pictures, its start only


@pytest.mark.parametrize("codec", ["mpeg4", "libvpx-vp9"])
def test_other_codecs_are_decoded_linearly(codec: str) -> None:
    frames = moving_frames(20)
    mp4 = encode_with_times(list(range(0, 800, 40)), {"g": "7", "bf": "2"}, frames, codec)
    np.testing.assert_array_equal(decode_frames(mp4, [19, 3]), decode_linear(mp4)[[19, 3]])


def test_encoding_is_deterministic_and_close_to_the_frames() -> None:
    frames = moving_frames(30)
    mp4 = encode_mp4(frames, 25)
    assert mp4 == encode_mp4(iter(frames), 25)
    flat = np.broadcast_to(np.array([200, 30, 90], np.uint8), (10, 32, 32, 3))
    decoded = decode_frames(encode_mp4(flat, 25), range(10)).astype(int)
    assert np.abs(decoded - flat).max() < 4
    with av.open(io.BytesIO(mp4)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert container.streams.video[0].average_rate == 25


def test_encoding_does_not_read_unwritten_memory() -> None:
    """The C library fills fresh memory with a byte of our choice; the video must not change."""
    program = (
        "import hashlib, numpy as np; from data_shards.media.video import encode_mp4;"
        "noise = np.random.default_rng(0).integers(-30, 30, (60, 64, 90, 3));"
        "ramp = np.linspace(0, 255, 64 * 90 * 3).reshape(64, 90, 3);"
        "clip = [np.clip(ramp + noise[i] + 10 * i, 0, 255).astype(np.uint8) for i in range(60)];"
        "print(hashlib.sha256(encode_mp4(clip, 25)).hexdigest())"
    )
    outputs = [run_python(program, perturb) for perturb in ("1", "85", "200")]
    assert len(set(outputs)) == 1, outputs


def run_python(program: str, perturb: str) -> str:
    env = {**os.environ, "MALLOC_PERTURB_": perturb, "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("frames", "rule"),
    [
        (np.zeros((2, 33, 32, 3), np.uint8), "even H and W"),
        (np.zeros((2, 32, 32, 3), np.float32), "must be uint8"),
        (np.zeros((0, 32, 32, 3), np.uint8), "at least one frame"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((34, 32, 3), np.uint8)], "the shape"),
    ],
)
def test_encoding_refuses_bad_frames(frames: np.ndarray, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        encode_mp4(frames, 25)


def test_too_few_frames_are_damage() -> None:
    mp4 = encode_mp4(moving_frames(10), 25)
    with pytest.raises(DamagedVideo, match="frame 10 requested, the video has 10 frames"):
        decode_frames(mp4, [0, 10])
    with pytest.raises(ValueError, match="indices must be 0 or more"):
        decode_frames(mp4, [-1])


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_no_video_is_damage(content: bytes) -> None:
    with pytest.raises(DamagedVideo, match="cannot read"):
        count_frames(content)
    with pytest.raises(DamagedVideo, match="cannot decode"):
        decode_frames(content, [0])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_video_cut_short_is_damage(share: float) -> None:
    mp4 = encode_mp4(moving_frames(40), 25)
    with pytest.raises(DamagedVideo):
        decode_frames(mp4[: int(len(mp4) * share)], [0])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_video_with_its_header_first_cut_short_is_damage(share: float, tmp_path: Path) -> None:
    """With the header in front, libav opens a torn file and gives as many packets as there are."""
    mp4 = remux(encode_mp4(moving_frames(40), 25), tmp_path / "a.mp4", {"movflags": "+faststart"})
    assert count_frames(mp4) == 40 and mp4.index(b"moov") < mp4.index(b"mdat")
    with pytest.raises(DamagedVideo, match="cut short: a packet is incomplete"):
        count_frames(mp4[: int(len(mp4) * share)])


def test_time_stamps_against_the_order_of_pictures_are_damage(tmp_path: Path) -> None:
    def show_as_decoded(packet: av.Packet) -> None:
        packet.pts = packet.dts = packet.dts + 4 * packet.duration

    mp4 = encode_mp4(moving_frames(40), 25, b_frames=3)
    assert np.array_equal(
        decode_frames(remux(mp4, tmp_path / "a.mp4"), [7]), decode_linear(mp4)[[7]]
    )
    disordered = remux(mp4, tmp_path / "b.mp4", change=show_as_decoded)
    with pytest.raises(DamagedVideo, match="do not follow the order of the pictures"):
        decode_frames(disordered, range(40))


def test_frames_outside_the_edit_list_are_not_counted(tmp_path: Path) -> None:
    """As after a cut without encoding again: packets before the cut are decoded, never shown."""

    def start_earlier(packet: av.Packet) -> None:
        packet.pts -= 10 * packet.duration
        packet.dts -= 10 * packet.duration

    whole = encode_mp4(moving_frames(40), 25, b_frames=3)
    cut = remux(whole, tmp_path / "a.mp4", {"avoid_negative_ts": "disabled"}, start_earlier)
    assert count_frames(cut) == 30 == len(decode_linear(cut))
    np.testing.assert_array_equal(decode_frames(cut, range(30)), decode_linear(whole)[10:])


def remux(
    mp4: bytes,
    path: Path,
    options: dict[str, str] | None = None,
    change: Callable[[av.Packet], None] = lambda packet: None,
) -> bytes:
    """The same packets, each after `change`, in a new mp4 file."""
    with (
        av.open(io.BytesIO(mp4)) as source,
        av.open(path, "w", options=options or {}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                change(packet)
                packet.stream = stream
                container.mux(packet)
    return path.read_bytes()


def test_a_sound_track_alone_is_damage() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(DamagedVideo, match="no video track"):
        count_frames(buffer.getvalue())


def test_frames_the_decoder_marks_as_corrupt_are_damage() -> None:
    mp4 = bytearray(encode_mp4(moving_frames(40), 25))
    start = mp4.index(b"mdat") + 2000  # past the parameter sets
    for at in range(start, start + 4000, 100):
        mp4[at] ^= 0xFF
    with pytest.raises(DamagedVideo):
        decode_frames(bytes(mp4), range(40))


def test_the_fast_size_is_the_frame_in_small() -> None:
    smooth = np.repeat(np.repeat(moving_frames(12, 24, 32), 4, axis=1), 4, axis=2)
    mp4 = encode_mp4(smooth, 25, crf=10)
    fast = decode_frames(mp4, [2, 7], size=28)
    assert fast.shape == (2, 28, 28, 3) and fast.dtype == np.uint8
    exact = [resize_frame(frame, 28) for frame in decode_frames(mp4, [2, 7])]
    assert 0 < np.abs(fast.astype(int) - exact).mean() < 12
    np.testing.assert_array_equal(fast, decode_frames(mp4, [2, 7], size=28))


def test_the_work_on_a_clip_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    mp4 = encode_mp4(moving_frames(30), 25, b_frames=0)
    monkeypatch.setattr(packets, "MAX_DECODED_PIXELS", 10 * 48 * 64)
    decode_frames(mp4, [9])
    with pytest.raises(DamagedVideo, match="more than 30720 pixels would have to be decoded"):
        decode_frames(mp4, [10])


def test_only_an_mp4_is_opened(tmp_path: Path) -> None:
    """A playlist in a member's place would make libav open whatever it names."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for rgb in moving_frames(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(DamagedVideo, match="cannot decode the video"):
        decode_frames(buffer.getvalue(), [0])
    clip = tmp_path / "secret.mp4"
    clip.write_bytes(encode_mp4(moving_frames(4), 25))
    for text in (f"ffconcat version 1.0\nfile {clip.name}\n", f"#EXTM3U\n#EXTINF:1,\n{clip}\n"):
        with pytest.raises(DamagedVideo, match="cannot decode the video"):
            decode_frames(text.encode(), [0])
