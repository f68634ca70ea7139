"""Eager inference on the CPU: our MobileViT, timm's and transformers', with the same weights, timed interleaved.

    python benchmarks/eager.py --out benchmarks/eager_<hardware>_<yyyymm>

The result is the ratio of two times of the same round, see `mobilevit.benchmark.timing.measure`. timm is timed in both
memory layouts: NCHW, its default, and NHWC (channels last). MobileNetv2, with its own weights, is a reference point.

"mobilevit" is the model as it is. In "mobilevit, folded", the batch norms are folded into the convolutions, which would
also be possible for the other models.

glibc returns large freed blocks to the system, so the next forward pass pays for new pages. The cost depends on what
ran before in the process, and favors the model with the fewest temporary tensors, which is ours. Therefore the process
keeps freed memory, for all models. --no-keep-memory leaves the allocator at its default.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
import transformers
from memory import keep_freed_memory
from results import print_table, write_results
from torch import Tensor

from mobilevit.benchmark.rivals import randomize
from mobilevit.benchmark.timing import Spread, machine, measure
from mobilevit.models.fuse import fold_batch_norm
from mobilevit.models.mobilevit import MobileViT
from mobilevit.weights import Weights, write

OURS = "mobilevit"
COLUMNS = ("size", "batch", "model", "time / ours", "p10", "p90", "p10, ms")
NOTE = (
    "'time / ours' is the time of a model divided by that of our model: above 1, ours is faster. It is the "
    "median over the rounds, in which the models are timed interleaved; p10 and p90 are its percentiles. The "
    "last column is the 10th percentile of the time."
)
Model = Callable[[Tensor], Tensor]


def build_models(size: str, seed: int) -> dict[str, Model]:
    """The timed models by name: contiguous RGB images (B, 3, H, W) -> logits."""
    ours = randomize(MobileViT(size), seed)
    with tempfile.TemporaryDirectory() as folder:
        weights = Weights(ours.architecture, ours.state_dict())
        timm_file, transformers_folder = Path(folder) / "timm.safetensors", Path(folder) / "transformers"
        write(weights, timm_file, "timm")
        write(weights, transformers_folder, "transformers")
        timm_contiguous, timm_last = (
            timm.create_model(f"mobilevit_{size}", checkpoint_path=str(timm_file)).eval() for _ in range(2)
        )
        huggingface = transformers.MobileViTForImageClassification.from_pretrained(transformers_folder).eval()
    timm_last.to(memory_format=torch.channels_last)
    mobilenet = randomize(torchvision.models.mobilenet_v2(), seed).to(memory_format=torch.channels_last)
    return {
        OURS: ours,
        "mobilevit, folded": fold_batch_norm(ours),
        "timm, NCHW": timm_contiguous,
        "timm, NHWC": timm_last,
        "transformers": lambda x: huggingface(x).logits,
        "MobileNetv2, NHWC": mobilenet,
    }


def prepare(models: dict[str, Model], images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Bind every model to its input, in the layout and channel order it expects; this is not timed."""
    inputs = dict.fromkeys(models, images)
    for name in models:
        if name.endswith("NHWC"):
            inputs[name] = images.contiguous(memory_format=torch.channels_last)
    inputs["transformers"] = images[:, [2, 1, 0]]  # BGR
    return {name: partial(model, inputs[name]) for name, model in models.items()}


def check_agreement(runs: dict[str, Callable[[], Tensor]]) -> float:
    """The largest difference from our logits, in standard deviations of the logits."""
    logits = {name: run() for name, run in runs.items() if not name.startswith("MobileNet")}
    difference = max((logits[OURS] - other).abs().max() for other in logits.values()) / logits[OURS].std()
    assert difference < 1e-4, f"the models differ by {difference:.1e} of the logits' standard deviation"
    return float(difference)


def cells(row: dict) -> tuple[str, ...]:
    """One line of the table."""
    ratios = (f"{row[key]:.2f}" for key in ("ratio_median", "ratio_p10", "ratio_p90"))
    return row["size"], str(row["batch"]), row["model"], *ratios, f"{row['time_p10_ms']:.1f}"


def main(
    sizes: tuple[str, ...] = ("xxs", "xs", "s"),
    batches: tuple[int, ...] = (1, 16),
    rounds: tuple[int, ...] = (40, 15),
    size_px: int = 256,
    threads: int = 2,
    seed: int = 0,
    keep_memory: bool = True,
    out: Path | None = None,
) -> None:
    """Time MobileViT of this library, timm and transformers on the CPU, float32.

    Args:
        sizes: published sizes of MobileViT.
        batches: batch sizes.
        rounds: rounds for each batch size, or one number for all.
        size_px: image size in pixels.
        threads: CPU threads.
        seed: of weights and images.
        keep_memory: keep freed memory (glibc only); see the top of the file.
        out: write OUT.md and OUT.json.
    """
    if len(rounds) not in (1, len(batches)):
        raise SystemExit(f"--rounds has {len(rounds)} numbers; give one, or one for each of {len(batches)} batch sizes")
    setting = machine(threads)
    kept = keep_memory and keep_freed_memory()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for size in sizes:
        models = build_models(size, seed)
        for batch, num_rounds in zip(batches, rounds * (len(batches) // len(rounds)), strict=True):
            images = torch.rand(batch, 3, size_px, size_px, generator=torch.Generator().manual_seed(seed))
            with torch.inference_mode():
                runs = prepare(models, images)
                difference = check_agreement(runs)
                times_ms = dict(zip(runs, measure(list(runs.values()), num_rounds, pause_seconds=0), strict=True))
            for name, times in times_ms.items():
                ratio = Spread.of(times / times_ms[OURS])
                rows.append(
                    {
                        "size": size,
                        "batch": batch,
                        "model": name,
                        "num_rounds": num_rounds,
                        "ratio_median": round(ratio.median, 4),
                        "ratio_p10": round(ratio.p10, 4),
                        "ratio_p90": round(ratio.p90, 4),
                        "time_p10_ms": round(Spread.of(times).p10, 3),
                        "logit_difference": difference,
                    }
                )
    options = {"freed_memory_kept": kept, "size_px": size_px, "seed": seed}
    title = f"Eager inference, float32, {size_px} px, {threads} threads"
    print_table(title, NOTE, COLUMNS, map(cells, rows))
    result = json.dumps({"benchmark": "eager", **vars(setting), **options, "rows": rows})
    if out:
        facts = f"{setting.describe()}; {'the allocator keeps freed memory' if kept else 'default allocator'}"
        write_results(out, title, facts, NOTE, COLUMNS, map(cells, rows), result)
    print(result)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
