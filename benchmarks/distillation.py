"""Distillation of MobileViT-XXS at 64 px: does a teacher help, with labels and without?

    python benchmarks/distillation.py --teacher timm:tf_efficientnet_lite0@efficientnet-lite0-57934424.pth \
        --images /usr/share/backgrounds /usr/share/wallpapers /usr/share/openclipart/png --out runs/distillation

The classification data are the stamps of Debian's tuxpaint-stamps-default by folder, 17 classes. The student is trained
from random weights; from weights distilled without labels on `--images` and the training images of the stamps; with a
teacher that was fine-tuned on the stamps; and with both. All runs have the same number of steps. The report has the
mean and the standard deviation over the seeds, and Welch's t-test against random weights with Holm's correction.
Stopped and called again, the script resumes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mobilevit.benchmark.timing import machine
from mobilevit.compare.statistics import holm, welch
from mobilevit.data.sources import find_splits
from mobilevit.images import find_images
from mobilevit.recipes import RECIPES, Data, Distill, Optimizer, Recipe
from mobilevit.teacher import TeacherNetwork, read_teacher
from mobilevit.training.loop import train
from mobilevit.training.run import EpochMetrics, FinishedError

STAMPS = Path("/usr/share/tuxpaint/stamps")
STUDENT_PX, TEACHER_PX = 64, 128
ARMS = ("random weights", "distilled weights", "teacher", "distilled weights and teacher")


@dataclass(frozen=True)
class PretrainedClassifier:
    """The teacher's network with a new classifier, as `mobilevit.train(classifier=...)` takes it."""

    teacher: TeacherNetwork
    name: str = "teacher"

    def build(self, num_classes: int, size_px: int) -> nn.Module:
        network = self.teacher.network
        network.reset_classifier(num_classes)  # pyright: ignore[reportCallIssue]
        return Normalized(network.requires_grad_(True), self.teacher)


class Normalized(nn.Module):
    """A network for images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, teacher: TeacherNetwork):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(teacher.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(teacher.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def fit(recipe: Recipe, data: Path, out: Path, **options: object) -> list[EpochMetrics]:
    """Train, unless `out` has a finished run; the metrics of the epochs."""
    try:
        return train(recipe, data, out, **options).epochs  # pyright: ignore[reportArgumentType]
    except FinishedError as finished:
        return finished.epochs


def evenly(files: list[Path], num: int) -> list[Path]:
    """`num` of the files, or all of them, at equal distances."""
    return files if len(files) <= num else [files[i * len(files) // num] for i in range(num)]


def distill(args: argparse.Namespace, epochs: int, train_files: list[Path]) -> list[EpochMetrics]:
    """Distil without labels, into the folder "distilled_EPOCHS"."""
    folder = args.out / "unlabeled"
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for source in args.images for file in evenly(find_images([source]), args.max_images)]
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    import stamps  # pyright: ignore[reportMissingImports]

    # The stamps of the validation images of examples/stamps.py are never distilled on.
    val_files = {file for of_class in stamps.stamps()["val"].values() for file in of_class}
    train_files = [file for file in train_files if file not in val_files]
    for i, file in enumerate([*dict.fromkeys(file.resolve() for file in files), *train_files]):
        link = folder / f"{i:05}{file.suffix}"
        if not link.exists():
            link.symlink_to(file)
    recipe = RECIPES["distill"]
    recipe = replace(
        recipe,
        epochs=epochs,
        data=replace(
            recipe.data,
            size_px=STUDENT_PX,
            val_fraction=0.1,
            crops_per_image=args.crops,
            num_workers=0,
            max_unreadable=20,  # some clip art has hundreds of megapixels
        ),
        distill=replace(recipe.distill, size_px=TEACHER_PX),
        compute=replace(recipe.compute, precision="bfloat16"),
    )
    return fit(recipe, folder, args.out / f"distilled_{epochs}", teacher=read_teacher(args.teacher))


def finetune_teacher(args: argparse.Namespace, class_names: tuple[str, ...]) -> TeacherNetwork:
    """The teacher with the classes of the stamps."""
    recipe = Recipe(
        epochs=args.teacher_epochs,
        batch_size=32,
        data=Data(size_px=TEACHER_PX, eval_resize=1.0, min_scale=0.35, num_workers=0),
        optimizer=Optimizer(start_lr=1e-5, lr=5e-4, end_lr=1e-6, warmup_steps=50, clip_norm=1.0),
    )
    source = read_teacher(args.teacher)
    classifier = PretrainedClassifier(source)
    epochs = fit(recipe, STAMPS, args.out / "teacher", classifier=classifier)
    print(f"fine-tuned teacher: {epochs[-1]['val_top1']:.2f} % top-1")
    network = classifier.build(len(class_names), TEACHER_PX)
    network.load_state_dict(load_file(args.out / "teacher" / "model.safetensors"))
    return TeacherNetwork(network, "fine-tuned teacher", class_names)


def student(seed: int, epochs: int, *, pretrained: bool, taught: bool) -> Recipe:
    return Recipe(
        architecture="xxs",
        epochs=epochs,
        batch_size=32,
        seed=seed,
        data=Data(size_px=STUDENT_PX, eval_resize=1.0, min_scale=0.35, num_workers=0),
        # From distilled weights, the learning rate of training from scratch diverges.
        optimizer=Optimizer(
            lr=1e-3 if pretrained else 3e-3, end_lr=1e-5, warmup_steps=100, weight_decay=0.05, clip_norm=1.0
        ),
        distill=Distill(soft_weight=0.5, temperature=2.0, size_px=TEACHER_PX) if taught else Distill(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="as for mobilevit train")
    parser.add_argument("--images", nargs="*", default=[], help="folders of images without labels")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--max-images", type=int, default=3000, help="images of each folder, at most")
    parser.add_argument("--distill-epochs", type=int, nargs="+", default=[54], help="the first weights are fine-tuned")
    parser.add_argument("--crops", type=int, default=2, help="crops per image and epoch")
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path, help="write the chart of the agreement to this file")
    args = parser.parse_args()
    train_split, _ = find_splits("classify", STAMPS, 0.2)
    train_files = [Path(train_split[i].name) for i in range(len(train_split))]
    distilled = {epochs: distill(args, epochs, train_files) for epochs in args.distill_epochs}
    weights = args.out / f"distilled_{args.distill_epochs[0]}" / "model.safetensors"
    teacher = finetune_teacher(args, train_split.class_names)
    runs: dict[str, list[list[EpochMetrics]]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        for arm in ARMS:
            pretrained, taught = "distilled" in arm, "teacher" in arm
            recipe = student(seed, args.epochs, pretrained=pretrained, taught=taught)
            options = {"pretrained": weights} if pretrained else {}
            options |= {"teacher": teacher} if taught else {}
            runs[arm].append(fit(recipe, STAMPS, args.out / f"{arm.replace(' ', '_')}_{seed}", **options))
    print(machine(torch.get_num_threads()).describe())
    print(arms_table(runs))
    for epochs, metrics in distilled.items():
        print(f"\nDistillation without labels, {epochs} epochs:\n\n{curve_table(metrics)}")
    if args.figure:
        draw(distilled, args.figure)


def arms_table(runs: dict[str, list[list[EpochMetrics]]]) -> str:
    """Top-1 of the last epoch over the seeds, against the first arm, as a Markdown table."""
    scores = {arm: [epochs[-1]["val_top1"] for epochs in of_arm] for arm, of_arm in runs.items()}
    tests = {arm: test for arm in ARMS[1:] if (test := welch(scores[arm], scores[ARMS[0]]))}
    corrected = dict(zip(tests, holm([p for _, _, p in tests.values()]), strict=True))
    lines = [
        "| training | top-1, % | by seed | difference | p (Welch, Holm) | images/s | time in the teacher, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mean, deviation = np.mean(scores[arm]), np.std(scores[arm], ddof=1)
        all_epochs = [epoch for epochs in runs[arm] for epoch in epochs]
        cells = (
            f"{mean:.1f} ± {deviation:.1f}",
            ", ".join(f"{score:.1f}" for score in scores[arm]),
            f"{mean - np.mean(scores[ARMS[0]]):+.1f}" if arm in tests else "",
            f"{corrected[arm]:.4f}" if arm in corrected else "",
            f"{median(epoch['images_per_second'] for epoch in all_epochs):.0f}",
            f"{100 * median(epoch.get('teacher_fraction', 0.0) for epoch in all_epochs):.0f}",
        )
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def crops_of(epochs: list[EpochMetrics]) -> list[float]:
    """Crops up to the end of each epoch."""
    return list(accumulate(epoch["seconds"] * epoch["images_per_second"] for epoch in epochs))


def hours_of(epochs: list[EpochMetrics]) -> list[float]:
    """Hours of training up to the end of each epoch, at the median speed of the run: other work interrupts it."""
    speed = median(epoch["images_per_second"] for epoch in epochs)
    return [crops / speed / 3600 for crops in crops_of(epochs)]


def curve_table(epochs: list[EpochMetrics], num_rows: int = 9) -> str:
    """Agreement with the teacher by hours, as a Markdown table."""
    lines = ["| hours | crops | agreement, % | among the first five, % | KL divergence |", "|---|---|---|---|---|"]
    rows = list(zip(hours_of(epochs), crops_of(epochs), epochs, strict=True))
    for hours, crops, epoch in [rows[(i + 1) * len(rows) // num_rows - 1] for i in range(min(num_rows, len(rows)))]:
        agreement, five, divergence = (epoch[f"val_{name}"] for name in ("agreement", "agreement5", "kl"))
        lines.append(f"| {hours:.2f} | {crops:,.0f} | {agreement:.1f} | {five:.1f} | {divergence:.2f} |")
    return "\n".join(lines)


def draw(distilled: dict[int, list[EpochMetrics]], file: Path) -> None:
    """Plot agreement by hours, a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for epochs, metrics in distilled.items():
        axes.plot(hours_of(metrics), [epoch["val_agreement"] for epoch in metrics], label=f"{epochs} epochs")
    axes.set(
        xlabel="hours of distillation, at the median speed",
        ylabel="agreement with the teacher, %",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
