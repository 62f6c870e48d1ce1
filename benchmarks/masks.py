"""What does it cost to choose what to hide?

    python benchmarks/masks.py [--json] [--device cuda] [--video FILE]

1. Each masking on 64 clips of 8 x 14 x 14 tokens: ms a batch on the device, and on one CPU core its share of a ViT-B
   training step there.
2. Guidance, per clip of 16 frames at stride 4, on one core: what motion vectors add to decoding, the field, the tokens
   and MGM's mask, beside optical flow between the 16 frames at 224 x 224: OpenCV's Farneback and torchvision's
   RAFT-small (six iterations; random weights, for the timing only).

On a CPU these are CPU seconds of this process, so that a busy machine matters little; on a GPU wall-clock.
"""
import argparse
import json
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import torch
from torchvision.models.optical_flow import raft_small

from mgm_nb.masking import MASKINGS, make_mask, mgm_mask, running_cell
from mgm_nb.motion import MotionConfig, motion_field
from mgm_nb.synth import SpriteScene, render
from mgm_nb.video import MOTION_PRESET, read_clip, write_video
from mgm_nb.videomae import create_model

GRID, CLIPS, RATIO = (8, 14, 14), 64, 0.75


def ms(function, device="cpu", rounds=9, calls=1) -> float:
    "Median milliseconds of a call, after two to warm up"
    for _ in range(2): function()
    clock, wait = (time.process_time, lambda: None) if device == "cpu" else (time.perf_counter, torch.cuda.synchronize)
    taken = []
    for _ in range(rounds):
        wait()
        start = clock()
        for _ in range(calls): function()
        wait()
        taken.append(1e3 * (clock() - start) / calls)
    return median(taken)


def maskings(device: str) -> dict[str, float]:
    "ms a batch"
    rng = torch.Generator(device).manual_seed(0)
    energy = torch.rand(CLIPS, *GRID, generator=rng, device=device)
    velocity = torch.randn(CLIPS, *GRID, 2, generator=rng, device=device)
    calls = 1 if device == "cpu" else 50
    mask = mgm_mask(energy, RATIO, rng)
    work = {name: lambda name=name: make_mask(name, energy, RATIO, rng, velocity) for name in MASKINGS}
    work["running_cell"] = lambda: running_cell(mask, 0.5, rng)
    return {name: ms(function, device, calls=calls) for name, function in work.items()}


def training_step() -> float:
    "ms a clip: ViT-B forward, backward and AdamW"
    model, video = create_model("base"), torch.randn(1, 16, 3, 224, 224)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mask = mgm_mask(torch.rand(1, *GRID), RATIO)

    def step():
        model(video, mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return ms(step, rounds=3)


def guidance(path: Path) -> dict[str, float]:
    "ms a clip"
    rounds, config = 15, MotionConfig()
    both, pixels = (ms(lambda v=v: read_clip(path, vectors=v), rounds=rounds) for v in (True, False))
    clip = read_clip(path)
    field = motion_field(clip, config)
    energy = torch.from_numpy(field.to_tokens(GRID, keep=clip.keep)[0])[None]
    batch = energy.expand(CLIPS, -1, -1, -1)
    parts = {
        "vectors beside pixels": both - pixels,
        "field": ms(lambda: motion_field(clip, config), rounds=rounds),
        "tokens": ms(lambda: field.to_tokens(GRID, keep=clip.keep), rounds=rounds),
        "mask": ms(lambda: mgm_mask(batch, RATIO)) / CLIPS,
    }
    frames = np.stack([cv2.resize(f, (224, 224), interpolation=cv2.INTER_AREA) for f in clip.frames])
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]

    def farneback():
        for a, b in pairwise(grey): cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)

    raft = raft_small(weights=None).eval()
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.inference_mode()
    def flow():
        for a, b in pairwise(images): raft(a[None], b[None], num_flow_updates=6)

    flows, total = {"farneback": ms(farneback, rounds=5), "raft-small": ms(flow, rounds=1)}, sum(parts.values())
    ratios = {f"{name} / guidance": taken / total for name, taken in flows.items()}
    return {"decoding pixels": pixels, **parts, "guidance": total, **flows, **ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--video", type=Path, help="with vectors, 61 frames or more (default: sprites, 256 x 256)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)

    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, one core"
    result = {"device": device, "torch": torch.__version__, "masks_ms": maskings(args.device)}
    on_cpu = result["masks_ms"] if args.device == "cpu" else maskings("cpu")
    result["step_ms"] = training_step()
    result["share_of_step"] = {name: taken / CLIPS / result["step_ms"] for name, taken in on_cpu.items()}
    print(f"{CLIPS} clips of {GRID} tokens on {device}; a ViT-B step takes one core {result['step_ms']:.0f} ms a clip")
    for name, taken in result["masks_ms"].items():
        print(f"  {name:14} {taken:8.3f} ms a batch {result['share_of_step'][name]:10.4%} of the step, on one core")

    with tempfile.TemporaryDirectory() as folder:
        scene = SpriteScene(motion="clockwise", size=256, frames=64, diameter=70, speed=3, pan=1, noise=2)
        path = args.video or write_video(Path(folder) / "clip.mp4", render(scene).frames, options=MOTION_PRESET)
        result["guidance_ms"] = guidance(path)
    print(f"guidance of a clip of {args.video or 'sprites'}, ms on one core")
    for name, taken in result["guidance_ms"].items(): print(f"  {name:22} {taken:8.2f}")
    if args.json: print(json.dumps(result))


if __name__ == "__main__": main()
