"""`mobilevit compare`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.recipes import RECIPES

if TYPE_CHECKING:
    pass
from mobilevit.cli.console import stdout, warn
from mobilevit.cli.options import choose_device, expand, expand_data, use_threads


@dataclass(frozen=True)
class Compare:
    """Compare MobileViT with other models: size, accuracy, latency.

    With --data, all models are trained on your images by one recipe and compared; the same command resumes what was
    stopped. The last line is JSON.
    """

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Systems to show beside MobileViT's three sizes; all unless given, which takes many minutes with the times. With
    --data, to train beside one MobileViT or those that are named; unless given, four as large as MobileViT-XXS."""
    data: str | None = None
    """Train on these images, as for train, and report what is measured instead of what was published; then the times
    of the trained networks, for an image of that size."""
    recipe: Literal["small", "plain", "tiny"] | None = None
    """With --data: what all are trained by; small unless given. `mobilevit train NAME --help` says what it is."""
    epochs: int | None = None
    """With --data: times that every image is seen; the recipe's unless given."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...")] = ()
    """With --data: a run of every system with each; 0 1 2 unless given."""
    lr: float | None = None
    """With --data: the highest learning rate, of all systems alike; the recipe's unless given."""
    clip_norm: float | None = None
    """With --data: gradient norm limit, the same for all models; the recipe's unless given, and 0 disables clipping."""
    flip: bool = True
    """With --data: do not flip images horizontally. Use it for digits, letters and other images with a direction."""
    num_workers: int | None = None
    """With --data: processes that read images; the recipe's unless given."""
    time: bool = True
    """Do not measure latency; the table then takes a minute or two."""
    runtime: tuple[Literal["torch", "onnx"], ...] = ()
    """What to time in, always in float32; both unless given, on an accelerator torch."""
    baseline: Literal["nearest", "mobilevit-xxs", "mobilevit-xs", "mobilevit-s"] = "nearest"
    """What the others are compared with; nearest is the MobileViT with the most similar number of parameters."""
    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", aliases=["--batch"])] = ()
    """Images in an input, one number or several; 1 unless given. With --data images a training step, the recipe's
    unless given, and 1 in what is timed."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """Side of the images in pixels; unless given, what each system was published with, with --data the recipe's.
    Systems that do not take it are left out, or refused where they are named."""
    rounds: int | None = None
    """Every system is timed once a round; 40 unless given."""
    num_threads: int | None = None
    """Of every runtime that is timed; 2 unless given. Of training, as many as torch takes unless given."""
    device: Annotated[str, tyro.conf.arg(help="Where torch computes: cpu, cuda, cuda:1.")] = "cpu"
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write run.md, run.csv, run.json and the figures here. With --data the runs as well; unless given,
    runs/compare/ and the name of the data."""

    def run(self) -> int:
        """Count, time or train, print and write. Exit code 1 if some system could not be trained."""
        counts = [("batch size", size) for size in self.batch_size]
        counts += [("rounds", self.rounds), ("num threads", self.num_threads)]
        for name, value in counts:
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        of_training = {
            **{"--recipe": self.recipe, "--epochs": self.epochs, "--seeds": self.seeds, "--lr": self.lr},
            **{"--no-flip": not self.flip, "--num-workers": self.num_workers, "--clip-norm": self.clip_norm},
        }
        for option, value in of_training.items():
            if self.data is None and value is not None and value is not False and value != ():  # 0 is a value
                raise ValueError(f"{option} is about training; give --data too")
        if self.runtime and not self.time:
            raise ValueError("--no-time times nothing; leave out --runtime")
        if self.out and expand(self.out).is_file():
            raise ValueError(f"{self.out}: is a file; --out names a folder")
        return self._list() if self.data is None else self._train(self.data)

    def _train(self, data: str) -> int:
        from dataclasses import replace

        from mobilevit.benchmark.run import check_figure
        from mobilevit.compare import tables, train

        if len(self.batch_size) > 1:
            raise ValueError(f"batch size is {self.batch_size}; with --data give one")
        recipe = RECIPES[self.recipe or "small"]

        def changed(part: Any, **given: Any) -> Any:
            return replace(part, **{name: value for name, value in given.items() if value is not None})

        recipe = changed(
            recipe,
            epochs=self.epochs,
            batch_size=self.batch_size[0] if self.batch_size else None,
            data=changed(
                recipe.data, size_px=self.size, num_workers=self.num_workers, flip=None if self.flip else False
            ),
            optimizer=changed(recipe.optimizer, lr=self.lr, clip_norm=self.clip_norm),
        )
        networks = train.choose(self.only, recipe, self.baseline)
        data = expand_data(data)
        out = expand(self.out or Path("runs/compare") / Path(data).resolve().name)
        check_figure(out / "figure.png")  # said now, and not when everything has been trained
        if self.num_threads:
            use_threads(self.num_threads)
        report = train.compare_trained(
            networks,
            data,
            out,
            recipe,
            seeds=self.seeds or (0, 1, 2),
            **self._options(),
        )
        stdout().print(tables.table_of_training(report))
        for line in tables.findings_of_training(report):
            print(line)
        for file in tables.write_training(report, out):
            print(file)
        print(json.dumps(report, ensure_ascii=False))
        return 1 if any(row["failures"] for row in report["rows"]) else 0

    def _options(self) -> dict[str, Any]:
        """What both ways of comparing are told."""
        from mobilevit.compare.run import RUNTIMES

        device = choose_device(self.device)
        runtimes = tuple(dict.fromkeys(self.runtime)) or (RUNTIMES if device == "cpu" else ("torch",))
        return {
            "runtimes": runtimes if self.time else (),
            "device": device,
            "baseline": self.baseline,
            "num_rounds": self.rounds or 40,
            "num_threads": self.num_threads or 2,
            "on_start": lambda what: print(what, file=sys.stderr, flush=True),
            "on_problem": warn,
        }

    def _list(self) -> int:
        from mobilevit.benchmark.run import check_figure
        from mobilevit.compare import run, tables

        systems = run.choose(self.only)
        if self.only and self.size:  # of all systems, those that do not take it are left out
            for system in systems:
                system.check_size(self.size)
        out = expand(self.out) if self.out else None
        if out:  # said now, and not when everything has been measured
            check_figure(out / "figure.png")
            out.mkdir(parents=True, exist_ok=True)
        report = run.compare(
            systems,
            batch_sizes=tuple(dict.fromkeys(self.batch_size)) or (1,),
            size_px=self.size,
            **self._options(),
        )
        stdout().print(tables.table(report))
        for line in tables.findings(report):
            print(line)
        if out:
            for file in tables.write(report, out):
                print(file)
        print(json.dumps(report, ensure_ascii=False))
        return 0
