"""Training steps a second: forward, backward and optimiser, ours beside Hugging Face's and the official code's.

All start from the same weights, clips and masks, and their first losses must agree. Rounds are interleaved, so that a
busy machine slows all alike; on a CPU the process's own time is counted. Ours starts from bytes, the others from
floats that are already normalised and in place.

    python benchmarks/step.py --sizes small base large --ratios 0.75 0.9 --compile --official ~/VideoMAE --json
    python benchmarks/step.py --device cpu --sizes small --batch 1 --official ~/VideoMAE
"""
import argparse
import contextlib
import gc
import io
import json
import statistics
import sys
import time
import types
from functools import partial

import torch
from torch import nn

from mgm_nb.checkpoints import to_huggingface, to_official
from mgm_nb.masking import running_cell, tube_mask
from mgm_nb.videomae import create_model, normalize, step_flops

LR = 1e-4


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.05, **options)


def our_step(model, pixels, mask, predict, precision, compiled):
    "A step as `pretrain` makes it"
    optimiser = adamw(model, fused=True)

    def forward():
        with precision(): return model(normalize(pixels), mask, predict=predict).loss

    forward = torch.compile(forward, fullgraph=True) if compiled else forward

    def step():
        loss = forward()
        loss.backward(), optimiser.step(), optimiser.zero_grad()
        return loss

    return step


def hf_step(model, pixels, mask, precision):
    "Hugging Face's model in the same loop, with SDPA"
    import transformers

    state, config = to_huggingface(model)
    config = transformers.VideoMAEConfig(**config, attn_implementation="sdpa")
    peer = transformers.VideoMAEForPreTraining(config).to(pixels.device).train()
    peer.load_state_dict(state)
    optimiser, video, hidden = adamw(peer, fused=True), normalize(pixels).contiguous(), mask.volume().flatten(1)

    def step():
        with precision(): loss = peer(video, bool_masked_pos=hidden).loss
        loss.backward(), optimiser.step(), optimiser.zero_grad()
        return loss

    return step


class PlainScaler:
    "Their loss scaler's interface without CUDA"

    def __call__(self, loss, optimizer, **_): loss.backward(), optimizer.step()
    def state_dict(self): return {"scale": 1.0}


def import_official(path):
    "Their modules, on today's PyTorch: what has left it, and logging, are stubs"
    import timm.layers
    import timm.models

    stubs = {
        "torch._six": dict(inf=float("inf")), "tensorboardX": dict(SummaryWriter=object),
        "timm.models.registry": dict(register_model=lambda f: f),
        "timm.models.layers": {n: getattr(timm.layers, n) for n in ("drop_path", "to_2tuple", "trunc_normal_")},
    }
    for name, members in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    if not torch.cuda.is_available(): torch.cuda.synchronize = lambda: None
    sys.path.insert(0, path)
    import engine_for_pretraining
    import modeling_pretrain
    import utils

    return modeling_pretrain, engine_for_pretraining, utils


def official_step(path, model, pixels, mask):
    "Their own training loop, one batch at a time: fp16 and loss scaling on a GPU, as their recipe says"
    modeling, engine, utils = import_official(path)
    c = model.config()
    peer = modeling.PretrainVisionTransformer(
        img_size=c["img_size"], patch_size=c["patch"], encoder_embed_dim=c["dim"], encoder_depth=c["depth"],
        encoder_num_heads=c["heads"], decoder_num_classes=model.decoder.head.out_features,
        decoder_embed_dim=c["decoder_dim"], decoder_depth=c["decoder_depth"], decoder_num_heads=c["decoder_heads"],
        qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).to(pixels.device)
    peer.load_state_dict(to_official(model)["model"])
    video = normalize(pixels).transpose(1, 2).contiguous()
    # their data loader hands over clips in host memory; here they are in place already, in their favour
    batch, optimiser = (video, mask.volume()), adamw(peer)
    scaler = utils.NativeScalerWithGradNormCount() if video.is_cuda else PlainScaler()

    def step():
        with contextlib.redirect_stdout(io.StringIO()):
            log = engine.train_one_epoch(
                peer, [batch], optimiser, video.device, 0, scaler, patch_size=c["patch"], start_steps=0,
            )
        return torch.tensor(log["loss"])

    return step


def matmul_flops(device, precision, n=8192):
    "The best matrix throughput this machine shows, FLOP/s"
    n = n if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    with precision():
        if torch.is_autocast_enabled(device.type): a, b = (x.to(torch.get_autocast_dtype(device.type)) for x in (a, b))
        times = [timed(lambda: a @ b, device, 10) for _ in range(8)]
    return 2 * n**3 / min(times)


def timed(step, device, steps=1):
    "Seconds a step: wall time on a GPU, the process's own time on a CPU"
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda": torch.cuda.synchronize()
    start = clock()
    for _ in range(steps): step()
    if device.type == "cuda": torch.cuda.synchronize()
    return (clock() - start) / steps


def peak_memory(step, device):
    "GiB that two steps need, with whatever is there already"
    if device.type != "cuda": return None
    torch.cuda.reset_peak_memory_stats()
    step(), step()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(size, ratio, args, device, precision):
    "One row of the table for each contender"
    options = dict(positions="sinusoid", img_size=args.img_size, frames=args.frames)
    torch.manual_seed(0)
    model = create_model(size, **{k: v for k, v in options.items() if v}).to(device)
    frames, channels, height, width = model.encoder.video_shape
    pixels = torch.randint(0, 256, (args.batch, frames, height, width, channels), dtype=torch.uint8, device=device)
    mask = tube_mask(torch.zeros(args.batch, *model.grid, device=device), ratio)
    half = running_cell(mask, 0.5)

    def fresh():  # everybody trains weights of his own
        twin = create_model(size, **model.config()).to(device)
        twin.load_state_dict(model.state_dict())
        return twin

    makers = {"ours": lambda: our_step(fresh(), pixels, mask, None, precision, False),
              "ours, half decoded": lambda: our_step(fresh(), pixels, mask, half, precision, False)}
    if args.compile: makers |= {
        "ours, compiled": lambda: our_step(fresh(), pixels, mask, None, precision, True),
        "ours, compiled, half decoded": lambda: our_step(fresh(), pixels, mask, half, precision, True)}
    makers["transformers"] = lambda: hf_step(model, pixels, mask, precision)
    if args.official: makers["official"] = lambda: official_step(args.official, model, pixels, mask)

    steps, memory, losses, skipped = {}, {}, {}, {}
    for name, make in makers.items():
        gc.collect(), torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0
        try:
            step = make()
            losses[name] = step().item()
            peak = peak_memory(step, device)
        except torch.OutOfMemoryError:
            skipped[name] = "out of memory"
            continue
        steps[name], memory[name] = step, peak and peak - before
    tolerance = 0.02 if precision.keywords["enabled"] else 1e-4
    for name, loss in losses.items():  # the same work
        if "half" not in name: assert abs(loss / losses["ours"] - 1) < tolerance, (name, losses)

    times = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items(): times[name].append(timed(step, device, args.steps))
    best, peers = matmul_flops(device, precision), ("transformers", "official")
    for name in steps:
        predicted = half if "half" in name else mask.hidden
        flops = step_flops(model, mask.visible.shape[1], predicted.shape[1])["step"]
        rate = args.batch / statistics.median(times[name])
        yield dict(
            size=size, ratio=ratio, contender=name, clips_s=rate, mfu=rate * flops / best, memory_gib=memory[name],
            matmul_tflops=best / 1e12, loss=losses[name],
            **{f"over_{p}": statistics.median(b / a for a, b in zip(times[name], times[p], strict=True))
               for p in peers if p in times and name != p},
        )
    for name, why in skipped.items(): yield dict(size=size, ratio=ratio, contender=name, skipped=why)


def profile(size, ratio, args, device, precision):
    "What takes the time of our step"
    model = create_model(size).to(device)
    frames, channels, height, width = model.encoder.video_shape
    pixels = torch.randint(0, 256, (args.batch, frames, height, width, channels), dtype=torch.uint8, device=device)
    mask = tube_mask(torch.zeros(args.batch, *model.grid, device=device), ratio)
    step = our_step(model, pixels, mask, None, precision, args.compile)
    step(), step()
    with torch.profiler.profile() as p: step()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(p.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=["base"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--img-size", type=int, help="other than the size's own")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in each round")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="time the compiled step, too")
    parser.add_argument("--official", metavar="PATH", help="a checkout of MCG-NJU/VideoMAE")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--profile", action="store_true", help="say where the time goes, and do nothing else")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    half = args.precision == "bf16" or (args.precision is None and device.type == "cuda")
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=half)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"{name}, torch {torch.__version__}, {'bf16' if half else 'fp32'}, batch {args.batch}")
    rows = []
    for size in args.sizes:
        for ratio in args.ratios:
            if args.profile: profile(size, ratio, args, device, precision)
            else:
                for row in measure(size, ratio, args, device, precision):
                    rows.append(row)
                    line = (f"{k}={v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items() if v is not None)
                    print("  ".join(line), flush=True)
    if args.json: print(json.dumps(dict(device=name, torch=torch.__version__, bf16=half, batch=args.batch, rows=rows)))


if __name__ == "__main__":
    main()
