"""Files from strangers: whatever their bytes, `read_clip` returns a Clip or raises VideoError, soon, opening no other.

CI reads a seeded sample; this a thousand: `MGM_HOSTILE=1000 python -m pytest -s tests/test_hostile.py`
"""
import ctypes
import os
import re
import select
import socket
import struct
import tempfile
import time
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from mgm_nb.extract import BulkConfig, WorkerProcess, run_jobs
from mgm_nb.motion import motion_field
from mgm_nb.video import Limits, VideoError, read_clip, reencode

COUNT = int(os.environ.get("MGM_HOSTILE", 110))
SECONDS = 5.0  # the limit that every read is given
LIMITS = Limits(max_frames=5_000, max_pixels=2048 * 2048, seconds=SECONDS)


# --- good files to begin with ---------------------------------------------------------------------------------------


def encode(path, codec="libx264", size=(96, 64), frames=24, pix_fmt="yuv420p", contrast=1, **options):
    "A moving texture in any codec and container"
    width, height = size
    texture = contrast * np.random.default_rng(0).integers(0, 255, (height + frames, width + 2 * frames, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, width=width, height=height, pix_fmt=pix_fmt, options=options)
        for t in range(frames):
            pixels = np.ascontiguousarray(texture[t : t + height, 2 * t : 2 * t + width])
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = t
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode_sound(path, codec="aac"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "Name -> bytes of small, valid files"
    folder = tmp_path_factory.mktemp("good")
    encode(folder / "b.mp4", bf="3", refs="3", g="12")
    encode(folder / "fast.mp4", bf="0", g="8", movflags="faststart", preset="ultrafast")
    encode(folder / "large.mp4", size=(160, 128), bf="0", g="6")
    encode(folder / "b.mkv", bf="2", g="12")
    encode(folder / "b.avi", bf="0")
    encode(folder / "b.ts", bf="2", g="6")
    encode(folder / "b.h264", bf="2", g="6")
    encode(folder / "ten.mp4", pix_fmt="yuv420p10le")
    encode(folder / "part2.avi", codec="mpeg4", bf="2", g="12")
    encode(folder / "part2.mp4", codec="mpeg4", g="12")
    encode(folder / "two.mpg", codec="mpeg2video", bf="2", g="12")
    encode(folder / "vp9.webm", codec="libvpx-vp9", frames=4, deadline="realtime")
    clips = os.environ.get("MGM_VIDEOS")
    real = [Path(clips) / name for name in ("asl_walk_h264_b.mkv", "nasa_h264_b.mp4")] if clips else []
    return {path.name: path.read_bytes() for path in [*sorted(folder.iterdir()), *real]}


# --- bytes that changed ---------------------------------------------------------------------------------------------


def place(rng, data, longest):
    "A random stretch of `data`, half of the time near an end, where the headers are"
    n = int(rng.integers(1, min(longest, len(data)) + 1))
    last = len(data) - n
    start = rng.integers(0, last + 1)
    if rng.random() < 0.5: start = min(start, 2000) if rng.random() < 0.5 else max(last - 2000, start)
    return int(start), n


def flip(rng, data, other):
    out = bytearray(data)
    for _ in range(int(2 ** rng.uniform(0, 7))): out[place(rng, data, 1)[0]] = rng.integers(256)
    return out


def integers(rng, data, other):
    "Numbers that lie: sizes, counts and offsets of four bytes"
    out = bytearray(data)
    for _ in range(int(2 ** rng.uniform(0, 4))):
        start = place(rng, data, 4)[0]
        value = rng.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
        out[start : start + 4] = struct.pack(">I" if rng.random() < 0.5 else "<I", int(value))
    return out


def cut(rng, data, other): return data[: rng.integers(len(data))]
def behead(rng, data, other): return data[rng.integers(1, len(data)) :]


def blank(rng, data, other):
    start, n = place(rng, data, 4000)
    return data[:start] + bytes(n) + data[start + n :]


def repeat(rng, data, other):
    start, n = place(rng, data, 4000)
    return data[: start + n] + data[start : start + n] * int(rng.integers(1, 20)) + data[start + n :]


def splice(rng, data, other):
    (start, n), (there, m) = place(rng, data, 4000), place(rng, other, 4000)
    return data[:start] + other[there : there + m] + data[start + n :]


def join(rng, data, other): return data + other


BYTES = [flip, flip, integers, cut, behead, blank, repeat, splice, join]


# --- packets that changed -------------------------------------------------------------------------------------------


def remux(rng, source, other, target):
    "The packets of `source`, some lost, shortened, flipped, mistimed, or taken from `other`, under a valid header"
    with av.open(str(source)) as a, av.open(str(other)) as b, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(a.streams.video[0])
        packets = [p for p in a.demux(video=0) if p.size]
        strangers = [p for p in b.demux(video=0) if p.size]
        step = max(1, int(packets[0].duration or 512))
        last = -1
        fates = ["keep"] * 10 + ["lose", "short", "flip", "strange", "late"]
        for p in packets:
            fate = rng.choice(fates)
            if fate == "lose": continue
            data = bytes(p)
            if fate == "strange": data = bytes(strangers[int(rng.integers(len(strangers)))])
            if fate == "short": data = data[: int(rng.integers(1, len(data) + 1))]
            if fate == "flip": data = bytes(flip(rng, data, b""))
            q = av.Packet(data)
            q.stream, q.time_base, q.is_keyframe = stream, p.time_base, p.is_keyframe
            last += step if fate != "late" else int(rng.choice([1, 10**6, 2**31]))  # a muxer wants growing dts
            q.dts, q.pts = last, last + int(rng.choice([0, 0, 2, 10**6])) * step
            out.mux(q)
    return target


# --- files made to harm ---------------------------------------------------------------------------------------------


def playlists(victim, port):
    "Text that asks FFmpeg to open `victim` or to call on the network: name -> text"
    url = f"http://127.0.0.1:{port}/x.ts"
    names = {"near": victim.name, "absolute": str(victim), "url": f"file://{victim}", "net": url}
    for key, name in names.items():
        yield f"{key}.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{name}\n#EXT-X-ENDLIST\n"
        yield f"{key}.ffconcat", f"ffconcat version 1.0\nfile '{name}'\n"
        yield f"{key}.mpd", (
            "<?xml version='1.0'?>"
            "<MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static' mediaPresentationDuration='PT9S'>"
            f"<Period><AdaptationSet><Representation id='0' bandwidth='1'><BaseURL>{name}</BaseURL>"
            "</Representation></AdaptationSet></Period></MPD>"
        )
    head = f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{victim.name}"\n'
    yield "key.m3u8", f"{head}#EXTINF:9,\n{victim.name}\n#EXT-X-ENDLIST\n"
    head = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    yield "session.sdp", f"{head}m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"


def external_reference(data, victim):
    "An mp4 whose samples are said to lie in `victim` (a QuickTime alias in `dref`)"
    path = str(victim).encode()
    body = bytes(4) + struct.pack(">HH", 0, 2) + bytes(8 + 28 + 64 + 4 + 8 + 2) + struct.pack(">hh", 0, 0) + bytes(18)
    body += struct.pack(">hH", 2, len(path)) + path + b"\0" * (len(path) % 2) + struct.pack(">h", -1) + bytes(2)
    alias = struct.pack(">I4s", 8 + len(body), b"alis") + body
    old = data.index(b"dref") - 4
    size = struct.unpack(">I", data[old : old + 4])[0]
    new = struct.pack(">I4sII", 16 + len(alias), b"dref", 0, 1) + alias
    out = bytearray(data[:old] + new + data[old + size :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):  # the boxes around it grow
        at = data.index(box) - 4
        out[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + len(new) - size)
    return bytes(out)


def bomb_header(folder, size):
    "A few small frames under a header that says `size` x `size`"
    with av.open(str(folder / "small.mp4")) as a, av.open(str(folder / "bomb.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25, width=size, height=size, options={"preset": "ultrafast"})
        stream.codec_context.open()
        for p in a.demux(video=0):
            if not p.size: continue
            q = av.Packet(bytes(p))
            q.stream, q.time_base, q.pts, q.dts, q.is_keyframe = stream, p.time_base, p.pts, p.dts, p.is_keyframe
            out.mux(q)
    return (folder / "bomb.mp4").read_bytes()


def many_frames(source, target, count):
    "The packets of one clip again and again, `count` frames in all"
    with av.open(str(source)) as a, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(a.streams.video[0])
        packets = [bytes(p) for p in a.demux(video=0) if p.size]
        for k in range(count):
            q = av.Packet(packets[k % len(packets)])
            q.stream, q.time_base, q.is_keyframe = stream, Fraction(1, 25), k % len(packets) == 0
            q.pts = q.dts = k
            out.mux(q)
    return target.read_bytes()


def made_to_harm(good, folder, victim, port):
    "(name, bytes) of every file that needs no chance"
    for name, text in playlists(victim, port):
        yield name, text.encode()
        yield f"{name}.mp4", text.encode()  # FFmpeg believes the bytes, not the name
    yield "empty.mp4", b""
    yield "one.mp4", b"\0"
    yield "noise.mp4", np.random.default_rng(1).bytes(50_000)
    yield "text.avi", b"These are not the frames you are looking for.\n" * 100
    yield "alias.mov", external_reference(good["fast.mp4"], victim)
    yield "no_moov.mp4", good["b.mp4"][: good["b.mp4"].index(b"moov") - 4]
    yield "only_moov.mp4", good["b.mp4"][good["b.mp4"].index(b"moov") - 4 :]
    yield "no_picture.h264", good["b.h264"][:64]
    grey = encode(folder / "grey.mp4", size=(64, 48), contrast=0, bf="0")
    yield "frames_100000.mp4", many_frames(grey, folder / "many.mp4", 100_000)
    (folder / "small.mp4").write_bytes(good["fast.mp4"])
    yield "bomb.mp4", bomb_header(folder, 12288)
    # Motion JPEG keeps its size in the frame: the container says 96 x 64, the frame 12288 x 12288
    photos = encode(folder / "photos.avi", codec="mjpeg", pix_fmt="yuvj420p", frames=3).read_bytes()
    yield "bomb_jpeg.avi", photos.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", 12288, 12288))
    large = encode(folder / "x.h264", size=(4096, 2304), frames=2).read_bytes()
    yield "grows.h264", good["b.h264"] + large + good["b.h264"]
    for a, b in (("small", "large"), ("large", "small")):
        sizes = {"small": (96, 64), "large": (320, 240)}
        parts = [encode(folder / f"{name}.h264", size=sizes[name], bf="0").read_bytes() for name in (a, b, a)]
        yield f"{a}_{b}.h264", b"".join(parts)
    yield "sound.m4a", encode_sound(folder / "s.m4a").read_bytes()
    yield "sound.mkv", encode_sound(folder / "s.mkv").read_bytes()
    cover = encode(folder / "cover.png", codec="png", pix_fmt="rgb24", frames=1).read_bytes()
    yield "picture.png", cover
    yield "tiny.mp4", encode(folder / "t.mp4", size=(2, 2), frames=3).read_bytes()
    yield "single.mp4", encode(folder / "t.mp4", frames=1).read_bytes()
    simple = {"x265-params": "log-level=none:bframes=0"}  # with B-frames, two frames get a random dts
    yield "hevc.mkv", encode(folder / "t.mkv", codec="libx265", frames=2, **simple).read_bytes()


def hostile_files(good, folder, scratch, victim, port, count):
    "Write `count` hostile files; the same ones for the same good files"
    files = []
    for name, data in made_to_harm(good, scratch, victim, port): files.append((name, data))
    for i in range(len(files), count):
        rng = np.random.default_rng(i)
        first, second = (str(rng.choice(list(good))) for _ in range(2))
        change = BYTES[int(rng.integers(len(BYTES)))]
        if i % 5:
            data = bytes(change(rng, good[first], good[second]))
            files.append((f"{i:04}_{change.__name__}_{first}", data))
        else:
            for name in {first, second}: (scratch / name).write_bytes(good[name])
            ending = str(rng.choice([".mp4", ".mkv", ".avi", ".ts"]))
            target = scratch / f"remuxed{ending}"
            try: remux(rng, scratch / first, scratch / second, target)
            except av.error.FFmpegError: target.write_bytes(good[first][::-1])  # this muxer refuses that codec
            files.append((f"{i:04}_packets_{first}{ending}", target.read_bytes()))
    for name, data in files[:count]: (folder / name).write_bytes(data)
    return [folder / name for name, _ in files[:count]]


# --- reading them ---------------------------------------------------------------------------------------------------


def sound_clip(source, **options):
    "A clip that keeps its promises"
    clip = read_clip(source, limits=LIMITS, **options)
    assert (np.asarray(clip.keep) < len(clip.table)).all()
    if options.get("pixels", True): assert clip.frames.dtype == np.uint8 and len(clip.frames) == len(clip.keep)
    if options.get("vectors", True):
        assert len(clip.vectors) == len(clip.table)
        assert np.isfinite(motion_field(clip).fill().velocity).all()
    return len(clip.keep)


def reencoded(source):
    "Frames of the clip after re-encoding"
    with tempfile.TemporaryDirectory() as folder:
        path = reencode(source, Path(folder) / source.with_suffix(".mp4").name, limits=LIMITS)
        return sound_clip(path, frames=None, stride=1)


def read_many_ways(source, target):
    "Ask for all that can be asked; a VideoError is an answer"
    ways = {
        "clip": partial(sound_clip),
        "whole": partial(sound_clip, frames=None, pixels=False),
        "late": partial(sound_clip, start=10, frames=4, stride=2, qp=True),
        "random": partial(sound_clip, generator=np.random.default_rng(0), vectors=False),
        "chosen": partial(sound_clip, indices=[0, 3, 9]),
    }
    if source.stat().st_size < 100_000: ways["reencoded"] = reencoded
    found = {"slowest": 0.0}
    for name, way in ways.items():
        start = time.monotonic()
        try:
            found[name] = way(source)
        except VideoError as error:
            assert source.name in str(error), f"the message names no file: {error}"
            found[name] = str(error)
        found["slowest"] = max(found["slowest"], time.monotonic() - start)
    # not ru_maxrss: a child starts with its parent's there
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return found | {"rss": int(peak) >> 10}


class Opened:
    "What anybody opens in a folder meanwhile, told by the kernel (inotify)"

    def __init__(self, folder):
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(folder), 0x20) < 0:  # IN_OPEN
            raise OSError(ctypes.get_errno(), "inotify")

    def names(self):
        names = set()
        while select.select([self.fd], [], [], 0)[0]:
            data = os.read(self.fd, 1 << 16)
            while data:
                _, mask, _, n = struct.unpack("iIII", data[:16])
                assert not mask & 0x4000, "events were lost"  # IN_Q_OVERFLOW
                names.add(data[16 : 16 + n].rstrip(b"\0").decode())
                data = data[16 + n :]
        return names


@pytest.fixture
def stage(tmp_path, good):
    "A folder with a file that must stay closed, a port on which nobody may call, and a watch on both"
    folder = tmp_path / "hostile"
    folder.mkdir()
    victim = folder / "victim.ts"
    victim.write_bytes(good["b.ts"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield folder, victim, server


def calls(server):
    "How many connections were made"
    count = 0
    while select.select([server], [], [], 0)[0]:
        server.accept()[0].close()
        count += 1
    return count


def test_the_watch_sees(stage):
    "FFmpeg by itself follows a playlist to other files and calls on the network: we would notice"
    folder, victim, server = stage
    port = server.getsockname()[1]
    (folder / "list.mp4").write_text(dict(playlists(victim, port))["near.ffconcat"])
    opened = Opened(folder)
    with av.open(str(folder / "list.mp4")) as container: assert len(list(container.decode(video=0))) == 24
    assert opened.names() == {"list.mp4", "victim.ts"}
    with pytest.raises(av.error.FFmpegError): av.open(f"http://127.0.0.1:{port}/x.ts", timeout=0.1)
    assert calls(server) == 1


def test_hostile_files(stage, good, tmp_path):
    folder, victim, server = stage
    (scratch := tmp_path / "scratch").mkdir()
    files = hostile_files(good, folder, scratch, victim, server.getsockname()[1], COUNT)
    opened = Opened(folder)
    bulk = BulkConfig(workers=2, seconds=5 * SECONDS, progress=False)  # six ways to read each
    lines = run_jobs("hostile", read_many_ways, files, tmp_path / "out", bulk=bulk)
    assert len(lines) == COUNT
    failed = [line for line in lines if line["outcome"] != "ok"]  # VideoErrors were caught: only the unforeseen is left
    names = opened.names()
    print(*failed, sep="\n")
    if COUNT >= 1000: report(lines)
    assert not failed, f"{len(failed)} of {COUNT}: {failed[0]}"
    assert victim.name not in names and {file.name for file in files} <= names
    assert calls(server) == 0
    assert max(line["slowest"] for line in lines) < 2 * SECONDS
    assert max(line["rss"] for line in lines) < 800, "MB"
    found = {line["file"]: line for line in lines}
    assert "max_pixels" in found["bomb.mp4"]["clip"] and "max_frames" in found["frames_100000.mp4"]["whole"]
    assert found["frames_100000.mp4"]["clip"] == found["small_large.h264"]["clip"] == 16
    assert "reencode" in found["hevc.mkv"]["clip"] and found["hevc.mkv"]["random"] == 16  # pixels need no vectors


def report(lines):
    "What became of the files, for a person to read"
    found = (line.get("clip", line.get("message")) for line in lines)
    outcomes = Counter("clip" if isinstance(way, int) else way.split(": ", 1)[-1][:60] for way in found)
    for text, n in outcomes.most_common(25): print(f"{n:5} {text}")
    for line in sorted(lines, key=lambda line: -line.get("slowest", 99))[:8]:
        print(f"{line.get('slowest', -1):6.2f} s {line.get('rss')} MB {line['file']}")


@pytest.mark.parametrize("name", ["pipe:0", "-", "concat:victim.ts|victim.ts", "subfile,,start,0,end,0,,:victim.ts",
                                  "file:victim.ts", "http://127.0.0.1:{port}/x.mp4", "data:video/mp4;base64,AAAA", "",
                                  "fifo", "/dev/zero", "folder", "missing.mp4", "loop"])
def test_hostile_names(name, stage, monkeypatch):
    "A name is a file's name, never an address, and only a regular file is opened"
    folder, victim, server = stage
    monkeypatch.chdir(folder)
    os.mkfifo("fifo")
    os.mkdir("folder")
    os.symlink("loop", "loop")
    opened = Opened(folder)
    with pytest.raises(RuntimeError, match="VideoError"):
        WorkerProcess().run(read_clip, name.format(port=server.getsockname()[1]), seconds=20)
    assert victim.name not in opened.names() and calls(server) == 0
