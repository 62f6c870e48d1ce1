"The app as its users meet it: a server of its own, asked through its API."
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import save_file

from mgm_nb.checkpoints import save_checkpoint
from mgm_nb.cli import main
from mgm_nb.explain import Settings
from mgm_nb.synth import SpriteScene, render
from mgm_nb.video import MOTION_PRESET, read_clip, write_video
from mgm_nb.videomae import create_model

root = Path(__file__).parents[1]
sys.path.insert(0, str(root / "app"))
import app  # noqa: E402

DEFAULTS = dict(zip(app.CONTROLS, app.to_values(Settings(checkpoint="trial/checkpoints/step-000010")), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder with an untrained checkpoint"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "trial"
    save_checkpoint(folder / "checkpoints/step-000010", create_model("tiny"))
    return folder


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    "`python app/app.py`: its process, its address and its folder"
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {"GRADIO_TEMP_DIR": str(home), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, root / "app/app.py", "--checkpoints", run]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = []
            for line in process.stdout:  # waits for the line that says where it runs
                said.append(line)
                if "http://" in line: break
            else: pytest.fail("the app ended: " + "".join(said))
            yield process, line.split()[-1], home
        finally: process.terminate()


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    return Client(server[1], verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "A real clip where there is one, else a sprite's"
    if "MGM_VIDEOS" in os.environ: return Path(os.environ["MGM_VIDEOS"]) / "asl_walk_h264_b.mkv"
    frames = render(SpriteScene("right", "star", size=128, frames=89, seed=2)).frames
    return write_video(tmp_path_factory.mktemp("clip") / "star.mp4", frames, options=MOTION_PRESET)


@pytest.fixture(scope="module")
def sprite(client):
    return client.predict("down", "cross", "photo", 1, api_name="/sprite")


@pytest.fixture(scope="module")
def hevc(tmp_path_factory):
    frames = render(SpriteScene("right", "star", size=128, frames=16, seed=2)).frames
    path = tmp_path_factory.mktemp("hevc") / "hevc.mkv"
    return write_video(path, frames, codec="libx265", options={"x265-params": "log-level=none"})


def ask(client, name, path, **changes):
    return client.predict(handle_file(path), *(DEFAULTS | changes).values(), api_name=name)


def show(client, path, **changes): return dict(zip(app.OUTPUTS, ask(client, "/show", path, **changes), strict=True))


def test_a_sprite_clip_is_shown(client, sprite):
    shown = show(client, sprite)
    assert "h264, 128 x 128, 16 frames" in shown["note"] and "0 to 15, one in 1" in shown["note"]
    assert [g["caption"] for g in shown["guesses"]] == ["random", "tube", "mgm"]
    assert [row[0] for row in shown["numbers"]["data"]] == ["random", "tube", "mgm"]
    assert all(Path(shown[k]).stat().st_size > 5000 for k in ("masks", "paths", "motion", "loss"))
    assert shown["attention"] is None
    film = shown["film"]["video"] if isinstance(shown["film"], dict) else shown["film"]
    still = client.predict(handle_file(film), 3, api_name="/still")  # one frame of the film
    np.testing.assert_array_equal(Image.open(still), read_clip(film, 1, 1, 3, vectors=False).frames[0])
    assert Path(show(client, sprite, mask=["mgm"], attention=True)["attention"]).is_file()


def test_the_same_as_mgm_show(client, clip, run, tmp_path, monkeypatch):
    "Every array and picture, byte for byte; only the film may differ"
    changes = dict(mask=["mgm:share=1,blocks=2"], ratio=0.8, seed=3, start=10, stride=3, attention=True)
    files, about = ask(client, "/take_home", clip, **changes)
    files = {Path(f).name: Path(f) for f in files}
    assert json.loads(files["run.json"].read_text()) == about
    (run.parent / clip.name).unlink(missing_ok=True)
    (run.parent / clip.name).symlink_to(clip)
    monkeypatch.chdir(run.parent)  # where the checkpoint has the name that the app knows it by
    assert main([*shlex.split(about["command"])[1:], "--out", str(tmp_path)]) == 0
    assert sorted(files) == sorted(p.name for p in tmp_path.iterdir())
    for name, path in files.items():
        if name != "view.mp4": assert path.read_bytes() == (tmp_path / name).read_bytes(), name
    shown = show(client, clip, **changes)
    assert Path(shown["masks"]).read_bytes() == files["masks.png"].read_bytes()
    assert shown["command"] == about["command"]


def test_a_second_checkpoint_is_compared(client, sprite, run):
    file = handle_file(run / "checkpoints/step-000010/model.safetensors")
    uploaded, _ = client.predict(file, api_name="/checkpoint")
    shown = show(client, sprite, mask=["mgm"], versus=uploaded["value"])
    assert len(shown["guesses"]) == 2


def test_no_checkpoint(client, sprite, tmp_path):
    shown = show(client, sprite, checkpoint="none")
    assert "make demo" in shown["note"] and Path(shown["masks"]).is_file() and shown["guesses"] == []
    assert app.find_checkpoints(tmp_path / "missing") == {}
    app.build(tmp_path / "missing")  # the page stands without any


def test_a_codec_without_vectors_is_explained_and_helped(client, hevc):
    shown = show(client, hevc)
    assert "HEVC tells no motion" in shown["note"] and shown["masks"] is None
    less = dict(mask=["mgm"], checkpoint="none")
    assert Path(show(client, hevc, estimate=True, **less)["masks"]).is_file()
    again = client.predict(handle_file(hevc), api_name="/reencode")
    assert "h264, 128 x 128, 16 frames" in show(client, again, **less)["note"]


def test_what_is_wrong_is_said_in_words_and_the_server_lives_on(client, sprite, run, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("no video\n" * 100)
    with pytest.raises(AppError, match=r"^text\.mp4: "): show(client, text)
    with pytest.raises(AppError, match="mask: no 'mgn'"): show(client, sprite, mask=["mgn"])
    with pytest.raises(AppError, match="choose one to"): show(client, sprite, mask=[])
    with pytest.raises(httpx.HTTPStatusError, match="400"): show(client, sprite, checkpoint="../secret")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(AppError, match=r"^other\.safetensors: "):
        client.predict(handle_file(tmp_path / "other.safetensors"), api_name="/checkpoint")
    torch.save({"a": 1}, tmp_path / "pickle.pth")
    with pytest.raises(AppError): client.predict(handle_file(tmp_path / "pickle.pth"), api_name="/checkpoint")
    assert show(client, sprite, checkpoint="none")["note"]


def test_a_link_holds_the_settings():
    asked = Settings(mask=("tube", "mgm:share=1"), ratio=0.9, start=7, seed=5, estimate=True, compensate="affine")
    query = httpx.URL(app.to_link(app.home() / "sprites/right-star-photo-0.mp4", asked)).params
    assert app.from_link({k: query.get_list(k) for k in query}) == asked
    assert query["video"] == "sprites/right-star-photo-0.mp4"
    assert app.from_link({"ratio": ["much"], "evil": ["1"]}) == Settings()
    for name in ("../../etc/passwd", "/etc/passwd", "sprites/../../x-y-z-1.mp4"): assert app.inside(name) is None


def test_cancel_frees_the_place(client, clip):
    job = client.submit(handle_file(clip), *(DEFAULTS | {"mask": list(app.MASKINGS)[:6]}).values(), api_name="/show")
    next(iter(job))  # it has begun
    assert job.cancel()
    assert show(client, clip, checkpoint="none", mask=["mgm"])["note"]  # served, though one at a time is drawn


# Many at once, some of them with bad intentions


def bomb(folder):
    "A small file of a huge picture"
    return write_video(folder / "bomb.mp4", np.zeros((1, 4320, 7680, 3), np.uint8), options={"preset": "ultrafast"})


def playlist(folder):
    "Text that makes a careless reader open a neighbour"
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    return folder / "list.mp4"


def truncated(folder, clip):
    "An upload that ended early"
    (folder / "short.mp4").write_bytes(clip.read_bytes()[:2000])
    return folder / "short.mp4"


def traverse(url):
    "A path of the server's, given as if it had been uploaded"
    data = [{"video": {"path": "../../../../etc/passwd", "meta": {"_type": "gradio.FileData"}}}, *DEFAULTS.values()]
    return httpx.post(f"{url}/gradio_api/call/show", json={"data": data}).status_code


def claim(url):
    "Ten gigabytes announced, few sent"
    host, port = re.search(r"//([\d.]+):(\d+)", url).groups()
    with socket.create_connection((host, int(port)), timeout=20) as s:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {10 << 30}\r\n"
        s.sendall((head + "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n").encode())
    return "left"


def resident(process):
    "Bytes of memory of a process"
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) << 10


def test_twenty_at_once_five_of_them_hostile(server, client, sprite, clip, tmp_path):
    process, url, home = server
    before = resident(process)

    def good(i): return show(client, sprite, seed=i, checkpoint="none", mask=["mgm"], frames=8)["note"]

    def bad(path):
        try: return show(client, path)["note"]
        except AppError as e: return e

    with ThreadPoolExecutor(20) as pool:
        hostile = [pool.submit(bad, path) for path in (bomb(tmp_path), playlist(tmp_path), truncated(tmp_path, clip))]
        hostile += [pool.submit(traverse, url), pool.submit(claim, url)]
        served = [pool.submit(good, i) for i in range(15)]
    assert all("Shown" in job.result() for job in served)
    errors = [job.result() for job in hostile]
    assert "more than Limits(max_pixels" in str(errors[0]) and all(isinstance(e, AppError) for e in errors[:3])
    assert errors[3] >= 400 and errors[4] == "left"
    assert resident(process) - before < 1 << 30
    assert not any(b"root:" in p.read_bytes() for p in home.rglob("*") if p.is_file())


def test_forgotten_views_go(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    old, new = app.new_folder(), app.new_folder()
    (old / "masks.png").write_text("old")
    os.utime(old, (0, 0))
    assert sorted(tmp_path.iterdir()) == sorted([old, new])
    assert sorted([app.new_folder(), new]) == sorted(tmp_path.iterdir())


def test_nothing_is_left_when_it_ends(run, tmp_path):
    "Its folder goes with it, and nothing was written elsewhere in the temporary directory"
    env = {k: v for k, v in os.environ.items() if k != "GRADIO_TEMP_DIR"}
    env |= {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, root / "app/app.py", "--checkpoints", run]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        url = next(line for line in process.stdout if "http://" in line).split()[-1]
        client = Client(url, verbose=False, download_files=str(tmp_path))
        assert show(client, client.predict("up", "disc", "noise", 0, api_name="/sprite"), checkpoint="none")
        (folder,) = tmp_path.glob("mgm_nb-*")
        assert list(folder.rglob("*.png"))
        process.terminate()
        process.wait(30)
    assert not list(tmp_path.glob("mgm_nb-*"))


def test_requirements_are_those_of_the_package():
    from nbdev.config import get_config

    cfg = get_config()
    wanted = [*cfg.requirements.split(), *cfg.app_requirements.split()]
    given = [line for line in (root / "app/requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert sorted(given) == sorted(wanted)
