"""The table of published checkpoints, and the files that its names stand for."""
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

import replknet
import zoo
from config import get_config
from datasets import eval_protocol
from errors import UserError
from port_weights.safe_load import find_weights, read_checkpoint
from zoo import ZOO, resolve_weights

ROOT = Path(__file__).resolve().parents[1]
TINY = {'layers': [1, 1, 2, 1], 'channels': [8, 16, 24, 32], 'large_kernel_sizes': [31, 29, 27, 13]}


def test_every_published_checkpoint_is_there():
    assert list(ZOO) == ['replknet_31b_1k_224', 'replknet_31b_1k_384', 'replknet_31b_22k1k_224',
                         'replknet_31b_22k1k_384', 'replknet_31l_22k1k_384', 'replknet_xl_73m1k_320',
                         'replknet_31b_22k', 'replknet_31l_22k', 'replknet_xl_73m']
    links = [link for c in ZOO.values() for link in (c.official_drive, c.official_baidu, c.paddle_drive, c.paddle_baidu)
             if link]
    assert len(links) == len(set(links)) == 9 * 2 + 8 * 2


@pytest.mark.parametrize('name', ZOO)
def test_the_config_builds_the_checkpoint(name):
    checkpoint = ZOO[name]
    config = get_config(ROOT / checkpoint.config)
    assert config.MODEL.NAME == checkpoint.variant
    assert config.DATA.IMAGE_SIZE == checkpoint.image_size
    assert checkpoint.classes in (config.MODEL.NUM_CLASSES, None)
    assert (eval_protocol(config) == 'warp') == checkpoint.protocol.startswith('warp')
    if eval_protocol(config) == 'crop':
        resize = int(checkpoint.image_size / config.DATA.CROP_PCT)
        assert checkpoint.protocol.startswith(f'resize {resize}, centre crop {checkpoint.image_size}')
    assert ('0.5' in checkpoint.protocol) == (config.DATA.IMAGENET_MEAN == [0.5, 0.5, 0.5])
    variant = {'small_kernel': 5, 'dw_ratio': 1.0, **replknet.VARIANTS[checkpoint.variant]}
    assert variant == {key: config.MODEL[key.upper()] for key in variant}


def test_command_prints_the_table():
    out = subprocess.run([sys.executable, 'zoo.py'], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for checkpoint in ZOO.values():
        line = next(line for line in out.splitlines() if line.startswith(checkpoint.name + ' '))
        assert checkpoint.official_file in line and checkpoint.config in line and checkpoint.protocol in line
    assert '83.5   83.48        resize 256' in out and 'mmpretrain' in out


def test_the_document_has_the_command_for_every_file():
    text = (ROOT / 'docs' / 'weights.md').read_text(encoding='utf-8')
    for checkpoint in ZOO.values():
        command = f'port_weights/convert.py {checkpoint.official_file} weights/{checkpoint.name}.safetensors'
        assert f'\npython {command} ' in text
        for link in (checkpoint.official_drive, checkpoint.official_baidu, checkpoint.paddle_drive,
                     checkpoint.paddle_baidu):
            assert link is None or link in text


# ---- files of a name

@pytest.fixture
def tiny_zoo(monkeypatch):
    """Adds the tiny model to the zoo."""
    monkeypatch.setitem(replknet.VARIANTS, 'tiny', TINY)
    monkeypatch.setitem(ZOO, 'tiny', dataclasses.replace(ZOO['replknet_31b_1k_224'], name='tiny', variant='tiny',
                                                         classes=10, official_file='Official-Tiny.pth'))


def place(golden, folder, name, file='tiny.pth'):
    (folder / name).write_bytes((golden / file).read_bytes())


def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path):
    for name in ('best.pdparams', 'last.pdparams'):
        (tmp_path / name).touch()
    assert resolve_weights(str(tmp_path)) == str(tmp_path / 'best.pdparams')


def test_a_path_is_itself(golden):
    assert resolve_weights(str(golden / 'tiny.pth')) == str(golden / 'tiny.pth')


@pytest.mark.parametrize('name', ['replknet_31b_1k_244', 'no/such/file.pdparams', ''])
def test_neither_a_file_nor_a_name(tmp_path, name):
    with pytest.raises(FileNotFoundError, match='neither a file nor a name') as error:
        resolve_weights(name, tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ZOO)
def test_where_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        resolve_weights(name, str(tmp_path))
    text = str(error.value)
    assert '\n' not in text and str(tmp_path) in text and ZOO[name].official_file in text
    assert f'https://drive.google.com/file/d/{ZOO[name].official_drive}/view?usp=sharing' in text
    assert f'https://pan.baidu.com/s/{ZOO[name].official_baidu}' in text
    assert (f'python zoo.py -download {name}' in text) == (ZOO[name].address is not None)


@pytest.mark.parametrize('extension', ['.safetensors', '.pdparams'])
def test_converted_files_are_taken_as_they_are(tmp_path, extension):
    (tmp_path / f'replknet_31b_22k{extension}').write_bytes(b'not even read')
    assert resolve_weights('replknet_31b_22k', str(tmp_path)) == str(tmp_path / f'replknet_31b_22k{extension}')


@pytest.mark.parametrize('name', ['Official-Tiny.pth', 'tiny.pth', 'Official-Tiny.safetensors'])
def test_official_files_are_converted_once(golden, tmp_path, tiny_zoo, name, caplog):
    place(golden, tmp_path, name)
    with caplog.at_level('INFO', 'replknet'):
        path = resolve_weights('tiny', str(tmp_path))
    assert path == str(tmp_path / 'tiny.safetensors') and 'converted to' in caplog.text
    assert len(find_weights(read_checkpoint(path))[0]) == 246
    made = os.stat(path).st_mtime_ns
    caplog.clear()
    assert resolve_weights('tiny', str(tmp_path)) == path
    assert os.stat(path).st_mtime_ns == made and caplog.text == ''
    assert sorted(os.listdir(tmp_path)) == sorted([name, 'tiny.safetensors'])


@pytest.mark.parametrize('change, message', [
    ({'variant': 'replknet_31b'}, 'not replknet_31b'), ({'classes': 21841}, 'is for 10 classes, not 21841'),
    ({'head': 'cls_22k'}, "no head 'cls_22k'")])
def test_a_file_of_another_model(golden, tmp_path, tiny_zoo, monkeypatch, change, message):
    monkeypatch.setitem(ZOO, 'tiny', dataclasses.replace(ZOO['tiny'], **change))
    place(golden, tmp_path, 'Official-Tiny.pth')
    with pytest.raises(UserError, match=message):
        resolve_weights('tiny', str(tmp_path))
    assert os.listdir(tmp_path) == ['Official-Tiny.pth']


def test_processes_convert_at_the_same_time(golden, tmp_path):
    """As the ranks of a run do: each of them gets a complete file."""
    place(golden, tmp_path, 'Official-Tiny.pth')
    program = f'''
import dataclasses, os, sys, time
import replknet, zoo
from port_weights.safe_load import read_checkpoint
replknet.VARIANTS['tiny'] = {TINY}
zoo.ZOO['tiny'] = dataclasses.replace(zoo.ZOO['replknet_31b_1k_224'], name='tiny', variant='tiny', classes=10,
                                      official_file='Official-Tiny.pth')
open(sys.argv[1] + '/ready' + sys.argv[2], 'w').close()
while len([f for f in os.listdir(sys.argv[1]) if f.startswith('ready')]) < 4:
    time.sleep(0.001)
print(len(read_checkpoint(zoo.resolve_weights('tiny', sys.argv[1]))))
'''
    processes = [forked.Popen([sys.executable, '-c', program, str(tmp_path), str(rank)], cwd=ROOT,
                              stdout=subprocess.PIPE)
                 for rank in range(4)]
    outputs = [process.communicate(timeout=120)[0].decode().split()[-1] for process in processes]
    assert outputs == ['246'] * 4 and [p.returncode for p in processes] == [0] * 4
    assert sorted(f for f in os.listdir(tmp_path) if 'ready' not in f) == ['Official-Tiny.pth', 'tiny.safetensors']


def test_reading_the_table_needs_no_framework():
    program = 'import sys, zoo; zoo.table(); sys.exit("paddle" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program], cwd=ROOT).returncode == 0
    assert zoo.table()
