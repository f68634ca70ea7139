"""Costs compared with published figures, with PyTorch's counter, and with the allocations of a real run."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record
from torch.utils import flop_counter

from mobilevit.benchmark.cost import count, profile, table
from mobilevit.compare.models import MODELS
from mobilevit.models.mobilevit import XXS, Architecture, MobileViT, Stage, Transformer

# Two published sizes, output strides 32 and 8, and an architecture that is not published.
SMALL = Architecture(
    "small",
    stages=(Stage(16, num_residuals=2, stride=2), Stage(24, 1, 2, Transformer(32, num_layers=1, ffn_dim=48))),
    head_channels=40,
    expansion=2,
    transformer_dropout=0.1,
)
CASES = {
    "xxs-256": (XXS, 1000, 32, (256, 256)),
    "xs-odd": ("xs", 10, 32, (200, 231)),
    "xxs-stride8-odd": (XXS, 0, 8, (200, 231)),
    "small": (SMALL, 7, 32, (64, 97)),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request) -> tuple[MobileViT, tuple[int, int]]:
    architecture, num_classes, output_stride, size = request.param
    return MobileViT(architecture, num_classes=num_classes, output_stride=output_stride), size


@pytest.mark.parametrize(
    ("name", "num_parameters", "gmacs_with", "gmacs_without"),
    [("xxs", 1_272_024, 0.407, 0.329), ("xs", 2_317_848, 1.026, 0.909), ("s", 5_578_632, 2.001, 1.823)],
)
def test_published_figures(name: str, num_parameters: int, gmacs_with: float, gmacs_without: float):
    with torch.device("meta"):
        model = MobileViT(name)
    p = profile(model, (256, 256))
    assert p.num_parameters == num_parameters
    assert round((p.num_macs + p.num_attention_macs) / 1e9, 3) == gmacs_with
    assert round(p.num_macs / 1e9, 3) == gmacs_without


def test_figure_of_the_paper_for_xs_is_at_224_px_without_attention():
    assert round(profile(MobileViT("xs"), (224, 224)).num_macs / 1e9, 3) == 0.703


# Before 2.15, PyTorch's counter lacks the fused attention of CPUs. Shapes are (B, heads, N, width).
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape, **__: 4 * q[0] * q[1] * q[2] * k[2] * q[3]
    )
}


def test_rows_against_the_counter_of_pytorch(case):
    model, size = case
    model.eval()
    maps = {}
    parts = {**dict(model.backbone.named_children()), "head": model.head, "classifier": model.classifier}
    for name, part in parts.items():
        part.register_forward_hook(lambda _module, _inputs, output, name=name: maps.update({name: output.shape}))
    with flop_counter.FlopCounterMode(display=False, depth=3, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        model(torch.rand(1, 3, *size))
    flops = counter.get_flop_counts()

    rows = {row.name: row for row in profile(model, size).rows}
    assert list(rows) == [name for name in parts if name != "classifier" or model.num_classes]
    for name, row in rows.items():
        key = f"MobileViT.{name}" if name in ("head", "classifier") else f"MobileViT.backbone.{name}"
        by_operator = dict(flops[key])
        attention = sum(by_operator.pop(op) for op in list(by_operator) if "attention" in str(op))
        assert 2 * row.num_macs == sum(by_operator.values()), name
        assert 2 * row.num_attention_macs == attention, name
        assert (1, row.channels, row.height, row.width) == (*maps[name], 1, 1)[:4], name
        assert row.num_parameters == sum(p.numel() for p in parts[name].parameters())
    assert sum(row.num_parameters for row in rows.values()) == sum(p.numel() for p in model.parameters())


def allocations(forward) -> tuple[int, int]:
    """Peak bytes allocated on the CPU during a forward pass, and those left at its end without the output."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the scratch memory of the attention kernel grows with the threads
    try:
        with record(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            output = forward()
    finally:
        torch.set_num_threads(num_threads)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now - output.nbytes


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # by torch 2.11
def test_memory_against_a_real_run(case):
    model, size = case
    p = profile(model, size)

    model.eval()
    with torch.no_grad():
        peak, _ = allocations(lambda: model(torch.rand(1, 3, *size)))
    assert p.inference_bytes <= peak < 1.001 * p.inference_bytes + 2**14  # the kernels' own scratch memory

    # After a training forward pass, all memory except the output belongs to the backward pass.
    model.train()
    _, saved = allocations(lambda: model(torch.rand(2, 3, *size)))
    assert 2 * p.training_bytes == saved


def test_the_model_is_not_changed():
    model = MobileViT("xxs").half().eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rng = torch.get_rng_state()
    p = profile(model, (96, 80))
    assert torch.equal(rng, torch.get_rng_state())
    assert p == profile(MobileViT("xxs").to("meta"), (96, 80))  # float32, in train mode
    assert not model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model(torch.rand(1, 3, 64, 64).half())  # no hook or fake tensor is left


def test_smallest_size():
    assert profile(MobileViT("xxs"), (32, 32)).rows[-2].height == 1
    with pytest.raises(ValueError, match="31"):
        profile(MobileViT("xxs"), (32, 31))


def test_table():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(profile(MobileViT("xxs"), (256, 224))))
    text = capture.get()
    assert "256 x 224 px" in text
    assert "1,272,024 parameters" in text
    assert all(name in text for name in ("GMACs", "stem", "stage5", "head", "classifier"))


# ---------------------------------------------------------------------------------------------------------------------
# Any model


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "regnet_y_400mf"])
def test_convolutional_model(name: str):
    model, macs = torchvision.models.get_model(name).eval(), 0

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        assert isinstance(module, nn.Conv2d | nn.Linear)
        macs += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.inference_mode(), flop_counter.FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, 96, 64))
    cost = count(torchvision.models.get_model(name), (96, 64))
    assert (cost.num_macs, cost.num_attention_macs) == (macs, 0)
    assert cost.num_macs == counter.get_total_flops() // 2
    assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_vision_transformer():
    with torch.device("meta"):
        cost = count(timm.create_model("deit_tiny_patch16_224"), (224, 224))
    N, D, L = 197, 192, 12
    per_layer = N * D * (3 * D + D + 4 * D + 4 * D)
    assert cost.num_macs == 196 * D * 3 * 16 * 16 + L * per_layer + D * 1000
    assert cost.num_attention_macs == L * 2 * N * N * D
    assert (
        cost.num_parameters
        == (3 * 256 + 1) * D + (N + 1) * D + L * (12 * D * D + (3 + 1 + 4 + 1) * D + 2 * 2 * D) + 2 * D + (D + 1) * 1000
    )


def test_attention_without_a_fused_operator():
    # ConViT computes its scores by explicit matrix products, in two forms, and replaces a buffer while it runs.
    with torch.device("meta"):
        convit = MODELS["convit-10m"].build()
        botnet = MODELS["botnet-50"].build()
    assert count(convit, (224, 224)).num_attention_macs == 2 * 256 * (10 * 196**2 + 2 * 197**2)
    # The relative positions of BoTNet are weights: of the four products of its attention, two count as attention.
    assert count(botnet, (224, 224)).num_attention_macs == 2 * 512 * (196**2 + 2 * 49**2)


def test_activations_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    # The image, and the map of 8 channels twice: before and after the ReLU.
    assert count(model, (16, 16)).inference_bytes == 4 * 16 * 16 * (3 + 8 + 8)
