"""Quantization-aware fine-tuning against post-training quantization, measured with the artifacts of the runtimes.

    python examples/stamps.py stamps && mobilevit train small --data stamps/crops --out runs/crops --size 96 ...
    python benchmarks/quantization_aware.py runs/crops/model.safetensors stamps/crops --out runs/quantization_aware

The classifier is exported to int8 in three states: as it is, after a float fine-tuning, and after a quantization-aware
fine-tuning with the same steps. The second state is the control: the training itself changes the accuracy, too. Each
artifact is run by its runtime on the validation images. Stopped and called again, the script resumes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from results import markdown_table
from torch import nn

from mobilevit.data.loader import load
from mobilevit.data.python_data import to_data
from mobilevit.data.sampler import eval_batches
from mobilevit.defaults import NUM_CALIBRATION_IMAGES
from mobilevit.export.artifact import ArtifactSpec, artifact_input, build_export_model, evenly_spaced, metadata_of
from mobilevit.export.backend import find_backend
from mobilevit.export.predictor import load_predictor
from mobilevit.export_options import ARTIFACT_SUFFIXES
from mobilevit.recipes import Compute, Optimizer, Recipe
from mobilevit.recipes import Data as DataOptions
from mobilevit.tasks.classification import Classification, ClassificationResults
from mobilevit.training.loop import train
from mobilevit.training.run import FinishedError
from mobilevit.weights import Weights, read

AS_IS = "post-training"
ARMS = {"float fine-tuning, post-training": False, "quantization-aware fine-tuning": True}
BATCH_SIZE = 32


def finetune(args: argparse.Namespace, weights: Weights, seed: int, *, is_aware: bool) -> Path:
    """Fine-tune, unless there is a finished run; the weights file of the last epoch."""
    options = DataOptions(
        size_px=weights.preprocessing.crop_px, eval_resize=1.0, min_scale=args.min_scale, num_workers=0
    )
    recipe = Recipe(
        architecture=weights.architecture.name,  # pyright: ignore[reportArgumentType] - one of the published ones
        epochs=args.epochs,
        batch_size=BATCH_SIZE,
        seed=seed,
        data=options,
        optimizer=Optimizer(start_lr=1e-5, lr=args.lr, end_lr=1e-6, warmup_steps=10, clip_norm=1.0),
        compute=Compute(quantization_aware=is_aware),
    )
    out = args.out / f"{'aware' if is_aware else 'float'}_{seed}"
    try:
        return train(recipe, args.train_data, out, pretrained=weights).weights
    except FinishedError:
        return out / "model.safetensors"


def evaluate(model: nn.Module, weights: Weights, data: Path) -> ClassificationResults:
    """Results of a classifier, possibly an artifact, on the validation images."""
    task = Classification()
    images = task.evaluation_set(weights, to_data(data), weights.preprocessing, "val")
    batches = eval_batches(len(images), batch_size=BATCH_SIZE, size_px=weights.preprocessing.crop_px)
    loader = load(images, batches, num_workers=0, device="cpu", preprocessing=weights.preprocessing)
    return task.evaluate(model, loader)


def write_int8(weights: Weights, runtime: str, data: Path, path: Path) -> None:
    """Write an int8 artifact as `mobilevit export` does, calibrated on training images."""
    size_px = weights.preprocessing.crop_px
    spec = ArtifactSpec("int8", size_px, size_px)
    source = Classification().evaluation_set(weights, to_data(data), weights.preprocessing, "train").source
    indices = evenly_spaced(range(len(source)), NUM_CALIBRATION_IMAGES)
    files = [Path(str(source[i].image)) for i in indices]  # of a folder
    images = [artifact_input(file, weights.preprocessing, spec) for file in files]
    network = build_export_model(weights, spec)
    find_backend(runtime, spec).write(network, spec, path, metadata_of(weights, spec, ""), images)


def measure(weights: Weights, runtimes: Sequence[str], data: Path) -> dict[str, dict[str, float]]:
    """Metrics by runtime; those of the float weights in PyTorch are "float".

    "lost" is top-1 in float minus top-1 in int8, and "standard_error" its standard error over the images, which are
    the same.
    """
    expected = evaluate(weights.build(), weights, data)
    right = expected.predictions[:, 0] == expected.labels
    rows = {"float": {"top1": 100 * float(right.mean()), "loss": expected.metrics()["loss"]}}
    for runtime in runtimes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"int8{ARTIFACT_SUFFIXES[runtime]}"
            write_int8(weights, runtime, data, path)
            found = evaluate(load_predictor(path), weights, data)
        lost = right.astype(float) - (found.predictions[:, 0] == found.labels)
        rows[runtime] = {
            "top1": found.metrics()["top1"],
            "loss": found.metrics()["loss"],
            "lost": 100 * float(lost.mean()),
            "standard_error": 100 * float(lost.std() / len(lost) ** 0.5),
            "agreement": 100 * float((found.predictions[:, 0] == expected.predictions[:, 0]).mean()),
        }
    return rows


def table(results: dict[str, dict[str, dict[str, float]]], runtimes: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A row per state and runtime: means over the seeds."""
    rows = []
    for arm, names in [(AS_IS, [AS_IS]), *((arm, [f"{arm}, seed {seed}" for seed in seeds]) for arm in ARMS)]:
        for runtime in runtimes:
            found = [results[name][runtime] for name in names if runtime in results.get(name, {})]
            if not found:
                continue
            mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
            before = np.mean([results[name]["float"]["top1"] for name in names if name in results])
            by_seed = ", ".join(f"{one['lost']:+.2f} ± {one['standard_error']:.2f}" for one in found)
            values = f"{before:.2f}", f"{mean['top1']:.2f}", f"{mean['lost']:+.2f}", by_seed, f"{mean['agreement']:.1f}"
            rows.append((arm, runtime, *values))
    columns = "weights", "runtime", "float top-1, %", "int8 top-1, %", "points lost", "by seed", "same prediction, %"
    return markdown_table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a classifier")
    parser.add_argument("data", type=Path, help="folder with its images, with the splits train and val")
    parser.add_argument("--train-data", type=Path, help="other images to fine-tune on, with the same classes")
    parser.add_argument("--out", type=Path, default=Path("runs/quantization_aware"))
    parser.add_argument("--runtimes", nargs="+", default=["onnx", "executorch", "openvino"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--min-scale", type=float, default=0.4, help="as --data.min-scale of mobilevit train")
    args = parser.parse_args()
    args.train_data = args.train_data or args.data
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    weights = read(args.weights)

    def add(name: str, trained: Weights) -> None:
        missing = [runtime for runtime in args.runtimes if runtime not in results.get(name, {})]
        for runtime in missing:
            results[name] = results.get(name, {}) | measure(trained, [runtime], args.data)
            file.write_text(json.dumps(results, indent=2) + "\n")
            print(name, runtime, results[name], flush=True)

    add(AS_IS, weights)
    for seed in args.seeds:
        for arm, is_aware in ARMS.items():
            add(f"{arm}, seed {seed}", read(finetune(args, weights, seed, is_aware=is_aware)))
    print("\n".join(table(results, args.runtimes, args.seeds)))


if __name__ == "__main__":
    main()
