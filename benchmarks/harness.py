"""Shared code of the benchmarks: interleaved timing of several systems, one process each, and the files of results.

Each system under test runs in its own process, so that the thread pools of two frameworks never interfere. The
processes make a few calls in turn, round after round, so that a temporary slowdown of the machine affects all systems
alike. A process is stopped (SIGSTOP) between its turns, because idle worker threads of most runtimes spin.
"""
import contextlib
import csv
import datetime
import gc
import io
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

from atomic_file import atomic_file  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402, F401

BOUND = {'OMP_PROC_BIND': 'true', 'OMP_PLACES': 'cores'}
# With OMP_PROC_BIND, Paddle's MKL uses a single thread; KMP_AFFINITY binds the threads of its OpenMP instead.
BOUND_PADDLE = {'KMP_AFFINITY': 'granularity=fine,compact'}
# Variables that are set keep paddle_env from changing them; empty values mean the defaults of MKL and glibc.
STOCK_PADDLE = {'MKL_DEBUG_CPU_TYPE': '', 'GLIBC_TUNABLES': ''}
SLOW = 0.5  # seconds; calls that take longer need no warm-up call in every round


# ---- the parent

class SystemFailed(RuntimeError):
    """A system failed a request; the text says why."""


class System:
    """A process that calls `serve` for one system.

    Args:
        name: name of the system.
        command: Python script and its arguments.
        threads: number of threads for its computations.
        environment: environment variables to set.
    """

    def __init__(self, name, command, threads, environment):
        self.name = name
        inherited = {k: v for k, v in os.environ.items() if k not in {**BOUND, **BOUND_PADDLE}}
        env = {**inherited, 'OMP_NUM_THREADS': str(threads), 'CUDA_VISIBLE_DEVICES': '', **environment}
        self._errors = tempfile.TemporaryFile()
        # In its own process group: if the parent dies, the kernel resumes and ends stopped members of orphaned groups.
        self._process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._errors, text=True, preexec_fn=os.setpgrp, env=env)
        self.number = self._process.pid

    def ask(self, **request):
        """Sends a request and returns the answer.

        Raises:
            SystemFailed: the process ended or reports a failure.
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


def measure(jobs, rounds, budget, patience, visit=0.1, tolerance=2e-3):
    """Times jobs in interleaved rounds.

    Args:
        jobs: {name: (System, case)}; the case is the `setup` request of the process.
        rounds: number of rounds, in each of which every process makes some calls; with 0, the first call counts.
        budget: seconds per job; a slow job takes part in fewer rounds, but at least in two.
        patience: seconds to wait, in total, for moments when other processes leave the cores idle.
        visit: seconds of calls per round, for calls that are shorter.
        tolerance: of results, as a share of the largest; a job whose results differ from the first one's by more is
            left out. None if they need not agree.
    Returns:
        ({name: milliseconds of all timed calls}, {name: the other answers}, {name: reason of a failure}).
    """
    answers, failed, times = {}, {}, {}
    for name, (system, case) in jobs.items():
        try:
            answers[name] = system.ask(setup=case)
            times[name] = [] if rounds else [answers[name]['seconds'] * 1000]
        except SystemFailed as error:
            failed[name] = str(error)
    for name, answer in list(answers.items()):
        if not np.isfinite(np.concatenate([[0], *answer['sample']])).all():
            failed[name] = 'its results are not finite'
            del times[name], answers[name]
    for name in disagreement(answers, tolerance) if tolerance else ():
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
    """Names of the systems whose results differ from the first one's by more than tolerance * largest value."""
    samples = {name: answer['sample'] for name, answer in answers.items() if answer['sample']}
    wrong = []
    for name, sample in samples.items():
        for values, reference in zip(sample, next(iter(samples.values()))):
            largest = max(map(abs, reference))
            if not all(abs(a - b) <= tolerance * largest for a, b in zip(values, reference)):
                wrong.append(name)
                break
    return wrong


def summary(times):
    """Median, minimum and length of a list of milliseconds."""
    return {'median_ms': round(statistics.median(times), 4), 'min_ms': round(min(times), 4), 'calls': len(times)}


class Load:
    """Measures the share of the machine's cores that other processes use, from its creation on."""

    def __init__(self):
        self._start = self._read()

    def others(self):
        """The share, 0 to 1, or None without /proc/stat. Children that have not ended yet count as others."""
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
    """Waits until the machine is idle, at most `patience` seconds; returns the seconds it waited."""
    waited = 0.0
    while waited < patience:
        load, pause = Load(), 0.05
        time.sleep(pause)
        if (load.others() or 0) < 0.15:
            break
        waited += pause
    return waited


def describe_run(threads):
    """The conditions of a run, {name: text}: command, date, commit, machine, threads and Python version."""
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
    """The load by other processes during the run, {name: text}."""
    others = load.others()
    return {} if others is None else {'load': f'other processes used {others:.0%} of the cores during the run'}


def report(results, arguments, show, **header):
    """Collects results, prints them with a header, and writes them to the CSV file of -output.

    If an interruption or an error ends the measurement, this happens with the results so far.

    Args:
        results: yields (row, version of its system), see `write_csv`.
        arguments: threads and output of the command line.
        show: prints the rows.
        header: more entries for the header.
    Raises:
        UserError: there are no results.
    """
    header, load, rows, versions = {**describe_run(arguments.threads), **header}, Load(), [], set()
    try:
        for row, version in results:
            rows.append(row)
            versions.add(version)
    finally:
        if rows:
            header.update(versions=', '.join(sorted(versions)), **describe_load(load))
            if arguments.output:
                write_csv(arguments.output, header, rows)
            for name, text in header.items():
                print(f'{name}: {text}')
            show(rows)
    if not rows:
        raise UserError('nothing was measured, see above')


def choose(flag, text, known):
    """Splits the comma-separated value of a flag into names.

    Raises:
        UserError: a name is not in `known`.
    """
    names = [name.strip() for name in text.split(',')]
    for name in names:
        if name not in known:
            raise UserError(f'-{flag}={text}: "{name}" is not one of {", ".join(known)}')
    return names


def openvino_settings(case, precision='f32'):
    """Settings of OpenVINO's CPU device: the number of threads of the case, and a precision; None for its default."""
    hint = {'INFERENCE_PRECISION_HINT': precision} if precision else {}
    return {**hint, 'INFERENCE_NUM_THREADS': case['threads'], 'PERFORMANCE_HINT': 'LATENCY'}


def write_csv(path, header, rows):
    """Writes rows, dicts with the same keys, as CSV, after a line `# name: text` for each entry of the header."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    text = io.StringIO(newline='')
    for name, value in header.items():
        text.write(f'# {name}: {value}\n')
    writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode(errors='backslashreplace'))


def read_csv(path):
    """Reads a file that `write_csv` wrote.

    Returns:
        (header, rows); all values are strings.
    Raises:
        UserError: the file was not written by `write_csv`.
    """
    with open(path, newline='', encoding='utf-8') as file:
        lines = file.readlines()
    header = dict(line[2:].rstrip('\n').partition(': ')[::2] for line in lines if line.startswith('# '))
    rows = list(csv.DictReader(line for line in lines if not line.startswith('# ')))
    if not rows or 'median_ms' not in rows[0]:
        raise UserError(f'{path}: contains no results of bench_dwconv.py or bench_model.py')
    return header, rows


def table(columns, rows):
    """A Markdown table."""
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    return ''.join('| ' + ' | '.join(str(v).ljust(width) for v, width in zip(row, widths)) + ' |\n'
                   for row in [columns, ['-' * width for width in widths], *rows])


# ---- the child

def serve(make):
    """Answers the requests of a `System` on standard input until the input ends.

    Args:
        make: called with a case; returns (function to time, {name: value} to add to the answer). The function returns
            a list of arrays, on which all systems must agree.
    """
    channel = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # standard output is for answers; libraries print to standard error
    run = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if 'setup' in request:
                run = None  # frees the previous case
                run, answer = make(request['setup'])
                seconds, results = timed(run)
                answer['sample'] = [subsample(np.asarray(array)) for array in results]
                answer['seconds'] = seconds if seconds > SLOW else timed(run)[0]
                answer['peak_mb'] = peak_memory()
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
    """Peak resident memory of this process in MB (10^6 bytes), or None if the kernel does not report it."""
    try:
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) * 1.024e-3 for line in file if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        return None


def reset_peak_memory():
    """Makes `peak_memory` count from this call on, if the kernel supports it."""
    gc.collect()
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as file:
        file.write('5')


def subsample(array, count=64):
    """About `count` evenly spaced values of an array."""
    flat = array.reshape(-1)
    return [float(v) for v in flat[::max(1, flat.size // count)][:count]]


def import_paddle(threads):
    """Imports Paddle as the project's scripts do, with this number of threads."""
    import paddle_env  # before paddle

    import paddle  # isort: skip
    paddle_env.set_threads(threads=threads)
    return paddle
