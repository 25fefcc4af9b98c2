"""forked.py: a copy of the server is in the state of a process that was started anew."""
import functools
import json
import os
import signal
import subprocess
import sys

import forked
import pytest

STATE = '''
import json, os, signal, sys
print(json.dumps({
    'arguments': sys.argv, 'path': sys.path, 'folder': os.getcwd(), 'environment': dict(os.environ),
    'input': sys.stdin.read(), 'output': [sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering],
    'errors': [sys.stderr.encoding, sys.stderr.errors, sys.stderr.line_buffering], 'parent': os.getppid(),
    'files': sorted(os.listdir('/proc/self/fd')), 'threads': len(os.listdir('/proc/self/task')),
    'signals': [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP)],
    'blocked': len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), 'session': os.getsid(0) == os.getpid(),
    'name': __name__}))
print('error', file=sys.stderr)
sys.exit(3)
'''
pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux') or forked.REAL in os.environ,
                                reason='all processes are real')


def test_a_copy_is_in_the_state_of_a_new_process(tmp_path):
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules/sitecustomize.py').write_text('import os\nos.environ["SITE"] = "customized"\n')
    (tmp_path / 'script.py').write_text(STATE)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{tmp_path}/modules', 'ODD': os.fsdecode(b'caf\xe9')}
    for command in ([str(tmp_path / 'script.py'), 'a b', 'ü'], ['-c', STATE, 'x']):
        states = []
        # a shell that starts the tests in the background ignores SIGINT, and so would the new process
        new = functools.partial(subprocess.Popen, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        for start in (forked.Popen, new):
            process = start([sys.executable, *command], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, errors) == (3, 'error\n'), errors
            states.append(json.loads(output))
        assert isinstance(process, subprocess.Popen) and states[0] == states[1]
        assert states[0]['parent'] == os.getpid() and states[0]['environment']['SITE'] == 'customized'


def test_signals_and_tracebacks_are_those_of_a_process():
    process = forked.Popen([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(100)'],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert type(process) is not subprocess.Popen and process.stdout.readline() == '1\n'
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.communicate()
    done = forked.run([sys.executable, '-c', 'import numpy; 1 / 0'])
    assert done.returncode == 1 and done.stderr.endswith('ZeroDivisionError: division by zero\n')


def test_what_libraries_read_when_they_are_loaded_needs_a_real_process():
    for name in ('FLAGS_check_nan_inf', 'PYTHONIOENCODING', 'OMP_NUM_THREADS'):
        with forked.Popen([sys.executable, '-c', ''], env={**os.environ, name: '2'}) as process:
            assert type(process) is subprocess.Popen
