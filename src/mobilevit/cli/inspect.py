"""`mobilevit inspect`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilevit.cli.console import stdout, warn
from mobilevit.cli.options import (
    FLAT,
    RUN_FOLDER,
    SELF_CHECK,
    WEIGHTS,
    DeviceOptions,
    Flag,
    ImageOptions,
    WeightsOptions,
    choices,
    expand,
    expand_data,
    require,
)

if TYPE_CHECKING:
    from mobilevit.inspect import Inspection

Task = Literal["classify", "multilabel", "detect", "segment"]
Kind = Literal["unreadable", "unlabeled", "duplicates", "leaks", "overlaps", "label-errors"]
COUNTS: dict[Kind, tuple[str, ...]] = {
    "unreadable": ("unreadable",),
    "unlabeled": ("unlabeled",),
    "duplicates": ("exact_duplicates", "near_duplicates"),
    "leaks": ("leaks",),
    "overlaps": ("class_overlaps",),
    "label-errors": ("label_errors",),
}
MAX_ROWS = 20  # of the table of classes


@dataclass(frozen=True)
class Inspect:
    """Find unreadable images, copies, leaks between splits and label errors in a dataset.

    Every image is decoded. Equal pixels are exact duplicates; re-encoded and resized copies are near duplicates. With
    WEIGHTS, images whose label is probably wrong are found as well. The exit code is 0, also with findings, unless
    --fail-on is given.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Dataset, as for mobilevit train."""
    weights: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="WEIGHTS",
            help=f"Weights of any classifier, to find label errors: {WEIGHTS}; {RUN_FOLDER}.",
        ),
    ] = None
    task: Annotated[Task | None, tyro.conf.arg(metavar=choices(Task))] = None
    """Task of the labels. Default: detect or segment for a folder in one of their formats, otherwise classify."""
    near: float = 4.0
    """Largest RMS difference of near duplicates, in levels of 0 to 255 of thumbnails of 8 x 8 px; 0: equal pixels
    only."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Page to write (.html). An existing file is overwritten. Default: inspection.html; with --json, none."""
    json: Flag = False
    """Print all findings as one JSON object instead of tables."""
    fail_on: Annotated[tuple[Kind, ...], tyro.conf.arg(metavar="KIND...")] = ()
    """Exit with code 1 if there are findings of these kinds: unreadable, unlabeled, duplicates, leaks, overlaps
    (copies with different classes), label-errors."""
    batch_size: int = 32
    """Batch size in images, for WEIGHTS."""
    num_workers: int = 2
    """Number of processes that read images, for WEIGHTS; 0 reads them in the main process."""
    self_check: Annotated[Flag, SELF_CHECK] = True
    image_options: Annotated[ImageOptions, FLAT] = ImageOptions()
    device_options: Annotated[DeviceOptions, FLAT] = DeviceOptions()
    weights_options: Annotated[WeightsOptions, FLAT] = WeightsOptions()

    def run(self) -> int:
        require(self.near >= 0, "--near", self.near, "0 or more")
        if "label-errors" in self.fail_on and self.weights is None:
            raise ValueError("--fail-on is label-errors, which need weights; give WEIGHTS")
        out = expand(self.out) if self.out else None if self.json else Path("inspection.html")
        if out and out.suffix != ".html":
            raise ValueError(f"{out}: the file name must end in .html")
        self.image_options.apply()
        device = self.device_options.apply()
        weights = self.weights_options.read_for_inference(self.weights) if self.weights else None
        from mobilevit.embed import EmbedOptions
        from mobilevit.files import write_atomic
        from mobilevit.inspect import inspect_data
        from mobilevit.inspect.page import render_page

        inspection = inspect_data(
            expand_data(self.data),
            weights,
            task=self.task,
            near=self.near,
            num_threads=self.device_options.num_threads,
            options=EmbedOptions(self.batch_size, self.num_workers, device, self.self_check),
        )
        if out:
            write_atomic(out, render_page(inspection))
        if self.json:
            print(json.dumps(inspection.to_dict()))
        else:
            _print(inspection)
            print(f"{out}: {out.stat().st_size / 1e6:.1f} MB" if out else "")
        counts = inspection.counts()
        failed = [kind for kind in self.fail_on if any(counts[name] for name in COUNTS[kind])]
        if failed:
            warn(f"{self.data}: found {', '.join(failed)}")
        return 1 if failed else 0


def _print(inspection: Inspection) -> None:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    from mobilevit.inspect.page import TITLES

    c, console = inspection.collection, stdout()
    names = sorted(c.num_images, key=lambda name: (-sum(c.num_images[name].values()), name))
    units: list[tuple[str, dict[str, Any]]] = [("images", c.num_images)]
    units += [("boxes", c.num_boxes)] if c.num_boxes else []
    columns = [(split, unit, counts) for split in c.splits for unit, counts in units]
    classes = Table("class", *(Column(f"{split}, {unit}", justify="right") for split, unit, _ in columns), box=SIMPLE)
    for name in names[:MAX_ROWS]:
        classes.add_row(name, *(f"{counts[name][split]:,}" for split, _, counts in columns))
    classes.add_section()
    classes.add_row("all", *(f"{len(c.splits[s].images):,}" if u == "images" else "" for s, u, _ in columns))
    console.print(classes)
    if len(names) > MAX_ROWS:
        print(f"{len(names) - MAX_ROWS:,} smaller classes are not shown; --json prints all of them")
    sizes = Table("", *(Column(q, justify="right") for q in ("min", "25 %", "median", "75 %", "max")), box=SIMPLE)
    for name, values in inspection.size_quantiles().items():
        sizes.add_row(name.replace("_", " "), *(f"{value:,g}" for value in values))
    console.print(sizes)
    for title, counted in (("modes", c.modes), ("formats", c.formats)):
        print(f"{title}: {', '.join(f'{name} {num:,}' for name, num in counted.most_common())}")
    findings = Table(
        "finding", Column("groups", justify="right"), Column("images", justify="right"), "first", box=SIMPLE
    )
    groups = {
        "exact_duplicates": [group.images for group in inspection.groups if group.difference is None],
        "near_duplicates": [group.images for group in inspection.groups if group.difference is not None],
        "leaks": [group.images for group in inspection.leaks],
        "class_overlaps": [group.images for group in inspection.overlaps],
    }
    images = {
        "unreadable": sorted(c.problems),
        "unlabeled": c.unlabeled(),
        "label_errors": [error.image for error in inspection.label_check.errors] if inspection.label_check else [],
    }
    for kind, num in inspection.counts().items():
        if kind in groups:
            members = [image for group in groups[kind] for image in group]
            first = groups[kind][0][:2] if groups[kind] else ()
            cells = (f"{num:,}", f"{len(members):,}")
        else:
            first, cells = images[kind][:1], ("", f"{num:,}")
        findings.add_row(TITLES[kind], *cells, ", ".join(f"{c.split_name(i)}/{c.key(i)}" for i in first))
    console.print(findings)
