"""Long lists: the fast reader agrees with the one that reads line by line, in little memory."""
import os
import random
import threading
import tracemalloc

import numpy as np
import pytest

from image_files import entries
from image_files.decode import DataError
from image_files.entries import Paths
from image_files.lists import list_identity, read_list
from loading.samplers import TrainBatchSampler
from utils import STREAM_ORDER, random_generator

PIECES = [b'a', b'b c', b'/x.jpg', b' ', b'  ', b'\t', b'0', b'12', b'-1', b'999999999', b'9999999999', b'\r', b'\x0b',
          b'\x0c', b'\xe9', b'\x1c', b'\xc2\x85', b'\0x']


def random_list(rng):
    lines = []
    for _ in range(rng.randrange(9)):
        if rng.random() < 0.85:
            name = rng.choice([b'a b', b'c', b'\xe9', b'a long name of an image'])
            lines.append(b'dir/%s%s%d' % (name, b' ' * rng.choice([1, 1, 1, 2]), rng.randrange(30)))
        else:
            lines.append(b''.join(rng.choice(PIECES) for _ in range(rng.randrange(6))))
    return (rng.choice([b'', b'', b'\xef\xbb\xbf']) + rng.choice([b'\n', b'\n', b'\r\n', b'\r']).join(lines)
            + rng.choice([b'', b'\n', b'\n\n \n', b'\r\n']))


def result(path, **options):
    try:
        paths, labels = read_list(path, **options)
    except DataError as error:
        return str(error)
    return paths.tolist(), labels.tolist(), list_identity(paths, labels)


def test_unusual_lists_are_read_as_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, '_BLOCK', 64)
    rng, path, regular, kinds = random.Random(0), tmp_path / 'list.txt', entries._regular, []
    for _ in range(400):
        path.write_bytes(random_list(rng))
        options = {'num_classes': rng.choice([None, 25]), 'unlabelled': rng.random() < 0.3}
        monkeypatch.setattr(entries, '_regular', regular)
        fast = result(path, **options)
        monkeypatch.setattr(entries, '_regular', lambda *_: None)
        assert fast == result(path, **options), path.read_bytes()
        kinds.append(type(fast))
    assert kinds.count(str) > 80 and kinds.count(tuple) > 80


@pytest.fixture
def long_list(tmp_path, monkeypatch):
    """A list of 3,000 lines in many blocks."""
    monkeypatch.setattr(entries, '_BLOCK', 1000)
    monkeypatch.setattr(entries, '_ROWS', 100)
    lines = [b'train/n%05d/an image %d.JPEG %d' % (n % 700, n, n % 700) for n in range(3000)]
    (tmp_path / 'list.txt').write_bytes(b'\n'.join(lines))
    return tmp_path / 'list.txt', lines


@pytest.mark.parametrize('line_end', [b'\n', b'\r\n'])
def test_no_line_of_a_plain_list_becomes_an_object(long_list, monkeypatch, line_end):
    path, lines = long_list
    path.write_bytes(line_end.join([*lines, b'']))
    monkeypatch.setattr(entries, '_any', None)
    paths, labels = read_list(path, 700)
    assert paths.tolist() == [line.rsplit(b' ', 1)[0] for line in lines] and labels.tolist() == [
        n % 700 for n in range(3000)]
    assert paths[-1] == paths[2999] == b'train/n00199/an image 2999.JPEG'
    with pytest.raises(IndexError):
        paths[3000]


@pytest.mark.parametrize(('line', 'words'), [(b'', "expected 'relative/path label', got ''"), (b'a', 'expected'),
                                             (b'a 700', 'label 700 is out of range, must be 0 to 699')])
def test_errors_far_down_a_list_name_the_line(long_list, line, words):
    path, lines = long_list
    path.write_bytes(b'\n'.join([*lines[:2222], line, *lines[2223:]]))
    with pytest.raises(DataError, match=f'list.txt:2223: {words}'):
        read_list(path, 700)


def test_memory_of_a_long_list(long_list, monkeypatch):
    monkeypatch.undo()
    path, lines = long_list
    path.write_bytes(b'\n'.join(lines * 50))
    tracemalloc.start()
    paths, labels = read_list(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(paths) == len(labels) == 150_000
    assert peak < 1.2 * path.stat().st_size + 16 * len(labels) + 30 * 2**20, peak


def test_equal_paths_have_equal_hashes(long_list):
    path, lines = long_list
    names = [line.rsplit(b' ', 1)[0] for line in [*lines, *lines[:5]]] + [b'a', b'a\0', b'aaaaaaaa', b'aaaaaaaaa', b'a']
    hashes = Paths.of(names).hashes()
    assert len(np.unique(hashes)) == 3004 and np.array_equal(hashes[:5], hashes[3000:3005]) and hashes[-1] == hashes[-5]


def test_lists_are_read_from_pipes(long_list):
    path, _ = long_list
    expected, (reader, writer) = result(path), os.pipe()

    def write():
        with open(writer, 'wb') as file:
            file.write(path.read_bytes())

    thread = threading.Thread(target=write)
    thread.start()
    assert result(f'/dev/fd/{reader}') == expected
    thread.join()
    os.close(reader)


def test_the_order_in_half_the_memory_is_that_of_earlier_runs():
    sampler = TrainBatchSampler(1000, 10, seed=7)
    sampler.set_epoch(3)
    order = [index for batch in sampler for _, index in batch]
    assert order == random_generator(7, STREAM_ORDER, 3).permutation(1000).tolist()
