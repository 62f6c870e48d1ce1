"See the motion, the masks and the reconstruction of a video: `python app/app.py --checkpoints runs/demo`"
import os
import sys
from pathlib import Path

# before gradio and matplotlib are imported: no request leaves the machine, no window opens
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
# a wheel beside this file is the package: a demo host installs requirements before it sees the folder
sys.path.extend(map(str, Path(__file__).parent.glob("mgm_nb-*.whl")))

import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from urllib.parse import urlencode

import gradio as gr
import numpy as np
import torch
import tyro
from gradio.utils import get_upload_folder
from PIL import Image

from mgm_nb.explain import (
    RECORD,
    Explained,
    Settings,
    describe_run,
    draw_frame,
    figure_frame,
    journey,
    map_frames,
    open_model,
    rasterize,
    read_frame,
)
from mgm_nb.masking import MASKINGS
from mgm_nb.synth import APPEARANCES, DOMAINS, MOTIONS, SpriteScene, render
from mgm_nb.video import MOTION_PRESET, Limits, UnsupportedCodec, VideoError, probe, read_clip, reencode, write_video

LIMITS = Limits(max_bytes=100 << 20, max_pixels=1920 * 1088, max_frames=5_000, seconds=20)
UPLOAD = 512 << 20  # bytes of any upload: a checkpoint of a ViT-B fits
PATIENCE = 32  # requests that may wait; the next ones are told to come back
MOST = 6  # masks at once
KEPT = 3600  # seconds that uploads and results stay
NONE = "none"
MENU = [*MASKINGS, "mgm:share=1", "mgm:share=0.5,blocks=2", "mgm:start=ahead", "simulated:step=4"]
CONTROLS = [  # fields of `Settings` that the page shows, in this order
    "checkpoint", "versus", "mask", "ratio", "seed", "start", "frames", "stride", "compensate", "estimate",
    "statistics", "attention", "device",
]  # fmt: skip
PRESETS = {
    "MGM beside random and tube": {},
    "VideoMAE's setting: tube at 0.9": {"mask": ("tube", "mgm"), "ratio": 0.9},
    "How large should the block be?": {"mask": ("mgm:share=0.25", "mgm", "mgm:share=1")},
    "Two blocks": {"mask": ("mgm", "mgm:share=0.5,blocks=2")},
    "Every masking": {"mask": tuple(MASKINGS)[:MOST]},
    "Without the camera's motion": {"mask": ("tube", "mgm", "topk"), "compensate": "affine"},
}
CLIPS = Path(gr.__file__).parent / "media_assets/videos"  # clips that come with gradio
EXAMPLES = {  # where it lies in the app's folder, and its settings
    "A star goes right": ("sprites/right-star-photo-0.mp4", {}),
    "A cross circles": ("sprites/clockwise-cross-photo-2.mp4", {"mask": ("tube", "mgm", "mgm:share=1")}),
    "Noise on noise": ("sprites/shake-disc-noise-1.mp4", {"mask": ("random", "mgm", "topk")}),
    "Gradio's b": ("examples/b.mp4", {"stride": 2}),
    "Gradio's world": ("examples/world.mp4", {"ratio": 0.9, "stride": 4}),
}

IDEA = """# What moves, and what to hide
A video file already says what moves: for each block its codec stores where the picture came from. **Motion-guided
masking** hides the blocks that move from a video model, which must then guess them. Upload a video, or take an example.
"""
ABOUT = """### The idea in five sentences
1. A video masked autoencoder learns by hiding most of a clip and painting it back.
2. Hidden at random, much of a clip is easy: what stands still can be copied from the next frame.
3. Motion-guided masking (MGM) hides what moves, and follows it through time, so there is nothing to copy from.
4. Where things move is almost free to know: a compressed video stores motion vectors, and a decoder hands them over.
5. So the mask costs no optical flow, and the model must learn what objects do.

Every masking hides equally many tokens. Look at how much of the **motion** each hides, how much neighbouring slices
**overlap** (a tube: 1), and how far the hidden part **travels**. Guesses carry a label: a picture that uses the true
mean and contrast of hidden tokens leaks what it hides.

[The paper](https://arxiv.org/abs/2308.12962) (Fan et al., ICCV 2023) · [Code and notebooks](https://github.com/mgm-nb/mgm_nb)
· [VideoMAE](https://arxiv.org/abs/2203.12602)
"""
# ends a chain of events unless the address names a video: an uploaded one has a chain of its own
LINKED = "() => { if (!new URLSearchParams(location.search).has('video')) throw Error('no video') }"
PICTURE = Path(__file__).parent / "screenshots/idea.png"
NO_CHECKPOINT = "No guess without a checkpoint: `make demo` trains one in minutes; then reload the page, or upload one."
NO_VECTORS = """**{codec} tells no motion.** The decoder exports vectors of H.264, MPEG-4 and older codecs, not of
{codec}: your file is fine, but its motion must come from elsewhere. *Re-encode* writes it once as H.264, made for
reading motion. *Estimate* matches blocks between the sampled frames and leaves the file alone."""
THEME = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"]).set(
    block_title_background_fill="none", block_title_background_fill_dark="none", block_title_padding="0",
    block_title_text_color="*neutral_600", block_title_text_color_dark="*neutral_300", block_title_text_weight="500",
    block_label_background_fill="*background_fill_primary",
)  # fmt: skip
# Trim would encode the video again, and change its vectors. On a phone the results come before the settings.
CSS = """
#video button[aria-label*='rim'] {display: none}
#map img {cursor: pointer}
#examples {gap: 6px}
#frame img {max-height: 480px; object-fit: contain}
#guesses .grid-wrap {max-height: none; overflow: visible}
#guesses .thumbnail-lg {aspect-ratio: 12 / 7.4}
.gradio-container {max-width: 1400px !important}
@media (max-width: 760px) {
    #left {display: contents}
    #left > * {width: 100%}
    #right {order: 1}
    #settings, #draw {order: 2}
}
"""


@dataclass
class Config:
    "See the motion, the masks and the reconstruction of a video"
    checkpoints: Path = Path("runs/demo")  # folder; every checkpoint below it can be chosen
    # 0.0.0.0 opens the app to the network (README.md tells what is limited); demo hosts set GRADIO_SERVER_NAME
    host: str = field(default_factory=lambda: os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    port: int | None = None  # default: the first free one from 7860


# Files: everything the app writes or is given lies below one folder; delete_cache empties it, `main` removes it.


def home() -> Path: return Path(get_upload_folder()).resolve()


def inside(name: str, suffixes: tuple[str, ...] = ()) -> Path | None:
    "The file `name` below the app's folder, or None"
    path = (home() / name).resolve()
    return path if path.is_relative_to(home()) and path.is_file() and path.suffix in (suffixes or path.suffix) else None


def new_folder() -> Path:
    "A place for a view's files; those of forgotten views go, as delete_cache leaves lists of files alone"
    for old in home().glob("view-*"):
        if time.time() - old.stat().st_mtime > KEPT: shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="view-", dir=home()))


def fetch(name: str) -> Path | None:
    "A video by its name in the app's folder; sprites and gradio's clips are made again if they are gone"
    path = home() / name
    kind, _, rest = name.partition("/")
    if kind == "examples" and rest in os.listdir(CLIPS) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLIPS / rest, path)
    words = rest.removesuffix(".mp4").split("-")
    if kind == "sprites" and len(words) == 4 and words[3].isdigit() and not path.exists(): draw_sprite(*words)
    return inside(name)


def draw_sprite(motion, appearance, domain, seed):
    "Write a clip whose motion is known"
    known = motion in MOTIONS and appearance in APPEARANCES and domain in DOMAINS
    if not known: raise gr.Error("There is no such clip", print_exception=False)
    seed = int(seed or 0)
    path = home() / "sprites" / f"{motion}-{appearance}-{domain}-{seed}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    scene = SpriteScene(motion, appearance, domain, backgrounds=8, seed=seed)  # the demo's eight
    write_video(path, render(scene).frames, options=MOTION_PRESET)
    return str(path)


def find_checkpoints(folder: Path) -> dict[str, Path]:
    "Checkpoints below `folder` by name, newest first"
    files = [f for f in folder.rglob("model.safetensors") if not f.parent.name.startswith(".")]  # .: half written
    files.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    return {str(folder.name / f.parent.relative_to(folder)): f for f in files}


@lru_cache(maxsize=2)
def load_file(path: Path, changed: float): return open_model(str(path))


def loader(folder: Path):
    "How a name on the page becomes a model: one of `folder`, or an uploaded file; read again when it changes"

    def load(name: str):
        path = find_checkpoints(folder).get(name) or inside(name, (".safetensors",))
        if path is None: raise ValueError(f"the checkpoint {name} is gone; reload the page")
        return load_file(path, path.stat().st_mtime)

    return load


# Between the page and `Settings`


def to_settings(values) -> Settings:
    "What the controls say"
    given = dict(zip(CONTROLS, values, strict=True))
    for name in ("checkpoint", "versus", "compensate", "statistics"):
        if given[name] == NONE: given[name] = None
    for name in ("seed", "start", "frames", "stride"): given[name] = int(given[name])
    if given["start"] < 0: given["start"] = None
    given["mask"] = tuple(dict.fromkeys(given["mask"]))
    if not 0 < len(given["mask"]) <= MOST: raise ValueError(f"choose one to {MOST} masks")
    return Settings(**given)


def to_values(settings: Settings) -> list:
    "What the controls shall say"
    values = [getattr(settings, name) for name in CONTROLS]
    menus = ("checkpoint", "versus", "compensate", "statistics")
    values = [NONE if v is None and n in menus else v for n, v in zip(CONTROLS, values, strict=True)]
    values = [-1 if v is None else v for v in values]  # of the start
    return [list(v) if isinstance(v, tuple) else v for v in values]


def to_link(video: str, settings: Settings) -> str:
    "An address that restores the page, as long as the video is kept"
    default = asdict(Settings())
    changed = [(k, v) for k, v in asdict(settings).items() if k in CONTROLS and v != default[k]]
    query = [(k, w) for k, v in changed for w in (v if isinstance(v, tuple) else [v])]
    return "?" + urlencode([("video", str(Path(video).resolve().relative_to(home()))), *query])


def from_link(query: dict[str, list[str]]) -> Settings:
    "The settings in an address; what makes no sense there is left out"
    changes = {}
    for name, default in asdict(Settings()).items():
        if name not in CONTROLS or name not in query: continue
        kind = int if name == "start" else str if default is None else type(default)
        try: changes[name] = tuple(query[name]) if kind is tuple else kind(query[name][-1])
        except ValueError: continue
    return replace(Settings(), **changes)


def plainly(error: Exception, video: str) -> gr.Error:
    "Names the upload, not where the server keeps it"
    return gr.Error(str(error).replace(str(video), Path(video).name), print_exception=False)


# Handlers. Those that take long are generators: cancelled, or left by a closed page, they end at the next `yield`.


def table_of_numbers(seen: Explained) -> list[list]:
    keys = ("motion", "overlap", "travel", "visible")
    return [[name, *(round(numbers[k], 2) for k in keys)] for name, numbers in seen.numbers.items()]


OUTPUTS = "note masks numbers paths film motion guesses loss attention command link frame".split()


def look(folder: Path):
    "The handler that shows a video"
    load = loader(folder)

    def show(video, *values, progress=gr.Progress()):  # noqa: B008  gradio's way
        if not video:
            yield [gr.skip()] * (len(OUTPUTS) + 1)
            return
        shown, out, missing, guesses = dict.fromkeys(OUTPUTS), new_folder(), gr.Group(visible=False), []

        def draw(name):
            seen.save(out, [name])
            return str(out / name)

        def tell(done, total): progress((done, total), "Decoding", unit="frames")

        try:
            for done, what, seen in journey(video, to_settings(values), LIMITS, load, tell):
                progress(0.7 * done, what)
                if seen and seen.masks and not shown["masks"]: shown["masks"] = draw("masks.png")
                yield *shown.values(), missing
            waiting = [n.removesuffix(".png") for n in seen.files() if n.endswith(".png")]
            waiting = [n for n in waiting if n not in ("frames", "sizes", "masks")]
            for i, name in enumerate(waiting):
                progress(0.7 + 0.25 * i / len(waiting), f"Drawing {name}")
                yield *shown.values(), missing
                picture = draw(f"{name}.png")
                if name in shown: shown[name] = picture
                elif name.startswith("reconstruction_"): guesses.append((picture, name.removeprefix("reconstruction_")))
            progress(0.95, "Filming")
            yield *shown.values(), missing
            shown["film"] = draw("view.mp4")
        except UnsupportedCodec:
            shown["note"] = NO_VECTORS.format(codec=probe(video, LIMITS).codec.upper())
            yield *shown.values(), gr.Group(visible=True)
            return
        except (ValueError, OSError) as e: raise plainly(e, video) from None
        info, used = seen.clip.info, seen.settings
        about = f"{info.codec}, {info.width} x {info.height}, {info.frames} frames at {info.fps:.3g}/s"
        last = int(min(used.start + used.stride * (used.frames - 1), info.frames - 1))
        hint = "" if used.checkpoint else NO_CHECKPOINT
        shown["note"] = f"{about}. Shown: frames {used.start} to {last}, one in {used.stride}. {hint}"
        shown["numbers"] = table_of_numbers(seen)
        shown["guesses"] = guesses
        shown["frame"] = int(seen.clip.table["index"][len(seen.clip.table) // 2])
        shown["command"] = describe_run(seen)["command"]
        shown["link"] = f"[A link to this view]({to_link(video, used)}), good while the video is kept: an hour"
        yield *shown.values(), missing

    return show


def pack(folder: Path):
    "The handler that packs all files of a view"
    load = loader(folder)

    def take_home(video, *values, progress=gr.Progress()):  # noqa: B008
        out, files = new_folder(), []
        def tell(done, total): progress((done, total), "Decoding", unit="frames")

        try:
            for done, what, seen in journey(video, to_settings(values), LIMITS, load, tell):  # noqa: B007
                progress(0.5 * done, what)
                yield gr.skip(), gr.skip()
            for name in seen.files():
                progress(0.5 + 0.5 * len(files) / len(seen.files()), f"Writing {name}")
                yield gr.skip(), gr.skip()
                files += map(str, seen.save(out, [name]))
        except (ValueError, OSError) as e: raise plainly(e, video) from None
        yield files, describe_run(seen)

    return take_home


def show_still(film, number):
    "One frame of the film; its last, if it has fewer"
    if not film: return None
    try: return read_clip(film, 1, 1, int(number), vectors=False, limits=LIMITS).frames[0]
    except ValueError as e: raise plainly(e, film) from None


def show_frame(video, number, how, minimum, sides):
    "One frame, and its longest vectors"
    if not video: return None, None
    try: clip = read_frame(video, int(number or 0), LIMITS)
    except (ValueError, OSError) as e: raise plainly(e, video) from None
    if clip.vectors is None and how == "colours": how = "arrows"
    path = new_folder() / f"frame-{clip.table['index'][0]}-{how}.png"
    Image.fromarray(rasterize(draw_frame(clip, how, minimum, tuple(sides)))).save(path)
    records = clip.to_records()[0] if clip.vectors else np.empty((0, 10), int)
    longest = records[np.hypot(records[:, 7], records[:, 8]).argsort()[::-1][:200]]
    return str(path), longest.tolist()


def show_map(video, number):
    "The bars of the frames' sizes"
    if not video: return None
    try: figure, table = map_frames(video, int(number or 0), limits=LIMITS)
    except (ValueError, OSError) as e: raise plainly(e, video) from None
    path = new_folder() / "sizes.png"
    Image.fromarray(rasterize(figure)).save(path)
    return str(path)


def go_to(video, number, event: gr.SelectData):
    "The frame under a click on the map"
    figure, table = map_frames(video, int(number or 0), limits=LIMITS)
    rasterize(figure)
    return figure_frame(figure, table, event.index[0])


def made_for_motion(video):
    "The upload as H.264 that tells its motion"
    path = new_folder() / f"{Path(video).stem}-h264.mp4"
    try: return str(reencode(video, path, limits=replace(LIMITS, seconds=60)))
    except VideoError as e: raise plainly(e, video) from None


def receive(folder: Path):
    "The handler that makes an uploaded checkpoint a choice in both menus"

    def receive_checkpoint(path):
        try: open_model(path)
        except ValueError as e: raise plainly(e, path) from None
        name = str(Path(path).resolve().relative_to(home()))
        names = [name, *find_checkpoints(folder), NONE]
        return gr.Dropdown(choices=names, value=name), gr.Dropdown(choices=names)

    return receive_checkpoint


def given(video, *settings):
    "Nothing runs without a video, or with an emptied field"
    filled_in = [gr.validate(s is not None, "Choose a value") for s in settings]
    return [gr.validate(bool(video), "Upload a video or take an example"), *filled_in]


# The page


def image(label, alt, **options):
    return gr.Image(
        label=label, show_label=False, alt_text=alt, format="png", interactive=False,
        buttons=["download", "fullscreen"], **options,
    )  # fmt: skip


def make_controls(folder: Path) -> dict[str, gr.components.Component]:
    "A component for each of `CONTROLS`"
    names, made = [*find_checkpoints(folder), NONE], {}
    made["mask"] = gr.Dropdown(
        MENU, value=list(Settings().mask), multiselect=True, allow_custom_value=True, max_choices=MOST, label="Masks",
        info="Options of your own: mgm:share=1,blocks=2",
    )  # fmt: skip
    made["ratio"] = gr.Slider(0.1, 0.95, 0.75, step=0.05, label="Share of each slice hidden")
    made["checkpoint"] = gr.Dropdown(names, value=names[0], label="Checkpoint")
    made["versus"] = gr.Dropdown([*names[:-1], NONE], value=NONE, label="Compared with")
    with gr.Row():
        made["stride"] = gr.Slider(1, 16, 4, step=1, label="Stride", min_width=140)
        made["frames"] = gr.Slider(4, 32, 16, step=2, label="Frames", info="a checkpoint knows its own", min_width=140)
    with gr.Row():
        whole = dict(precision=0, min_width=120)
        start = dict(label="First frame", info="-1: so that the clip is the middle", minimum=-1, maximum=10**6)
        made["start"] = gr.Number(-1, **start, **whole)
        seed = dict(label="Seed of the masks", info="another, other masks", minimum=0, maximum=2**31)
        made["seed"] = gr.Number(0, **seed, **whole)
    with gr.Accordion("More", open=False):
        made["compensate"] = gr.Radio([NONE, "translation", "affine"], value=NONE, label="Camera's motion removed")
        menu = [("from visible neighbours", NONE), ("true patch statistics (they leak)", "true")]
        made["statistics"] = gr.Radio(menu, value=NONE, label="Mean and contrast of normalised tokens")
        made["estimate"] = gr.Checkbox(False, label="Estimate the motion instead of reading it: any codec will do")
        made["attention"] = gr.Checkbox(False, label="Show where the encoder looks")
        devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
        made["device"] = gr.Radio(devices, value=devices[-1], label="Device", visible=len(devices) > 1)
    return {name: made[name] for name in CONTROLS}


def build(folder: Path) -> gr.Blocks:
    "The page"
    private = dict(api_visibility="private")
    drawing = dict(concurrency_id="draw", concurrency_limit=1)  # matplotlib and the model: one at a time
    with gr.Blocks(title="mgm_nb", delete_cache=(KEPT // 6, KEPT), analytics_enabled=False) as demo:
        gr.Markdown(IDEA)
        with gr.Row(elem_id="main"):
            with gr.Column(scale=1, min_width=320, elem_id="left"):
                # any change of the file changes its vectors: no conversion, no muting
                options = dict(format=None, include_audio=True, autoplay=True, loop=True)
                video = gr.Video(label="Video", sources=["upload"], elem_id="video", height=260, **options)
                with gr.Group(visible=False, elem_id="missing") as missing:
                    with gr.Row():
                        encode, estimate = gr.Button("Re-encode", variant="primary"), gr.Button("Estimate")
                with gr.Row(elem_id="examples"):
                    examples = [gr.Button(name, size="sm", min_width=90) for name in EXAMPLES]
                preset = gr.Dropdown([*PRESETS], value=next(iter(PRESETS)), label="Preset")
                with gr.Row():
                    go = gr.Button("Show", variant="primary", scale=3, min_width=100, elem_id="go")
                    stop = gr.Button("Stop", variant="stop", scale=1, min_width=60, elem_id="stop")
                with gr.Accordion("Settings", elem_id="settings"):
                    controls = make_controls(folder)
                    upload = gr.UploadButton("Upload .safetensors", file_types=[".safetensors"], size="sm")
                with gr.Accordion("Draw a clip whose motion is known", open=False, elem_id="draw"):
                    with gr.Row():
                        motion = gr.Dropdown(MOTIONS, value="right", label="What it does", min_width=100)
                        appearance = gr.Dropdown(APPEARANCES, value="star", label="What it is", min_width=100)
                    with gr.Row():
                        domain = gr.Dropdown(DOMAINS, value="photo", label="Made of", min_width=100)
                        variant = gr.Number(0, label="Variant", minimum=0, maximum=2**31, precision=0, min_width=100)
                    sprite = gr.Button("Draw")
            with gr.Column(scale=3, min_width=320, elem_id="right"):
                note = gr.Markdown(elem_id="note")
                with gr.Tabs(selected="masks"):
                    with gr.Tab("Codec", id="codec"):
                        sizes = image("Frame sizes", "A bar for the bytes of each frame; click one", elem_id="map")
                        with gr.Row():
                            number = gr.Number(0, label="Frame", minimum=0, maximum=10**6, precision=0, min_width=80)
                            menu = ["arrows", "colours", "quantisers"]
                            how = gr.Radio(menu, value="arrows", label="Drawn as", scale=3, min_width=340)
                            menu = ["past", "future"]
                            sides = gr.CheckboxGroup(menu, value=menu, label="Arrows from", scale=2, min_width=190)
                            label = "Hide slower ones, pixels"
                            minimum = gr.Slider(0, 16, 0, step=0.25, label=label, scale=2, min_width=200)
                        alt = "The chosen frame under its motion vectors, motion field or quantisers"
                        frame = image("Frame", alt, elem_id="frame")
                        motion_strip = image("Motion", "Frames of the clip above their motion: hue is direction")
                        with gr.Accordion("The longest vectors of this frame", open=False):
                            vectors = gr.Dataframe(headers=[*RECORD], interactive=False, max_height=300)
                    with gr.Tab("Masks", id="masks"):
                        alt = "The frames with each masking's hidden blocks covered, one row a masking"
                        masks = image("Masks", alt, elem_id="masks")
                        headers = ["mask", "motion hidden", "overlap", "travel", "visible tokens"]
                        numbers = gr.Dataframe(headers=headers, interactive=False, elem_id="numbers")
                        paths = image("Paths", "Motion and masks seen from above: columns to the right, time downwards")
                        film = gr.Video(label="As a film", interactive=False, loop=True, format="mp4", elem_id="film")
                        step = gr.Slider(0, 31, 0, step=1, label="Frame by frame", elem_id="step")
                        still = image("Still", "One frame of the film: the clip, its motion, masks and guesses")
                    with gr.Tab("Reconstruct", id="reconstruct"):
                        options = dict(columns=2, format="png", object_fit="contain", height="auto")
                        label = "Original, what the model sees, its guess, and both"
                        guesses = gr.Gallery(label=label, show_label=False, elem_id="guesses", **options)
                        loss = image("Loss", "The loss of each hidden token as colour over grey frames", elem_id="loss")
                        with gr.Accordion("Where the encoder looks (choose it in the settings: More)", open=False):
                            attention = image("Attention", "The attention that each visible token gets, as colour")
                    with gr.Tab("Take home", id="home"):
                        gr.Markdown("Masks, vectors, pictures, the film and `run.json`; the command gives the same.")
                        label = "The same without the app"
                        command = gr.Code(label=label, language="shell", interactive=False, wrap_lines=True)
                        link = gr.Markdown(elem_id="link")
                        take = gr.Button("Pack the files", variant="primary", elem_id="take")
                        files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
                        run = gr.JSON(label="run.json", open=False)
                    with gr.Tab("About", id="about"):
                        gr.Markdown(ABOUT)
                        alt = "Frames of a moving star: random and tube masks let parts of it through, MGM goes with it"
                        if PICTURE.is_file(): image("The idea", alt, value=PICTURE)
        settings = [*controls.values()]
        shown = [note, masks, numbers, paths, film, motion_strip, guesses, loss, attention, command, link, number]
        journeys = dict(fn=look(folder), inputs=[video, *settings], outputs=[*shown, missing], **drawing)
        view = dict(fn=show_frame, inputs=[video, number, how, minimum, sides], outputs=[frame, vectors], **drawing)
        chart = dict(fn=show_map, inputs=[video, number], outputs=sizes, **drawing)

        running = []

        def chain(event, **options):
            "What follows when a video is there: the journey, then the codec's part"
            first = event(**journeys, **options)
            last = first.success(**chart, **private)
            running.extend([first, last, last.success(**view, **private)])

        chain(go.click, validator=given, api_name="show")
        chain(video.upload, validator=given, **private)
        drawn = sprite.click(draw_sprite, [motion, appearance, domain, variant], video, api_name="sprite")
        chain(drawn.success, **private)
        for button, (name, changes) in zip(examples, EXAMPLES.values(), strict=True):
            taken = button.click(lambda name=name: str(fetch(name)), None, video, **private)
            values = to_values(replace(Settings(), **changes))
            where = [CONTROLS.index(k) for k in ("mask", "ratio", "stride")]
            values, targets = [values[i] for i in where], [settings[i] for i in where]
            taken = taken.then(lambda values=values: values, None, targets, **private)
            chain(taken.success, **private)
        where = [CONTROLS.index(k) for k in ("mask", "ratio", "compensate")]

        def set_preset(name):
            values = to_values(replace(Settings(), **PRESETS[name]))
            return [values[i] for i in where]

        preset.input(set_preset, preset, [settings[i] for i in where], **private)
        encoded = encode.click(made_for_motion, video, video, api_name="reencode")
        chain(encoded.success, **private)
        chain(estimate.click(lambda: True, None, controls["estimate"], **private).success, **private)
        options = dict(validator=given, api_name="take_home", **drawing)
        packed = take.click(pack(folder), [video, *settings], [files, run], **options)
        last = dict(trigger_mode="always_last", **private)
        step.input(show_still, [film, step], still, trigger_mode="always_last", api_name="still", **drawing)
        for event in (number.input, how.input, sides.input, minimum.release): event(**view, **last)
        sizes.select(go_to, [video, number], number, **drawing, **private).then(**view, **private)
        menus = [controls["checkpoint"], controls["versus"]]
        upload.upload(receive(folder), upload, menus, api_name="checkpoint")

        def restore(request: gr.Request):
            "The page as its address says, with the checkpoints made since the start"
            names = [*find_checkpoints(folder), NONE]
            query = {k: request.query_params.getlist(k) for k in request.query_params}
            values = to_values(from_link(query)) if query else [gr.skip()] * len(CONTROLS)
            chosen = query.get("checkpoint", names)[-1 if "checkpoint" in query else 0]
            if inside(chosen, (".safetensors",)): names.insert(0, chosen)
            values[0] = gr.Dropdown(choices=names, value=chosen if chosen in names else names[0])
            other = query.get("versus", [NONE])[-1]
            values[1] = gr.Dropdown(choices=names, value=other if other in names else NONE)
            source = query.get("video") and fetch(query["video"][-1])
            if query.get("video") and not source: gr.Warning("The video of this link is gone; its settings are here.")
            return str(source) if source else gr.skip(), *values  # None would remove what is uploaded meanwhile

        restored = demo.load(restore, None, [video, *settings], show_progress="hidden", **private)
        chain(restored.success(None, None, None, js=LINKED, **private).success, **private)
        stop.click(None, None, None, cancels=[*running, packed, drawn], **private)
        # a second listener: gradio cancels after the function of the first, and what still ran would hide the word
        stop.click(lambda: "Stopped.", None, note, queue=False, **private)
    return demo.queue(max_size=PATIENCE)


def main(config: Config):
    "Start the app"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder below is removed
    with tempfile.TemporaryDirectory(prefix="mgm_nb-") as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        build(config.checkpoints).launch(
            server_name=config.host, server_port=config.port, theme=THEME, css=CSS, share=False,
            show_error=True,
            ssr_mode=False, mcp_server=False, enable_monitoring=False, max_file_size=UPLOAD, allowed_paths=[],
            footer_links=["api"], strict_cors=True,
        )  # fmt: skip


if __name__ == "__main__": main(tyro.cli(Config))
