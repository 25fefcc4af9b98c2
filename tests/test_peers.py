"""A rank that is lost ends the others with a line that names it: real processes, without Paddle, in less time."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SILENCE = 5
HOLD = 'import ctypes; ctypes.PyDLL(None).sleep(1000)'  # in C, with Python's lock held
RANK = '''
import sys, time
from errors import UserError, exit_status
from training.peers import watched

def run(rank, code, endpoints):
    with watched(int(rank), endpoints.split(',')) as ready:
        ready('CURE')
        print('ready', flush=True)
        exec(code)

sys.exit(exit_status(run, *sys.argv[1:]))
'''


@pytest.fixture(scope='module')
def code(tmp_path_factory):
    """A copy of the code with shorter limits."""
    folder = tmp_path_factory.mktemp('code')
    (folder / 'training').mkdir()
    (folder / 'errors.py').write_text((ROOT / 'errors.py').read_text())
    text = (ROOT / 'training/peers.py').read_text()
    for old, new in (('SILENCE = 5, 60', f'SILENCE = 1, {SILENCE}'), ('START = 75', 'START = 3'),
                     ('GRACE = 5', 'GRACE = 1')):
        assert old in text
        text = text.replace(old, new)
    (folder / 'training/peers.py').write_text(text)
    (folder / 'rank.py').write_text(RANK)
    return folder


class Ranks:
    """Processes of a run, each with its code; those with None never start."""

    def __init__(self, folder, *codes):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            for free in (one, two, three):
                free.bind(('127.0.0.1', 0))
            endpoints = ','.join(f'127.0.0.1:{s.getsockname()[1]}' for s in (one, two, three)[:len(codes)])
        self.ranks = {rank: subprocess.Popen(
            [sys.executable, folder / 'rank.py', str(rank), code, endpoints], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
            for rank, code in enumerate(codes) if code is not None}

    def wait(self):
        """Waits until all stand."""
        for process in self.ranks.values():
            assert process.stdout.readline() == 'ready\n', process.communicate()[1]

    def send(self, number):
        """Sends a signal to all processes, the watchers as well."""
        for process in self.ranks.values():
            os.killpg(process.pid, number)

    def end(self):
        """{rank: (status, standard error)}"""
        ends = {}
        for rank, process in self.ranks.items():
            try:
                _, errors = process.communicate(timeout=30)  # its watcher has ended, too, as it holds the pipe
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                errors = 'hangs'
            ends[rank] = process.returncode, errors
        return ends


NAME = f'rank {{}} on {socket.gethostname()} (127.0.0.1) '
GONE = NAME + 'is gone: it was killed, or its machine or the network failed; CURE\n'
SILENT = NAME + f'has not answered for {SILENCE} s; CURE\n'
STOPPED = NAME + 'is stopped, as by SIGSTOP; CURE\n'
FAILED = NAME + 'stopped with an error, which its output shows; CURE\n'
SLEEP = 'time.sleep(1000)'


def test_every_rank_names_the_one_that_is_lost(code):
    killed = {rank: Ranks(code, SLEEP, SLEEP, SLEEP) for rank in (0, 1)}  # a member and the hub
    stopped = {rank: Ranks(code, SLEEP, SLEEP) for rank in (0, 1)}
    locked = Ranks(code, HOLD, SLEEP)
    exchanging = Ranks(code, 'time.sleep(1); raise RuntimeError("gloo: connection closed by peer")', SLEEP)
    for group in (*killed.values(), *stopped.values(), locked, exchanging):
        group.wait()
    for group, rank, number in (*((g, r, signal.SIGKILL) for r, g in killed.items()),
                                *((g, r, signal.SIGSTOP) for r, g in stopped.items()),
                                (locked, 1, signal.SIGKILL), (exchanging, 1, signal.SIGKILL)):
        group.ranks[rank].send_signal(number)
    for rank, group in killed.items():
        assert group.end() == {r: (-9, '') if r == rank else (1, GONE.format(rank)) for r in range(3)}
    for rank, group in stopped.items():  # its own watcher kills a rank that cannot end by itself
        assert group.end() == {rank: (-9, STOPPED.format(rank)), 1 - rank: (1, SILENT.format(rank))}
    assert locked.end() == {0: (-9, GONE.format(1)), 1: (-9, '')}
    assert exchanging.end() == {0: (1, GONE.format(1)), 1: (-9, '')}


def test_a_mistake_of_one_rank_and_a_rank_that_does_not_start_end_the_others(code):
    mistaken = {rank: Ranks(code, *(["raise UserError('mistake')", SLEEP][::1 - 2 * rank])) for rank in (0, 1)}
    missing = {rank: Ranks(code, *([None, SLEEP][::1 - 2 * rank])) for rank in (0, 1)}
    for rank, group in mistaken.items():
        assert group.end() == {rank: (2, 'mistake\n'), 1 - rank: (1, FAILED.format(rank))}
    for rank, group in missing.items():
        (status, errors), = group.end().values()
        assert status == 1 and errors.startswith(f'rank {rank} (127.0.0.1:') and errors.count('\n') == 1
        assert 'was not there within 3 s (FLAGS_stop_check_timeout=SECONDS allows more); start the run again' in errors


def test_ranks_that_end_in_turn_or_are_suspended_together_lose_nothing(code):
    first, last = (Ranks(code, *codes) for codes in (('time.sleep(2)', 'pass'), ('pass', 'time.sleep(2)')))
    suspended = Ranks(code, SLEEP, 'print("on", flush=True); time.sleep(SECONDS)'.replace('SECONDS', '1000'))
    suspended.wait()
    suspended.send(signal.SIGSTOP)
    assert first.end() == last.end() == {0: (0, ''), 1: (0, '')}
    time.sleep(SILENCE)
    suspended.send(signal.SIGCONT)
    time.sleep(2.5)
    assert all(process.poll() is None for process in suspended.ranks.values())
    suspended.send(signal.SIGKILL)
    suspended.end()


@pytest.mark.skipif(sys.platform != 'linux', reason='the kernel of Linux ends a process with its parent')
def test_a_process_ends_with_its_parent_or_by_a_signal_while_a_call_holds_pythons_lock():
    rank = ('import os, signal, sys; sys.path.insert(0, {root!r}); from training.signals import end_with_parent, stop\n'
            'end_with_parent({parent}); stop.listen(signal.SIGTERM, signal.SIGINT); print(os.getpid(), flush=True)\n'
            + HOLD)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, '-c', rank.format(root=str(ROOT), parent=os.getpid())],
                                   stdout=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(10) == -number
    parent = ('import os, subprocess, sys, time\n'
              'rank = sys.argv[1].replace("PARENT", str(os.getpid()))\n'
              'subprocess.Popen([sys.executable, "-c", rank]); time.sleep(1000)')
    process = subprocess.Popen([sys.executable, '-c', parent, rank.format(root=str(ROOT), parent='PARENT')],
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.3)
    process.kill()
    assert process.communicate(timeout=10)  # returns once the child has closed its end of the pipe
