"""The network in inference: fused operators, NCHW16c feature maps and sequences, against the layers one by one."""
import contextlib
import copy

import numpy as np
import pytest

import replknet
from deploy.runtimes import load_paddle_program, save_paddle_program
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
)
from large_kernel.conv_norm_act import PackedConv2D, can_fuse
from large_kernel.layout import MapLayout
from large_kernel.quantise import quantise
from replknet import ConvBN, RepLKNet
from tests.test_conv_norm_act import norm
from tests.test_fuse import randomise_norms

import paddle  # isort: skip
from paddle import nn  # isort: skip

pytestmark = [pytest.mark.usefixtures('without_gradients'), pytest.mark.skipif(
    build.reason_unavailable() is not None, reason=f'no C++ operator: {build.reason_unavailable()}')]


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


@pytest.mark.parametrize('form', ['merged', 'fp32', 'bf16', 'int8'])
def test_a_program_computes_in_sequences_what_the_network_computes(network, form, sequences, tmp_path):
    images = [np.random.default_rng(0).standard_normal(s, np.float32) for s in ((2, 3, 64, 52), (1, 3, 33, 97))]
    randomise_norms(network, 64).structural_reparam()
    if form != 'merged':
        network = fuse(network)
        quantised = quantise(network, images[:1]) if form == 'int8' else None
        pack(network, 'fp32' if form == 'fp32' else 'bf16', quantised)
    save_paddle_program(network, str(tmp_path / 'model'))
    assert sequences == [4 + 5, 2 + 5, 2 + 10, 2 + 5]
    build.load_operator()
    program = load_paddle_program(str(tmp_path / 'model'))
    expected = [network(paddle.to_tensor(x)).numpy() for x in images]
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    for x, want in zip(images, expected):
        np.testing.assert_allclose(program(x), want, rtol=1e-5, atol=1e-6)
    translated = paddle.jit.to_static(network, full_graph=True)  # from its source
    np.testing.assert_allclose(translated(paddle.to_tensor(images[0])).numpy(), expected[0], rtol=1e-5, atol=1e-6)


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
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'native')
    network(x)
    assert not sequences
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL')
    network(x)
    assert len(sequences) == 4
    # images in bfloat16: maps stay in bfloat16 from the first result in NCHW16c on, and so can be deferred
    assert all(found.dtype == paddle.bfloat16 for found in network._features(x.astype('bfloat16')))
    assert len(sequences) == 4 + 3


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
    with pytest.raises((RuntimeError, ValueError, OSError)):
        operators.run_fused_sequence(computed(x), [conv.weight, conv.bias], [1], [1], [0], [-1], [''], [0.0, 0.0])


def test_conv_bn_trains_as_before():
    with paddle.enable_grad():
        layer = ConvBN(4, 6, 1, activation='gelu')
        x = paddle.randn([2, 4, 5, 5])
        x.stop_gradient = False
        (layer(x) ** 2).sum().backward()
        assert float(layer.conv.weight.grad.abs().sum()) > 0
        assert float(layer.norm._mean.abs().sum()) > 0
