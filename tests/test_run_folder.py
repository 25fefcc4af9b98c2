"""Run folders: which checkpoints are kept, failed saves, and folders that already contain something."""
import os
import subprocess
import sys

import numpy as np
import pytest

from config import config_changes, config_text, get_config
from errors import UserError
from port_weights.safe_load import read_checkpoint
from run_folder.resume import choose_folder, read_resumed
from run_folder.writer import RunFolder, numbered_to_keep
from utils import append_json_line, logger, truncate_lines

ACCURACIES = {1: 10.0, 2: None, 3: 30.0, 4: 20.0, 5: 30.0, 6: None}
NUMBERED = {f'e{epoch}': {'epoch': epoch, 'acc1': acc1} for epoch, acc1 in ACCURACIES.items()}


@pytest.mark.parametrize(('rule', 'kept'), [
    ({}, ''), ({'every': 2}, '4 6 2'), ({'latest': 2}, '5 6'), ({'top': 2}, '5 3'), ({'top': 9}, '5 3 4 1'),
    ({'every': 4, 'latest': 1, 'top': 1}, '5 4 6')])
def test_numbered_checkpoints_to_keep_most_accurate_first(rule, kept):
    assert numbered_to_keep(NUMBERED, **rule) == [f'e{epoch}' for epoch in kept.split()]
    assert numbered_to_keep({}, **rule) == []


@pytest.fixture(autouse=True)
def no_log_file(monkeypatch):
    monkeypatch.setattr('utils.log_to_file', lambda path: None)


def settings(folder, *opts):
    config = get_config(None, ['SAVE', str(folder), *opts])
    choose_folder(config)
    config.freeze()
    return config


def state(folder, epoch, **more):
    return {'model': {'w': np.full(25000, epoch, 'float32')}, 'optimizer': {}, 'epoch': epoch, 'step': epoch,
            'best': {}, 'numbered': {}, 'config': config_text(folder.config), **more}


def evaluate(folder, accuracies):
    numbered = {}
    for epoch, acc1 in accuracies.items():
        folder.save_evaluated(state(folder, epoch, numbered=numbered), {} if acc1 is None else {'model': acc1},
                              ['model'] if epoch == 1 else [])
    return numbered


def test_top_and_latest_checkpoints_are_kept_and_the_others_deleted(tmp_path):
    folder = RunFolder(settings(tmp_path / 'run', 'SAVE_TOP_K', 1, 'SAVE_LATEST_K', 1))
    folder.claim()
    numbered = evaluate(folder, ACCURACIES)
    assert set(numbered) == {'epoch_0005.pdparams', 'epoch_0006.pdparams'}
    assert set(os.listdir(folder.path)) == {'config.yaml', 'log.txt', 'last.pdparams', 'previous.pdparams',
                                            'best.pdparams', *numbered}
    assert read_checkpoint(f'{folder.path}/best.pdparams')['model']['w'][0] == 1


def test_the_size_limit_deletes_the_least_accurate(tmp_path):
    folder = RunFolder(settings(tmp_path / 'run', 'SAVE_FREQ', 1, 'SAVE_MAX_GB', 0.00055))  # 5 files of 0.1 MB
    folder.claim()
    numbered = evaluate(folder, ACCURACIES)
    assert set(numbered) == {'epoch_0003.pdparams', 'epoch_0005.pdparams'}
    assert sum(path.stat().st_size for path in (tmp_path / 'run').glob('*.pdparams')) < 0.55e6


def test_a_full_disk_is_reported_and_the_last_checkpoint_is_kept(tmp_path, monkeypatch):
    folder = RunFolder(settings(tmp_path / 'run'))
    folder.claim()
    folder.save_last(state(folder, 1))

    def fail(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        folder.save_last(state(folder, 2))
        folder.record(event='train', epoch=2)
    assert 'No space left' in folder.unsaved
    assert read_resumed(folder.path)[1]['epoch'] == 1
    assert not os.path.getsize(f'{folder.path}/metrics.jsonl')
    folder.save_last(state(folder, 3))
    assert folder.unsaved == '' and read_resumed(folder.path)[1]['epoch'] == 3


def test_a_failed_save_is_retried_and_the_evaluation_counts_only_after_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logger, 'propagate', True)
    caplog.set_level('INFO', logger=logger.name)
    folder = RunFolder(settings(tmp_path / 'run', 'SAVE_FREQ', 1))
    folder.claim()
    folder.save_last(state(folder, 0))
    evaluated = state(folder, 1)

    def fail(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', fail)
        folder.save_evaluated(evaluated, {'model': 10.0}, ['model'])
    assert 'No space left' in folder.unsaved and set(evaluated['numbered']) == {'epoch_0001.pdparams'}
    caplog.clear()
    folder.summary({'model': {'epoch': 1, 'acc1': 10.0, 'acc5': 20.0}}, evaluated['numbered'])
    assert 'best model: epoch 1 Acc@1 10.000 Acc@5 20.000 (not saved)' in caplog.text
    assert f'not saved: {folder.path}/epoch_0001.pdparams' in caplog.text and 'kept' not in caplog.text
    assert read_resumed(folder.path)[1]['epoch'] == 0  # so a resumed run would evaluate again
    folder.save_last(state(folder, 1))
    assert folder.unsaved == ''
    assert read_checkpoint(f'{folder.path}/best.pdparams')['epoch'] == 1
    assert read_checkpoint(f'{folder.path}/epoch_0001.pdparams')['epoch'] == 1


def test_a_run_that_saved_nothing_starts_again_only_with_the_same_settings(tmp_path):
    folder = RunFolder(settings(tmp_path / 'run'))
    folder.claim()
    folder.record(event='train', epoch=1)
    again = RunFolder(settings(tmp_path / 'run'))
    again.claim()
    assert not os.path.getsize(f'{again.path}/metrics.jsonl')
    with pytest.raises(UserError, match='already contains a run'):
        settings(tmp_path / 'run', 'SEED', 7)
    again.record(event='eval', acc1=1.0)  # as -eval leaves it
    with pytest.raises(UserError, match='already contains a run'):
        settings(tmp_path / 'run')


def test_runs_that_start_in_the_same_second_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('time.strftime', lambda form: '20260101-000000')
    names = [os.path.basename(settings('').SAVE) for _ in range(3)]
    assert names == ['replknet_31b-20260101-000000' + suffix for suffix in ('', '-2', '-3')]
    assert sorted(os.listdir('output')) == names
    settings('', 'DRY_RUN', True)  # creates nothing
    assert sorted(os.listdir('output')) == names


def test_only_rank_0_of_a_launcher_chooses_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PADDLE_TRAINER_ID', '1')
    assert settings('').SAVE == '' and not os.listdir(tmp_path)


HOLD = """import fcntl, sys
file = open(sys.argv[1], 'a')
fcntl.lockf(file, fcntl.LOCK_EX)
print('locked', flush=True)
sys.stdin.read()"""


def test_a_run_at_work_is_recognised_and_nobody_is_told_to_delete_it(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'config.yaml').write_text('SEED: 1\n')
    with pytest.raises(UserError, match=r'already contains a run \(config.yaml\); choose another folder$'):
        settings(folder)
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(folder / 'log.txt')], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b'locked\n'
        with pytest.raises(UserError, match=r'; another process is working on it; choose another folder$'):
            settings(folder)
    finally:
        holder.communicate(b'')
    (folder / 'last.pdparams').touch()
    with pytest.raises(UserError, match=r'; choose another folder, or continue that run with -resume='):
        settings(folder, 'MODEL.RESUME', 'elsewhere/epoch_0001.pdparams')


def test_changed_settings_are_refused_or_allowed():
    config = get_config(None, ['TRAIN.BASE_LR', 0.5, 'MODEL.CHANNELS', [8] * 4, 'DATA.NUM_WORKERS', 1, 'SAVE', 'x'])
    refused, allowed = config_changes(config_text(get_config()), config)
    assert refused == ['MODEL.CHANNELS [128, 256, 512, 1024] -> [8, 8, 8, 8]', 'TRAIN.BASE_LR 0.004 -> 0.5']
    assert allowed == ['DATA.NUM_WORKERS 4 -> 1']
    assert config_changes('SEED: 42', get_config()) == ([], [])  # a run from before most keys existed


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    truncate_lines(path, 5)  # no file yet
    append_json_line(path, {'step': 1, 'loss': float('nan')})
    size = path.stat().st_size
    append_json_line(path, {'step': 2})
    path.write_bytes(path.read_bytes() + b'{"torn')
    truncate_lines(path, 10**6)
    assert path.read_text().splitlines() == ['{"step": 1, "loss": null}', '{"step": 2}']
    truncate_lines(path, size)
    assert path.read_text() == '{"step": 1, "loss": null}\n'
    truncate_lines(path, size - 1)
    assert path.read_text() == ''
