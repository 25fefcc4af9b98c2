"""A convolution with the norms, activation and residual around it in one operator, against plain layers and float64."""
import copy
import math

import numpy as np
import pytest

from fuse import fuse, pack
from large_kernel import (
    DepthwiseConv2D,
    as_planes,
    build,
    conv_block,
    pack_weights,
)
from large_kernel.conv_norm_act import PackedConv2D, can_fuse
from replknet import RepLKNet

import paddle  # isort: skip
from paddle import nn  # isort: skip

pytestmark = [pytest.mark.usefixtures('without_gradients'), pytest.mark.skipif(
    build.reason_unavailable() is not None, reason=f'no C++ operator: {build.reason_unavailable()}')]
EPS = np.finfo('float32').eps


def norm(channels):
    layer = nn.BatchNorm2D(channels)
    layer.weight.set_value(paddle.randn([channels]))
    layer.bias.set_value(paddle.randn([channels]))
    layer._mean.set_value(paddle.randn([channels]))
    layer._variance.set_value(paddle.rand([channels]) + 0.1)
    layer.eval()
    return layer


def affine(layer):
    """Scale and shift of a norm in eval mode, float64 [1, C, 1, 1]."""
    w, b, mean, variance = (t.numpy().astype('float64')[None, :, None, None] for t in
                            (layer.weight, layer.bias, layer._mean, layer._variance))
    scale = w / np.sqrt(variance + layer._epsilon)
    return scale, b - mean * scale


ACTIVATIONS = {'': lambda x: x, 'relu': lambda x: np.maximum(x, 0),
               'gelu': lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))}


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('around', [False, True])
@pytest.mark.parametrize('batch, inputs, outputs, height, width', [
    (1, 1, 1, 1, 1), (2, 3, 5, 1, 7), (1, 16, 48, 7, 7), (3, 17, 31, 5, 3), (1, 600, 70, 4, 9), (2, 8, 129, 20, 31)])
def test_pointwise_against_float64(batch, inputs, outputs, height, width, around, activation):
    conv = nn.Conv2D(inputs, outputs, 1)
    x, residual = paddle.randn([batch, inputs, height, width]), paddle.randn([batch, outputs, height, width])
    before, after = norm(inputs), norm(outputs)
    conv.eval()
    weight, bias, data = (t.numpy().astype('float64') for t in (conv.weight, conv.bias, x))
    a, b = affine(before) if around else (1, 0)
    c, d = affine(after) if around else (1, 0)

    def product(x, w):
        return np.einsum('nihw,oi->nohw', x, w[:, :, 0, 0])

    want = ACTIVATIONS[activation](c * (product(a * data + b, weight) + bias[None, :, None, None]) + d)
    scale = np.abs(c) * (product(np.abs(a * data) + np.abs(b), np.abs(weight)) + np.abs(bias[None, :, None, None]))
    if around:
        got = conv_block(x, conv, after, activation, before, residual)
        want = want + residual.numpy()
    else:
        got = conv_block(x, conv, activation=activation)
    assert (np.abs(got.numpy() - want) <= 8 * EPS * (scale + np.abs(d) + np.abs(want) + 1)).all()


@pytest.mark.parametrize('kernel, stride, channels', [
    (3, 1, 16), (3, 2, 9), (5, 1, 3), (5, 2, 40), (9, 1, 17), (9, 2, 4)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_depthwise_with_norm_and_relu_is_the_layers_one_by_one(kernel, stride, channels, dtype, rounding):
    conv, after = DepthwiseConv2D(channels, kernel, stride), norm(channels)
    x = paddle.randn([2, channels, 12, 11]).astype(dtype)
    for parameter in (conv.weight, conv.bias):  # values that the dtype holds exactly
        parameter.set_value(parameter.astype(dtype).astype('float32'))
    want = nn.functional.relu(after(conv(x.astype('float32')))).numpy()
    got = conv_block(x, conv, after, 'relu')
    assert got.dtype == x.dtype
    share, most = (0, 1e-4) if dtype == 'float32' else (rounding(dtype), 0)
    assert np.abs(got.astype('float32').numpy() - want).max() <= (share + 16 * EPS) * np.abs(want).max() + most


def test_gelu_over_its_whole_range():
    conv = nn.Conv2D(1, 1, 1, bias_attr=False)
    conv.weight.set_value(paddle.ones([1, 1, 1, 1]))
    conv.eval()
    x = np.concatenate([np.linspace(-9, 9, 20001), [-1e30, -30, -1e-20, 0, 1e-20, 30, 1e30]]).astype('float32')
    got = conv_block(paddle.to_tensor(x.reshape(1, 1, 1, -1)), conv, activation='gelu').numpy().ravel()
    want = ACTIVATIONS['gelu'](x.astype('float64'))
    assert (np.abs(got - want) <= 4 * EPS * np.abs(x)).all()


@pytest.mark.parametrize('kernel, stride, inputs, outputs', [
    (3, 2, 3, 17), (3, 1, 1, 5), (5, 2, 4, 1), (1, 2, 6, 7), (3, 1, 1, 1), (7, 1, 2, 3), (3, 2, 16, 16)])
@pytest.mark.parametrize('added', [False, True])
def test_dense_convolution_is_paddles(kernel, stride, inputs, outputs, added):
    conv, after = nn.Conv2D(inputs, outputs, kernel, stride, kernel // 2), norm(outputs)
    x = paddle.randn([2, inputs, 9, 8])
    want = nn.functional.relu(after(conv(x)))
    residual = paddle.randn(want.shape) if added else None
    assert can_fuse(x, conv, after)
    got = conv_block(x, conv, after, 'relu', residual=residual)
    want = want if residual is None else want + residual
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_nan_and_inf_reach_their_pixel_only(value):
    conv = nn.Conv2D(20, 24, 1)
    conv.eval()
    x = paddle.randn([2, 20, 5, 5])
    x[1, 3, 2, 4] = value
    got, want = conv_block(x, conv, activation='relu').numpy(), conv(x).numpy()
    bad = ~np.isfinite(got)
    assert not bad[0].any() and not np.delete(bad[1].reshape(24, 25), 14, 1).any()
    np.testing.assert_array_equal(got[1, :, 2, 4], np.where(want[1, :, 2, 4] < 0, 0, want[1, :, 2, 4]))


def as_blocks(x):
    n, c, h, w = x.shape
    return x.reshape([n, c // 16, 16, h, w]).transpose([0, 1, 3, 4, 2])


@pytest.mark.parametrize('kernel, stride, inputs, outputs, batch, height, width', [
    (1, 1, 16, 48, 1, 14, 14), (1, 1, 600, 32, 2, 7, 7), (1, 1, 5, 16, 3, 2, 3), (1, 1, 64, 64, 1, 33, 31),
    (1, 2, 4, 16, 1, 5, 6), (3, 2, 3, 64, 2, 21, 18), (3, 1, 4, 16, 1, 1, 1), (5, 2, 2, 32, 1, 9, 4)])
def test_packed_convolution_is_the_plain_one(kernel, stride, inputs, outputs, batch, height, width):
    conv, after = nn.Conv2D(inputs, outputs, kernel, stride, kernel // 2), norm(outputs)
    conv.eval()
    packed = PackedConv2D(conv)
    x = paddle.randn([batch, inputs, height, width])
    residual = paddle.randn(conv(x).shape)
    want = (nn.functional.gelu(after(conv(x))) + residual).numpy()
    arguments = {'norm': after, 'activation': 'gelu'}
    assert can_fuse(x, packed, after, residual=residual)
    results = [conv_block(x, packed, residual=residual, **arguments)]
    results.append(conv_block(x, packed, residual=as_blocks(residual), to_blocks=True, **arguments))
    if inputs % 16 == 0:
        results.append(conv_block(as_blocks(x), conv, residual=as_blocks(residual), **arguments))
    for result in results[1:]:
        assert result.shape == as_blocks(residual).shape
    for result in results:
        np.testing.assert_allclose(as_planes(result).numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kernel, stride', [(1, 1), (3, 1), (3, 2), (5, 1), (13, 1), (13, 2)])
def test_depthwise_convolution_of_blocks_is_that_of_planes(kernel, stride):
    conv, after, x = DepthwiseConv2D(32, kernel, stride), norm(32), paddle.randn([2, 32, 12, 11])
    want = conv_block(x, conv, after, 'relu')
    got = conv_block(as_blocks(x), conv, after, 'relu')
    assert got.shape == as_blocks(want).shape
    np.testing.assert_allclose(as_planes(got).numpy(), want.numpy(), rtol=1e-5, atol=1e-5)


def test_packed_layers_do_without_the_operator_too(monkeypatch):
    conv = nn.Conv2D(16, 32, 1)
    conv.eval()
    packed, x, after = PackedConv2D(conv), paddle.randn([2, 16, 5, 6]), norm(32)
    want = conv(x).numpy()
    after.train()  # statistics of the batch: layer by layer
    with paddle.enable_grad():
        got = conv_block(as_blocks(x), packed, after, residual=as_blocks(paddle.zeros([2, 32, 5, 6])))
    np.testing.assert_allclose(as_planes(got).numpy(), norm_of_batch(want, after), rtol=1e-4, atol=1e-4)
    x.stop_gradient = False
    with paddle.enable_grad():
        packed(x).sum().backward()
    np.testing.assert_allclose(x.grad.numpy()[0, :, 0, 0], conv.weight.numpy()[:, :, 0, 0].sum(0), rtol=1e-4, atol=1e-5)
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'native')
    np.testing.assert_allclose(conv_block(x, packed).numpy(), want, rtol=1e-4, atol=1e-5)


def norm_of_batch(x, layer):
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    weight, bias = (t.numpy()[None, :, None, None] for t in (layer.weight, layer.bias))
    return (x - mean) / np.sqrt(variance + layer._epsilon) * weight + bias


def test_only_what_the_operator_can_compute_is_packed():
    hooked = nn.Conv2D(4, 16, 1)
    hooked.register_forward_post_hook(lambda *_: None)
    left = [nn.Conv2D(4, 8, 1), nn.Conv2D(16, 16, 1, groups=16), nn.Conv2D(4, 16, 3), nn.Conv2D(4, 16, 2, padding=1),
            nn.Conv2D(4, 16, 3, padding=1, dilation=2), nn.Conv2D(4, 16, 1, stride=3),
            nn.Conv2D(4, 16, (1, 3), padding=(0, 1)), nn.Conv2D(4, 16, 3, padding=1, padding_mode='reflect'), hooked]
    taken = [nn.Conv2D(4, 16, 3, 2, 1), nn.Conv2D(4, 32, 1, bias_attr=False)]
    model = pack_weights(nn.LayerList([*left, *taken]))
    assert [isinstance(layer, PackedConv2D) for layer in model] == [False] * len(left) + [True] * len(taken)


def test_a_hook_inside_a_packed_network_changes_nothing():
    model = RepLKNet([9, 7, 5, 3], [1, 1, 2, 1], [16, 32, 48, 64], small_kernel=3, num_classes=5)
    model.eval()
    x = paddle.randn([2, 3, 64, 52])
    want = model(x).numpy()
    shapes = []
    for form in (model, fuse(model)):
        packed = pack(copy.deepcopy(form))
        block = packed.stages[2].blocks[0].large_kernel
        for conv in ([block.small_kernel_conv.conv] if form is model else [block.large_kernel_reparam]):
            conv.register_forward_post_hook(lambda layer, inputs, result: shapes.append(result.shape))
        packed.stages[1].blocks[1].pw_conv_2.conv.register_forward_post_hook(lambda *_: None)
        np.testing.assert_allclose(packed(x).numpy(), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
        assert all(len(feature.shape) == 4 for feature in packed.forward_features(x))
    assert len(shapes) == 4 and set(map(tuple, shapes)) == {(2, 48, 4, 4)}


def test_packed_layers_keep_the_random_state_and_survive_copies_and_casts(rounding):
    half, conv = 12 * rounding('bfloat16'), nn.Conv2D(16, 32, 1)
    conv.eval()
    x = paddle.randn([2, 16, 5, 6])
    paddle.seed(7)
    expected = paddle.rand([3]).numpy()
    paddle.seed(7)
    packed = copy.deepcopy(PackedConv2D(conv))
    np.testing.assert_array_equal(paddle.rand([3]).numpy(), expected)
    np.testing.assert_allclose(conv_block(x, packed).numpy(), conv(x).numpy(), rtol=1e-4, atol=1e-5)
    got = conv_block(x.astype('bfloat16'), packed)
    assert got.dtype == paddle.bfloat16 and np.allclose(got.astype('float32').numpy(), conv(x).numpy(), atol=half)
    packed.to(dtype='bfloat16')
    assert np.allclose(conv_block(x, packed).numpy(), conv(x).numpy(), atol=half)


def test_fuse_comes_before_pack():
    model = RepLKNet([3, 3, 3, 3], [1, 1, 1, 1], [16, 16, 16, 16], num_classes=2, small_kernel=3)
    with pytest.raises(ValueError, match='fuse comes before pack'):
        fuse(pack(model))


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('kernel', [3, 9])
def test_weights_that_are_not_finite_in_blocks(kernel, value):
    conv, x = DepthwiseConv2D(16, kernel), paddle.randn([1, 16, 12, 9])
    conv.weight[3, 0, 0, 1] = value
    x[0, 5, 4, 4] = value
    want = conv(x).numpy()
    assert 0 < (~np.isfinite(want)).sum() < want.size / 4
    got = as_planes(conv_block(as_blocks(x), conv)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_other_layers_are_left_to_be_called():
    conv, after = nn.Conv2D(4, 4, 1), norm(4)
    conv.eval()
    x = paddle.randn([1, 4, 3, 3])
    assert can_fuse(x, conv, after)
    after.train()
    assert not can_fuse(x, conv, after)
    after.eval()
    hook = after.register_forward_post_hook(lambda *_: None)
    assert not can_fuse(x, conv, after)
    hook.remove()
    with paddle.enable_grad():
        assert not can_fuse(x, conv, after)
        for parameter in (*conv.parameters(), *after.parameters()):
            parameter.stop_gradient = True
        assert can_fuse(x, conv, after)
        x.stop_gradient = False
        assert not can_fuse(x, conv, after)


@pytest.mark.parametrize('name', ['fft', 'native'])
def test_other_implementations_call_the_layers(monkeypatch, name):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', name)
    assert not can_fuse(paddle.randn([1, 4, 3, 3]), nn.Conv2D(4, 4, 1))
    conv, after, x = nn.Conv2D(4, 4, 1), norm(4), paddle.randn([1, 4, 3, 3])
    np.testing.assert_array_equal(conv_block(x, conv, after, 'gelu', residual=x).numpy(),
                                  (x + nn.functional.gelu(after(conv(x)))).numpy())


def test_wrong_shapes_are_errors():
    conv = nn.Conv2D(4, 6, 1)
    x = paddle.randn([1, 4, 3, 3])
    for arguments in ({'residual': x}, {'norm': norm(5)}, {'pre_norm': norm(6)}):
        with pytest.raises((RuntimeError, ValueError, OSError)):
            conv_block(x, conv, **arguments)
    wide = PackedConv2D(nn.Conv2D(36, 16, 1))
    for layer, shape in ((conv, [1, 5, 3, 3]), (wide, [1, 4, 3, 3]), (wide, [1, 48, 3, 3])):
        with pytest.raises((RuntimeError, ValueError, OSError)):
            conv_block(paddle.zeros(shape), layer)
