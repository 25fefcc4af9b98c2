"""Metrics of a run: step records, metrics.jsonl and curves."""
import importlib.util
import json
import sys

import numpy as np
import paddle
import pytest
from PIL import Image

from run_folder.curves import curves_line, draw_curves
from run_folder.metrics import read_metrics
from tests.test_engine import batches, linear, train
from training.amp import LossScaler
from training.optim import gradient_norm

NEEDS_MATPLOTLIB = pytest.mark.skipif(not importlib.util.find_spec('matplotlib'), reason='needs matplotlib')


def write_metrics(folder, loss=2.0, epochs=3, ema=True):
    folder.mkdir(exist_ok=True)
    records = []
    for epoch in range(1, epochs + 1):
        records += [{'event': 'step', 'step': 10 * epoch - 5, 'epoch': epoch - 0.5, 'loss': loss / epoch, 'lr': 1e-3,
                     'grad_norm': None if epoch == 2 else 1.0, 'images_per_s': 50.0},
                    {'event': 'train', 'step': 10 * epoch, 'epoch': epoch, 'loss': loss / epoch, 'images_per_s': 50.0},
                    {'event': 'eval', 'step': 10 * epoch, 'epoch': epoch, 'weights': 'model', 'acc1': 10.0 * epoch,
                     'loss': loss}]
        records += [{**records[-1], 'weights': 'model_ema'}] * ema
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    return folder


def colours(path):
    """The saturated colours of an image, as those of curves are, with their numbers of pixels."""
    pixels = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
    found, counts = np.unique(pixels[np.ptp(pixels.astype(int), axis=1) > 60], axis=0, return_counts=True)
    return {tuple(map(int, colour)): count for colour, count in zip(found, counts)}


# ---- step records

@pytest.mark.parametrize(('report_freq', 'steps'), [(1, [8, 9, 10, 11, 12]), (2, [9, 11, 12]), (9, [12])])
def test_steps_are_reported_periodically_and_the_last_step_always(report_freq, steps):
    reports = []
    train(linear(), batches([2] * 10), accum_iter=2, first_step=7, epoch=3, lr_at=lambda step: step * 0.01,
          report_freq=report_freq, on_report=lambda **values: reports.append(values))
    assert [r['step'] for r in reports] == steps  # completed steps
    assert [r['epoch'] for r in reports] == pytest.approx([2 + (step - 7) / 5 for step in steps])
    assert [r['lr'] for r in reports] == pytest.approx([(step - 1) * 0.01 for step in steps])
    assert all('loss_scale' not in r and r['images_per_s'] > 0 for r in reports)


@pytest.mark.parametrize('grad_clip', [0.0, 1e-3])
def test_the_reported_gradient_norm_is_before_clipping(grad_clip):
    (images, labels), = batches([4])
    model = linear()
    paddle.nn.functional.cross_entropy(model(images), labels).backward()
    expected = np.sqrt(sum(float((p.grad.numpy() ** 2).sum()) for p in model.parameters()))
    assert float(gradient_norm(model.parameters())) == pytest.approx(expected, rel=1e-5)
    reports = []
    train(linear(), [(images, labels)], grad_clip=grad_clip, on_report=lambda **values: reports.append(values))
    assert [r['grad_norm'] for r in reports] == pytest.approx([expected], rel=1e-5)


def test_the_loss_scale_is_reported_and_gradients_are_unscaled():
    reports = []
    for scaler in (None, LossScaler(1024.0)):
        train(linear(), batches([2, 2]), scaler=scaler, report_freq=1, lr=0.0,
              on_report=lambda **values: reports.append(values))
    assert [r.get('loss_scale') for r in reports] == [None, None, 1024.0, 1024.0]
    assert [r['grad_norm'] for r in reports[2:]] == pytest.approx([r['grad_norm'] for r in reports[:2]], rel=1e-5)


# ---- metrics.jsonl

def test_an_incomplete_last_line_is_ignored(tmp_path):
    folder = write_metrics(tmp_path / 'run')
    whole = read_metrics(folder)
    assert len(whole) == 12
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write('{"event": "st')
    assert read_metrics(folder) == whole
    with open(folder / 'metrics.jsonl', 'a') as file:
        file.write('\n')
    with pytest.raises(ValueError, match='metrics.jsonl:13: is not'):
        read_metrics(folder)
    with pytest.raises(FileNotFoundError, match='give the folder of a run'):
        read_metrics(tmp_path)


# ---- curves

@NEEDS_MATPLOTLIB
def test_curves_of_several_runs_share_their_panels(tmp_path, run_script):
    runs = [write_metrics(tmp_path / name, loss, ema=ema) for name, loss, ema in (('a', 2.0, True), ('b', 3.0, False))]
    for number in (1, 2):
        output = [f'-output={tmp_path}/both.png'] if number == 2 else []
        done = run_script('tools/plot_run.py', *runs[:number], *output, cwd=tmp_path)
        path = done.stdout.strip()
        assert done.returncode == 0 and path == str(tmp_path / ('a/curves.png', 'both.png')[number - 1]), done.stderr
        blue, orange = (31, 119, 180), (255, 127, 14)  # the first two of matplotlib
        found = colours(path)
        assert found[blue] > 500 and (found.get(orange, 0) > 500) == (number == 2)


@NEEDS_MATPLOTLIB
@pytest.mark.parametrize(('every', 'evaluated'), [(0, []), (2, [2, 3])])
def test_a_run_evaluates_when_due_and_draws_its_curves(run_script, list_dataset, tiny_yaml, tmp_path, every,
                                                       evaluated):
    done = run_script('main_single_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-device=cpu',
                      f'-output={tmp_path}/run', '-opts', 'CURVES', 'True', 'VALIDATE_FREQ', every,
                      'TRAIN.NUM_EPOCHS', '3', 'TRAIN.MODEL_EMA', 'False')
    assert done.returncode == 0, done.stderr
    assert [r['epoch'] for r in read_metrics(tmp_path / 'run') if r['event'] == 'eval'] == evaluated
    assert f'curves in {tmp_path}/run/curves.png' in done.stdout and colours(tmp_path / 'run/curves.png')


def test_without_matplotlib_the_log_and_the_tool_have_a_line_about_it(tmp_path, monkeypatch):
    folder = write_metrics(tmp_path / 'run')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    line = curves_line(folder)
    assert line.startswith('no curves.png: matplotlib') and 'pip install matplotlib' in line and '\n' not in line
    with pytest.raises(ValueError, match='pip install matplotlib'):
        draw_curves([folder], tmp_path / 'curves.png')
    assert not list(tmp_path.glob('*.png'))


def test_a_run_without_steps_has_no_curves(tmp_path, run_script):
    (tmp_path / 'metrics.jsonl').write_text('{"event": "eval", "acc1": 1.0}\n')
    done = run_script('tools/plot_run.py', tmp_path)
    assert done.returncode == 2 and 'has no training steps to draw' in done.stderr and done.stderr.count('\n') == 1
