"""Sections of gpu.py about results and speed: peaks, parity, training, inference, attention, multi-scale training."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mobilevit.benchmark.cost import profile
from mobilevit.benchmark.rivals import randomize
from mobilevit.benchmark.timing import Spread, measure
from mobilevit.data.sampler import PAPER_SIZES_PX, BatchShapes
from mobilevit.models.fuse import fold_batch_norm
from mobilevit.models.mobilevit import ARCHITECTURES, Attention, MobileViT
from mobilevit.recipes import Optimizer, Precision
from mobilevit.self_check import compare_with_cpu
from mobilevit.training.optim import build_optimizer
from mobilevit.weights import NETWORKS, TaskName

OURS = "mobilevit"
NUM_CLASSES = 1000


@dataclass
class Context:
    """One section: its options and its records.

    `file` gets one JSON object per line: {"row": ...}, {"note": ...} or {"error": ...}, each written at once, so that a
    killed section keeps the rows before. `previous` has the rows of the sections before, by section.
    """

    device: torch.device
    is_quick: bool
    deadline: float  # of time.monotonic()
    file: Path
    previous: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def row(self, **values: Any) -> None:
        rounded = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in values.items()}
        self._write({"row": rounded})

    def note(self, text: str) -> None:
        self._write({"note": text})

    @contextlib.contextmanager
    def item(self, name: str) -> Iterator[None]:
        """Protect an item of the section: record an exception and continue. Frees memory afterwards."""
        try:
            yield
        except Exception:
            self._write({"error": f"{name}\n{traceback.format_exc()}"})
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def has_time(self, name: str, seconds: float = 0) -> bool:
        """Whether an item of about `seconds` can start; otherwise it is recorded as skipped."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.note(f"skipped, no time left: {name}")
        return False

    def needs_cuda(self, name: str) -> bool:
        """Whether the device is not CUDA; the item is then recorded as skipped."""
        if not self.is_cuda:
            self.note(f"skipped, needs CUDA: {name}")
        return not self.is_cuda

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def sizes(self) -> tuple[str, ...]:
        """The smallest and the largest network first: if time runs out, they matter most."""
        return ("xxs",) if self.is_quick else ("xxs", "s", "xs")

    @property
    def size_px(self) -> int:
        return 64 if self.is_quick else 256

    def rounds(self, number: int) -> int:
        return 2 if self.is_quick else number

    def compile(self, model: nn.Module, mode: str = "default") -> Callable[[Tensor], Tensor]:
        """torch.compile with one graph per shape. The reduced form traces without generating code."""
        if self.is_quick:
            return torch.compile(model, backend="eager", dynamic=False)
        return torch.compile(model, mode=mode, dynamic=False)

    def peak(self, name: str) -> float | None:
        """A peak that the section `peaks` measured, in FLOP/s or bytes/s."""
        rows = [row for row in self.previous.get("peaks", []) if row["peak"] == name]
        return rows[0]["per_second"] if rows else None

    def _write(self, record: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(next(iter(record.values())), flush=True)


def synchronized(context: Context, run: Callable[[], Any]) -> Callable[[], None]:
    """`run`, followed by a wait for the device."""

    def call() -> None:
        run()
        if context.is_cuda:
            torch.cuda.synchronize()

    return call


def use_tf32(is_used: bool) -> None:
    """Allow or forbid TF32 in convolutions and matrix products. By default PyTorch allows it in convolutions only."""
    torch.backends.cudnn.allow_tf32 = is_used
    torch.backends.cuda.matmul.allow_tf32 = is_used


# --- Peaks -----------------------------------------------------------------------------------------------------------


def peaks(context: Context) -> None:
    """Measured peaks of the card: matrix products by precision, and a copy in memory."""
    device, side = context.device, 256 if context.is_quick else 8192
    if context.is_cuda:
        properties = torch.cuda.get_device_properties(device)
        context.note(
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs, "
            f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}, "
            f"cuDNN {torch.backends.cudnn.version()}"
        )
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
        ("TF32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        if name in ("TF32", "float16") and context.needs_cuda(name):
            continue
        with context.item(name):
            use_tf32(tf32)
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            (times_ms,) = measure(
                [synchronized(context, partial(torch.mm, a, b, out=out))], context.rounds(20), pause_seconds=0
            )
            per_second = 2 * side**3 / (1e-3 * float(np.percentile(times_ms, 10)))
            context.row(peak=name, per_second=per_second, unit="FLOP/s", size=f"{side} x {side}")
    use_tf32(False)
    with context.item("copy"):
        source = torch.zeros(2**22 if context.is_quick else 2**31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        (times_ms,) = measure(
            [synchronized(context, partial(target.copy_, source))], context.rounds(20), pause_seconds=0
        )
        per_second = 2 * source.nbytes / (1e-3 * float(np.percentile(times_ms, 10)))
        context.row(peak="copy", per_second=per_second, unit="bytes/s", size=f"{source.nbytes / 2**20:.0f} MiB")


# --- Parity ----------------------------------------------------------------------------------------------------------


def parity(context: Context) -> None:
    """Outputs, gradients and weight update of every network and head against float32 on the CPU."""
    tasks: tuple[tuple[TaskName, int], ...] = (("classify", NUM_CLASSES), ("detect", 80), ("segment", 21))
    modes: tuple[tuple[Precision, bool], ...] = (
        ("float32", False),
        ("float32", True),
        ("bfloat16", False),
        ("float16", False),
    )
    for size in context.sizes:
        for task, num_classes in tasks:
            model = randomize(NETWORKS[task](size, num_classes=num_classes), seed=0).to(context.device)
            for precision, tf32 in modes:
                name = f"{size} {task} {precision}{' TF32' if tf32 else ''}"
                if (tf32 or precision == "float16") and context.needs_cuda(name):
                    continue
                if not context.has_time(name, 3):
                    continue
                with context.item(name):
                    use_tf32(tf32)
                    differences = compare_with_cpu(
                        model, context.size_px, precision, partial(build_optimizer, recipe=Optimizer())
                    )
                    context.row(
                        network=size,
                        task=task,
                        precision=f"{precision}{', TF32' if tf32 else ''}",
                        differences=", ".join(map(str, differences)),
                        passed=all(difference.value <= difference.limit for difference in differences),
                    )
    use_tf32(False)


# --- Training and inference ------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Counts the bytes that eager operators read and write: all inputs and outputs, each once, except of views."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.num_bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        return out


def bytes_per_image(model: nn.Module, size_px: int, *, is_training: bool) -> float:
    """Memory traffic of eager operators in bfloat16, counted on the CPU with two images."""
    model = copy.deepcopy(model).cpu().train(is_training)
    images = torch.rand(2, 3, size_px, size_px)
    with Traffic() as traffic:
        if is_training:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images), torch.zeros(2, dtype=torch.long))
            loss.backward()
        else:
            with torch.no_grad():
                model(images.to(next(model.parameters()).dtype))
    return traffic.num_bytes / 2


def flops_per_image(model: MobileViT, size_px: int, *, is_training: bool) -> float:
    """Two per multiplication and addition; a backward pass has twice as many as a forward pass."""
    cost = profile(model, (size_px, size_px))
    return (6 if is_training else 2) * (cost.num_macs + cost.num_attention_macs)


def record_times(
    context: Context, labels: dict[str, Any], times_ms: dict[str, np.ndarray], batch: int, work: tuple[float, float]
) -> None:
    """One row per model. `work` is FLOP and bytes per image of ours; bytes are 0 if operators are fused."""
    for name, times in times_ms.items():
        median_ms = float(np.median(times))
        ratio = Spread.of(times / times_ms[OURS])
        fractions = {}
        if name.startswith(OURS):
            for title, amount, peak in zip(("compute", "memory"), work, ("bfloat16", "copy"), strict=True):
                if (per_second := context.peak(peak)) and amount:
                    fractions[f"{title}_peak_fraction"] = amount * batch / (1e-3 * median_ms) / per_second
        context.row(
            **labels,
            batch=batch,
            model=name,
            time_over_ours=ratio.median,
            p10=ratio.p10,
            p90=ratio.p90,
            ms=median_ms,
            images_per_second=1e3 * batch / median_ms,
            **fractions,
        )


def training(context: Context) -> None:
    """Training steps in bfloat16: ours and timm's, eager, compiled, and with CUDA graphs."""
    from training import build_models, build_step, check_agreement

    device, px, batch = context.device, context.size_px, 4 if context.is_quick else 128
    images = torch.rand(batch, 3, px, px, device=device)
    labels = torch.randint(0, NUM_CLASSES, (batch,), device=device)
    fastest_layout: dict[str, str] = {}

    def steps_of(size: str, names: list[str] | None, mode: str | None) -> dict[str, Callable[[], None]]:
        models = build_models(size, NUM_CLASSES, device.type)
        chosen = {name: model for name, model in models.items() if "AdamW" not in name and (not names or name in names)}
        if not names:
            use_tf32(False)  # batch statistics enlarge rounding errors
            difference = check_agreement(chosen, images, labels, limit=0.01)
            torch.backends.cudnn.allow_tf32 = True  # the default
            context.note(f"{size}: loss and gradient norm of ours and timm's differ by at most {difference:.1e}")
        return {
            name: build_step(
                name, model, images, labels, autocast=True, run=context.compile(model, mode) if mode else model
            )
            for name, model in chosen.items()
        }

    compiled = (("default", "compiled"), ("reduce-overhead", "compiled, CUDA graphs"))
    for size, mode, title in [
        *((size, None, "eager") for size in context.sizes),
        *((size, mode, title) for size in context.sizes for mode, title in compiled),
    ]:
        name = f"{size} {title}"
        if mode == "reduce-overhead" and context.needs_cuda(name):
            continue
        if not context.has_time(name, 0 if context.is_quick else (5 if mode is None else 25)):
            continue
        with context.item(name):
            torch.compiler.reset()
            names = [OURS, fastest_layout.get(size, "timm, NHWC")] if mode else None
            started = time.monotonic()
            steps = steps_of(size, names, mode)
            times = measure(list(steps.values()), context.rounds(15), pause_seconds=0)
            times_ms = dict(zip(steps, times, strict=True))
            model = MobileViT(size)
            work = flops_per_image(model, px, is_training=True), 0.0
            if mode is None:
                work = work[0], bytes_per_image(model, px, is_training=True)
                layouts = ("timm, NCHW", "timm, NHWC")
                fastest_layout[size] = min(layouts, key=lambda layout: np.median(times_ms[layout]))
            record_times(context, {"network": size, "mode": title}, times_ms, batch, work)
            ratio = min(np.median(times_ms[n] / times_ms[OURS]) for n in times_ms if n in ("timm, NCHW", "timm, NHWC"))
            context.note(
                f"{name}: timm's faster layout takes {ratio:.2f} times as long as ours (goal: {1.2 if mode else 1.5}); "
                f"{time.monotonic() - started:.0f} s with compilation and measurement"
            )


def inference(context: Context) -> None:
    """Inference in bfloat16 with folded batch norms: eager, compiled with CUDA graphs, AOTInductor; timm's unfolded."""
    from training import build_models

    px, batches = context.size_px, (1, 2) if context.is_quick else (32, 1, 256)

    def networks_of(size: str) -> dict[str, nn.Module]:
        models = build_models(size, NUM_CLASSES, context.device.type)
        networks = {name: models[name].eval() for name in (OURS, "timm, NCHW", "timm, NHWC")}
        networks[OURS] = fold_batch_norm(networks[OURS])
        return {name: network.to(torch.bfloat16) for name, network in networks.items()}

    def images_of(batch: int) -> Tensor:
        return torch.rand(batch, 3, px, px, device=context.device, dtype=torch.bfloat16)

    def time_all(title: str, size: str, batch: int, runs: dict[str, Callable[[Tensor], Tensor]], num_bytes: float):
        images = images_of(batch)
        inputs = {n: images.contiguous(memory_format=torch.channels_last) if "NHWC" in n else images for n in runs}
        calls = [synchronized(context, partial(infer, run, inputs[name])) for name, run in runs.items()]
        times = measure(calls, context.rounds(25), pause_seconds=0)
        work = flops_per_image(MobileViT(size), px, is_training=False), num_bytes
        record_times(context, {"network": size, "mode": title}, dict(zip(runs, times, strict=True)), batch, work)

    for size in context.sizes:
        with context.item(f"{size} eager"):
            networks = networks_of(size)
            num_bytes = bytes_per_image(networks[OURS], px, is_training=False)
            for batch in batches:
                if context.has_time(f"{size} eager, batch {batch}"):
                    time_all("eager", size, batch, dict(networks), num_bytes)
    for size in context.sizes:
        name = f"{size} AOTInductor"
        if not context.has_time(name, 0 if context.is_quick else 30):
            continue
        with context.item(name):
            network = networks_of(size)[OURS]
            package = compile_ahead(context, network, images_of(4))
            for batch in batches:
                images = images_of(batch)
                expected, found = infer(network, images).float(), infer(package, images).float()
                difference = float((found - expected).norm() / expected.norm())
                context.note(f"{name}, batch {batch}: relative difference from eager {difference:.1e}")
                title = "exported" if context.is_quick else "AOTInductor"
                time_all(title, size, batch, {OURS: package, "mobilevit, eager": network}, 0)
    for batch in batches:
        for size in context.sizes:
            name = f"{size} compiled, batch {batch}"
            if not context.has_time(name, 0 if context.is_quick else 15):
                continue
            with context.item(name):
                torch.compiler.reset()
                networks = networks_of(size)
                mode, title = "default", "compiled"
                if context.is_cuda:
                    mode, title = "reduce-overhead", "compiled, CUDA graphs"
                compiled = {n: context.compile(networks[n], mode) for n in (OURS, "timm, NHWC")}
                time_all(title, size, batch, compiled, 0)


def infer(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.inference_mode():
        return run(images)


def compile_ahead(context: Context, network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The network as an AOTInductor package for any batch size. The reduced form exports without generating code."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
        if context.is_quick:
            return program.module()
        return aoti_load_package(aoti_compile_and_package(program, package_path=str(Path(folder) / "network.pt2")))


# --- Attention -------------------------------------------------------------------------------------------------------


class PaddedAttention(nn.Module):
    """`Attention` with heads that are zero-padded to a multiple of 8; the same outputs and gradients.

    The added rows of the qkv weights and the added columns of the output weights are zero. Their gradients are products
    with each other, hence zero as well, so training keeps them.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        dim, self.num_heads = attention.out.in_features, attention.num_heads
        head, padded = dim // self.num_heads, -(-dim // self.num_heads // 8) * 8
        self.scale, self.padded = head**-0.5, padded
        self.qkv = nn.Linear(dim, 3 * self.num_heads * padded)
        self.out = nn.Linear(self.num_heads * padded, dim)
        pad = (0, padded - head)
        with torch.no_grad():
            weight, bias = attention.qkv.weight.T.reshape(dim, 3, self.num_heads, head), attention.qkv.bias
            self.qkv.weight.copy_(F.pad(weight, pad).reshape(dim, -1).T)
            self.qkv.bias.copy_(F.pad(bias.reshape(3, self.num_heads, head), pad).reshape(-1))
            self.out.weight.copy_(F.pad(attention.out.weight.reshape(dim, self.num_heads, head), pad).reshape(dim, -1))
            self.out.bias.copy_(attention.out.bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, _ = x_BND.shape
        qkv = self.qkv(x_BND).reshape(B, N, 3, self.num_heads, self.padded)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(x.transpose(1, 2).reshape(B, N, -1))


def attention(context: Context) -> None:
    """Attention with heads of their own width and zero-padded to a multiple of 8, and its fraction of the network."""
    batch, px = (2, 64) if context.is_quick else (128, 256)
    for size in context.sizes:
        transformers = (stage.transformer for stage in ARCHITECTURES[size].stages)
        for i, dim in enumerate(transformer.dim for transformer in transformers if transformer):
            num_tokens = (px // (16 << i)) ** 2
            name = f"{size} stage{i + 3}: width {dim // 4}, {num_tokens} tokens"
            if context.has_time(name):
                with context.item(name):
                    time_attention(context, size, f"stage{i + 3}", Attention(dim, 4), (4 * batch, num_tokens, dim))
    for size in context.sizes:
        with context.item(f"{size} fraction of attention"):
            time_share(context, size, batch, px)


def time_attention(context: Context, size: str, stage: str, ours: Attention, shape: tuple[int, int, int]) -> None:
    """Time the module and its padded form, forward and backward in bfloat16, and the kernels that support each."""
    torch.manual_seed(0)
    models = {"own width": ours.to(context.device), "padded": PaddedAttention(ours).to(context.device)}
    x = torch.randn(shape, device=context.device)
    with torch.no_grad():
        expected, found = (model(x) for model in models.values())
    difference = float((found - expected).norm() / expected.norm())

    def step(model: nn.Module) -> None:
        with torch.autocast(context.device.type, torch.bfloat16):
            out = model(x)
        out.backward(out.detach())
        model.zero_grad()

    def forward(model: nn.Module) -> None:
        with torch.inference_mode(), torch.autocast(context.device.type, torch.bfloat16):
            model(x)

    for title, run in (("forward", forward), ("forward and backward", step)):
        runs = [synchronized(context, partial(run, model)) for model in models.values()]
        own, padded = measure(runs, context.rounds(30), pause_seconds=0)
        ratio = Spread.of(own / padded)
        context.row(
            network=size,
            stage=stage,
            head_width=shape[2] // 4,
            padded_width=models["padded"].padded,
            tokens=shape[1],
            measured=title,
            own_ms=float(np.median(own)),
            padded_ms=float(np.median(padded)),
            padded_speedup=ratio.median,
            p10=ratio.p10,
            p90=ratio.p90,
            difference=difference,
        )
    for width in dict.fromkeys((shape[2] // 4, models["padded"].padded)):
        context.note(f"{size} {stage}, SDPA kernels at width {width}: {kernel_times(context, shape, width)}")


def kernel_times(context: Context, shape: tuple[int, int, int], width: int) -> str:
    """Time of each SDPA kernel on its own, forward, bfloat16, in the layout of our network."""
    B, N, _ = shape
    qkv = torch.randn(B, N, 3, 4, width, device=context.device, dtype=torch.bfloat16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    found = []
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            run = synchronized(context, partial(F.scaled_dot_product_attention, q, k, v))
            try:
                (times_ms,) = measure([run], context.rounds(10), pause_seconds=0)
                found.append(f"{name.lower()} {np.median(times_ms):.3f} ms")
            except RuntimeError:
                found.append(f"{name.lower()} unavailable")
    return ", ".join(found)


def time_share(context: Context, size: str, batch: int, px: int) -> None:
    """The time of an eager forward pass with and without SDPA, which is replaced by its third argument."""
    model = fold_batch_norm(randomize(MobileViT(size), seed=0)).to(context.device, torch.bfloat16)
    images = torch.rand(batch, 3, px, px, device=context.device, dtype=torch.bfloat16)
    run, sdpa = synchronized(context, partial(infer, model, images)), F.scaled_dot_product_attention

    def without() -> None:
        F.scaled_dot_product_attention = lambda q, k, v: v
        try:
            run()
        finally:
            F.scaled_dot_product_attention = sdpa

    whole, rest = measure([run, without], context.rounds(20), pause_seconds=0)
    context.note(
        f"{size}, batch {batch}: scaled_dot_product_attention takes {100 * (1 - np.median(rest / whole)):.0f} % of an "
        f"eager forward pass of {np.median(whole):.2f} ms"
    )


# --- Multi-scale training --------------------------------------------------------------------------------------------


def multiscale(context: Context) -> None:
    """The cost of image sizes that change from step to step, eager and compiled."""
    sizes_px = (32, 64) if context.is_quick else PAPER_SIZES_PX
    shapes = BatchShapes(sizes_px, 4 if context.is_quick else 128, sizes_px[len(sizes_px) // 2], "listing")
    for size, is_compiled in [(size, False) for size in context.sizes] + [("xxs", True)]:
        title = f"{size} {'compiled' if is_compiled else 'eager'}"
        with context.item(title):
            torch.compiler.reset()
            model = MobileViT(size).to(context.device).train()
            network = context.compile(model) if is_compiled else model
            steps: dict[int, Callable[[], None]] = {}
            for px in sizes_px:
                if is_compiled and not context.has_time(f"{title}, {px} px", 0 if context.is_quick else 20):
                    continue
                step = training_step(context, model, network, shapes.batch_size_at(px), px)
                started = time.monotonic()
                step()
                if is_compiled:
                    context.note(f"{title}: the first step at {px} px took {time.monotonic() - started:.1f} s")
                steps[px] = step
            if len(steps) > 1 and context.has_time(title, 0 if context.is_quick else 5):
                time_changes(context, title, steps, {px: shapes.batch_size_at(px) for px in steps})


def training_step(context: Context, model: nn.Module, network: Any, batch: int, px: int) -> Callable[[], None]:
    """A step in bfloat16 that waits for the device."""
    from training import build_step

    images = torch.rand(batch, 3, px, px, device=context.device)
    labels = torch.zeros(batch, dtype=torch.long, device=context.device)
    return build_step(OURS, model, images, labels, autocast=True, run=network)


def time_changes(context: Context, title: str, steps: dict[int, Callable[[], None]], batches: dict[int, int]) -> None:
    """Time blocks of steps at one size and blocks of the same steps in random order."""
    repeats = 1 if context.is_quick else 4
    order = np.random.default_rng(0).permutation([px for px in steps for _ in range(repeats)]).tolist()

    def block(sizes: list[int]) -> None:
        for px in sizes:
            steps[px]()

    grouped, mixed = measure([partial(block, sorted(order)), partial(block, order)], context.rounds(4), pause_seconds=0)
    num_images = sum(batches[px] for px in order)
    change = Spread.of(mixed / grouped)
    context.row(
        model=title,
        sizes=" ".join(map(str, steps)),
        grouped_images_per_second=1e3 * num_images / float(np.median(grouped)),
        mixed_images_per_second=1e3 * num_images / float(np.median(mixed)),
        mixed_over_grouped=change.median,
        p10=change.p10,
        p90=change.p90,
    )
    if context.is_cuda:
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        context.note(f"{title}: {reserved / 1e9:.1f} GB reserved, {allocated / 1e9:.1f} GB allocated at most")
