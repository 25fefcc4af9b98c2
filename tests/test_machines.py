"""Processes on several machines: differing settings, data or code are refused on all of them."""
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import forked
import pytest

from config import get_config
from errors import UserError
from large_kernel import build
from port_weights.safe_load import read_checkpoint
from tests.test_large_kernel_build import COMPILER
from training import agreement, amp

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Store:
    """A store that all ranks share, like Paddle's TCP store: `get` waits for the value."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def set(self, key, value):
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def add(self, key, amount):
        with self._changed:
            self._values[key] = self._values.get(key, 0) + amount
            return self._values[key]

    def get(self, key):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, timeout=20)
            return self._values[key]


class CallsOfARank:
    """A count of calls for each rank, since the ranks are threads here."""

    def __init__(self, local):
        self._local = local

    def __next__(self):
        self._local.calls = getattr(self._local, 'calls', -1) + 1
        return self._local.calls


@pytest.fixture
def together(monkeypatch):
    """Calls a function once per rank at the same time; returns the results or errors in the order of the ranks."""
    local, store = threading.local(), Store()
    monkeypatch.setattr(agreement.utils, 'rank', lambda: local.rank)
    monkeypatch.setattr(agreement, 'create_or_get_global_tcp_store', lambda: store)
    monkeypatch.setattr(agreement, '_calls', CallsOfARank(local))
    monkeypatch.setattr(agreement.socket, 'gethostname', lambda: 'ab'[local.rank // 2])

    def call(*functions):
        monkeypatch.setattr(agreement.utils, 'world_size', lambda: len(functions))
        results = [None] * len(functions)

        def target(rank):
            local.rank = rank
            try:
                results[rank] = functions[rank]()
            except UserError as error:
                results[rank] = error
        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
    return call


def agreed(together, *processes):
    return together(*(lambda p=p: agreement.agree(p.get('facts', {}), p.get('problem'))
                      for p in processes))


def test_a_difference_is_refused_on_all_ranks_with_rank_host_and_key(together):
    same = {'facts': {'SEED': '1', 'TRAIN.BASE_LR': '0.1'}}
    results = agreed(together, same, same, {'facts': {'SEED': '1', 'TRAIN.BASE_LR': '0.2'}}, same)
    assert {str(result) for result in results} == {
        'rank 2 on b differs from rank 0 on a: TRAIN.BASE_LR is 0.2, not 0.1; '
        'start all machines with the same command, settings, data and code'}


def test_many_differences_are_counted(together):
    results = agreed(together, *({'facts': {f'K{i}': str(i * rank) for i in range(9)}} for rank in (1, 2)))
    assert all(str(result).count(', not ') == 4 and 'and 4 more;' in str(result) for result in results)


def test_a_problem_of_one_rank_ends_all_of_them(together):
    results = agreed(together, {}, {'problem': 'x_list.txt: no such list file'}, {})
    assert [str(result) for result in results] == ['rank 1 on a: x_list.txt: no such list file',
                                                   'x_list.txt: no such list file',
                                                   'rank 1 on a: x_list.txt: no such list file']


def test_processors_that_would_multiply_differently_are_refused(together, monkeypatch):
    def facts(fastest, *opts):
        monkeypatch.setattr(amp, 'fastest_precision', lambda: fastest)
        return {'facts': amp.Amp(get_config(None, opts), 'cpu').facts()}
    if build.reason_unavailable() is None:
        results = agreed(together, facts('bf16', 'AMP', True), facts('fp32', 'AMP', True))
        assert all('the precision of 1x1 convolutions (the same everywhere with AMP_DTYPE bfloat16) is float32, '
                   'not bfloat16;' in str(result) for result in results)
    asked = ['AMP', True, 'AMP_DTYPE', 'bfloat16']
    for opts in (), asked:
        assert agreed(together, facts('bf16', *opts), facts('fp32', *opts))[1]['problem'] is None


@pytest.mark.parametrize(('opts', 'refused'), [
    (['DATA.BATCH_SIZE', 8], True), (['SEED', 3], True), (['TRAIN.NUM_EPOCHS', 30], True),
    (['MODEL.LAYERS', [2, 2, 2, 2]], True), (['AMP', True], True),
    (['DATA.DATA_PATH', '/elsewhere', 'DATA.NUM_WORKERS', 1, 'MODEL.PRETRAINED', 'w'], False)])
def test_all_settings_must_agree_except_those_of_a_machine(together, opts, refused):
    def settings(*opts):
        config = get_config(None, opts)
        config.freeze()
        return lambda: agreement.agree_on_settings(config, 'cpu')
    results = together(settings('SAVE', 'output/x', 'MODEL.RESUME', 'output/x'), settings(*opts))
    if refused:
        assert all(f'rank 1 on a differs from rank 0 on a: {opts[0]} is {opts[1]!r}, not ' in str(r) for r in results)
    else:  # the folders are those that rank 0 has chosen, the other settings each process's own
        assert [(r.SAVE, r.MODEL.RESUME) for r in results] == [('output/x', 'output/x')] * 2
        assert results[1].DATA.DATA_PATH == '/elsewhere'


def test_the_digest_of_the_code_depends_on_the_sources(monkeypatch, tmp_path):
    before = agreement._code_digest()
    assert before == agreement._code_digest()
    (tmp_path / 'extra.py').write_text('value = 1\n')
    monkeypatch.setattr(agreement, 'ROOT', tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    empty = agreement._code_digest()
    import extra  # noqa: F401
    assert before != empty != agreement._code_digest()
    del sys.modules['extra']


def test_one_process_measures_and_the_others_take_its_result(together):
    measured = []

    def measure(rank):
        def times():
            measured.append(rank)
            time.sleep(0.1)
            return {'fft': float(rank), 'native': 1.5}  # rank 2 would choose another implementation than rank 1
        return lambda: agreement.first_measures('key', times)

    results = together(*map(measure, range(4)))
    assert len(measured) == 1 and results == [{'fft': float(measured[0]), 'native': 1.5}] * 4
    assert together(lambda: agreement.first_measures('another', lambda: 7)) == [7]  # needed by one process only


@pytest.mark.parametrize('error', [RuntimeError('out of memory'), UserError('stopped')])
def test_a_measurement_that_fails_fails_in_all_processes(together, error):
    def fail():
        time.sleep(0.1)
        raise error

    def outcome():
        try:
            return agreement.first_measures('key', fail)
        except RuntimeError as caught:
            return caught

    results = {str(result) for result in together(outcome, outcome)}
    assert results == ({'out of memory'} if isinstance(error, RuntimeError) else {
        'stopped', 'the process that was to measure the convolutions has ended'})


# ---- real processes: each of two ranks has its own command line and data, as on two machines

def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def run_ranks(*arguments, cwd):
    """Runs main_multi_gpu.py once per rank, as Paddle's launcher does; returns [(status, stdout, stderr)]."""
    master, *ports = free_ports(1 + len(arguments))
    endpoints = [f'127.0.0.1:{port}' for port in ports]
    processes = [forked.Popen(
        [sys.executable, f'{ROOT}/main_multi_gpu.py', '-device=cpu', *map(str, flags)], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={
            **os.environ, 'OMP_NUM_THREADS': '1', 'PADDLE_TRAINER_ID': str(rank), 'PADDLE_LOCAL_SIZE': '1',
            'PADDLE_TRAINERS_NUM': str(len(arguments)), 'PADDLE_TRAINER_ENDPOINTS': ','.join(endpoints),
            'PADDLE_CURRENT_ENDPOINT': endpoints[rank], 'PADDLE_MASTER': f'127.0.0.1:{master}'})
        for rank, flags in enumerate(arguments)]
    try:
        return [(process.returncode, *output) for process, output in
                [(process, process.communicate(timeout=120)) for process in processes]]
    finally:
        for process in processes:
            process.kill()


SLOW_END = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* This library is loaded before all others, so its destructor runs after all of theirs. */
__attribute__((destructor)) static void wait_after_all_destructors(void) {
    const char *rank = getenv("PADDLE_TRAINER_ID");
    if (rank && getppid() == atoi(getenv("TESTS_PARENT")))
        sleep(strcmp(rank, "0") ? 1 : 3);
}
"""


@pytest.mark.skipif(COMPILER is None or sys.platform != 'linux', reason='needs a C++ compiler, and LD_PRELOAD')
def test_rank_0_ends_well_after_the_others(list_dataset, random_run, tmp_path, monkeypatch):
    """The thread of Paddle that serves the other ranks must not use what is destroyed at the end of its process."""
    source, library = tmp_path / 'slow.cc', tmp_path / 'slow.so'
    source.write_text(SLOW_END)
    subprocess.run([*COMPILER.split(), '-shared', '-fPIC', '-o', library, source], check=True)
    monkeypatch.setenv('LD_PRELOAD', str(library))
    monkeypatch.setenv('TESTS_PARENT', str(os.getpid()))  # not in the processes that the ranks start
    flags = [f'-data_path={list_dataset}', '-eval', f'-pretrained={random_run}/best.pdparams']
    outcomes = run_ranks(flags, flags, cwd=tmp_path)
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes


def shuffled_copy(dataset, folder):
    folder.mkdir()
    lines = (dataset / 'train_list.txt').read_text().splitlines()
    (folder / 'train_list.txt').write_text('\n'.join(lines[::-1]) + '\n')
    (folder / 'val_list.txt').write_bytes((dataset / 'val_list.txt').read_bytes())
    for name in ('train', 'val'):
        (folder / name).symlink_to(dataset / name)
    return folder


def test_a_machine_with_another_learning_rate_is_refused(list_dataset, tiny_yaml, tmp_path):
    common = [f'-cfg={tiny_yaml}', f'-data_path={list_dataset}']
    outcomes = run_ranks(common, [*common, '-opts', 'TRAIN.BASE_LR', '0.5'], cwd=tmp_path)
    for status, _, errors in outcomes:
        assert status == 2 and errors.count('\n') == 1, errors
        assert re.search(r'rank 1 on \S+ differs from rank 0 on \S+: TRAIN.BASE_LR is 0.5, not 0.01', errors)
    assert os.listdir(tmp_path / 'output') == []  # the folder that rank 0 had chosen is gone


def test_a_machine_with_a_shuffled_list_is_refused(list_dataset, tiny_yaml, tmp_path):
    outcomes = run_ranks(*([f'-cfg={tiny_yaml}', f'-data_path={folder}'] for folder in (
        list_dataset, shuffled_copy(list_dataset, tmp_path / 'copy'))), cwd=tmp_path)
    for status, _, errors in outcomes:
        assert status == 2 and errors.count('\n') == 1, errors
        assert re.search(r'rank 1 on \S+ differs .* train_list.txt is 13 entries, digest \w+, not 13 entries', errors)


def test_processes_make_the_same_choices_and_a_resumed_run_repeats_them(list_dataset, tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', '/no/compiler')  # so that convolutions are measured, as on GPUs
    monkeypatch.setenv('LARGE_KERNEL_CACHE_DIR', str(tmp_path / 'cache'))
    flags = [f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-output=run', '-opts', 'SAVE_FREQ', '1',
             'MODEL.RECOMPUTE', 'True']
    outcomes = run_ranks(flags, flags, cwd=tmp_path)
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    run, log = tmp_path / 'run', outcomes[0][1]
    first = read_checkpoint(run / 'epoch_0001.pdparams')
    assert first['convolutions'] and log.count('training on cpu (') == len(first['convolutions']) - log.count(
        'inference on cpu (')
    last = read_checkpoint(run / 'last.pdparams')
    os.replace(run / 'epoch_0001.pdparams', run / 'last.pdparams')  # makes it an unfinished run
    outcomes = run_ranks(flags, flags, cwd=tmp_path)
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    assert 'training on cpu (' not in outcomes[0][1]
    again = read_checkpoint(run / 'last.pdparams')
    assert again['convolutions'] == last['convolutions']
    assert all((again['model'][name] == array).all() for name, array in last['model'].items())


def test_all_ranks_resume_the_run_that_rank_0_chooses(list_dataset, tiny_yaml, tmp_path):
    flags = [f'-cfg={tiny_yaml}', f'-data_path={list_dataset}', '-resume=auto', '-opts', 'SAVE_FREQ', '1']
    outcomes = run_ranks(flags, flags, cwd=tmp_path)
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    run, = (tmp_path / 'output').iterdir()
    os.replace(run / 'epoch_0001.pdparams', run / 'last.pdparams')  # makes it an unfinished run
    outcomes = run_ranks(flags, flags, cwd=tmp_path)
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    assert list((tmp_path / 'output').iterdir()) == [run]
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert [r['epoch'] for r in records if r['event'] == 'train'] == [1, 2]
