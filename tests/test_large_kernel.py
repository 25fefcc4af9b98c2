"""The depthwise convolution against a float64 reference, as a layer, and under Paddle's other mechanisms."""
import logging
import os

import numpy as np
import pytest

import large_kernel
from large_kernel import DepthwiseConv2D, autotune, build, depthwise_conv2d

import paddle  # isort: skip
from paddle import nn  # isort: skip

VARIABLE = 'LARGE_KERNEL_CONV_IMPL'
EPS = np.finfo('float32').eps
LANES = 16

needs_operator = pytest.mark.skipif(build.reason_unavailable() is not None,
                                    reason=f'no C++ operator: {build.reason_unavailable()}')
IMPLEMENTATIONS = [pytest.param('custom', marks=needs_operator), 'fft', 'native']


def correlate(x, weight, dy, stride):
    """Float64 output [N, C, OH, OW] and the gradients of x and weight, by an FFT too long to wrap around."""
    kernel, (height, width) = weight.shape[-1], x.shape[2:]
    pad, size = kernel // 2, (height + kernel, width + kernel)
    spread = np.zeros(x.shape)
    spread[:, :, ::stride, ::stride] = dy
    fx, fw, fd = (np.fft.rfft2(a.astype('float64'), size) for a in (x, weight[:, 0], spread))

    def window(spectrum, rows, columns):  # result[i] = product at lag i - pad
        return np.roll(np.fft.irfft2(spectrum, size), (pad, pad), (-2, -1))[..., :rows, :columns]

    y = window(fx * fw.conj(), height, width)[:, :, ::stride, ::stride]
    dx = np.roll(np.fft.irfft2(fd * fw, size), (-pad, -pad), (-2, -1))[..., :height, :width]
    return y, dx, window((fx * fd.conj()).sum(0), kernel, kernel)[:, None]


def draw(rng, batch, channels, height, width, kernel, stride, dtype='float32'):
    def normal(*shape):  # values that the dtype holds exactly
        return paddle.to_tensor(rng.standard_normal(shape).astype('float32')).astype(dtype)
    x, weight, bias = normal(batch, channels, height, width), normal(channels, 1, kernel, kernel), normal(channels)
    dy = normal(batch, channels, -(-height // stride), -(-width // stride))
    for tensor in (x, weight, bias):
        tensor.stop_gradient = False
    return x, weight, bias, dy


def errors(x, weight, bias, dy, stride, bound, rounding=0.0, plane=False):
    """Largest error of the output and of each gradient, as a share of the bound:
    `bound` float32 epsilons of the sum of |products|, the plane's largest if `plane`, plus the result's rounding."""
    y = depthwise_conv2d(x, weight, bias, stride)
    got = [y, *paddle.grad([y], [x, weight, bias], [dy])]
    got = [tensor.astype('float32').numpy().astype('float64') for tensor in got]
    x, weight, bias, dy = (tensor.detach().astype('float32').numpy() for tensor in (x, weight, bias, dy))
    want, limit = (correlate(*arrays, stride) for arrays in ((x, weight, dy), map(np.abs, (x, weight, dy))))
    want = [want[0] + bias[:, None, None], *want[1:], dy.astype('float64').sum((0, 2, 3))]
    limit = [limit[0] + np.abs(bias)[:, None, None], *limit[1:], np.abs(dy).sum((0, 2, 3))]
    if plane:
        limit = [m.max((-2, -1), keepdims=True) if m.ndim == 4 else m for m in limit]
    return [np.max(np.abs(g - w) / (bound * EPS * m + rounding * np.abs(w) + 1e-7 * (rounding > 0) + 1e-12))
            for g, w, m in zip(got, want, limit)]


def drawn_shapes(rng, count):
    for _ in range(count):
        kernel = int(rng.choice([3, 5, 7, 9, 11, 13, 15, 21, 27, 29, 31, 33, 47, 63]))
        channels = int(rng.choice([1, 2, 3, 7, LANES - 1, LANES, LANES + 1, 2 * LANES, 2 * LANES + 5, 37]))
        height, width = rng.integers(1, 45, 2)
        yield int(rng.integers(1, 6)), channels, int(height), int(width), kernel, int(rng.integers(1, 3))


@needs_operator
@pytest.mark.parametrize('seed', range(10))
def test_operator_on_drawn_shapes(force, seed):
    force('custom')
    rng = np.random.default_rng(seed)
    for shape in drawn_shapes(rng, 55):
        share = errors(*draw(rng, *shape), shape[-1], bound=8)
        assert max(share) < 1, f'[N, C, H, W], K, stride = {shape}: {share}'


@needs_operator
@pytest.mark.parametrize('shape', [
    (1, 16, 56, 56, 31, 1), (2, 16, 28, 28, 29, 1), (5, 16, 14, 14, 27, 1), (5, 16, 7, 7, 13, 1),
    (1, 16, 96, 96, 31, 1), (1, 5, 112, 112, 3, 1), (2, 5, 112, 112, 3, 2), (2, 7, 56, 56, 5, 1), (1, 2, 1, 200, 31, 1),
    (1, 2, 200, 1, 31, 1), (1, 1, 300, 301, 51, 1), (3, 1, 1, 1, 63, 1), (3, 1, 1, 1, 63, 2),
    (1, 3, 2, 2, 63, 2), (1, 2, 9, 9, 1, 2), (1, 17, 256, 260, 3, 1),
], ids=str)
def test_operator_on_the_networks_and_extreme_shapes(force, shape):
    force('custom')
    assert max(errors(*draw(np.random.default_rng(0), *shape), shape[-1], bound=8)) < 1


@pytest.mark.parametrize('name', ['fft', 'native'])
def test_other_implementations_on_drawn_shapes(force, name):
    force(name)
    rng = np.random.default_rng(1)
    for shape in drawn_shapes(rng, 20):
        # An FFT spreads rounding errors over a plane.
        share = errors(*draw(rng, *shape), shape[-1], bound=8, plane=name == 'fft')
        assert max(share) < 1, f'{shape}: {share}'


@needs_operator
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_operator_in_half_precision(force, dtype, rounding):
    force('custom')
    rng = np.random.default_rng(2)
    for shape in [*drawn_shapes(rng, 20), (2, 16, 14, 14, 27, 1), (2, 20, 33, 33, 3, 2)]:
        share = errors(*draw(rng, *shape, dtype), shape[-1], bound=8, rounding=rounding(dtype))
        assert max(share) < 1, f'{shape}: {share}'


@needs_operator
@pytest.mark.parametrize('kernel, stride', [(3, 1), (3, 2), (5, 1), (13, 1), (9, 2)])
def test_operator_against_finite_differences(force, kernel, stride):
    """The loss is linear in x and in the weight, so a central difference is exact but for rounding."""
    force('custom')
    rng = np.random.default_rng(3)
    x, weight, bias, dy = draw(rng, 2, 5, 9, 8, kernel, stride)
    dx, dweight = paddle.grad([depthwise_conv2d(x, weight, bias, stride)], [x, weight], [dy])

    def loss(x, weight):
        return float((depthwise_conv2d(x, weight, bias, stride).detach() * dy).sum())

    for _ in range(5):
        along = paddle.to_tensor(rng.standard_normal(x.shape).astype('float32'))
        slope = (loss(x + along, weight) - loss(x - along, weight)) / 2
        assert slope == pytest.approx(float((dx * along).sum()), abs=2e-3)
        along = paddle.to_tensor(rng.standard_normal(weight.shape).astype('float32'))
        slope = (loss(x, weight + along) - loss(x, weight - along)) / 2
        assert slope == pytest.approx(float((dweight * along).sum()), abs=2e-3)


@needs_operator
def test_results_do_not_depend_on_the_number_of_threads(force):
    force('custom')
    rng = np.random.default_rng(4)
    shapes = [(3, 20, 14, 14, 27, 1), (1, 3, 30, 31, 31, 1), (5, 33, 7, 7, 13, 1), (2, 19, 20, 20, 5, 1),
              (3, 9, 9, 11, 3, 2), (3, 9, 9, 40, 3, 2), (2, 9, 9, 33, 3, 1),
              (1, 16, 56, 56, 31, 1), (1, 5, 41, 20, 21, 1)]
    try:
        for shape in shapes:
            x, weight, bias, dy = draw(rng, *shape)
            results = []
            for threads in (1, 2, 3, 8):
                paddle.base.core.set_num_threads(threads)
                y = depthwise_conv2d(x, weight, bias, shape[-1])
                results.append([t.numpy() for t in (y, *paddle.grad([y], [x, weight, bias], [dy]))])
            for other in results[1:]:
                for a, b in zip(results[0], other):
                    np.testing.assert_array_equal(a, b)
    finally:
        paddle.base.core.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


def by_taps(x, weight, dy, stride):
    """Output and gradients, tap by tap, without the taps that meet padding (0 * Inf would be NaN)."""
    kernel, (height, width) = weight.shape[-1], x.shape[2:]
    y, dx, dweight = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(weight.shape)
    for ky, kx in np.ndindex(kernel, kernel):
        oy, ox = ([o for o in range(outputs) if 0 <= o * stride + k - kernel // 2 < inputs]
                  for outputs, inputs, k in ((dy.shape[2], height, ky), (dy.shape[3], width, kx)))
        if oy and ox:
            out = (..., slice(oy[0], oy[-1] + 1), slice(ox[0], ox[-1] + 1))
            met = (..., *(slice(o[0] * stride + k - kernel // 2, o[-1] * stride + k - kernel // 2 + 1, stride)
                          for o, k in ((oy, ky), (ox, kx))))
            tap = weight[:, 0, ky, kx, None, None]
            y[out] += x[met] * tap
            dx[met] += dy[out] * tap
            dweight[:, 0, ky, kx] += (dy[out] * x[met]).sum((0, 2, 3))
    return y, dx, dweight


@needs_operator
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('height, width, kernel, stride', [
    *((7, 8, kernel, stride) for kernel, stride in ((3, 1), (5, 1), (3, 2), (5, 2), (9, 2), (7, 1), (13, 1))),
    (7, 7, 13, 1), (8, 5, 17, 1), (9, 10, 19, 1), (9, 6, 13, 1), (21, 24, 21, 1),
    (4, 16, 3, 1), (5, 37, 3, 1), (6, 35, 3, 2), (3, 32, 3, 2)])
@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan])
def test_nan_and_inf_reach_what_they_meet_and_nothing_else(force, height, width, kernel, stride, value):
    rng = np.random.default_rng(5)
    for place in ('x', 'weight', 'dy'):
        for corner in (0, -1):
            x, weight, _, dy = (t.detach().numpy() for t in draw(rng, 2, 3, height, width, kernel, stride))
            {'x': x, 'weight': weight, 'dy': dy}[place][-1, 0, corner, corner] = value
            want = by_taps(x.astype('float64'), weight.astype('float64'), dy.astype('float64'), stride)
            got = {}
            for name in ('custom', 'native'):
                force(name)
                tensors = [paddle.to_tensor(a, stop_gradient=False) for a in (x, weight)]
                y = depthwise_conv2d(*tensors, stride=stride)
                got[name] = [t.numpy() for t in (y, *paddle.grad([y], tensors, [paddle.to_tensor(dy)]))]
            for mine, theirs, reference in zip(got['custom'], got['native'], want):
                np.testing.assert_allclose(mine, reference, rtol=1e-3, atol=1e-4)
                # nn.Conv2D also multiplies some of its padding, where 0 * Inf is NaN; elsewhere it agrees.
                assert np.isfinite(mine[np.isfinite(theirs)]).all()
                np.testing.assert_array_equal(mine[np.isinf(theirs)], theirs[np.isinf(theirs)])


@pytest.mark.parametrize('bias', [None, False])
def test_layer_is_a_drop_in_for_conv2d(bias):
    paddle.seed(0)
    ours = DepthwiseConv2D(6, 13, stride=2, bias_attr=bias)
    paddle.seed(0)
    theirs = nn.Conv2D(6, 6, 13, stride=2, padding=6, groups=6, bias_attr=bias)
    assert isinstance(ours, nn.Conv2D)
    assert {k: list(v.shape) for k, v in ours.state_dict().items()} == \
        {k: list(v.shape) for k, v in theirs.state_dict().items()}
    np.testing.assert_array_equal(ours.weight.numpy(), theirs.weight.numpy())  # the same initialisation
    assert ours.weight.name.endswith('.w_0') and (bias is False or ours.bias.name.endswith('.b_0'))
    theirs.weight.set_value(theirs.weight * 2)
    ours.set_state_dict(theirs.state_dict())
    x = paddle.randn([2, 6, 20, 17])
    np.testing.assert_allclose(ours(x).numpy(), theirs(x).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_layer_keeps_the_dtype_of_its_input(force, name, dtype):
    force(name)
    layer = DepthwiseConv2D(5, 7)
    x = paddle.randn([2, 5, 9, 9]).astype(dtype)
    x.stop_gradient = False
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.dtype == x.grad.dtype and layer.weight.grad.dtype == paddle.float32
    force('native')
    np.testing.assert_allclose(y.astype('float32').numpy(), layer(x.astype('float32')).numpy(),
                               atol=1e-5 if dtype == 'float32' else 0.02)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_recompute_auto_cast_and_strided_inputs(force, name):
    from paddle.distributed.fleet.utils import recompute
    force(name)
    net = nn.Sequential(DepthwiseConv2D(5, 9), nn.ReLU(), DepthwiseConv2D(5, 3, 2, bias_attr=False))
    x = paddle.randn([2, 9, 5, 8]).transpose([0, 2, 1, 3])  # not contiguous
    x.stop_gradient = False

    def gradients(run):
        net.clear_gradients()
        run(x).pow(2).sum().backward()
        found = [x.grad.numpy().copy(), *(p.grad.numpy().copy() for p in net.parameters())]
        x.clear_gradient()
        return found

    plain = gradients(net)
    with paddle.amp.auto_cast():  # leaves float32 on the CPU
        cast = gradients(net)
    for other in (gradients(lambda x: recompute(net, x)), cast):
        for a, b in zip(plain, other):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_without_gradients_the_result_does_not_ask_for_them(force, name):
    force(name)
    layer, x = DepthwiseConv2D(5, 7), paddle.randn([2, 5, 9, 9])
    assert not layer(x).stop_gradient
    with paddle.no_grad():
        assert layer(x).stop_gradient and layer(x).is_leaf
    layer.weight.stop_gradient = layer.bias.stop_gradient = True
    assert layer(x).stop_gradient


needs_direct_call = pytest.mark.skipif(build.reason_unavailable() is not None or not build.direct,
                                       reason='no C++ operator, or no Python.h to build it with')


@needs_direct_call
def test_the_direct_call_returns_what_the_operator_returns(force):
    rng = np.random.default_rng(12)
    for shape in [(8, 20, 7, 7, 13, 1), (1, 5, 9, 11, 21, 1), (2, 19, 20, 20, 5, 1), (3, 9, 9, 11, 3, 2)]:
        x, weight, bias, _ = draw(rng, *shape)
        for b in (None, bias):
            with_gradients = depthwise_conv2d(x, weight, b, shape[-1])
            direct = build.direct.forward(x, weight, b, shape[-1])
            assert not with_gradients.stop_gradient and direct.stop_gradient and direct.is_leaf
            np.testing.assert_array_equal(direct, with_gradients)


@needs_direct_call
def test_the_direct_call_leaves_to_others_what_it_does_not_know(force, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    x, weight, bias = paddle.randn([2, 6, 9, 9]), paddle.randn([6, 1, 5, 5]), paddle.randn([6])
    call = build.direct.forward
    assert call(x, weight, bias, 1) is not None
    wide, halves, nothing = paddle.randn([2, 12, 9, 9]), x.astype('bfloat16'), paddle.zeros([0, 6, 9, 9])
    for arguments in [(), (x, weight, bias), (x.numpy(), weight, bias, 1), (x, None, bias, 1), (x, weight, 1, 1),
                      (wide, weight, bias, 1), (halves, weight, bias, 1), (x, weight.astype('float64'), bias, 1),
                      (nothing, weight, bias, 1), (x[0], weight, bias, 1), (x, weight[:, :, :4, :4], bias, 1),
                      (x, weight, bias[:5], 1), (x, weight, x, 1), (x, weight, bias, 3), (x, weight, bias, 1.0),
                      (x, weight, bias, 10 ** 30), (x, weight, bias, None)]:
        assert call(*arguments) is None and not build.direct.accepts(*arguments)
    for strided in (wide[:, ::2], wide[:, :6], paddle.randn([2, 9, 6, 9]).transpose([0, 2, 1, 3])):
        found, want = call(strided, weight, bias, 1), call(paddle.to_tensor(strided.numpy()), weight, bias, 1)
        assert found is None or np.array_equal(found, want)  # Paddle 2.6 copies where 3.3 has views
    for name in IMPLEMENTATIONS[1:]:
        force(name)
        assert call(x, weight, bias, 1) is None
    force('custom')
    assert call(x, weight, bias, 1) is not None


@needs_direct_call
def test_threads_call_at_once():
    from concurrent.futures import ThreadPoolExecutor
    weight, maps = paddle.randn([32, 1, 13, 13]), [paddle.randn([2, 32, 7, 7]) for _ in range(8)]
    want = [build.direct.forward(x, weight, None, 1).numpy() for x in maps]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: build.direct.forward(maps[i % 8], weight, None, 1).numpy(), range(200)))
    for i, y in enumerate(found):
        np.testing.assert_array_equal(y, want[i % 8])


@needs_operator
def test_frozen_weights_and_inputs(force):
    force('custom')
    x, weight, bias, dy = draw(np.random.default_rng(6), 2, 5, 9, 9, 13, 1)
    want_dx, want_dweight, want_dbias = paddle.grad([depthwise_conv2d(x, weight, bias)], [x, weight, bias], [dy])
    fixed = [t.detach() for t in (x, weight, bias)]
    np.testing.assert_array_equal(paddle.grad([depthwise_conv2d(x, *fixed[1:])], [x], [dy])[0], want_dx)
    np.testing.assert_array_equal(
        paddle.grad([depthwise_conv2d(fixed[0], weight, fixed[2])], [weight], [dy])[0], want_dweight)
    np.testing.assert_array_equal(paddle.grad([depthwise_conv2d(*fixed[:2], bias)], [bias], [dy])[0], want_dbias)


@pytest.mark.parametrize('x, weight, stride, words', [
    ([2, 4, 8, 8], [5, 1, 3, 3], 1, 'channels'), ([2, 4, 8, 8], [4, 1, 4, 4], 1, 'odd kernel'),
    ([2, 4, 8, 8], [4, 1, 65, 65], 1, 'at most 63'), ([4, 8, 8], [4, 1, 3, 3], 1, 'N, C, H, W'),
    ([2, 4, 8, 8], [4, 2, 3, 3], 1, 'C, 1, K, K'), ([2, 4, 8, 8], [4, 1, 3, 5], 1, 'C, 1, K, K'),
    ([2, 4, 8, 8], [4, 1, 3, 3], 3, 'stride 1 or 2'), ([0, 4, 8, 8], [4, 1, 3, 3], 1, 'non-empty'),
])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_bad_input_is_a_value_error_with_the_shapes(force, name, x, weight, stride, words):
    force(name)
    with pytest.raises(ValueError, match=words) as caught:
        depthwise_conv2d(paddle.zeros(x), paddle.zeros(weight), stride=stride)
    assert str(x) in str(caught.value) and str(weight) in str(caught.value) and '\n' not in str(caught.value)


def test_bad_dtype_bias_and_settings_are_value_errors(force):
    weight = paddle.zeros([4, 1, 3, 3])
    with pytest.raises(ValueError, match='float64'):
        depthwise_conv2d(paddle.zeros([2, 4, 8, 8], 'float64'), weight)
    for shape in ([5], [4, 1]):
        with pytest.raises(ValueError, match='bias') as caught:
            depthwise_conv2d(paddle.zeros([2, 4, 8, 8]), weight, paddle.zeros(shape))
        assert caught.value.__context__ is None  # nothing of what went wrong inside is printed before
    for arguments in [(4, 4), (4, 65), (4, 3, 3), (4, (3, 5)), (4, 'same')]:
        with pytest.raises(ValueError, match='DepthwiseConv2D needs'):
            DepthwiseConv2D(*arguments)
    force('cudnn')
    with pytest.raises(ValueError, match='LARGE_KERNEL_CONV_IMPL=cudnn'):
        depthwise_conv2d(paddle.zeros([2, 4, 8, 8]), weight)


def test_measured_choice_has_no_side_effects_and_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(autotune, '_choices', {})
    layer = DepthwiseConv2D(8, 21)
    x = paddle.randn([2, 8, 24, 24])
    state = paddle.get_rng_state()[0].current_seed(), paddle.get_rng_state()
    candidates = {'fft': large_kernel.conv.conv_fft, 'native': large_kernel.conv.conv_native}
    with caplog.at_level(logging.INFO, 'large_kernel'):
        first = autotune.choose(candidates, x, layer.weight, 1, True)
        assert autotune.choose(candidates, x[:1], layer.weight, 1, True) == first
    assert len(caplog.records) == 1 and first in candidates and first in large_kernel.describe_choices()
    assert layer.weight.grad is None and x.grad is None
    drawn = paddle.randn([3])
    paddle.set_rng_state(state[1])
    np.testing.assert_array_equal(drawn.numpy(), paddle.randn([3]).numpy())


def test_a_candidate_that_fails_is_not_chosen(monkeypatch):
    monkeypatch.setattr(autotune, '_choices', {})

    def broken(x, weight, bias, stride):
        raise RuntimeError('out of memory')

    weight = paddle.zeros([4, 1, 5, 5])
    candidates = {'broken': broken, 'native': large_kernel.conv.conv_native}
    assert autotune.choose(candidates, paddle.zeros([1, 4, 8, 8]), weight, 1, False) == 'native'
    with pytest.raises(RuntimeError, match='no implementation'):
        autotune.choose({'broken': broken}, paddle.zeros([1, 4, 9, 8]), weight, 1, False)
