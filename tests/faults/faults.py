"""Fault injection: runs are interrupted at random moments, resumed, and compared with an uninterrupted run.

    python tests/faults/faults.py [-scale 1.0] [-seed 0] [CAMPAIGN ...]     # all take about half an hour on two cores

Every run is a process of main_single_gpu.py or main_multi_gpu.py (in short tests, see tests/forked.py) that trains a
tiny model with the whole recipe of the paper. A run that ends early is resumed with the same command until it is
complete. Then the contents of its checkpoints and the lines of metrics.jsonl must equal those of the uninterrupted run
bit for bit, except for times.
"""
import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import forked  # noqa: E402
from forked import children  # noqa: E402

from port_weights.safe_load import read_checkpoint  # noqa: E402

SETTINGS = """
MODEL:
  NAME: tiny
  NUM_CLASSES: 4
  LARGE_KERNEL_SIZES: [9, 7, 5, 5]
  LAYERS: [1, 1, 1, 1]
  CHANNELS: [4, 6, 8, 10]
  DROPPATH: 0.2
DATA: {IMAGE_SIZE: 32, BATCH_SIZE: 2, BATCH_SIZE_EVAL: 4, NUM_WORKERS: 2}
TRAIN:
  NUM_EPOCHS: 4
  WARMUP_EPOCHS: 1
  BASE_LR: 1e-2
  ACCUM_ITER: 2
  GRAD_CLIP: 5.0
  MODEL_EMA_DECAY: 0.9
REPORT_FREQ: 1
VALIDATE_FREQ: 2
CURVES: False
SAVE_STEPS: 2
SAVE_TOP_K: 1
SAVE_LATEST_K: 1
"""
TIMES = ('time', 'seconds', 'images_per_s', 'data_wait')
SECONDS = 240  # a run takes a few; one that takes longer than this hangs


class Fleet:
    """Runs of one kind, and the contents of the run folder of an uninterrupted one.

    Args:
        folder: for the data and the run folders.
        processes: processes of a run; with one, it has two DataLoader workers.
    """

    def __init__(self, folder, processes):
        self.folder, self.processes, self.count = Path(folder) / f'processes{processes}', processes, 0
        data = self.folder / 'data'
        data.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for mode, images in (('train', 34), ('val', 11)):
            for index in range(images):
                pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data / f'{mode}{index}.png')
            lines = ''.join(f'{mode}{index}.png {index % 4}\n' for index in range(images))
            (data / f'{mode}_list.txt').write_text(lines)
        self.settings = self.folder / 'settings.yaml'
        self.settings.write_text(SETTINGS.replace('NUM_WORKERS: 2', f'NUM_WORKERS: {2 if processes == 1 else 0}'))
        reference = self.new()
        process = self.start(reference)
        assert self.end(process) == 0, process.errors
        self.expected, self.log = contents(reference), process.lines

    def new(self):
        self.count += 1
        return self.folder / f'run{self.count}'

    def start(self, folder, *flags, **environment):
        """Starts or resumes the run of a folder; its output is collected in `lines` and `errors` while it runs."""
        script = 'main_single_gpu.py' if self.processes == 1 else 'main_multi_gpu.py'
        process = forked.Popen(
            [sys.executable, str(ROOT / script), f'-cfg={self.settings}', f'-data_path={self.folder}/data',
             f'-output={folder}', '-device=cpu', *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=self.folder,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}/tests/faults/inject', **environment})
        process.lines, process.errors = [], ''

        def read():
            for line in process.stdout:
                process.lines.append(line)

        def read_errors():
            for line in process.stderr:
                process.errors += line

        process.readers = [threading.Thread(target=target, daemon=True) for target in (read, read_errors)]
        for reader in process.readers:
            reader.start()
        return process

    def end(self, process):
        """Waits until all processes of a run have ended; returns the exit status, or 'hang'."""
        try:
            process.wait(SECONDS)
            for reader in process.readers:
                reader.join(SECONDS)  # returns once the last process has closed its end of the pipe
                if reader.is_alive():
                    raise subprocess.TimeoutExpired(process.args, SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return 'hang'
        if 'epochs are done' in process.errors:  # it was stopped after its last save
            return 0
        return process.returncode

    def finish(self, folder, *but):
        """Resumes a run to its end and compares it, except for the files `but`; returns what is wrong, or ''."""
        process = self.start(folder)
        status = self.end(process)
        if status != 0:
            return f'{folder}: the resumed run ended with {status}: {process.errors}'
        return self.compare(folder, *but)

    def compare(self, folder, *but):
        """Compares a run folder with that of the uninterrupted run, except for the files `but`."""
        found = contents(folder)
        wrong = [name for name in {**found, **self.expected}
                 if found.get(name) != self.expected.get(name) and name not in but]
        return f'{folder}: differs from the uninterrupted run: {wrong}' if wrong else ''


def contents(folder):
    """The contents of a run folder without times: {file: digest, or for metrics.jsonl the records}."""
    found = {}
    for path in Path(folder).iterdir():
        if path.suffix == '.pdparams' and path.name != 'previous.pdparams':  # its epoch varies
            state = read_checkpoint(path)
            state.pop('metrics_bytes', None)
            found[path.name] = digest(state)
        elif path.name == 'metrics.jsonl':
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[path.name] = [{k: v for k, v in r.items() if k not in TIMES} for r in records]
        elif path.name not in ('log.txt', 'config.yaml', 'previous.pdparams'):
            found[path.name] = 'unexpected'
    return found


def digest(value):
    """SHA-256 of nested dicts with arrays and plain values."""
    if isinstance(value, dict):
        text = repr([(key, digest(value[key])) for key in sorted(value)]).encode()
    elif isinstance(value, np.ndarray):
        text = repr((value.dtype.str, value.shape)).encode() + value.tobytes()
    else:
        text = repr(value).encode()
    return hashlib.sha256(text).hexdigest()


def wait_for_steps(process, steps, seconds):
    """Waits until a run has done `steps` steps, and then for `seconds`, or until it has ended."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if sum(' step ' in line for line in process.lines) >= steps:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            return
        time.sleep(0.005)


def kills(fleet, count, rng):
    """Kills a whole run, or one of its processes, at random moments while it starts or trains.

    The one is the main process, a rank or a DataLoader worker. When it is a child, the others must end within 60
    seconds and report the reason.
    """
    failures, done = [], 0
    folder = fleet.new()
    while done < count:
        process = fleet.start(folder)
        if rng.random() < 0.1:
            wait_for_steps(process, 0, rng.uniform(0, 4))
        else:
            wait_for_steps(process, rng.randint(1, 9), rng.uniform(0, 0.2))
        if process.poll() is not None:  # the run ended before the moment of the kill
            status = fleet.end(process)
            failures.append(f'{folder}: ended with {status}: {process.errors}' if status else fleet.compare(folder))
            folder = fleet.new()
            continue
        victim = rng.choice(['all', 'main', 'child'])
        pids = {'main': [process.pid], 'child': children(process.pid)}.get(victim)
        killed = time.monotonic()
        try:
            if pids:
                os.kill(rng.choice(pids), signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # the process was ending by itself
            pass
        status = fleet.end(process)
        done += 1
        if victim == 'child' and pids and status and (
                status != 1 or not process.errors or time.monotonic() - killed > 60):
            failures.append(f'{folder}: a child was killed; ended with {status} after '
                            f'{time.monotonic() - killed:.0f} s: {process.errors}')
    failures.append(fleet.finish(folder))
    return done, [f for f in failures if f]


def kills_inside_saves(fleet, count, rng):
    """Kills a run at random disk operations, while it writes a checkpoint, the settings or the metrics."""
    failures, done = [], 0
    folder = fleet.new()
    while done < count:
        process = fleet.start(folder, DISK_FAULT=f'kill:{rng.randint(1, 90)}')
        status = fleet.end(process)
        if status == 0:
            failures.append(fleet.compare(folder))
            folder = fleet.new()
            continue
        done += 1
        if 'Traceback' in process.errors or status not in (-9, 1):
            failures.append(f'{folder}: ended with {status}: {process.errors}')
    failures.append(fleet.finish(folder))
    return done, [f for f in failures if f]


def disk_errors(fleet, count, rng):
    """Injects disk errors at random operations: the run continues, or ends with one line and can be resumed."""
    failures, done = [], 0
    while done < count:
        folder, kind = fleet.new(), rng.choice(['ENOSPC', 'EIO', 'EROFS', 'short', 'lost'])
        points = rng.sample(range(5, 300), min(4, count - done))
        with tempfile.NamedTemporaryFile() as log:
            process = fleet.start(folder, DISK_FAULT=f'{kind}:{",".join(map(str, points))}', DISK_FAULT_LOG=log.name)
            status = fleet.end(process)
            operations = dict(enumerate(Path(log.name).read_text().splitlines(), 1))
        hit = [operations[point] for point in points if point in operations]
        done += len(hit)
        reported = any('not saved' in line or 'a line is lost' in line for line in process.lines)
        if kind == 'lost':  # affects only writes of checkpoints
            hit = [name for name in hit if re.match(r'write .*\.pdparams\.', name)]
        if status == 0 and hit and kind != 'short' and not reported:
            failures.append(f'{folder}: {kind} at {points} was not reported')
        if 'Traceback' in process.errors or process.errors.count('\n') > 1 or status not in (0, 1, 2):
            failures.append(f'{folder}: {kind} at {points} ended with {status}: {process.errors}')
        elif list(folder.glob('.*')):
            failures.append(f'{folder}: {kind} at {points} left {list(folder.glob(".*"))}')
        else:
            lost = ['metrics.jsonl'] if any('a line is lost' in line for line in process.lines) else []
            wrong = fleet.compare(folder, *lost) if status == 0 else fleet.finish(folder, *lost)
            failures.append(f'{kind} at {points}: {wrong}' if wrong else '')
    return done, [f for f in failures if f]


def signals(fleet, count, rng):
    """Sends SIGTERM or SIGINT at random moments: the run saves and ends with 143 or 130 (shell) within 30 seconds."""
    failures, done = [], 0
    folder = fleet.new()
    while done < count:
        process = fleet.start(folder)
        if rng.random() < 0.2:
            wait_for_steps(process, 0, rng.uniform(0.5, 4))
        else:
            wait_for_steps(process, rng.randint(1, 9), rng.uniform(0, 0.2))
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        sent = time.monotonic()
        process.send_signal(number)
        status = fleet.end(process)
        if status == 0:  # the signal came after the end
            failures.append(fleet.compare(folder))
            folder = fleet.new()
            continue
        done += 1
        if status not in (128 + number, -number) or time.monotonic() - sent > 30 or process.errors.count('\n') > 1:
            failures.append(f'{folder}: {number.name} ended with {status} after {time.monotonic() - sent:.0f} s: '
                            f'{process.errors}')
    failures.append(fleet.finish(folder))
    return done, [f for f in failures if f]


CAMPAIGNS = {  # name: (function, processes, points)
    'kill -9, one process': (kills, 1, 100),
    'kill -9, two processes': (kills, 2, 50),
    'kill -9 inside saves': (kills_inside_saves, 1, 50),
    'disk errors': (disk_errors, 1, 60),
    'signals, one process': (signals, 1, 16),
    'signals, two processes': (signals, 2, 16),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-scale', type=float, default=1.0, help='fraction of the points of each campaign')
    parser.add_argument('-seed', type=int, default=0)
    parser.add_argument('campaigns', nargs='*', metavar='CAMPAIGN', help=f'one or more of: {", ".join(CAMPAIGNS)}')
    args = parser.parse_args()
    failed = 0
    os.environ[forked.REAL] = '1'
    with tempfile.TemporaryDirectory() as folder:
        fleets = {}
        for name in args.campaigns or CAMPAIGNS:
            function, processes, points = CAMPAIGNS[name]
            fleets[processes] = fleets.get(processes) or Fleet(folder, processes)
            began = time.monotonic()
            done, failures = function(fleets[processes], max(1, round(points * args.scale)), random.Random(args.seed))
            print(f'{name}: {done} points, {len(failures)} failures, {time.monotonic() - began:.0f} s', flush=True)
            for failure in failures:
                print(f'    {failure}', flush=True)
            failed += len(failures)
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
