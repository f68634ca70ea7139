"""Time and memory against the image size and the batch size: ours, timm's, and MobileNetv2, one figure per runtime.

    python benchmarks/scaling.py --out benchmarks/scaling_<hardware>_<yyyymm>

As in runtimes.py, `mobilevit benchmark` times each point in a process of its own, with the models interleaved. Memory
is the peak of a new process that loads and runs the model, without Python and the runtime.
"""

from __future__ import annotations

import json
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from results import print_table, write_results
from runtimes import run_benchmark

from mobilevit.benchmark.timing import machine
from mobilevit.defaults import NUM_THREADS

RIVALS = ("timm", "torchvision:mobilenet_v2")
COLORS = ("#0072b2", "#d55e00", "#666666")  # ours and RIVALS; after Okabe and Ito, like the reports
COLUMNS = ("runtime", "px", "batch", "model", "time / ours", "ms per image", "memory, MB", "of peak")
NOTE = (
    "'time / ours' is the median over the rounds of the time of a model divided by that of ours: above 1, ours is "
    "faster. 'ms per image' is the median time of a batch divided by its size. Sizes are measured at batch size 1, "
    "batches at {size} px."
)
Row = dict[str, str | float | None]


def measure_point(network: str, runtime: str, size: int, batch: int, rounds: int, threads: int) -> list[Row]:
    """The models at one size and batch size."""
    options = ["--against", *RIVALS, "--rounds", str(rounds), "--num-threads", str(threads)]
    report = run_benchmark(network, runtime, ["fp32"], (batch,), size, options)
    return [
        {
            "runtime": runtime,
            "size_px": size,
            "batch_size": batch,
            "model": row["name"] if row["baseline"] else "ours",
            "ratio": row["ratio"]["median"] if row["ratio"] else None,
            "ms_per_image": row["latency_ms"]["p50"] / batch,
            "memory_bytes": row["memory_bytes"],
            "peak_fraction": row["peak_fraction"],
        }
        for row in report["rows"]
    ]


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    ratio, peak, memory = row["ratio"], row["peak_fraction"], row["memory_bytes"]
    return (
        *(str(row[key]) for key in ("runtime", "size_px", "batch_size", "model")),
        "1" if ratio is None else f"{ratio:.2f}",
        f"{row['ms_per_image']:.2f}",
        "" if memory is None else f"{float(memory) / 1e6:.0f}",
        "" if peak is None else f"{100 * float(peak):.0f} %",
    )


def draw(rows: list[Row], title: str, base_px: int, path: Path) -> None:
    """Time per image and memory of one runtime, against the image size (left) and the batch size (right)."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (key, label, other, fixed) in enumerate(
        (
            ("size_px", "image size, px (batch size 1)", "batch_size", 1),
            ("batch_size", f"batch size ({base_px} px)", "size_px", base_px),
        )
    ):
        for color, model in zip(COLORS, ("ours", *RIVALS), strict=True):
            line = [row for row in rows if row["model"] == model and row[other] == fixed]
            x = [row[key] for row in line]
            name = model.removeprefix("torchvision:")
            axes[0, column].plot(x, [row["ms_per_image"] for row in line], "o-", color=color, label=name)
            axes[1, column].plot(x, [float(row["memory_bytes"] or 0) / 1e6 for row in line], "o-", color=color)
        ticks = sorted({int(row[key] or 0) for row in rows if row[other] == fixed})
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("time per image, ms")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def main(
    out: Path,
    model: str = "xxs",
    runtimes: tuple[str, ...] = ("torch", "onnx", "openvino", "executorch"),
    sizes: tuple[int, ...] = (128, 192, 256, 384, 512, 768, 1024),
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    size: int = 256,
    rounds: int = 5,
    threads: int = NUM_THREADS,
) -> None:
    """Measure time and memory against the image size and the batch size, fp32.

    Args:
        out: write OUT.md, OUT.json and OUT_RUNTIME.png.
        model: a published size.
        runtimes: as for mobilevit benchmark.
        sizes: image sizes in pixels, at batch size 1.
        batches: batch sizes, at --size.
        size: image size in pixels for the batches.
        rounds: each round times every model once.
        threads: CPU threads.
    """
    setting = machine(threads)
    points = list(dict.fromkeys([*((px, 1) for px in sizes), *((size, batch) for batch in batches)]))
    rows: list[Row] = []
    for runtime in runtimes:
        for px, batch in points:
            rows += measure_point(model, runtime, px, batch, rounds, threads)
        of_runtime = [row for row in rows if row["runtime"] == runtime]
        draw(of_runtime, f"MobileViT-{model.upper()}, {runtime}", size, out.with_name(f"{out.name}_{runtime}.png"))
    figures = ", ".join(f"[{runtime}]({out.name}_{runtime}.png)" for runtime in runtimes)
    title, note = f"Scaling of MobileViT-{model.upper()}", f"{NOTE.format(size=size)} Figures: {figures}."
    lines = [cells(row) for row in rows]
    print_table(title, note, COLUMNS, lines)
    values = {"benchmark": "scaling", **vars(setting), "model": model, "num_rounds": rounds, "rows": rows}
    facts = f"{setting.describe()}; {threads} threads; {rounds} rounds"
    write_results(out, title, facts, note, COLUMNS, lines, json.dumps(values))


if __name__ == "__main__":
    tyro.cli(main)
