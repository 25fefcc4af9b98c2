"""How commands end: signals, closed pipes, full disks, text that cannot be printed."""
import csv
import errno
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import paddle
import pytest
from PIL import Image

import benchmark
import export as exporting
import predict
import training.run
import utils
from atomic_file import append_whole
from benchmarks import harness
from config import config_text, get_config
from errors import Interrupted, TrainingStopped, exit_status
from port_weights import convert
from port_weights.safe_load import read_checkpoint
from predict import Prediction, results_file
from replknet import build_replknet
from run_folder.checkpoint import model_arrays, save_checkpoint

ROOT = Path(__file__).parents[1]
ODD = os.fsdecode(b'caf\xe9.png')  # in Latin-1


@pytest.fixture(scope='module')
def run(tmp_path_factory, tiny_yaml):
    """A run folder with Chinese class names, and a list of 20,000 images of which the first has a Latin-1 name."""
    folder, config = tmp_path_factory.mktemp('run'), get_config(tiny_yaml)
    (folder / 'config.yaml').write_text(config_text(config))
    (folder / 'classes.txt').write_text('蚂蚁\n蜜蜂\n牛\n鹿\n', encoding='utf-8')
    paddle.seed(0)
    save_checkpoint(folder / 'best.pdparams', {
        'model': model_arrays(build_replknet(config)), 'weights_key': 'model', 'optimizer': {}, 'epoch': 1, 'step': 1,
        'best': {}, 'config': ''})
    for name in ('a.png', ODD):
        Image.new('RGB', (8, 8)).save(os.path.join(folder, name))
    (folder / 'list.txt').write_bytes(os.fsencode(ODD) + b'\n' + b'a.png\n' * 20000)
    return folder


def start(*arguments, **environment):
    """Starts a command that reacts to SIGINT even where a shell in the background ignores it."""
    return forked.Popen([sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])], stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})


def test_an_interrupted_prediction_keeps_its_results(run, tmp_path, number=signal.SIGINT):
    process = start('predict.py', run / 'list.txt', f'-model={run}', f'-output={tmp_path}/o.csv', '-device=cpu')
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size > 2000 for p in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.send_signal(number)  # as `timeout` does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert os.listdir(tmp_path) == ['o.csv']
    with open(tmp_path / 'o.csv', encoding='utf-8', errors='surrogateescape', newline='') as file:
        rows = list(csv.DictReader(file))
    assert rows[0]['picture'] == f'{run}/{ODD}' and rows[-1]['name_4'] and len(rows) > 10
    last = err.decode().splitlines()[1:]
    assert last == [f'stopped by a signal: {len(rows)} of 20001 images are in {tmp_path}/o.csv']


def test_text_is_escaped_and_a_closed_pipe_ends_quietly(run):
    process = start('predict.py', run / 'list.txt', f'-model={run}', '-device=cpu', PYTHONIOENCODING='ascii')
    lines = [process.stdout.readline().decode('ascii') for _ in range(2)]
    process.stdout.close()
    err = process.stderr.read().decode('ascii')
    assert process.wait(timeout=60) == 141 and err.count('\n') == 1 and err.startswith('weights of ')
    assert 'caf\\udce9.png: \\u' in lines[0] and 'a.png: \\u' in lines[1]


def test_standard_output_that_cannot_be_written():
    closed = start('zoo.py')
    closed.stdout.close()
    assert closed.stderr.read() == b'' and closed.wait() == 141
    for arguments in (['zoo.py'], ['port_weights/convert.py', '-h']):
        with open('/dev/full', 'w') as full:
            done = subprocess.run([sys.executable, ROOT / arguments[0], *arguments[1:]], stdout=full,
                                  stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, 'standard output: No space left on device\n')


def test_a_run_survives_the_end_of_its_reader(list_dataset, tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.delenv('PYTHONUNBUFFERED', raising=False)  # what is buffered must not fail at the end either
    folder = os.path.join(tmp_path, os.fsdecode(b'caf\xe9'))
    process = start('main_single_gpu.py', f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-device=cpu',
                    f'-output={folder}', '-opts', 'TRAIN.NUM_EPOCHS', '1')
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(timeout=120) == 0
    assert read_checkpoint(os.path.join(folder, 'last.pdparams'))['epoch'] == 1
    assert 'caf\\udce9' in Path(folder, 'log.txt').read_text(encoding='utf-8').splitlines()[-1]


def test_the_end_of_a_command_does_not_search_its_imports_for_reference_cycles():
    gc.unfreeze()
    assert exit_status(lambda: 10 * (gc.get_freeze_count() > 10_000)) == 10  # Paddle alone has a multiple of this


def stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(5)  # the signal arrives first


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_signals_become_an_exit_status(name, capsys):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        assert exit_status(stop, number) == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, handler)
    assert capsys.readouterr().err == 'stopped by a signal\n'


def test_a_blocked_signal_is_left_to_those_who_block_it():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
        during = []
        exit_status(lambda: during.extend([signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)]))
        assert tuple(during) == before
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def test_an_interrupted_conversion_writes_nothing(golden, tmp_path, monkeypatch, capsys):
    def interrupted(file, tensors):
        file.write(b'half')
        stop()

    monkeypatch.setitem(convert._WRITERS, '.pdparams', interrupted)
    assert convert.main([str(golden / 'tiny.pth'), str(tmp_path / 'x.pdparams')]) == 143
    assert os.listdir(tmp_path) == [] and capsys.readouterr().err == 'stopped by a signal; nothing was written\n'


@pytest.mark.parametrize('where', ['while it is written', 'between two renames'])
def test_an_interrupted_export_leaves_the_earlier_one(run, tmp_path, monkeypatch, capsys, where):
    output = tmp_path / 'export'
    output.mkdir()
    (output / 'certificate.json').write_text('earlier')
    if where == 'while it is written':
        monkeypatch.setattr(exporting, '_write_programs', lambda *_: stop())
    else:
        rename = os.rename
        monkeypatch.setattr(exporting, '_write_programs', lambda *_: {})
        monkeypatch.setattr(exporting.os, 'rename', lambda a, b: stop() if b == str(output) and a.endswith('new')
                            else rename(a, b))
    monkeypatch.setattr('sys.argv', ['export.py', f'-pretrained={run}', f'-output={output}', '-overwrite'])
    assert exit_status(exporting.main) == 143
    assert os.listdir(tmp_path) == ['export'] and (output / 'certificate.json').read_text() == 'earlier'
    assert capsys.readouterr().err.endswith('stopped by a signal; nothing is exported\n')


def test_interrupted_benchmarks_keep_their_rows(tmp_path, monkeypatch, capsys):
    row = {'form': 'fused', 'backend': 'dygraph', 'threads': 1, 'size': 32, 'batch': 1, 'images_per_s': 2.0,
           'shares': {}, 'paddle': '3'}

    def measure(_):
        yield row
        stop()

    monkeypatch.setattr(benchmark, 'measure', measure)
    monkeypatch.setattr('sys.argv', ['benchmark.py', f'-output={tmp_path}/o.json'])
    assert exit_status(benchmark.main) == 143
    assert json.loads((tmp_path / 'o.json').read_text())['results'] == [row]
    arguments = SimpleNamespace(threads=1, output=tmp_path / 'o.csv')
    results = ((row, '1.0') if number == 0 else stop() for number in range(2))
    shown = []
    assert exit_status(harness.report, results, arguments, shown.extend) == 143
    assert shown == [row] and (tmp_path / 'o.csv').read_text().endswith('fused,dygraph,1,32,1,2.0,{},3\n')


@pytest.mark.parametrize('extension', ['csv', 'jsonl'])
def test_a_full_disk_keeps_the_results_before(tmp_path, monkeypatch, extension):
    path, written = tmp_path / f'o.{extension}', []

    def append(file, data):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(data)
        append_whole(file, data)

    monkeypatch.setattr(predict, 'append_whole', append)
    with pytest.raises(OSError, match=f'No space left on device: .*o.{extension}'):
        with results_file(str(path), 1, False) as write:
            for _ in range(4):
                write(Prediction(ODD, [0], ['牛'], [1.0]), -1)
    assert path.read_bytes() == b''.join(written) and os.listdir(tmp_path) == [path.name]
    if extension == 'jsonl':
        assert json.loads(written[0])['picture'] == ODD
    else:
        assert os.fsencode(ODD) in written[1]


def test_an_error_before_the_first_result_keeps_the_earlier_file(tmp_path):
    (tmp_path / 'o.csv').write_text('earlier')
    with pytest.raises(Interrupted), results_file(str(tmp_path / 'o.csv'), 1, False):
        raise Interrupted(signal.SIGTERM, '')
    assert (tmp_path / 'o.csv').read_text() == 'earlier' and os.listdir(tmp_path) == ['o.csv']


def test_append_whole_appends_all_or_nothing(tmp_path):
    with open(tmp_path / 'x', 'ab', buffering=0) as file:
        append_whole(file, b'first')
        room = SimpleNamespace(tell=file.tell, truncate=file.truncate, seek=file.seek, parts=iter([2, 1]))

        def write(data):  # takes two bytes, then one, and then the disk is full
            size = next(room.parts, None)
            if size is None:
                raise OSError(errno.ENOSPC, 'full')
            return file.write(data[:size])

        room.write = write
        with pytest.raises(OSError, match='full'):
            append_whole(room, b'second')
        append_whole(file, b', third')
    assert (tmp_path / 'x').read_bytes() == b'first, third'


def test_the_log_keeps_lines_with_any_file_name(tmp_path):
    handlers = [(source, source.handlers[:], source.level, source.propagate) for source in utils._LOGGERS]
    try:
        utils.setup_logging(verbose=True)
        utils.log_to_file(str(tmp_path / 'log.txt'))
        logging.getLogger('replknet').info('%s: 蜜蜂', ODD)
    finally:
        for source, earlier, level, propagate in handlers:
            source.handlers[:], source.propagate = earlier, propagate
            source.setLevel(level)
    assert (tmp_path / 'log.txt').read_text(encoding='utf-8').endswith('caf\\udce9.png: 蜜蜂\n')


def test_an_evaluation_that_ends_training_names_what_is_saved(monkeypatch):
    def broken(*_):
        raise TrainingStopped('model: the logits are not finite')

    monkeypatch.setattr(training.run, '_evaluate', broken)
    run = object.__new__(training.run._Training)
    run.config, run.models, run.val_set, run.parts = get_config(), {'model': None}, None, SimpleNamespace(amp=None)
    run.config.SAVE = 'output/RUN'
    with pytest.raises(TrainingStopped, match=r'^epoch 1: model: .* finite; the state .* is in output/RUN$'):
        run._evaluate(1)


def test_features_with_odd_names_are_readable(tmp_path):
    with results_file(str(tmp_path / 'o.csv'), 1, True) as write:
        write(Prediction(ODD, [0], ['牛'], [1.0], features=np.ones(3, 'f4')), 0)
    with np.load(tmp_path / 'o.npz') as arrays:
        assert arrays['pictures'].tolist() == [ODD]
