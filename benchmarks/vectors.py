"""What do vectors cost? CPU time of reading them, as a ratio to plain PyAV decoding in the same, interleaved rounds.

    MGM_VIDEOS=/folder/of/real/clips python benchmarks/vectors.py [--rounds 9] [--json]

The clips are those of clips.py.

"No pixels" is `read_clip(path, None, 1, pixels=False)`: nothing converted, and no loop filter. "Whole frames" decodes
every pixel beside the vectors, as one does who wants both: what it is above 1, the vectors add to that. The limit of
reading vectors is the decoder without the loop filter: FFmpeg cannot read a bit stream and draw nothing.
"""
import argparse
import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
from clips import FRAMES, HEIGHT, WIDTH, kinetics_like

sys.path.insert(0, str(Path(__file__).parents[1]))
from mgm_nb import video
from mgm_nb.motion import motion_field
from mgm_nb.video import Limits, read_clip


def plain(path: Path, loop_filter="default"):
    "Decode and forget, one thread, nothing converted"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.thread_count = "SLICE", 1
        stream.codec_context.options = {"skip_loop_filter": loop_filter}
        for _ in container.decode(stream): pass


def whole_frames(path: Path):
    "Vectors beside completely decoded, not converted pixels: what the vectors alone add"
    with video._open(path, Limits(), time.monotonic(), pixels=True, vectors=True) as source:
        packets = video._scan(source)
        return video._read(source, packets, range(len(packets)), True, None, pixels=False, vectors=True, qp=False)


def vectors_only(path: Path):
    return read_clip(path, None, 1, pixels=False)


def mv_extractor(path: Path):
    from mvextractor.videocap import VideoCap

    reader = VideoCap()
    reader.set_decode_frames(False)
    reader.open(str(path))
    while reader.read()[0]: pass


def farneback(path: Path, frames: int = 30):
    "Dense flow at 224 x 224, as papers compute it; scaled up to all frames"
    import cv2

    cv2.setNumThreads(1)
    begin, last = time.process_time(), None
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            grey = frame.reformat(224, 224, "gray").to_ndarray()
            if last is not None: cv2.calcOpticalFlowFarneback(last, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
            if i == frames: break
            last = grey
    return (time.process_time() - begin) * FRAMES / frames


READERS = {
    "vectors, whole frames": whole_frames,
    "vectors + field, whole frames": lambda path: motion_field(whole_frames(path)),
    "vectors, no pixels": vectors_only,
    "vectors + field, no pixels": lambda path: motion_field(vectors_only(path)),
    "mv-extractor, no pixels": mv_extractor,
    "decoder alone, no loop filter": partial(plain, loop_filter="all"),
}


def cpu(f, *args) -> float:
    begin = time.process_time()
    f(*args)
    return time.process_time() - begin


def ratios(path: Path, rounds: int) -> dict:
    "Median over rounds of each reader's CPU time by plain decoding's of the same round"
    times = [{"plain": cpu(plain, path)} | {name: cpu(f, path) for name, f in READERS.items()} for _ in range(rounds)]
    result = {name: float(np.median([t[name] / t["plain"] for t in times])) for name in READERS}
    base = float(np.median([t["plain"] for t in times]))
    field = float(np.median([t["vectors + field, no pixels"] for t in times]))
    return result | {"plain ms/frame": base * 1e3 / FRAMES, "Farneback / vectors + field": farneback(path) / field}


def rasterising(path: Path, rounds: int) -> dict:
    "Microseconds a frame, and the largest difference to painting every pixel"
    from tests.test_vectors import paint

    clip = vectors_only(path)
    best = min(cpu(motion_field, clip) for _ in range(3 * rounds)) / len(clip.table) * 1e6
    part = read_clip(path, 8, 1, 40, pixels=False)
    field = motion_field(part)
    velocity, coverage = paint(part, WIDTH, HEIGHT)
    error = max(abs(field.velocity - velocity).max(), abs(field.coverage - coverage).max())
    return {"us/frame": best, "error": float(error)}


def growth(path: Path, clips: int = 500) -> float:
    "MB that resident memory grows over so many clips"
    def rss(): return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def read(i): motion_field(read_clip(path, 16, 4, i % (FRAMES - 64)))

    for i in range(50): read(i)
    before = rss()
    for i in range(clips): read(i)
    return rss() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clips", type=int, default=500, help="for the memory")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in kinetics_like(Path(folder)).items():
            row = ratios(path, args.rounds)
            results[name] = row | {"kbit/s": path.stat().st_size * 8 / 1e4}
            print(f"{name:13}", *(f"{k} {v:.3g}" for k, v in results[name].items()), sep="  ")
        painted = rasterising(path, args.rounds)
        grown = growth(path, args.clips)
    means = {k: float(np.mean([row[k] for row in results.values()])) for k in READERS}
    print("\nmean over clips, plain decoding = 1:", *(f"{k:32} {v:.3f}" for k, v in means.items()), sep="\n  ")
    print(f"rasterising {painted['us/frame']:.1f} us/frame, {painted['error']:.1e} from painting every pixel")
    print(f"memory grew by {grown:.1f} MB over {args.clips} clips")
    if args.json: print(json.dumps({"clips": results, "mean": means, "rasterising": painted, "growth MB": grown}))


if __name__ == "__main__":
    main()
