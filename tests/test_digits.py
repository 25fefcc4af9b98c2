"""tools/prepare_digits.py: the handwritten digits as an ImageNet-style dataset."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import get_dataset
from errors import UserError
from tools import prepare_digits

pytest.importorskip('sklearn', reason='needs scikit-learn')
REPOSITORY = Path(prepare_digits.__file__).parents[1]


def command(output):
    return [sys.executable, str(REPOSITORY / 'tools' / 'prepare_digits.py'), f'-output={output}']


def run(output):
    return subprocess.run(command(output), capture_output=True, text=True, timeout=120, cwd=Path(output).parent)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    output = tmp_path_factory.mktemp('digits') / 'new folder' / 'digits'
    assert prepare_digits.prepare_digits(output)
    return output


def test_lists_and_images_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits
    source = load_digits()
    seen = set()
    for part, size in (('train', 1437), ('val', 360)):
        lines = (digits / f'{part}_list.txt').read_text().splitlines()
        assert len(lines) == size
        for line in lines:
            path, label = line.rsplit(' ', 1)
            index = int(Path(path).stem)
            seen.add(index)
            with Image.open(digits / path) as image:
                assert image.mode == 'L' and image.size == (8, 8)
                assert np.array_equal(np.rint(np.asarray(image) / 255 * 16), source.images[index])
            assert int(label) == source.target[index]
    assert seen == set(range(1797))


def test_split_is_stratified_and_fixed(digits):
    config = get_config(opts=['DATA.DATA_PATH', str(digits), 'MODEL.NUM_CLASSES', 10])
    counts = {mode: np.bincount(get_dataset(config, mode).labels) for mode in ('train', 'val')}
    share = counts['val'] / (counts['train'] + counts['val'])
    assert len(share) == 10 and share.min() > 0.19 and share.max() < 0.21
    lines = (digits / 'val_list.txt').read_text().splitlines()
    assert lines[:3] == ['val/0/0000.png 0', 'val/2/0002.png 2', 'val/4/0004.png 4']


def test_a_second_run_keeps_the_existing_dataset(digits):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob('*')}
    done = run(digits)
    assert done.returncode == 0 and 'exists already, 1437 training and 360 validation images' in done.stdout
    assert {path: path.stat().st_mtime_ns for path in digits.rglob('*')} == before


def test_two_runs_at_the_same_time_both_succeed(tmp_path):
    output = tmp_path / 'digits'
    processes = [subprocess.Popen(command(output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for _ in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    prepare_digits.check_dataset(output)
    assert os.listdir(tmp_path) == ['digits'], 'leftovers of a temporary folder'


def test_a_dataset_that_appears_during_the_run_is_kept(tmp_path, monkeypatch):
    output = tmp_path / 'digits'
    write = prepare_digits.write_dataset

    def slower(folder):
        write(folder)
        monkeypatch.setattr(prepare_digits, 'write_dataset', write)
        assert prepare_digits.prepare_digits(output)

    monkeypatch.setattr(prepare_digits, 'write_dataset', slower)
    assert not prepare_digits.prepare_digits(output)
    assert os.listdir(tmp_path) == ['digits']


def test_an_empty_folder_is_filled_and_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    output = tmp_path / 'digits'
    output.mkdir()

    def interrupted(folder):
        (folder / 'train_list.txt').write_text('half')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_digits, 'write_dataset', interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_digits.prepare_digits(output)
    assert os.listdir(tmp_path) == ['digits'] and not os.listdir(output)
    assert prepare_digits.prepare_digits(output)


@pytest.mark.parametrize('damage', ['image', 'list', 'short list', 'other folder', 'file'])
def test_damaged_or_foreign_folders_are_refused_and_left_alone(tmp_path, damage):
    output = tmp_path / 'digits'
    words = 'is not the complete digits dataset'
    if damage == 'other folder':
        output.mkdir()
        (output / 'thesis.txt').write_text('important')
    elif damage == 'file':
        output.write_text('important')
    else:
        prepare_digits.prepare_digits(output)
        if damage == 'image':
            (output / 'val/4/0004.png').unlink()
            words = 'val/4/0004.png is missing'
        elif damage == 'list':
            (output / 'train_list.txt').unlink()
        else:
            text = (output / 'train_list.txt').read_text()
            (output / 'train_list.txt').write_text(text[:len(text) // 2])
    before = sorted(tmp_path.rglob('*'))
    done = run(output)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1, done.stderr
    assert sorted(tmp_path.rglob('*')) == before


def test_without_scikit_learn_the_message_tells_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match='pip install scikit-learn'):
        prepare_digits.prepare_digits(tmp_path / 'digits')
    assert not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(run_script, tmp_path):
    (tmp_path / 'file').touch()
    done = run_script('tools/prepare_digits.py', '-output', tmp_path / 'file/digits')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert f'{tmp_path}/file/digits: cannot be written: ' in done.stderr and 'choose another folder' in done.stderr
