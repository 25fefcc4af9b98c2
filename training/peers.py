"""Notices when another rank of a run is lost, and then ends this one with a line that says so.

Each rank has a small process beside it, its watcher. The watchers keep a TCP connection to that of rank 1, the hub, and
send a beat over it every few seconds. A rank whose process or machine is gone closes its connection or falls silent,
and the hub tells the others.

A process, because a thread cannot watch while a call holds Python's lock, as Paddle's does in which the ranks find each
other, and as any collective of any backend may. They connect first, so that a rank that fails at once is noticed, too.
Connections of its own, because the calls of Paddle's TCP store have no
time limit, and collectives notice nothing before their next call, those of NCCL not even then.

Time is counted in turns of the watcher's loop: a job that its cluster suspends as a whole has lost nothing.
"""
import contextlib
import ctypes
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time

from errors import Interrupted, TrainingStopped, UserError, first_to_report

BEAT, SILENCE = 5, 60  # seconds between two beats; without any for this long, a rank counts as lost
START = 75  # seconds that the ranks have to find each other
GRACE = 5  # seconds for a rank to end by itself after the loss of another: it may report the same mistake
HUB = 1  # Paddle's store may listen at the address of rank 0; those of the other ranks are free
ALL, OVER, LOST = b'all\n', b'over\n', b'lost\n'  # what a watcher tells its rank: all are there, and so on
_COMMUNICATION = re.compile('gloo|nccl|bkcl|xccl|tcp|socket|connection', re.IGNORECASE)


# ---- in the rank

@contextlib.contextmanager
def watched(rank, endpoints):
    """Waits for all ranks; within this block, the loss of one ends the others with status 1 and a line that names it.

    Args:
        rank: of this process.
        endpoints: 'IP:PORT' of each rank; nothing listens at that of rank 1. With less than two, nothing is watched.
    Yields:
        a function to call when the process group stands; its argument says what to do after a loss.
    Raises:
        TrainingStopped: an exchange between the ranks failed although all of them still answer.
    """
    if len(endpoints) < 2 or os.name != 'posix':
        yield lambda cure: None
        return
    seconds = int(os.environ.get('FLAGS_stop_check_timeout', START))  # Paddle's limit, too
    start = 'import sys; sys.path.insert(0, sys.argv[1]); from training.peers import main; main(sys.argv[2])'
    watcher = subprocess.Popen(
        [sys.executable, '-I', '-S', '-c', start, os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
         json.dumps([rank, endpoints, os.getpid(), seconds])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    together, over = threading.Event(), threading.Event()

    def obey():
        for word in iter(watcher.stdout.readline, b''):
            if word == LOST:
                os._exit(1)
            elif word == OVER:
                return
            together.set()
        if not over.is_set():
            if first_to_report():
                print(f'rank {rank}: the process that watches the other ranks was killed', file=sys.stderr, flush=True)
            os._exit(1)

    def tell(line):
        with contextlib.suppress(OSError):
            watcher.stdin.write(f'{line}\n'.encode())

    threading.Thread(target=obey, daemon=True).start()
    last = 'left stopped with an error, which its output shows'
    together.wait()
    try:
        with _patient_terminate():
            yield lambda cure: tell(f'ready {cure}')
        last = 'done'
    except Interrupted:
        last = 'left was stopped by a signal'
        raise
    except (UserError, FileNotFoundError, TrainingStopped):
        raise
    except Exception as error:
        if not _COMMUNICATION.search(str(error)):
            raise
        _wait_for_verdict()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TrainingStopped(f'an exchange between the ranks failed, though all answer: {lines[-1]}') from error
    finally:
        over.set()
        tell(last)
        watcher.stdin.close()
        watcher.wait()


def _wait_for_verdict():
    """Leaves the last word to the watcher, which ends this process if another rank is lost."""
    time.sleep(SILENCE + 3 * GRACE)


@contextlib.contextmanager
def _patient_terminate():
    """Makes an error of gloo inside a backward pass, which C++ cannot hand to Python, wait for the watcher as well.

    Paddle would print a dozen lines about a lost connection and abort.
    """
    try:
        set_terminate = ctypes.CDLL('libstdc++.so.6')._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):  # another C++ library
        yield
        return
    set_terminate.restype = ctypes.c_void_p
    handler = ctypes.CFUNCTYPE(None)

    def terminate():
        _wait_for_verdict()
        ctypes.cast(former, handler)()

    ours = handler(terminate)
    former = set_terminate(ours)
    try:
        yield
    finally:
        set_terminate(ctypes.c_void_p(former))


# ---- in the watcher, which is a process without Paddle

class _Link:
    """A connection to the watcher of another rank.

    Attributes:
        name: of that rank, for messages.
        silent: turns of the loop since it was last heard.
    """

    def __init__(self, connection, name):
        self.socket, self.name, self.silent, self._rest = connection, name, 0, b''
        connection.setblocking(False)

    def send(self, line):
        with contextlib.suppress(OSError):  # whoever is not there will be noticed by its silence
            self.socket.send(f'{line}\n'.encode())

    def receive(self):
        """The lines that have arrived, as (word, text); None when the connection is gone."""
        try:
            data = self.socket.recv(4096)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.silent = 0
        *lines, self._rest = (self._rest + data).split(b'\n')
        return [line.decode(errors='replace').partition(' ')[::2] for line in lines]


class Watcher:
    """Watches the hub or, in the hub, all other ranks.

    Args:
        rank: that this process belongs to.
        endpoints: 'IP:PORT' of each rank.
        owner: process id of the rank.
        start: seconds that the ranks have to find each other.
    """

    def __init__(self, rank, endpoints, owner, start):
        self.rank, self.endpoints, self.owner, self.start = rank, endpoints, owner, start
        self.watched = [r for r in range(len(endpoints)) if r != rank] if rank == HUB else [HUB]
        self.links, self.done, self.turns, self.ready = {}, set(), 0, False
        self.verdict, self.patience, self.cure = '', 0, 'start the run again'
        self.selector = selectors.DefaultSelector()
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._hear_owner)
        if rank == HUB:
            try:
                listener = socket.create_server(('', self._address(HUB)[1]), backlog=len(endpoints))
                self.selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
            except OSError as error:
                self._lose(f'{self._name(HUB)} cannot listen there: {error.strerror}')

    def run(self):
        """Watches until the rank ends or another one is lost."""
        turn = time.monotonic() + 1
        while True:
            if self.rank != HUB and not self.links and not self.verdict:
                self._connect()
            pause = turn - time.monotonic() if self.links or self.rank == HUB else 0.1
            for key, _ in self.selector.select(max(0.0, pause)):
                key.data()
            if time.monotonic() >= turn:
                self._turn()
                turn = time.monotonic() + 1

    def _address(self, rank):
        ip, port = self.endpoints[rank].split(':')
        return ip, int(port)

    def _name(self, rank):
        return f'rank {rank} ({self.endpoints[rank]})'

    def _me(self):
        return f'rank {self.rank} on {socket.gethostname()} ({self._address(self.rank)[0]})'

    def _turn(self):
        """What happens once a second."""
        self.turns += 1
        if os.getppid() != self.owner:
            sys.exit()  # the others see their connections close
        beats = self.turns % BEAT == 0 and not _is_stopped(self.owner)
        for link in list(self.links.values()):
            link.silent += 1
            if beats:
                link.send('beat')
            if link.silent > SILENCE:
                self._lose(f'{link.name} has not answered for {SILENCE} s', 0)
        # the hub speaks first, as it knows who is missing
        if not self.ready and not self.verdict and self.turns >= self.start + (0 if self.rank == HUB else GRACE):
            self._give_up_start()
        if self.verdict:
            self.patience -= 1
            if self.patience < 0:
                self._report()

    def _connect(self):
        with contextlib.suppress(OSError):
            self._add(socket.create_connection(self._address(HUB), timeout=1), HUB)
            self.links[HUB].send(f'hello {self.rank} {socket.gethostname()}')

    def _add(self, connection, rank):
        link = self.links[rank] = _Link(connection, self._name(rank))
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._hear(link, rank))

    def _accept(self, listener):
        """Accepts a connection; its first line names the rank, and whoever sends another is left out."""
        with contextlib.suppress(OSError):
            link = _Link(listener.accept()[0], '')
            self.selector.register(link.socket, selectors.EVENT_READ, lambda: self._admit(link))

    def _admit(self, link):
        lines = link.receive()
        if lines == []:
            return
        self.selector.unregister(link.socket)
        word, text = lines[0] if lines else ('', '')
        rank = text.partition(' ')[0]
        if word != 'hello' or not rank.isdigit() or int(rank) not in self.watched:
            link.socket.close()
            return
        rank = int(rank)
        self.links[rank] = link
        self.selector.register(link.socket, selectors.EVENT_READ, lambda: self._hear(link, rank))
        link.send(f'hello {HUB} {socket.gethostname()}')
        if self.verdict:
            link.send(f'lost {self.verdict}')
        self._obey(link, rank, lines)
        if len(self.links) == len(self.watched):
            self._tell_all('all')
            self._tell_owner(ALL)

    def _hear(self, link, rank):
        lines = link.receive()
        if lines is None:
            self._drop(rank)
            self._lose(f'{link.name} is gone: it was killed, or its machine or the network failed')
        else:
            self._obey(link, rank, lines)

    def _obey(self, link, rank, lines):
        for word, text in lines:
            if word == 'hello':
                host = text.partition(' ')[2]
                link.name = f'rank {rank} on {host} ({self._address(rank)[0]})'
            elif word == 'left':
                self._lose(f'{link.name} {text}')
            elif word == 'lost':
                self._lose(text)
            elif word == 'all':
                self._tell_owner(ALL)
            elif word == 'done':
                self._drop(rank)
                self.done.add(rank)
                if self.rank != HUB and not self.verdict:  # the end of the run needs no other rank
                    self._tell_owner(OVER)
                    sys.exit()
                return

    def _drop(self, rank):
        link = self.links.pop(rank, None)
        if link is not None:
            self.selector.unregister(link.socket)
            link.socket.close()

    def _hear_owner(self):
        data = os.read(sys.stdin.fileno(), 4096)
        if not data:
            self.selector.unregister(sys.stdin.fileno())
        for line in data.decode(errors='replace').splitlines():
            word, _, text = line.partition(' ')
            if word == 'ready':
                self.ready, self.cure = True, text
            elif word in ('done', 'left'):
                self._tell_all(f'lost {self._me()} {text}' if word == 'left' and self.rank == HUB else line)
                sys.exit()

    @staticmethod
    def _tell_owner(word):
        with contextlib.suppress(OSError):  # it has just ended
            os.write(sys.stdout.fileno(), word)

    def _tell_all(self, line):
        for link in self.links.values():
            link.send(line)
            link.receive()  # a socket that is closed with data unread may lose what it has just sent

    def _lose(self, verdict, patience=GRACE):
        if not self.verdict:
            if _is_stopped(self.owner):  # the others have given up this one
                verdict = f'{self._me()} is stopped, as by SIGSTOP'
            self.verdict, self.patience = verdict, patience
            if self.rank == HUB:
                self._tell_all(f'lost {verdict}')

    def _give_up_start(self):
        missing = [self._name(rank) for rank in self.watched if rank not in self.links and rank not in self.done]
        who = ', '.join(missing[:8]) if missing else 'the ranks'
        what = 'was not there' if missing else 'did not find each other'
        self._lose(f'{who} {what} within {self.start} s (FLAGS_stop_check_timeout=SECONDS allows more)', 0)

    def _report(self):
        """Reports the loss and ends the rank."""
        if first_to_report():
            os.write(2, f'{self.verdict}; {self.cure}\n'.encode())
        self._tell_owner(LOST)
        time.sleep(3)
        if os.getppid() == self.owner:  # it hangs in a call that holds Python's lock
            os.kill(self.owner, signal.SIGKILL)
        os._exit(0)


def _is_stopped(pid):
    """Whether a process is stopped, as by SIGSTOP; False where /proc does not tell."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] in ('T', 't')
    except (OSError, IndexError):
        return False


def main(settings):
    """Runs the watcher of `watched`; the rank ends it, whatever signals a terminal or a cluster sends to all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Watcher(*json.loads(settings)).run()
