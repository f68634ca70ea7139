"""Time of a training step compared with timm: forward, backward, AdamW; same initial weights, one interleaved run.

    python benchmarks/training.py --out benchmarks/training_<hardware>_<yyyymm>
    python benchmarks/training.py --device cuda --models xxs xs s --sizes 256 --batches 128 --dtype bfloat16 --compile

As in eager.py, the models are interleaved: every round times every model once, and the result is the ratio of two times
of the same round. The models:

- "mobilevit": with the published dropout in the transformers and before the classifier.
- "timm, NCHW": timm's default, without dropout, which is less work; "timm, NHWC": model and images in channels-last
  layout; "timm, NCHW, same dropout": with the dropout of ours.
- "mobilevit, per-tensor AdamW" and "timm, NCHW, per-tensor AdamW": PyTorch's default optimizer on the CPU. All others
  use the fused one, as `mobilevit train` does.

Before the timing, losses and gradients of all models must agree without dropout. The docstring of eager.py explains why
freed memory is kept.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from memory import keep_freed_memory
from results import print_table, write_results
from torch import Tensor, nn

from mobilevit.benchmark.timing import Spread, machine, measure
from mobilevit.models.mobilevit import MobileViT, TransformerLayer
from mobilevit.weights import Weights, write

OURS = "mobilevit"
COLUMNS = ("size", "px", "batch", "model", "time / ours", "p10", "p90", "p10, ms", "images / s")
NOTE = (
    "'time / ours' is the time of a model divided by that of our model: above 1, ours is faster. It is the "
    "median over the rounds, in which the models are timed interleaved; p10 and p90 are its percentiles. The "
    "last columns are the 10th percentile of the time of a step, and the corresponding images per second."
)


def timm_with_dropout(model: nn.Module, ours: MobileViT) -> nn.Module:
    """Give timm's network the dropout of ours, in the same places."""
    layer = next(m for m in ours.modules() if isinstance(m, TransformerLayer))
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            if name.endswith(("attn.proj_drop", "mlp.drop2")):
                module.p = layer.dropout.p
            elif name == "head.drop":
                module.p = ours.dropout.p
    return model


def build_models(name: str, num_classes: int, device: str) -> dict[str, nn.Module]:
    """The models by title, ours first, with the same initial weights."""
    ours = MobileViT(name, num_classes=num_classes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "timm.safetensors"
        write(Weights(ours.architecture, ours.state_dict()), file, "timm")

        def theirs() -> nn.Module:
            return timm.create_model(f"mobilevit_{name}", num_classes=num_classes, checkpoint_path=str(file))

        models = {
            OURS: ours,
            "timm, NCHW": theirs(),
            "timm, NHWC": theirs().to(memory_format=torch.channels_last),
            "timm, NCHW, same dropout": timm_with_dropout(theirs(), ours),
        }
        if device == "cpu":
            models["mobilevit, per-tensor AdamW"] = copy.deepcopy(ours)
            models["timm, NCHW, per-tensor AdamW"] = theirs()
    return {title: model.to(device).train() for title, model in models.items()}


def check_agreement(models: dict[str, nn.Module], images: Tensor, labels: Tensor, limit: float = 1e-3) -> float:
    """The largest relative difference of loss and gradient norm from ours, without dropout; at most `limit`."""
    found = {}
    for title, model in models.items():
        dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        statistics = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
        for dropout in dropouts:
            dropout.eval()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found[title] = loss.item(), torch.nn.utils.get_total_norm(gradients).item()
        for dropout in dropouts:
            dropout.train()
        model.load_state_dict(statistics, strict=False)
        model.zero_grad()
    difference = max(abs(a / b - 1) for values in found.values() for a, b in zip(values, found[OURS], strict=True))
    assert difference < limit, f"the models disagree: {found}"
    return difference


def build_step(
    title: str, model: nn.Module, images: Tensor, labels: Tensor, autocast: bool, run: Callable[[Tensor], Tensor]
) -> Callable[[], None]:
    """A training step of `model` that waits for the device. `run` is the model, possibly compiled."""
    if title.endswith("NHWC"):
        images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused="per-tensor" not in title)
    device = images.device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def cells(row: dict) -> tuple[str, ...]:
    """One line of the printed table."""
    setting = row["size"], str(row["size_px"]), str(row["batch"]), row["model"]
    ratios = (f"{row[key]:.2f}" for key in ("ratio_median", "ratio_p10", "ratio_p90"))
    return *setting, *ratios, f"{row['time_p10_ms']:.1f}", f"{row['images_per_s']:.0f}"


def main(
    models: tuple[str, ...] = ("xxs",),
    sizes: tuple[int, ...] = (64, 64, 256),
    batches: tuple[int, ...] = (32, 128, 16),
    rounds: tuple[int, ...] = (60, 20, 16),
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    compile: bool = False,
    num_classes: int = 10,
    threads: int = 1,
    seed: int = 0,
    keep_memory: bool = True,
    out: Path | None = None,
) -> None:
    """Time training steps of our network and of timm's.

    Args:
        models: the published sizes to time.
        sizes: input sizes in pixels.
        batches: batch size for each of the sizes, or one for all.
        rounds: number of rounds for each of the sizes, or one for all.
        device: where to train.
        dtype: bfloat16 is autocast over float32 weights.
        compile: compile all models with torch.compile.
        num_classes: of the classifier.
        threads: of the CPU.
        seed: of weights and images.
        keep_memory: let the allocator keep freed memory (glibc only); see the top of eager.py.
        out: write OUT.md and OUT.json.
    """
    for option, values in (("batches", batches), ("rounds", rounds)):
        if len(values) not in (1, len(sizes)):
            raise SystemExit(f"--{option} has {len(values)} numbers; give one, or one for each of {len(sizes)} sizes")
    setting = machine(threads)
    device_name = torch.cuda.get_device_name() if device == "cuda" else setting.processor
    kept = device == "cpu" and keep_memory and keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rows = []
    for name in models:
        for size, batch, num_rounds in zip(
            sizes, batches * (len(sizes) // len(batches)), rounds * (len(sizes) // len(rounds)), strict=True
        ):
            networks = build_models(name, num_classes, device)
            images = torch.rand(batch, 3, size, size).to(device)
            labels = torch.randint(0, num_classes, (batch,)).to(device)
            difference = check_agreement(networks, images, labels)
            torch.compiler.reset()
            steps = [
                build_step(
                    title, network, images, labels, dtype == "bfloat16", torch.compile(network) if compile else network
                )
                for title, network in networks.items()
            ]
            times_ms = measure(steps, num_rounds, pause_seconds=0)
            for title, model_ms in zip(networks, times_ms, strict=True):
                ratio, time_p10_ms = Spread.of(model_ms / times_ms[0]), np.percentile(model_ms, 10)
                rows.append(
                    {
                        "size": name,
                        "size_px": size,
                        "batch": batch,
                        "model": title,
                        "num_rounds": num_rounds,
                        "ratio_median": round(ratio.median, 4),
                        "ratio_p10": round(ratio.p10, 4),
                        "ratio_p90": round(ratio.p90, 4),
                        "time_p10_ms": round(time_p10_ms, 3),
                        "images_per_s": round(1e3 * batch / time_p10_ms, 1),
                        "gradient_difference": difference,
                    }
                )
    options = {"device": device_name, "dtype": dtype, "compile": compile, "freed_memory_kept": kept}
    result = json.dumps(
        {"benchmark": "training", **vars(setting), **options, "num_classes": num_classes, "seed": seed, "rows": rows}
    )
    title = f"Training, {dtype}, {'compiled' if compile else 'eager'}"
    title += f", {threads} thread{'s' * (threads > 1)}" if device == "cpu" else f", {device_name}"
    print_table(title, NOTE, COLUMNS, map(cells, rows))
    if out:
        facts = setting.describe()
        if device == "cpu":
            facts += f"; {'the allocator keeps freed memory' if kept else 'default allocator'}"
        write_results(out, title, facts, NOTE, COLUMNS, map(cells, rows), result)
    print(result)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
