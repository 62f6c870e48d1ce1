"""How many training clips a second does one core load, and where does the time go?

    MGM_VIDEOS=/folder/of/real/clips python benchmarks/loader.py [--rounds 15] [--json]

A training clip is 16 frames, every fourth, from a random start: uint8 RGB in memory. All readers get the same numbers
in every round, and take turns; what counts is the CPU time of this process, one thread each. Clips: clips.py.

1. Reading: ours without vectors, with them, and with motion that `mgm extract` stored, beside torchcodec's frames
   (both of its seek modes) and decord's. Frames must be equal, bit for bit. "Decoder alone" is the limit: FFmpeg's
   decoder on the packets that a clip with all of its vectors cannot do without, nothing converted or kept.
2. The same after `mgm reencode`.
3. A whole item of `ClipDataset` (decode, motion field, crop and resize to 224, tokens), 4 views of a decode against 1.
4. Clips a second by the number of the loader's workers, wall clock.

The peers are extras: pip install -e '.[bench]', and FFmpeg's shared libraries for torchcodec (apt install ffmpeg).
"""
import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import av
import numpy as np
import torch
from clips import RECIPES, kinetics_like

from mgm_nb import video
from mgm_nb.data import ClipDataset, ClipTransform, StepSampler, make_loader, read_motion
from mgm_nb.extract import BulkConfig, extract_folder, reencode_folder
from mgm_nb.motion import MotionConfig, motion_field
from mgm_nb.video import Limits, read_clip

FRAMES, STRIDE = 16, 4


def places(seed: int, total: int) -> np.ndarray:
    "The frames of a clip"
    start = np.random.default_rng(seed).integers(total - (FRAMES - 1) * STRIDE)
    return start + STRIDE * np.arange(FRAMES)


def ours(path: Path, seed: int, vectors: bool) -> np.ndarray:
    return read_clip(path, indices=partial(places, seed), vectors=vectors).frames


def ours_stored(path: Path, seed: int, fields: Path) -> np.ndarray:
    clip = read_clip(path, indices=partial(places, seed), vectors=False)
    read_motion(clip, MotionConfig(fill=False), fields)
    return clip.frames


def torchcodec_frames(path: Path, seed: int, seek_mode: str) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)
    return decoder.get_frames_at(places(seed, decoder.metadata.num_frames).tolist()).data.numpy()


def decord_frames(path: Path, seed: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(places(seed, len(reader))).asnumpy()


def decoder_alone(path: Path, seed: int) -> float:
    "CPU seconds of FFmpeg's decoder for what `read_clip` with vectors has to decode"
    with video._open(path, Limits(), time.monotonic(), vectors=True) as source:
        packets = video._scan(source)
        want, cc = places(seed, len(packets)), source.stream.codec_context
        number, coming = video._seek(source, packets, want[0])
        span = [(p, want[0] <= r <= want[-1]) for p, r in zip(coming, packets.rank[number:], strict=False)]
        last = max(i for i, (_, needed) in enumerate(span) if needed)
        begin = time.process_time()
        for packet, needed in span[: last + 1]:
            cc.skip_frame = "DEFAULT" if needed else "NONREF"
            cc.decode(packet)
        return time.process_time() - begin


def cpu(f: Callable, *args) -> tuple[float, object]:
    begin = time.process_time()
    found = f(*args)
    return time.process_time() - begin, found


def peers() -> tuple[dict[str, Callable], dict[str, str]]:
    "Readers that are installed, and why the others are not"
    readers, missing = {}, {}
    both = {f"torchcodec, {m}": partial(torchcodec_frames, seek_mode=m) for m in ("exact", "approximate")}
    for package, found in {"torchcodec": both, "decord": {"decord": decord_frames}}.items():
        try: __import__(package)
        except Exception as error: missing[package] = (str(error) or type(error).__name__).strip().splitlines()[0]
        else: readers |= found
    return readers, missing


def reading(path: Path, fields: Path, others: dict[str, Callable], rounds: int) -> dict:
    "ms a clip, medians, and medians of the ratios to our frames with vectors; the first round warms up"
    readers = {
        "frames + vectors": partial(ours, vectors=True), "frames": partial(ours, vectors=False),
        "frames + stored motion": partial(ours_stored, fields=fields), **others,
    }  # fmt: skip
    times = {name: [] for name in ("decoder alone", *readers)}
    for seed in range(rounds + 1):
        times["decoder alone"].append(decoder_alone(path, seed))
        images = {}
        for name, read in readers.items():
            seconds, images[name] = cpu(read, path, seed)
            times[name].append(seconds)
        for name, image in images.items():
            if not np.array_equal(image, images["frames"]): raise AssertionError(f"{name}: other pixels in {path.name}")
    times = {name: np.array(t[1:]) for name, t in times.items()}
    ratios = {name: float(np.median(t / times["frames + vectors"])) for name, t in times.items()}
    return {"ms": {name: float(np.median(t) * 1e3) for name, t in times.items()}, "ratio": ratios}


def again(before: Path, after: Path, rounds: int) -> float:
    "How much faster a re-encoded file loads: frames and vectors, interleaved"
    pairs = [[cpu(ours, path, seed, True)[0] for path in (before, after)] for seed in range(rounds + 1)]
    return float(np.median([a / b for a, b in pairs[1:]]))


def views(path: Path, rounds: int) -> dict:
    "ms of an item with one view and with four, and their clips/s as a ratio"
    one, four = (ClipDataset([(path, 0)], FRAMES, STRIDE, views=n) for n in (1, 4))
    times = np.array([[cpu(d.__getitem__, (epoch, 0))[0] for d in (one, four)] for epoch in range(rounds + 1)])[1:]
    single, several = np.median(times, 0) * 1e3
    return {"one": single, "four": several, "ratio": float(np.median(4 * times[:, 0] / times[:, 1]))}


def stages(path: Path, rounds: int) -> dict:
    "ms of what an item does after reading"
    clip = read_clip(path, indices=partial(places, 0))
    config, transform = MotionConfig(), ClipTransform()
    field = motion_field(clip, config)

    def median(f): return float(np.median([cpu(f)[0] for _ in range(3 * rounds)]) * 1e3)

    def view(field): return transform(clip, field, np.random.default_rng(0))

    pixels = median(lambda: view(None))
    tokens = median(lambda: view(field)) - pixels
    return {"field": median(lambda: motion_field(clip, config)), "crop and resize": pixels, "tokens": tokens}


def by_workers(paths: list[Path], most: int, batches: int) -> dict:
    "Clips a second of wall clock; processes are started before the clock"
    dataset, rates, batch = ClipDataset([(p, 0) for p in paths], FRAMES, STRIDE), {}, 4
    for workers in range(1, most + 1):
        steps = range(batches + 2 * workers)
        loader = iter(make_loader(dataset, batch, workers, StepSampler(len(paths), batch, steps)))
        for _ in range(2 * workers): next(loader)  # what was fetched ahead
        begin = time.perf_counter()
        for _ in loader: pass
        rates[workers] = batches * batch / (time.perf_counter() - begin)
    return rates


def mean(values) -> float:
    "The geometric one, as ratios want it"
    return float(np.exp(np.mean(np.log(list(values)))))


def summary(rows: dict) -> dict:
    "Means over clips, by recipe and over all"
    groups = {recipe: [r for n, r in rows.items() if n.endswith(recipe)] for recipe in RECIPES}
    groups = {name: some for name, some in groups.items() if some} | {"all": list(rows.values())}
    return {
        group: {
            "clips/s": {name: 1e3 / mean(r["ms"][name] for r in some) for name in some[0]["ms"]},
            "ratio": {name: mean(r["ratio"][name] for r in some) for name in some[0]["ratio"]},
            "views": mean(r["views"]["ratio"] for r in some),
            "reencoded": mean(r["reencoded"] for r in some) if "reencoded" in some[0] else 1.0,
        }
        for group, some in groups.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at most")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    others, missing = peers()
    for package, why in missing.items(): print(f"not measured: {package} ({why})")
    versions = {"torch": torch.__version__, "av": av.__version__}
    versions |= {p: sys.modules[p].__version__ for p in ("torchcodec", "decord") if p not in missing}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        files = kinetics_like(scratch / "clips", args.recipes)
        bulk = BulkConfig(progress=False)
        extract_folder(scratch / "clips", scratch / "fields", bulk)
        lines = reencode_folder(scratch / "clips", scratch / "again", bulk=bulk)
        assert all(line["outcome"] == "ok" for line in lines), lines
        extract_folder(scratch / "again", scratch / "fields again", bulk)
        rows, rows_again = {}, {}
        for name, path in files.items():
            new = scratch / "again" / path.name
            rows[name] = reading(path, scratch / "fields", others, args.rounds)
            rows[name] |= {"kbit/s": path.stat().st_size * 8 / 1e4, "reencoded": again(path, new, args.rounds)}
            rows[name] |= {"views": views(path, args.rounds), "stages": stages(path, args.rounds)}
            rows_again[name] = reading(new, scratch / "fields again", others, args.rounds)
            rows_again[name] |= {"kbit/s": new.stat().st_size * 8 / 1e4, "views": views(new, args.rounds)}
            for title, row in ((name, rows[name]), ("  again", rows_again[name])):
                print(f"{title:14}", *(f"{k} {1e3 / v:.1f}" for k, v in row["ms"].items()), sep="  ", flush=True)
        workers = {
            "original": by_workers(list(files.values()), args.workers, 4 * args.rounds),
            "again": by_workers([scratch / "again" / p.name for p in files.values()], args.workers, 4 * args.rounds),
        }
    result = {"cores": os.cpu_count(), "versions": versions, "missing": missing, "clips": rows, "again": rows_again}
    result |= {"mean": summary(rows), "mean again": summary(rows_again), "workers": workers}
    for key in ("mean", "mean again"):
        for group, found in result[key].items():
            print(f"\n{key}, {group}: clips/s per core, and CPU time (frames + vectors = 1)")
            for name, rate in found["clips/s"].items(): print(f"  {name:26}{rate:8.1f}{found['ratio'][name]:8.2f}")
            print(f"  4 views of a decode: {found['views']:.2f} times the clips/s; re-encoded {found['reencoded']:.2f}")
    for name, rates in workers.items():
        print(f"\nworkers, {name}:", ", ".join(f"{n}: {r:.1f} clips/s" for n, r in rates.items()))
    if args.json: print(json.dumps(result))


if __name__ == "__main__": main()
