"The contract of every masking, on whatever grid, ratio, seed and energy (nbs/04_masking.ipynb tells why)."
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_nb.masking import MASKINGS, describe, draw, make_mask, mgm_centres, mgm_mask, running_cell
from mgm_nb.motion import MotionConfig, motion_field
from mgm_nb.synth import render, sprite_scenes
from mgm_nb.video import MOTION_PRESET, probe, read_clip, write_video

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
ENERGIES = ("random", "few values", "zero", "constant", "unknown", "gaps")
maskings = pytest.mark.parametrize("name", MASKINGS)
devices = pytest.mark.parametrize("device", DEVICES)
examples = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def energies(draw_from, kinds=ENERGIES):
    "`(b, T, H, W)` of any size and kind"
    size = draw_from(st.tuples(*(st.integers(1, n) for n in (3, 9, 9, 9))))
    rng = torch.Generator().manual_seed(draw_from(st.integers(0, 2**32)))
    match draw_from(st.sampled_from(kinds)):
        case "random": return torch.rand(size, generator=rng)
        case "few values": return torch.randint(3, size, generator=rng).float()
        case "zero": return torch.zeros(size)
        case "constant": return torch.full(size, 2.5)
        case "unknown": return torch.full(size, torch.nan)
        case "gaps":
            energy = torch.rand(size, generator=rng)
            slices = torch.rand(size[:2], generator=rng)[..., None, None] < 0.5
            return energy.masked_fill(slices | (torch.rand(size, generator=rng) < 0.1), torch.nan)


ratios = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 0.75, 0.9, 0.95])
seeds = st.integers(0, 2**32)


def still(energy, velocity=0.0): return torch.full((*energy.shape, 2), velocity, device=energy.device)


def check(mask, energy, ratio):
    b, slices, height, width = energy.shape
    count = int(ratio * height * width)
    assert mask.grid == (slices, height, width)
    assert mask.hidden.shape == (b, slices * count)
    assert mask.visible.shape == (b, slices * (height * width - count))
    for indices in (mask.visible, mask.hidden):
        assert indices.dtype == torch.int64 and indices.device == energy.device
        assert (indices.diff(dim=1) > 0).all()
    everything = torch.cat([mask.visible, mask.hidden], 1).sort(1).values
    assert everything.equal(torch.arange(slices * height * width, device=energy.device).expand_as(everything))
    assert mask.volume().flatten(1).gather(1, mask.hidden).all() and mask.volume().sum() == mask.hidden.numel()


@devices
@maskings
@examples
@given(energies(), ratios, seeds)
def test_contract(name, device, energy, ratio, seed):
    energy = energy.to(device)
    before = energy.clone()
    rng = torch.Generator(device)
    mask, again = (
        make_mask(name, energy, ratio, rng.manual_seed(seed), velocity=still(energy, 0.3)) for _ in range(2)
    )
    check(mask, energy, ratio)
    assert again.visible.equal(mask.visible) and again.hidden.equal(mask.hidden)
    assert energy.equal(before) or energy.isnan().equal(before.isnan())
    if name != "random":  # the only one that does not count slice by slice
        assert (mask.volume().sum((2, 3)) == int(ratio * energy.shape[2] * energy.shape[3])).all()


@maskings
@examples
@given(energies(), ratios, seeds, st.sampled_from([(2,), (3,), (2, 3)]))
def test_flips_commute(name, energy, ratio, seed, dims):
    draws = draw(energy, torch.Generator().manual_seed(seed))
    rng = torch.Generator().manual_seed(seed)
    velocity = torch.randint(-8, 9, (*energy.shape, 2), generator=rng) / 4  # quarter pixels, as the codec has them
    sign = torch.tensor([1 - 2 * (3 in dims), 1 - 2 * (2 in dims)])
    mask = make_mask(name, energy, ratio, draws, velocity=velocity)
    flipped = make_mask(name, energy.flip(dims), ratio, draws.flip(dims), velocity=sign * velocity.flip(dims))
    assert flipped.volume().equal(mask.volume().flip(dims))


@examples
@given(
    energies(), ratios, seeds, st.integers(1, 4), st.floats(0, 1), st.sampled_from(["nearest", "rectangle"]),
    st.floats(0.25, 4), st.sampled_from(["tube", "frame"]), st.sampled_from(["carry", "redraw"]),
    st.sampled_from(["random", "ahead", "first"]), st.sampled_from([(2,), (3,)]),
)  # fmt: skip
def test_every_option_of_mgm(energy, ratio, seed, blocks, share, shape, aspect, rest, unknown, start, dims):
    options = dict(blocks=blocks, share=share, shape=shape, aspect=aspect, rest=rest, unknown=unknown, start=start)
    draws = draw(energy, torch.Generator().manual_seed(seed))
    mask = mgm_mask(energy, ratio, draws, **options)
    check(mask, energy, ratio)
    assert mgm_mask(energy.flip(dims), ratio, draws.flip(dims), **options).volume().equal(mask.volume().flip(dims))


@pytest.mark.parametrize("name", [n for n in MASKINGS if n != "random"])  # which may prefer the slices that move most
@examples
@given(energies(kinds=("random", "few values")), ratios, seeds)
def test_topk_hides_the_most_motion(name, energy, ratio, seed):
    draws = draw(energy, torch.Generator().manual_seed(seed))
    masks = (make_mask(n, energy, ratio, draws, still(energy)) for n in ("topk", name))
    most, other = ((mask.volume() * energy).sum((2, 3)) for mask in masks)
    assert (most >= other - 1e-4).all()


@examples
@given(energies(), seeds)
def test_a_slice_that_says_nothing_keeps_the_position(energy, seed):
    centres = mgm_centres(energy, torch.Generator().manual_seed(seed))
    low, high = energy.nan_to_num(torch.inf).amin((2, 3)), energy.nan_to_num(-torch.inf).amax((2, 3))
    silent = ~(high > low)[:, 1:, None]
    assert (~silent | (centres[:, 1:] == centres[:, :-1])).all()
    at = centres[..., 0] * energy.shape[3] + centres[..., 1]
    there = energy.flatten(2).gather(2, at[..., None])[..., 0]
    assert ((there == high) | ~(high > low)).all()


@pytest.mark.parametrize("size, ratio", [(8, 0.75), (14, 0.5), (14, 0.75), (14, 0.9)])
def test_mgm_by_default_shows_every_position_to_somebody(size, ratio):
    anywhere = torch.eye(size**2).view(-1, 1, size, size).repeat(16, 1, 1, 1)
    assert not mgm_mask(anywhere, ratio, torch.Generator().manual_seed(0)).volume().all(0).any()


@examples
@given(energies(), ratios, st.floats(0.01, 1), seeds)
def test_running_cell(energy, ratio, share, seed):
    mask = make_mask("tube", energy, ratio, torch.Generator().manual_seed(seed))
    chosen = running_cell(mask, share, torch.Generator().manual_seed(seed))
    assert chosen.shape == (len(energy), int(share * mask.hidden.shape[1]))
    assert (chosen.diff(dim=1) > 0).all()
    assert mask.volume().flatten(1).gather(1, chosen).all()


@maskings
def test_never_waits_for_the_device(name):
    "A meta tensor has no values: whoever asks for one (`.item()`, `nonzero`, boolean indexing) fails"
    energy = torch.empty(64, 8, 14, 14, device="meta")
    mask = make_mask(name, energy, 0.75, velocity=still(energy))
    assert mask.visible.shape == (64, 392) and running_cell(mask).shape == (64, 588)


@pytest.mark.parametrize("size", [(1024, 8, 14, 14), (1, 16, 14, 14), (2, 4, 24, 40)], ids=str)
@maskings
def test_sizes(name, size):
    energy = torch.rand(size)
    check(make_mask(name, energy, 0.75, velocity=still(energy)), energy, 0.75)


@maskings
def test_beside_a_compiled_model(name):
    "A compiled function takes the mask whole, with no break in its graph"
    def model(tokens, mask):
        return tokens.gather(1, mask.visible[..., None].expand(-1, -1, tokens.shape[2])).mean() + mask.grid[0]

    energy, tokens = torch.rand(2, 4, 6, 6), torch.rand(2, 4 * 6 * 6, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        mask = make_mask(name, energy, 0.75, torch.Generator().manual_seed(seed), velocity=still(energy))
        torch.testing.assert_close(compiled(tokens, mask), model(tokens, mask))


@maskings
def test_inside_a_compiled_model(name):
    "With the draws made outside, the masking itself compiles too"
    energy = torch.rand(2, 4, 6, 6)
    velocity, draws = still(energy, 0.5), draw(energy, torch.Generator().manual_seed(0))
    masking = torch.compile(make_mask, fullgraph=True, backend="eager")
    compiled, plain = (function(name, energy, 0.75, draws, velocity) for function in (masking, make_mask))
    assert compiled.hidden.equal(plain.hidden) and compiled.visible.equal(plain.visible)


@maskings
def test_autocast_changes_nothing(name):
    energy, velocity = torch.rand(2, 4, 7, 7), torch.randn(2, 4, 7, 7, 2)
    draws = draw(energy)
    plain = make_mask(name, energy, 0.75, draws, velocity)
    with torch.autocast("cpu", torch.bfloat16): cast = make_mask(name, energy, 0.75, draws, velocity)
    assert cast.hidden.equal(plain.hidden)


@maskings
@pytest.mark.parametrize("ratio", [-0.1, 1, 1.2, float("nan")])
def test_no_such_ratio(name, ratio):
    with pytest.raises(ValueError, match="^ratio must be at least 0 and less than 1, got"):
        make_mask(name, torch.rand(1, 2, 4, 4), ratio, velocity=torch.rand(1, 2, 4, 4, 2))


@pytest.mark.parametrize(
    "setting, config, share",
    [({}, {}, 0.95), (dict(noise=8), {}, 0.95), (dict(pan=3), dict(compensate="translation"), 0.85)],
    ids=["still", "noise", "pan"],
)  # fmt: skip
def test_mgm_sits_on_what_moves(tmp_path, setting, config, share):
    "The centre is in the object's box, dilated by one token; all vectors come from the encoded file"
    hits = []
    for i, scene in enumerate(sprite_scenes(12, seed=2, size=224, **setting)):
        known = render(scene)
        path = write_video(tmp_path / f"{i}.mp4", known.frames, options=MOTION_PRESET)
        clip = read_clip(path, stride=1, pixels=False)
        energy = torch.from_numpy(motion_field(clip, MotionConfig(**config)).to_tokens((8, 14, 14), keep=clip.keep)[0])
        at = mgm_centres(energy[None], torch.Generator().manual_seed(i))[0]  # row, column
        low, high = torch.from_numpy(known.boxes / 16).view(8, 2, 2, 2).flip(-1).unbind(2)  # y, x of either frame
        inside = (at[:, None] + 2 > low) & (at[:, None] - 1 < high)
        hits += inside.all(-1).any(1).tolist()
    assert sum(hits) >= share * len(hits)


def test_mgm_hides_motion_in_every_real_clip():
    folder = os.environ.get("MGM_VIDEOS")
    if not folder: pytest.skip("MGM_VIDEOS, a folder of videos, is not set")
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix in (".mp4", ".mkv", ".264"))
    assert paths
    for path in paths:
        last = probe(path).frames - 61
        clips = [read_clip(path, start=max(0, i * last // 4), pixels=False) for i in range(5)]
        energy = [motion_field(clip, MotionConfig()).to_tokens((8, 14, 14), keep=clip.keep)[0] for clip in clips]
        energy = torch.stack([torch.from_numpy(e) for e in energy]).repeat(16, 1, 1, 1)
        assert energy.nansum() > 0, path.name
        draws = draw(energy, torch.Generator().manual_seed(0))
        motion = {n: describe(make_mask(n, energy, 0.75, draws), energy)["motion"] for n in ("mgm", "tube", "random")}
        assert motion["mgm"] > max(motion["tube"], motion["random"]) + 0.03, path.name
