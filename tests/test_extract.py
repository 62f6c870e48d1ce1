"Thousands of files: what is killed, hangs or dies costs what was in flight, here and on a cluster"
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mgm_nb.extract import BulkConfig, extract_folder, read_manifest, reencode_folder, run_jobs
from mgm_nb.motion import load_motion, motion_key
from mgm_nb.video import VideoError, reencode, write_video

WAYS = {
    "hang": lambda: ctypes.PyDLL(None).pause(),  # inside a library, and no Python code can run beside it
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(0),
    "memory": lambda: bytes(1 << 60),
    "unwell": lambda: (_ for _ in ()).throw(VideoError("unwell: cut short")),
}
OUTCOMES = dict(hang="timeout", stop="timeout", segfault="crash", exit="crash", memory="error", unwell="bad")


def job_with_accidents(source: Path, target: Path) -> dict:
    "Copies a file; some names go wrong after half of it"
    way = source.stem.split("-")[0]
    if way in WAYS:
        target.write_text("half")
        WAYS[way]()
    shutil.copy(source, target)
    return {"owner": os.getppid()}


def job_that_kills_its_cluster_worker(source: Path, target: Path) -> dict:
    "The first time that it sees `fatal`, it kills the process that owns this one"
    if source.stem == "fatal" and not (seen := source.with_suffix(".seen")).exists():
        seen.touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return {"owner": os.getppid()}


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "200 small H.264 files in two folders"
    folder = tmp_path_factory.mktemp("clips")
    texture = np.random.default_rng(0).integers(0, 255, (144, 288, 3), np.uint8)
    frames = np.stack([texture[:, 2 * t : 2 * t + 192] for t in range(32)])
    first = write_video(folder / "0.mp4", frames)
    for i in range(200):
        (folder / f"class_{i % 2}").mkdir(exist_ok=True)
        shutil.copy(first, folder / f"class_{i % 2}" / f"{i:03}.mp4")
    first.unlink()
    return folder


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def assert_complete(clips, out):
    "One line and one sound file for each clip, and nothing else"
    lines = [json.loads(line) for line in (out / "extract.jsonl").read_text().splitlines()]
    assert Counter(line["outcome"] for line in lines) == {"ok": 200}
    assert sorted(line["file"] for line in lines) == tree(clips)
    assert tree(out) == sorted(["extract.jsonl", *(f"{name}.npz" for name in tree(clips))])
    fields = [load_motion(out / f"{name}.npz", motion_key(clips / name)) for name in tree(clips)]
    assert all(np.array_equal(field.velocity, fields[0].velocity) for field in fields)
    speed = np.median(fields[0].velocity[fields[0].valid], axis=(0, 1, 2))
    np.testing.assert_allclose(speed, [-2, 0], atol=0.25)  # the texture moves two pixels a frame to the left


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_restarted(clips, tmp_path, how):
    mgm = Path(sys.executable).with_name("mgm")
    command = [mgm, "extract", clips, tmp_path, "--workers", "2"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would inherit "ignore"
    with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0) as run:
        seen = b""
        while not (done := re.search(rb"\b([1-9]\d|1\d\d)/200", seen)):  # the progress bar, at 10 files or more
            assert (text := run.stderr.read(4096)), seen.decode()
            seen += text
        run.send_signal(how)
        run.stderr.read()  # ends when nobody is left who could write: the children have gone as well
    assert run.returncode != 0 and int(done[1]) < 200
    before = (tmp_path / "extract.jsonl").read_text().splitlines()
    assert 10 <= len(before) < 200
    with (tmp_path / "extract.jsonl").open("a") as log: log.write('{"file": "class_0/torn.mp4", "outc')  # a power cut
    extract_folder(clips, tmp_path, BulkConfig(workers=2, progress=False))
    assert_complete(clips, tmp_path)
    assert set(before) < set((tmp_path / "extract.jsonl").read_text().splitlines())  # what was done is not redone


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_accidents_cost_their_file_only(tmp_path, where, request):
    (folder := tmp_path / "files").mkdir()
    names = [*OUTCOMES, *(f"fine-{k}" for k in range(20))]
    for name in names: (folder / f"{name}.mp4").write_text(name)
    slots = {"workers": 2} if where == "here" else {"scheduler": request.getfixturevalue("cluster")}
    bulk = BulkConfig(**slots, seconds=1.5, progress=False)
    out = tmp_path / "out"
    lines = run_jobs("copy", job_with_accidents, folder, out, suffix=".txt", bulk=bulk)
    assert {line["file"]: line["outcome"] for line in lines} == {
        f"{name}.mp4": OUTCOMES.get(name.split("-")[0], "ok") for name in names
    }
    assert tree(out) == sorted(["copy.jsonl", *(f"fine-{k}.mp4.txt" for k in range(20))])  # no half files
    assert all((out / f"fine-{k}.mp4.txt").read_text() == f"fine-{k}" for k in range(20))
    if where == "cluster": assert len({line["owner"] for line in lines if "owner" in line}) == 2  # both took part
    # A second run touches nothing; with retry, only what failed.
    before = (out / "copy.jsonl").read_bytes()
    run_jobs("copy", job_with_accidents, folder, out, suffix=".txt", bulk=bulk)
    assert (out / "copy.jsonl").read_bytes() == before
    for name in names: (folder / f"{name}.mp4").rename(folder / f"{name}.tmp")
    for name in ("hang", "fine-0"): (folder / f"{name}.tmp").rename(folder / f"{name}.mp4")
    again = run_jobs("copy", job_with_accidents, folder, out, suffix=".txt", bulk=replace(bulk, retry=True))
    assert {line["file"]: line["outcome"] for line in again} == {"hang.mp4": "timeout", "fine-0.mp4": "ok"}
    assert len(read_manifest(out / "copy.jsonl")) == len(names)


def test_a_cluster_extracts_the_same(clips, tmp_path, cluster):
    extract_folder(clips, tmp_path / "cluster", BulkConfig(scheduler=cluster, progress=False))
    assert_complete(clips, tmp_path / "cluster")


def test_a_cluster_may_lose_a_machine(tmp_path, cluster):
    (folder := tmp_path / "files").mkdir()
    for name in ["fatal", *map(str, range(20))]: (folder / f"{name}.mp4").write_text(name)
    bulk = BulkConfig(scheduler=cluster, progress=False)
    lines = run_jobs("look", job_that_kills_its_cluster_worker, folder, tmp_path / "out", bulk=bulk)
    assert Counter(line["outcome"] for line in lines) == {"ok": 21}
    assert (folder / "fatal.seen").exists()


def test_the_source_is_not_to_blame_for_the_target(clips, tmp_path):
    source = next(clips.rglob("*.mp4"))
    with pytest.raises(OSError) as found: reencode(source, tmp_path / "nowhere" / "a.mp4")
    assert not isinstance(found.value, VideoError) and not list(tmp_path.rglob("*.mp4"))


def test_damage_is_not_washed_off(clips, tmp_path):
    data = bytearray(next(clips.rglob("*.mp4")).read_bytes())
    for i in range(len(data) // 4, len(data) // 3, 97): data[i] ^= 0x55
    (tmp_path / "a.mp4").write_bytes(data)
    (line,) = reencode_folder(tmp_path / "a.mp4", tmp_path / "out", bulk=BulkConfig(workers=1, progress=False))
    assert line["outcome"] == "ok" and line["corrupt"] > 0


def test_two_files_never_share_a_target(tmp_path):
    for name in ("a.avi", "a.avi.mp4"): (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="one name"): reencode_folder(tmp_path, tmp_path / "out")
