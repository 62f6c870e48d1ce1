"""Training end to end, from files to updated weights: how fast, what is the device waiting for, how many cores feed it?

    MGM_VIDEOS=/folder/of/real/clips python benchmarks/train.py --device cuda --sizes small base --compile --json
    python benchmarks/train.py --device cpu --sizes tiny --img-size 64 --batch 4 --workers 1 --steps 12

Clips: clips.py (like Kinetics' small copies), after `mgm reencode`. Three measurements for each size, all of what
`mgm pretrain` does:

1. A core: clips a second of the data set's items, by this process's CPU time, one thread.
2. The device: the same training on clips that are ready in memory. MFU is in the log where the device's peak is known.
3. End to end: reading with `--workers` processes. The loader's wait is the share of time in which training stood still.

Device divided by core is the number of cores that the device needs.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
if "cpu" in sys.argv: os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from clips import kinetics_like

from mgm_nb.data import ClipDataset
from mgm_nb.extract import BulkConfig, reencode_folder
from mgm_nb.loop import environment, read_log
from mgm_nb.train import PretrainConfig, make_dataset, pretrain


class Ready(ClipDataset):
    "Clips that need no reading: always the same one"

    def __getitem__(self, key):
        if not hasattr(self, "item"): self.item = super().__getitem__((0, 0))
        return self.item


def core_rate(dataset: ClipDataset, seconds: float) -> float:
    "Clips for a second of CPU time"
    dataset[0, 0]
    began, n = time.process_time(), 0
    while time.process_time() - began < seconds:
        n += 1
        dataset[n, n % len(dataset)]
    return n * dataset.views / (time.process_time() - began)


def train(config: PretrainConfig, dataset: ClipDataset) -> dict[str, float]:
    "What the log says, but for its first lines: medians"
    lines = read_log(pretrain(config, progress=False, dataset=dataset))[2:]
    keys = [k for k in ("clips_per_s", "loader_wait", "tflops", "mfu", "memory_gib") if k in lines[0]]
    return {k: statistics.median(line[k] for line in lines) for k in keys}


def measure(size: str, videos: Path, work: Path, args) -> dict:
    "One row of the table"
    every = max(1, args.steps // 6)
    config = PretrainConfig(
        data=str(videos), out=str(work / size), model=size, size=args.img_size, patch=8 if size == "tiny" else 16,
        ratio=args.ratio, batch_size=args.batch, views=args.views, epochs=1, warmup_epochs=0, workers=args.workers,
        precision=args.precision, compile=args.compile, log_every=every, explosion=1e9,
    )
    reading = make_dataset(config)
    reading.items *= -(-args.steps * args.batch // (args.views * len(reading.items)))
    ready = Ready(reading.items, config.frames, config.stride, reading.transform, views=args.views)
    core = core_rate(reading, args.seconds)
    device = train(replace(config, out=f"{config.out} ready", workers=0), ready)
    whole = train(config, reading)
    return dict(size=size, core=core, device=device, end_to_end=whole, cores=device["clips_per_s"] / core)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=["base"])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--views", type=int, default=1, help="of each decode")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=5, help="of reading, for a core's rate")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--original", action="store_true", help="x264's defaults at 700 kbit/s, not re-encoded")
    parser.add_argument("--rates", nargs="*", type=float, default=[500, 1000, 2000], help="clips/s of other devices")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available(): parser.error("there is no GPU")
    with tempfile.TemporaryDirectory() as home:
        home, rows = Path(home), []
        kinetics_like(home / "clips", ["700k"])
        if not args.original: reencode_folder(home / "clips", home / "again", bulk=BulkConfig(progress=False))
        videos = home / ("clips" if args.original else "again")
        machine = environment(torch.device(args.device))
        print(f"{machine['device']}, {machine['cores']} cores, torch {torch.__version__}", flush=True)
        for size in args.sizes:
            rows.append(row := measure(size, videos, home, args))
            print(f"{size}: a core reads {row['core']:.1f} clips/s", flush=True)
            for name in "device", "end_to_end":
                print(f"  {name:<12}" + "  ".join(f"{k} {v:g}" for k, v in row[name].items()))
            needs = ", ".join(f"{rate / row['core']:.0f} for {rate:g} clips/s" for rate in args.rates)
            print(f"  cores needed: {row['cores']:.1f} for this device; {needs}", flush=True)
    if args.json: print(json.dumps(dict(machine=machine, options=vars(args), rows=rows)))


if __name__ == "__main__":
    main()
