"The commands, as a user types them."
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from mgm_nb.cli import main
from mgm_nb.video import write_video

MGM = Path(sys.executable).with_name("mgm")


def mgm(*arguments): return subprocess.run([MGM, *map(str, arguments)], capture_output=True, text=True)


def test_from_nothing_to_pictures(tmp_path, capsys):
    def run(line): assert main(line.format(d=tmp_path).split()) == 0, line

    run("synth {d}/clips -n 48 --backgrounds 2")
    run("synth {d}/held_out -n 48 --backgrounds 2 --seed 1")
    lists = "--data {d}/clips/train.csv --held-out {d}/held_out/train.csv"
    run(f"pretrain --config demo {lists} --out {{d}}/run --epochs 2 --batch-size 8 --warmup-epochs 0")
    told = capsys.readouterr().out
    assert "model" in told and "nearest visible" in told and "reconstructions.png" in told
    expected = "checkpoints config.json env.json log.jsonl loss.png masks.png reconstructions.png report.json"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [*expected.split(), "tensorboard"]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["packages"]["torch"]

    run("probe {d}/run --train {d}/clips/train.csv --test {d}/held_out/train.csv")
    told = capsys.readouterr().out
    assert "kNN" in told and "linear" in told and "48 test clips of 8 classes" in told

    assert main(f"test {tmp_path}/run --data {tmp_path}/held_out/train.csv".split()) == 2
    assert f"holds no classifier; mgm finetune --start {tmp_path}/run/" in capsys.readouterr().err
    lists = "--data {d}/clips/train.csv --test {d}/held_out/train.csv"
    run(f"finetune --config demo {lists} --start {{d}}/run --out {{d}}/tuned --epochs 1 --batch-size 8 --blocks 1")
    told = capsys.readouterr().out
    assert "top-1" in told and "1 x 1 views" in told and "mgm test" in told
    run("test {d}/tuned --data {d}/held_out/train.csv --segments 2 --crops 1 --workers 0 --out {d}/scores")
    assert "2 x 1 views" in capsys.readouterr().out
    written = {p.name for p in (tmp_path / "scores").iterdir()}
    assert written == {"report.json", "results.jsonl", "confusion.csv", "confusion.png", "classes.png"}
    assert written < {p.name for p in (tmp_path / "tuned").iterdir()}

    run("show {d}/held_out/00003.mp4 --mask mgm --checkpoint {d}/run --stride 2 --out {d}/show")
    names = {p.name for p in (tmp_path / "show").iterdir()}
    assert names >= {"frames.png", "motion.png", "masks.png", "reconstruction_mgm.png"}


@pytest.mark.parametrize("command, word", [
    ("", "pretrain"), ("pretrain", "effective batch"), ("show", "run folder"), ("test", "from one decode"),
    ("finetune", "trains the head alone"),
])
def test_help_teaches(capsys, command, word):
    with pytest.raises(SystemExit) as end: main([*command.split(), "--help"])
    assert end.value.code == 0 and word in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.fixture
def bad(tmp_path):
    "A folder of things that are no good, and one good video"
    write_video(tmp_path / "one.mp4", np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8))
    (tmp_path / "one.csv").write_text("one.mp4 1\n")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("text.mp4 1\ngone.mp4 2\n")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    return tmp_path


@pytest.mark.parametrize("arguments, says", [
    ("show nowhere.mp4", "nowhere.mp4: no such file"),
    ("show {d}/text.mp4", "text.mp4: not a video"),
    ("show {d}/sound.mp4", "sound.mp4: no video in it"),
    ("show {d}/text.mp4 --mask mgn", "mask: no 'mgn'"),
    ("show {d}/text.mp4 --checkpoint {d}/empty", "empty: "),
    ("pretrain --data nowhere", "nowhere: no such list"),
    ("pretrain --data {d}/text.mp4", "text.mp4: not a video"),
    ("pretrain --data {d}/sound.mp4", "sound.mp4: no video in it"),
    ("pretrain --data {d}/empty", "empty: no video in it"),
    ("pretrain --data {d}/list.csv", "list.csv, line 2: no file"),
    ("pretrain --data {d}/empty --ratio 1.2", "ratio: more than 0 and less than 1, got 1.2"),
    ("pretrain --config dmo", "config: no preset 'dmo'"),
    ("finetune --config dmo", "config: no preset 'dmo'"),
    ("finetune --data {d}/list.csv", "list.csv, line 2: no file"),
    ("finetune --data {d}/one.csv --start {d}/empty", "empty: "),
    ("finetune --data {d}/one.csv --test {d}/empty", "empty: no video in it"),
    ("test {d}/empty --data {d}/one.csv", "empty: "),
    ("pretrain", "data: name a list"),
    ("pretrain --data {d}/one.csv --batch-size 1 --model foo", "no size 'foo'"),
    ("pretrain --data {d}/one.csv --batch-size 1 --ratio 0.001", "ratio: 0.001 hides no token"),
    ("show {d}/one.mp4 --device warp", "device: no 'warp' here"),
    ("show {d}/one.mp4 --mask mgm:share=x", "mask: the options of 'mgm:share=x'"),
    ("synth {d}/out --seed -1", "seed: not less than 0"),
    ("probe {d}/empty --train {d}/list.csv --test {d}/list.csv", "empty: "),
    ("synth {d}/out -n 0", "n: at least 1, got 0"),
])
def test_bad_input_is_one_clear_line(bad, capsys, arguments, says):
    before = sorted(bad.rglob("*"))
    line = arguments.format(d=bad)
    if not line.startswith(("synth", "probe")): line += f" --out {bad}/out"
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mgm: ") and err.count("\n") == 1 and says in err
    assert sorted(bad.rglob("*")) == before


def test_exit_status_reaches_the_shell(bad):
    result = mgm("show", bad / "text.mp4", "--out", bad / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as end: main(["shw"])
    assert end.value.code == 2
