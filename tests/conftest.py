"""Options and fixtures shared by all tests."""
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image

import paddle_env  # noqa: F401 - before any test imports paddle

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LONGEST = ('test_runs.py', 'test_faults.py', 'test_export.py', 'test_machines.py', 'test_large_kernel.py',
           'test_fuse.py', 'test_dry_run.py', 'test_cuda_kernels.py', 'test_fine_tuning.py', 'test_benchmarks.py')


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='also run the tests that take minutes')
    parser.addoption('--gpu', metavar='REPORT', help='run tests/test_gpu.py on the GPUs and write a report, Markdown')


def pytest_configure(config):
    if config.getoption('--long'):
        os.environ[forked.REAL] = '1'
    config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have most tests
    report = config.getoption('--gpu')
    if report:
        from gpu_report import GpuReport
        config.pluginmanager.register(GpuReport(report))
    else:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # with GPUs too, the tests and what they start compute on the CPU


def pytest_collection_modifyitems(config, items):
    # the files that take longest first, so that neither of two processes has a long one left at the end
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not config.getoption('--long') and not config.getoption('--gpu'):
        for item in items:
            if 'long' in item.keywords:
                item.add_marker(pytest.mark.skip(reason='takes minutes: run with --long'))


@pytest.fixture
def golden():
    """Folder of the reference data made with the official code."""
    return TESTS / 'golden'


@pytest.fixture(scope='session')
def rounding():
    """By how much of a number Paddle's cast to a half-precision dtype may change it."""
    import paddle

    def largest(dtype):
        half_unit = {'bfloat16': 2**-8, 'float16': 2**-11}[dtype]
        cut_off = float(paddle.to_tensor(1 + 1.5 * half_unit).astype(dtype).astype('float32')) == 1
        return 2 * half_unit if cut_off else half_unit  # Paddle 2.6 does not round to bfloat16

    return largest


@pytest.fixture(scope='session')
def list_dataset(tmp_path_factory):
    """A data folder of JPEGs of one pixel, 13 to train on and 11 to evaluate, in 4 classes; paths hold spaces."""
    folder = tmp_path_factory.mktemp('one pixel')
    rng = np.random.default_rng(0)
    for mode, count in (('train', 13), ('val', 11)):
        lines = []
        for index in range(count):
            path = folder / mode / f'class {index % 4}' / f'{index}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)).save(path)
            lines.append(f'{path.relative_to(folder)} {index % 4}\n')
        (folder / f'{mode}_list.txt').write_text(''.join(lines))
    return folder


@pytest.fixture
def photo():
    noise = np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((96, 72), Image.BICUBIC)


TINY_YAML = """
MODEL:
  NAME: tiny
  NUM_CLASSES: 4
  LARGE_KERNEL_SIZES: [9, 7, 5, 5]
  LAYERS: [1, 1, 2, 1]
  CHANNELS: [4, 6, 8, 10]
  DROPPATH: 0.2
DATA:
  IMAGE_SIZE: 32
  BATCH_SIZE: 2
  BATCH_SIZE_EVAL: 2
  NUM_WORKERS: 0
TRAIN:
  NUM_EPOCHS: 2
  WARMUP_EPOCHS: 1
  BASE_LR: 1e-2
  MODEL_EMA_DECAY: 0.9
REPORT_FREQ: 1
CURVES: False
"""


@pytest.fixture(scope='session')
def tiny_yaml(tmp_path_factory):
    """Settings of a model that trains on `list_dataset` in seconds, with the whole recipe of the paper on."""
    path = tmp_path_factory.mktemp('config') / 'tiny.yaml'
    path.write_text(TINY_YAML)
    return path


@pytest.fixture(scope='session')
def random_run(tmp_path_factory, tiny_yaml):
    """A run folder with random weights of the model of `tiny_yaml`, whose predictions differ between images."""
    import paddle

    from config import config_text, get_config
    from replknet import build_replknet
    from run_folder.checkpoint import model_arrays, save_checkpoint
    folder = tmp_path_factory.mktemp('random run')
    config = get_config(tiny_yaml)
    (folder / 'config.yaml').write_text(config_text(config))
    paddle.seed(1)
    model = build_replknet(config)
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):  # statistics of one batch, so that signals do not fade
            layer._momentum = 0.0
    model(paddle.randn([8, 3, 32, 32]))
    save_checkpoint(folder / 'best.pdparams', {
        'model': model_arrays(model), 'weights_key': 'model', 'optimizer': {}, 'epoch': 2, 'step': 4, 'best': {},
        'config': config_text(config)})
    return folder


@pytest.fixture(scope='session')
def run_script():
    """Runs a Python file of the project as a user would; returns the finished process with its output as text.

    It runs in a copy of a process that has imported Paddle, see forked.py; with `real`, and if it is a file outside of
    the project, in a new process.
    """

    def run(script, *args, timeout=300, cwd=None, real=False, **environment):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        env = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
        if not (real or Path(script).is_absolute()):
            return forked.run(command, timeout=timeout, cwd=cwd, env=env)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env,
                              stdin=subprocess.DEVNULL)

    return run


@pytest.fixture
def force(monkeypatch):
    """Chooses the implementation of the depthwise convolution by its name."""
    return lambda name: monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', name)


@pytest.fixture
def without_gradients(monkeypatch):
    """No gradients, reproducible random numbers, and the implementation that is chosen by default."""
    import paddle
    monkeypatch.delenv('LARGE_KERNEL_CONV_IMPL', raising=False)
    paddle.seed(3)
    with paddle.no_grad():
        yield
