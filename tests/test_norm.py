"""A batch norm and its activation in training by the C++ operator, against Paddle's layers in float64."""
import copy
import os

import numpy as np
import pytest

from large_kernel import DepthwiseConv2D, build, conv_block
from large_kernel.conv_norm_act import norm_act

import paddle  # isort: skip
import paddle.nn.functional as F  # isort: skip
from paddle import nn  # isort: skip

pytestmark = pytest.mark.skipif(build.reason_unavailable() is not None,
                                reason=f'no C++ operator: {build.reason_unavailable()}')
EPS = np.finfo('float32').eps
ACTIVATIONS = {'': lambda x: x, 'relu': F.relu, 'gelu': F.gelu}


@pytest.fixture(autouse=True)
def operator(monkeypatch):
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL', raising=False)
    paddle.seed(3)


def make(channels, **arguments):
    norm = nn.BatchNorm2D(channels, momentum=0.8, **arguments)
    norm.weight.set_value(paddle.randn([channels]))
    norm.bias.set_value(paddle.randn([channels]))
    return norm


def step(norm, function, x, dy):
    """Result, gradients and running statistics after `function` of a fresh copy of the norm and x."""
    norm, x = copy.deepcopy(norm), x.detach()
    x.stop_gradient = False
    y = function(x, norm)
    y.backward(dy)
    return {'y': y, 'dx': x.grad, 'dweight': norm.weight.grad, 'dbias': norm.bias.grad, 'mean': norm._mean,
            'variance': norm._variance}


def layers(activation):
    return lambda x, norm: ACTIVATIONS[activation](norm(x))


def takes_operator(x, norm, activation=''):
    x = x.detach()
    x.stop_gradient = False
    node = norm_act(x, norm, activation).grad_fn
    return node is not None and 'batch_norm_act' in node.name()


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('shape, offset', [
    ((1, 1, 1, 2), 0), ((1, 3, 2, 1), 1), ((4, 5, 7, 7), 0), ((2, 17, 13, 9), -1), ((3, 64, 28, 28), 0),
    ((2, 2, 90, 101), 0), ((2, 3, 31, 33), 300)])
def test_is_paddles_norm_and_activation(shape, offset, activation):
    if activation == 'relu':
        offset = 0  # rounding would move values across its step
    norm, x, dy = make(shape[1]), paddle.randn(shape) + offset, paddle.randn(shape)
    assert takes_operator(x, norm, activation)
    got = step(norm, lambda x, norm: norm_act(x, norm, activation), x, dy)
    want = step(norm.to(dtype='float64'), layers(activation), x.astype('float64'), dy.astype('float64'))
    count, deviation = x.size // shape[1], float(x.std()) or 1
    tolerances = {'y': 20, 'dx': 40, 'dweight': 10 * count, 'dbias': 10 * count, 'mean': 4, 'variance': 4}
    for name, tolerance in tolerances.items():
        error = np.abs(got[name].numpy() - want[name].numpy()).max()
        # x itself is given to one rounding of its size
        assert error <= tolerance * EPS * (1 + abs(offset) / deviation) * max(1, float(want[name].abs().max())), name


def test_running_statistics_stay_plain_buffers():
    norm, x = make(4), paddle.randn([2, 4, 5, 6])
    mean, variance = norm._mean, norm._variance
    for _ in range(3):
        norm_act(x, norm, 'gelu').sum().backward()
    assert norm._mean is mean and norm._variance is variance
    assert mean.stop_gradient and variance.stop_gradient and mean.is_leaf and variance.is_leaf
    with paddle.no_grad():
        assert norm_act(x, norm).stop_gradient


def test_strided_tensors():
    norm, x, dy = make(3), paddle.randn([4, 5, 6, 3]), paddle.randn([4, 3, 6, 5])
    x, dy = x.transpose([0, 3, 1, 2]), dy.transpose([0, 1, 3, 2])
    got, want = (step(norm, f, x, dy) for f in (lambda x, norm: norm_act(x, norm, 'gelu'), layers('gelu')))
    for name in want:
        np.testing.assert_allclose(got[name].numpy(), want[name].numpy(), rtol=1e-5, atol=1e-5)


def test_momentum_one_leaves_the_running_statistics_to_the_last_bit():
    norm, x = make(4), paddle.randn([2, 4, 5, 6])
    norm_act(x, norm)
    before = [norm._mean.numpy(), norm._variance.numpy()]
    norm._momentum = 1.0  # as a recomputed block asks for
    norm_act(x, norm)
    assert (norm._mean.numpy() == before[0]).all() and (norm._variance.numpy() == before[1]).all()


@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_results_do_not_depend_on_the_number_of_threads(activation):
    norm, x, dy = make(23), paddle.randn([3, 23, 17, 19]), paddle.randn([3, 23, 17, 19])
    results = []
    try:
        for threads in (1, 2, 3, 8):
            paddle.base.core.set_num_threads(threads)
            results.append(step(norm, lambda x, norm: norm_act(x, norm, activation), x, dy))
    finally:
        paddle.base.core.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    for other in results[1:]:
        assert all((other[name].numpy() == results[0][name].numpy()).all() for name in other)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_what_is_not_finite_stays_in_its_channel(value, activation):
    norm, x, dy = make(3), paddle.randn([2, 3, 6, 7]), paddle.randn([2, 3, 6, 7])
    clean = step(norm, lambda x, norm: norm_act(x, norm, activation), x, dy)
    x[1, 1, 2, 3] = value
    got = step(norm, lambda x, norm: norm_act(x, norm, activation), x, dy)
    for name, axis in (('y', 1), ('dx', 1), ('mean', 0), ('variance', 0)):
        values, expected = np.moveaxis(got[name].numpy(), axis, 0), np.moveaxis(clean[name].numpy(), axis, 0)
        assert (values[[0, 2]] == expected[[0, 2]]).all(), name
        assert not np.isfinite(values[1]).any(), name


@pytest.mark.parametrize('value', [0., 20., 1e4, -20., -1e4])
def test_gelu_of_large_values_has_slope_0_or_1(value):
    norm = make(1)
    norm.weight.set_value(paddle.zeros([1]))
    norm.bias.set_value(paddle.full([1], value))
    norm_act(paddle.randn([1, 1, 4, 4]), norm, 'gelu').sum().backward()
    assert abs(norm.bias.grad.item() - 16 * (0.5 if value == 0 else value > 0)) < 1e-30


def test_the_layers_serve_where_the_operator_cannot(monkeypatch):
    x, frozen = paddle.randn([2, 4, 5, 6]), make(4)
    frozen.eval()
    assert takes_operator(x, make(4)) and not takes_operator(x, frozen)
    assert not takes_operator(x, make(4, use_global_stats=True))
    assert not takes_operator(x, nn.BatchNorm2D(4, weight_attr=False, bias_attr=False))
    assert not takes_operator(x, nn.BatchNorm2D(6, data_format='NHWC'))
    assert not takes_operator(x, type('Mine', (nn.BatchNorm2D,), {})(4))
    assert not takes_operator(paddle.randn([1, 4, 1, 1]), make(4))  # one value: Paddle passes it on as it is
    assert not takes_operator(x.astype('float64'), make(4).to(dtype='float64'))
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'native')
    assert not takes_operator(x, make(4))
    with pytest.raises(ValueError):
        norm_act(x, make(5))


def test_a_hook_on_the_norm_is_called():
    norm, seen = make(4), []
    norm.register_forward_post_hook(lambda layer, inputs, output: seen.append(output.shape))
    conv = nn.Conv2D(4, 4, 1)
    conv_block(paddle.randn([2, 4, 5, 6]), conv, norm, 'relu', pre_norm=norm)
    assert seen == [[2, 4, 5, 6]] * 2


@pytest.mark.parametrize('momentum', [0, 1, 0.3])
def test_any_momentum(momentum):
    ours, theirs, x = (nn.BatchNorm2D(4, momentum=momentum), nn.BatchNorm2D(4, momentum=momentum),
                       paddle.randn([2, 4, 5, 6]) + 3)
    norm_act(x, ours)
    theirs(x)
    np.testing.assert_allclose(ours._mean.numpy(), theirs._mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours._variance.numpy(), theirs._variance.numpy(), rtol=1e-5, atol=1e-6)


def test_a_pass_that_used_the_running_statistics_before_keeps_its_gradient():
    norm, x = make(4), paddle.randn([2, 4, 5, 6])
    norm.eval()
    loss = norm_act(x, norm).sum()
    norm.train()
    (loss + norm_act(x, norm).sum()).backward()
    assert norm.weight.grad is not None


def test_a_traced_training_step_is_that_of_the_layers():
    class Net(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2D(3, 8, 1), make(8)

        def forward(self, x):
            return conv_block(x, self.conv, self.norm, 'gelu')

    net, x = Net(), paddle.randn([2, 3, 5, 6])
    traced = paddle.jit.to_static(copy.deepcopy(net), full_graph=True)
    got, want = traced(x), net(x)
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-5)


@pytest.mark.parametrize('conv', [lambda: nn.Conv2D(4, 4, 3, 2, 1, bias_attr=False), lambda: nn.Conv2D(4, 4, 1),
                                  lambda: DepthwiseConv2D(4, 5, bias_attr=False), lambda: DepthwiseConv2D(4, 3, 2),
                                  lambda: nn.Conv2D(4, 4, 3, padding=1, padding_mode='reflect', bias_attr=False),
                                  lambda: nn.Conv2D(4, 8, 3, padding=1, groups=2, bias_attr=False)])
def test_in_training_layers_compute_the_same_with_and_without_their_call(conv):
    """Layers with hooks are called as layers, plain ones are not."""
    paddle.seed(0)
    conv, x, results = conv(), paddle.randn([2, 4, 9, 8]), []
    for hooked in (False, True):
        norm, calls = nn.BatchNorm2D(conv._out_channels), []
        hooks = [layer.register_forward_post_hook(lambda *_, calls=calls: calls.append(1))
                 for layer in (conv, norm) if hooked]
        conv.clear_gradients()
        y = conv_block(x, conv, norm, 'relu')
        y.square().sum().backward()
        results.append([y.numpy(), conv.weight.grad.numpy(), norm._mean.numpy(), norm._variance.numpy()])
        assert len(calls) == 2 * hooked
        for hook in hooks:
            hook.remove()
    for plain, called in zip(*results):
        np.testing.assert_allclose(plain, called, rtol=1e-4, atol=1e-5)
