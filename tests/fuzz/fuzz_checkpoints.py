"""Feeds damaged checkpoint files to the reader and watches it.

    python tests/fuzz/fuzz_checkpoints.py -count=12000 -seed=0
    python tests/fuzz/fuzz_checkpoints.py -hostile      # the hand-made files of hostile.py

Each mutant must be read, or refused with a CheckpointError. Another exception, a crash of the interpreter, more than
10 s, memory above a limit, and audit events by which Python executes code or opens other files are failures. The
mutants are read in a child process, which may crash. `-seed=S -first=N -count=1` makes mutant N again.
"""
import argparse
import collections
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from hostile import archive, call, hostile_files, storage, tensor, text  # noqa: E402

from errors import CheckpointError  # noqa: E402
from port_weights.names import infer_architecture, map_names  # noqa: E402
from port_weights.safe_load import find_weights, read_checkpoint  # noqa: E402
from port_weights.writers import write_paddle, write_safetensors, write_torch  # noqa: E402

TIMEOUT = 10  # seconds per mutant
MEMORY = 256 << 20  # bytes by which the process may grow; the files are smaller than 2 MiB
_BAD_EVENTS = ('exec', 'compile', 'import', 'os.', 'subprocess.', 'socket.', 'ctypes.', 'shutil.', 'pickle.',
               'marshal.', 'code.__new__', 'function.__new__', 'object.__', 'webbrowser.')


def corpus():
    """Valid files of every form: {form: bytes}."""
    random_state = np.random.RandomState(0)
    state = {'stem.0.conv.weight': random_state.rand(4, 3, 3, 3).astype('f4'), 'norm._mean': np.zeros(4, 'f4'),
             'norm._variance': np.ones(4, 'f4'), 'count': np.zeros((), 'i8')}
    files = {}
    for path in sorted((ROOT / 'tests' / 'golden').glob('*.pth')):
        files[path.stem] = path.read_bytes()
    for name, write in (('torch', write_torch), ('safetensors', write_safetensors), ('paddle', write_paddle)):
        buffer = io.BytesIO()
        write(buffer, state)
        files[f'written {name}'] = buffer.getvalue()
    nested = {'model': state, 'epoch': 3, 'best': {'acc1': 80.5, 'epoch': 2}, 'list': [1, (2.5, 'x'), None, b'y'],
              'scalar': np.float32(1.5), 'half': np.ones((2, 2), 'f2').T, 'bf16': np.ones(3, 'u2'),
              'set': {1, 2}, 'args': argparse.Namespace(lr=0.1), 'ordered': collections.OrderedDict(a=1)}
    for protocol in (2, 3, 4, 5):
        files[f'pickle {protocol}'] = pickle.dumps(nested, protocol)
    bfloat16 = storage(kind='BFloat16Storage', count=8)
    files['bfloat16 archive'] = archive(
        b'\x80\x02}' + text('w') + tensor(bfloat16, shape=(2, 3), strides=(1, 2)) + b's' + text('p')
        + call('torch._utils', '_rebuild_parameter', tensor(bfloat16), b'\x88', b'N') + b's.')
    return files


def mutate(data, rng, others):
    """`data` damaged in one to four places; in most archives, inside an entry, whose checksum is then correct."""
    if data.startswith(b'PK') and rng.random() < 0.6:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = [(info.filename, file.read(info)) for info in file.infolist()]
        at = 0 if rng.random() < 0.8 else rng.randrange(len(entries))
        entries[at] = entries[at][0], _damage(entries[at][1], rng, others)
        if rng.random() < 0.1:
            del entries[rng.randrange(len(entries))]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, 'w') as file:
            for name, content in entries:
                file.writestr(zipfile.ZipInfo(name), content)
        return buffer.getvalue()
    if data[8:9] == b'{' and rng.random() < 0.6:
        length, = struct.unpack('<Q', data[:8])
        header = _damage(data[8:8 + length], rng, [json.dumps({'shape': [-1, 1 << 62]}).encode()])
        return struct.pack('<Q', len(header)) + header + data[8 + length:]
    return _damage(data, rng, others)


_OPCODES = b''.join(value for name, value in vars(pickle).items()
                    if name.isupper() and isinstance(value, bytes) and len(value) == 1)
_NUMBERS = [0, 1, -1, 127, 128, 255, 1 << 15, 1 << 16, (1 << 31) - 1, -1 << 31, 1 << 32, (1 << 62) - 1, (1 << 63) - 1]


def _damage(data, rng, others):
    data = bytearray(data)
    # pickles and headers are at the start or the end: damage them as often as the bulk of the weights
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        span = rng.choice((64, 1024, len(data), len(data)))
        at = rng.randrange(min(span, len(data)))
        if rng.random() < 0.3:
            at = len(data) - 1 - at
        kind = rng.randrange(9)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7f, 0x80, 0xff))
        elif kind == 2:
            data[at] = rng.choice(_OPCODES)
        elif kind == 3:
            data[at:at] = bytes([rng.choice(_OPCODES) for _ in range(rng.randrange(1, 6))])
        elif kind == 4:
            number = rng.choice(_NUMBERS).to_bytes(9, 'little', signed=True)[:rng.choice((1, 2, 4, 8))]
            data[at:at + len(number)] = number
        elif kind == 5:
            del data[at:at + rng.randrange(1, 40)]
        elif kind == 6:
            data[at:at] = data[at:at + rng.randrange(1, 400)] * rng.randrange(1, 4)
        elif kind == 7:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            data[at:at + rng.choice((0, 50))] = other[start:start + rng.randrange(1, 200)]
        else:
            del data[at:]
    return bytes(data)


def mutants(seed, first, count):
    """Yields (index, form, bytes); a mutant depends only on `seed` and its index."""
    files = corpus()
    forms = list(files)
    others = [*files.values(), *(data for data in hostile_files().values() if 0 < len(data) < 10_000)]
    for index in range(first, first + count):
        rng = random.Random(f'{seed}-{index}')
        form = forms[index % len(forms)]
        yield index, form, mutate(files[form], rng, others)


def read_all(path):
    """Does what scripts do with a file before they build a model. Returns 'read', or 'refused' by the reader."""
    outcome = 'refused'
    try:
        checkpoint = read_checkpoint(path)
        outcome = 'read'
        state, _ = find_weights(checkpoint, path=path)
        infer_architecture(map_names(state).tensors)
    except CheckpointError as error:
        if '\n' in str(error):
            raise AssertionError(f'message with several lines: {error!r}') from error
    return outcome


def _child(files):
    """Reads files, given as (index, form, bytes); prints a line of JSON before and after each."""
    events = []

    def watch(event, args):
        if watching and (event.startswith(_BAD_EVENTS) or event == 'open' and args[0] != path):
            events.append(f'{event} {args!r:.200}')

    watching, path = False, os.path.abspath('mutant')
    for data in corpus().values():  # imports all modules
        Path(path).write_bytes(data)
        read_all(path)
    sys.addaudithook(watch)
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _raise_timeout)
    for index, form, data in files:
        Path(path).write_bytes(data)
        print(json.dumps({'start': index}), flush=True)
        signal.alarm(TIMEOUT)
        watching = True
        try:
            outcome = read_all(path)
        except BaseException as error:
            outcome = f'{type(error).__name__}: {error}'
        watching = False
        signal.alarm(0)
        print(json.dumps({'index': index, 'form': form, 'outcome': outcome, 'events': events[:3]}), flush=True)
        events.clear()


def _raise_timeout(*_):
    raise TimeoutError(f'took more than {TIMEOUT} s')


def fuzz(count, seed=0, first=0, hostile=False):
    """Reads `count` mutants, or hostile files, in a child process.

    Returns:
        ({(form, 'read', 'refused' or 'failed'): number}, [failure, one line each]).
    """
    counts, failures = collections.Counter(), []
    end = first + count
    while first < end:
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run([sys.executable, __file__, '-child', f'-seed={seed}', f'-first={first}',
                                    f'-count={end - first}', *(['-hostile'] if hostile else [])],
                                   cwd=folder, stdout=subprocess.PIPE, env={**os.environ, 'OPENBLAS_NUM_THREADS': '1'})
            if os.listdir(folder) not in ([], ['mutant']):
                failures.append(f'files were made: {os.listdir(folder)}')
        index = first - 1
        for line in child.stdout.decode().splitlines():
            record = json.loads(line)
            index = record.get('start', index)
            if 'outcome' in record:
                outcome = record['outcome'] if record['outcome'] in ('read', 'refused') else 'failed'
                counts[record['form'], outcome] += 1
                if outcome == 'failed' or record['events']:
                    failures.append(f"file {index}, {record['form']}: {record['outcome']} {' '.join(record['events'])}")
        if child.returncode:
            failures.append(f'file {index}: the interpreter ended with status {child.returncode}')
        first = index + 1 if child.returncode else end
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('-count', '--count', type=int, default=12000)
    parser.add_argument('-seed', '--seed', type=int, default=0)
    parser.add_argument('-first', '--first', type=int, default=0)
    parser.add_argument('-hostile', '--hostile', action='store_true')
    parser.add_argument('-child', '--child', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    hostile = list(hostile_files().items()) if args.hostile else []
    if args.child:
        return _child([(index, *item) for index, item in enumerate(hostile)][args.first:] if args.hostile
                      else mutants(args.seed, args.first, args.count))
    counts, failures = fuzz(len(hostile) or args.count, args.seed, args.first, args.hostile)
    for form in sorted({form for form, _ in counts}):
        print(f"{form:48} {counts[form, 'read']:6} read  {counts[form, 'refused']:6} refused")
    print(f'{sum(counts.values())} files, {len(failures)} failures')
    print('\n'.join(failures[:50]))
    return bool(failures)


if __name__ == '__main__':
    sys.exit(main())
