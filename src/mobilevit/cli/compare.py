"""`mobilevit compare`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import choose_device, expand, expand_data, use_threads
from mobilevit.defaults import NUM_ROUNDS, NUM_THREADS
from mobilevit.recipes import RECIPES

if TYPE_CHECKING:
    from mobilevit.compare.reports import Report
    from mobilevit.compare.run import TimingOptions


@dataclass(frozen=True)
class Compare:
    """Compare MobileViT with other models: size, accuracy, latency.

    With --data, train all models on your images with one recipe. The same command resumes an interrupted comparison.
    The last line of the output is JSON.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Models to compare with the three sizes of MobileViT (default: all, which takes minutes). With --data: models to
    train besides one MobileViT (default: four of the size of MobileViT-XXS)."""
    data: str | None = None
    """Train on these images (as for train), report the measured accuracy, and time the trained models."""
    recipe: Literal["small", "plain", "tiny"] | None = None
    """With --data: recipe for all models (default: small). `mobilevit train NAME --help` describes it."""
    epochs: int | None = None
    """With --data: number of epochs (default: that of the recipe)."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """With --data: seeds; every model is trained once with each (default: 0 1 2)."""
    lr: float | None = None
    """With --data: peak learning rate for all models (default: that of the recipe)."""
    clip_norm: float | None = None
    """With --data: gradient norm limit for all models; 0 disables clipping (default: that of the recipe)."""
    flip: bool = True
    """With --data: do not flip images horizontally, for digits, letters and other images with a direction."""
    num_workers: int | None = None
    """With --data: number of processes that load images (default: that of the recipe)."""
    time: bool = True
    """Do not measure latency. The table then takes a minute or two."""
    runtime: tuple[Literal["torch", "onnx"], ...] = ()
    """Runtimes to time in, float32 (default: both; torch on an accelerator)."""
    baseline: Literal["nearest", "mobilevit-xxs", "mobilevit-xs", "mobilevit-s"] = "nearest"
    """MobileViT to compare the others with; nearest is the one with the most similar number of parameters."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", aliases=["--batch"])] = ()
    """Batch sizes to time (default: 1). With --data: training batch size (default: that of the recipe); the trained
    models are timed with a batch size of 1."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Image size in pixels (default: that of each model's published figures; with --data that of the recipe). Models
    that do not support it are left out, or rejected if they are named."""
    rounds: int | None = None
    """Number of rounds; each round times every model once (default: 40)."""
    num_threads: int | None = None
    """CPU threads of the timed runtimes (default: 2), and of training (default: that of PyTorch)."""
    device: Annotated[str, tyro.conf.arg(help="Device of torch: cpu, cuda, cuda:1.")] = "cpu"
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for table.md, table.csv, table.json and figures; with --data also for the runs (default with --data:
    runs/compare/ and the name of the data)."""

    def run(self) -> int:
        self._check()
        return self._published() if self.data is None else self._trained(self.data)

    def _check(self) -> None:
        counts = [("batch size", size) for size in self.batch_size]
        for name, value in (*counts, ("rounds", self.rounds), ("num threads", self.num_threads)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        training_options = {
            **{"--recipe": self.recipe, "--epochs": self.epochs, "--seeds": self.seeds or None, "--lr": self.lr},
            **{"--no-flip": None if self.flip else True, "--num-workers": self.num_workers},
            "--clip-norm": self.clip_norm,
        }
        for option, value in training_options.items():
            if self.data is None and value is not None:
                raise ValueError(f"{option} is a training option; it requires --data")
        if self.runtime and not self.time:
            raise ValueError("--no-time and --runtime exclude each other; leave out one of them")
        if self.out and expand(self.out).is_file():
            raise ValueError(f"{self.out}: is a file; --out requires a folder")

    def _published(self) -> int:
        from mobilevit.compare.run import choose, compare

        models = choose(self.only)
        if self.only and self.size:
            for model in models:
                model.check_size(self.size)
        out = expand(self.out) if self.out else None
        if out:  # fails early if the folder cannot be created
            out.mkdir(parents=True, exist_ok=True)
        batch_sizes = tuple(dict.fromkeys(self.batch_size)) or (1,)
        return self._show(compare(models, size_px=self.size, options=self._timing_options(batch_sizes)), out)

    def _trained(self, data: str) -> int:
        from mobilevit.compare.train import SEEDS, choose, compare_trained

        if len(self.batch_size) > 1:
            raise ValueError(f"batch size is {self.batch_size}; with --data give one")

        def changed(options: Any, **given: Any) -> Any:
            return replace(options, **{name: value for name, value in given.items() if value is not None})

        recipe = RECIPES[self.recipe or "small"]
        flip = None if self.flip else False
        recipe = changed(
            recipe,
            epochs=self.epochs,
            batch_size=self.batch_size[0] if self.batch_size else None,
            data=changed(recipe.data, size_px=self.size, num_workers=self.num_workers, flip=flip),
            optimizer=changed(recipe.optimizer, lr=self.lr, clip_norm=self.clip_norm),
        )
        models = choose(self.only, recipe, self.baseline)
        data = expand_data(data)
        out = expand(self.out or Path("runs/compare") / Path(data).resolve().name)
        if self.num_threads:
            use_threads(self.num_threads)
        options = self._timing_options((1,))
        report = compare_trained(models, data, out, recipe, seeds=self.seeds or SEEDS, options=options)
        self._show(report, out)
        return 1 if any(row.failures for row in report.rows) else 0

    def _timing_options(self, batch_sizes: tuple[int, ...]) -> TimingOptions:
        from mobilevit.compare.run import RUNTIMES, TimingOptions

        device = choose_device(self.device)
        runtimes = tuple(dict.fromkeys(self.runtime)) or (RUNTIMES if device == "cpu" else ("torch",))
        return TimingOptions(
            runtimes=runtimes if self.time else (),
            batch_sizes=batch_sizes,
            device=device,
            baseline=self.baseline,
            num_rounds=self.rounds or NUM_ROUNDS,
            num_threads=self.num_threads or NUM_THREADS,
        )

    def _show(self, report: Report, out: Path | None) -> int:
        """Print a report, and write it to `out`."""
        from mobilevit.compare import tables

        stdout().print(tables.TerminalTable(report))
        for line in tables.findings(report):
            print(line)
        if out:
            for file in tables.write(report, out):
                print(file)
        print(json.dumps(report.to_dict(), ensure_ascii=False))
        return 0
