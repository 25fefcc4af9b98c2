"""Short campaigns of faults.py, and runs with a corrupt checkpoint, a killed worker or changed settings."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import forked  # noqa: E402
from faults import CAMPAIGNS, Fleet, children, contents, wait_for_steps  # noqa: E402


@pytest.fixture(scope='module')
def fleets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fleets')
    return {processes: Fleet(folder, processes) for processes in (1, 2)}


@pytest.fixture(scope='module')
def stopped(fleets):
    """A function that kills a run of one process inside a save of its second epoch and returns its folder.

    Without arguments, the folder is a copy of one such run.
    """

    fleet = fleets[1]

    def make(folder, *flags):
        process = fleet.start(folder, *flags, DISK_FAULT='kill:106')
        assert fleet.end(process) == -9, process.errors
        assert any('epoch 2 step 5/9' in line for line in process.lines)
        return folder

    original = make(fleet.new())

    def stopped(*arguments):
        return make(*arguments) if arguments else Path(shutil.copytree(original, fleet.new()))

    return stopped


SHORT = {'kill -9, one process': 1, 'kill -9, two processes': 1, 'kill -9 inside saves': 1, 'disk errors': 3,
         'signals, one process': 1, 'signals, two processes': 1}


@pytest.mark.parametrize('name', CAMPAIGNS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(fleets, pytestconfig, name):
    function, processes, points = CAMPAIGNS[name]
    count = points if pytestconfig.getoption('--long') else SHORT[name]
    done, failures = function(fleets[processes], count, random.Random(1))
    assert done >= count and not failures, '\n'.join(failures)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(('damage', 'words'), [
    (flip, 'do not match its SHA-256'),
    pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-50]), 'truncated', marks=pytest.mark.long),
    (Path.unlink, 'no last.pdparams')])
def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_is_used(fleets, stopped, damage, words):
    folder = stopped()
    damage(folder / 'last.pdparams')
    process = fleets[1].start(folder)
    assert fleets[1].end(process) == 0, process.errors
    assert any(words in line and 'resuming from' in line for line in process.lines), process.lines
    assert fleets[1].compare(folder) == ''


def test_a_run_without_any_whole_checkpoint_is_refused_in_one_line(fleets, stopped):
    folder = stopped()
    for path in folder.glob('*.pdparams'):
        flip(path)
    process = fleets[1].start(folder)
    assert fleets[1].end(process) == 2
    assert process.errors.count('\n') == 1 and 'no intact checkpoint is left' in process.errors


def test_resume_auto_takes_the_newest_unfinished_run_of_the_same_settings(fleets, stopped):
    fleet = fleets[1]
    output = fleet.folder / 'output'  # the place of runs without -output
    stopped('', '-resume=auto')
    run, = output.iterdir()
    stopped('', '-resume=auto', '-opts', 'SEED', '7')  # with other settings, it starts another run
    other, = set(output.iterdir()) - {run}
    for _ in range(2):  # the first resumes the run; as it is then complete, the second starts a new one
        process = fleet.start('', '-resume=auto')
        assert fleet.end(process) == 0, process.errors
    third, = set(output.iterdir()) - {run, other}
    assert fleet.compare(run) == fleet.compare(third) == ''


def test_a_run_in_progress_cannot_be_resumed(fleets, stopped):
    folder = stopped()
    first = fleets[1].start(folder)
    wait_for_steps(first, 1, 0)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = fleets[1].start(folder)
        assert fleets[1].end(second) == 2
        assert second.errors.count('\n') == 1 and 'another process is already working on' in second.errors
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert fleets[1].end(first) == 0 and fleets[1].compare(folder) == ''


def test_another_number_of_processes_with_the_same_global_batch_continues_at_the_same_step(fleets, stopped):
    folder = stopped()
    command = [sys.executable, str(Path(__file__).parents[2] / 'main_multi_gpu.py'), f'-cfg={fleets[1].settings}',
               f'-data_path={fleets[1].folder}/data', f'-output={folder}', '-device=cpu', '-nprocs=2', '-accum_iter=1',
               '-num_workers=0']
    done = forked.run(command)
    assert done.returncode == 0, done.stderr
    resumed = re.search(r'resumed from \S+ 1 epochs, \d+ steps, (\d) of them in epoch 2', done.stdout)
    assert 'trained by 1 processes so far, by 2 from now on' in done.stdout
    steps = re.findall(r'epoch 2 step (\d)/8', done.stdout)  # 17 batches of 2 make 9 steps, 8 of 4 make 8
    assert steps == [str(step) for step in range(int(resumed[1]) + 1, 9)]
    assert json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])['epoch'] == 4


def test_when_a_dataloader_worker_dies_every_rank_ends(fleets):
    fleet = fleets[2]
    process = fleet.start(fleet.new(), '-num_workers=1', '-opts', 'TRAIN.NUM_EPOCHS', '1000')
    wait_for_steps(process, 3, 0)
    rank = children(process.pid)[0]
    command, commands = Path(f'/proc/{rank}/cmdline').read_bytes(), set()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:  # finished workers are not missed
        for worker in children(rank):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                commands.add(Path(f'/proc/{worker}/cmdline').read_bytes())
                os.kill(worker, signal.SIGKILL)
        time.sleep(0.05)
    assert fleet.end(process) == 1
    assert 'a DataLoader worker exited with status -9' in process.errors
    assert commands - {b''} == {command}  # forked: a worker that is started anew imports Paddle first


def test_a_second_signal_ends_the_run_at_once(fleets, stopped):
    process = fleets[1].start(stopped())
    wait_for_steps(process, 1, 0)
    for _ in range(50):  # the first one may still be waiting for the end of a step
        process.send_signal(signal.SIGTERM)
    assert fleets[1].end(process) == 143


def test_the_uninterrupted_run_leaves_the_expected_files_and_the_comparison_notices_another(fleets):
    fleet = fleets[1]
    folder = fleet.folder / 'run1'
    assert fleet.compare(folder) == ''
    (folder / '.last.pdparams.0.tmp').touch()
    assert '.last.pdparams.0.tmp' in fleet.compare(folder)
    (folder / '.last.pdparams.0.tmp').unlink()
    found, accuracy = contents(folder), {2: 0, 4: 0}
    for record in found['metrics.jsonl']:
        if 'acc1' in record:
            accuracy[record['epoch']] = max(record['acc1'], accuracy[record['epoch']])
    # of the numbered checkpoints, the latest is kept and the more accurate of the two that were evaluated
    numbered = {'epoch_0004.pdparams', 'epoch_0002.pdparams' if accuracy[2] > accuracy[4] else 'epoch_0004.pdparams'}
    assert set(found) == {'last.pdparams', 'best.pdparams', 'best_ema.pdparams', 'metrics.jsonl'} | numbered
