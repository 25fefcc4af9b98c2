"""What the benchmarks share: one process per system, driven in turn, and the files of results.

Each system under test lives in a process of its own, so that the OpenMP and thread pools of two frameworks never meet.
The processes are asked for some calls in turn, round after round, so that a machine that slows down for a while slows
all systems alike; whoever is not asked is stopped, because idle worker threads of most runtimes spin.
"""
import contextlib
import csv
import datetime
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(FOLDER)
sys.path.insert(0, ROOT)

from errors import ArgumentParser, UserError  # noqa: E402, F401

BOUND = {'OMP_PROC_BIND': 'true', 'OMP_PLACES': 'cores'}
# Paddle's MKL computes on one thread where OMP_PROC_BIND is set, so its OpenMP is told in its own way.
BOUND_PADDLE = {'KMP_AFFINITY': 'granularity=fine,compact'}
STOCK_PADDLE = {'MKL_DEBUG_CPU_TYPE': '', 'GLIBC_TUNABLES': ''}  # set, so paddle_env leaves both; empty: defaults
SLOW = 0.5  # seconds; a call this long needs no untimed call before it in every round


# ---- the parent

class SystemFailed(RuntimeError):
    """A system cannot do what it was asked; the text says why."""


class System:
    """A process that runs `serve` for one system.

    Args:
        name: of the system.
        command: arguments of the Python script.
        threads: for its computations.
        environment: variables to set.
    """

    def __init__(self, name, command, threads, environment):
        self.name = name
        inherited = {k: v for k, v in os.environ.items() if k not in {**BOUND, **BOUND_PADDLE}}
        env = {**inherited, 'OMP_NUM_THREADS': str(threads), 'CUDA_VISIBLE_DEVICES': '', **environment}
        self._errors = tempfile.TemporaryFile()
        # A process group of its own: when the parent dies, the kernel wakes and ends its stopped members.
        self._process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._errors, text=True, preexec_fn=os.setpgrp, env=env)

    def ask(self, **request):
        """Sends a request and returns the answer.

        Raises:
            SystemFailed: with the reason.
        """
        try:
            os.kill(self._process.pid, signal.SIGCONT)
            self._process.stdin.write(json.dumps(request) + '\n')
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            os.kill(self._process.pid, signal.SIGSTOP)
        except OSError:
            line = ''
        if not line:
            raise SystemFailed(f'its process ended: {self._last_words()}')
        answer = json.loads(line)
        if 'failed' in answer:
            raise SystemFailed(answer['failed'])
        return answer

    def close(self):
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _last_words(self):
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors='replace').strip().splitlines()
        return f'status {status}' + (f', {lines[-1]}' if lines else '')


def measure(jobs, rounds, budget, patience, visit=0.1, alike=True):
    """Times jobs in interleaved rounds.

    Args:
        jobs: {name: (System, case)}; the case is for the process's `setup`.
        rounds: how often each process is asked.
        budget: seconds that a job may take; a slow one is asked less often, but at least twice.
        patience: seconds to wait, in all, for moments when other processes leave the cores alone.
        visit: seconds of calls each time, if a call is shorter.
        alike: all must have the same results; one that differs from the first is left out.

    Returns:
        ({name: milliseconds of all timed calls}, {name: what else it answered}, {name: why it failed}).
    """
    answers, failed, times = {}, {}, {}
    for name, (system, case) in jobs.items():
        try:
            answers[name] = system.ask(setup=case)
            times[name] = []
        except SystemFailed as error:
            failed[name] = str(error)
    for name in disagreement(answers) if alike else ():
        failed[name] = f'its results differ from those of {next(iter(answers))}'
        del times[name]
    for index in range(rounds):
        for name in list(times):
            seconds = answers[name]['seconds']
            visits = min(rounds, max(2, int(budget / max(seconds * (1 if seconds > SLOW else 2), visit))))
            if (index + 1) * visits // rounds == index * visits // rounds:
                continue
            calls = max(1, min(100, int(visit / seconds)))
            patience -= wait_for_quiet(patience)
            try:
                answer = jobs[name][0].ask(calls=calls, warm_up=seconds < SLOW)
                times[name] += answer.pop('ms')
                answers[name].update(answer)
            except SystemFailed as error:
                failed[name] = str(error)
                del times[name]
    return times, answers, failed


def disagreement(answers, tolerance=2e-3):
    """Names of the systems whose results are not those of the first one, within a share of the largest value."""
    samples = {name: answer['sample'] for name, answer in answers.items() if answer['sample']}
    wrong = []
    for name, sample in samples.items():
        for mine, reference in zip(sample, next(iter(samples.values()))):
            largest = max(map(abs, reference))
            if not all(abs(a - b) <= tolerance * largest for a, b in zip(mine, reference)):
                wrong.append(name)
                break
    return wrong


def summary(times):
    """Median and minimum of a list of milliseconds, and how many they are."""
    return {'median_ms': round(statistics.median(times), 4), 'min_ms': round(min(times), 4), 'calls': len(times)}


class Load:
    """Share of the machine's cores that other processes used since this was made."""

    def __init__(self):
        self._start = self._read()

    def others(self):
        """Between 0 and 1, or None where the kernel does not tell. Processes still running count as others."""
        if self._start is None:
            return None
        total, busy, own = (b - a for a, b in zip(self._start, self._read()))
        return max(0.0, busy - own) / max(total, 1e-9)

    @staticmethod
    def _read():
        try:
            with open('/proc/stat') as file:
                ticks = [int(v) for v in file.readline().split()[1:9]]
        except OSError:
            return None
        own = sum(os.times()[:4]) * os.sysconf('SC_CLK_TCK')
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own


def wait_for_quiet(patience):
    """Waits, at most `patience` seconds, until the machine is idle; returns how long it was not."""
    waited = 0.0
    while waited < patience:
        load, pause = Load(), 0.05
        time.sleep(pause)
        if (load.others() or 0) < 0.15:
            break
        waited += pause
    return waited


def describe_run(threads):
    """What a result depends on, as {name: text}."""
    cpu = {}
    with contextlib.suppress(OSError), open('/proc/cpuinfo') as file:
        for line in file:
            name, _, text = line.partition(':')
            cpu.setdefault(name.strip(), text.strip())
    model = [f'{name} {cpu[name]}' for name in ('model name', 'cpu family', 'model') if name in cpu]
    commit = 'unknown'
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = subprocess.check_output(['git', '-C', ROOT, 'describe', '--always', '--dirty', '--exclude=*'],
                                         text=True, stderr=subprocess.DEVNULL).strip()
    return {'command': ' '.join(['python', *sys.argv]), 'date': datetime.date.today().isoformat(), 'commit': commit,
            'machine': ', '.join([platform.machine(), *model]), 'cores': str(os.cpu_count()),
            'threads': f'{threads}, bound to cores', 'python': platform.python_version()}


def describe_load(load):
    """What else the machine did meanwhile, as {name: text}."""
    others = load.others()
    return {} if others is None else {'load': f'other processes used {others:.0%} of the cores during the run'}


def choose(flag, text, known):
    """The names of a comma-separated flag.

    Raises:
        UserError: one that is not known.
    """
    names = [name.strip() for name in text.split(',')]
    for name in names:
        if name not in known:
            raise UserError(f'-{flag}={text}: "{name}" is none of {", ".join(known)}')
    return names


def openvino_settings(case):
    """Settings of OpenVINO's CPU device for float32 and the case's threads."""
    return {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': case['threads'], 'PERFORMANCE_HINT': 'LATENCY'}


def write_csv(path, header, rows):
    """Rows of equal keys as CSV, after a line `# name: text` for each entry of the header."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as file:
        for name, text in header.items():
            file.write(f'# {name}: {text}\n')
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """Header and rows, all text, of a file that `write_csv` wrote.

    Raises:
        UserError: it is no such file.
    """
    with open(path, newline='', encoding='utf-8') as file:
        lines = file.readlines()
    header = dict(line[2:].rstrip('\n').partition(': ')[::2] for line in lines if line.startswith('# '))
    rows = list(csv.DictReader(line for line in lines if not line.startswith('# ')))
    if not rows or 'median_ms' not in rows[0]:
        raise UserError(f'{path} holds no results of bench_dwconv.py or bench_model.py')
    return header, rows


def table(columns, rows):
    """A Markdown table."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    return ''.join('| ' + ' | '.join(str(v).ljust(width) for v, width in zip(row, widths)) + ' |\n'
                   for row in [columns, ['-' * width for width in widths], *rows])


def exit_status(function):
    """Calls `function`; a mistake of the user's becomes one line on standard error and status 2."""
    try:
        function()
        return 0
    except (UserError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


# ---- the child

def serve(make):
    """Answers the requests of a `System` on standard input until it ends.

    Args:
        make: called with a case; returns the function to time, which returns a list of arrays that all systems must
            agree on, and what else to answer.
    """
    channel = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is not an answer
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if 'setup' in request:
                run = None  # frees the last case
                run, answer = make(request['setup'])
                seconds, results = timed(run)
                answer['sample'] = [sample(np.asarray(array)) for array in results]
                answer['seconds'] = seconds if seconds > SLOW else timed(run)[0]
            else:
                if request['warm_up']:
                    run()
                answer = {'ms': [timed(run)[0] * 1000 for _ in range(request['calls'])], 'peak_mb': peak_memory()}
        except Exception as error:
            text = str(error).strip().splitlines() or ['']
            answer = {'failed': f'{type(error).__name__}: {text[-1]}'}
        channel.write(json.dumps(answer) + '\n')
        channel.flush()


def timed(run):
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def peak_memory():
    """Largest resident size of this process in MB (10^6 bytes), or None where the kernel does not tell."""
    try:
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) * 1.024e-3 for line in file if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        return None


def forget_peak_memory():
    """`peak_memory` counts from here on, where the kernel allows it."""
    gc.collect()
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')


def sample(array, count=64):
    """Some values of an array, evenly spread."""
    flat = array.reshape(-1)
    return [float(v) for v in flat[::max(1, flat.size // count)][:count]]


def import_paddle(threads):
    """Paddle as the project's scripts set it up, with this many threads."""
    import paddle_env  # before paddle

    import paddle  # isort: skip
    paddle_env.set_threads(threads=threads)
    return paddle
