"A run can be stopped anywhere and started from anywhere, and is still the same run."
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from random import Random

import pytest
import torch
from runs import ended_at, same, weights

from mgm_nb import loop, train
from mgm_nb.checkpoints import load_checkpoint
from mgm_nb.cli import main
from mgm_nb.data import StepSampler, make_loader
from mgm_nb.loop import find_checkpoint, read_log
from mgm_nb.synth import write_sprites
from mgm_nb.train import PRESETS, make_dataset, pretrain
from mgm_nb.video import VideoError


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("clips"), 16, size=128, frames=16)


@pytest.fixture
def config(clips, tmp_path):
    small = replace(PRESETS["demo"], data=str(clips), held_out=None, out=str(tmp_path / "run"), warmup_epochs=1)
    return replace(small, epochs=3, batch_size=4, log_every=2, save_every=0.5)


def command(config, *start):
    changed = {k: v for k, v in vars(config).items() if v != getattr(PRESETS["demo"], k)}
    options = [part for k, v in changed.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return [*start, "--config", "demo", *options]


def test_resume_is_bit_for_bit(config, tmp_path, monkeypatch):
    whole = weights(pretrain(config, progress=False))
    part = replace(config, out=str(tmp_path / "part"))
    with ended_at(monkeypatch, 6): pretrain(part, progress=False)
    assert find_checkpoint(part.out).name == "step-00000006" and not same(weights(part.out), whole)
    half = Path(part.out, "checkpoints", ".step-00000008")  # what a kill leaves while it writes
    shutil.copytree(find_checkpoint(part.out), half)
    (half / "model.safetensors").write_bytes(b"half")
    with Path(part.out, "log.jsonl").open("a") as f: f.write('{"step": 7, "lo')
    pretrain(replace(part, workers=2), progress=False)
    assert same(weights(part.out), whole)
    assert [line["loss"] for line in read_log(part.out)] == [line["loss"] for line in read_log(config.out)]


# Children of a process that has imported everything: they start in no time, and can be killed like any other
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["mgm_nb.cli", "accelerate", "torch.utils.tensorboard", "pytest"])


def start(work, *args):
    child = CHILDREN.Process(target=work, args=args)
    child.start()
    return child


def run_mgm(argv): sys.exit(main(["pretrain", *argv]))


def test_sigterm_saves_and_the_run_goes_on(config, tmp_path):
    long = replace(config, epochs=15, save_every=100)
    child = start(run_mgm, command(long))
    while not read_log(long.out) and child.is_alive(): child.join(0.01)
    child.terminate()
    child.join()
    assert child.exitcode == 0
    assert 1 <= load_checkpoint(find_checkpoint(long.out)).meta["step"] < 60
    pretrain(long, progress=False)
    assert same(weights(long.out), weights(pretrain(replace(long, out=str(tmp_path / "whole")), progress=False)))


def record(config, file, die_at=None):
    "Train, note in `file` which videos each step uses, and die at a rename within the first checkpoint"
    real_fit, real_replace, renames = train.fit, os.replace, []

    def fit(config, make_task, progress):
        def make(device):
            task = make_task(device)
            real_loss = task.loss

            def loss(model, batch, generator):
                with open(file, "a") as f: f.write(json.dumps(batch["index"].tolist()) + "\n")
                return real_loss(model, batch, generator)

            task.loss = loss
            return task

        return real_fit(config, make, progress)

    def rename(source, target):
        if "step-" in str(target):
            if len(renames) == die_at: os.kill(os.getpid(), signal.SIGKILL)
            renames.append(target)
        real_replace(source, target)

    train.fit, os.replace = fit, rename
    last = find_checkpoint(config.out)
    with open(file, "a") as f: f.write(f"{int(last.name[5:]) if last.name.startswith('step-') else 0}\n")
    pretrain(config, progress=False)


def history(file):
    "The videos of each step, without the steps that a later start went back before"
    steps = []
    for line in map(json.loads, file.read_text().splitlines()):
        if isinstance(line, list): steps.append(line)
        else: del steps[line:]  # where this start went on
    return steps


def test_twenty_kills_change_nothing(config, tmp_path):
    small = replace(config, epochs=40, save_every=1, size=32, frames=4)
    plain, killed = (replace(small, out=str(tmp_path / name)) for name in ("plain", "killed"))
    files = tmp_path / "plain.jsonl", tmp_path / "killed.jsonl"
    for file in files: file.touch()
    child, chance = start(record, plain, files[0]), Random(0)
    for n in range(20):
        if n % 5 == 4:  # while it writes a checkpoint: before the weights, the config or the folder have their name
            victim = start(record, killed, files[1], n // 5 % 3)
        else:
            goal = len(files[1].read_text().splitlines()) + chance.randrange(8)
            victim = start(record, killed, files[1])
            while victim.is_alive() and len(files[1].read_text().splitlines()) < goal: victim.join(0.01)
            victim.join(chance.random() / 100)
            victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
    last = start(record, killed, files[1])
    for p in (child, last): p.join()
    assert (child.exitcode, last.exitcode) == (0, 0)
    assert same(weights(killed.out), weights(plain.out))
    assert history(files[1]) == history(files[0]) and len(history(files[0])) == 160
    assert Counter(chain(*history(files[1]))) == dict.fromkeys(range(16), 40)
    assert [line["loss"] for line in read_log(killed.out)] == [line["loss"] for line in read_log(plain.out)]


def test_same_first_loss_however_it_is_started(config, tmp_path):
    short = replace(config, epochs=1)
    pretrain(replace(short, out=str(tmp_path / "python")), progress=False)
    assert main(command(replace(short, out=str(tmp_path / "cli")), "pretrain")) == 0
    torchrun = sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 1 -m mgm_nb.train".split()
    argv = command(replace(short, out=str(tmp_path / "torchrun")), *torchrun)
    subprocess.run(argv, check=True, capture_output=True)
    first = [read_log(tmp_path / name)[0] for name in ("python", "cli", "torchrun")]
    assert [line["step"] for line in first] == [1, 1, 1]
    assert len({line["loss"] for line in first}) == 1
    saved = json.loads((tmp_path / "torchrun" / "config.json").read_text())
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


def test_too_many_broken_files_end_the_run_with_a_list(config, clips, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(clips.parent, folder)
    good = clips.read_text().splitlines()[:8]
    for i in range(12): (folder / f"broken{i}.mp4").write_text("not a video")
    (folder / "list.csv").write_text("\n".join(good + [f"broken{i}.mp4 0" for i in range(12)]) + "\n")
    with pytest.raises(VideoError, match="of 20 videos cannot be read; .*broken.txt lists them"):
        pretrain(replace(config, data=str(folder / "list.csv")), progress=False)
    listed = Path(config.out, "broken.txt").read_text().splitlines()
    assert len(listed) > 4 and all("/broken" in line for line in listed)


def test_two_passes_accumulate_to_one_step(config, tmp_path):
    one = pretrain(config, progress=False)
    two = pretrain(replace(config, batch_size=2, accumulate=2, out=str(tmp_path / "two")), progress=False)
    # the masks differ: each pass draws its own. The clips, the number of steps and the learning rate do not
    for a, b in zip(read_log(one), read_log(two), strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"]) and a["loss"] == pytest.approx(b["loss"], rel=0.2)


def join_others(rank, world, port, config):
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port)
    os.environ |= {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    real, shared = loop.shard_model, []

    def shard_model(model, *rest):
        real(model, *rest)
        shared.extend(type(p).__name__ for p in model.parameters())

    loop.shard_model = shard_model
    pretrain(config, progress=False)
    assert {*shared} == ({"DTensor"} if config.shard else set())


def train_together(config, world=2):
    "As torchrun starts it, in processes that have imported everything"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(join_others, rank, world, port, config) for rank in range(world)]
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0] * world
    return Path(config.out)


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_are_one_that_accumulates(config, tmp_path, shard):
    def close(a, b):
        for x, y in zip(read_log(a), read_log(b), strict=True):
            assert (x["step"], x["lr"]) == (y["step"], y["lr"]) and x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        ours, theirs = weights(a), weights(b)
        for name in ours: torch.testing.assert_close(theirs[name], ours[name], rtol=1e-4, atol=1e-6)

    plain = replace(config, epochs=2, batch_size=2, log_every=1, precision="fp32", clip_grad=1.0, keep=9)
    alone = replace(plain, accumulate=2, out=str(tmp_path / "one"))
    many = replace(plain, shard=shard, out=str(tmp_path / "two"))
    one, two = pretrain(alone, progress=False), train_together(many)
    close(one, two)
    for run in one, two:  # each goes on where the other was at half time
        shutil.copytree(run, tmp_path / f"half {run.name}")
        for late in sorted((tmp_path / f"half {run.name}" / "checkpoints").iterdir())[2:]: shutil.rmtree(late)
    close(one, pretrain(replace(alone, out=str(tmp_path / "half two")), progress=False))
    close(one, train_together(replace(many, out=str(tmp_path / "half one"))))


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
