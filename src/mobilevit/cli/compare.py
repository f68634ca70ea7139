"""`mobilevit compare`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.cli.console import stdout
from mobilevit.cli.options import DeviceOptions, Flag, choices, expand, expand_data, require_positive
from mobilevit.defaults import NUM_ROUNDS, NUM_THREADS
from mobilevit.recipes import RECIPES

if TYPE_CHECKING:
    from mobilevit.compare.reports import Report
    from mobilevit.compare.run import TimingOptions

RecipeName = Literal["small", "plain", "tiny"]
TaskName = Literal["classify", "multilabel"]
Runtime = Literal["torch", "onnx"]


@dataclass(frozen=True)
class Compare:
    """Compare MobileViT with other models: parameters, accuracy, latency.

    With --data, the models are trained on your images with one recipe; the same command resumes an interrupted
    comparison. The last line of the output is JSON.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Models to compare with MobileViT. Default: all, which takes minutes; with --data: four models of the size of
    MobileViT-XXS."""
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Dataset, as for mobilevit train. The models are trained on it, evaluated and timed."""
    recipe: Annotated[RecipeName | None, tyro.conf.arg(metavar=choices(RecipeName))] = None
    """With --data: training recipe of all models; `mobilevit train RECIPE --help` shows it. Default: small."""
    task: Annotated[TaskName, tyro.conf.arg(metavar=choices(TaskName), help_behavior_hint="")] = "classify"
    """With --data: classify for one label per image, multilabel for several (docs/data.md). Default: classify."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --data: number of epochs. Default: that of the recipe."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """With --data: random seeds; each model is trained once per seed. Default: 0 1 2."""
    lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """With --data: peak learning rate of all models. Default: that of the recipe."""
    clip_norm: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """With --data: maximum norm of the gradient; 0: no clipping. Default: that of the recipe."""
    flip: Flag = True
    """With --data: do not flip images horizontally in training. For digits, letters and other images whose orientation
    matters."""
    num_workers: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """With --data: number of processes that read images. Default: that of the recipe."""
    time: Flag = True
    """Do not measure latency. The comparison then takes a minute or two."""
    runtime: Annotated[tuple[Runtime, ...], tyro.conf.arg(metavar=f"{choices(Runtime)}...")] = ()
    """Runtimes to time, in fp32. Default: both on the CPU, torch on an accelerator."""
    baseline: Literal["nearest", "mobilevit-xxs", "mobilevit-xs", "mobilevit-s"] = "nearest"
    """MobileViT that the other models are compared with; nearest: the one with the nearest number of parameters."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", aliases=["--batch"])] = ()
    """Batch sizes to time; default: 1. With --data: batch size in training; default: that of the recipe."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Input size in pixels. Default: that of each model's published accuracy; with --data: that of the recipe. Models
    that do not support the size are left out."""
    rounds: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of rounds; each round times every model once. Default: 40."""
    num_threads: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of CPU threads. Default: 2 for latency, that of PyTorch for training."""
    device: str = "cpu"
    """Device for torch: cpu, cuda, cuda:1, mps, or auto."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder for the table (.md, .csv, .json) and figures; with --data also for the runs. Default with --data:
    runs/compare/ and the name of the data."""

    def run(self) -> int:
        self._check()
        return self._published() if self.data is None else self._trained(self.data)

    def _check(self) -> None:
        require_positive("--rounds", self.rounds)
        require_positive("--num-threads", self.num_threads)
        require_positive("--batch-size", *self.batch_size)
        training_options = {
            **{"--recipe": self.recipe, "--epochs": self.epochs, "--seeds": self.seeds or None, "--lr": self.lr},
            **{"--no-flip": None if self.flip else True, "--num-workers": self.num_workers},
            **{"--clip-norm": self.clip_norm, "--task": None if self.task == "classify" else self.task},
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
            raise ValueError(f"--batch-size is {' '.join(map(str, self.batch_size))}; with --data, give one batch size")

        def changed(options: Any, **given: Any) -> Any:
            return replace(options, **{name: value for name, value in given.items() if value is not None})

        recipe = RECIPES[self.recipe or "small"]
        flip = None if self.flip else False
        recipe = changed(
            recipe,
            task=self.task,
            label_smoothing=0.0 if self.task == "multilabel" else None,  # as in the recipe multilabel
            epochs=self.epochs,
            batch_size=self.batch_size[0] if self.batch_size else None,
            data=changed(recipe.data, size_px=self.size, num_workers=self.num_workers, flip=flip),
            optimizer=changed(recipe.optimizer, lr=self.lr, clip_norm=self.clip_norm),
        )
        models = choose(self.only, recipe, self.baseline)
        data = expand_data(data)
        out = expand(self.out or Path("runs/compare") / Path(data).resolve().name)
        DeviceOptions(num_threads=self.num_threads).set_threads()
        options = self._timing_options((1,))
        report = compare_trained(models, data, out, recipe, seeds=self.seeds or SEEDS, options=options)
        self._show(report, out)
        return 1 if any(row.failures for row in report.rows) else 0

    def _timing_options(self, batch_sizes: tuple[int, ...]) -> TimingOptions:
        from mobilevit.compare.run import RUNTIMES, TimingOptions

        device = DeviceOptions(self.device).apply()
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
