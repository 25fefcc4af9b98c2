"""A convolution with the norms, activation and residual around it in one operator, against plain layers and float64."""
import contextlib
import copy
import math

import numpy as np
import pytest

import replknet
from fuse import fuse, pack
from large_kernel import (
    DepthwiseConv2D,
    as_planes,
    build,
    computed,
    conv_block,
    defer,
    each_convolution,
    operators,
    pack_weights,
)
from large_kernel.conv_norm_act import PackedConv2D, can_fuse
from large_kernel.layout import MapLayout
from replknet import ConvBN, RepLKNet

import paddle  # isort: skip
from paddle import nn  # isort: skip

pytestmark = pytest.mark.skipif(build.reason_unavailable() is not None,
                                reason=f'no C++ operator: {build.reason_unavailable()}')
EPS = np.finfo('float32').eps


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch):
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL', raising=False)
    paddle.seed(3)
    with paddle.no_grad():
        yield


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


@pytest.mark.parametrize('merged', [False, True])
def test_network_computes_the_same_with_and_without(merged, monkeypatch, tmp_path):
    model = RepLKNet([9, 7, 5, 3], [1, 1, 2, 1], [12, 16, 20, 24], small_kernel=3, num_classes=5)
    for name, parameter in model.named_parameters():
        if name.endswith(('_variance', 'norm.weight')):
            parameter.set_value(paddle.rand(parameter.shape) + 0.5)
        elif name.endswith(('_mean', 'norm.bias')):
            parameter.set_value(paddle.randn(parameter.shape) * 0.1)
    model.eval()
    if merged:
        model.structural_reparam()
    x = paddle.randn([2, 3, 64, 52])
    calls = []
    real = operators.run_fused
    monkeypatch.setattr(operators, 'run_fused', lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr('large_kernel.layout.defer', lambda x: x)
    fused = model(x).numpy()
    assert len(calls) == 2 * 5 + 2 * 5 + (5 if merged else 10) + 4 + 6
    with paddle.enable_grad():
        plain = model(x).numpy()
    np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())

    paddle.jit.save(paddle.jit.to_static(model, input_spec=[paddle.static.InputSpec([None, 3, 64, 52])],
                                         full_graph=True), str(tmp_path / 'model'))
    program = paddle.jit.load(str(tmp_path / 'model'))
    np.testing.assert_allclose(program(x).numpy(), fused, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize('channels', [[16, 32, 48, 64], [12, 16, 20, 24]])
@pytest.mark.parametrize('out_indices', [None, (1, 3)])
def test_packed_network_computes_the_same(channels, out_indices, monkeypatch, tmp_path):
    model = RepLKNet([9, 7, 5, 3], [1, 1, 2, 1], channels, small_kernel=3, num_classes=5, out_indices=out_indices,
                     norm_intermediate_features=out_indices is not None)
    for name, parameter in model.named_parameters():
        if name.endswith(('_variance', 'norm.weight')):
            parameter.set_value(paddle.rand(parameter.shape) + 0.5)
    model.eval()
    images = [paddle.randn([2, 3, 64, 52]), paddle.randn([1, 3, 33, 97])]
    want = [model(x) for x in images]
    packed = pack(copy.deepcopy(model))
    assert isinstance(packed.stem[0].conv, PackedConv2D) == (channels[0] % 16 == 0)
    for _ in range(2):
        for x, expected in zip(images, want):
            found = packed(x)
            for a, b in zip(expected, found) if out_indices else [(expected, found)]:
                np.testing.assert_allclose(b.numpy(), a.numpy(), rtol=1e-3, atol=1e-4 * float(a.abs().max()))
        monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'fft')  # and without the operator


def test_what_the_operator_would_compute_otherwise_is_left_to_the_layers():
    class Mine(nn.Conv2D):
        def forward(self, x):
            return x * 0 + 42

    class MyNorm(nn.BatchNorm2D):
        def forward(self, x):
            return x * 0 + 7

    x, conv = paddle.randn([2, 4, 6, 5]), nn.Conv2D(4, 4, 1)
    own = MyNorm(4)
    own.eval()
    assert float(conv_block(x, Mine(4, 4, 3, padding=1)).mean()) == 42
    assert float(conv_block(x, conv, own).mean()) == 7
    for arguments in ({'weight_attr': False}, {'bias_attr': False}, {'use_global_stats': False}):
        bare = nn.BatchNorm2D(4, **arguments)
        bare._mean.set_value(paddle.randn([4]))
        bare.eval()
        np.testing.assert_allclose(conv_block(x, conv, bare).numpy(), bare(conv(x)).numpy(), rtol=1e-4, atol=1e-5)
    last = nn.Conv2D(4, 16, 3, padding=1, data_format='NHWC')
    y = paddle.randn([1, 5, 6, 4])
    np.testing.assert_array_equal(conv_block(y, last).numpy(), last(y).numpy())
    assert not can_fuse(paddle.zeros([0, 4, 6, 5]), nn.Conv2D(4, 16, 3, padding=1))
    assert not can_fuse(x, nn.Conv2D(5, 16, 3, padding=1))
    with pytest.raises(ValueError):
        conv_block(paddle.randn([2, 1, 9, 9]), DepthwiseConv2D(5, 3))


def test_layers_whose_weights_are_no_parameters():
    x = paddle.randn([2, 4, 6, 5])
    for conv in (DepthwiseConv2D(4, 3), nn.Conv2D(4, 16, 3, padding=1)):
        want = conv(x).numpy()
        np.testing.assert_allclose(conv_block(x, nn.utils.weight_norm(conv)).numpy(), want, rtol=1e-4, atol=1e-5)
        nn.utils.remove_weight_norm(conv)
        weight = conv.weight.detach()
        del conv.weight
        conv.weight = weight  # a tensor that is no parameter of the layer
        assert conv._parameters.get('weight') is None and can_fuse(x, conv)
        np.testing.assert_allclose(conv_block(x, conv).numpy(), want, rtol=1e-4, atol=1e-5)


def test_an_overridden_forward_features_is_what_forward_calls():
    class Half(RepLKNet):
        def forward_features(self, x):
            return [y / 2 for y in super().forward_features(x)]

    model = Half([5], [1], [16], num_classes=None)
    model.eval()
    x = paddle.randn([1, 3, 32, 32])
    got = model(x)
    np.testing.assert_allclose(got.numpy(), RepLKNet.forward_features(model, x)[-1].numpy() / 2, rtol=1e-6)


@pytest.mark.parametrize('channels', [1, 3, 16])
def test_a_network_of_images_of_any_channels(channels, monkeypatch):
    model = RepLKNet([7, 5], [1, 1], [16, 32], in_channels=channels, num_classes=3)
    model.eval()
    x = paddle.randn([2, channels, 40, 36])
    got = model(x).numpy()
    with paddle.enable_grad():
        np.testing.assert_allclose(got, model(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def network():
    model = RepLKNet([9, 7, 5, 5], [1, 1, 2, 1], [16, 32, 48, 64], num_classes=5)
    model.eval()
    return model


def layouts(model, x, monkeypatch):
    """Numbers of dimensions of the results of all `conv_block`s of a call."""
    found, real = [], replknet.conv_block

    def watch(*arguments, **named):
        found.append(real(*arguments, **named))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(replknet, 'conv_block', watch)
        model(x)
    return [len(y.shape) for y in found]


@pytest.mark.parametrize('merged', [False, True])
def test_inner_maps_stand_in_blocks_and_logits_stay(network, merged, monkeypatch):
    if merged:
        network.structural_reparam()
    x = paddle.randn([2, 3, 64, 52])
    found = layouts(network, x, monkeypatch)
    assert set(found) == {5}
    logits = network(x).numpy()
    monkeypatch.setattr(replknet, 'map_layout', lambda model, layers: MapLayout(False, False))
    assert set(layouts(network, x, monkeypatch)) == {4}
    want = network(x).numpy()
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('place', ['stages', 'stages.1', 'stages.2.blocks.0.large_kernel', 'stem.1', 'stem.2.conv',
                                   'transitions.0.1.norm', 'stages.0.blocks.1'])
@pytest.mark.parametrize('packed', [False, True])
def test_a_hook_anywhere_sees_planes(network, place, packed, monkeypatch):
    if packed:
        pack(network)
    seen, layer = [], dict(network.named_sublayers())[place]
    layer.register_forward_post_hook(lambda layer, inputs, output: seen.append(len(output.shape)))
    x = paddle.randn([1, 3, 64, 64])
    found = layouts(network, x, monkeypatch)
    assert set(found) == ({5} if place.endswith('norm') else {4})  # a norm is called with planes by `conv_block`
    assert place == 'stages' or set(seen) == {4}  # a list is not called
    logits = network(x).numpy()
    monkeypatch.setattr(replknet, 'map_layout', lambda model, layers: MapLayout(False, False))
    np.testing.assert_allclose(logits, network(x).numpy(), rtol=1e-4, atol=1e-5)


def test_layers_of_other_kinds_widths_or_modes_see_planes(network, monkeypatch):
    x = paddle.randn([1, 3, 64, 64])

    class Mine(nn.Layer):
        def forward(self, x):
            assert len(x.shape) == 4
            return x

    odd = RepLKNet([9, 7, 5, 5], [1, 1, 2, 1], [16, 24, 48, 64], num_classes=5)
    odd.eval()
    assert set(layouts(odd, x, monkeypatch)) == {4}
    other = copy.deepcopy(network)
    other.transitions[0][0].norm = nn.GroupNorm(4, 32)  # and is called as it is
    assert set(layouts(other, x, monkeypatch)) == {4}
    other = copy.deepcopy(network)
    other.stages[1].blocks[0] = Mine()
    assert set(layouts(other, x, monkeypatch)) == {4}
    with paddle.enable_grad():
        assert set(layouts(network, x, monkeypatch)) == {4}
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'native')
    assert set(layouts(network, x, monkeypatch)) == {4}
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL')
    network.train()
    assert set(layouts(network, x, monkeypatch)) == {4}


@pytest.fixture
def sequences(monkeypatch):
    """The numbers of convolutions of each sequence that is computed."""
    found, real = [], operators.run_fused_sequence

    def watch(x, parameters, kernels, *more):
        found.append(len(kernels))
        return real(x, parameters, kernels, *more)

    monkeypatch.setattr(operators, 'run_fused_sequence', watch)
    return found


@pytest.mark.parametrize('form', ['merged', 'fused', 'packed'])
def test_a_network_as_sequences_is_the_network(network, form, sequences, monkeypatch):
    network.structural_reparam()
    network = {'merged': lambda n: n, 'fused': fuse, 'packed': lambda n: pack(fuse(n))}[form](network)
    x = paddle.randn([2, 3, 64, 52])
    found = network._features(x)
    assert sequences == [4 + 5, 2 + 5, 2 + 10, 2 + 5]
    monkeypatch.setattr('large_kernel.layout.defer', lambda x: x)
    for a, b in zip(found, network._features(x)):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_what_a_sequence_cannot_hold_is_called(network, sequences, monkeypatch):
    x = paddle.randn([1, 3, 64, 64])
    network(x)
    assert not sequences  # the branches of the training form are added by Paddle
    network.structural_reparam()
    with paddle.enable_grad():
        network(x)
    hook = network.stages[2].blocks[1].pw_conv_1.register_forward_post_hook(lambda *_: None)
    network(x)
    hook.remove()
    assert all(found.dtype == paddle.bfloat16 for found in network._features(x.astype('bfloat16')))
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'native')
    network(x)
    assert not sequences
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL')
    network(x)
    assert len(sequences) == 4


def test_convolutions_are_watched_one_at_a_time(network, sequences):
    network.structural_reparam()
    x, seen, depth = paddle.randn([1, 3, 64, 64]), [], []

    @contextlib.contextmanager
    def around(conv, fused):
        depth.append(conv)
        assert len(depth) == 1 and fused
        seen.append(conv._kernel_size[0])
        yield
        depth.pop()

    with each_convolution(around):
        watched = network(x)
    assert seen == [3, 3, 1, 3] + [1, 9, 1, 1, 1] + [1, 3] + [1, 7, 1, 1, 1] + [1, 3] + 2 * [1, 5, 1, 1, 1] + [
        1, 3] + [1, 5, 1, 1, 1]
    assert not sequences
    np.testing.assert_allclose(network(x).numpy(), watched.numpy(), rtol=1e-5, atol=1e-6)
    assert len(seen) == 35 and len(sequences) == 4  # it ends with the block


@pytest.mark.parametrize('place', ['stages.2.blocks.0.pw_conv_2.norm', 'stages.2.blocks.2.pre_large_kernel_bn',
                                   'stem.0.norm'])
def test_a_norm_in_training_mode_amid_a_sequence(network, place, monkeypatch):
    network.structural_reparam()
    dict(network.named_sublayers())[place].train()
    other, x = copy.deepcopy(network), paddle.randn([2, 3, 64, 64])
    got = network(x).numpy()
    monkeypatch.setattr('large_kernel.layout.defer', lambda x: x)
    np.testing.assert_allclose(got, other(x).numpy(), rtol=1e-5, atol=1e-6)
    for a, b in zip(network.parameters(), other.parameters()):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_sequences_that_part_and_meet():
    first, second, third = nn.Conv2D(4, 16, 3, 2, 1), DepthwiseConv2D(16, 5), nn.Conv2D(16, 16, 1)
    x = paddle.randn([2, 4, 9, 6])
    a = conv_block(defer(x), first, activation='relu')
    b = conv_block(a, second)
    c = conv_block(b, third, residual=a)
    d = conv_block(a, third, residual=b)  # from an earlier map: computed at once
    assert (a.shape, b.dtype, c.shape) == ([2, 16, 5, 3], x.dtype, [2, 16, 5, 3])
    want_a = conv_block(x, first, activation='relu')
    want_b = conv_block(want_a, second)
    for got, want in ((a, want_a), (b, want_b), (c, conv_block(want_b, third, residual=want_a)),
                      (d, conv_block(want_a, third, residual=want_b)),
                      (conv_block(c, third, residual=want_a), conv_block(computed(c), third, residual=want_a)),
                      (as_planes(conv_block(c, third, to_blocks=True)), conv_block(computed(c), third))):
        np.testing.assert_allclose(computed(got).numpy(), want.numpy(), rtol=1e-6, atol=1e-6)
    assert computed(x) is x and computed(defer(x)) is x


def test_wrong_shapes_in_a_sequence_are_errors():
    x, conv = defer(paddle.randn([1, 4, 3, 3])), nn.Conv2D(4, 6, 1)
    for arguments in ({'residual': x}, {'norm': norm(5)}, {'pre_norm': norm(6)}):
        with pytest.raises((RuntimeError, ValueError, OSError)):
            computed(conv_block(defer(computed(x)), conv, **arguments))
    with pytest.raises((RuntimeError, ValueError, OSError)):
        operators.run_fused_sequence(computed(x), [conv.weight], [1], [1], [1], [-1], [''], [0.0, 0.0])
    with pytest.raises((RuntimeError, ValueError, OSError)):
        operators.run_fused_sequence(computed(x), [conv.weight], [1], [1], [0], [1], [''], [0.0, 0.0])


def test_conv_bn_trains_as_before():
    with paddle.enable_grad():
        layer = ConvBN(4, 6, 1, activation='gelu')
        x = paddle.randn([2, 4, 5, 5])
        x.stop_gradient = False
        (layer(x) ** 2).sum().backward()
        assert float(layer.conv.weight.grad.abs().sum()) > 0
        assert float(layer.norm._mean.abs().sum()) > 0
