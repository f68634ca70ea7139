"""ONNX Runtime Web in Chromium: our exports compared with those of timm and transformers, in the same page.

    python benchmarks/browser.py --out benchmarks/browser_<hardware>_<yyyymm>
    python benchmarks/browser.py --models xxs --precisions fp32 int8 --profile    # also milliseconds per operator

Requirements: Chromium, `pip install -e '.[onnx,compare,browser-test]'`, and ONNX Runtime Web, which `mobilevit demo`
downloads with npm.

A page loads all models of one size and times them interleaved, once on one thread of WebAssembly, once on several, and
on WebGPU, if Chromium finds a GPU. Otherwise WebGPU is emulated on the CPU: the outputs are compared with those of
PyTorch, and nothing is timed. Load times and memory are measured in a new browser for each model. int8 is that of
`mobilevit export --browser`, for all models.
"""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from playwright.sync_api import Error, Page, sync_playwright
from results import markdown_table, print_table

from mobilevit.benchmark.models import BenchmarkModel, models_from_weights
from mobilevit.benchmark.rivals import random_weights
from mobilevit.benchmark.timing import Spread, machine
from mobilevit.demo import Server
from mobilevit.demo.runtime import FILES, PACKAGE, find_runtime
from mobilevit.export_options import Precision

WORKER = Path(__file__).with_name("browser_worker.js")
FLAGS = ("--headless", "--no-sandbox", "--no-first-run", "--disable-background-networking")
WEBGPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan")
EMULATED_WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
MAX_THREADS = 4  # as on the page of mobilevit demo
RUNTIMES = {  # files that a page downloads
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
COLUMNS = ("engine", "target", "model", "precision", "time / ours", "p10", "p90", "time / fp32", "p10, ms", "max error")
LOAD_COLUMNS = (
    *("engine", "target", "model", "precision", "first result, ms", "memory, MB", "model, MB", "gzip"),
    *("runtime, MB", "gzip"),
)
NOTE = (
    "'time / ours' is the time of a model divided by that of our model in the same precision: above 1, ours is faster. "
    "'time / fp32' compares a model with its own fp32 export: below 1, the precision is faster. Both are medians over "
    "the rounds, in which all models of a size are timed interleaved in one page; p10 and p90 are the percentiles of "
    "the first. 'max error' is the largest difference of an output from PyTorch in fp32, in standard deviations."
)
LOAD_NOTE = (
    "'first result' is the time from opening the page with an empty cache to the first output, with a server on this "
    "machine: download, compilation, loading and one run; median of {loads} loads. 'memory' is the size of the memory "
    "of WebAssembly after it, without that of a GPU."
)
PROFILE_COLUMNS = ("model", "operator", "ms")
PROFILE_NOTE = "Of each operator the fastest run, summed by type."
START_WORKER = """() => {
    const worker = new Worker("worker.js", { type: "module" });
    window.request = (message) => new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data.value));
        worker.onerror = (event) => reject(new Error(event.message));
        worker.postMessage(message);
    });
}"""


@dataclass(frozen=True)
class Engine:
    """What computes in the browser. `is_timed` is false for a GPU that is emulated on the CPU."""

    name: str
    provider: str
    threads: int
    flags: tuple[str, ...] = ("--disable-gpu",)
    is_timed: bool = True


class Chromium:
    """A new browser with an empty cache, and a page of `url` with the worker."""

    def __init__(self, page: Page, version: str, console: list[str]):
        self.page, self.version, self.console = page, version, console

    def request(self, operation: str, **options: Any) -> Any:
        return self.page.evaluate("message => request(message)", {"operation": operation, **options})


@contextmanager
def opened(executable: str, url: str, flags: Sequence[str]) -> Iterator[Chromium]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[*FLAGS, *flags])
        page, console = browser.new_page(), []
        page.on("console", lambda message: console.append(message.text))
        page.goto(url)
        page.evaluate(START_WORKER)
        yield Chromium(page, browser.version, console)
        browser.close()


def find_engines(executable: str, url: str, threads: int) -> tuple[list[Engine], str, list[str]]:
    """The engines, the version of Chromium, and notes on WebGPU."""
    engines = [Engine(f"WASM, {n} thread{'s' * (n > 1)}", "wasm", n) for n in dict.fromkeys((1, threads))]
    script = """async () => {
        const adapter = await navigator.gpu?.requestAdapter();
        return adapter ? [adapter.info.vendor, adapter.info.architecture, adapter.info.isFallbackAdapter] : null;
    }"""
    for flags, is_timed in ((WEBGPU, True), (EMULATED_WEBGPU, False)):
        with opened(executable, url, flags) as chromium:
            adapter, version = chromium.page.evaluate(script), chromium.version
        if adapter and is_timed != adapter[2]:
            name = "WebGPU" if is_timed else "WebGPU, emulated"
            note = f"WebGPU: {adapter[0]} {adapter[1]}" + ("" if is_timed else ", emulated on the CPU, not timed")
            return [*engines, Engine(name, "webgpu", 1, flags, is_timed)], version, [note]
    return engines, version, ["WebGPU: Chromium finds no GPU and cannot emulate one; not measured"]


def write_folder(folder: Path, models: Sequence[BenchmarkModel], runtime: Path) -> None:
    """The page: worker, runtime, and the input of the models, which are in `folder` already."""
    (folder / "ort").mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(runtime / name, folder / "ort" / name.replace(".bundle.min.mjs", ".js"))
    (folder / "index.html").write_text("<!doctype html><title>benchmark</title><link rel=icon href=data:,>")
    shutil.copyfile(WORKER, folder / "worker.js")
    if models:
        (folder / "input.bin").write_bytes(models[0].example_input().tobytes())


def time_models(
    executable: str,
    url: str,
    engine: Engine,
    target: str,
    models: Sequence[BenchmarkModel],
    rounds: int,
    notes: list[str],
) -> list[dict[str, Any]]:
    """The rows of one engine and one size. A GPU may be unable to load a model; the reason is appended to `notes`."""
    with opened(executable, url, engine.flags) as chromium:
        start(chromium, engine, models[0])
        errors, loaded = [], []
        for model in models:
            try:
                outputs = chromium.request("load", model=model.path.name, provider=engine.provider)
            except Error as error:
                if engine.provider == "wasm":
                    raise
                note = f"{engine.name}: no {model.precision} ({error.message.splitlines()[0]})"
                notes += [note] if note not in notes else []
                continue
            loaded.append(model)
            errors.append(model.error([np.array(x, np.float32).reshape(y.shape) for x, y in expected(model, outputs)]))
        times_ms = np.array(chromium.request("time", rounds=rounds)) if engine.is_timed else None
    rows = []
    for i, model in enumerate(loaded):
        row: dict[str, Any] = {
            "engine": engine.name,
            "target": target,
            "model": model.name if model.baseline else "ours",
        }
        row |= {"precision": model.precision, "error": errors[i]}
        if times_ms is not None:
            ours = next(k for k, x in enumerate(loaded) if x.precision == model.precision and not x.baseline)
            full = next(k for k, x in enumerate(loaded) if x.precision == "fp32" and x.name == model.name)
            row["ratio"] = asdict(Spread.of(times_ms[i] / times_ms[ours])) if i != ours else None
            row["fp32_ratio"] = asdict(Spread.of(times_ms[i] / times_ms[full])) if i != full else None
            row["latency_ms"] = asdict(Spread.of(times_ms[i]))
        rows.append(row)
    return rows


def expected(model: BenchmarkModel, outputs: Sequence[Sequence[float]]) -> Iterator[tuple[Sequence[float], np.ndarray]]:
    assert model.expected is not None
    return zip(outputs, model.expected, strict=True)


def start(chromium: Chromium, engine: Engine, model: BenchmarkModel) -> None:
    is_isolated = chromium.request(
        "start", provider=engine.provider, threads=engine.threads, shape=[int(side) for side in model.shape]
    )
    if not is_isolated:
        raise SystemExit("the page is not cross-origin isolated, so it cannot use threads")


def measure_load(executable: str, url: str, engine: Engine, model: BenchmarkModel, loads: int) -> dict[str, Any]:
    """Time to the first result, memory and download size of one model."""
    times_ms, num_bytes = [], 0
    for _ in range(loads):
        with opened(executable, url, engine.flags) as chromium:
            started = time.perf_counter()
            chromium.page.goto(url)
            chromium.page.evaluate(START_WORKER)
            start(chromium, engine, model)
            chromium.request("load", model=model.path.name, provider=engine.provider)
            times_ms.append(1e3 * (time.perf_counter() - started))
            num_bytes = chromium.request("memory")
    runtime = [find_runtime() / name for name in RUNTIMES[engine.provider]]
    return {
        **{"engine": engine.name, "model": model.name if model.baseline else "ours", "precision": model.precision},
        **{"first_result_ms": statistics.median(times_ms) if engine.is_timed else None, "memory_bytes": num_bytes},
        **{"model_bytes": model.num_bytes, "model_gzip_bytes": gzip_size([model.path])},
        **{"runtime_bytes": sum(file.stat().st_size for file in runtime), "runtime_gzip_bytes": gzip_size(runtime)},
    }


def gzip_size(files: Sequence[Path]) -> int:
    """Bytes after compression, as a server may send them."""
    return sum(len(gzip.compress(file.read_bytes(), 6)) for file in files)


def profile_model(executable: str, url: str, engine: Engine, model: BenchmarkModel, rounds: int) -> dict[str, float]:
    """Milliseconds per type of operator: the sum over its operators of the fastest run of each."""
    with opened(executable, url, engine.flags) as chromium:
        start(chromium, engine, model)
        chromium.request("load", model=model.path.name, provider=engine.provider, profile=True)
        chromium.request("profile", rounds=rounds)
        chromium.page.wait_for_timeout(1000)  # for the last lines
        lines = [line.strip().rstrip(",") for message in chromium.console for line in message.splitlines()]
    fastest: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))
    for line in lines:
        if '"cat" : "Node"' in line and "_kernel_time" in line:
            event = json.loads(line)
            key = (event["args"]["op_name"], event["args"]["node_index"])
            fastest[key] = min(fastest[key], event["dur"] / 1e3)
    sums: dict[str, float] = defaultdict(float)
    for (operator, _), milliseconds in fastest.items():
        sums[operator] += milliseconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table of times."""
    ratio, own, latency = (row.get(key) for key in ("ratio", "fp32_ratio", "latency_ms"))
    return (
        *(row[key] for key in ("engine", "target", "model", "precision")),
        *(
            f"{ratio[key]:.2f}" if ratio else "1" if latency and key == "median" else ""
            for key in ("median", "p10", "p90")
        ),
        f"{own['median']:.2f}" if own else "",
        f"{latency['p10']:.1f}" if latency else "not timed",
        f"{row['error']:.1g}",
    )


def load_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table of load times."""
    return (
        *(row[key] for key in ("engine", "target", "model", "precision")),
        "not timed" if row["first_result_ms"] is None else f"{row['first_result_ms']:.0f}",
        f"{row['memory_bytes'] / 1e6:.0f}",
        *(f"{row[f'{key}_bytes'] / 1e6:.1f}" for key in ("model", "model_gzip", "runtime", "runtime_gzip")),
    )


def report(values: dict[str, Any], facts: str, out: Path | None) -> None:
    """Print the tables, and write OUT.md and OUT.json."""
    profile = [(model, name, f"{ms:.2f}") for model, times in values["profiles"].items() for name, ms in times.items()]
    tables = [
        (f"Browser, {values['size_px']} px, batch size 1", NOTE, COLUMNS, list(map(cells, values["rows"]))),
        (
            "First load, download and memory of our models",
            LOAD_NOTE.format(loads=values["num_loads"]),
            LOAD_COLUMNS,
            list(map(load_cells, values["loads"])),
        ),
    ]
    if profile:
        tables.append(("Operators, WASM, 1 thread", PROFILE_NOTE, PROFILE_COLUMNS, profile))
    lines = []
    for title, note, columns, rows in tables:
        print_table(title, note, columns, rows)
        lines += [
            f"#{'#' * bool(lines)} {title}",
            "",
            *([] if lines else [facts, "", *(f"- {note}" for note in values["notes"]), ""]),
        ]
        lines += [note, "", *markdown_table(columns, rows), ""]
    print("\n".join(values["notes"]))
    if out:
        out.with_name(out.name + ".md").write_text("\n".join(lines))
        out.with_name(out.name + ".json").write_text(json.dumps(values) + "\n")


def main(
    models: tuple[str, ...] = ("xxs", "xs", "s"),
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8"),
    against: tuple[str, ...] = ("self", "timm", "transformers", "torchvision:mobilenet_v2"),
    rounds: int = 30,
    loads: int = 3,
    size: int = 256,
    threads: int | None = None,
    profile: bool = False,
    chromium: Path | None = None,
    out: Path | None = None,
) -> None:
    """Time MobileViT in the browser, compared with models of other libraries.

    Args:
        models: published sizes.
        precisions: of the exports; fp32 is always included.
        against: models to compare with, see mobilevit benchmark --help; self is the control.
        rounds: each round times every model once.
        loads: loads of our models in a new browser, of which the median is reported.
        size: image size in pixels.
        threads: threads of the second run; default: the number of cores, at most 4.
        profile: also print the milliseconds per operator of our models and timm's on one thread.
        chromium: the browser; default: chromium, chromium-browser or google-chrome.
        out: write OUT.md and OUT.json.
    """
    executable = str(
        chromium or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
    )
    if not executable:
        raise SystemExit("there is no Chromium on this machine; install it, or give its path with --chromium")
    setting = machine(1)
    threads = threads or min(MAX_THREADS, setting.num_cores or 1)
    chosen: tuple[Precision, ...] = ("fp32", *(x for x in precisions if x != "fp32"))
    rows, load_rows, profiles = [], [], {}
    with tempfile.TemporaryDirectory() as temporary, Server(temporary) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder, url = Path(temporary), server.url
        write_folder(folder, [], find_runtime())
        engines, version, notes = find_engines(executable, url, threads)
        for target in models:
            weights = random_weights(target)
            written = models_from_weights(
                target,
                weights,
                folder,
                runtimes=("onnx",),
                precisions=chosen,
                size=(size, size),
                against=against,
                browser=True,
            )
            write_folder(folder, written, find_runtime())
            for engine in engines:
                timed = time_models(executable, url, engine, target, written, rounds, notes)
                rows += timed
                loaded = {row["precision"] for row in timed if row["model"] == "ours"}
                ours = (x for x in written if not x.baseline and x.precision in loaded)
                load_rows += [{"target": target} | measure_load(executable, url, engine, x, loads) for x in ours]
            for model in (x for x in written if profile and (not x.baseline or x.name == "timm")):
                times = profile_model(executable, url, engines[0], model, rounds)
                profiles[f"{target} {model.name if model.baseline else 'ours'} {model.precision}"] = times
        server.shutdown()
    values = {"benchmark": "browser", **vars(setting), "chromium": version, "runtime": PACKAGE, "size_px": size}
    values |= {"num_rounds": rounds, "num_loads": loads, "notes": notes}
    values |= {"rows": rows, "loads": load_rows, "profiles": profiles}
    facts = f"{setting.describe()}; Chromium {version}, {PACKAGE}; {rounds} rounds"
    report(values, facts, out)


if __name__ == "__main__":
    tyro.cli(main)
