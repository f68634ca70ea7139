"""Our own definitions of published networks: exact parameter counts, and the layers that distinguish each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit.compare.models import MODELS
from mobilevit.compare.networks import ceit, local_vit
from mobilevit.compare.networks.botnet import NUM_HEADS, RelativeAttention
from mobilevit.compare.networks.deepvit import ReAttention
from mobilevit.compare.networks.espnet_v2 import EESP, Downsample, dilations
from mobilevit.compare.networks.layers import Attention, to_map, to_tokens
from mobilevit.compare.networks.mobile_former import Block, DynamicReLU, MobileFormerBlock, ToMap, ToTokens
from mobilevit.compare.networks.mobilenet_v1 import MobileNetV1
from mobilevit.compare.networks.t2t_vit import Performer, sine_positions, soft_split
from mobilevit.compare.networks.vil import WINDOW_PX, FullAttention, WindowAttention
from small_networks import randomize


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mobilenetv1-0.75", 2_585_560),
        ("espnetv2", 2_310_190),
        ("t2t-vit-7", 4_255_694),
        ("t2t-vit-12", 6_887_374),
        ("mobile-former-96m", 4_585_252),
        ("mobile-former-214m", 9_425_920),
        ("ceit-tiny", 6_356_904),
        ("vil-tiny", 6_719_698),
        ("localvit", 7_655_080),
        ("botnet-50", 20_852_008),
        ("deepvit-16", 24_426_472),
    ],
)
def test_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in MODELS[name].build().parameters()) == count


def receptive_field(function: Callable[[Tensor], Tensor], x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """True where an output of `function` depends on `x`, for any index along `dim`."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return (gradient != 0).sum(dim=dim) > 0


def square(side: int, row: int, column: int, radius: int) -> Tensor:
    """A map (side, side) that is true up to `radius` pixels around (row, column)."""
    expected = torch.zeros(side, side, dtype=torch.bool)
    expected[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1] = True
    return expected


def test_attention_against_torch() -> None:
    ours, theirs = Attention(24, 4, qkv_bias=True), nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(3, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_maps_and_tokens() -> None:
    x = torch.randn(2, 5, 3, 3)
    assert to_map(to_tokens(x)).equal(x)
    assert to_tokens(x)[:, 5].equal(x[:, :, 1, 2])


def test_mobilenet_v1_separable_convolution() -> None:
    network = randomize(MobileNetV1(3, width=0.75))
    # The convolutions alone: a ReLU can block the gradient.
    _, depthwise, pointwise, *_ = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    x = torch.randn(1, 24, 9, 9)
    reached = receptive_field(lambda x: depthwise(x)[:, 4, 4, 5], x, 0)
    assert reached[4].equal(square(9, 4, 5, 1))
    assert reached.sum() == 9
    reached = receptive_field(lambda x: pointwise(x)[:, 4, 4, 5], x, 0)
    assert reached[:, 4, 5].all()
    assert reached.sum() == 24


@pytest.mark.parametrize(
    ("max_field_px", "expected"),
    [(13, (1, 2, 3, 4)), (11, (1, 2, 3, 4)), (9, (1, 2, 3, 4)), (7, (1, 1, 2, 3)), (5, (1, 1, 1, 2))],
)
def test_espnet_v2_dilations(max_field_px: int, expected: tuple[int, ...]) -> None:
    assert dilations(max_field_px) == expected
    unit = randomize(EESP(16, 16, max_field_px))
    maps: list[Tensor] = []
    unit.norm.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    for i in range(4):  # branch i is added to all branches of smaller dilation

        def branch(x: Tensor, i: int = i) -> Tensor:
            unit(x)
            return maps[-1][:, 4 * i : 4 * i + 4, 6, 6]

        expected_map = torch.zeros(13, 13, dtype=torch.bool)
        for d in expected[: i + 1]:
            expected_map[6 - d : 7 + d : d, 6 - d : 7 + d : d] = True
        assert receptive_field(branch, torch.randn(1, 16, 13, 13), (0, 1)).equal(expected_map)


@pytest.mark.parametrize("image", [True, False])
def test_espnet_v2_image_reinforcement(image: bool) -> None:
    downsample = randomize(Downsample(16, 32, 9, image=image))
    x, images = torch.randn(1, 16, 14, 14), torch.randn(1, 3, 56, 56)
    assert downsample(x, images).shape == (1, 32, 7, 7)
    assert downsample(x, images).equal(downsample(x, images + torch.randn_like(images))) != image


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 4, 2), (3, 2, 1)])
def test_t2t_vit_soft_split(kernel: int, stride: int, padding: int) -> None:
    x = torch.randn(2, 3, 16, 16)
    tokens = soft_split(x, kernel, stride, padding).unflatten(2, (3, kernel, kernel))
    padded = F.pad(x, (padding,) * 4)
    for i in range(16 // stride):
        for j in range(16 // stride):
            window = padded[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            assert tokens[:, i * (16 // stride) + j].equal(window)
    # Neighbors share kernel - stride columns, so that a pixel is in one to four tokens.
    assert tokens[:, 5, :, :, stride:].equal(tokens[:, 6, :, :, : kernel - stride])
    x = torch.ones(1, 1, 16, 16, requires_grad=True)
    soft_split(x, kernel, stride, padding).sum().backward()
    assert x.grad is not None
    assert (x.grad.min(), x.grad.max()) == (1, 4)


def test_t2t_vit_performer_against_dense_attention() -> None:
    performer = Performer(27, 16).double().eval()
    x = torch.randn(2, 10, 27, dtype=torch.float64)
    q, k, v = performer.qkv(performer.norm(x)).split(16, dim=-1)
    w = performer.random
    kernel = torch.einsum("bnf,bmf->bnm", *((t @ w.T - (t**2).sum(-1, keepdim=True) / 2).exp() for t in (q, k)))
    weights = kernel / kernel.sum(dim=-1, keepdim=True)
    expected = v + performer.out(weights @ v)
    expected = expected + performer.ffn(performer.ffn_norm(expected))
    torch.testing.assert_close(performer(x), expected, rtol=1e-5, atol=1e-5)  # of the epsilon
    orthogonal = Performer(27, 16).random / 8**0.5
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(8))


def test_t2t_vit_sinusoidal_positions() -> None:
    positions = sine_positions(5, 8)
    for i in range(5):
        for j in range(4):
            angle = torch.tensor(i / 10_000 ** (2 * j / 8))
            torch.testing.assert_close(positions[i, 2 * j], angle.sin())
            torch.testing.assert_close(positions[i, 2 * j + 1], angle.cos())


@pytest.mark.parametrize(("build", "dim"), [(ceit.LeFF, ceit.DIM), (local_vit.LocalFeedForward, local_vit.DIM)])
def test_receptive_field_of_local_feed_forward(build: Callable[[], nn.Module], dim: int) -> None:
    ffn = randomize(build())
    x = torch.randn(2, 1 + 49, dim)
    assert ffn(x)[:, 0].equal(x[:, 0])
    for row, column in ((3, 2), (0, 6)):
        reached = receptive_field(lambda x, n=1 + 7 * row + column: ffn(x)[:, n], x, (0, 2))
        assert reached[1:].reshape(7, 7).equal(square(7, row, column, 1))
        assert not reached[0]


def test_ceit_layerwise_class_attention() -> None:
    attention = randomize(ceit.LayerwiseClassAttention())
    x = torch.randn(2, ceit.NUM_LAYERS, ceit.DIM)
    assert receptive_field(attention, x, (0, 2)).all()
    # The query and the shortcut are those of the last token.
    theirs = nn.MultiheadAttention(ceit.DIM, ceit.NUM_HEADS, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((attention.query.weight, attention.key_value.weight)))
        theirs.in_proj_bias.copy_(torch.cat((attention.query.bias, attention.key_value.bias)))
    theirs.out_proj.load_state_dict(attention.out.state_dict())
    y = x + attention.positions
    keys = attention.attention_norm(y)
    expected = y[:, -1] + theirs(keys[:, -1:], keys, keys, need_weights=False)[0][:, 0]
    expected = expected + attention.ffn(attention.ffn_norm(expected))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)


def test_deepvit_re_attention() -> None:
    attention = ReAttention(24, 4).eval()
    x = torch.randn(2, 7, 24)
    plain = Attention(24, 4, qkv_bias=True)
    plain.load_state_dict(attention.state_dict(), strict=False)
    nn.init.zeros_(attention.mix.weight)
    with torch.no_grad():
        attention.mix.weight[range(4), range(4)] = (1 + attention.mix_norm.eps) ** 0.5  # undoes the norm
    torch.testing.assert_close(attention(x), plain(x))
    # Any other matrix, by definition.
    mix = torch.randn(4, 4)
    with torch.no_grad():
        attention.mix.weight.copy_(mix[:, :, None, None] * (1 + attention.mix_norm.eps) ** 0.5)
    q, k, v = (t.reshape(2, 7, 4, 6).transpose(1, 2) for t in plain.qkv(x).chunk(3, dim=-1))
    weights = torch.einsum("gh,bhmn->bgmn", mix, (q @ k.transpose(2, 3) / 6**0.5).softmax(dim=-1))
    torch.testing.assert_close(attention(x), plain.out((weights @ v).transpose(1, 2).reshape(2, 7, 24)))


@pytest.mark.parametrize("side", [4, 5])
def test_botnet_relative_attention_by_definition(side: int) -> None:
    attention = RelativeAttention(24, side).double()
    x = torch.randn(2, 24, side, side, dtype=torch.float64)
    d = 24 // NUM_HEADS
    q, k, v = attention.qkv(x).reshape(2, 3, NUM_HEADS, d, side, side).unbind(1)
    expected = torch.zeros_like(v)
    for row in range(side):
        for column in range(side):
            query = q[:, :, :, row, column]
            scores = x.new_zeros(2, NUM_HEADS, side, side)
            for i in range(side):
                for j in range(side):
                    position = attention.rows[i - row + side - 1] + attention.columns[j - column + side - 1]
                    scores[:, :, i, j] = (query * (k[:, :, :, i, j] + position)).sum(dim=-1) / d**0.5
            weights = scores.flatten(2).softmax(dim=-1).reshape(scores.shape)
            expected[:, :, :, row, column] = (weights[:, :, None] * v).sum(dim=(-2, -1))
    torch.testing.assert_close(attention(x), expected.flatten(1, 2))


def test_botnet_is_equivariant_to_flips_without_positions() -> None:
    attention = RelativeAttention(24, 5)
    x = torch.randn(2, 24, 5, 5)
    for dim in (2, 3):
        assert not torch.allclose(attention(x.flip(dim)), attention(x).flip(dim), atol=1e-3)
    nn.init.zeros_(attention.rows)
    torch.testing.assert_close(attention(x.flip(2)), attention(x).flip(2))
    assert not torch.allclose(attention(x.flip(3)), attention(x).flip(3), atol=1e-3)


def test_botnet_replaces_three_convolutions() -> None:
    network = MODELS["botnet-50"].build(num_classes=3, size_px=64)
    found = [(name, module) for name, module in network.named_modules() if isinstance(module, RelativeAttention)]
    assert [name for name, _ in found] == ["layer4.0.conv2.0", "layer4.1.conv2", "layer4.2.conv2"]
    assert [len(module.rows) for _, module in found] == [7, 3, 3]  # before the map is halved, and after
    kernels = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert kernels.count((3, 3)) == 13


@pytest.mark.parametrize("side", [28, 10])
def test_vil_receptive_field(side: int) -> None:
    attention = randomize(WindowAttention(8, 2, side))
    x = torch.randn(1, 1 + side * side, 8)
    for row, column in ((0, 0), (side // 2, side - 1), (8, 9)):
        reached = receptive_field(lambda x, n=1 + side * row + column: attention(x)[:, n], x, (0, 2))
        first_row, first_column = (WINDOW_PX * (i // WINDOW_PX - 1) for i in (row, column))
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[max(0, first_row) : first_row + 3 * WINDOW_PX, max(0, first_column) : first_column + 3 * WINDOW_PX] = (
            True
        )
        assert reached[1:].reshape(side, side).equal(expected)
        assert reached[0]
    assert receptive_field(lambda x: attention(x)[:, 0], x, (0, 2)).all()


@pytest.mark.parametrize(("build", "side"), [("window", 9), ("window", 14), ("full", 5)])
def test_vil_against_dense_attention(build: str, side: int) -> None:
    attention = (
        WindowAttention(8, 2, side) if build == "window" else FullAttention(8, 2, side, global_token=True)
    ).double()
    assert attention.global_bias is not None
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 1 + side * side, 8, dtype=torch.float64)
    q, k, v = (t.reshape(2, -1, 2, 4).transpose(1, 2) for t in attention.qkv(x).chunk(3, dim=-1))
    to_local, from_local, to_itself = attention.global_bias.detach().flatten(1)
    bias = torch.empty(2, 1 + side * side, 1 + side * side, dtype=torch.float64)
    bias[:, 0, 1:], bias[:, 1:, 0], bias[:, 0, 0] = to_local[:, None], from_local[:, None], to_itself
    max_distance = 2 * WINDOW_PX - 1 if build == "window" else side - 1
    table = attention.bias.table.detach().reshape(2, 2 * max_distance + 1, 2 * max_distance + 1)
    for m in range(side * side):
        for n in range(side * side):
            (row, column), (i, j) = divmod(m, side), divmod(n, side)
            apart = max(abs(row // WINDOW_PX - i // WINDOW_PX), abs(column // WINDOW_PX - j // WINDOW_PX))
            near = build == "full" or apart <= 1
            bias[:, 1 + m, 1 + n] = (
                table[:, row - i + max_distance, column - j + max_distance] if near else float("-inf")
            )
    weights = (q @ k.transpose(2, 3) / 2 + bias).softmax(dim=-1)
    torch.testing.assert_close(attention(x), attention.out((weights @ v).transpose(1, 2).flatten(2)))


def test_mobile_former_cross_attention() -> None:
    x, tokens = torch.randn(1, 16, 6, 6), torch.randn(1, 4, 32)
    to_tokens, to_map = randomize(ToTokens(32, 16)), randomize(ToMap(32, 16))
    assert receptive_field(
        lambda x: to_tokens(tokens, x)[:, :, :5], x, (0, 1)
    ).all()  # a norm's outputs sum to a constant
    assert receptive_field(lambda tokens: to_map(x, tokens), tokens, (0, 2)).all()
    for block in (Block(16, 3), Block(24, 3), Block(24, 3, halves=True)):
        module = randomize(MobileFormerBlock(16, block, 32))
        next_x, next_tokens = module(x, tokens)
        assert next_x.shape == (1, block.channels, *((3, 3) if block.halves else (6, 6)))
        assert next_tokens.shape == tokens.shape
        assert receptive_field(lambda x, m=module: m(x, tokens)[1][..., :5], x, (0, 1)).all()
        assert receptive_field(lambda tokens, m=module: m(x, tokens)[0], tokens, (0, 2)).all()
        # The tokens depend on the input map, the output map on the output tokens.
        mobile = list(module.mobile.parameters())
        gradients = torch.autograd.grad(next_tokens[..., :5].sum(), mobile, allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in gradients)
        bridges = [*module.to_tokens.parameters(), *module.to_map.parameters()]
        gradients = torch.autograd.grad(next_x.square().sum(), bridges)
        assert all(gradient.any() for gradient in gradients)


def test_mobile_former_cross_attention_by_definition() -> None:
    bridge = randomize(ToTokens(8, 4)).double()
    x, tokens = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.randn(1, 2, 8, dtype=torch.float64)
    pixels, query = x[0].reshape(4, 9).T, bridge.query(tokens)[0]
    gathered = torch.cat(
        [(query[:, h] @ pixels[:, h].T / 2**0.5).softmax(dim=-1) @ pixels[:, h] for h in (slice(0, 2), slice(2, 4))],
        dim=1,
    )
    gate = ((bridge.gate(tokens)[0] + 3) / 3).clamp(0, 2)
    torch.testing.assert_close(bridge(tokens, x)[0], bridge.norm(tokens[0] + bridge.out(gate * gathered)))


def test_mobile_former_dynamic_relu() -> None:
    activation = DynamicReLU(6, 16)
    x, tokens = torch.randn(2, 6, 5, 5), torch.randn(2, 3, 16)
    assert receptive_field(lambda tokens: activation(x, tokens), tokens, (0, 2)).tolist() == [True, False, False]
    last = activation.slopes[2]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    for bias, first, second in ((0, 1, 0), (100, 2, 1), (-100, 0, -1)):
        nn.init.constant_(last.bias, bias)
        torch.testing.assert_close(activation(x, tokens), torch.maximum(first * x, second * x))
