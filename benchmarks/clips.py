"""Clips to measure on, made on the spot like Kinetics-400's small copies: 10 s, 340x256 at 30 fps, x264's defaults.

They are made of the real clips in the folder `MGM_VIDEOS`, or, where it is not set, of sprites. Ours come out far
below Kinetics' 700 kbit/s (CRF 23) and decode faster than its clips do; so each is also made with `b=700k`.
"""
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av

from mgm_nb.synth import SpriteScene, render

REAL = {  # name: (file, first frame)
    "bunny": ("bigbuckbunny_h264_p.mp4", 0), "people": ("people_h264_gop10.mp4", 400), "box": ("box_h264_b.mp4", 0),
    "cars": ("cars_h264_p.mp4", 0),
}  # fmt: skip
SPRITES = {"right": 2.0, "clockwise": 4.0, "shake": 6.0, "nod": 3.0}  # motion: px/frame
RECIPES = {"crf23": {}, "700k": {"b": "700k"}}
FRAMES, WIDTH, HEIGHT = 300, 340, 256


def film(path: Path, first: int = 0) -> Iterator[av.VideoFrame]:
    "The frames of a file from `first` on"
    with av.open(str(path)) as container:
        yield from islice(container.decode(container.streams.best("video")), first, None)


def sprites(motion: str, speed: float) -> Iterator[av.VideoFrame]:
    "An object moves over a photograph that pans, with a camera's noise"
    scene = SpriteScene(motion, size=WIDTH, frames=FRAMES, diameter=80, speed=speed, pan=speed / 8, noise=3)
    for frame in render(scene).frames[:, :HEIGHT]: yield av.VideoFrame.from_ndarray(frame.copy())


def shrink(frames: Iterable[av.VideoFrame]) -> list[av.VideoFrame]:
    "The first 10 s, in Kinetics' size"
    return [frame.reformat(WIDTH, HEIGHT, "yuv420p", threads=1) for frame in islice(frames, FRAMES)]


def encode(frames: list[av.VideoFrame], target: Path, recipe: str = "crf23") -> Path:
    "Frames to a file, by x264 with its defaults but for the recipe"
    with av.open(str(target), "w") as out:
        stream = out.add_stream("libx264", rate=30, options=RECIPES[recipe])
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base, frame.pict_type = i, Fraction(1, 30), 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return target


def kinetics_like(folder: Path, recipes: Iterable[str] = RECIPES) -> dict[str, Path]:  # name -> file
    "Every clip by every recipe"
    folder, videos, made = Path(folder), os.environ.get("MGM_VIDEOS"), {}
    if videos: sources = {name: film(Path(videos) / file, first) for name, (file, first) in REAL.items()}
    else: sources = {motion: sprites(motion, speed) for motion, speed in SPRITES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, frames in sources.items():
        frames = shrink(frames)
        for recipe in recipes: made[f"{name}-{recipe}"] = encode(frames, folder / f"{name}-{recipe}.mp4", recipe)
    return made
