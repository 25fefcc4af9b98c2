"""The data of a run belong to it: changed lists are noticed, and the names of classes are checked before training."""
import json
import os
import shutil

import numpy as np
import pytest

from config import get_config
from datasets import DataError, read_class_names, read_list
from errors import UserError
from image_files.lists import IMAGENET_NAMES, is_imagenet_1k, list_identity, names_file
from run_folder.layout import BEST
from run_folder.metrics import best_checkpoint
from training.data import read_data, refuse_other_data
from utils import append_json_line
from zoo import class_names_file

LISTS = {'train_list.txt': ['a.png 0', 'a b.png 1', 'c.png 2', 'd.png 0'], 'val_list.txt': ['v.png 1', 'w.png 0'],
         'classes.txt': ['cat', 'dog', 'owl']}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, **LISTS)
    for line in LISTS['train_list.txt'] + LISTS['val_list.txt']:
        (tmp_path / line.rsplit(' ', 1)[0]).touch()
    return tmp_path


def write(folder, **files):
    for name, lines in files.items():
        (folder / name).write_text('\n'.join(lines) + '\n')


def settings(folder, *opts):
    return get_config(None, ['DATA.DATA_PATH', str(folder), 'MODEL.NUM_CLASSES', 3, *opts])


def checkpoint(folder):
    """What a checkpoint within an epoch says of the data."""
    return {'data': read_data(settings(folder)).identity, 'sums': {'steps': 1}, 'best': {'model': {'acc1': 90.0}},
            'numbered': {'epoch_0001.pdparams': {'epoch': 1, 'acc1': 90.0, 'weights': 'model'}}}


TRAIN = LISTS['train_list.txt']
CHANGES = {
    'labels swapped': ('train_list.txt', ['a.png 1', 'a b.png 0', *TRAIN[2:]], 'train_list.txt has other entries'),
    'reversed': ('train_list.txt', TRAIN[::-1], 'or the same in another order'),
    'shortened': ('train_list.txt', TRAIN[:3], 'train_list.txt had 4 entries and now has 3'),
    'doubled': ('train_list.txt', TRAIN * 2, 'train_list.txt had 4 entries and now has 8'),
    'other validation': ('val_list.txt', ['v.png 1'], 'val_list.txt had 2 entries and now has 1'),
    'other names': ('classes.txt', ['dog', 'cat', 'owl'], 'classes.txt has other entries'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_data_are_refused_or_named_where_they_are_asked_for(folder, change, caplog, monkeypatch):
    monkeypatch.setattr('utils.logger.propagate', True)
    file, lines, words = CHANGES[change]
    state = checkpoint(folder)
    write(folder, **{file: lines})
    config = settings(folder)
    with pytest.raises(UserError, match='c.pdparams: belongs to a run with other data: ') as error:
        refuse_other_data(config, read_data(config), state, 'c.pdparams')
    assert words in str(error.value) and 'DATA.ALLOW_CHANGES True' in str(error.value)
    config = settings(folder, 'DATA.ALLOW_CHANGES', True)
    changed = refuse_other_data(config, read_data(config), state, 'c.pdparams')
    assert changed == [file.split('_')[0].split('.')[0]] and words in caplog.text
    if changed == ['val']:
        assert state['best'] == {} and state['numbered']['epoch_0001.pdparams']['acc1'] is None
    else:
        assert state['best'] == {'model': {'acc1': 90.0}}
    assert ('may be seen twice' in caplog.text) == (changed == ['train'])


def test_the_same_data_elsewhere_and_checkpoints_of_earlier_versions_are_accepted(folder, tmp_path_factory):
    state = checkpoint(folder)
    elsewhere = tmp_path_factory.mktemp('elsewhere') / 'copy'
    shutil.copytree(folder, elsewhere)
    (elsewhere / 'train_list.txt').write_bytes('\r\n'.join(['\ufeff' + TRAIN[0], *TRAIN[1:], '', '']).encode())
    config = settings(elsewhere)
    assert refuse_other_data(config, read_data(config), state, 'c') == []
    del state['data']
    write(folder, **{'train_list.txt': TRAIN[:1]})
    assert refuse_other_data(config, read_data(settings(folder)), state, 'c') == []


def test_a_resumed_run_refuses_other_labels_and_continues_with_them_on_request(run_script, list_dataset, tiny_yaml,
                                                                              tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(list_dataset, data)
    done = run_script('main_single_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={data}', f'-output={tmp_path}/run',
                      '-device=cpu', '-opts', 'SAVE_FREQ', '1')
    assert done.returncode == 0, done.stderr
    os.replace(tmp_path / 'run/epoch_0001.pdparams', tmp_path / 'run/last.pdparams')
    lines = (data / 'val_list.txt').read_text().splitlines()
    (data / 'val_list.txt').write_text('\n'.join(lines[:7]) + '\n')
    before = {name: (tmp_path / 'run' / name).read_bytes() for name in os.listdir(tmp_path / 'run')}
    done = run_script('main_single_gpu.py', f'-resume={tmp_path}/run')
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert 'val_list.txt had 11 entries and now has 7' in done.stderr
    assert before == {name: (tmp_path / 'run' / name).read_bytes() for name in os.listdir(tmp_path / 'run')}
    done = run_script('main_single_gpu.py', f'-resume={tmp_path}/run', '-opts', 'DATA.ALLOW_CHANGES', 'True')
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert [(r['epoch'], r['changed']) for r in records if r['event'] == 'data'] == [(1, ['val'])]
    assert f"best model: epoch 2 Acc@1 {records[-2]['acc1']:.3f}" in done.stdout
    assert 'ALLOW_CHANGES: false' in (tmp_path / 'run/config.yaml').read_text()  # it was for this call only


def test_accuracies_on_another_validation_list_do_not_choose_the_best_checkpoint(tmp_path):
    for name in BEST.values():
        (tmp_path / name).touch()
    for acc1, weights in ((99, 'model'), (None, None), (50, 'model'), (60, 'model_ema')):
        record = {'event': 'data', 'changed': ['val']} if acc1 is None else {
            'event': 'eval', 'acc1': acc1, 'weights': weights}
        append_json_line(tmp_path / 'metrics.jsonl', record)
    assert best_checkpoint(str(tmp_path)).endswith(BEST['model_ema'])


# ---- lists

def test_blank_lines_are_ignored_at_the_end_of_a_list_only(tmp_path):
    path = tmp_path / 'list.txt'
    path.write_text('a.png 0\nb.png 1\n\n \n')
    assert read_list(path)[1].tolist() == [0, 1]
    path.write_text('a.png 0\n\nb.png 1\n')
    with pytest.raises(DataError, match=r"list.txt:2: expected 'relative/path label', got ''"):
        read_list(path)


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
def test_utf_16_is_refused_by_its_name(tmp_path, encoding):
    path = tmp_path / 'list.txt'
    path.write_bytes('\ufeffa.png 0\n'.encode(encoding))
    for read in (read_list, read_class_names):
        with pytest.raises(DataError, match='list.txt: is UTF-16 text; save it as UTF-8'):
            read(path)


# ---- names of classes

@pytest.mark.parametrize(('content', 'words'), [
    (b'cat\ndog\n', 'classes.txt: names 2 classes, but the model has 3'),
    ('cat\ndog\n\u9e1f\n'.encode('gbk'), 'classes.txt:3: is not UTF-8 text; if it is in GBK'),
    (b'cat\n\nowl\n', 'classes.txt:2: blank line')])
def test_class_names_are_checked_before_training(folder, content, words):
    (folder / 'classes.txt').write_bytes(content)
    for opts in ([], ['EVAL', True]):
        with pytest.raises(DataError, match=words):
            read_data(settings(folder, *opts))


def test_blank_lines_at_the_end_of_the_names_are_ignored(folder):
    (folder / 'classes.txt').write_text('cat\r\ndog\r\nowl\r\n\r\n')
    assert read_data(settings(folder)).names == ['cat', 'dog', 'owl']


def arrays(*lines):
    return np.array([line.rsplit(None, 1)[0].encode() for line in lines]), np.array(
        [int(line.rsplit(None, 1)[1]) for line in lines])


@pytest.mark.parametrize(('lines', 'expected'), [
    (['train/n01440764/a.JPEG 0', 'train/n01443537/b.JPEG 1', 'train/n15075141/c.JPEG 999'], True),
    (['val/ILSVRC2012_val_00000001.JPEG 65', 'val/ILSVRC2012_val_00000002.JPEG 970'], True),
    (['train/n01440764/a.JPEG 1', 'train/n01443537/b.JPEG 0'], False),  # not in the order of the synsets
    (['train/n01440764/a.JPEG 0', 'train/n01440764/b.JPEG 1'], False),
    (['train/n00004475/a.JPEG 0', 'train/n01443537/b.JPEG 1'], False),  # ImageNet, but other classes
    (['cats/1.jpg 0', 'dogs/1.jpg 1'], False)])
def test_the_lists_of_imagenet_are_recognised(lines, expected):
    assert is_imagenet_1k(*arrays(*lines)) is expected


def test_imagenet_names_are_only_for_published_models_and_imagenet_lists(tmp_path):
    def names(weights, cfg=None, classes=1000):
        config = get_config(None, ['DATA.DATA_PATH', str(tmp_path), 'MODEL.NUM_CLASSES', classes,
                                   'MODEL.PRETRAINED', weights])
        return class_names_file(config, None, cfg)
    assert names('replknet_31b_1k_224') == IMAGENET_NAMES
    assert names('w.pdparams', 'configs/replknet_31b_1k_224.yaml') == IMAGENET_NAMES
    assert names('w.pdparams') is None and names('w.pdparams', 'configs/replknet_31b.yaml') is None
    write(tmp_path, **{'val_list.txt': ['val/ILSVRC2012_val_00000001.JPEG 65']})
    assert names('w.pdparams') == IMAGENET_NAMES and names('w.pdparams', classes=10) is None
    write(tmp_path, **{'classes.txt': ['own']})
    assert names('w.pdparams') == names('replknet_31b_1k_224') == str(tmp_path / 'classes.txt')
    assert names_file('', 1000) is None


def test_the_identity_of_a_list_depends_on_entries_and_order():
    identities = [list_identity(*arrays(*lines))['digest'] for lines in (
        ['a 0', 'b 1'], ['b 1', 'a 0'], ['a 1', 'b 0'], ['a 0', 'b 1', 'c 0'], ['ab 0', 'c 1'], ['a 0', 'bc 1'])]
    assert len(set(identities)) == len(identities)
