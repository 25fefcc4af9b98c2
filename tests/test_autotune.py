"""The choice between paddle.fft and Paddle's own convolution, as on GPUs, on a CPU without the C++ operator."""
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

import replknet
from large_kernel import DepthwiseConv2D, autotune, build, conv
from replknet import RepLKNet


@pytest.fixture
def measured(monkeypatch):
    """`auto` chooses by measuring; returns the choices made."""
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL', raising=False)
    monkeypatch.setattr(build, 'direct', None)
    monkeypatch.setattr(build, 'reason_unavailable', lambda: 'no C++ compiler')
    monkeypatch.setattr(conv, '_warned', True)
    monkeypatch.setattr(autotune, '_choices', {})
    monkeypatch.setattr(autotune, '_restored', {})
    return autotune._choices


def gradients(model, size):
    paddle.seed(3)
    images = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 3, size, size), 'float32'))
    model.clear_gradients()
    model(images).square().sum().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient}


def test_recomputed_blocks_measure_each_new_shape(measured):
    paddle.seed(0)
    recomputed, plain = (RepLKNet([9, 7, 5, 5], [1, 1, 2, 1], [4, 6, 8, 10], num_classes=3, drop_path=0.5,
                                  recompute=recompute) for recompute in (True, False))
    plain.set_state_dict(recomputed.state_dict())
    for size in (64, 96, 64):  # the first step, a new shape, and a step in which every block is recomputed
        first, second = gradients(recomputed, size), gradients(plain, size)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert {shape[2] for _, _, shape, *_ in measured} >= {16, 24}
    for name, value in recomputed.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), plain.state_dict()[name].numpy(), err_msg=name)


def test_each_kind_of_input_is_measured_before_its_first_recomputation(measured, monkeypatch):
    runs = []
    monkeypatch.setattr(replknet, 'measuring_for_training', lambda: runs.append(1) or autotune.measuring_for_training())
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3, recompute=True)
    for size, dtype, blocks in ((64, None, 8), (64, None, 0), (32, None, 8), (32, 'float16', 8), (64, None, 0)):
        monkeypatch.setattr(replknet, 'autocast_dtype', lambda dtype=dtype: dtype)  # changes the maps within a block
        runs.clear()
        gradients(model, size)
        assert len(runs) == blocks
    monkeypatch.setattr(replknet, 'operator_in_use', lambda: True)  # nothing to measure
    monkeypatch.setattr(replknet, 'autocast_dtype', lambda: 'bfloat16')
    gradients(model, 64)
    assert not runs


@pytest.mark.parametrize('weight_dtype', ['float32', 'float16'])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_native_sums_in_float32_on_every_device(force, monkeypatch, dtype, weight_dtype):
    """Paddle's CUDA kernels sum in the dtype of their input: 31x31 products in half precision lose the result."""
    force('native')
    monkeypatch.setattr(conv, '_on_cpu', lambda x: False)
    seen, conv2d = [], F.conv2d
    monkeypatch.setattr(conv.F, 'conv2d', lambda x, w, b, **kw: (seen.extend([x.dtype, w.dtype, b.dtype]),
                                                                 conv2d(x, w, b, **kw))[1])
    layer = DepthwiseConv2D(3, 7)
    layer.to(dtype=weight_dtype)
    x = paddle.randn([2, 3, 9, 9]).astype(dtype)
    x.stop_gradient = False
    y = layer(x)
    y.astype('float32').sum().backward()
    assert set(seen) == {paddle.float32} and y.dtype == x.dtype
    assert x.grad.dtype == x.dtype and layer.weight.grad.dtype == layer.weight.dtype


def test_other_devices_than_gpus_are_waited_for(measured, monkeypatch):
    """paddle.device.cuda.synchronize raises on an XPU or NPU."""
    class Place:
        def is_cpu_place(self):
            return False

    class Map:
        place = Place()

    waited = []
    monkeypatch.setattr(paddle.device, 'synchronize', lambda: waited.append('current device'))
    autotune._time(lambda x, w, b, stride: None, Map(), None, 1, training=False)
    assert waited == ['current device']


def times_of_calls(monkeypatch, times):
    """Replaces measuring by `times`, {function: seconds of its calls}, the last of which repeats; returns the calls."""
    calls = []

    def time(function, *_):
        calls.append(function)
        return times[function].pop(0) if len(times[function]) > 1 else times[function][0]

    monkeypatch.setattr(autotune, '_time', time)
    return calls


def test_loading_kernels_counts_against_no_candidate(monkeypatch):
    """On a GPU the first run of each candidate loads its kernels, which takes many times as long as running them."""
    weight = paddle.zeros([4, 1, 5, 5])
    times_of_calls(monkeypatch, {'slow': [0.9, 0.2], 'fast': [0.9, 0.1]})
    times = autotune._measure({'one': 'slow', 'two': 'fast'}, [2, 4, 8, 8], 'float32', weight, 1, False, warm_up=True)
    assert times == {'one': 0.2, 'two': 0.1}
    calls = times_of_calls(monkeypatch, {'fast': [0.1], 'hopeless': [0.9]})
    autotune._measure({'one': 'fast', 'two': 'hopeless'}, [2, 4, 8, 8], 'float32', weight, 1, False)
    assert calls.count('hopeless') == 1


def test_choices_name_the_card_but_not_its_number_and_can_be_restored_on_such_a_card(measured, monkeypatch):
    class Place(str):
        def is_cpu_place(self):
            return False

    class Map:
        place, shape, dtype = Place('Place(gpu:3)'), [2, 4, 8, 8], paddle.float16

    def choose():
        measured.clear()  # as in a new process
        return autotune.choose({}, Map(), weight, 1, True)

    key = '["gpu", "paddle.float16", [2, 4, 8, 8], 5, 1, true]'
    weight, card = paddle.zeros([4, 1, 5, 5]), ['Card A 80GB']
    times = {'fft': 2.0, 'native': 1.0}
    monkeypatch.setattr(paddle.device.cuda, 'get_device_name', lambda: card[0])
    monkeypatch.setattr(autotune, '_measure', lambda *args, **kwargs: times)
    asked = []
    # the ranks of a run share what one of them has measured or restored, also where their cards differ
    monkeypatch.setattr(autotune, 'share', lambda key, measure: asked.append(key) or measure())
    assert choose() == 'native'
    saved = autotune.choices()
    assert saved == {key.replace('gpu', 'gpu Card A 80GB'): times} and asked == [key]
    times = {'fft': 1.0, 'native': 2.0}
    autotune.restore(saved)
    assert autotune.choices() == saved  # also what this process has not needed yet
    assert choose() == 'native' and 'native for [2, 4, 8, 8]' in autotune.describe()
    autotune._restored.clear()
    card[0] = 'Card B'
    autotune.restore(saved)
    assert choose() == 'fft'
    autotune.restore({key: {'fft': 2.0, 'native': 1.0}})  # of an earlier version
    assert choose() == 'fft' and list(autotune.choices()) == [key.replace('gpu', 'gpu Card B')]
    assert asked == [key] * 4
