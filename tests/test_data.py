"What loading has to do with extraction, and what it leaves out."
import os
import shutil

import numpy as np
import pytest
import torch

from mgm_nb.data import ClipDataset, ClipTransform, read_list
from mgm_nb.evaluate import read_labels
from mgm_nb.extract import BulkConfig, extract_folder
from mgm_nb.motion import motion_key, stored_motion
from mgm_nb.synth import SpriteScene, render
from mgm_nb.video import VideoError, read_clip, write_video


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "Two classes of videos under the same names, by x264's defaults"
    folder = tmp_path_factory.mktemp("data") / "clips"
    for i, motion in enumerate(("left", "down", "right", "nod")):
        (folder / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        scene = SpriteScene(motion, size=96, frames=40, diameter=40, pan=1, seed=i)
        write_video(folder / f"class_{i % 2}" / f"{i // 2}.mp4", render(scene).frames)
    return folder


@pytest.fixture(scope="module")
def fields(clips):
    out = clips.parent / "fields"
    lines = extract_folder(clips, out, BulkConfig(workers=1, progress=False))
    assert all(line["outcome"] == "ok" for line in lines)
    return out


def dataset(items, fields=None, **options):
    return ClipDataset(items, 8, 3, ClipTransform(64, (4, 4, 4), flip=0.5), motion_cache=fields, **options)


@pytest.mark.parametrize("sampling", ["dense", "sparse"])
def test_an_extracted_folder_is_as_good_as_the_vectors(clips, fields, sampling):
    items = read_list(clips)
    stored, fresh = dataset(items, fields, sampling=sampling), dataset(items, sampling=sampling)
    for epoch in range(3):
        for index in range(4):
            a, b = stored[epoch, index], fresh[epoch, index]
            assert a["pixels"].equal(b["pixels"])
            for name in "energy", "velocity": torch.testing.assert_close(a[name], b[name], atol=0.15, rtol=0)


def test_the_data_set_may_move_but_not_change(clips, fields, tmp_path):
    moved = shutil.copytree(clips, tmp_path / "elsewhere" / "videos")
    first = dataset(read_list(moved), fields)[0]
    assert first["energy"].equal(dataset(read_list(clips), fields)[0]["energy"])
    (moved / "class_1" / "0.mp4").replace(moved / "class_0" / "0.mp4")
    with pytest.raises(VideoError, match=r"class_0.0.mp4: .*0.mp4.npz is not its motion"):
        dataset([(moved / "class_0" / "0.mp4", 0)], fields)[0]
    new = shutil.copy(moved / "class_0" / "1.mp4", moved / "new.mp4")
    message = "new.mp4: no motion of it in .*fields, as mgm extract"
    with pytest.raises(VideoError, match=message): dataset([(new, 0)], fields)[0]
    item = dataset([(new, 0), *read_list(clips)], fields, retries=9)[0]  # among others, it is one more broken file
    assert [i for i, _ in item["broken"]] == [0] and item["index"] > 0


def test_a_changed_video_is_noticed_and_an_unchanged_one_read_once(clips, fields, tmp_path, monkeypatch):
    moved, read = shutil.copytree(clips, tmp_path / "videos"), []
    monkeypatch.setattr("mgm_nb.motion.motion_key", lambda path: read.append(path) or motion_key(path))
    data = dataset(read_list(moved), fields)
    for epoch in range(3): data[epoch, 0]
    path = moved / "class_0" / "0.mp4"
    assert read == [str(path)]
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as long and as old as before
    with pytest.raises(VideoError, match="is not its motion"): stored_motion(path, fields)


def test_what_is_hidden_is_no_video(clips, tmp_path):
    moved = shutil.copytree(clips, tmp_path / "videos")
    for name in "._a.mp4", "class_0/.0.4f1e.mp4", ".reencode.partial/0.mp4":  # macOS's, and what kills leave
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_bytes(b"half")
    items, names = read_labels(moved)
    assert [(p.relative_to(moved), k) for p, k in items] == [(p.relative_to(clips), k) for p, k in read_list(clips)]
    assert names == ["class_0", "class_1"] and [k for _, k in items] == [0, 0, 1, 1]


def test_what_nobody_needs_is_not_decoded(clips):
    path = clips / "class_0" / "0.mp4"
    whole = read_clip(path, None, 1)
    leaves = ~whole.table["is_reference"]
    assert leaves.sum() > 8
    for start in range(0, 20, 3):
        clip, few = read_clip(path, 5, 4, start), read_clip(path, 5, 4, start, vectors=False)
        sampled = start + 4 * np.arange(5)
        np.testing.assert_array_equal(few.frames, whole.frames[sampled])
        np.testing.assert_array_equal(few.table["index"][few.keep], sampled)
        assert clip.table["index"].tolist() == list(range(start, start + 17))  # vectors: of every frame
        assert leaves[clip.table["index"]].any() and not leaves[np.setdiff1d(few.table["index"], sampled)].any()
