"""Starts commands of the project in copies of one process that has imported Paddle, which takes 3 s of CPU time.

`Popen` and `run` are used like those of `subprocess`, for `[sys.executable, script, ...]` and `[sys.executable, '-c',
code, ...]`. A server process imports Paddle and nothing of the project. For every command it is forked; the copy takes
over the arguments, the environment, the working directory and the standard streams, and then runs the script as
`__main__` up to the usual end of an interpreter. The ranks that it starts with multiprocessing's `spawn` are new
processes. The command is a child of the process that asked for it and has its own process id, so signals,
timeouts and exit statuses are those of a real process.

Copying is safe because the server has one thread and has computed nothing: no OpenMP or MKL pool exists yet. What a
copy cannot show is a mistake before or during the import of Paddle. An environment that differs in a variable which
libraries read when they are loaded (`LOADED`) therefore gets a real process, as does everything on systems other than
Linux, with --long and with TESTS_REAL_PROCESSES=1; tests of the start itself use `subprocess`.
"""
import ctypes
import gc
import io
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADED = ('CUDA_', 'FLAGS_', 'GLIBC_', 'GLOG_', 'KMP_', 'LANG', 'LC_', 'LD_', 'MALLOC_', 'MKL_', 'OMP_', 'OPENBLAS_',
          'PYTHON')
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36  # of <linux/prctl.h>
REAL = 'TESTS_REAL_PROCESSES'


def _read_when_loaded(environment):
    return {key: value for key, value in environment.items() if key.startswith(LOADED) and key != 'PYTHONPATH'}


class Server:
    """A process that waits at the other end of `connection`, a SOCK_SEQPACKET socket, and forks itself on request."""

    def __init__(self, connection):
        self._connection, self._lock = connection, threading.Lock()

    def fork(self, fds, **request):
        """Forks the server.

        Args:
            fds: {file descriptor in the copy: open file descriptor of this process}.
            request: what `_become` gets.
        Returns:
            the process id of the copy, which is a child of this process.
        """
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(PR_SET_CHILD_SUBREAPER, 1)  # the server forks twice; the orphan becomes our child
            try:
                message = json.dumps({'fds': list(fds), **request}).encode()
                socket.send_fds(self._connection, [message], list(fds.values()))
                return int(self._connection.recv(100))
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0)


def _serve(connection):
    """Forks for every request until the other end is closed; returns in the copies, with the request and its files."""
    while True:
        message, fds, *_ = socket.recv_fds(connection, 2**20, 16)
        if not message:
            os._exit(0)
        answer, ours = os.pipe()
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            copy = os.fork()
            if copy:
                os.write(ours, str(copy).encode())
                os._exit(0)
            os.close(answer)
            os.close(ours)
            connection.close()
            while os.getppid() == middle:  # until this process is a child of the one that asked
                time.sleep(0.001)
            request = json.loads(message)
            return request, dict(zip(request.pop('fds'), fds))
        os.close(ours)
        os.waitpid(middle, 0)
        connection.send(os.read(answer, 100))
        for fd in (answer, *fds):
            os.close(fd)


def _become(fds, args, env, cwd, new_session):
    """Turns a copy of the server into the process that was asked for, except for running its script."""
    import numpy
    ctypes.CDLL(None).prctl(PR_SET_NAME, b'python', 0, 0, 0)
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    held = [os.dup(fd) if fd in fds else fd for fd in fds.values()]  # none of them is overwritten below
    for target, fd in zip(fds, held):
        os.dup2(fd, target)
    for fd in {*fds.values(), *held} - set(fds):
        os.close(fd)
    for fd, name in enumerate(('stdin', 'stdout', 'stderr')):  # that of the server remembers what its file can do
        old = getattr(sys, name)
        file = open(fd, old.mode + 'b', buffering=0 if fd and old.write_through else -1, closefd=False)
        new = io.TextIOWrapper(file, old.encoding, old.errors, None, old.line_buffering, old.write_through)
        new.mode = old.mode
        setattr(sys, name, new)
        setattr(sys, f'__{name}__', new)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    numpy.random.seed()
    script = args[0]
    sys.argv = args
    sys.path[0] = '' if script == '-c' else os.path.dirname(script)
    folders = [folder for folder in env.get('PYTHONPATH', '').split(os.pathsep) if folder]
    sys.path[1:1] = folders
    for folder in folders:
        path = f'{folder}/sitecustomize.py'
        if os.path.exists(path) and getattr(sys.modules.get('sitecustomize'), '__file__', '') != path:
            sys.modules.pop('sitecustomize', None)
            import sitecustomize  # noqa: F401
    # paddle_env reads the environment, which is now that of the command, and whether paddle was there before it
    paddle = sys.modules.pop('paddle')
    sys.modules.pop('paddle_env', None)
    sys.path.insert(0, str(ROOT))
    import paddle_env  # noqa: F401
    del sys.path[0]
    sys.modules['paddle'] = paddle


def _run(args):
    """Runs the script or the code of a command in this process."""
    if args[0] != '-c':
        runpy.run_path(args[0], run_name='__main__')
    else:
        code = args.pop(1)
        exec(compile(code, '<string>', 'exec'), sys.modules['__main__'].__dict__)


def main():
    """The server: imports what takes long, and runs a command in every copy of itself."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path.insert(0, str(ROOT))
    import paddle_env  # noqa: F401, I001
    import paddle  # noqa: F401
    import PIL.Image  # noqa: F401
    import tqdm  # noqa: F401
    import yaml  # noqa: F401
    del sys.path[0]
    gc.freeze()  # the copies neither look for cycles in what they share, which would copy it, nor free it at their end
    assert len(os.listdir('/proc/self/task')) == 1, 'importing Paddle has started threads: forking is not safe'
    request, fds = _serve(connection)
    _become(fds, **request)
    _run(request['args'])


_server = _server_environment = None
_starting = threading.Lock()


def _server_for(environment):
    """The server, started at the first call; None if a command with this environment needs a real process."""
    global _server, _server_environment
    if not sys.platform.startswith('linux') or os.environ.get(REAL):
        return None
    with _starting:
        if _server is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            _server_environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
            subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                             env=_server_environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            theirs.close()
            _server = Server(ours)
    return _server if _read_when_loaded(environment) == _read_when_loaded(_server_environment) else None


class _Forked(subprocess.Popen):
    def __init__(self, server, args, start_new_session=False, **options):
        self._server, self._new_session = server, start_new_session
        super().__init__(args, **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest):
        assert args[0] == sys.executable and not (preexec_fn or pass_fds or shell)
        given = {0: p2cread, 1: c2pwrite, 2: errwrite}
        self.pid = self._server.fork({fd: given[fd] if given[fd] >= 0 else fd for fd in given},
                                     args=[os.fspath(arg) for arg in args[1:]], env=env,
                                     cwd=os.path.abspath(cwd or '.'), new_session=self._new_session)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def Popen(args, env=None, **options):
    """Like `subprocess.Popen`, for Python programs; SIGINT is not ignored even if this process ignores it."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'} if env is None else {key: os.fspath(env[key]) for key in env}
    server = _server_for(env)
    if server:
        return _Forked(server, args, env=env, **options)
    return subprocess.Popen(args, env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def run(args, timeout=300, **options):
    """Runs a Python program with its output captured as text; returns a `subprocess.CompletedProcess`."""
    with Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
               **options) as process:
        try:
            output = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def children(pid):
    """Process ids of the ranks or the DataLoader workers that a process has started, real or copied."""
    command = ['ps', '-ww', '-o', 'pid=,comm=,args=', '--ppid', str(pid)]
    return [int(line.split()[0]) for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
            if not any(name in line for name in ('resource_tracker', 'training.peers'))]


if __name__ == '__main__':
    main()
