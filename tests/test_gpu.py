"""What only a GPU can show. The same tests run on a CPU, as far as they go there.

    python -m pytest tests/test_gpu.py --gpu=gpu_report.md

computes on the GPUs that Paddle finds and writes a report with the machine, the errors and times found, and the text of
failures. Without --gpu everything is computed on the CPU; most tests then need --long.
"""
import json
import math
import time
import types

import numpy as np
import paddle
import pytest
from test_cuda_kernels import correlate

import utils
from config import get_config
from deploy.predictor import Predictor
from dry_run.cost import model_cost, training_memory
from large_kernel import autotune, conv, cuda, depthwise_conv2d
from replknet import RepLKNet, build_replknet
from training.amp import Amp
from training.engine import train_one_epoch
from training.run import Start
from training.running_statistics import sync_batch_norm_works
from training.setup import build_training

long = pytest.mark.long
TOLERANCES = {'float16': 1e-3, 'bfloat16': 8e-3, 'float32': 1e-5}  # of the norm: of rounding; float32 also of an FFT


@pytest.fixture(autouse=True)
def device(pytestconfig):
    """'gpu' with --gpu, else 'cpu'; current while a test runs."""
    name = 'gpu' if pytestconfig.getoption('--gpu') else 'cpu'
    if not utils.device_count(name):
        pytest.skip(utils.unused_gpus() or f'Paddle {paddle.__version__} finds no GPU')
    paddle.set_device(name)
    yield name
    paddle.set_device(name)


@pytest.fixture
def on_gpu(device):
    if device != 'gpu':
        pytest.skip('needs a GPU: run with --gpu=REPORT')


def drawn(shape, dtype, seed):
    """A tensor of normal numbers that `dtype` can represent, and the same in float64."""
    values = np.random.default_rng(seed).standard_normal(shape).astype('float32')
    tensor = paddle.to_tensor(values).astype(dtype).detach()
    tensor.stop_gradient = False
    return tensor, tensor.astype('float32').numpy().astype('float64')


def relative(found, right):
    return float(np.linalg.norm(found.astype('float32').numpy() - right) / np.linalg.norm(right))


# ---- the depthwise convolution

def test_the_cuda_operator_is_ready(on_gpu, record_property):
    start = time.perf_counter()
    reasons = [cuda.reason_unavailable(index) for index in range(cuda.count())]
    record_property('seconds to build or load', round(time.perf_counter() - start, 1))
    assert reasons == [None] * len(reasons)


@pytest.mark.parametrize('implementation', ['auto', 'native', 'fft'])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('shape', [
    (2, 3, 9, 7, 5), *(pytest.param(shape, marks=long) for shape in (
        (2, 8, 56, 56, 31), (3, 5, 28, 28, 29), (5, 7, 14, 14, 27), (9, 3, 7, 7, 13), (1, 2, 96, 96, 31),
        (1, 2, 130, 67, 31), (2, 3, 5, 9, 31), (2, 2, 33, 17, 3), (1, 1, 1, 1, 31), (1, 2, 70, 90, 63)))],
    ids=lambda shape: 'x'.join(map(str, shape)))
def test_result_and_gradients_agree_with_float64(device, force, implementation, dtype, shape, record_property):
    *size, kernel = shape
    force(implementation)
    (x, x64), (weight, weight64), (dy, dy64) = (drawn(shape, dtype, seed) for seed, shape in enumerate(
        (size, (size[1], 1, kernel, kernel), size)))
    y = depthwise_conv2d(x, weight)
    found = [y, *paddle.grad([y], [x, weight], [dy])]
    right = correlate(x64, weight64, dy64)
    errors = [relative(tensor, values) for tensor, values in zip(found, right)]
    record_property('computed by', conv.select(x, weight, 1))
    record_property('errors of result and gradients', ', '.join(f'{error:.1e}' for error in errors))
    if implementation == 'auto':  # Paddle's own layer on the same device
        own = paddle.nn.functional.conv2d(x.astype('float32'), weight.astype('float32'), padding=kernel // 2,
                                          groups=size[1])
        record_property("error of nn.Conv2D's result in float32", f'{relative(own, right[0]):.1e}')
    assert [t.dtype for t in found] == [x.dtype] * 3
    assert max(errors) <= TOLERANCES[dtype]


@long
def test_results_repeat_bit_for_bit(device, record_property):
    (x, _), (weight, _) = drawn((8, 16, 56, 56), 'float32', 0), drawn((16, 1, 31, 31), 'float32', 1)
    runs = []
    for _ in range(2):
        y = depthwise_conv2d(x, weight)
        runs.append([t.numpy().tobytes() for t in (y, *paddle.grad([y.square().sum()], [x, weight]))])
    assert runs[0] == runs[1]


@long
def test_the_faster_of_fft_and_native_is_measured(device, record_property):
    (x, _), (weight, _) = drawn((4, 16, 28, 28), 'float32', 0), drawn((16, 1, 29, 29), 'float32', 1)
    autotune.choose({'fft': conv.conv_fft, 'native': conv.conv_native}, x, weight, 1, training=True)
    record_property('choices', autotune.describe())
    assert autotune.choices()


# ---- training

def training(device, opts=(), **model):
    """TrainingParts of a small model on `device`, always from the same weights."""
    config = get_config(None, [
        'DATA.BATCH_SIZE', 4, 'TRAIN.NUM_EPOCHS', 2, 'TRAIN.WARMUP_EPOCHS', 0, 'TRAIN.BASE_LR', 1e-3,
        'TRAIN.MIXUP_PROB', 0.0, 'TRAIN.SMOOTHING', 0.0, 'MODEL.NUM_CLASSES', 3, *opts])
    paddle.seed(0)
    network = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [16, 16, 32, 32], num_classes=3, **model)
    loader = type('Loader', (list,), {'dataset': range(16)})(batches())
    parts, _ = build_training(config, device, Amp(config, device), Start(network, None, None), loader,
                              types.SimpleNamespace(identity={}))
    return parts, loader


def batches():
    rng = np.random.default_rng(0)
    return [(paddle.to_tensor(rng.standard_normal((4, 3, 64, 64), 'float32')),
             paddle.to_tensor(rng.integers(0, 3, 4))) for _ in range(4)]


def losses(parts, loader):
    found = []
    train_one_epoch(parts, loader, epoch=1, first_step=0, on_report=lambda **report: found.append(report['loss']))
    return found


def optimized_by(name):
    betas = ['TRAIN.OPTIMIZER.BETAS', [0.98, 0.92, 0.99]] if name == 'adan' else []
    return ['TRAIN.OPTIMIZER.NAME', name, *betas, 'REPORT_FREQ', 1]


def mixed(level, dtype, optimizer='adamw'):
    return ['AMP', 'True', 'AMP_LEVEL', level, 'AMP_DTYPE', dtype, *optimized_by(optimizer)]


@pytest.mark.parametrize('level, dtype, optimizer', [
    ('O2', 'float16', 'adamw'), *(pytest.param(*case, marks=long) for case in (
        ('O1', 'float16', 'adamw'), ('O1', 'bfloat16', 'adamw'), ('O2', 'bfloat16', 'adamw'),
        ('O2', 'bfloat16', 'momentum'), ('O2', 'float16', 'lamb'), ('O2', 'float16', 'nadam'),
        ('O2', 'float16', 'lion'), ('O2', 'float16', 'adan')))])
def test_mixed_precision_trains_as_float32_does(device, level, dtype, optimizer, record_property):
    right = losses(*training(device, optimized_by(optimizer)))
    parts, loader = training(device, mixed(level, dtype, optimizer))
    dtypes = []
    parts.model.stages[0].blocks[0].register_forward_post_hook(lambda layer, x, y: dtypes.append(str(y.dtype)))
    found = losses(parts, loader)
    record_property('losses', ', '.join(f'{loss:.4f} ({want:.4f})' for loss, want in zip(found, right)))
    record_property("dtype of a block's output", dtypes[0])
    assert len(found) == 4
    np.testing.assert_allclose(found, right, rtol=0.05 if dtype == 'bfloat16' else 0.02)
    assert all(math.isfinite(float(p.astype('float32').sum())) for p in parts.ema.module.parameters())


@pytest.mark.parametrize('level, dtype', [('O0', 'float32'), pytest.param('O1', 'float16', marks=long),
                                          pytest.param('O2', 'bfloat16', marks=long)])
def test_recomputation_changes_no_gradient(device, level, dtype, record_property):
    results = []
    for recompute in (False, True):
        parts, loader = training(device, mixed(level, dtype) if level != 'O0' else [], recompute=recompute,
                                 drop_path=0.5)
        parts.training_mode()
        if device == 'gpu':
            paddle.device.cuda.reset_max_memory_allocated()
        paddle.seed(1)
        with parts.amp.autocast():
            loss = parts.model(loader[0][0]).astype('float32').square().mean()
        loss.backward()
        if device == 'gpu':
            record_property(f'MB {"with" if recompute else "without"} recomputation',
                            round(paddle.device.cuda.max_memory_allocated() / 1e6, 1))
        results.append({name: p.grad.astype('float32').numpy() for name, p in parts.model.named_parameters()
                        if not p.stop_gradient})
    largest = max(np.abs(plain).max() for plain in results[0].values())
    errors = [np.abs(results[1][name] - plain).max() / largest for name, plain in results[0].items()]
    record_property('largest difference', f'{max(errors):.1e} of the largest gradient')
    assert max(errors) <= {'float32': 1e-5, 'float16': 2e-3, 'bfloat16': 2e-2}[dtype]


@long
@pytest.mark.parametrize('half', [False, True])
def test_time_and_memory_of_a_step_of_replknet_31b(device, half, record_property):
    """The dry run's estimate leaves out what layers need while they compute; a step must stay within twice of it."""
    batch, size, steps = (32, 224, 12) if device == 'gpu' else (2, 64, 5)
    config = get_config(None, ['DATA.BATCH_SIZE', batch, 'DATA.IMAGE_SIZE', size, 'TRAIN.NUM_EPOCHS', 2,
                               'TRAIN.WARMUP_EPOCHS', 0, *(mixed('O1', 'float16') if half else [])])
    rng = np.random.default_rng(0)
    batches = [(paddle.to_tensor(rng.standard_normal((batch, 3, size, size), 'float32')),
                paddle.to_tensor(rng.integers(0, 1000, batch)))] * steps
    loader = type('Loader', (list,), {'dataset': range(steps * batch)})(batches)
    parts, _ = build_training(config, device, Amp(config, device), Start(build_replknet(config), None, None), loader,
                              types.SimpleNamespace(identity={}))
    if device == 'gpu':
        paddle.device.cuda.reset_max_memory_allocated()
    times = [time.perf_counter()]
    train_one_epoch(parts, loader, epoch=1, first_step=0, after_step=lambda *votes: times.append(time.perf_counter()))
    seconds = float(np.median(np.diff(times)[3:]))
    record_property('batch and pixels', f'{batch} x {size} x {size}')
    record_property('ms per step', round(seconds * 1e3, 1))
    record_property('images/s', round(batch / seconds, 1))
    estimate = sum(training_memory(config, model_cost(config), half=half).values())
    if device == 'gpu':
        peak = paddle.device.cuda.max_memory_allocated()
        record_property('MB', f'{peak / 1e6:.0f}, estimated {estimate / 1e6:.0f}')
        assert peak <= 2 * estimate


# ---- several processes and the commands

def in_each_process(rank_file):
    """Runs in two processes: SyncBatchNorm and an exchange of gradients."""
    import paddle.distributed as dist

    from launcher import end_process
    dist.init_parallel_env()
    works = [sync_batch_norm_works(recompute) for recompute in (False, True)] if utils.device_count('gpu') else []
    model = paddle.DataParallel(paddle.nn.Linear(2, 1, bias_attr=False))
    model(paddle.full([1, 2], float(dist.get_rank() + 1))).sum().backward()
    with open(f'{rank_file}.{dist.get_rank()}', 'w') as file:
        json.dump({'works': works, 'gradient': model._layers.weight.grad.numpy().ravel().tolist()}, file)
    end_process(0)


@long
def test_two_processes_exchange_gradients_and_statistics(device, tmp_path, record_property):
    if device == 'gpu' and utils.device_count('gpu') < 2:
        pytest.skip('needs two GPUs')
    paddle.distributed.spawn(in_each_process, (str(tmp_path / 'found'),), nprocs=2,
                             backend='nccl' if device == 'gpu' else 'gloo')
    found = [json.loads((tmp_path / f'found.{rank}').read_text()) for rank in range(2)]
    record_property('SyncBatchNorm works, plain and recomputed', found[0]['works'])
    assert found[0] == found[1] and found[0]['gradient'] == [1.5, 1.5]


@long
@pytest.mark.parametrize('script, more', [('main_single_gpu.py', []), ('main_multi_gpu.py', []),
                                          ('main_single_gpu.py', ['-amp'])])
def test_a_run_trains_resumes_and_evaluates(device, run_script, list_dataset, tiny_yaml, tmp_path, record_property,
                                            script, more):
    run = tmp_path / 'run'
    flags = [f'-device={device}', f'-data_path={list_dataset}', *more]
    first = run_script(script, f'-cfg={tiny_yaml}', *flags, f'-output={run}', '-opts', 'SAVE_FREQ', '1')
    assert first.returncode == 0, first.stderr
    last = (run / 'last.pdparams').read_bytes()
    (run / 'epoch_0001.pdparams').replace(run / 'last.pdparams')  # makes it an unfinished run
    resumed = run_script(script, *flags, f'-resume={run}')
    assert resumed.returncode == 0, resumed.stderr
    record_property('a resumed run ends with the same bytes', (run / 'last.pdparams').read_bytes() == last)
    record_property('warnings', '; '.join(line for line in first.stdout.splitlines() if 'WARNING' in line) or 'none')
    evaluated = run_script('main_single_gpu.py', f'-data_path={list_dataset}', f'-device={device}', '-eval',
                           f'-pretrained={run / "last.pdparams"}', f'-output={tmp_path / "eval"}')
    assert evaluated.returncode == 0 and 'Acc@1' in evaluated.stdout, evaluated.stderr


@long
def test_predictions_and_exports_agree(device, run_script, random_run, list_dataset, tmp_path, record_property):
    export = tmp_path / 'export'
    done = run_script('export.py', f'-pretrained={random_run}', f'-output={export}')
    assert done.returncode == 0, done.stderr
    paths = sorted((list_dataset / 'val').rglob('*.jpg'))
    logits = [np.stack([prediction.logits for prediction in Predictor(str(model), device=where)(paths)])
              for model, where in ((random_run, device), (random_run, 'cpu'), (export, 'cpu'))]
    differences = [float(np.abs(logits[0] - other).max() / np.abs(other).max()) for other in logits[1:]]
    record_property('differences from the CPU and from the export', ', '.join(f'{d:.1e}' for d in differences))
    assert max(differences) < 1e-3
