"""Shards: runs from them are those from the files, damage is named, and interrupted calls of make_shards continue."""
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import get_dataloader, get_dataset
from errors import UserError
from image_files.decode import DataError, ShardError, decode_image
from image_files.find import find_images
from image_files.lists import read_list
from image_files.shards import Shards
from loading.loader import _ErrorsAsValues
from port_weights.safe_load import read_checkpoint

sys.path.append(str(Path(__file__).parents[1] / 'tools'))
import check_images  # noqa: E402
import make_shards  # noqa: E402

LIMIT = 4096  # bytes: two or three images in a shard


def write_shards(data, output):
    """The shards of both lists of a data folder."""
    output.mkdir(exist_ok=True)
    for name in ('train_list.txt', 'val_list.txt'):
        make_shards.write_shards(str(data / name), str(output), LIMIT, 2)
    return output


@pytest.fixture(scope='session')
def sharded(list_dataset, tmp_path_factory):
    return write_shards(list_dataset, tmp_path_factory.mktemp('in shards') / 'data')


@pytest.fixture
def copy(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / 'copy')
    return tmp_path / 'copy'


def settings(folder, *opts):
    return get_config(None, ['DATA.DATA_PATH', str(folder), 'DATA.IMAGE_SIZE', 32, 'DATA.BATCH_SIZE', 2,
                             'DATA.BATCH_SIZE_EVAL', 3, 'DATA.NUM_WORKERS', 0, 'MODEL.NUM_CLASSES', 4, *opts])


def batches(folder, mode, workers, *opts, start=0):
    loader = get_dataloader(settings(folder, 'DATA.NUM_WORKERS', workers, *opts),
                            get_dataset(settings(folder, *opts), mode), mode)
    if mode == 'train':
        loader.set_epoch(2, start)
    return [(images.numpy(), labels.numpy()) for images, labels in loader]


@pytest.mark.parametrize(('mode', 'start'), [('train', 0), ('train', 4), ('val', 0)])
def test_batches_are_those_from_the_files(list_dataset, sharded, mode, start):
    expected, found = (batches(folder, mode, workers, start=start) for folder, workers in (
        (list_dataset, 0), (sharded, 2)))
    assert len(expected) == len(found) > 1
    for one, other in zip(expected, found):
        assert all(map(np.array_equal, one, other))


def test_a_run_from_the_files_is_resumed_from_shards_and_ends_alike(run_script, list_dataset, sharded, tiny_yaml,
                                                                    tmp_path):
    done = run_script('main_single_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-device=cpu',
                      f'-output={tmp_path}/run', '-opts', 'SAVE_FREQ', '1')
    assert done.returncode == 0, done.stderr
    expected = read_checkpoint(str(tmp_path / 'run/last.pdparams'))
    os.replace(tmp_path / 'run/epoch_0001.pdparams', tmp_path / 'run/last.pdparams')
    done = run_script('main_single_gpu.py', f'-resume={tmp_path}/run', f'-data_path={sharded}', '-num_workers=1')
    assert done.returncode == 0, done.stderr
    found = read_checkpoint(str(tmp_path / 'run/last.pdparams'))
    for key in ('model', 'model_ema'):
        assert found[key].keys() == expected[key].keys()
        for name, array in expected[key].items():
            assert np.array_equal(array, found[key][name]), name
    assert found['data'] == expected['data'] and found['step'] == expected['step']


def overwrite(path, position, data=None, size=None):
    with open(path, 'r+b') as file:
        file.seek(position)
        file.write(data or b'')
        if size is not None:
            file.truncate(size)


DAMAGES = {
    'missing': (os.remove, '00001.tar: cannot be read: No such file'),
    'cut': (lambda path: overwrite(path, 0, size=3000), r'00001.tar: has 3,000 bytes instead of \d'),
    'swapped': (lambda path: shutil.copyfile(path.with_name('00000.tar'), path), '00001.tar: has changed since'),
    'changed': (lambda path: overwrite(path, 600, b'changed'), '00001.tar: has changed since it was written'),
    'no index': (lambda path: os.remove(path.with_name('index.json')), 'index.json: cannot be read: No such file'),
    'odd index': (lambda path: path.with_name('index.json').write_text('{"version": 1}'), 'index.json: is damaged'),
    'later version': (lambda path: path.with_name('index.json').write_text('{"version": 2}'), 'is of version 2'),
    'cut index': (lambda path: overwrite(path.with_name('index.npy'), 0, size=150), 'index.npy: is cut or changed'),
    'changed index': (lambda path: overwrite(path.with_name('index.npy'), 130, b'!'), 'index.npy: is cut or changed'),
    'other list': (lambda path: path.parents[1].joinpath('train_list.txt').write_text('a.jpg 0\n'),
                   'train_list.txt: its paths have changed since its shards were written, when it had 13 entries')}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_shard_is_named_at_the_start(copy, damage):
    shard = copy / 'train_list.shards/00001.tar'
    function, words = DAMAGES[damage]
    function(shard)
    with pytest.raises(ShardError, match=words) as error:
        get_dataset(settings(copy), 'train')
    assert '\n' not in str(error.value)


def test_other_labels_for_the_same_images_need_no_new_shards(copy):
    path = copy / 'train_list.txt'
    path.write_text(''.join(line.rsplit(' ', 1)[0] + ' 2\n' for line in path.read_text().splitlines()))
    dataset = get_dataset(settings(copy), 'train')
    assert dataset.labels.tolist() == [2] * 13 and dataset[12][0].shape == (3, 32, 32)


def damage_in_the_middle(folder):
    """Changes an image that is neither the first nor the last one of its shard; returns its number."""
    shards = Shards(folder / 'train_list.txt', read_list(folder / 'train_list.txt')[0])
    index = next(i for i in range(1, 12) if shards.shard_of(i - 1) == shards.shard_of(i) == shards.shard_of(i + 1))
    overwrite(shards.path_of(shards.shard_of(index)), int(shards._entries[index]['offset']), b'changed')
    return index


@pytest.mark.parametrize('workers', [0, 1])
def test_damage_within_a_shard_ends_the_run_when_it_is_read_and_nothing_replaces_the_image(list_dataset, tmp_path,
                                                                                       workers, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'LIMIT', 8192)
    folder = write_shards(list_dataset, tmp_path / 'shards')
    index = damage_in_the_middle(folder)
    with pytest.raises(DataError, match=rf'train_list.txt:{index + 1}: .*000\d\d.tar: has changed since') as error:
        batches(folder, 'train', workers, 'DATA.MAX_BAD_FRACTION', 0.5, 'DATA.BATCH_SIZE', 13)
    assert '\n' not in str(error.value)
    damaged = make_shards.check_shards(str(folder / 'train_list.txt'), 2)
    assert len(damaged) == 1 and '.tar: has changed since' in damaged[0]
    assert make_shards.check_shards(str(folder / 'val_list.txt'), 2) == []


def test_damage_is_reported_also_where_it_is_met_in_place_of_another_image():
    class Data:
        def __getitem__(self, key):
            raise {0: DataError('not an image'), 1: ShardError('cut')}[key]

        def stand_ins(self, _):
            return [1]

    found = _ErrorsAsValues(Data(), replace=True)[0]
    assert isinstance(found, ShardError) and str(found) == 'cut'


def test_an_image_that_cannot_be_decoded_may_be_replaced_as_from_the_files(list_dataset, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(list_dataset, data)
    path = read_list(data / 'train_list.txt')[0][3].decode()
    (data / path).write_bytes(b'')
    folder = write_shards(data, tmp_path / 'shards')
    opts = ('DATA.MAX_BAD_FRACTION', 0.5)
    for one, other in zip(batches(data, 'train', 0, *opts), batches(folder, 'train', 0, *opts)):
        assert all(map(np.array_equal, one, other))
    with pytest.raises(DataError, match=rf'train_list.txt:4: .*shards/0000\d.tar/{path}: cannot read the image'):
        get_dataset(settings(folder), 'train')[3]


def test_lists_in_shards_serve_prediction_and_checks(list_dataset, sharded, tmp_path):
    files, labels = find_images([str(list_dataset / 'val_list.txt')])
    images, found = find_images([str(sharded / 'val_list.txt')])
    assert found == labels and [os.path.basename(path) for path in images] == list(map(os.path.basename, files))
    for path, image in zip(files, images):
        assert np.array_equal(np.asarray(decode_image(path)), np.asarray(decode_image(image)))
    checks = [check_images.Check(check_images.sources_of(str(folder)), 2) for folder in (list_dataset, sharded)]
    assert len({tuple(map(tuple, ((kind, *sorted(c.findings[kind])) for kind in c.findings))) for c in checks}) == 1


def test_clean_lists_are_refused_for_shards(run_script, sharded, tmp_path):
    done = run_script('tools/check_images.py', sharded, f'-write_clean={tmp_path}/clean')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'are in shards; clean the list' in done.stderr


# ---- writing

def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_an_interrupted_call_leaves_no_list_and_continues(list_dataset, sharded, tmp_path, monkeypatch, capsys):
    output, original = tmp_path / 'shards', make_shards.write_shard
    count = []

    def interrupted(path, names, files, limit):
        count.append(path)
        if len(count) == 3:
            return original(path, names, iter([next(files), None]), limit)  # fails within the shard
        return original(path, names, files, limit)

    monkeypatch.setattr(make_shards, 'write_shard', interrupted)
    with pytest.raises(TypeError):
        write_shards(list_dataset, output)
    assert not (output / 'train_list.txt').exists() and not (output / 'train_list.shards/00002.tar').exists()
    with pytest.raises(FileNotFoundError, match='train_list.txt: no such list file'):
        get_dataset(settings(output), 'train')
    other = tmp_path / 'other/train_list.txt'
    other.parent.mkdir()
    other.write_text('a.jpg 0\n')
    with pytest.raises(UserError, match='holds unfinished shards of another list'):
        make_shards.write_shards(str(other), str(output), LIMIT, 2)
    write_shards(list_dataset, output)
    assert 'continues after 2 shards' in capsys.readouterr().out
    assert contents(output) == contents(sharded)


def test_nothing_is_overwritten(list_dataset, copy, tmp_path):
    before = contents(copy)
    with pytest.raises(UserError, match='train_list.txt: exists; name another folder with -output'):
        write_shards(list_dataset, copy)
    with pytest.raises(UserError, match='is in shards already'):
        write_shards(copy, tmp_path / 'again')
    (copy / 'train_list.txt').unlink()
    with pytest.raises(UserError, match='train_list.shards: is not empty'):
        write_shards(list_dataset, copy)
    assert contents(copy) == {name: data for name, data in before.items() if name != 'train_list.txt'}


def test_names_of_all_kinds_and_missing_images(tmp_path, run_script):
    data, outside = tmp_path / 'data', tmp_path / 'outside.png'
    data.mkdir()
    names = ['a b.png', 'größe.png', 'x' * 200 + '.png', str(outside), '../outside.png', os.fsdecode(b'\xff.png')]
    for number, name in enumerate(names):
        Image.new('RGB', (4, 3), (number, 0, 0)).save(data / name)
    (data / 'list.txt').write_bytes(b''.join(os.fsencode(name) + b' 0\n' for name in names) + b'a b.png\n')
    done = run_script('tools/make_shards.py', data / 'list.txt', f'-output={tmp_path}/shards')
    assert done.returncode == 0 and 'list.txt: 7 images in 1 shard, 0.0 MB' in done.stdout, done.stderr
    images, labels = find_images([str(tmp_path / 'shards/list.txt')])
    assert [decode_image(image).getpixel((0, 0))[0] for image in images] == [0, 1, 2, 4, 4, 5, 0]
    assert labels == [0] * 6 + [-1]
    shutil.unpack_archive(tmp_path / 'shards/list.shards/00000.tar', tmp_path / 'unpacked')
    assert (tmp_path / 'unpacked' / str(outside)[1:]).exists()
    os.remove(data / 'a b.png')
    with pytest.raises(DataError, match=r'list.txt:1: .*a b.png: no such image'):
        make_shards.write_shards(str(data / 'list.txt'), str(tmp_path / 'missing'), LIMIT, 2)
    assert not list(tmp_path.glob('missing/*.txt'))


def test_the_index_is_small_and_plain(sharded):
    index = json.loads((sharded / 'train_list.shards/index.json').read_text())
    entries = np.load(sharded / 'train_list.shards/index.npy')
    assert entries.itemsize == 16 and len(entries) == 13 == sum(shard['images'] for shard in index['shards'])
    assert not {'unfinished.json', '00000.npy'} & set(os.listdir(sharded / 'train_list.shards'))
