"""Training on few images: frozen layers, balanced classes, patience, and images that cannot be decoded."""
import json
import os
import re
import shutil

import numpy as np
import paddle
import pytest

from config import ConfigError, config_text, get_config
from datasets import DataError, TrainBatchSampler, get_dataloader, get_dataset
from loading.samplers import balanced_order
from losses import ClassWeightedCrossEntropyLoss, CrossEntropyLoss, SoftTargetCrossEntropyLoss, class_weights
from port_weights.safe_load import read_checkpoint
from replknet import RepLKNet
from run_folder.resume import _is_unfinished, out_of_patience
from training.freezing import freeze

# ---- frozen layers

def test_freezing_counts_parts_from_the_stem():
    model = RepLKNet([9, 7, 5, 5], [1, 1, 1, 1], [4, 6, 8, 10], num_classes=3)
    every = {name for name, p in model.named_parameters() if not p.stop_gradient}
    for parts, prefixes in ((0, ()), (1, ('stem',)), (2, ('stem', 'stages.0')),
                            (3, ('stem', 'stages.0', 'transitions.0', 'stages.1'))):
        freeze(model, parts)
        trained = {name for name, p in model.named_parameters() if not p.stop_gradient}
        assert every - trained == {name for name in every if prefixes and name.startswith(prefixes)}
    freeze(model, 5)
    assert {name.split('.')[0] for name, p in model.named_parameters() if not p.stop_gradient} == {'norm', 'head'}


def test_frozen_weights_and_statistics_stay_and_the_run_resumes_exactly(run_script, list_dataset, tiny_yaml, tmp_path):
    flags = [f'-data_path={list_dataset}', '-device=cpu']
    opts = ['-opts', 'SAVE_FREQ', '1', 'TRAIN.FREEZE', '3', 'MODEL.RECOMPUTE', 'True']
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    done = run_script('main_multi_gpu.py', f'-cfg={tiny_yaml}', f'-output={whole}', *flags, *opts)
    assert done.returncode == 0, done.stderr
    first, last = (read_checkpoint(f'{whole}/{name}.pdparams') for name in ('epoch_0001', 'last'))
    for key in ('model', 'model_ema'):
        same = {name.split('.')[0] + name.split('.')[1] if name.startswith(('st', 'tr')) else name.split('.')[0]
                for name, array in first[key].items() if np.array_equal(array, last[key][name])}
        changed = {'.'.join(name.split('.')[:2]) for name, array in first[key].items()
                   if not np.array_equal(array, last[key][name])}
        assert {'stem0', 'stem3', 'stages0', 'stages1', 'transitions0'} <= same
        assert changed == {'stages.2', 'stages.3', 'transitions.1', 'transitions.2', 'norm.weight', 'norm.bias',
                           'norm._mean', 'norm._variance', 'head.weight', 'head.bias'}
    assert not any(name.startswith(('stem', 'stages.0')) for name in last['optimizer']['accumulators'])
    done = run_script('main_multi_gpu.py', f'-resume={whole}/epoch_0001.pdparams', f'-output={resumed}', *flags)
    assert done.returncode == 0, done.stderr
    again = read_checkpoint(f'{resumed}/last.pdparams')
    for name, array in last['model'].items():
        assert array.tobytes() == again['model'][name].tobytes(), name


def test_more_parts_than_there_are_are_refused():
    with pytest.raises(ConfigError, match='TRAIN.FREEZE is 6; the stem and 4 stages are 5 parts'):
        get_config(None, ['TRAIN.FREEZE', 6])


# ---- classes of different sizes

def test_a_balanced_epoch_has_all_classes_equally_often():
    labels = np.array([0] * 40 + [3] * 7 + [1] * 3)
    rng = np.random.default_rng(0)
    order, copies = balanced_order(labels, rng)
    assert sorted(np.bincount(labels[order], minlength=4).tolist()) == [0, 16, 17, 17]
    for index in range(len(labels)):
        assert sorted(copies[order == index]) == list(range((order == index).sum()))
    for label in (1, 3):  # no image is used once more than another of its class by two or more
        counts = np.bincount(order, minlength=len(labels))[labels == label]
        assert counts.max() - counts.min() <= 1
    assert balanced_order(np.zeros(5, int), rng)[1].tolist() == [0] * 5


def test_the_balanced_sampler_is_the_same_for_any_number_of_processes_and_repeats_itself():
    labels = np.array([0] * 30 + [1] * 5)
    one = [sorted(batch) for batch in TrainBatchSampler(35, 4, seed=3, labels=labels)]
    two = [list(TrainBatchSampler(35, 2, rank, 2, seed=3, labels=labels)) for rank in (0, 1)]
    assert one == [sorted(a + b) for a, b in zip(*two)]
    assert len({key for batch in one for key in batch}) == 32  # repeats have a number, so other augmentations
    sampler = TrainBatchSampler(35, 4, seed=3, labels=labels)
    sampler.set_epoch(1)
    assert [sorted(batch) for batch in sampler] != one


def test_class_weights_have_mean_1_over_the_images():
    labels = np.array([0] * 8 + [1] * 2)
    np.testing.assert_allclose(class_weights(labels, 2), [10 / 16, 10 / 4])
    for kind in ('balanced', 'sqrt'):
        assert class_weights(labels, 3, kind)[labels].mean() == pytest.approx(1)
    assert class_weights(labels, 2, 'sqrt')[1] / class_weights(labels, 2, 'sqrt')[0] == pytest.approx(2)


def test_the_weighted_loss_is_the_weighted_mean_of_the_losses():
    rng = np.random.default_rng(0)
    logits = paddle.to_tensor(rng.standard_normal((6, 3)).astype('float32'))
    labels = paddle.to_tensor([0, 1, 2, 2, 2, 2])
    ones = ClassWeightedCrossEntropyLoss([1, 1, 1], smoothing=0.0)
    assert float(ones(logits, labels)) == pytest.approx(float(CrossEntropyLoss()(logits, labels)), rel=1e-6)
    targets = paddle.nn.functional.softmax(paddle.to_tensor(rng.standard_normal((6, 3)).astype('float32')))
    assert float(ones(logits, targets)) == pytest.approx(float(SoftTargetCrossEntropyLoss()(logits, targets)), rel=1e-6)
    weighted = ClassWeightedCrossEntropyLoss([2, 0, 0.5], smoothing=0.0)
    each = [float(CrossEntropyLoss()(logits[i:i + 1], labels[i:i + 1])) for i in range(6)]
    expected = np.mean(np.array([2, 0, 0.5])[labels.numpy()] * each)
    assert float(weighted(logits, labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(('opts', 'words'), [
    (['TRAIN.CLASS_WEIGHTS', 'balanced', 'TRAIN.LOSS', 'bce'], 'for cross-entropy; TRAIN.LOSS is bce'),
    (['TRAIN.SAMPLER', 'balanced', 'TRAIN.REPEATED_AUG', 3], 'repeats images already'),
    (['TRAIN.PATIENCE', 3, 'VALIDATE_FREQ', 0], 'none is measured')])
def test_settings_that_exclude_each_other_are_refused(opts, words):
    with pytest.raises(ConfigError, match=words):
        get_config(None, opts)


# ---- patience

@pytest.mark.parametrize(('patience', 'epochs', 'best', 'expected'), [
    (3, 7, {'model': {'epoch': 4}}, True), (3, 6, {'model': {'epoch': 4}}, False),
    (0, 99, {'model': {'epoch': 1}}, False),
    (3, 7, {'model': {'epoch': 4}, 'model_ema': {'epoch': 5}}, False), (3, 9, {}, False)])
def test_patience_counts_epochs_since_the_best_of_model_and_average(patience, epochs, best, expected):
    assert out_of_patience(get_config(None, ['TRAIN.PATIENCE', patience]), epochs, best) is expected


def test_a_run_without_progress_stops_and_is_complete(run_script, list_dataset, tiny_yaml, tmp_path):
    flags = [f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-device=cpu', '-resume=auto', '-opts',
             'TRAIN.BASE_LR', '1e-12', 'TRAIN.END_LR', '0', 'TRAIN.WARMUP_START_LR', '0', 'TRAIN.NUM_EPOCHS', '30',
             'TRAIN.PATIENCE', '2', 'TRAIN.CLASS_WEIGHTS', 'sqrt', 'TRAIN.SAMPLER', 'balanced']
    done = run_script('main_single_gpu.py', *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stopped = int(re.search(r'stopped after epoch (\d+): no better accuracy for 2 epochs', done.stdout)[1])
    run, = (tmp_path / 'output').iterdir()
    assert stopped < 30 and read_checkpoint(run / 'last.pdparams')['epoch'] == stopped
    assert 'best model: epoch' in done.stdout
    config = get_config(run / 'config.yaml')
    assert not _is_unfinished(str(run), config)  # so -resume=auto starts a new run
    config.TRAIN.PATIENCE = 20
    (run / 'config.yaml').write_text(config_text(config))
    assert _is_unfinished(str(run), config)


# ---- images that cannot be decoded

@pytest.fixture
def damaged(list_dataset, tmp_path):
    """A copy of `list_dataset` in which one of 13 training images is damaged."""
    folder = tmp_path / 'data'
    shutil.copytree(list_dataset, folder)
    (folder / 'train/class 1/5.jpg').write_bytes(b'\xff\xd8 no image')
    return folder


def test_an_image_of_the_same_class_takes_the_place_of_a_damaged_one(damaged, tiny_yaml):
    def epoch(fraction, workers=0):
        config = get_config(tiny_yaml, ['DATA.DATA_PATH', str(damaged), 'DATA.MAX_BAD_FRACTION', fraction,
                                        'DATA.NUM_WORKERS', workers])
        loader = get_dataloader(config, get_dataset(config, 'train'), 'train')
        loader.set_epoch(4)
        images, labels = zip(*[(i.numpy(), label.numpy()) for i, label in loader])
        return np.concatenate(images), np.concatenate(labels).tolist(), loader.replaced
    with pytest.raises(DataError, match=r'train_list.txt:6: .*5.jpg: cannot read the image'):
        epoch(0)
    images, labels, replaced = epoch(0.1)
    again, _, _ = epoch(0.1, workers=2)
    assert replaced == 1 and images.tobytes() == again.tobytes()
    assert len(labels) == 12
    config = get_config(tiny_yaml, ['DATA.DATA_PATH', str(damaged), 'DATA.MAX_BAD_FRACTION', 0.1])
    dataset = get_dataset(config, 'train')
    stand_ins = dataset.stand_ins((4, 5))
    assert {index for _, index in stand_ins} == {1, 9} and all(dataset.labels[i] == 1 for _, i in stand_ins)


def test_evaluation_never_replaces_an_image(list_dataset, tiny_yaml, tmp_path):
    folder = tmp_path / 'data'
    shutil.copytree(list_dataset, folder)
    (folder / 'val/class 1/5.jpg').write_bytes(b'')
    config = get_config(tiny_yaml, ['DATA.DATA_PATH', str(folder), 'DATA.MAX_BAD_FRACTION', 0.5])
    with pytest.raises(DataError, match='val_list.txt:6'):
        list(get_dataloader(config, get_dataset(config, 'val'), 'val'))


def test_a_run_counts_damaged_images_and_stops_above_the_fraction(run_script, damaged, tiny_yaml, tmp_path):
    flags = [f'-cfg={tiny_yaml}', f'-data_path={damaged}', '-device=cpu', '-batch_size=1']
    done = run_script('main_multi_gpu.py', *flags, f'-output={tmp_path}/run', '-opts', 'DATA.MAX_BAD_FRACTION', '0.1')
    assert done.returncode == 0, done.stderr
    log = done.stdout + (tmp_path / 'run/log.txt').read_text()
    assert log.count('another image of its class takes its place') >= 1 and 'train_list.txt:6' in log
    records = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert sum(r.get('replaced', 0) for r in records if r['event'] == 'train') in (1, 2)
    for index in (9, 2, 3):
        (damaged / f'train/class {index % 4}/{index}.jpg').write_bytes(b'')
    done = run_script('main_single_gpu.py', *flags, f'-output={tmp_path}/bad', '-opts', 'DATA.MAX_BAD_FRACTION', '0.1')
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert re.search(r'[2-4] of 13 training images could not be decoded in epoch 1, more than DATA', done.stderr)
    assert not os.path.exists(tmp_path / 'bad/best.pdparams')
