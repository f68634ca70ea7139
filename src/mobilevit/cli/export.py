"""`mobilevit export`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mobilevit.cli.console import stdout, warn
from mobilevit.cli.options import (
    FLAT,
    Flag,
    SampleImages,
    WeightsArgument,
    WeightsOptions,
    choices,
    expand,
    expand_data,
    warn_of_transparency,
)
from mobilevit.export_options import ARTIFACT_SUFFIXES, BackendName, ExportOptions

BackendChoice = Literal[BackendName, "all"]

if TYPE_CHECKING:
    from rich.table import Table

    from mobilevit.export import Artifact
    from mobilevit.export.quantization import Sensitivity


@dataclass(frozen=True)
class Export:
    """Export weights for phones, boards, servers and browsers.

    Each artifact is run in its runtime and compared with torch before it is written.
    """

    weights: WeightsArgument
    to: Annotated[tuple[BackendChoice, ...], tyro.conf.arg(metavar=f"{choices(BackendChoice)}...")] = ("onnx",)
    """Runtimes to export for; all: those that are installed."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("exports")
    """Output folder. Files are named after the run folder or the weights file, or after the architecture if that name
    is generic (model.safetensors)."""
    options: Annotated[ExportOptions, FLAT, tyro.conf.FlagCreatePairsOff] = ExportOptions()
    sample_images: Annotated[SampleImages, FLAT] = SampleImages()
    data: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Labeled dataset, as for mobilevit train. Its training split verifies and calibrates in place of --images. int8
    artifacts are evaluated on its validation split, and both figures are printed."""
    sensitivity: Flag = False
    """Print the error that int8 causes in each group of layers, measured on --images. No file is written."""
    json: Flag = False
    """Print one JSON object per line instead of a table."""
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        """Export, and print a table."""
        weights = self.weights_options.read_for_inference(self.weights)
        images = self.sample_images.read()
        if self.sensitivity:
            from mobilevit.export import sensitivity

            sensitivities = sensitivity(weights, images)
            if self.json:
                for one in sensitivities:
                    print(json.dumps(asdict(one)), flush=True)
            else:
                stdout().print(_sensitivity_table(sensitivities))
            return 0
        from mobilevit.export import export_each

        if expand(self.out).exists() and not expand(self.out).is_dir():
            raise ValueError(f"{self.out}: is a file; give a folder to write to")
        artifacts = []
        for artifact in export_each(
            weights,
            self._backends(),
            expand(self.out),
            self.options,
            images=images,
            data=None if self.data is None else expand_data(self.data),
            source=self.weights,
            prefix=_file_prefix(self.weights),
        ):
            if self.json:  # at once, so that an interruption does not lose it
                print(json.dumps(artifact.to_dict(), ensure_ascii=False), flush=True)
            artifacts.append(artifact)
        warn_of_transparency(weights)
        if not self.json:
            stdout().print(_artifact_table(artifacts))
            self._print_notes(artifacts)
        return 0

    def _backends(self) -> list[str]:
        if "all" not in self.to:
            return list(self.to)
        from mobilevit.export import installed

        names = [name for name in ARTIFACT_SUFFIXES if installed(name)]
        if not names:
            raise ValueError("no runtime to export for is installed; run: pip install 'mobilevit[onnx]', for example")
        missing = [f"{name} (mobilevit[{name}])" for name in ARTIFACT_SUFFIXES if name not in names]
        if missing:
            warn(f"not installed, skipped: {', '.join(missing)}")
        return names

    def _print_notes(self, artifacts: list[Artifact]) -> None:
        origin = (
            "real images"
            if self.sample_images.images or self.data
            else "synthetic images; give real ones with --images"
        )
        num_images = max((a.agreement.num_images for a in artifacts if a.agreement), default=0)
        print(f"compared with torch on {num_images} {origin}" if num_images else "no artifact could be run")
        for a in artifacts:
            if a.accuracy:
                groups = ", ".join(a.spec.float_groups) or "none"
                print(f"{a.backend}: {a.accuracy.describe()}; in float: {groups}")
            if a.speedup_over_fp32 is not None:
                speed = f"{a.speedup_over_fp32:.2f} times the speed of fp32 here"
                print(f"{a.backend}: int8 has {speed}" + (", outside of a browser" if a.spec.browser else ""))


def _file_prefix(source: str) -> str:
    """Start of the artifacts' names: the name of the run folder or the weights file; "" if that name is generic."""
    path = expand(Path(source))
    if (path / "run.json").is_file():
        return path.resolve().name
    if not path.is_file():
        return ""
    if path.stem not in ("model", "raw", "best", "pytorch_model"):
        return path.stem
    if not path.with_name("run.json").is_file():
        return ""
    return path.resolve().parent.name + ("" if path.stem == "model" else f"_{path.stem}")


def _table(*names: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    return Table(names[0], *(Column(name, justify="right") for name in names[1:]), box=SIMPLE)


def _artifact_table(artifacts: list[Artifact]) -> Table:
    table = _table("file", "MB", "max error", "same prediction", "median ms", "operators", "fallback operators")
    for a in artifacts:
        measured = ("converted, not run", "-", "-")
        if a.agreement:
            same = f"{100 * a.agreement.prediction_agreement:.1f} % of {a.agreement.prediction_unit}"
            measured = (f"{a.agreement.max_error:.1e}", same, f"{a.latency_ms:.2f}")
        fallback = ", ".join(sorted(set(a.operators.fallback))) or "none"
        table.add_row(str(a.path), f"{a.num_bytes / 1e6:.2f}", *measured, str(a.operators.num_operators), fallback)
    return table


def _sensitivity_table(sensitivities: list[Sensitivity]) -> Table:
    table = _table("int8 layers", "layers", "weights", "RMS error", "same prediction")
    for s in sensitivities:
        agreement = f"{100 * s.prediction_agreement:.1f} %"
        table.add_row(s.group, str(s.num_layers), f"{s.num_weights:,}", f"{s.rms_error:.4f}", agreement)
    return table
