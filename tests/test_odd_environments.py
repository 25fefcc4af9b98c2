"""Machines without /dev/shm or with few open files, paths that cannot be used, addresses that nobody can reach."""
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import paddle
import pytest

import launcher
import paddle_env
from config import get_config
from datasets import clear_shared_memory, get_dataloader, get_dataset
from errors import REPORTED, CheckpointError, UserError, exit_status, first_to_report, why_unreadable
from image_files.decode import DataError
from loading import loader
from port_weights.safe_load import read_checkpoint
from run_folder.resume import choose_folder, read_resumed
from zoo import require_settings_file, resolve_weights

ROOT = Path(__file__).parents[1]
LONG = 'n' * 300


@pytest.fixture
def config(list_dataset):
    return get_config(opts=['DATA.DATA_PATH', str(list_dataset), 'DATA.NUM_WORKERS', 2, 'DATA.IMAGE_SIZE', 32,
                            'DATA.BATCH_SIZE_EVAL', 2, 'MODEL.NUM_CLASSES', 4])


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder without permissions, for root as well."""
    folder = tmp_path / 'closed'
    folder.mkdir()
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: str(path) != str(folder) and access(path, mode))
    return folder


@pytest.mark.parametrize(('path', 'reason'), [
    (LONG, 'File name too long'), ('file/x', 'Not a directory'), ('closed', 'Permission denied')])
def test_a_path_that_cannot_be_used_is_named_with_the_reason(tmp_path, monkeypatch, closed, path, reason):
    (tmp_path / 'file').touch()
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / path)
    for call in (lambda: choose_folder(get_config(opts=['SAVE', path])), lambda: require_settings_file(None, path),
                 lambda: resolve_weights(path)):
        with pytest.raises(UserError, match=f'{path}: cannot be (used|read): {reason}'):
            call()
    if path != str(closed):
        with pytest.raises(CheckpointError, match=f'{path}: cannot be read: {reason}'):
            read_checkpoint(path)
    else:
        with pytest.raises(UserError, match=f'{path}: cannot be read: {reason}'):
            read_resumed(path)


def test_an_image_below_a_file_is_not_called_missing(tmp_path):
    (tmp_path / 'a').touch()
    (tmp_path / 'val_list.txt').write_text('a/b.jpg 0\n')
    with pytest.raises(DataError, match=r'val_list.txt:1: .*a/b.jpg: Not a directory'):
        get_dataset(get_config(opts=['DATA.DATA_PATH', str(tmp_path)]), 'val')


def test_an_error_of_the_system_about_a_path_is_one_line_with_status_2(tmp_path, capsys):
    assert exit_status(os.mkdir, tmp_path / LONG) == 2
    assert capsys.readouterr().err == f'{tmp_path / LONG}: File name too long\n'
    assert why_unreadable(tmp_path) == '' and why_unreadable(tmp_path / 'none') == 'No such file or directory'


def test_an_error_is_reported_also_where_nobody_can_note_that_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv(REPORTED, str(tmp_path / 'reported'))
    assert [first_to_report(), first_to_report()] == [True, False]
    monkeypatch.setenv(REPORTED, str(tmp_path / 'gone/reported'))
    assert first_to_report()


def test_without_shared_memory_for_locks_processes_are_refused_in_one_line(config, tmp_path, monkeypatch):
    def fail():
        raise OSError(errno.EROFS, 'Read-only file system')

    dataset = get_dataset(config, 'val')
    monkeypatch.setattr(multiprocessing, 'Lock', fail)
    with pytest.raises(UserError, match='locks .Read-only file system.: make /dev/shm a writable tmpfs, or use -num_w'):
        get_dataloader(config, dataset, 'val')
    config.NPROCS = 2
    with pytest.raises(UserError, match='a writable tmpfs, or run main_single_gpu.py with -num_workers=0'):
        launcher.run_in_processes(config, 'cpu')
    config.DATA.NUM_WORKERS = 0
    assert len(list(get_dataloader(config, dataset, 'val'))) == 6


def test_too_few_open_files_for_the_workers_are_one_line(config, monkeypatch):
    def fail(self):
        raise OSError(errno.EMFILE, 'Too many open files')

    monkeypatch.setattr(paddle.io.DataLoader, '__iter__', fail)
    with pytest.raises(UserError, match=r'-num_workers=2: .*Too many open files.*use fewer.*ulimit -n'):
        next(iter(get_dataloader(config, get_dataset(config, 'val'), 'val')))


def test_a_worker_that_a_signal_ends_is_one_line(list_dataset):
    script = ('import os, signal, sys, datasets\n'
              'from config import get_config\n'
              'datasets.decode_image = lambda *_: os.kill(os.getpid(), signal.SIGBUS)\n'
              "config = get_config(opts=['DATA.DATA_PATH', sys.argv[1], 'DATA.NUM_WORKERS', 1])\n"
              "for _ in datasets.get_dataloader(config, datasets.get_dataset(config, 'val'), 'val'): pass\n")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script, str(list_dataset)], capture_output=True,
                          text=True, timeout=120, cwd=ROOT)
    lines = [line for line in done.stderr.splitlines() if 'WARNING' not in line]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith('a DataLoader worker exited with status -7 (is /dev/shm full?) while it read ')
    assert f'{list_dataset}/val_list.txt:1: ' in lines[0] and '; start the run again' in lines[0]


BLOCKED = """
import os, sys
import loading.loader
from config import get_config
from datasets import get_dataloader, get_dataset
loading.loader.SLOW, loading.loader.STUCK = 2, int(sys.argv[4])
config = get_config(opts=['DATA.DATA_PATH', sys.argv[1], 'DATA.NUM_WORKERS', sys.argv[3], 'DATA.IMAGE_SIZE', 32,
                          'DATA.BATCH_SIZE_EVAL', 2])
dataset = get_dataset(config, 'val')
os.remove(sys.argv[2])
os.mkfifo(sys.argv[2])  # reading it blocks, as a file system that no longer answers
for images, _ in get_dataloader(config, dataset, 'val'):
    print('batch', flush=True)
"""


def test_a_worker_that_hangs_and_then_is_killed_is_reported_with_its_image(list_dataset, tmp_path):
    folder = tmp_path / 'data'
    shutil.copytree(list_dataset, folder)
    path = folder / (folder / 'val_list.txt').read_text().splitlines()[4].rpartition(' ')[0]
    with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', BLOCKED, folder, path, '1', '99'], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            warning = process.stderr.readline()
            assert f'val_list.txt:5: {path}: a DataLoader worker has been reading this image for 2 s' in warning
            worker, = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            os.kill(int(worker), signal.SIGKILL)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    line, = errors.splitlines()
    assert process.returncode == 1 and output.count('batch') == 2
    assert line.startswith('a DataLoader worker exited with status -9 (out of memory?) while it read ')
    assert f'val_list.txt:5: {path}; ' in line


def test_without_workers_an_image_that_never_comes_is_named(list_dataset, tmp_path):
    folder = tmp_path / 'data'
    shutil.copytree(list_dataset, folder)
    path = folder / (folder / 'val_list.txt').read_text().splitlines()[4].rpartition(' ')[0]
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', BLOCKED, folder, path, '0', '3'], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    warning, end = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout.count('batch') == 2
    assert f'val_list.txt:5: {path}: this process has been reading this image for 2 s' in warning
    assert end.startswith('this process has been reading ') and f'val_list.txt:5: {path} for 3 s; start' in end


def test_a_worker_that_never_comes_back_ends_the_process(monkeypatch):
    monkeypatch.setattr(loader, 'SLOW', 1)
    monkeypatch.setattr(loader, 'STUCK', 2)
    reasons, given_up = [], threading.Event()
    monkeypatch.setattr(loader, '_give_up', lambda *parts: (reasons.append(''.join(parts)), given_up.set()))
    pipes = [os.pipe(), os.pipe()]
    workers = [types.SimpleNamespace(sentinel=end, exitcode=None) for end, _ in pipes]
    progress, dataset = loader._Progress(2), types.SimpleNamespace(name='image {}'.format)
    with progress.of(0, 3), progress.of(0, 3):  # an even number of events: it reads nothing
        with progress.of(1, 7), loader._exit_if_one_dies(workers, progress, dataset):
            assert given_up.wait(30)
    assert reasons == ['a DataLoader worker has been reading image 7 for 2 s']
    for end in sum(pipes, ()):
        os.close(end)


def test_only_old_batches_of_workers_that_are_gone_are_deleted(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    names = {f'paddle_{ended.pid}_1_23': 7200, f'paddle_{ended.pid}_2_23': 60, f'paddle_{os.getpid()}_1_23': 7200,
             f'paddle_{ended.pid}_x': 7200, f'other_{ended.pid}_1_23': 7200}
    for name, age in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, times=(time.time() - age,) * 2)
    clear_shared_memory(tmp_path)
    assert set(os.listdir(tmp_path)) == set(names) - {f'paddle_{ended.pid}_1_23'}


def test_addresses_that_other_machines_cannot_reach_are_refused():
    with pytest.raises(UserError, match='the machine of rank 1 resolves its own name to 127.0.1.1, .*/etc/hosts there'):
        launcher._check_addresses(['10.0.0.1:4', '127.0.1.1:5'])
    launcher._check_addresses(['127.0.0.1:4', '127.0.0.1:5'])  # one machine
    launcher._check_addresses(['10.0.0.1:4', '10.0.0.2:4'])


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('users', [None, '1', '3'])
def test_ranks_of_paddles_launcher_see_the_threads_that_the_user_has_set(users):
    rank = 'import paddle_env; print(paddle_env._USER_THREADS)'
    launcher_ = ('import os, subprocess, sys\n'
                 "os.environ.setdefault('OMP_NUM_THREADS', '1')\n"  # importing paddle does so
                 "os.environ['PADDLE_TRAINER_ID'] = '0'\n"
                 f'subprocess.run([sys.executable, "-c", {rank!r}])\n')
    env = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    env.update({'OMP_NUM_THREADS': users} if users else {})
    done = subprocess.run([sys.executable, '-c', launcher_, 'paddle.distributed.launch'], env=env, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == f'{users}\n', done.stderr


@pytest.mark.parametrize('users', [None, '3'])
def test_ranks_that_a_run_starts_see_the_threads_that_the_user_has_set(users, monkeypatch):
    monkeypatch.setenv('GLOG_minloglevel', '1')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setattr(paddle_env, '_USER_THREADS', users)
    paddle_env.prepare_ranks()
    assert os.environ.get('OMP_NUM_THREADS') == users
