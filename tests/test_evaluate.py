"Fine-tuning learns what can be learned, resumes bit for bit, and its scores are what they say."
import json
import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ended_at, same, weights

from mgm_nb import video
from mgm_nb.checkpoints import load_checkpoint, save_checkpoint, to_official
from mgm_nb.data import ClipDataset, ClipTransform, make_loader, read_list
from mgm_nb.evaluate import FinetuneConfig, build_classifier, finetune
from mgm_nb.loop import find_checkpoint, read_log
from mgm_nb.probe import extract_features, knn, linear_probe
from mgm_nb.score import multi_view
from mgm_nb.synth import read_scenes, write_sprites
from mgm_nb.videomae import VideoClassifier, create_model

TINY = dict(img_size=32, frames=4, patch=8, dim=64, depth=3, heads=2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "Lists of clips labelled by one of four backgrounds, while the object differs in each; and with shuffled labels"
    folder, rng = tmp_path_factory.mktemp("places"), np.random.default_rng(0)
    for name, seed in ("train", 0), ("test", 1):
        write_sprites(folder / name, 96, size=32, frames=4, seed=seed, backgrounds=4)
        scenes = read_scenes(folder / name)
        labels = np.array([scene["seed"] % 4 for scene in scenes])
        for kind, values in ("places", labels), ("shuffled", rng.permutation(labels)):
            lines = [f"{scene['path']} {label}\n" for scene, label in zip(scenes, values, strict=True)]
            (folder / name / f"{kind}.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def config(places, tmp_path):
    "The quickest that learns; it starts from a checkpoint"
    save_checkpoint(tmp_path / "start", create_model("tiny", **TINY, decoder_dim=32, decoder_depth=1))
    return FinetuneConfig(
        data=str(places / "train" / "places.csv"), test=str(places / "test" / "places.csv"), out=str(tmp_path / "run"),
        start=str(tmp_path / "start"), stride=1, cache=True, workers=0,
        epochs=12, batch_size=16, lr=4e-2, warmup_epochs=1, layer_decay=1,
        augment=None, area=(1, 1), flip=0, erase=0, mixup=0, cutmix=0, drop_path=0,
    )


def test_what_can_be_learned_is(config, places):
    run = finetune(config, progress=False)
    report = json.loads((run / "report.json").read_text())
    assert report["top1"] > 0.95 and report["videos"] == 96 and report["broken"] == 0
    assert read_log(run)[-1]["test_top1"] == report["top1"]

    model = load_checkpoint(find_checkpoint(run))
    assert isinstance(model, VideoClassifier) and model.meta["stride"] == 1
    again = multi_view(model, read_list(config.test), 1, 1, stride=1)
    assert again.summary()["top1"] == report["top1"]
    confusion = np.loadtxt(run / "confusion.csv", delimiter=",", dtype=int)
    assert confusion.sum() == 96 and confusion.trace() == round(96 * report["top1"])
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [(Path(line["path"]), line["label"]) for line in lines] == read_list(config.test)
    assert sum(line["label"] == line["predicted"] for line in lines) == confusion.trace()


def test_shuffled_labels_give_chance(config, places):
    # The test labels are shuffled as well. Then, whatever the model answers, the right answers among 96 have mean 24
    # and a standard deviation of at most 4.3 (hypergeometric). True ones come in four clusters.
    lists = {"data": places / "train" / "shuffled.csv", "test": places / "test" / "shuffled.csv"}
    run = finetune(replace(config, **{k: str(v) for k, v in lists.items()}), progress=False)
    report = json.loads((run / "report.json").read_text())
    assert abs(report["top1"] - 1 / 4) < 4 * 4.3 / 96


def test_probes_find_it_in_an_untrained_model_and_chance_without_labels(places):
    torch.manual_seed(0)
    model, view = create_model("tiny", **TINY), ClipTransform(32, (2, 4, 4), "whole")
    features, labels, shuffled = [], [], []
    for name in "train", "test":
        clips = ClipDataset(places / name / "places.csv", 4, 1, view, None, sampling="middle")
        for found, values in zip((features, labels), extract_features(model, make_loader(clips, 32)), strict=True):
            found.append(values)
        shuffled.append(torch.tensor([label for _, label in read_list(places / name / "shuffled.csv")]))
    for probe in knn, lambda *split: linear_probe(*split, penalties=[0.1]).accuracy:
        assert probe(features[0], labels[0], features[1], labels[1]) > 0.95
        assert abs(probe(features[0], shuffled[0], features[1], shuffled[1]) - 1 / 4) < 4 * 4.3 / 96


def test_resume_is_bit_for_bit(config, tmp_path, monkeypatch):
    # everything that draws: where in the video, RandAugment, box, flip, erasing, mixing, drop path, dropout
    drawn = dict(augment=FinetuneConfig.augment, area=(0.3, 1), flip=0.5, erase=0.5, mixup=0.8, cutmix=1.0)
    drops = dict(drop_path=0.5, dropout=0.5)
    config = replace(config, test=None, views=2, epochs=1, save_every=0.25, log_every=3, **drops, **drawn)
    whole = weights(finetune(config, progress=False))
    part = replace(config, out=str(tmp_path / "part"))
    with ended_at(monkeypatch, 6): finetune(part, progress=False)
    assert load_checkpoint(find_checkpoint(part.out)).meta["step"] == 6 and not same(weights(part.out), whole)
    for noise in random.random, np.random.rand, lambda: torch.rand(1): noise()  # what others draw must not matter
    finetune(replace(part, workers=1), progress=False)
    assert same(weights(part.out), whole)
    assert [line["loss"] for line in read_log(part.out)] == [line["loss"] for line in read_log(config.out)]


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_only_the_last_blocks_change(config, blocks):
    config = replace(config, blocks=blocks, epochs=1, test=None, drop_path=0.5)
    before = build_classifier(config, 4).state_dict()
    after = weights(finetune(config, progress=False))
    changed = {name for name in before if not before[name].equal(after[name])}
    learns = tuple(f"encoder.blocks.{i}." for i in range(3 - blocks, 3))
    assert changed == {name for name in before if name.startswith(("fc_norm", "head", *learns))}


def test_it_starts_from_anybodys_checkpoint(config, tmp_path):
    published = create_model("small", depth=1, decoder_depth=1, img_size=32, frames=4)
    torch.save(to_official(published), tmp_path / "official.pth")
    for source, start in (load_checkpoint(config.start), config.start), (published, str(tmp_path / "official.pth")):
        model, state = build_classifier(replace(config, start=start, size=32, frames=4), 5), source.state_dict()
        for name, value in model.encoder.state_dict().items(): assert value.equal(state[f"encoder.{name}"])
        assert model.encoder.video_shape == (4, 3, 32, 32) and model.training
        assert model.head.out_features == 5 and model.head.weight.abs().max() < 1e-3
    larger = build_classifier(replace(config, size=64, frames=8), 5)
    assert larger.encoder.video_shape == (8, 3, 64, 64)


def test_a_video_is_opened_once_for_all_its_views(places, monkeypatch):
    opened, real = Counter(), video._open

    @contextmanager
    def count(path, *rest, **options):
        opened[path] += 1
        with real(path, *rest, **options) as source: yield source

    monkeypatch.setattr(video, "_open", count)
    items = read_list(places / "test" / "places.csv")[:3]
    scores = multi_view(create_model("tiny", num_classes=4, **TINY), items, 5, 3, stride=1)
    assert opened == Counter([path for path, _ in items]) and len(scores.read) == 3


def test_broken_videos_are_named_and_not_in_the_score(config, places, tmp_path):
    good = [path for path, _ in read_list(config.test)][:8]
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "half.mp4").write_bytes(good[0].read_bytes()[:700])
    lines = [f"{path} {i % 2}\n" for i, path in enumerate([tmp_path / "text.mp4", *good, tmp_path / "half.mp4"])]
    (tmp_path / "list.csv").write_text("".join(lines))
    run = finetune(replace(config, test=str(tmp_path / "list.csv"), epochs=1), progress=False)
    report = json.loads((run / "report.json").read_text())
    assert report["videos"] == 8 and report["broken"] == 2
    assert report["top1_if_broken_were_wrong"] == pytest.approx(report["top1"] * 8 / 10)
    named = [line for line in (run / "results.jsonl").read_text().splitlines() if "broken" in json.loads(line)]
    assert ["text.mp4" in named[0], "half.mp4" in named[1], len(named)] == [True, True, 2]


@pytest.mark.parametrize("change, says", [
    (dict(blocks=9), "blocks: 0 to 3"),
    (dict(augment="strong"), "augment: 'strong' is no policy"),
    (dict(mixup=0.8, batch_size=15), "cannot be mixed in pairs"),
    (dict(share=0), "share: more than 0"),
    (dict(area=(0.5, 0.1)), "area: two shares in order"),
    (dict(start="nowhere"), "nowhere: no such file"),
    (dict(test="few.csv"), "no training clip has the labels [7]"),
    (dict(data="bare.csv"), "bare.csv: a label is needed"),
])
def test_what_cannot_work_is_said_before_anything_is_written(config, places, tmp_path, change, says):
    for name, label in ("few.csv", " 7"), ("bare.csv", ""):
        (places / "test" / name).write_text(f"00000.mp4{label}\n")
    change = {k: str(places / "test" / v) if k in ("test", "data") else v for k, v in change.items()}
    with pytest.raises(ValueError) as error: finetune(replace(config, **change), progress=False)
    assert says in str(error.value) and not Path(config.out).exists()
