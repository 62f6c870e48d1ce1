"A run can be stopped anywhere and started from anywhere, and is still the same run."
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mgm_nb import train
from mgm_nb.checkpoints import load_checkpoint
from mgm_nb.data import StepSampler, make_loader
from mgm_nb.synth import write_sprites
from mgm_nb.train import PRESETS, find_checkpoint, make_dataset, pretrain, read_log
from mgm_nb.video import VideoError


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("clips"), 16, size=128, frames=16)


@pytest.fixture
def config(clips, tmp_path):
    small = replace(PRESETS["demo"], data=str(clips), held_out=None, out=str(tmp_path / "run"), warmup_epochs=1)
    return replace(small, epochs=3, batch_size=4, log_every=2, save_every=0.5)


def weights(run): return load_checkpoint(find_checkpoint(run)).state_dict()


def same(a, b): return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def command(config, *start):
    changed = {k: v for k, v in vars(config).items() if v != getattr(PRESETS["demo"], k)}
    options = [part for k, v in changed.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return [*start, "--config", "demo", *options]


def test_resume_is_bit_for_bit(config, tmp_path, monkeypatch):
    whole = weights(pretrain(config, progress=False))
    part, save = replace(config, out=str(tmp_path / "part")), train.save_step

    def crash(run, step, *rest):
        save(run, step, *rest)
        if step == 6: raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_step", crash)
        pretrain(part, progress=False)
    assert find_checkpoint(part.out).name == "step-00000006" and not same(weights(part.out), whole)
    half = Path(part.out, "checkpoints", ".step-00000008")  # what a kill leaves while it writes
    shutil.copytree(find_checkpoint(part.out), half)
    (half / "model.safetensors").write_bytes(b"half")
    with Path(part.out, "log.jsonl").open("a") as f: f.write('{"step": 7, "lo')
    pretrain(replace(part, workers=2), progress=False)
    assert same(weights(part.out), whole)
    assert [line["loss"] for line in read_log(part.out)] == [line["loss"] for line in read_log(config.out)]


def test_sigterm_saves_and_the_run_goes_on(config, tmp_path):
    long = replace(config, epochs=25, save_every=100)
    start = command(long, sys.executable, "-m", "mgm_nb.train")
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = b""
    while b"loss" not in said and (more := process.stderr.read1()): said += more  # the bar shows the first one
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 0, said
    assert 1 <= load_checkpoint(find_checkpoint(long.out)).meta["step"] < 100
    pretrain(long, progress=False)
    assert same(weights(long.out), weights(pretrain(replace(long, out=str(tmp_path / "whole")), progress=False)))


def test_same_first_loss_however_it_is_started(config, tmp_path):
    short = replace(config, epochs=1)
    pretrain(replace(short, out=str(tmp_path / "python")), progress=False)
    mgm = Path(sys.executable).with_name("mgm")
    for name, *start in ("cli", mgm, "pretrain"), ("module", sys.executable, "-m", "mgm_nb.train"):
        subprocess.run(command(replace(short, out=str(tmp_path / name)), *start), check=True, capture_output=True)
    first = [read_log(tmp_path / name)[0] for name in ("python", "cli", "module")]
    assert [line["step"] for line in first] == [1, 1, 1]
    assert len({line["loss"] for line in first}) == 1
    saved = json.loads((tmp_path / "module" / "config.json").read_text())
    assert saved["schema"] == 1 and saved["batch_size"] == 4


def test_batches_do_not_depend_on_the_workers(config):
    dataset = make_dataset(replace(config, cache=False, crop="random", flip=0.5, views=2))

    def batches(workers): return list(make_loader(dataset, 4, workers, StepSampler(16, 2, range(10))))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert same({k: a[k] for k in a if k != "broken"}, {k: b[k] for k in b if k != "broken"})


@pytest.fixture
def tenth_broken(clips, tmp_path):
    "A list of 20 videos, 2 of them broken"
    folder = tmp_path / "clips"
    shutil.copytree(clips.parent, folder)
    lines = clips.read_text().splitlines() + [f"{name} 0" for name in ("text.mp4", "half.mp4")]
    (folder / "text.mp4").write_text("not a video")
    (folder / "half.mp4").write_bytes((folder / "00000.mp4").read_bytes()[:3000])
    lines += [f"0000{i}.mp4 0" for i in (1, 2)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_reported_and_replaced(config, tenth_broken, workers):
    run = pretrain(replace(config, data=str(tenth_broken), workers=workers), progress=False)
    lines = (run / "broken.txt").read_text().splitlines()
    assert sorted(Path(line.split(": ")[0]).name for line in lines) == ["half.mp4", "text.mp4"]
    assert read_log(run)[-1]["broken"] == 2


def test_too_many_broken_files_end_the_run_with_a_list(config, tenth_broken):
    with pytest.raises(VideoError, match="2 of 20 videos cannot be read; .*broken.txt lists them"):
        pretrain(replace(config, data=str(tenth_broken), max_broken=0.05), progress=False)


def test_two_passes_accumulate_to_one_step(config, tmp_path):
    one = pretrain(config, progress=False)
    two = pretrain(replace(config, batch_size=2, accumulate=2, out=str(tmp_path / "two")), progress=False)
    # the masks differ: each pass draws its own. The clips, the number of steps and the learning rate do not
    for a, b in zip(read_log(one), read_log(two), strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"]) and a["loss"] == pytest.approx(b["loss"], rel=0.2)


def test_two_processes_are_one_that_accumulates(config, tmp_path):
    plain = replace(config, epochs=2, batch_size=2, log_every=1, precision="fp32")
    one = pretrain(replace(plain, accumulate=2, out=str(tmp_path / "one")), progress=False)
    torchrun = sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m mgm_nb.train".split()
    subprocess.run(command(replace(plain, out=str(tmp_path / "two")), *torchrun), check=True, capture_output=True)
    for a, b in zip(read_log(one), read_log(tmp_path / "two"), strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"]) and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    ours, theirs = weights(one), weights(tmp_path / "two")
    for name in ours: torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-6)


def test_an_explosion_goes_back_and_leaves_the_step_out(config, monkeypatch, capsys):
    def poison(*steps):
        "Spoil what the model reads in these steps"
        real, count = train.normalize, iter(range(1000))
        return lambda pixels: real(pixels) * (float("nan") if next(count) in steps else 1)

    with monkeypatch.context() as patch:
        patch.setattr(train, "normalize", poison(7))
        run = pretrain(config, progress=False)
    assert "exploded at step 7; back to step-00000006" in capsys.readouterr().err
    assert load_checkpoint(find_checkpoint(run)).meta["skipped"] == [6, 7]
    assert [line["step"] for line in read_log(run)] == [1, 2, 4, 6, 10, 12]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="exploded at the steps"):
        patch.setattr(train, "normalize", poison(*range(5, 1000)))
        pretrain(replace(config, out=config.out + "2"), progress=False)


def test_a_run_is_not_continued_with_other_steps(config, tmp_path):
    pretrain(replace(config, epochs=1), progress=False)
    with pytest.raises(ValueError, match="other settings .*clips"):
        pretrain(replace(config, epochs=1, accumulate=2, batch_size=config.batch_size), progress=False)
    (Path(config.out) / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: damaged"): pretrain(replace(config, epochs=1), progress=False)


def test_starting_again_is_no_way_round_broken_files(config, tenth_broken):
    strict = replace(config, data=str(tenth_broken), epochs=1, max_broken=0.05)
    for _ in range(2):
        with pytest.raises(VideoError, match="cannot be read"): pretrain(strict, progress=False)
