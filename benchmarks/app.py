"""From upload to picture: a 10 s clip of 340x256 in the app, wall-clock and CPU seconds of the server.

    python benchmarks/app.py [--json]

First mask picture: upload, decode, motion, three masks and their drawing, until a client of the app's API is told
where the picture is. Reconstruction: a ViT-B in memory with random weights, on the CPU, one mask. Peers: none shows
motion vectors; the limits are a visitor's patience (2 s and 5 s on 2 cores).
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gradio_client import Client, handle_file

from mgm_nb.checkpoints import save_checkpoint
from mgm_nb.explain import Settings, explain, open_model
from mgm_nb.synth import SpriteScene, render
from mgm_nb.video import write_video
from mgm_nb.videomae import create_model

root = Path(__file__).parents[1]
sys.path.insert(0, str(root / "app"))
import app  # noqa: E402


def cpu(pid: int) -> float:
    "CPU seconds of a process, by now"
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def first_mask(url: str, pid: int, video: Path) -> tuple[float, float]:
    "Seconds, wall and CPU, until the first picture of masks is there"
    client = Client(url, verbose=False, download_files=tempfile.mkdtemp())
    began, used = time.perf_counter(), cpu(pid)
    job = client.submit(handle_file(video), *app.to_values(Settings()), api_name="/show")
    for shown in job:
        if shown[app.OUTPUTS.index("masks")]: break
    took = time.perf_counter() - began, cpu(pid) - used
    job.result()
    return took


def reconstruction(video: Path, checkpoint: Path) -> tuple[float, float]:
    "Seconds, wall and CPU, from file to the guess of a ViT-B that is in memory"
    model = open_model(str(checkpoint))
    began, used = time.perf_counter(), time.process_time()
    explain(video, Settings(mask=("mgm",), checkpoint="base"), load=lambda name: model)
    return time.perf_counter() - began, time.process_time() - used


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        scene = SpriteScene("right", "star", size=256, frames=250, seed=0)
        frames = render(scene).frames
        wide = torch.nn.functional.pad(torch.from_numpy(frames).movedim(-1, 1), (42, 42, 0, 0), mode="reflect")
        video = write_video(folder / "clip.mp4", wide.movedim(1, -1).numpy())  # x264's defaults, as the web has them
        save_checkpoint(folder / "base", create_model("base"))
        command = [sys.executable, "-u", root / "app/app.py", "--checkpoints", folder / "nothing"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            url = next(line for line in server.stdout if "http://" in line).split()[-1]
            runs = [first_mask(url, server.pid, video) for _ in range(4)]
            server.terminate()
        rows = {"first mask picture, cold": runs[0], "first mask picture": min(runs[1:])}
        rows["reconstruction, ViT-B"] = min(reconstruction(video, folder / "base") for _ in range(3))
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, (wall, used) in rows.items(): print(f"{name:<26}{wall:6.2f} s wall {used:6.2f} s CPU")
    if "--json" in sys.argv: print(json.dumps({k: {"wall": w, "cpu": c} for k, (w, c) in rows.items()}))


if __name__ == "__main__": main()
