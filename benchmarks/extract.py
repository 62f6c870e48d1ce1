"""How fast is bulk work, and what does re-encoding buy?

Clips: the seven of $MGM_VIDEOS that are H.264 in a container, at most 10 s each, made like Kinetics by clips.py.

    python benchmarks/extract.py [--json] [--rounds 5]

1. `extract_folder` with one and two workers: files/s, hours of video/s (wall clock), CPU seconds per file.
2. Loading training clips (16 RGB frames, stride 4, random start, with vectors) from the originals and from what
   `reencode_folder` made of them: CPU time, the two interleaved, each pair a ratio. Bytes of both.
3. Which motion is truer? Error in px/frame on sprite clips of known velocity, each encoded in three ways.
"""
import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from clips import encode, film, shrink

from mgm_nb.extract import BulkConfig, extract_folder, reencode_folder
from mgm_nb.motion import motion_field
from mgm_nb.synth import MOTIONS, Rendered, SpriteScene, render
from mgm_nb.video import MOTION_PRESET, read_clip, reencode, write_video

REAL = """asl_walk_h264_b.mkv bigbuckbunny_h264_p.mp4 bottle_h264_b.mp4 box_h264_b.mp4 cars_h264_p.mp4 cup_h264_p.mp4
people_h264_gop10.mp4""".split()


def cpu() -> float:
    "CPU seconds of this process and of the children that ended"
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def bulk(folder: Path, workers: int) -> dict:
    "One extraction of everything"
    out = Path(tempfile.mkdtemp(dir=folder.parent))
    wall, used = time.perf_counter(), cpu()
    lines = extract_folder(folder, out, BulkConfig(workers=workers, progress=False))
    wall, used = time.perf_counter() - wall, cpu() - used
    assert all(line["outcome"] == "ok" for line in lines)
    shutil.rmtree(out)
    hours = sum(line["duration"] for line in lines) / 3600
    return {"files_s": len(lines) / wall, "hours_s": hours / wall, "cpu_s_file": used / len(lines)}


def loading(path: Path, seed: int) -> float:
    "CPU seconds to load one training clip"
    start = time.process_time()
    read_clip(path, frames=16, stride=4, generator=np.random.default_rng(seed))
    return time.process_time() - start


def motion_error(path: Path, known: Rendered) -> tuple[float, float]:
    "Mean error of a file's own motion in px/frame: where the object is, and everywhere"
    field = motion_field(read_clip(path, frames=None, stride=1)).fill()
    frames, height, width = field.velocity.shape[:3]
    y, x = np.mgrid[:height, :width] * 16 + 8
    x0, y0, x1, y1 = known.boxes.T[:, :, None, None]
    inside = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
    want = np.where(inside[..., None], known.velocity[:, None, None], known.camera[:, None, None])
    error = np.linalg.norm(field.velocity - want, axis=-1)[1:]  # nothing has moved yet in the first frame
    return error[inside[1:]].mean(), error.mean()


def same_size(target: Path, frames: np.ndarray, size: int):
    "Encode with the `motion` preset and the quality that comes closest to `size` bytes"
    def distance(crf):
        write_video(target, frames, options=MOTION_PRESET | {"crf": str(crf)})
        return abs(target.stat().st_size - size)

    distance(min(range(18, 34), key=distance))


def truth(folder: Path) -> dict:
    "Errors of x264's defaults, of the `motion` preset at the same bytes, and of what `reencode` makes of the former"
    names, rows = ("defaults", "same_size", "reencoded"), []
    for seed, motion in enumerate(MOTIONS):
        ways = {"speed": 2 + 2 * (seed % 4), "pan": 1.5 * (seed % 3), "seed": seed}
        known = render(SpriteScene(motion, size=240, frames=64, diameter=70, noise=4, **ways))
        first = write_video(folder / "defaults.mp4", known.frames)
        same_size(folder / "same_size.mp4", known.frames, first.stat().st_size)
        reencode(first, folder / "reencoded.mp4")
        rows.append([motion_error(folder / f"{name}.mp4", known) for name in names])
    means = [{"object_px": round(float(a), 3), "all_px": round(float(b), 3)} for a, b in np.mean(rows, 0)]
    return dict(zip(names, means, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=6, help="files made of each clip")
    args = parser.parse_args()
    if "MGM_VIDEOS" not in os.environ: parser.error("MGM_VIDEOS has to name the folder of the real clips")
    with tempfile.TemporaryDirectory() as scratch:
        originals, many = Path(scratch) / "originals", Path(scratch) / "many"
        originals.mkdir(), many.mkdir()
        for path in (Path(os.environ["MGM_VIDEOS"]) / name for name in REAL):
            encode(shrink(film(path)), originals / f"{path.stem}.mp4")
        paths = sorted(originals.iterdir())
        for path in paths:
            for k in range(args.copies): shutil.copy(path, many / f"{path.stem}_{k}.mp4")

        runs = {1: [], 2: []}
        for _ in range(args.rounds):
            for workers in runs: runs[workers].append(bulk(many, workers))
        result = {"clips": len(paths), "files": len(paths) * args.copies, "cores": os.cpu_count()}
        for workers, found in runs.items():
            result[f"workers_{workers}"] = {key: round(median(run[key] for run in found), 5) for key in found[0]}
            print(f"extract, {workers} worker(s): {result[f'workers_{workers}']}")

        again = Path(scratch) / "reencoded"
        start = time.perf_counter()
        lines = reencode_folder(originals, again, bulk=BulkConfig(workers=2, progress=False))
        assert all(line["outcome"] == "ok" for line in lines)
        result["reencode_files_s"] = round(len(lines) / (time.perf_counter() - start), 3)
        print(f"\n{'clip':22}{'KB':>14}{'clips/s/core':>18}{'ratio':>8}")
        sizes, ratios = [], []
        for path in paths:
            new = again / path.name
            pairs = [(loading(path, k), loading(new, k)) for k in range(8 * args.rounds)]
            before, after = (1 / median(pair[i] for pair in pairs) for i in (0, 1))
            ratios.append(median(a / b for a, b in pairs))
            sizes.append((path.stat().st_size >> 10, new.stat().st_size >> 10))
            kb = "{:>5} -> {:>5}".format(*sizes[-1])
            print(f"{path.stem:22}{kb}{before:>9.1f} -> {after:>5.1f}{ratios[-1]:>8.2f}")
        spread = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
        result["loading_speedup"] = {name: round(ratio, 2) for name, ratio in spread.items()}
        old, new = np.sum(sizes, 0)
        result["bytes_ratio"] = round(float(new / old), 2)
        result["motion_error"] = truth(Path(scratch))
        for key in ("loading_speedup", "bytes_ratio", "motion_error"): print(key, result[key])
        if args.json: print(json.dumps(result))


if __name__ == "__main__": main()
