"Vectors and fields against independent readers, oracles, known motion, and files that lie or are broken."
import gc
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from mgm_nb import motion, video
from mgm_nb.motion import (
    CELL,
    MotionConfig,
    MotionField,
    estimate_motion,
    load_motion,
    motion_field,
    motion_key,
    save_motion,
    stored_motion,
)  # fmt: skip
from mgm_nb.video import (
    MOTION_PRESET,
    NO_PTS,
    Limits,
    UnsupportedCodec,
    VideoError,
    probe,
    read_clip,
    reencode,
    write_video,
)  # fmt: skip

P_ONLY = ["bigbuckbunny_h264_p.mp4", "bigbuckbunny_mpeg4.mp4", "cars_h264_p.mp4", "cup_h264_p.mp4"]
CLIPS = [
    *P_ONLY, "asl_walk_h264_b.mkv", "bigbuckbunny_b.264", "bottle_h264_b.mp4", "box_h264_b.mp4", "nasa_h264_b.mp4",
    "people_h264_gop10.mp4",
]  # fmt: skip


def real(name: str) -> Path:
    if "MGM_VIDEOS" not in os.environ: pytest.skip("MGM_VIDEOS does not name the folder of real clips")
    return Path(os.environ["MGM_VIDEOS"]) / name


def pan(velocity, frames=24, width=208, height=160, seed=0):
    "uint8 `(t, h, w, 3)`: a texture that moves by `velocity` pixels a frame, exact in quarter pixels"
    steps = np.rint(4 * np.outer(np.arange(frames), velocity)).astype(int)
    steps = steps.max(0) - steps  # the window goes where the content does not
    x, y = steps.max(0) + 4 * np.array([width, height])
    rng = np.random.default_rng(seed)
    texture = sum(np.kron(rng.integers(0, 80, (y // n + 1, x // n + 1)), np.ones((n, n)))[:y, :x] for n in (9, 20, 50))
    cut = (texture[b : b + 4 * height, a : a + 4 * width] for a, b in steps)
    return np.stack([np.uint8(c.reshape(height, 4, width, 4).mean((1, 3)))[..., None].repeat(3, -1) for c in cut])


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", rate=25, pts=None, movflags="", **options):
    "A file as others make them: any codec, container (by suffix), pixel format, times"
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as out:
        stream = out.add_stream(codec, rate=rate, options={k.replace("_", "-"): str(v) for k, v in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if pts is not None: stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame).reformat(format=pix_fmt)
            picture.pts, picture.time_base = (i, Fraction(1, rate)) if pts is None else (pts[i], Fraction(1, 1000))
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


def assert_same(a, b):
    "Two clips agree in everything"
    assert_array_equal(a.table, b.table)
    assert_array_equal(a.keep, b.keep)
    for x, y in zip(a.vectors, b.vectors, strict=True):
        assert (x is None) == (y is None) and (x is None or np.array_equal(x, y))
    if a.frames is not None: assert_array_equal(a.frames, b.frames)


def assert_seekable(path, starts=6, seed=0):
    "A clip from anywhere equals the same rows of the whole video decoded in one go; returns the whole"
    whole, rng = read_clip(path, None, 1), np.random.default_rng(seed)
    total = len(whole.table)
    for i, start in enumerate(sorted(rng.integers(0, total, starts))):
        with pytest.MonkeyPatch.context() as patch:
            if i % 2: patch.setattr(video, "HELD", 0)  # as for a large file: by a jump in the container
            clip = read_clip(path, 4, 3, int(start))
        rows = clip.table["index"]
        assert_array_equal(clip.table, whole.table[rows])
        assert_array_equal(clip.frames, whole.frames[np.minimum(start + 3 * np.arange(4), total - 1)])
        for v, row in zip(clip.vectors, rows, strict=True):
            assert (v is None) == (whole.vectors[row] is None) and (v is None or np.array_equal(v, whole.vectors[row]))
        few = read_clip(path, 4, 3, int(start), vectors=False)  # what nobody needs is not decoded
        assert_array_equal(few.frames, clip.frames)
        assert_array_equal(few.table["index"][few.keep], clip.table["index"][clip.keep])
    return whole


# --- faithful vectors ---


@pytest.mark.parametrize("name", P_ONLY)
def test_every_field_of_every_frame_equals_mv_extractor(name):
    "Another program, another FFmpeg (4.1), same numbers; it uses frame threads, so only without B-frames is it right"
    VideoCap = pytest.importorskip("mvextractor.videocap").VideoCap
    clip = read_clip(real(name), None, 1, pixels=False)
    reader, frames = VideoCap(), 0
    assert reader.open(str(real(name)))
    for records, kind in zip(clip.to_records(), clip.table["type"], strict=True):
        ok, _, vectors, frame_type = reader.read()
        if not ok: break
        assert frame_type == kind
        assert_array_equal(records, vectors)
        frames += 1
    assert frames >= len(clip.table) - 1  # of cup it forgets the last
    assert sum(map(len, clip.to_records())) > 100_000


def decode_plainly(path, stream, **context):
    "Vectors the way PyAV's documentation reads them, from the first frame to the last"
    with av.open(str(path), metadata_errors="ignore") as container:
        cc = container.streams[stream].codec_context
        for key, value in context.items(): setattr(cc, key, value)
        cc.options = {"flags2": "+export_mvs"}
        for frame in container.decode(container.streams[stream]):
            data = frame.side_data.get("MOTION_VECTORS")
            yield None if data is None else data.to_ndarray()
            gc.collect(0)


@pytest.mark.parametrize("name", ["asl_walk_h264_b.mkv", "box_h264_b.mp4", "nasa_h264_b.mp4"])
def test_b_frames_equal_a_plain_reading_without_threads(name):
    clip = read_clip(real(name), 120, 1, 0, pixels=False)
    names = ("source", "w", "h", "src_x", "src_y", "dst_x", "dst_y", "motion_x", "motion_y", "motion_scale")
    plain = decode_plainly(real(name), clip.info.stream, thread_type="NONE")
    for records in clip.to_records():
        expected = next(plain)
        expected = np.empty((0, 10)) if expected is None else np.stack([expected[k] for k in names], 1)
        assert_array_equal(records, expected)


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_from_anywhere_equals_sequential_decoding(name):
    path = real(name)
    whole = read_clip(path, None, 1, pixels=False)
    assert_same(whole, read_clip(path, None, 1, pixels=False))  # two runs
    rng = np.random.default_rng(0)
    with av.open(str(path)) as container:
        stream = container.streams[whole.info.stream]
        stream.thread_type = "NONE"
        shown = []
        for frame in container.decode(stream):
            shown.append(frame)
            if len(shown) == 150: break
        for start in sorted(rng.integers(0, len(shown) - 12, 3)):
            clip = read_clip(path, 4, 3, int(start))
            assert_array_equal(clip.table, whole.table[start : start + 10])
            for v, w in zip(clip.vectors, whole.vectors[start : start + 10], strict=True):
                assert (v is None) == (w is None) and (v is None or np.array_equal(v, w))
            for image, frame in zip(clip.frames, shown[start : start + 10 : 3], strict=True):
                assert_array_equal(image, frame.to_ndarray(format="rgb24"))


STRUCTURES = {
    "b-pyramid.mp4": dict(preset="medium", bf=3, g=12),
    "open-gop.mp4": dict(bf=3, g=10, x264_params="open-gop=1:scenecut=0"),
    "open-gop.ts": dict(bf=3, g=10, x264_params="open-gop=1:scenecut=0"),
    "intra-refresh.mp4": dict(bf=0, x264_params="intra-refresh=1:keyint=12"),
    "intra-refresh.ts": dict(bf=0, x264_params="intra-refresh=1:keyint=12"),
    "b.mkv": dict(bf=3, g=12),
    "b.avi": dict(bf=2, g=12),
    "b.264": dict(bf=3, g=12),
    "slices.mp4": dict(g=12, x264_params="slices=4"),
    "mpeg2.mpg": dict(codec="mpeg2video", bf=2, g=12),
    "mpeg2.ts": dict(codec="mpeg2video", bf=2, g=12),
    "mpeg1.mpg": dict(codec="mpeg1video", bf=2, g=12),
    "mpeg4.avi": dict(codec="mpeg4", bf=2, g=12),
    "mpeg4.mp4": dict(codec="mpeg4", bf=2, g=12),
    # not mp4: PyAV 18 with libx265 fails now and then to write its header
    "hevc.mkv": dict(codec="libx265", x265_params="keyint=10:log-level=none"),
    "vp9.webm": dict(codec="libvpx-vp9", g=10),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_seeking_is_exact_in_every_structure(name, tmp_path):
    path, options = tmp_path / name, dict(STRUCTURES[name])
    encode(path, pan((3, 1), 40, 112, 80), **options)
    if options.get("codec", "").startswith("lib"):
        whole = read_clip(path, None, 1, vectors=False)
        for start in (0, 7, 11, 23, 38):
            clip = read_clip(path, 3, 2, start, vectors=False)
            assert_array_equal(clip.frames, whole.frames[np.minimum(start + 2 * np.arange(3), 39)])
    else: whole = assert_seekable(path, 12)
    assert len(whole.table) == whole.info.frames == 40


@pytest.mark.parametrize("name", ["b.ts", "b.mp4", "b.mkv", "mpeg2.ts"])
@pytest.mark.parametrize("skip", [0, 2])
def test_a_recording_that_begins_in_an_open_gop(name, skip, tmp_path):
    "Frames before the first keyframe cannot be shown; frame 0 is the first that can"
    options = dict(codec="mpeg2video", bf=2, g=12) if "mpeg2" in name else dict(bf=3, g=10, x264_params="open-gop=1")
    whole, part = encode(tmp_path / name, pan((3, 1), 40, 112, 80), **options), tmp_path / f"part-{name}"
    with av.open(str(whole)) as source, av.open(str(part), "w") as target:
        packets = [p for p in source.demux(video=0) if p.size]
        stream = target.add_stream_from_template(source.streams.video[0])
        second = [i for i, p in enumerate(packets) if p.is_keyframe][1]
        for packet in packets[second + skip :]:
            packet.stream = stream
            target.mux(packet)
    clip = assert_seekable(part)
    assert clip.table["index"].tolist() == list(range(clip.info.frames)) and clip.table["type"][0] == "I"
    assert_array_equal(clip.frames, read_clip(whole, None, 1).frames[-clip.info.frames :])


@pytest.mark.parametrize("name", ["b-pyramid.mp4", "open-gop.mp4", "open-gop.ts", "b.mkv", "mpeg2.ts", "hevc.mkv"])
def test_seeking_is_not_given_up(name, tmp_path, monkeypatch):
    "The way out, decoding from the start, is exact too; but where times are right it must not be needed"
    path, opened, real_open = tmp_path / name, [], video._open
    encode(path, pan((3, 1), 40, 112, 80), **STRUCTURES[name])
    monkeypatch.setattr(video, "_open", lambda *args, **what: (opened.append(1), real_open(*args, **what))[1])
    for start in range(0, 40, 3):
        monkeypatch.setattr(video, "HELD", start % 2 << 20)  # jump in the container, or go on with what was read
        read_clip(path, 3, 1, start, vectors=False)
    assert len(opened) == 14


CODECS = {
    "h264.mp4": {}, "h264-10bit.mp4": dict(pix_fmt="yuv420p10le"), "h264-444.mp4": dict(pix_fmt="yuv444p"),
    "lossless.mp4": dict(qp=0), "mpeg1.mpg": dict(codec="mpeg1video"), "mpeg2.mpg": dict(codec="mpeg2video", bf=2),
    "mpeg4.mp4": dict(codec="mpeg4"), "qpel.avi": dict(codec="mpeg4", flags="+qpel+mv4"), "flv1.flv": dict(codec="flv"),
    "msmpeg4v2.avi": dict(codec="msmpeg4v2"), "msmpeg4v3.avi": dict(codec="msmpeg4"), "wmv1.asf": dict(codec="wmv1"),
    "wmv2.asf": dict(codec="wmv2"), "rv10.rm": dict(codec="rv10"), "rv20.rm": dict(codec="rv20"),
    "h261.avi": dict(codec="h261"), "h263.avi": dict(codec="h263"), "h263p.avi": dict(codec="h263p"),
}  # fmt: skip


@pytest.mark.parametrize("name", CODECS)
def test_codecs_that_export_vectors(name, tmp_path):
    encode(tmp_path / name, pan((3, 2), 24, 352, 288), **CODECS[name])
    field = motion_field(read_clip(tmp_path / name, None, 1, pixels=False))
    known = field.weight > 0
    assert field.valid.sum() >= 20
    assert_allclose(np.median(field.velocity[known], 0), (3, 2), atol=0.01)
    assert (abs(field.velocity[known] - (3, 2)).max(-1) <= 0.5).mean() > 0.9


@pytest.mark.parametrize(
    "name, codec",
    [("b.mkv", "libx265"), ("a.webm", "libvpx"), ("b.webm", "libvpx-vp9"), ("b.mp4", "libsvtav1"), ("a.avi", "mjpeg"),
     ("a.mkv", "ffv1"), ("c.avi", "snow")],
)  # fmt: skip
def test_codecs_that_do_not(name, codec, tmp_path):
    quiet = {"libx265": dict(x265_params="log-level=none"), "snow": dict(strict=-2), "mjpeg": dict(pix_fmt="yuvj420p")}
    path = encode(tmp_path / name, pan((3, 2), 5, 96, 80), codec, **quiet.get(codec, {}))
    with pytest.raises(UnsupportedCodec, match=r"reencode.*estimate_motion"): read_clip(path)
    assert not probe(path).has_vectors
    assert read_clip(path, 4, 1, vectors=False).frames.shape == (4, 80, 96, 3)
    clip = read_clip(reencode(path, tmp_path / "out.mp4"), None, 1)
    assert clip.info.codec == "h264" and len(clip) == 5


def test_decoders_get_one_slice_thread(monkeypatch):
    "With frame threads the vectors of B-frames are wrong, differently in each run; no argument leads there"
    seen, prepare = [], video._prepare
    monkeypatch.setattr(video, "_prepare", lambda cc, *args: (prepare(cc, *args), seen.append(cc)))
    path = real("asl_walk_h264_b.mkv")
    read_clip(path, 2, pixels=False)
    assert seen
    assert {(str(cc.thread_type), cc.thread_count) for cc in seen} == {("ThreadType.SLICE", 1)}


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat(tmp_path):
    "Without the collector: PyAV's `frame.side_data` would keep every frame of every clip (hundreds of MB here)"
    path = write_video(tmp_path / "a.mp4", pan((3, 1), 30, 352, 288), options=MOTION_PRESET)
    gc.disable()
    try:
        for _ in range(20): motion_field(read_clip(path, 16, 2))
        before = rss()
        for _ in range(200): motion_field(read_clip(path, 16, 2))
        assert rss() - before < 5
    finally:
        gc.enable()


def test_storage_order_times_are_not_trusted():
    "VLC wrote pts in storage order: read by them, clips would start at the wrong frame"
    whole = read_clip(real("box_h264_b.mp4"), 60, 1, 0, pixels=False)
    assert (np.diff(whole.table["pts"]) < 0).any()
    assert "B" in whole.table["type"]
    assert (np.diff(whole.table["decode_index"]) < 0).any()
    whole = read_clip(real("box_h264_b.mp4"), None, 1, pixels=False)
    for start, frames in (37, 20), (38, 1), (39, 1), (40, 1), (41, 1), (300, 10), (301, 2), (302, 1):
        clip = read_clip(real("box_h264_b.mp4"), frames, 1, start, pixels=False)
        assert_array_equal(clip.table, whole.table[start : start + frames])


def test_raw_h264_has_no_times_but_packets():
    raw = read_clip(real("bigbuckbunny_b.264"), None, 1, pixels=False)
    assert (raw.table["pts"] == NO_PTS).all()
    assert sorted(raw.table["decode_index"]) == list(range(337))
    types, references = raw.table["type"], raw.table["is_reference"]
    assert references[types != "B"].all() and 0 < references[types == "B"].mean() < 1  # b-pyramid
    assert raw.table["bytes"].sum() == pytest.approx(real("bigbuckbunny_b.264").stat().st_size, rel=0.01)


def test_packets_and_frames_are_tied_in_every_container(tmp_path):
    "The same stream with times (mp4), and without (raw): the same table, but for the times"
    path = encode(tmp_path / "a.mp4", pan((3, 1), 30), bf=3, g=12)
    with av.open(str(path)) as source, av.open(str(tmp_path / "a.264"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size: packet.stream = stream; target.mux(packet)  # noqa: E702
    a, b = (read_clip(p, None, 1, pixels=False) for p in (path, tmp_path / "a.264"))
    for name in ("index", "type", "is_reference", "decode_index", "past", "future"):
        assert_array_equal(a.table[name], b.table[name], name)


def test_the_best_of_several_streams():
    info = probe(real("nasa_h264_b.mp4"))
    assert (info.stream, info.width, info.height, info.frames) == (3, 480, 270, 390)


def test_short_clips_hold_the_last_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", pan((2, 0), 10), options=MOTION_PRESET)
    clip = read_clip(path, 8, 2, 4)
    assert clip.keep.tolist() == [0, 2, 4, 5, 5, 5, 5, 5] and clip.table["index"].tolist() == [4, 5, 6, 7, 8, 9]
    assert (clip.frames[3:] == clip.frames[3]).all() and (clip.frames[2] != clip.frames[3]).any()
    energy, _ = motion_field(clip, MotionConfig()).to_tokens((4, 10, 13), keep=clip.keep)
    assert (energy[0] > 0.2).mean() > 0.9 and (energy[2:] == 0).all()


def test_draws_depend_on_the_generator_only(tmp_path):
    import torch

    path = write_video(tmp_path / "a.mp4", pan((2, 0), 40, 64, 48), options=MOTION_PRESET)
    for make in (np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)):
        starts = [read_clip(path, 4, 2, generator=make(s), pixels=False).table["index"][0] for s in (0, 0, *range(9))]
        assert starts[0] == starts[1] and len(set(starts)) > 3
    assert read_clip(path, indices=lambda n: [0, n // 2, n - 1], pixels=False).table["index"][-1] == 39


def test_variable_frame_rate_counts_frames_and_keeps_times(tmp_path):
    pts = np.cumsum([0] + [20, 20, 100, 20, 300] * 5).tolist()
    path = encode(tmp_path / "a.mkv", pan((2, 1), len(pts)), pts=pts, bf=2, g=9)
    assert_seekable(path)
    clip = read_clip(reencode(path, tmp_path / "b.mkv"), None, 1, pixels=False)
    assert clip.table["pts"].tolist() == pts


def test_pictures_hours_apart_can_be_written_again(tmp_path):
    hours = [0, 60_000_000, 120_000_000]  # ms: at this frame rate a frame has more ticks than MP4 can tell
    path = encode(tmp_path / "a.mp4", pan((2, 1), 3), pts=hours, bf=0)
    assert len(read_clip(reencode(path, tmp_path / "b.mp4"), None, 1)) == 3


def test_quantisers_come_from_the_same_decode(tmp_path):
    if int(av.__version__.split(".")[0]) < 17: pytest.skip("PyAV < 17 does not export quantisers")
    path = encode(tmp_path / "a.mp4", pan((2, 0), 6, 96, 80), qp=30, g=6, bf=0, x264_params="ipratio=1:aq-mode=0")
    assert {q.shape for q in read_clip(path, 6, 1, qp=True).qp} == {(5, 6)}
    assert (np.stack(read_clip(path, 6, 1, qp=True).qp) == 30).all()


# --- frames and field agree, whatever the shape ---


def rotate_header(source: Path, target: Path, degrees: int) -> Path:
    "Set the display matrix of an mp4's track (tkhd), as phones do; counter-clockwise"
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    c, s = round(np.cos(np.radians(-degrees))), round(np.sin(np.radians(-degrees)))
    data[at : at + 36] = struct.pack(">9i", c << 16, s << 16, 0, -s << 16, c << 16, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_turns_frames_and_field_together(degrees, tmp_path):
    "A patch moves over still noise, in a frame that is no multiple of 16: where pixels change, there must be energy"
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 255, (1, 202, 150, 1), np.uint8).repeat(3, -1), 12, 0)
    patch = rng.integers(0, 255, (40, 40, 3), np.uint8)
    for i in range(12): frames[i, 150 - 3 * i : 190 - 3 * i, 90:130] = patch
    path = write_video(tmp_path / "a.mp4", frames, options=MOTION_PRESET)
    clip = read_clip(rotate_header(path, tmp_path / "b.mp4", degrees), 12, 1)
    turns = degrees // 90
    assert clip.info.rotation == degrees
    assert clip.frames.shape[1:3] == (clip.info.height, clip.info.width) == ((150, 202) if turns % 2 else (202, 150))
    assert_array_equal(clip.frames, np.rot90(read_clip(path, 12, 1).frames, turns, (1, 2)))
    field = motion_field(clip, MotionConfig())
    energy, velocity = field.to_tokens((6, 10, 10))
    at = np.unravel_index(energy[1:].sum(0).argmax(), (10, 10))
    change = abs(np.diff(clip.frames.astype(int), axis=0)).mean((0, 3))
    h, w = change.shape
    row, column = at[0] * h // 10, at[1] * w // 10
    assert change[row : row + h // 10, column : column + w // 10].mean() > 2 * change.mean()
    up = np.array([(0, -1), (-1, 0), (0, 1), (1, 0)][turns])
    fast = field.velocity[1:][np.linalg.norm(field.velocity[1:], axis=-1) > 2]
    assert_allclose(np.median(fast, 0), 3 * up, atol=0.1)


@pytest.mark.parametrize("size", [(321, 243), (322, 242), (16, 16), (400, 50)])
def test_odd_sizes(size, tmp_path):
    pix_fmt = "yuv444p" if size[0] % 2 else "yuv420p"
    path = encode(tmp_path / "a.mp4", pan((2, 1), 12, *size), pix_fmt=pix_fmt, x264_params="ref=1:bframes=0")
    clip = read_clip(path, 12, 1)
    assert clip.frames.shape == (12, size[1], size[0], 3)
    field = motion_field(clip)
    assert field.velocity.shape[1:3] == (-(-size[1] // 16), -(-size[0] // 16))
    if min(size) > 16: assert_allclose(np.median(field.velocity[field.weight > 0], 0), (2, 1), atol=0.01)
    energy, _ = field.fill().to_tokens((6, 3, 3))
    assert np.isfinite(energy).all()


def test_a_size_that_changes_on_the_way(tmp_path):
    "Two raw streams in one file: frames come at the first size, so does the motion"
    a = encode(tmp_path / "a.264", pan((4, 2), 12, 256, 192), x264_params="ref=1:bframes=0")
    b = encode(tmp_path / "b.264", pan((4, 2), 12, 128, 96), x264_params="ref=1:bframes=0")
    both = tmp_path / "both.264"
    both.write_bytes(a.read_bytes() + b.read_bytes())
    clip = read_clip(both, None, 1)
    assert clip.frames.shape == (24, 192, 256, 3) and set(clip.table["width"]) == {256, 128}
    field = motion_field(clip)
    assert field.velocity.shape == (24, 12, 16, 2)
    for rows, v in (slice(1, 12), (4, 2)), (slice(13, 24), (8, 4)):  # twice the size, twice the speed
        assert_allclose(np.median(field.velocity[rows][field.weight[rows] > 0], 0), v, atol=0.01)


# --- files that are broken, files that are hostile ---


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    frames = pan((3, 1), 60, 160, 128)
    return encode(tmp_path_factory.mktemp("healthy") / "a.mp4", frames, bf=2, g=15, movflags="faststart")


def test_damage_costs_what_it_hits_only(healthy, tmp_path):
    data, rng = bytearray(healthy.read_bytes()), np.random.default_rng(0)
    middle = data.index(b"mdat") + 8 + (len(data) - data.index(b"mdat")) // 3
    for at in rng.integers(middle, len(data) - 9, 12): data[at] ^= 0x55
    (tmp_path / "a.mp4").write_bytes(data)
    clip, good = (read_clip(p, None, 1) for p in (tmp_path / "a.mp4", healthy))
    assert len(clip.table) >= 50 and clip.table["corrupt"].any()
    assert not motion_field(clip).valid[clip.table["corrupt"]].any()  # concealment is no measurement
    assert_array_equal(clip.frames[:10], good.frames[:10])


def test_a_cut_tail_leaves_the_head(healthy, tmp_path):
    data = healthy.read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    clip, good = read_clip(tmp_path / "a.mp4", None, 1), read_clip(healthy, None, 1)
    n = int((~clip.table["corrupt"]).sum()) - 1
    assert 15 < n < 60
    assert_array_equal(clip.frames[: n - 3], good.frames[: n - 3])


def test_old_metadata_in_any_encoding(tmp_path):
    path = encode(tmp_path / "a.avi", pan((1, 0), 5, 64, 48), "mpeg4")
    data = path.read_bytes()
    size = struct.pack("<I", 12)
    info = b"LIST" + struct.pack("<I", 4 + 8 + 12) + b"INFO" + b"INAM" + size + b"\xff\xfe caf\xe9 \xa9\0\0\0"
    at = data.index(b"movi") - 8
    path.write_bytes(data[:at] + info + data[at:])
    with pytest.raises(UnicodeDecodeError): av.open(str(path))
    assert len(read_clip(path, 5, 1)) == 5


def broken_files(folder: Path):
    "(path, what the message says)"
    rng = np.random.default_rng(0)
    (folder / "empty.mp4").touch()
    (folder / "noise.mp4").write_bytes(rng.bytes(5000))
    (folder / "text.mp4").write_text("Once upon a time\n" * 50)
    encode(folder / "whole.mp4", pan((1, 0), 5, 64, 48))
    data = (folder / "whole.mp4").read_bytes()
    (folder / "no-moov.mp4").write_bytes(data[: data.index(b"moov")])
    with av.open(str(folder / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]: out.mux(packet)
    for name in ("empty.mp4", "noise.mp4", "text.mp4", "no-moov.mp4"): yield folder / name, "not a video we read"
    yield folder / "sound.mp4", "no video in it"
    yield folder / "missing.mp4", "no such file"
    yield folder, "no such file"


def test_what_is_no_video_says_so_in_one_line(tmp_path):
    for path, message in broken_files(tmp_path):
        with pytest.raises(VideoError, match=message) as error: read_clip(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_cover_art_is_no_video(tmp_path):
    path = tmp_path / "song.mkv"
    with av.open(str(path), "w") as out:
        out.add_attachment("cover.png", "image/png", png_of(pan((0, 0), 1, 64, 48)[0]))
        sound = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        for packet in [*sound.encode(frame), *sound.encode()]: out.mux(packet)
    with av.open(str(path)) as container: assert container.streams.video  # to FFmpeg the cover is a video stream
    with pytest.raises(VideoError, match="no video in it"): read_clip(path)


def png_of(frame):
    import base64

    return base64.b64decode(video._strip(frame[None]).split(",")[1])


def test_a_colon_in_the_name_is_no_protocol(healthy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(healthy, "concat:a.mp4")
    assert len(read_clip("concat:a.mp4", 4, 1)) == 4


def test_limits(healthy, tmp_path):
    for limits, message in [
        (Limits(max_bytes=1000), "max_bytes"),
        (Limits(max_pixels=160 * 127), "max_pixels"),
        (Limits(max_frames=2), "max_frames|20 \\* Limits"),
        (Limits(max_frames=30), "max_frames"),
        (Limits(seconds=0), "seconds"),
    ]:
        with pytest.raises(VideoError, match=message): read_clip(healthy, None, 1, limits=limits)
        with pytest.raises(VideoError): reencode(healthy, tmp_path / "b.mp4", limits=limits)
    assert not list(tmp_path.iterdir())  # nothing half-written
    assert len(read_clip(healthy, None, 1, limits=Limits(1 << 20, 160 * 128, 70, 60))) == 60


def test_a_frame_that_grows_on_the_way_hits_the_limit(tmp_path):
    small, large = (encode(tmp_path / f"{n}.264", pan((1, 0), 5, n, n)) for n in (64, 640))
    bomb = tmp_path / "bomb.264"
    bomb.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(VideoError, match="grows to"): read_clip(bomb, None, 1, limits=Limits(max_pixels=500**2))
    try: clip = read_clip(bomb, None, 1, limits=Limits(max_pixels=128 * 128))  # here FFmpeg itself refuses
    except VideoError: return
    assert set(clip.table["width"]) == {64}


def test_arguments(healthy):
    wrong = dict(frames=0), dict(stride=0), dict(start=-1), dict(indices=[]), dict(indices=[2, 1]), dict(indices=[0.5])
    for arguments in wrong:
        with pytest.raises(ValueError) as error: read_clip(healthy, **arguments)
        assert not isinstance(error.value, VideoError)


def test_writing_leaves_nothing_behind_when_it_fails(tmp_path):
    with pytest.raises(ValueError, match="uint8"): write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError): write_video(tmp_path / "a.mp4", pan((1, 0), 3, 32, 32), codec="nonsense")
    assert not list(tmp_path.iterdir())


# --- the field ---


@pytest.mark.parametrize("velocity", [(0, 0), (3, 2), (-5, 1), (0.5, -0.25), (7.75, -4.5), (-14, 6)])
def test_known_pans(velocity, tmp_path):
    frames = pan(velocity)
    path = encode(tmp_path / "ref1.mp4", frames, x264_params="ref=1:bframes=0:weightp=0")
    field = motion_field(read_clip(path, None, 1))
    error = field.velocity[field.weight > 0] - velocity
    assert_array_equal(np.median(abs(error), 0), 0)
    assert (abs(error).max(-1) <= 0.5).mean() > 0.95
    # x264's defaults (ref=3, bframes=3, b-pyramid). Which of three references a vector means is not exported; only at
    # whole pixels is the nearest as good as any (at 7.75 the one 4 frames back fits exactly, and is taken).
    if velocity != (int(velocity[0]), int(velocity[1])): return
    field = motion_field(read_clip(encode(tmp_path / "default.mp4", frames), None, 1))
    error = field.velocity[field.weight > 0] - velocity
    assert_array_equal(np.median(abs(error), 0), 0)
    assert (abs(error).max(-1) <= 0.5).mean() > 0.95


def test_b_frames_of_mpeg4_are_unknown_not_still(tmp_path):
    clip = read_clip(encode(tmp_path / "a.avi", pan((3, 2)), "mpeg4", bf=2, g=12), None, 1)
    b = clip.table["type"] == "B"
    assert b.any() and not any(clip.vectors[i][:, 4:].any() for i in np.flatnonzero(b) if clip.vectors[i] is not None)
    field = motion_field(clip)
    assert not field.valid[b].any() and not field.weight[b].any()
    assert np.isnan(field.to_tokens((24, 10, 13))[0][b]).all()
    assert_allclose(np.median(field.fill().velocity[b], (0, 1, 2)), (3, 2), atol=0.1)


def test_intra_blocks_and_frames_are_unknown_until_filled(tmp_path):
    "Something appears that was nowhere before: the encoder codes it anew, and says nothing of its motion"
    frames, rng = pan((4, 0), 12, 256, 192), np.random.default_rng(1)
    frames[6:, 64:128, 96:160] = rng.integers(0, 255, (6, 64, 64, 1), np.uint8)  # new noise in every frame
    path = encode(tmp_path / "a.mp4", frames, crf=10, x264_params="ref=1:bframes=0:scenecut=0:keyint=8")
    field = motion_field(read_clip(path, None, 1))
    assert not field.valid[[0, 8]].any() and field.valid.sum() == 10
    assert (field.coverage[9:, 5:7, 7:9] == 0).mean() > 0.5
    filled = field.fill()
    assert filled.valid.all() and (filled.coverage == 1).all()
    assert_allclose(np.median(filled.velocity[[0, 8]], (1, 2)), [(4, 0)] * 2, atol=0.1)
    assert_allclose(np.median(filled.velocity[9:, 5:7, 7:9], (0, 1, 2)), (4, 0), atol=0.5)
    token = np.s_[:, 5:7, 7:9]
    assert np.isnan(field.to_tokens((12, 12, 16))[0][token]).any()
    assert np.isfinite(filled.to_tokens((12, 12, 16))[0]).all()


def paint(clip, width, height):
    "The field pixel by pixel, slowly: what `_rasterise` claims to compute"
    h, w = -(-height // CELL) * CELL, -(-width // CELL) * CELL
    total, count = np.zeros((len(clip.table), h, w, 2)), np.zeros((len(clip.table), h, w))
    for t, (vectors, row) in enumerate(zip(clip.vectors, clip.table, strict=True)):
        if vectors is None: continue
        twins = {}
        for source, size, x, y, mx, my in vectors.tolist(): twins.setdefault((size, x, y), {})[source] = (mx, my)
        for (size, x, y), motions in twins.items():
            bw, bh = size & 255, size >> 8 & 255
            for source, m in motions.items():
                phantom = m == (0, 0) and motions.get(-source, (0, 0)) != (0, 0) and (bw, bh) != (16, 16)
                if phantom or not (0 <= x < w and 0 <= y < h): continue
                distance = -max(row["past"], 1) if source < 0 else max(row["future"], 1)
                box = np.s_[t, y - bh // 2 : y + bh // 2, x - bw // 2 : x + bw // 2]
                total[box] += np.array(m) / (clip.motion_scale * distance)
                count[box] += 1
    cells = (len(total), h // CELL, CELL, w // CELL, CELL)
    total, count = total.reshape(*cells, 2).sum((2, 4)), count.reshape(cells).sum((2, 4))
    return total / np.maximum(count, 1)[..., None], np.minimum(count / CELL**2, 1)


def test_blocks_in_the_padding_do_not_wrap_around():
    outside = np.array([[-1, 16 | 16 << 8, x, y, 4, 4] for x, y in ((-8, 8), (40, 8), (8, -8), (8, 40))], np.int16)
    velocity, coverage = motion._rasterise([outside], np.ones(1, int), np.ones(1, int), 32, 32, 4, True)
    assert not velocity.any() and not coverage.any()


@pytest.mark.parametrize("name", ["asl_walk_h264_b.mkv", "nasa_h264_b.mp4", "bigbuckbunny_b.264", "cup_h264_p.mp4"])
def test_rasterising_equals_painting_every_pixel(name):
    clip = read_clip(real(name), 12, 1, 30, pixels=False)
    field = motion_field(clip)
    velocity, coverage = paint(clip, field.width, field.height)
    assert_allclose(field.velocity, velocity, atol=1e-4)
    assert_allclose(field.coverage, coverage, atol=1e-6)


def twin_counts(vectors):
    "Moving twins of divided blocks, and how many of them have exactly one zero"
    twins = {}
    for source, size, x, y, mx, my in vectors.tolist():
        if size != 16 | 16 << 8: twins.setdefault((size, x, y), {})[source] = (mx, my) != (0, 0)
    moving = [sum(t.values()) for t in twins.values() if len(t) == 2 and any(t.values())]
    return len(moving), moving.count(1)


@pytest.mark.parametrize("name", ["asl_walk_h264_b.mkv", "bigbuckbunny_b.264", "box_h264_b.mp4", "nasa_h264_b.mp4"])
def test_phantoms_are_many_and_all_are_dropped(name):
    clip = read_clip(real(name), 60, 1, 250 if "nasa" in name else 20, pixels=False)
    b = [v for v, kind in zip(clip.vectors, clip.table["type"], strict=True) if kind == "B" and v is not None]
    before = np.sum([twin_counts(v) for v in b], 0)
    after = np.sum([twin_counts(np.delete(v, motion.phantoms(v.T, cell_of(v)), 0)) for v in b], 0)
    assert 0.55 < before[1] / before[0] < 0.9
    assert after[1] == 0


def cell_of(v):
    return (v[:, 3].astype(int) >> 4) * 1000 + (v[:, 2] >> 4)


def warp(image, velocity):
    "Where the content of `image` is one frame later, if every cell moves by `velocity`; bilinear"
    h, w = image.shape
    v = velocity.repeat(CELL, 0).repeat(CELL, 1)[:h, :w]
    y, x = np.mgrid[:h, :w]
    x, y = (x - v[..., 0]).clip(0, w - 1.001), (y - v[..., 1]).clip(0, h - 1.001)
    i, j = y.astype(int), x.astype(int)
    a, b = y - i, x - j
    top, below = image[i, j] * (1 - b) + image[i, j + 1] * b, image[i + 1, j] * (1 - b) + image[i + 1, j + 1] * b
    return top * (1 - a) + below * a


def gain(path, config, start=0, frames=24):
    "Mean squared error of no, of our, and of the negated motion, each from the frame before"
    clip = read_clip(path, frames, 1, start)
    velocity, grey = motion_field(clip, config).velocity, clip.frames.mean(-1)
    pairs = [(grey[i], grey[i - 1], velocity[i]) for i in range(1, len(grey))]
    error = [[np.square(now - warp(last, s * v)).mean() for s in (0, 1, -1)] for now, last, v in pairs]
    return np.mean(error, 0)


MOVING = {  # name: where it moves most, decibels to win
    "asl_walk_h264_b.mkv": (65, 2.5), "bigbuckbunny_b.264": (168, 3.5), "bigbuckbunny_h264_p.mp4": (168, 7),
    "bigbuckbunny_mpeg4.mp4": (168, 7), "bottle_h264_b.mp4": (519, 2.5), "box_h264_b.mp4": (227, 7),
    "cars_h264_p.mp4": (94, 8), "cup_h264_p.mp4": (93, 9), "nasa_h264_b.mp4": (240, 3),
    "people_h264_gop10.mp4": (505, 2.5),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVING)
def test_our_motion_beats_none_and_the_negated_loses(name):
    start, decibels = MOVING[name]
    still, ours, negated = gain(real(name), MotionConfig(), start)
    assert 10 * np.log10(still / ours) > decibels
    assert negated > still


@pytest.mark.parametrize("name", ["asl_walk_h264_b.mkv", "box_h264_b.mp4", "bigbuckbunny_b.264"])
def test_the_cares_for_b_frames_pay(name, monkeypatch):
    "Without the division by distance, or with phantoms, the frame before explains less"
    start = MOVING[name][0]
    _, ours, _ = gain(real(name), MotionConfig(), start)
    with monkeypatch.context() as m:
        m.setattr(video, "_set_distances", lambda table: None)
        assert gain(real(name), MotionConfig(), start)[1] > 1.02 * ours
    with monkeypatch.context() as m:
        m.setattr(motion, "phantoms", lambda columns, cell: [])
        assert gain(real(name), MotionConfig(), start)[1] > (0.999 if "box" in name else 1.001) * ours


def random_field(t=6, h=9, w=13, seed=0):
    rng = np.random.default_rng(seed)
    velocity, coverage = np.float32(rng.normal(size=(t, h, w, 2))), np.float32(rng.random((t, h, w)))
    return MotionField(velocity, coverage, np.ones(t, bool), w * CELL - 5, h * CELL - 3)


def test_tokens_follow_crop_and_mirror():
    field = random_field()
    energy, velocity = field.to_tokens((3, 4, 5), box=(20, 10, 150, 100))
    mirrored = replace(field, velocity=field.velocity[:, :, ::-1] * (-1, 1), coverage=field.coverage[:, :, ::-1])
    mirrored.origin = (field.width - field.velocity.shape[2] * CELL, 0)
    other, v = mirrored.to_tokens((3, 4, 5), box=(field.width - 20 - 150, 10, 150, 100))
    assert_allclose(energy[:, :, ::-1], other, rtol=1e-4)
    flipped, w = field.to_tokens((3, 4, 5), box=(20, 10, 150, 100), flip=True)
    assert_allclose(other, flipped, rtol=1e-4)
    assert_allclose(v, w, rtol=1e-3, atol=1e-5)
    assert_allclose(w[:, :, ::-1] * (-1, 1), velocity, rtol=1e-4)
    whole, _ = field.to_tokens((3, 4, 5), box=(0, 0, 200, 140))
    left, _ = field.to_tokens((3, 4, 2), box=(0, 0, 80, 140))
    assert_allclose(whole[..., :2], left, rtol=1e-4)  # a token is a token, whatever the crop around


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_tokens_follow_a_turn(turns):
    "Turning the field and its box turns the tokens"
    field = random_field()
    energy, velocity = field.to_tokens((3, 6, 6), box=(16, 8, 120, 96))
    x, y, w, h = 16, 8, 120, 96
    right, below = field.width - x - w, field.height - y - h
    box = [None, (y, right, h, w), (right, below, w, h), (below, x, h, w)][turns]
    other, v = motion._turn(field, turns).to_tokens((3, 6, 6), box=box)
    assert_allclose(np.rot90(energy, turns, (1, 2)), other, rtol=1e-4)
    for _ in range(turns): velocity = np.stack([velocity[..., 1], -velocity[..., 0]], -1)
    assert_allclose(np.rot90(velocity, turns, (1, 2)), v, rtol=1e-3, atol=1e-5)


def test_energy_sees_what_waves_and_max_what_flashes():
    velocity = np.zeros((8, 4, 4, 2), np.float32)
    velocity[::2, 1, 1], velocity[1::2, 1, 1], velocity[3, 2, 2] = (4, 0), (-4, 0), (8, 0)
    field = MotionField(velocity, np.ones((8, 4, 4), np.float32), np.ones(8, bool), 64, 64)
    energy, mean = field.to_tokens((1, 4, 4))
    assert_allclose([energy[0, 1, 1], mean[0, 1, 1, 0], energy[0, 2, 2]], [2, 0, 0.5])
    assert field.to_tokens((1, 4, 4), pool="max")[0][0, 2, 2] == 4
    assert not np.isnan(MotionConfig(smooth=True).apply(field).velocity).any()


@pytest.mark.parametrize("model", ["translation", "affine"])
def test_compensation_leaves_what_moves_by_itself(model, tmp_path):
    "A patch moves over a panning texture; still, and moving against the pan"
    frames = pan((4, 2), 16, 256, 192)
    patch = pan((0, 0), 1, 48, 48, seed=3)[0]
    for i, f in enumerate(frames): f[64 : 64 + 48, 40 + 6 * i : 88 + 6 * i] = patch
    path = encode(tmp_path / "a.mp4", frames, x264_params="ref=1:bframes=0")
    raw = MotionConfig().apply(motion_field(read_clip(path, None, 1)))
    field = MotionConfig(compensate=model).apply(motion_field(read_clip(path, None, 1)))
    speed = np.linalg.norm(field.velocity, axis=-1)
    assert np.median(np.linalg.norm(raw.velocity, axis=-1)) > 4
    assert np.median(speed) < 0.1
    hit = [speed[i, 5, (64 + 6 * i) // CELL] for i in range(1, 16)]
    assert_allclose(np.median(hit), np.hypot(2, -2), atol=0.6)


def test_estimated_motion(tmp_path):
    frames = pan((3, -2), 8, 200, 150)
    field = estimate_motion(frames)
    assert field.velocity.shape == (8, 10, 13, 2) and field.valid.all()
    known = field.weight > 0
    for t in range(8): assert_array_equal(np.median(field.velocity[t][known[t]], 0), (3, -2))
    hevc = encode(tmp_path / "a.mkv", frames, "libx265", x265_params="log-level=none", crf=10)
    assert_array_equal(np.median(estimate_motion(hevc, start=2, frames=4).velocity[known[:4]], 0), (3, -2))
    assert not estimate_motion(frames[:1]).valid.any()


def test_clips_without_any_vectors_stay_unknown(tmp_path):
    path = encode(tmp_path / "a.mp4", pan((3, 0), 8), g=1)
    clip = read_clip(path, 8, 1)
    energy, velocity = motion_field(clip, MotionConfig()).to_tokens((4, 10, 13), keep=clip.keep)
    assert np.isnan(energy).all() and np.isnan(velocity).all()
    with pytest.raises(ValueError, match="vectors=False"): motion_field(read_clip(path, vectors=False))


# --- stored fields ---


def store(path, folder):
    "The field of a video as `mgm extract` writes it"
    folder.mkdir(exist_ok=True)
    return save_motion(folder / f"{path.name}.npz", motion_field(read_clip(path, None, 1)), motion_key(path))


def test_a_stored_field_is_what_was_saved(tmp_path):
    path = encode(tmp_path / "a.mp4", pan((3, -1), 30), x264_params="ref=1:bframes=0")
    field, file = motion_field(read_clip(path, None, 1)), store(path, tmp_path / "fields")
    again = stored_motion(path, tmp_path / "fields")
    assert abs(again.velocity - field.velocity).max() <= 1 / 8
    assert abs(again.coverage - field.coverage).max() <= 1 / 510
    assert_array_equal(again.valid, field.valid)
    assert (again.width, again.height, again.origin) == (field.width, field.height, field.origin)
    assert list((tmp_path / "fields").iterdir()) == [file]  # nothing temporary stays
    assert file.stat().st_size < 30 * 500


def test_a_stale_field_is_refused(tmp_path, monkeypatch):
    path, folder = encode(tmp_path / "a.mp4", pan((3, -1), 12)), tmp_path / "fields"
    with pytest.raises(VideoError, match="a.mp4: no motion of it in .*fields"): stored_motion(path, folder)
    file = store(path, folder)
    encode(path, pan((-5, 2), 12))  # another video under the same name
    with pytest.raises(VideoError, match="a.mp4: .*a.mp4.npz is not its motion"): stored_motion(path, folder)
    store(path, folder)
    assert_allclose(np.median(stored_motion(path, folder).fill().velocity, (0, 1, 2)), (-5, 2), atol=0.1)
    key = motion_key(path)
    assert key != motion_key(path, stride=2)
    monkeypatch.setattr(av, "library_versions", {**av.library_versions, "libavcodec": (99, 0, 0)})
    assert motion_key(path) != key
    assert load_motion(file, motion_key(path)) is None


def test_a_damaged_field_is_refused(tmp_path):
    path, folder = encode(tmp_path / "a.mp4", pan((3, -1), 12)), tmp_path / "fields"
    file = store(path, folder)
    good = stored_motion(path, folder)
    data, key, rng = file.read_bytes(), motion_key(path), np.random.default_rng(0)
    versions = [b"", b"noise", data[: len(data) // 2], data[:-1]]
    for at in rng.integers(0, len(data), 60): versions.append(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    for version in versions:
        file.write_bytes(version)
        field = load_motion(file, key)  # a flip that no reader notices changes nothing
        assert field is None or (abs(field.velocity - good.velocity).max() <= 0.125 and field.width == good.width)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="damaged"): stored_motion(path, folder)
    np.savez(file, key=np.array({"a": 1}, dtype=object))  # a pickle inside is not loaded
    assert load_motion(file, key) is None
    assert load_motion(folder / "none.npz", key) is None


def test_two_writers_of_one_cache_do_not_meet(tmp_path):
    "Both write; the file is whole at every moment anybody looks"
    field, target = random_field(60, 20, 20), tmp_path / "a.npz"
    script = (
        "import sys, numpy as np; from mgm_nb.motion import *\n"
        "v = np.ones((60, 20, 20, 2), np.float32)\n"
        "f = MotionField(v, v[..., 0], np.ones(60, bool), 320, 320)\n"
        "for _ in range(30): save_motion(sys.argv[1], f, 'k')"
    )
    save_motion(target, field, "k")
    writers = [subprocess.Popen([sys.executable, "-c", script, str(target)]) for _ in range(2)]
    looks = 0
    while any(w.poll() is None for w in writers):
        assert load_motion(target, "k") is not None
        looks += 1
    assert [w.returncode for w in writers] == [0, 0] and looks
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_every_sampled_frame_is_told(tmp_path):
    path, told = encode(tmp_path / "a.mp4", pan((3, -1), 12)), []
    read_clip(path, 8, 2, tell=lambda *counts: told.append(counts))  # the video ends before the clip does
    assert told == [(i, 8) for i in range(1, 9)]  # the last frame is held
