"""Training with products in bfloat16: 1x1 convolutions, recomputation, and -amp on the CPU."""
import json

import numpy as np
import paddle
import pytest
from paddle import nn

from config import get_config
from large_kernel import bf16_products, build, conv_block, fastest_precision
from port_weights.safe_load import read_checkpoint
from replknet import RepLKNet
from training import amp

pytestmark = pytest.mark.skipif(build.reason_unavailable() is not None, reason='no C++ operator')


def rounded(tensor):
    """float32 values rounded to bfloat16, in float64."""
    bits = tensor.numpy().view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize(('n', 'channels', 'out_channels', 'side'), [(2, 48, 64, 9), (3, 20, 17, 7), (1, 1, 1, 1),
                                                                     (5, 3, 130, 2)])
def test_outputs_and_gradients_are_those_of_rounded_numbers(n, channels, out_channels, side):
    paddle.seed(side)
    conv, x = nn.Conv2D(channels, out_channels, 1, bias_attr=False), paddle.randn([n, channels, side, side + 1])
    dy = paddle.randn([n, out_channels, side, side + 1])
    x.stop_gradient = False
    with bf16_products():
        y = conv_block(x, conv)
    y.backward(dy)
    a, w, g = rounded(x.detach()), rounded(conv.weight.detach())[:, :, 0, 0], rounded(dy)
    for found, terms in ((y, ('nchw,oc->nohw', a, w)), (x.grad, ('nohw,oc->nchw', g, w)),
                         (conv.weight.grad[:, :, 0, 0], ('nohw,nchw->oc', g, a))):
        expected, size = np.einsum(*terms), np.einsum(terms[0], *map(np.abs, terms[1:]))
        assert found.dtype == paddle.float32
        assert (np.abs(found.numpy() - expected) <= 8 * 2.0 ** -23 * size).all()
    assert np.abs(y.numpy() - conv(x).numpy()).max() > 0  # float32 differs


def test_gradients_that_nobody_needs_are_not_computed():
    conv, x = nn.Conv2D(32, 16, 1, bias_attr=False), paddle.randn([2, 32, 3, 3])
    conv.weight.stop_gradient = True
    x.stop_gradient = False
    with bf16_products():
        conv_block(x, conv).sum().backward()
    assert conv.weight.grad is None and x.grad is not None
    with bf16_products(), paddle.no_grad():
        assert conv_block(x, conv).stop_gradient


def test_others_are_computed_by_their_layers(monkeypatch):
    x, called = paddle.randn([1, 16, 4, 4]), []
    layers = [nn.Conv2D(16, 16, 1), nn.Conv2D(16, 16, 1, stride=2, bias_attr=False),
              nn.Conv2D(16, 16, 1, groups=2, bias_attr=False), nn.Conv2D(16, 16, 3, padding=1, bias_attr=False),
              nn.Conv2D(16, 16, 1, padding=1, bias_attr=False), nn.Conv2D(16, 16, 1, bias_attr=False)]
    layers[-1].register_forward_post_hook(lambda *_: called.append(1))
    with bf16_products():
        for conv in layers:
            np.testing.assert_array_equal(conv_block(x, conv).numpy(), conv(x).numpy())
    assert len(called) == 2
    plain = nn.Conv2D(16, 16, 1, bias_attr=False)
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', 'native')
    with bf16_products():
        np.testing.assert_array_equal(conv_block(x, plain).numpy(), plain(x).numpy())


def gradients(products=False, recompute=False, round_weights=False):
    paddle.seed(3)
    model = RepLKNet([7, 7, 5, 5], [1, 1, 1, 1], [16, 16, 16, 32], num_classes=3, small_kernel=3, drop_path=0.2,
                     recompute=recompute)
    images, labels = paddle.randn([8, 3, 64, 64]), paddle.to_tensor([0, 1, 2, 0, 1, 2, 0, 1])
    if round_weights:
        for name, p in model.named_parameters():
            if 'pw_conv' in name and p.ndim == 4:
                p.set_value(rounded(p).astype('float32'))
    with bf16_products(products):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()  # outside, as in training
    return [p.grad.numpy() for p in model.parameters() if p.grad is not None]


def test_recomputation_gives_the_same_gradients():
    for kept, recomputed in zip(gradients(products=True), gradients(products=True, recompute=True)):
        np.testing.assert_array_equal(kept, recomputed)


def test_gradients_differ_from_those_of_float32_by_little_more_than_if_weights_were_rounded():
    exact, found, rounded_weights = gradients(), gradients(products=True), gradients(round_weights=True)

    def distance(some):
        return np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(some, exact)))
    # maps and gradients are rounded as well
    assert 0.5 < distance(found) / distance(rounded_weights) < 4


@pytest.mark.parametrize(('has', 'dtype', 'expected'), [
    ('bf16', 'float16', 'products in bfloat16; all else is in float32'), ('fp32', 'float16', 'computing in float32'),
    ('fp32', 'bfloat16', 'slower than in float32')])
def test_amp_on_the_cpu_means_bfloat16_where_it_is_faster_or_asked_for(monkeypatch, has, dtype, expected):
    lines = []
    monkeypatch.setattr(amp, 'fastest_precision', lambda: has)
    monkeypatch.setattr(amp.utils, 'log_once', lines.append)
    config = get_config()
    config.defrost()
    config.AMP, config.AMP_DTYPE = True, dtype
    mixed = amp.Amp(config, 'cpu')
    assert expected in lines[0] and mixed.bf16_products == ('products in bfloat16' in lines[0])
    assert mixed.scaler() is None and not mixed.enabled
    config.EVAL = True
    assert not amp.Amp(config, 'cpu').bf16_products and lines[1] == '-amp: evaluations on the CPU are in float32'


@pytest.mark.parametrize('script', ['main_single_gpu.py', pytest.param('main_multi_gpu.py', marks=pytest.mark.long)])
def test_a_run_resumes_bit_for_bit_and_differs_from_float32_by_rounding(tmp_path, run_script, list_dataset, tiny_yaml,
                                                                        script):
    def run(name, *flags):
        folder = tmp_path / name
        done = run_script(script, f'-data_path={list_dataset}', '-device=cpu', f'-output={folder}', '-accum_iter=2',
                          *flags)
        assert done.returncode == 0, done.stderr
        losses = [json.loads(line)['loss'] for line in (folder / 'metrics.jsonl').read_text().splitlines()
                  if '"train"' in line]
        return done.stdout, losses, read_checkpoint(f'{folder}/last.pdparams')

    start, mixed = f'-cfg={tiny_yaml}', ('-amp', '-opts', 'AMP_DTYPE', 'bfloat16', 'SAVE_FREQ', '1')
    output, losses, whole = run('whole', start, *mixed)
    assert 'products in bfloat16' in output and ('slower than' in output) == (fastest_precision() == 'fp32')
    _, _, resumed = run('resumed', f'-resume={tmp_path}/whole/epoch_0001.pdparams', *mixed)
    _, exact_losses, exact = run('exact', start, '-opts', 'SAVE_FREQ', '1')
    for name, weights in whole['model'].items():
        assert weights.tobytes() == resumed['model'][name].tobytes(), name
    assert losses != exact_losses and losses == pytest.approx(exact_losses, rel=0.1)
