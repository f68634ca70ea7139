"""MobileViT: sizes, shapes, strides, initial values, and support for the features of torch."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mobilevit.models.mobilevit import (
    ARCHITECTURES,
    XXS,
    Attention,
    Backbone,
    MobileViT,
    MobileViTBlock,
    Transformer,
    fold,
    unfold,
)
from small_networks import SMALL, randomize


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomize(MobileViT("xxs", num_classes=10))


@pytest.fixture(scope="module", params=[SMALL, pytest.param(XXS, marks=pytest.mark.slow)], ids=lambda a: a.name)
def traced(request: pytest.FixtureRequest) -> nn.Module:
    """Networks for torch.compile, which takes seconds for the small one and half a minute for XXS."""
    return randomize(MobileViT(request.param, num_classes=10))


@pytest.mark.parametrize(("name", "count"), [("xxs", 1_272_024), ("xs", 2_317_848), ("s", 5_578_632)])
def test_parameters_as_published(name: str, count: int) -> None:
    assert sum(p.numel() for p in MobileViT(name).parameters()) == count


@pytest.mark.parametrize("p", [1, 2, 3])
def test_unfold_by_definition(p: int) -> None:
    x = torch.randn(2, 5, 2 * p, 3 * p)
    tokens = unfold(x, p).reshape(2, p * p, 6, 5)
    for i in range(2 * p):
        for j in range(3 * p):
            position, patch = (i % p) * p + j % p, (i // p) * 3 + j // p
            assert torch.equal(tokens[:, position, patch], x[:, :, i, j])
    assert torch.equal(fold(unfold(x, p), p, 2 * p, 3 * p), x)


def test_attention_against_torch() -> None:
    ours = Attention(dim=24, num_heads=4)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, gradient = torch.randn(3, 7, 24), torch.randn(3, 7, 24)
    found, expected = ours(x), theirs(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(found, expected)
    found.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.qkv.weight.grad, theirs.in_proj_weight.grad)
    torch.testing.assert_close(ours.qkv.bias.grad, theirs.in_proj_bias.grad)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 320), (224, 224), (75, 256), (288, 160)])
def test_any_size(model: nn.Module, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert model(torch.rand(2, 3, *size)).shape == (2, 10)


@pytest.mark.parametrize("patches_px", [(2, 2, 2), (3, 3, 3), (8, 4, 2), (1, 1, 1)])
def test_patch_size_per_stage(patches_px: tuple[int, int, int]) -> None:
    stages = list(XXS.stages)
    for i, patch_px in enumerate(patches_px, start=2):
        transformer = stages[i].transformer
        assert transformer
        stages[i] = replace(stages[i], transformer=replace(transformer, patch_px=patch_px))
    model = MobileViT(replace(XXS, name="custom", stages=tuple(stages)), num_classes=3).eval()
    assert sum(p.numel() for p in model.backbone.parameters()) == sum(p.numel() for p in Backbone(XXS).parameters())
    with torch.no_grad():
        assert model(torch.rand(1, 3, 200, 96)).isfinite().all()


def test_odd_map_is_resized_bilinearly() -> None:
    block = MobileViTBlock(8, Transformer(dim=16, num_layers=1, ffn_dim=32), dropout=0.0)
    seen: list[torch.Size] = []
    block.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    with torch.no_grad():
        assert block(torch.rand(2, 8, 7, 5)).shape == (2, 8, 7, 5)
    assert seen == [(2 * 4, 4 * 3, 16)]


@pytest.mark.parametrize(
    ("output_stride", "strides"), [(32, [2, 4, 8, 16, 32]), (16, [2, 4, 8, 16, 16]), (8, [2, 4, 8, 8, 8])]
)
def test_output_stride(output_stride: int, strides: list[int]) -> None:
    backbone = Backbone("xs", output_stride=output_stride).eval()
    assert list(backbone.strides.values()) == strides
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 128, 192))
    assert [128 // x.shape[2] for x in maps.values()] == strides
    assert [192 // x.shape[3] for x in maps.values()] == strides
    assert {name: x.shape[1] for name, x in maps.items()} == backbone.channels
    dilated = {name for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d) and m.dilation != (1, 1)}
    assert dilated == ({"stage5.0.depthwise.conv"} if output_stride == 8 else set())


def test_backbone_of_chosen_stages() -> None:
    backbone = Backbone("xxs", out_stages=["stage3", "stem"]).eval()
    assert backbone.channels == {"stage3": 48, "stem": 16}
    assert not hasattr(backbone, "stage4")
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert list(maps) == ["stage3", "stem"]
    torch.stack([x.sum() for x in maps.values()]).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_backbone_loads_the_weights_of_a_classifier(model: nn.Module) -> None:
    assert isinstance(model, MobileViT)
    backbone = Backbone("xxs")
    backbone.load_state_dict(model.backbone.state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MobileViT("m"), "'m'.*xxs, xs, s"),
        (lambda: Backbone("s", out_stages=["stage6"]), "stage6.*stage5"),
        (lambda: Backbone("s", out_stages=[]), "name at least one"),
        (lambda: Backbone("s", output_stride=4), "output_stride is 4"),
        (lambda: MobileViT("s", num_classes=-1), "num_classes is -1"),
    ],
)
def test_wrong_arguments(wrong, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_classifier_replaced_and_removed(model: nn.Module) -> None:
    assert isinstance(model, MobileViT)
    removed = MobileViT("xxs", num_classes=0).eval()
    removed.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("classifier.")})
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = removed(x)
        assert pooled.shape == (2, 320)
        torch.testing.assert_close(model.classifier(pooled), model(x))
    removed.half().reset_classifier(7)
    assert removed.num_classes == 7
    assert removed.classifier.weight.dtype == torch.float16


@pytest.mark.parametrize(("name", "rate"), [("xxs", 0.05), ("xs", 0.1), ("s", 0.1)])
def test_dropout_as_published(name: str, rate: float) -> None:
    rates = {key: m.p for key, m in MobileViT(name).named_modules() if isinstance(m, nn.Dropout)}
    assert rates.pop("dropout") == 0.1
    assert set(rates.values()) == {rate}


def test_dropout_applies_to_attention_output_and_ffn_output() -> None:
    block = MobileViTBlock(8, Transformer(dim=16, num_layers=1, ffn_dim=32), dropout=1.0).train()
    x = torch.randn(4, 6, 16)
    assert torch.equal(block.layers[0](x), x)  # with both branches dropped, only the shortcut remains


def test_initial_values_as_published() -> None:
    model = MobileViT("s")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.25), name
            assert module.bias is None
        elif isinstance(module, nn.Linear):
            # Truncation at two standard deviations reduces the standard deviation by a factor of 0.8796.
            assert module.weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.05), name
            assert module.weight.abs().max() <= 0.04
            assert not module.bias.any()


@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_empty_batch(model: nn.Module, size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert model(torch.rand(0, 3, *size)).shape == (0, 10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02), (torch.float64, 1e-5)])
def test_other_precisions(model: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    x = torch.rand(2, 3, 96, 70)
    other = randomize(MobileViT("xxs", num_classes=10)).to(dtype)
    with torch.no_grad():
        expected, found = model(x), other(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < tolerance * expected.std()


def test_autocast(model: nn.Module) -> None:
    x = torch.rand(2, 3, 96, 70)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    with torch.no_grad():
        expected = model(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.15 * expected.std()


def test_memory_format_of_the_input_does_not_matter(model: nn.Module) -> None:
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), model(x.to(memory_format=torch.channels_last)))
        assert torch.equal(model(x), model(torch.rand(2, 64, 64, 3).copy_(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


def test_gradients_against_finite_differences() -> None:
    block = MobileViTBlock(3, Transformer(dim=8, num_layers=1, ffn_dim=8, num_heads=2), dropout=0.0)
    block = randomize(block).double()
    x = torch.randn(1, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_compile(traced: nn.Module, size: tuple[int, int]) -> None:
    # aot_eager: all of torch.compile except the C++ compiler, which may not be installed.
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for batch_size in (2, 3):  # the second batch size triggers compilation with a dynamic one
        x = torch.rand(batch_size, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), traced(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_step(traced: nn.Module, autocast: bool) -> None:
    # In eval mode, because dropout is random.
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    x, labels = torch.rand(3, 3, 70, 45), torch.tensor([0, 4, 9])
    gradients = []
    for run in (traced, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nn.functional.cross_entropy(run(x), labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in traced.parameters() if p.grad is not None]))
        traced.zero_grad()
    assert (gradients[0] - gradients[1]).norm() < (0.1 if autocast else 1e-4) * gradients[0].norm()


# torch.export.save emits the first warning for every channels-last weight; torch.export.load of torch 2.11 emits the
# second one for its own buffer. The tests compare the loaded programs.
ignore_export_warnings = pytest.mark.filterwarnings(
    "ignore:No complete tensor found in the group", "ignore:The given buffer is not writable"
)
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


def exported(model: nn.Module, example: Tensor, dynamic_shapes: dict[int, object] | None = None) -> nn.Module:
    """The exported program, saved and loaded."""
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic_shapes and (dynamic_shapes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@ignore_export_warnings
@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_export_static(model: nn.Module, size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(exported(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


@ignore_export_warnings
def test_export_for_any_batch(traced: nn.Module) -> None:
    program = exported(traced, torch.rand(2, 3, 64, 96), {0: torch.export.Dim("batch")})
    for batch_size in (1, 5):
        x = torch.rand(batch_size, 3, 64, 96)
        with torch.no_grad():
            torch.testing.assert_close(program(x), traced(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(TORCH < (2, 14), reason="torch 2.11 cannot prove the sizes; 2.12 and 2.13 were not tried")
@ignore_export_warnings
def test_export_for_any_size(model: nn.Module) -> None:
    # From 65 px on: torch.export rejects a symbolic size that can be 1, such as the number of patches at 64 px.
    height, width = (torch.export.Dim(name, min=65, max=2048) for name in ("height", "width"))
    program = exported(model, torch.rand(2, 3, 170, 201), {0: torch.export.Dim("batch"), 2: height, 3: width})
    for shape in [(1, 128, 320), (3, 224, 160), (2, 65, 97)]:
        x = torch.rand(shape[0], 3, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "num_resizes"), [((128, 192), 0), ((224, 224), 2)])
def test_exported_graph_resizes_only_where_necessary(model: nn.Module, size: tuple[int, int], num_resizes: int) -> None:
    program = torch.export.export(model, (torch.rand(1, 3, *size),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("upsample" in target for target in targets) == num_resizes
    assert not any("slice" in target for target in targets)


@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_frozen_parts_do_not_change_the_gradients(size: tuple[int, int]) -> None:
    model = randomize(MobileViT("xxs", num_classes=10)).double()
    x = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    by_name = dict(zip(("images", *(name for name, _ in model.named_parameters())), expected, strict=True))
    model.requires_grad_(False)
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, by_name["images"])
    # The input of the stage requires no gradient; its output does.
    model.get_submodule("backbone.stage4").requires_grad_(True)
    model(x.detach()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("backbone.stage4."), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, by_name[name])


class Operations(TorchDispatchMode):
    """Counts the executed operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def test_no_map_is_copied_for_autograd(model: nn.Module) -> None:
    x = torch.rand(2, 3, 64, 64)
    with Operations() as training:
        model(x)
    with torch.no_grad(), Operations() as inference:
        model(x)
    # An in-place SiLU overwrites the input that its gradient requires, so autograd would clone it first.
    assert training.counts["silu"] == inference.counts["silu_"] == 34
    assert training.counts["silu_"] == inference.counts["silu"] == 0
    # The remaining copies are those of unfold, fold and the heads, the same number in both.
    assert training.counts["clone"] == inference.counts["clone"]


@pytest.mark.parametrize(
    ("wrong", "error", "parts"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, ("torch.uint8", "x.float() / 255")),
        (torch.zeros(3, 64, 64), ValueError, ("(3, 64, 64)", "x[None]")),
        (torch.zeros(1, 64, 64, 3), ValueError, ("(1, 64, 64, 3)", "x.permute(0, 3, 1, 2)")),
        (torch.zeros(1, 1, 64, 64), ValueError, ("(1, 1, 64, 64)", "model.preprocess")),
        (torch.zeros(1, 3, 64, 64).numpy(), TypeError, ("ndarray", "torch.from_numpy")),
    ],
    ids=["uint8", "one image", "channels last", "grey", "NumPy"],
)
def test_wrong_input(model: nn.Module, wrong, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        model(wrong)
    for part in ("(B, 3, H, W)", *parts):
        assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("size", [(64, 64), (70, 45)])
def test_trace(model: nn.Module, size: tuple[int, int]) -> None:
    traced: Any = torch.jit.trace(model, torch.rand(1, 3, *size))
    x = torch.rand(1, 3, *size)
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)


def test_one_graph_for_every_size(model: nn.Module) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size in ((64, 64), (70, 45)):
        x = torch.rand(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_functional_transforms(model: nn.Module) -> None:
    x, labels = torch.rand(3, 3, 64, 48), torch.tensor([0, 4, 9])
    parameters = dict(model.named_parameters())

    def loss(parameters: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, dict(parameters), (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, labels)
    nn.functional.cross_entropy(model(x), labels, reduction="sum").backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(per_image[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)
        parameter.grad = None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_steps_at_odd_size(name: str) -> None:
    model = MobileViT(name, num_classes=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, labels = torch.rand(4, 3, 72, 40), torch.arange(4)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
