"""Dry runs: costs and schedules are those of a real run, and each likely mistake gets one line."""
import gc
import inspect
import json
import time
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.base import core

from config import get_config
from dry_run.cost import model_cost, training_memory
from dry_run.likely_mistakes import ARCHITECTURE, warnings
from dry_run.loading_speed import LoadingSpeed, loading_rows, measure_loading
from dry_run.plan import make_plan
from dry_run.recipes import RECIPES
from dry_run.report import differences, report
from image_files.decode import DataError
from large_kernel import build, fastest_precision
from replknet import RepLKNet, build_replknet
from training.ema import ModelEMA
from training.optim import build_optimizer, parameter_groups

CONFIGS = Path(__file__).parents[1] / 'configs'
NO_DATA = 'no data folder is given (-data_path)'


def planned(name, *opts, gpus=8, **flags):
    config = get_config(CONFIGS / f'{name}.yaml', opts, {'dry_run': True, 'gpus_per_node': gpus, **flags})
    return make_plan(config, 'gpu', 1)


def write_list(folder, mode, labels):
    (folder / 'p').touch()
    (folder / f'{mode}_list.txt').write_text(''.join(f'p {label}\n' for label in labels))


# ---- cost

@pytest.mark.parametrize(('name', 'parameters', 'merged', 'gmacs'), [
    ('replknet_31b_1k_224', 79_864_168, 79_527_272, 15.354), ('replknet_31b_1k_384', 79_864_168, 79_527_272, 45.119),
    ('replknet_31l_22k1k_384', 172_671_016, 172_165_672, 95.989),
    ('replknet_xl_73m1k_320', 335_435_752, 335_399_656, 128.730)])
def test_parameters_and_multiply_accumulates_are_the_published_ones(name, parameters, merged, gmacs):
    cost = model_cost(get_config(CONFIGS / f'{name}.yaml'))
    assert (cost.parameters, cost.merged_parameters) == (parameters, merged)
    assert cost.merged_macs / 1e9 == pytest.approx(gmacs, abs=6e-4)
    assert cost.macs >= cost.merged_macs


@pytest.mark.parametrize(('name', 'opts'), [
    ('nano_digits', []), ('nano_digits', ['MODEL.RECOMPUTE', 'True']),
    ('nano_digits', ['MODEL.SMALL_KERNEL', '0', 'MODEL.DW_RATIO', '1.5', 'MODEL.DROPPATH', '0']),
    ('nano_digits', ['DATA.IMAGE_SIZE', '75', 'TRAIN.MODEL_EMA', 'False', 'TRAIN.OPTIMIZER.NAME', 'sgd']),
    pytest.param('31b', ['DATA.BATCH_SIZE', '2'], marks=pytest.mark.long),
    pytest.param('31b', ['DATA.BATCH_SIZE', '4', 'MODEL.RECOMPUTE', 'True'], marks=pytest.mark.long)])
@pytest.mark.skipif(not hasattr(core, 'host_memory_stat_reset_peak_value'), reason='Paddle 2.6 cannot reset the peak')
@pytest.mark.parametrize('implementation', ['native', 'auto'])
def test_estimated_memory_is_the_peak_that_paddle_counts(name, opts, implementation, monkeypatch):
    monkeypatch.setenv('LARGE_KERNEL_CONV_IMPL', implementation)  # native: Paddle's layers, which a GPU uses
    config = get_config(CONFIGS / f'replknet_{name}.yaml', opts)
    gc.collect()  # models of other tests
    before = core.host_memory_stat_current_value('Allocated', 0)
    model = build_replknet(config)
    ema = ModelEMA(model, 0.9) if config.TRAIN.MODEL_EMA else None
    optimizer = build_optimizer(config.TRAIN.OPTIMIZER.NAME, parameter_groups(model, 0.05))
    for _ in range(2):  # only the second step starts with gradients and optimizer state allocated
        core.host_memory_stat_reset_peak_value('Allocated', 0)
        images = paddle.rand([config.DATA.BATCH_SIZE, 3, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE])
        model(images).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    peak = core.host_memory_stat_peak_value('Allocated', 0) - before
    estimate = training_memory(config, model_cost(config), config.MODEL.RECOMPUTE)
    print(f'{implementation}: peak {peak / 1e6:.1f} MB, estimate {sum(estimate.values()) / 1e6:.1f} MB')
    if implementation == 'native' or build.reason_unavailable():
        assert sum(estimate.values()) == pytest.approx(peak, rel=0.03)
    else:  # the batch norm operator does not keep the input of GELU
        assert 0.85 * sum(estimate.values()) < peak < 1.03 * sum(estimate.values())
    assert (estimate['EMA'] == 0) == (ema is None)


# ---- recipes

@pytest.mark.parametrize('path', sorted(CONFIGS.glob('replknet_*.yaml')), ids=lambda path: path.stem)
def test_each_config_has_the_values_of_its_recipe(path):
    plan = planned(path.stem)
    assert differences(plan) == []
    if plan.config.TRAIN.RECIPE:
        assert plan.config.TRAIN.RECIPE_BATCH_SIZE == RECIPES[plan.config.TRAIN.RECIPE].global_batch
    else:
        assert path.stem in ('replknet_nano_digits', 'replknet_xl_73m', 'replknet_xl_73m1k_320')
    kinds = [NO_DATA]
    if plan.config.TRAIN.LAYER_DECAY < 1:
        kinds.append('is for fine-tuning, but the run starts from random weights')
    found = list(warnings(plan))
    assert len(found) == len(kinds) and all(kind in warning for kind, warning in zip(kinds, found))


def test_differences_from_the_recipe_are_listed_with_both_values():
    plan = planned('replknet_31b', 'TRAIN.WEIGHT_DECAY', 0.1, 'TRAIN.AUTO_AUGMENT', '', 'DATA.IMAGE_SIZE', 192)
    found = {('DATA.IMAGE_SIZE', 192, 224), ('TRAIN.WEIGHT_DECAY', 0.1, 0.05),
             ('TRAIN.AUTO_AUGMENT', '', 'rand-m9-mstd0.5-inc1')}
    assert set(differences(plan)) == found
    rows = [line.split() for line in report(plan.config, 'gpu', 1).splitlines()]
    assert ['TRAIN.WEIGHT_DECAY', '0.1', '0.05'] in rows
    assert ['TRAIN.AUTO_AUGMENT', "''", 'rand-m9-mstd0.5-inc1'] in rows


# ---- a cluster

@pytest.mark.parametrize(('nodes', 'gpus', 'batch', 'flags'), [
    (1, 8, 64, (64, 4)), (2, 8, 64, (64, 2)), (4, 8, 64, (64, 1)), (16, 8, 64, (16, 1)), (1, 8, 48, (32, 8)),
    (3, 8, 64, (64, 1)), (512, 8, 64, (64, 1))])  # 2048 is impossible for the last two
def test_accumulation_keeps_the_global_batch_of_the_recipe(nodes, gpus, batch, flags):
    plan = planned('replknet_31b', nodes=nodes, gpus=gpus, batch_size=batch)
    assert (plan.config.DATA.BATCH_SIZE, plan.config.TRAIN.ACCUM_ITER) == flags
    assert plan.processes == nodes * gpus
    missed = [w for w in warnings(plan) if 'global batch' in w]
    assert (plan.global_batch == 2048) == (not missed)


def test_speed_comes_from_a_number_or_a_run_folder(tmp_path):
    records = [{'event': 'train', 'images_per_s': 2 * speed, 'processes': 2} for speed in (90.0, 100.0, 400.0)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in [*records, {'event': 'eval'}]))
    for speed in ('100', str(tmp_path)):
        text = report(planned('replknet_31b', images_per_s=speed).config, 'gpu', 1)
        assert '100.0 per process, 800.0 in total' in text and '26.7 minutes, 54.0 epochs per day' in text
        assert '5.6 days' in text  # 300 x 1281167 / 800 s
    for wrong in ('fast', '-1', 'nan', str(tmp_path / 'none')):
        with pytest.raises(ValueError, match='-images_per_s='):
            report(planned('replknet_31b', images_per_s=wrong).config, 'gpu', 1)


def test_a_plan_without_a_dry_run_is_refused():
    with pytest.raises(ValueError, match='-nodes: PLAN.NODES.*-dry_run'):
        get_config(CONFIGS / 'replknet_31b.yaml', flags={'nodes': 2})


# ---- warnings

@pytest.mark.parametrize(('name', 'opts', 'words'), [
    ('replknet_31b', ['TRAIN.LINEAR_SCALED_LR', 256], 'scaled twice: TRAIN.BASE_LR 0.004 is already for a global'),
    ('replknet_31b', ['TRAIN.LINEAR_SCALED_LR', 2048, 'TRAIN.ACCUM_ITER', 1, 'TRAIN.BASE_LR', 1e-3], 'scaled twice'),
    ('replknet_31b', ['MODEL.CHANNELS', [96, 192, 384, 768]], 'in the published replknet_31b it is [128, 256,'),
    ('replknet_31b', ['DATA.INTERPOLATION', 'bilinear'], 'with bicubic'),
    ('replknet_31b', ['DATA.EVAL_PROTOCOL', 'warp'], 'evaluation warps at 224'),
    ('replknet_31b', ['TRAIN.WARMUP_EPOCHS', 150], 'the warm-up takes 150 of 300 epochs'),
    ('replknet_31b', ['TRAIN.WARMUP_EPOCHS', 1e-5], 'less than one optimizer step'),
    ('replknet_31b', ['TRAIN.NUM_EPOCHS', 10, 'TRAIN.WARMUP_EPOCHS', 1], 'about 0.9984 would fit'),
    ('replknet_31b', ['DATA.BATCH_SIZE', 4, 'TRAIN.SYNC_BN', False], 'statistics over only 4 images'),
    ('replknet_31b_22k_to_1k_384', ['DATA.EVAL_PROTOCOL', 'crop'], 'evaluation crops at 384'),
    ('replknet_31b_22k_to_1k_384', ['TRAIN.MIXUP_PROB', 1.0, 'TRAIN.MIXUP_ALPHA', 0.8], 'mixup is on'),
    ('replknet_31b_22k_to_1k_384', [], 'give -pretrained=replknet_31b_22k or'),
    ('replknet_31b_1k_384', ['EVAL', True], '-eval needs weights'),
    ('replknet_31b_1k_384', ['MODEL.PRETRAINED', 'nothing.pdparams'], 'nothing.pdparams: no such file'),
    ('replknet_31b', ['MODEL.PRETRAINED', 'replknet_31b_1k_384'], 'is 224; the weights of replknet_31b_1k_384'),
    ('replknet_31b', ['MODEL.PRETRAINED', 'replknet_xl_73m1k_320'], 'IMAGENET_STD is [0.229, 0.224, 0.225]; the'),
    ('replknet_31b', ['MODEL.PRETRAINED', 'replknet_31l_22k'], 'do not fit: MODEL.CHANNELS'),
    ('replknet_31b_1k_224', ['EVAL', True, 'MODEL.PRETRAINED', 'replknet_31b_22k'], 'NUM_CLASSES is 1000, but they'),
    ('replknet_31b', ['MODEL.NUM_CLASSES', 1], 'a head with one output'),
    ('replknet_31b', ['TRAIN.BASE_LR', 4], 'TRAIN.BASE_LR 4 is very high for adamw'),
    ('replknet_31b', ['TRAIN.WEIGHT_DECAY', 5], 'not a percentage'),
    ('replknet_31b', ['TRAIN.MODEL_EMA_DECAY', 0.001], 'the share that is kept at each step, such as 0.999'),
    ('replknet_nano_digits', ['EVAL', True, 'EVAL_TTA', 'flip'], 'TRAIN.HFLIP is 0'),
    ('replknet_31b', ['VALIDATE_FREQ', 0], 'measures no accuracy')])
def test_a_likely_mistake_gets_its_line(name, opts, words):
    found = [warning for warning in warnings(planned(name, *opts)) if words in warning]
    assert len(found) == 1 and '\n' not in found[0]


def test_the_architecture_is_what_the_model_takes_from_the_settings():
    arguments = {name.upper() for name in inspect.signature(RepLKNet).parameters}
    assert arguments & set(get_config().MODEL) == {*ARCHITECTURE, 'NUM_CLASSES', 'RECOMPUTE'}


def test_weights_of_a_run_are_compared_with_the_settings_beside_them(tmp_path):
    (tmp_path / 'config.yaml').write_text('DATA: {IMAGE_SIZE: 384}\n')
    (tmp_path / 'best.pdparams').touch()
    found = list(warnings(planned('replknet_31b', pretrained=str(tmp_path / 'best.pdparams'))))
    assert any('IMAGE_SIZE is 224' in warning and 'trained at 384' in warning for warning in found)


def test_limits_of_this_machine_are_reported(monkeypatch):
    config = get_config(CONFIGS / 'replknet_31b.yaml', ['DATA.BATCH_SIZE', 4096, 'AMP', True], {'dry_run': True})
    found = '\n'.join(warnings(make_plan(config, 'cpu', 2)))
    assert 'all processes together need about' in found
    assert ('-amp has no effect on the CPU' in found) == (fastest_precision() == 'fp32')
    monkeypatch.setattr('utils.device_count', lambda kind: 0)
    assert any('-device=xpu: there is none' in warning for warning in warnings(make_plan(config, 'xpu', 1)))


# ---- data

def test_classes_of_the_lists_are_compared_with_the_head(tmp_path):
    write_list(tmp_path, 'train', [0, 0, 1, 5, 6])
    write_list(tmp_path, 'val', [0, 1, 2, 3, 4, 5, 6])
    plan = planned('replknet_nano_digits', 'MODEL.NUM_CLASSES', 5, data_path=str(tmp_path), batch_size=8, gpus=1)
    found = '\n'.join(warnings(plan))
    assert ('train_list.txt has 2 classes for which the head of 5 classes has no output, such as 5: '
            'set MODEL.NUM_CLASSES to 7') in found
    assert 'train_list.txt has no image of 3 of the 5 classes of the head: 2, 3, 4' in found
    assert 'lower -batch_size' in found and plan.steps_per_epoch is None  # 5 images are fewer than a batch
    assert 'swapped' not in found


def test_images_listed_twice_or_not_used_are_reported(tmp_path):
    for mode, lines in (('train', ['a 0', 'a 1', 'b 0', 'b 0', 'c d 1']), ('val', ['b 0', 'b 0', 'e 1'])):
        (tmp_path / f'{mode}_list.txt').write_text('\n'.join(lines))
        for line in lines:
            (tmp_path / line[:-2]).touch()
    plan = planned('replknet_nano_digits', 'MODEL.NUM_CLASSES', 2, data_path=str(tmp_path), batch_size=4, gpus=1)
    found = list(warnings(plan))
    assert 'train_list.txt has 1 images under more than one label, such as a' in found
    assert 'val_list.txt lists 1 images more than once' in found
    assert '1 of the 2 images of val_list.txt are in train_list.txt too: the accuracy will be too high' in found
    assert any(line.startswith('each epoch leaves out 1 of the 5 training images') for line in found)
    write_list(tmp_path, 'train', [0] * 8)
    (tmp_path / 'train_list.txt').write_text(''.join(f'{tmp_path / name} 0\n' for name in 'abc'))
    (tmp_path / 'classes.txt').write_text('one\n')
    found = list(warnings(planned('replknet_nano_digits', 'MODEL.NUM_CLASSES', 2, data_path=str(tmp_path))))
    assert not any('more than once' in line and 'train' in line for line in found)
    assert any('classes.txt: names 1 classes, but the model has 2' in line for line in found)


def test_the_class_histogram_has_a_bar_for_each_class_or_range(tmp_path):
    write_list(tmp_path, 'train', [0] * 20 + [2] * 10)
    write_list(tmp_path, 'val', [0])
    text = report(planned('replknet_nano_digits', 'MODEL.NUM_CLASSES', 3, data_path=str(tmp_path)).config, 'gpu', 1)
    assert ("30 images, 2 classes, 1 of the head's classes without images; images per class: min 10, median 15, max 20"
            in text)
    assert [line.split()[2:] for line in text.splitlines() if line.strip().startswith('class ')] == [
        ['#' * 40, '20', 'images'], ['0', 'images'], ['#' * 20, '10', 'images']]
    labels = np.repeat(np.arange(100), np.arange(1, 101))
    write_list(tmp_path, 'train', [*labels, 2**31 - 1])
    text = report(planned('replknet_nano_digits', 'MODEL.NUM_CLASSES', 100, data_path=str(tmp_path)).config, 'gpu', 1)
    totals = [int(line.split()[-2]) for line in text.splitlines() if line.endswith(' classes') and '#' in line]
    assert len(totals) == 8 and sum(totals) == 101  # including the class beyond the head
    assert "101 classes, 0 of the head's classes without images" in text
    assert '    1 to 13   ' in text and '    89 to 100 ' in text


def test_a_broken_list_is_one_line_and_the_report_continues(tmp_path):
    (tmp_path / 'train_list.txt').write_text('p\n')
    write_list(tmp_path, 'val', [0])
    text = report(planned('replknet_31b', data_path=str(tmp_path)).config, 'gpu', 1)
    assert 'train_list.txt:1: expected' in text and '1,281,167 images assumed' in text and 'GMACs' in text


# ---- as a user runs it

def test_a_run_starts_with_the_warnings_of_its_dry_run(run_script, list_dataset, tiny_yaml, tmp_path):
    flags = [f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-device=cpu', '-opts', 'TRAIN.MODEL_EMA_DECAY',
             '0.9999']
    done = run_script('main_single_gpu.py', *flags, f'-output={tmp_path}/run')
    assert done.returncode == 0, done.stderr
    dry = run_script('main_single_gpu.py', *flags, '-dry_run', f'-output={tmp_path}/dry')
    expected = [line[4:] for line in dry.stdout.split('warnings\n')[1].splitlines()]
    assert any('MODEL_EMA_DECAY 0.9999 is too slow for 12 steps' in line for line in expected)
    assert [line.split('likely a mistake: ')[1] for line in done.stdout.splitlines() if 'likely a mistake' in line
            ] == expected


@pytest.mark.parametrize('script', ['main_single_gpu.py', 'main_multi_gpu.py'])
def test_a_dry_run_writes_nothing_and_succeeds(run_script, list_dataset, tiny_yaml, tmp_path, script):
    done = run_script(script, f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-device=cpu', '-dry_run',
                      f'-output={tmp_path}/run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    processes = 1 if script == 'main_single_gpu.py' else 2
    assert f'global batch        {2 * processes} = 2 images x {processes} process' in done.stdout
    steps = 13 // (2 * processes)  # the run of test_runs.py
    assert f'{steps} per epoch, {2 * steps} in total (2 epochs)' in done.stdout
    assert "13 images, 4 classes, 0 of the head's classes without images" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_for_gpus_needs_none(run_script, tmp_path):
    done = run_script('main_multi_gpu.py', f'-cfg={CONFIGS}/replknet_31b.yaml', '-device=gpu', '-dry_run', '-amp',
                      f'-data_path={tmp_path}/none', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'{tmp_path}/none: no such data folder' in done.stdout and not list(tmp_path.iterdir())


# ---- loading

def test_workers_follow_from_the_time_of_an_image():
    loading = LoadingSpeed(seconds=0.02, computing=0.005)
    assert [loading.workers(rate) for rate in (1, 176, 330, 657, 700)] == [1, 5, 8, 19, 20]
    assert loading.rate(4) == 200 and loading.rate(0) == 50 and loading.cores(700) == 3.5
    config = planned('replknet_31b', 'DATA.NUM_WORKERS', 4).config
    text = '\n'.join(map(' '.join, loading_rows(loading, config, 700, 1000)))
    assert '20.0 ms per image in one worker here, 5.0 ms of it computing' in text
    assert '-num_workers=4 loads about 200 images/s per process' in text
    assert '20 per process for 700 images/s; they keep 3.5 cores busy' in text
    assert 'need 3500 cores to load images, but this machine has' in text
    assert 'cores to load' not in str(loading_rows(loading, config, 700, None))


class Images:
    """Slow images, every second of which cannot be read, or none can."""

    def __init__(self, count, readable):
        self.count, self.readable = count, readable

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        if key[1] % 2 or not self.readable:
            raise DataError('no such image')
        time.sleep(0.02)


def test_loading_is_measured_on_images_that_can_be_read(list_dataset):
    loading = measure_loading(Images(20, True))
    assert 0.02 < loading.seconds and loading.computing < loading.seconds - 0.015
    assert measure_loading(Images(3, False)) is None
    plan = planned('replknet_nano_digits', data_path=str(list_dataset))
    assert 'ms per image in one worker here' in report(plan.config, 'gpu', 1)
