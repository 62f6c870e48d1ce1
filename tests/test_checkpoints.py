"Everybody's files: read completely, or refused in one line; the hostile ones too"
import argparse
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from mgm_nb.checkpoints import (
    CheckpointError,
    hf_names,
    load_checkpoint,
    save_checkpoint,
    save_huggingface,
    to_huggingface,
    to_official,
)
from mgm_nb.videomae import VideoClassifier, VideoMAE, create_model, sinusoid_table

WIDTHS = dict(depth=2, decoder_depth=1)  # published widths, so that heads are known; few layers


def randomize(model):
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.1)
    return model


def same(a, b):
    assert type(a) is type(b) and a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items(): assert value.equal(b.state_dict()[name]), name


@pytest.fixture(scope="module")
def small():
    return randomize(create_model("small", **WIDTHS))


@pytest.fixture(scope="module")
def classifier():
    return randomize(create_model("small", num_classes=5, depth=2))


def published_names(depth, decoder_depth):
    "The official state dict's names and shapes for ViT-S, written down from its description, not from our model"
    def blocks(stem, d, n):
        for i in range(n):
            s = f"{stem}.blocks.{i}."
            yield from ((s + "attn.qkv.weight", (3 * d, d)), (s + "attn.q_bias", (d,)), (s + "attn.v_bias", (d,)))
            yield from ((s + "attn.proj.weight", (d, d)), (s + "attn.proj.bias", (d,)))
            yield from ((s + "mlp.fc1.weight", (4 * d, d)), (s + "mlp.fc1.bias", (4 * d,)))
            yield from ((s + "mlp.fc2.weight", (d, 4 * d)), (s + "mlp.fc2.bias", (d,)))
            for norm in ("norm1", "norm2"): yield from ((s + norm + ".weight", (d,)), (s + norm + ".bias", (d,)))
    names = dict(blocks("encoder", 384, depth)) | dict(blocks("decoder", 192, decoder_depth))
    for s, d in (("encoder", 384), ("decoder", 192)): names |= {f"{s}.norm.weight": (d,), f"{s}.norm.bias": (d,)}
    return names | {
        "mask_token": (1, 1, 192), "encoder_to_decoder.weight": (192, 384),
        "encoder.patch_embed.proj.weight": (384, 3, 2, 16, 16), "encoder.patch_embed.proj.bias": (384,),
        "decoder.head.weight": (1536, 192), "decoder.head.bias": (1536,),
    }


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(output_dir=pathlib.Path("runs"), lr=1e-3)},
    lambda s: {"module": s, "optimizer_step": 7},  # DeepSpeed
    lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}},  # v2 under torch >= 2
    lambda s: {"state_dict": {f"module.backbone.{k}": v for k, v in s.items()}},
    lambda s: s,
], ids=["model", "module", "_orig_mod", "backbone", "bare"])
def test_official_containers(wrap, tmp_path):
    state = {k: torch.randn(shape) for k, shape in published_names(2, 1).items()}
    torch.save(wrap(state), tmp_path / "checkpoint.pth")
    model = load_checkpoint(tmp_path / "checkpoint.pth")
    assert isinstance(model, VideoMAE) and model.config()["heads"] == 6 and model.config()["decoder_heads"] == 3
    for name, value in state.items(): assert value.equal(model.state_dict()[name])
    assert load_checkpoint(tmp_path).config() == model.config()  # the folder will do


def test_official_fine_tuned(classifier, tmp_path):
    state = to_official(classifier)["model"]
    assert {"fc_norm.weight", "head.weight", "patch_embed.proj.weight", "blocks.0.attn.q_bias"} <= state.keys()
    torch.save({"module": state}, tmp_path / "ft.pth")
    same(load_checkpoint(tmp_path / "ft.pth"), classifier)
    other = load_checkpoint(tmp_path / "ft.pth", num_classes=9)  # another task: the head alone is new
    assert other.head.weight.shape == (9, 384) and other.fc_norm.weight.equal(classifier.fc_norm.weight)
    with pytest.raises(CheckpointError, match="a classifier"): load_checkpoint(tmp_path / "ft.pth", kind="VideoMAE")


def test_pretrained_starts_a_classifier(small, tmp_path):
    torch.save(to_official(small), tmp_path / "pt.pth")
    model = load_checkpoint(tmp_path / "pt.pth", num_classes=3, drop_path=0.1, frames=8)
    assert isinstance(model, VideoClassifier) and model(torch.zeros(1, 8, 3, 224, 224)).shape == (1, 3)
    assert model.encoder.blocks[1].mlp.fc2.weight.equal(small.encoder.blocks[1].mlp.fc2.weight)
    assert model.fc_norm.weight.eq(1).all()  # fresh, not the encoder's last norm
    with pytest.raises(CheckpointError, match="no classifier"): load_checkpoint(tmp_path / "pt.pth", "VideoClassifier")


def test_version_two_files(tmp_path):
    "Layer scale is read; cosine attention is not ours, and said so"
    model = randomize(create_model("small", init_values=0.1, **WIDTHS))
    state = dict(model.state_dict())
    torch.save({"module": state}, tmp_path / "v2.pth")
    same(load_checkpoint(tmp_path / "v2.pth"), model)
    state["encoder.blocks.0.attn.scale"] = torch.ones(6, 1, 1)
    torch.save({"module": state}, tmp_path / "cos.pth")
    with pytest.raises(CheckpointError, match="cosine"): load_checkpoint(tmp_path / "cos.pth")


@pytest.mark.parametrize("scheme", ["v4", "v5"])
@pytest.mark.parametrize("kind", ["small", "classifier"])
def test_hugging_face_round_trip(kind, scheme, tmp_path, request):
    model = request.getfixturevalue(kind)
    same(load_checkpoint(save_huggingface(tmp_path, model, scheme)), model)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("videomae.encoder.layer.0.attention.attention.q_bias" in names) == (scheme == "v4")
    import transformers

    peer = transformers.VideoMAEForVideoClassification if kind == "classifier" else transformers.VideoMAEForPreTraining
    theirs = peer.from_pretrained(tmp_path)  # reads both schemes since 5.18
    for name, value in to_huggingface(model)[0].items(): assert value.equal(theirs.state_dict()[name]), name
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # as before safetensors
    (tmp_path / "model.safetensors").unlink()
    same(load_checkpoint(tmp_path), model)


def test_biases_never_get_lost(small, tmp_path):
    "What transformers 5.5.4 to 5.17 did in silence: a file without them is refused; a trained key bias means nothing"
    state, config = to_huggingface(small)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for i in range(2): state[f"videomae.encoder.layer.{i}.attention.attention.key.bias"] = torch.randn(384)
    save_file(state, tmp_path / "model.safetensors")
    same(load_checkpoint(tmp_path), small)
    for i in range(2): del state[f"videomae.encoder.layer.{i}.attention.attention.query.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="2 missing: encoder.blocks.0.attn.q_bias"): load_checkpoint(tmp_path)


def test_the_trap_of_small(small, tmp_path):
    save_huggingface(tmp_path, small)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 16}))
    with pytest.warns(UserWarning, match="16 heads"): assert load_checkpoint(tmp_path).config()["heads"] == 6
    assert load_checkpoint(tmp_path, heads=16).config()["heads"] == 16


def test_an_encoder_alone(small, tmp_path):
    state = {k: v for k, v in small.state_dict().items() if k.startswith("encoder.")}
    torch.save({"model": state}, tmp_path / "encoder.pth")
    with pytest.raises(CheckpointError, match="an encoder alone"): load_checkpoint(tmp_path / "encoder.pth")
    assert load_checkpoint(tmp_path / "encoder.pth", num_classes=2).head.weight.shape == (2, 384)


def test_tables_that_were_written_out(small, tmp_path):
    "mmaction2's names and its table, and a learned table"
    state = {k.removeprefix("encoder."): v for k, v in small.state_dict().items() if k.startswith("encoder.")}
    names = {k: k.replace("mlp.fc1", "mlp.layers.0.0").replace("mlp.fc2", "mlp.layers.1") for k in state}
    table = {"backbone.pos_embed": sinusoid_table(1568, 384)[None]}
    torch.save({"state_dict": {f"backbone.{names[k]}": v for k, v in state.items()} | table}, tmp_path / "mm.pth")
    assert load_checkpoint(tmp_path / "mm.pth", num_classes=2).config()["positions"] == "sinusoid"
    learned = torch.randn(1, 1568, 384)
    torch.save({"model": state | {"pos_embed": learned}}, tmp_path / "learned.pth")
    model = load_checkpoint(tmp_path / "learned.pth", num_classes=2)
    assert model.encoder.pos_embed.equal(learned) and model.config()["positions"] == "learned"
    shorter = dict(num_classes=2, frames=8)
    with pytest.raises(CheckpointError, match="pos_embed"): load_checkpoint(tmp_path / "learned.pth", **shorter)
    shorter = load_checkpoint(tmp_path / "learned.pth", **shorter, interpolate=True)
    assert shorter.encoder.pos_embed.shape == (1, 784, 384)


def test_other_geometries_are_resized_when_asked(small, classifier, tmp_path):
    save_checkpoint(tmp_path, classifier)
    with pytest.raises(CheckpointError, match="another shape"): load_checkpoint(tmp_path, patch=32)
    model = load_checkpoint(tmp_path, patch=32, img_size=448, tubelet=4, channels=1, frames=32, interpolate=True)
    assert model(torch.randn(1, 32, 1, 448, 448)).isfinite().all()
    save_checkpoint(tmp_path, small)
    with pytest.raises(CheckpointError, match="decoder.head"): load_checkpoint(tmp_path, patch=32, interpolate=True)


def test_unknown_heads_are_asked_for(tmp_path):
    model = create_model("tiny", positions="sinusoid")
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(CheckpointError, match="pass heads and decoder_heads"): load_checkpoint(tmp_path / "tiny.pth")
    same(load_checkpoint(tmp_path / "tiny.pth", heads=4, decoder_heads=4, img_size=64), model)


def test_the_hub_without_a_network(small, tmp_path):
    "What was downloaded once is read from the cache; the rest is one line, at once"
    cache = tmp_path / "hub" / "models--owner--kept"
    save_checkpoint(cache / "snapshots" / "abc", small, epochs=3)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    code = """from mgm_nb.checkpoints import CheckpointError, load_checkpoint
for name in ("owner/kept", "owner/name"):
    try: print(load_checkpoint(name).meta)
    except CheckpointError as e: print(e)"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    told = "{'epochs': 3}", "owner/name: no such file or folder, and the hub cannot be reached"
    assert run.stdout.splitlines() == list(told)


def test_a_crash_while_writing_leaves_the_old_file(small, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, small, epochs=1)
    def crash(source, target): raise OSError("disk full")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", crash)
        with pytest.raises(OSError): save_checkpoint(tmp_path, small, epochs=2)
    assert load_checkpoint(tmp_path).meta == {"epochs": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


class Runs:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


class Fat:
    def __reduce__(self): return bytearray, (10**11,)


def deflate(source, target):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist(): new.writestr(entry.filename, old.read(entry))


def hostile_files(folder, small):
    "A file for every way we know to hurt a reader"
    def save(content, name): torch.save(content, folder / name)
    state = small.state_dict()
    save({"model": Runs(folder / "owned")}, "code.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Runs(folder / "owned")))
    save({"model": state | {"mask_token": Fat()}}, "bytearray.pth")
    save({"model": state | {"mask_token": torch.zeros(1).expand(10**11)}}, "stride0.pth")
    one = torch.zeros(1)
    save({"model": {k: one.expand(v.shape) for k, v in state.items()}}, "allstride0.pth")
    save({"model": {"w": torch.zeros(10**7)}}, "zeros.pth")
    deflate(folder / "zeros.pth", folder / "deflated.pth")
    (folder / "zeros.pth").unlink()
    save(state, "whole.pth")
    data = (folder / "whole.pth").read_bytes()
    (folder / "truncated.pth").write_bytes(data[: len(data) // 2])
    (folder / "whole.pth").unlink()
    save_checkpoint(folder, small)
    data, config = (folder / "model.safetensors").read_bytes(), json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "truncated.safetensors").write_bytes(data[:-100])
    (folder / "model.safetensors").unlink()
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}}).encode()
    (folder / "claims.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "header.safetensors").write_bytes((10**11).to_bytes(8, "little") + b"{}")
    changes = {"deep": dict(depth=10**9), "wide": dict(dim=10**6), "long": dict(frames=2 * 10**9)}
    for name, change in (changes | {"odd": dict(heads=0), "text": dict(patch="x"), "extra": dict(evil=1)}).items():
        bad = config | {"arguments": config["arguments"] | change}
        save_file(state, folder / f"{name}.safetensors", metadata={"mgm_nb": json.dumps(bad)})
    save_file(state, folder / "list.safetensors", metadata={"mgm_nb": "[1]"})
    save(state | {"mask_token": torch.zeros(1, 1, 7)}, "shape.pth")
    save(state | {"mask_token": torch.zeros(1, 1, 192, dtype=torch.long)}, "integers.pth")
    save(state | {"mask_token": torch.zeros(1, 1, 192).to_sparse()}, "sparse.pth")
    save([1, 2], "list.pth")
    (folder / "text.pth").write_text("not a checkpoint\n")
    (folder / "empty.pth").touch()
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    (folder / "legacy.pth").write_bytes(buffer.getvalue())


REFUSE_ALL = """
import json, resource, sys
from pathlib import Path
from mgm_nb.checkpoints import CheckpointError, load_checkpoint
before, lines = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    try: lines[file.name] = str(type(load_checkpoint(file)))
    except CheckpointError as e: lines[file.name] = "refused " + str(e)
print(json.dumps([lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_hostile_files_are_refused_in_one_line(small, tmp_path):
    "In a process of its own: nothing runs, and memory stays flat"
    (folder := tmp_path / "hostile").mkdir()
    hostile_files(folder, small)
    files = sorted(p.name for p in folder.iterdir())
    run = subprocess.run([sys.executable, "-c", REFUSE_ALL, str(folder)], capture_output=True, text=True, check=True)
    lines, grown = json.loads(run.stdout)
    assert list(lines) == files and len(files) > 20 and not (folder / "owned").exists()
    for name, line in lines.items():
        assert line.startswith(f"refused {folder / name}: ") and "\n" not in line and len(line) < 1000, (name, line)
    assert "posix.mkdir" in lines["code.pth"] and "bytearray" in lines["bytearray.pth"]
    assert "claim" in lines["stride0.pth"] and "compressed" in lines["deflated.pth"]
    assert "mask_token (1, 1, 7) for (1, 1, 192)" in lines["shape.pth"]
    assert grown < 100_000, f"{grown} kB"  # the honest file has 30 MB
    for line in lines.values(): print(line.replace(str(folder), "..."))


ODD = ("x", None, 0, 10**30)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_nonsense_ends_in_another_error(tmp_path):
    "Each tensor and each entry of the configuration replaced in turn: loaded, or refused as a checkpoint"
    model = create_model("tiny", positions="sinusoid", dim=16, depth=1, decoder_dim=8, decoder_depth=1)
    file, outcomes = tmp_path / "model.safetensors", set()
    hf_state, hf_config = to_huggingface(model)
    ours = json.loads((save_checkpoint(tmp_path, model) / "config.json").read_text())
    for state, config, entries in ((model.state_dict(), ours, ours["arguments"]), (hf_state, hf_config, hf_config)):
        cases = [({**state, k: torch.zeros(s)}, entries) for k in state for s in ((), (0, 0))]
        cases += [(state, {**entries, k: v}) for k in entries for v in ODD]
        for tensors, changed in cases:
            save_file(tensors, file)
            written = {**ours, "arguments": changed} if config is ours else changed
            (tmp_path / "config.json").write_text(json.dumps(written))
            for options in ({}, dict(num_classes=2, img_size=32, interpolate=True))[: 1 + (tensors is state)]:
                try: load_checkpoint(tmp_path, **options)
                except CheckpointError as e: outcomes.add("refused" if "\n" not in str(e) else str(e))
                else: outcomes.add("loaded")
    assert outcomes == {"refused", "loaded"}


def test_hub_card(small, tmp_path):
    small.meta = dict(masking="mgm", ratio=0.9, data="videos.csv", epochs=3)
    small.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in ("| masking | mgm |", "| ratio | 0.9 |", "| data | videos.csv |", "| epochs | 3 |"): assert line in card
    same(VideoMAE.from_pretrained(tmp_path), small)
    with pytest.raises(CheckpointError): VideoClassifier.from_pretrained(tmp_path)


def test_every_name_has_one_translation(small, classifier):
    for model in (small, classifier):
        for scheme in ("v4", "v5"):
            ours = model.state_dict().keys()
            names = [n for k in ours for n in hf_names(k, scheme, model is classifier)]
            assert len(names) == len(set(names)) == len(ours) + 2 * sum("qkv" in k for k in ours)
