"""Count and time the listed models.

Times of separate runs are not comparable, see `mobilevit.benchmark.timing`. So the models are timed in small groups,
every group together with the three sizes of MobileViT, and results are ratios of two times of the same round.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mobilevit.benchmark import timing
from mobilevit.benchmark.cost import count
from mobilevit.benchmark.models import faster_layout, runner, write_model
from mobilevit.benchmark.rivals import protect_silu, randomize
from mobilevit.benchmark.timing import Spread
from mobilevit.compare.claims import check_claims, dense_tables, speed_ratios
from mobilevit.compare.models import MOBILEVITS, MODELS, Model, PublishedModel, check_names, network_key
from mobilevit.compare.reports import RUNTIMES, Baseline, PublishedReport, PublishedRow, Runtime, Setting, Timing
from mobilevit.defaults import NUM_ROUNDS, NUM_THREADS
from mobilevit.export import TOLERANCE, find_backend
from mobilevit.export.artifact import ArtifactSpec
from mobilevit.messages import first_line

logger = logging.getLogger(__name__)

GROUP_SIZE = 6  # models timed together with ours; in larger groups the two times of a ratio are seconds apart


@dataclass(frozen=True)
class TimingOptions:
    """How models are timed; without `runtimes` they are not.

    `baseline` is the MobileViT by whose time the others are divided, or "nearest", the one nearest in parameters.
    `device` is that of torch; ONNX Runtime is timed on the CPU only.
    """

    runtimes: Sequence[Runtime] = RUNTIMES
    batch_sizes: Sequence[int] = (1,)
    device: str = "cpu"
    baseline: Baseline = "nearest"
    num_rounds: int = NUM_ROUNDS
    num_threads: int = NUM_THREADS

    def check(self) -> None:
        """Raise ValueError if ONNX Runtime is requested and not installed, or together with an accelerator."""
        if "onnx" in self.runtimes:
            find_backend("onnx", ArtifactSpec("fp32", 256, 256))
            if self.device != "cpu":
                raise ValueError(
                    f"ONNX Runtime is timed on the CPU only; with --device {self.device} give --runtime torch"
                )

    def setting(self, num_threads: int) -> Setting:
        """The setting of a report; `num_threads` are those of torch outside of the timing."""
        device = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device
        num_rounds = self.num_rounds if self.runtimes else 0
        return Setting(timing.machine(num_threads), device, num_rounds, self.num_threads, self.baseline)


def choose(names: Sequence[str]) -> list[PublishedModel]:
    """The models `names` and the three sizes of MobileViT, in the order of the table; all models if `names` is empty.

    Raises:
        ValueError: an unknown name.
    """
    check_names(names, MODELS)
    return [model for name, model in MODELS.items() if not names or name in names or name in MOBILEVITS]


def compare(
    models: Sequence[PublishedModel], *, size_px: int | None = None, options: TimingOptions | None = None
) -> PublishedReport:
    """Count and time `models`, which must include a MobileViT.

    Args:
        models: see `choose`.
        size_px: image size for all models, by default that of each model's published figures. Models that do not
            support it are left out with a warning.
        options: how to time them.

    Raises:
        ValueError: a library or runtime is not installed.
    """
    options = options or TimingOptions()
    options.check()
    setting = options.setting(options.num_threads)
    notes, rows = [], []
    for model in models:
        size = size_px or model.size_px
        try:
            model.check_size(size)
        except ValueError as error:
            notes.append(f"left out {model.name}: {error}")
            continue
        logger.info("%s: counting ...", model.name)
        with torch.device("meta"):
            network = model.build(size_px=size)
        rows.append(PublishedRow.of(model, size, count(network, (size, size))))
    if any(row.size_px != MODELS[row.name].size_px for row in rows):
        notes.append(f"published top-1 and claims are for the image sizes of the papers, not for {size_px} px")
    for note in notes:
        logger.warning(note)
    timings, problems = time_models([(MODELS[row.name], row.size_px) for row in rows], options)
    num_parameters = {row.name: row.cost.num_parameters for row in rows}
    rows = [replace(row, timings=timings_of(row.name, timings, num_parameters, options)) for row in rows]
    at_published_size = [row for row in rows if row.size_px == MODELS[row.name].size_px]
    return PublishedReport(
        setting=setting,
        rows=rows,
        notes=notes + problems,
        claims=check_claims(at_published_size),
        speeds=speed_ratios(at_published_size),
        dense=dense_tables(),
    )


def baseline_of(name: str, num_parameters: Mapping[str, int], baseline: Baseline) -> str | None:
    """The MobileViT among `num_parameters` that a model is compared with; None if it is missing or the model itself."""
    candidates = [other for other in MOBILEVITS if other in num_parameters and baseline in ("nearest", other)]
    nearest = min(candidates, key=lambda other: abs(np.log(num_parameters[other] / num_parameters[name])), default=None)
    return None if nearest == name else nearest


# ---------------------------------------------------------------------------------------------------------------------
# Times


def timings_of(
    name: str, timings: Mapping[str, Sequence[Timing]], num_parameters: Mapping[str, int], options: TimingOptions
) -> tuple[Timing, ...]:
    """The timings of a model, with its baseline. Models that differ only in their training are timed once."""
    baseline = baseline_of(name, num_parameters, options.baseline)
    return tuple(
        replace(one, baseline=baseline, ratio=one.ratios.get(baseline or ""))
        for one in timings.get(network_key(name), ())
    )


def time_models(
    models: Sequence[tuple[Model, int]], options: TimingOptions, num_classes: int = 1000
) -> tuple[dict[str, list[Timing]], list[str]]:
    """Time models, given with their image sizes, with ratios to the MobileViTs among them.

    Returns the timings by `network_key`, and a line for every problem: a model that a runtime cannot run is left out
    with a warning.
    """
    sizes = {network_key(model.name): (model, size_px) for model, size_px in models}
    timings: dict[str, list[Timing]] = {name: [] for name in sizes}
    problems: list[str] = []
    for runtime in options.runtimes:
        for batch_size in options.batch_sizes:
            with tempfile.TemporaryDirectory() as folder:
                timer = _Timer(runtime, batch_size, num_classes, options, Path(folder), problems)
                for name, result in timer.time(sizes).items():
                    timings[name].append(result)
    return timings, problems


@dataclass(frozen=True)
class _Prepared:
    """A model that is ready to run; see `Timing`."""

    run: Callable[[], Any]
    layout: str | None = None
    error: float | None = None


@dataclass(frozen=True)
class _Timer:
    """Times models in one runtime with one batch size."""

    runtime: Runtime
    batch_size: int
    num_classes: int
    options: TimingOptions
    folder: Path
    problems: list[str]

    def time(self, models: Mapping[str, tuple[Model, int]]) -> dict[str, Timing]:
        """Time every model in a group with the MobileViTs, and divide by their times of the same round."""
        torch.set_num_threads(self.options.num_threads)
        ours = self._prepare_all({name: models[name] for name in MOBILEVITS if name in models})
        names = [name for name in models if name not in MOBILEVITS]
        groups = [names[i : i + GROUP_SIZE] for i in range(0, len(names), GROUP_SIZE)] or [[]]
        prepared: dict[str, _Prepared] = {}
        times_ms: dict[str, list[np.ndarray]] = {}
        ratios: dict[tuple[str, str], list[np.ndarray]] = {}
        for index, group in enumerate(groups, start=1):
            members = ours | self._prepare_all({name: models[name] for name in group})
            prepared |= members
            logger.info(
                "%s, batch size %d, group %d of %d: %d models interleaved, %d rounds ...",
                *(self.runtime, self.batch_size, index, len(groups), len(members), self.options.num_rounds),
            )
            times = timing.measure([member.run for member in members.values()], self.options.num_rounds)
            of = dict(zip(members, times, strict=True))
            for name in of:
                times_ms.setdefault(name, []).append(of[name])
                for base in ours:
                    ratios.setdefault((name, base), []).append(of[name] / of[base])
        return {
            name: Timing(
                runtime=self.runtime,
                batch_size=self.batch_size,
                layout=prepared[name].layout,
                error=prepared[name].error,
                latency_ms=Spread.of(np.concatenate(times)),
                images_per_second=1e3 * self.batch_size / float(np.median(np.concatenate(times))),
                ratios={base: Spread.of(np.concatenate(ratios[name, base])) for base in ours if base != name},
            )
            for name, times in times_ms.items()
        }

    def _prepare_all(self, models: Mapping[str, tuple[Model, int]]) -> dict[str, _Prepared]:
        """Prepare the models that this runtime can run."""
        prepared = {}
        for name, (model, size_px) in models.items():
            logger.info("%s, batch size %d: preparing %s ...", self.runtime, self.batch_size, name)
            network = randomize(model.build(self.num_classes, size_px), seed=0).requires_grad_(False)
            prepare = self._prepare_torch if self.runtime == "torch" else self._prepare_onnx
            try:
                prepared[name] = prepare(name, network, size_px)
            except Exception as error:  # a converter may raise anything
                self._report(f"{self.runtime}: left out {name}, which does not run ({first_line(error)})")
        return prepared

    def _prepare_torch(self, name: str, network: nn.Module, size_px: int) -> _Prepared:
        """The model as it is defined, without rewrites, in the memory layout that is faster on this machine."""
        images = torch.rand(self.batch_size, 3, size_px, size_px).to(self.options.device)
        network, layout = faster_layout(network.to(self.options.device), images)
        return _Prepared(runner(network, images), layout=layout)

    def _prepare_onnx(self, name: str, network: nn.Module, size_px: int) -> _Prepared:
        """The model as `mobilevit export` converts it; the rewrites apply to MobileViT only."""
        if name not in MOBILEVITS:
            protect_silu(network)
        spec = ArtifactSpec("fp32", size_px, size_px, self.batch_size)
        model = write_model(name, network, "onnx", spec, self.folder)
        run, images = model.load(self.options.num_threads), model.example_input()
        error = model.error(run(images))
        assert error is not None
        if not error <= TOLERANCE["fp32"]:
            self._report(
                f"onnx: the logits of {name} differ from torch's by {error:.1g} of their standard deviation, the "
                f"tolerance is {TOLERANCE['fp32']:g}; with random weights some models amplify rounding errors"
            )
        return _Prepared(lambda: run(images), error=error)

    def _report(self, problem: str) -> None:
        self.problems.append(problem)
        logger.warning(problem)
