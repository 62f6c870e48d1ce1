"Is it VideoMAE? Held against transformers' implementation, and against the definitions"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mgm_nb.checkpoints import Weights, load_checkpoint, our_names, save_huggingface
from mgm_nb.masking import Mask, random_mask, running_cell
from mgm_nb.videomae import Output, VideoMAE, create_model, normalize, patchify, step_flops, take, unpatchify

TOY = dict(img_size=32, frames=4, patch=8, dim=64, depth=2, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=2)


def randomize(model, seed=0):
    "Weights that make attention sharp and every bias count; fresh ones would hide mistakes"
    torch.manual_seed(seed)
    for p in model.parameters(): torch.nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    return model


@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("classes", [0, 10], ids=["pretraining", "classification"])
def test_equals_transformers(size, classes, tmp_path):
    "Forward, loss and gradients, through both directions of conversion"
    import transformers

    peer = transformers.VideoMAEForVideoClassification if classes else transformers.VideoMAEForPreTraining
    # to be done in seconds: a classifier reads all tokens, 128 here; base gets half a clip
    geometry = dict(img_size=64 if classes else 224, frames=8 if size == "base" else 16)
    model = randomize(create_model(size, num_classes=classes, **geometry)).double()
    theirs = peer.from_pretrained(save_huggingface(tmp_path / "ours", model), dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs", dtype=torch.float64)
    for name, value in model.state_dict().items(): assert value.equal(ours.state_dict()[name]), name

    for module in theirs.modules():  # theirs mixes 1e-12 and 1e-5
        if isinstance(module, torch.nn.LayerNorm): module.eps = 1e-6
    video = torch.randn(1, *ours.encoder.video_shape, dtype=torch.float64)
    mask = random_mask(torch.zeros(1, *ours.grid), 0.9)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 5e-5)):
        ours, theirs, clip = ours.to(dtype), theirs.to(dtype), video.to(dtype)
        ours.zero_grad(), theirs.zero_grad()
        if classes:
            mine, other = ours(clip), theirs(clip).logits
            losses = [torch.nn.functional.cross_entropy(x, torch.tensor([3])) for x in (mine, other)]
        else:
            out, reply = ours(clip, mask), theirs(clip, bool_masked_pos=mask.volume().flatten(1))
            mine, other, losses = out.prediction, reply.logits, [out.loss, reply.loss]
        assert mine.std() > 0.1
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
        for loss in losses: loss.backward()
        wanted = our_names(Weights("gradients", {n: p.grad for n, p in theirs.named_parameters()}))
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, torch.cat(wanted[name]), rtol=tolerance, atol=tolerance, msg=name)


def test_target_by_its_definition():
    "Un-normalise, then standardise 512 pixels of one token and channel: written out with loops"
    video = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    model = VideoMAE(**TOY).double()
    rgb = video * model.std[:, None, None] + model.mean[:, None, None]
    target = model.make_target(patchify(video, 8, 2))
    for t, h, w, c in [(0, 0, 0, 0), (1, 3, 2, 2), (0, 1, 3, 1)]:
        pixels = rgb[0, 2 * t : 2 * t + 2, c, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8].flatten()
        expected = (pixels - pixels.mean()) / (pixels.var(unbiased=True).sqrt() + 1e-6)
        torch.testing.assert_close(target[0, (t * 4 + h) * 4 + w, c::3], expected, rtol=1e-12, atol=1e-12)
    raw = VideoMAE(**TOY, target="pixels").double().make_target(patchify(video, 8, 2))
    torch.testing.assert_close(unpatchify(raw, (2, 4, 4), 8, 2), rgb)


@pytest.mark.parametrize("target", ["normalized", "pixels"])
def test_hidden_pixels_stay_hidden(target):
    "Their gradient is zero in every visible token of every layer, and in the prediction"
    model, video = randomize(VideoMAE(**TOY, target=target)), torch.randn(2, 4, 3, 32, 32, requires_grad=True)
    mask = random_mask(torch.zeros(2, *model.grid), 0.75)
    out = model(video, mask, return_inside=True)
    layers = out.inside["encoder"]["features"]
    (sum(x.square().sum() for x in layers) + out.prediction.square().sum()).backward()
    influence = patchify(video.grad, 8, 2)
    assert take(influence, mask.hidden).eq(0).all() and take(influence, mask.visible).ne(0).any(-1).all()


def test_order_of_hidden_tokens_means_nothing():
    model, video = randomize(VideoMAE(**TOY)).double(), torch.randn(2, 4, 3, 32, 32).double()
    mask = random_mask(torch.zeros(2, *model.grid), 0.75)
    order = torch.randperm(mask.hidden.shape[1])
    a, b = model(video, mask), model(video, Mask(mask.visible, mask.hidden[:, order], mask.grid))
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.prediction[:, order], b.prediction, rtol=1e-9, atol=1e-9)


class Oracle(VideoMAE):
    "Predicts its target"

    def forward(self, video, mask, **_):
        return Output(None, self.make_target(take(self.encoder.cut(video), mask.hidden)), mask.hidden)


def test_reconstruction_of_perfect_predictions():
    "True statistics and raw pixels give the clip back to the bit, estimated ones do not; each says what it is"
    pixels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    cases = ("normalized", "true", True), ("normalized", None, False), ("pixels", None, True)
    for target, statistics, exact in cases:
        model = Oracle(**TOY, target=target)
        mask = random_mask(torch.zeros(2, *model.grid), 0.75)
        painted = model.reconstruct(normalize(pixels), mask, statistics)
        assert painted.pixels().equal(pixels) == exact
        assert ("true" in painted.label) == (statistics == "true")
        assert ("pixels" in painted.label) == (target == "pixels")
        truth = rearrange(pixels / 255, "b t h w c -> b t c h w")
        assert take(patchify((painted.video - truth).abs(), 8, 2), mask.visible).max() < 1e-6


def test_overfits_eight_real_clips():
    if not (folder := os.environ.get("MGM_VIDEOS")): pytest.skip("MGM_VIDEOS names no folder of clips")
    from mgm_nb.video import VideoError, read_clip

    clips = []
    for path in sorted(Path(folder).rglob("*.mp4")):
        try: frames = torch.from_numpy(read_clip(path, frames=4, vectors=False).frames)
        except VideoError: continue
        frames = rearrange(frames, "t h w c -> t c h w").float()
        small = torch.nn.functional.interpolate(frames, (32, 32), mode="bilinear", antialias=True)
        clips.append(rearrange(small, "t c h w -> t h w c").round().to(torch.uint8))
        if len(clips) == 8: break
    video = normalize(torch.stack(clips))
    torch.manual_seed(0)
    model = VideoMAE(**TOY | dict(dim=128, decoder_dim=128, decoder_heads=4), positions="axes")
    mask = random_mask(torch.zeros(8, *model.grid), 0.75)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0)
    steps = 250
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 6e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        loss = model(video, mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step(), optimiser.zero_grad()
    assert loss < 0.02, loss  # the targets' variance is 1


def test_compiles_to_one_graph_and_never_again():
    model, clips = VideoMAE(**TOY), torch.randn(2, 2, 4, 3, 32, 32)
    masks = [random_mask(torch.zeros(2, *model.grid), 0.75) for _ in range(2)]
    # eager first: einops keeps a list of the types it has met, and a compiled graph is made anew when that grows
    eager = model(clips[0], masks[0])
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(clips[0], masks[0]).loss, eager.loss)
    with torch.compiler.set_stance("fail_on_recompile"): step(clips[1], masks[1]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_flops_of_a_step():
    "The formula of the benchmark's utilisation against PyTorch's counter, backward pass included"
    model, video = VideoMAE(**TOY), torch.randn(3, 4, 3, 32, 32)
    mask = random_mask(torch.zeros(3, *model.grid), 0.75)
    for predict in (None, running_cell(mask, 0.5)):
        # the fused kernel's backward pass repeats a product, which is no model FLOP
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = model(video, mask, predict=predict)
            out.loss.backward()
        cost = step_flops(model, mask.visible.shape[1], out.predict.shape[1])
        assert counter.get_total_flops() == 3 * cost["step"]


def test_benchmark_ends_with_a_line_of_json():
    "It also holds the first losses of all contenders against each other"
    script = Path(__file__).parents[1] / "benchmarks" / "step.py"
    options = "--device cpu --sizes tiny --img-size 32 --frames 4 --batch 1 --rounds 1 --steps 1 --json".split()
    run = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    rows = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert [r["contender"] for r in rows] == ["ours", "ours, half decoded", "transformers"]
    assert all(r["clips_s"] > 0 for r in rows)


def test_half_precision_on_a_cpu():
    model, video = VideoMAE(**TOY), torch.randn(2, 4, 3, 32, 32)
    mask = random_mask(torch.zeros(2, *model.grid), 0.75)
    with torch.autocast("cpu", torch.bfloat16): half = model(video, mask)
    whole = model(video, mask)
    assert half.loss.dtype == torch.float32  # the target, and the comparison with it, stay exact
    torch.testing.assert_close(half.loss, whole.loss, rtol=2e-2, atol=0)
    torch.testing.assert_close(half.prediction.float(), whole.prediction, rtol=0.1, atol=0.1)


def test_state_dict_holds_weights_only():
    "No tables, no key bias: the names are the published ones, and a table can follow the geometry"
    names = create_model("tiny").state_dict().keys()
    assert not any("pos_embed" in n or "k_bias" in n or n in ("mean", "std") for n in names)
    assert "encoder.pos_embed" in VideoMAE(**TOY, positions="learned").state_dict()


def test_first_weights_are_the_published_ones():
    torch.manual_seed(0)
    model, classifier = create_model("small", depth=1, decoder_depth=1), create_model("small", depth=1, num_classes=100)
    block = model.encoder.blocks[0]
    assert 0.9 < block.attn.qkv.weight.abs().max() / (6 / (384 + 3 * 384)) ** 0.5 <= 1  # Xavier, over all three
    assert block.attn.q_bias.eq(0).all() and block.mlp.fc1.bias.eq(0).all() and model.decoder.head.bias.eq(0).all()
    assert 0.9 < model.encoder_to_decoder.weight.abs().max() * 384**0.5 <= 1  # PyTorch's own: never initialised
    assert 0.009 < model.mask_token.std() < 0.014 and model.mask_token.abs().max() <= 0.02  # cut at one sigma
    assert 1e-5 < classifier.head.weight.std() < 3e-5  # 0.02, scaled by 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_in_a_step():
    model = create_model("small").cuda()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    pixels = torch.randint(0, 256, (2, 16, 224, 224, 3), dtype=torch.uint8, device="cuda")
    energy = torch.zeros(2, *model.grid, device="cuda")
    for mode in ("default", "error"):  # first calls may allocate and tune
        torch.cuda.set_sync_debug_mode(mode)
        try:
            mask = random_mask(energy, 0.9)
            with torch.autocast("cuda", torch.bfloat16): loss = model(normalize(pixels), mask).loss
            loss.backward(), optimiser.step(), optimiser.zero_grad()
        finally: torch.cuda.set_sync_debug_mode("default")
