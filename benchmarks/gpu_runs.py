"""Sections of gpu.py about whole runs: NCCL, batch norm over processes, float16, kill and resume; the loader."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpu_speed import Context
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mobilevit.benchmark.rivals import randomize
from mobilevit.data.loader import ImageDataset, load
from mobilevit.data.sampler import BatchShapes, EpochBatches
from mobilevit.data.sources import find_splits
from mobilevit.data.transforms import Augmentation
from mobilevit.device import choose_device
from mobilevit.images import simplejpeg
from mobilevit.models.mobilevit import MobileViT
from mobilevit.recipes import RECIPES, Compute, Precision, Recipe
from mobilevit.training.distributed import Processes
from mobilevit.training.loop import train
from mobilevit.weights import read

SCRIPT = Path(__file__).with_name("gpu.py")
KILL_SECONDS = 60  # for a child process to reach its first checkpoint in the middle of an epoch


def recipe(precision: Precision, is_quick: bool) -> Recipe:
    """A run of seconds: on a GPU, results are read every ten steps, so an epoch needs more than that."""
    base = RECIPES["tiny"]
    return replace(
        base,
        epochs=1 if is_quick else 2,
        batch_size=4 if is_quick else 8,
        data=replace(base.data, size_px=32 if is_quick else 64),
        compute=Compute(precision=precision),
    )


def write_squares(folder: Path, num: int) -> None:
    """Two classes of noisy images, 64 px, with a bright left or right half; `num` for training."""
    random = np.random.default_rng(0)
    for split, count in (("train", num), ("val", 16)):
        for i in range(count):
            pixels = random.integers(0, 128, (64, 64, 3), dtype=np.uint8)
            pixels[:, 32 * (i % 2) : 32 * (i % 2) + 32] += 90
            file = folder / split / ("left", "right")[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def train_child(data: str, out: str, device: str, precision: Precision, is_quick: bool) -> None:
    """The process that `runs` kills: saves a checkpoint whenever results are read."""
    train(recipe(precision, is_quick), data, out, device=device, checkpoint_minutes=1e-6)


def runs(context: Context) -> None:
    """Training through the package: a killed and resumed run, float16 with loss scaling, one NCCL process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, device = Path(temporary), str(context.device)
        write_squares(folder / "data", 24 if context.is_quick else 256)
        logging.getLogger("mobilevit").setLevel(logging.WARNING)
        with context.item("collectives"):
            run_collectives(context, folder)
        for is_deterministic in (False, True):
            name = f"killed and resumed run, {'deterministic' if is_deterministic else 'default'} kernels"
            if (is_deterministic and context.needs_cuda(name)) or not context.has_time(name):
                continue
            with context.item(name):
                torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
                compare_resumed(context, folder, name, is_deterministic)
        torch.use_deterministic_algorithms(False)
        losses = {}
        precisions: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
        for precision in precisions:
            name = f"training in {precision}"
            if (precision == "float16" and context.needs_cuda(name)) or not context.has_time(name):
                continue
            with context.item(name):
                result = train(
                    recipe(precision, context.is_quick), folder / "data", folder / precision, device=device
                ).epochs[-1]
                losses[precision] = result["train_loss"]
                context.row(
                    check=name,
                    passed=abs(losses[precision] - losses["float32"]) < 0.2,
                    figures=f"loss {result['train_loss']:.4f}, top-1 {result['val_top1']:.0f} %",
                )


def compare_resumed(context: Context, folder: Path, name: str, is_deterministic: bool) -> None:
    """Compare the weights of a run with those of one that is killed after a checkpoint and resumed."""
    data, device, precision = folder / "data", str(context.device), "bfloat16" if context.is_cuda else "float32"
    whole, resumed = (folder / f"{kind} {is_deterministic}" for kind in ("whole", "resumed"))
    options = [str(data), str(resumed), device, precision, *(["quick"] if context.is_quick else [])]
    log = folder / "child.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--task", "deterministic" if is_deterministic else "train", *options],
            stdout=output,
            stderr=output,
        )
    try:
        started = time.monotonic()
        while not list(resumed.glob("checkpoints/*.pt")):
            if child.poll() is not None or time.monotonic() - started > KILL_SECONDS * (10 if context.is_quick else 1):
                raise RuntimeError(f"no checkpoint to kill the run after:\n{log.read_text()[-2000:]}")
            time.sleep(0.002)
    finally:
        child.kill()
        child.wait()
    num_steps = max(int(file.stem) for file in resumed.glob("checkpoints/*.pt"))
    is_interrupted = not (resumed / "report.html").exists()
    for out in (whole, resumed):
        train(recipe(precision, context.is_quick), data, out, device=device, checkpoint_minutes=1e-6)
    ours, theirs = (read(out / "raw.safetensors").tensors for out in (whole, resumed))
    difference = max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in ours)
    is_equal = all(torch.equal(ours[key], theirs[key]) for key in ours)
    context.row(
        check=name,
        passed=is_equal and is_interrupted,
        figures=f"killed after step {num_steps}{'' if is_interrupted else ', TOO LATE'}; largest difference of a "
        f"weight {difference:.2g}",
    )


def run_collectives(context: Context, folder: Path) -> None:
    """Start one process with torchrun and record what it finds."""
    found = folder / "collectives.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(SCRIPT)]
    done = subprocess.run(
        [*command, "--task", "collectives", str(found), context.device.type],
        capture_output=True,
        text=True,
        timeout=600 if context.is_quick else 60,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    for check, (passed, figures) in json.loads(found.read_text()).items():
        context.row(check=check, passed=passed, figures=figures)


def collectives_child(out: str, device_type: str) -> None:
    """The collectives of the package, and a step of DDP with synchronized batch norm, in a group of one process.

    Two processes cannot share a card with NCCL. So this shows that the calls work, not that they scale, and PyTorch's
    synchronized batch norm exchanges no statistics in a group of one.
    """
    device = torch.device(choose_device(device_type))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    results: dict[str, tuple[bool, str]] = {}
    # A group of one, in which the package would leave out the messages: called as if there were a second process.
    processes = Processes(0, 2, device)
    tensors = [torch.full((3,), 2.0, device=device), torch.ones(2, 2, device=device)]
    processes.sum(tensors)
    summed = [tensor.mean().item() for tensor in tensors]
    results[f"{backend}: all_reduce, broadcast of objects"] = (
        summed == [2.0, 1.0] and processes.from_rank_0(lambda: "value") == "value",
        f"sums {summed}",
    )
    gathered: list[object] = [None]
    dist.all_gather_object(gathered, {"rank": 0})
    results[f"{backend}: all_gather of objects"] = gathered == [{"rank": 0}], str(gathered)
    images, labels = torch.rand(8, 3, 64, 64, device=device), torch.arange(8, device=device) % 3

    def gradients(model: nn.Module) -> torch.Tensor:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        F.cross_entropy(model(images), labels).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.backends.cudnn.allow_tf32 = False  # batch statistics of few images enlarge rounding errors

    def build() -> nn.Module:
        return randomize(MobileViT("xxs", num_classes=3), seed=0).to(device).train()

    expected = gradients(build())
    networks = {f"{backend}: DDP": build()}
    if device.type == "cuda":
        networks[f"{backend}: DDP with synchronized batch norm"] = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    for name, network in networks.items():
        found = gradients(DistributedDataParallel(network, broadcast_buffers=False))
        difference = float((found - expected).norm() / expected.norm())
        results[name] = difference < 0.01, f"relative difference of the gradients {difference:.1e}"
    Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def loader(context: Context) -> None:
    """Images per second of the loader per core, and the number of cores that training needs."""
    from loading import cpu_seconds, write_images

    px, num, batch = context.size_px, 16 if context.is_quick else 512, 8 if context.is_quick else 64
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        num_bytes = write_images(Path(temporary), 500, num)
        decoder = "simplejpeg" if simplejpeg else "Pillow (simplejpeg, the extra `fast`, is missing)"
        context.note(f"JPEG files of 500 x 375 px, {num_bytes / 1e3:.0f} kB, decoded by {decoder}; {num_cores} cores")
        source, _ = find_splits("classify", Path(temporary), 0.5)
        dataset = ImageDataset(source, Augmentation(min_scale=0.08, flip=True, seed=0))
        per_core = 0.0
        for num_workers in dict.fromkeys((0, 2) if context.is_quick else (0, 1, 4, num_cores)):
            name = f"{num_workers} workers"
            if not context.has_time(name, 0 if context.is_quick else 8):
                continue
            with context.item(name):
                num_epochs = 1 if context.is_quick else max(1, 2 * num_workers)
                epochs = [EpochBatches(num, BatchShapes((px,), batch, px), epoch=epoch) for epoch in range(num_epochs)]
                batches = [picks for epoch in epochs for picks in epoch]
                cpu, started = cpu_seconds(), time.perf_counter()
                count = 0
                for one in load(dataset, batches, num_workers=num_workers, device=str(context.device)):
                    count += len(one.indices)
                if context.is_cuda:
                    torch.cuda.synchronize()
                seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
                per_core = per_core or count / cpu
                context.row(
                    workers=num_workers,
                    images_per_second=count / seconds,
                    images_per_cpu_second=count / cpu,
                    images=count,
                )
        for row in context.previous.get("training", []):
            if per_core and row["model"] == "mobilevit":
                cores = row["images_per_second"] / per_core
                context.note(
                    f"{row['network']} {row['mode']}: {row['images_per_second']:,.0f} images/s need {cores:.1f} cores"
                )
