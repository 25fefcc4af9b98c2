"""Feeds damaged image files to the decoder, the transforms and the DataLoader, and watches them.

    python tests/fuzz/fuzz_images.py -count=10000 -seed=0   # damaged JPEG, PNG, WebP, GIF and TIFF files
    python tests/fuzz/fuzz_images.py -odd                   # the hand-made files of odd_images.py
    python tests/fuzz/fuzz_images.py -cut=1                 # valid files, cut after every byte
    python tests/fuzz/fuzz_images.py -loader -count=10000   # the damaged files again, through a DataLoader

Each file must be read, or refused with a DataError of one line that names it. Another exception, a crash of the
interpreter, more than 20 s of CPU time or 100 s, and memory out of proportion to the number of pixels are failures; so
is a cut file that is read as another image than the whole one. The files are read in a child process, which may crash.
`-seed=S -first=N -count=1` makes mutant N again.
"""
import argparse
import collections
import hashlib
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from odd_images import odd_images, ordinary_images  # noqa: E402
from PIL import Image  # noqa: E402

from errors import UserError  # noqa: E402
from image_files.decode import DataError, decode_image  # noqa: E402
from transforms import eval_geometry, train_transform  # noqa: E402

TIMEOUT = 20  # seconds of CPU time per file; 89 million pixels take 6
LIMIT = 4 << 30  # bytes by which the process may grow at all: 16 for each of the 179 million pixels that Pillow allows,
SPARE, PER_PIXEL = 64 << 20, 16  # and for a smaller image, these bytes and bytes per pixel
_MARKERS = [0xc0, 0xc1, 0xc2, 0xc4, 0xc9, 0xd0, 0xd8, 0xd9, 0xda, 0xdb, 0xdd, 0xe1, 0xee, 0xff]
_NUMBERS = [0, 1, 2, 127, 128, 255, 256, 4095, 16384, 32767, 32768, 65535, 1 << 16, (1 << 31) - 1, 1 << 31,
            (1 << 32) - 1]


try:
    OPENCV = train_transform(32, backend='cv2')
except UserError:
    OPENCV = None


def mutate(data, rng, others):
    """`data` damaged in one to four places; in most PNG files, the checksums are correct all the same."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not damaged:
            break
        at = rng.randrange(min(len(damaged), rng.choice((64, 256, len(damaged), len(damaged)))))
        kind = rng.randrange(8)
        if kind == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[at] = rng.choice((0, 1, 0x7f, 0x80, 0xff))
        elif kind == 2:
            damaged[at:at + 2] = bytes((0xff, rng.choice(_MARKERS)))
        elif kind == 3:
            number = struct.pack(rng.choice('<>') + 'I', rng.choice(_NUMBERS))
            size = rng.choice((2, 4))
            damaged[at:at + size] = number[:size] if rng.random() < 0.5 else number[-size:]
        elif kind == 4:
            del damaged[at:at + rng.randrange(1, 40)]
        elif kind == 5:
            damaged[at:at] = damaged[at:at + rng.randrange(1, 400)] * rng.randrange(1, 4)
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other))
            damaged[at:at + rng.choice((0, 50))] = other[start:start + rng.randrange(1, 200)]
        else:
            del damaged[at:]
    return _with_checksums(damaged) if rng.random() < 0.7 else bytes(damaged)


def _with_checksums(data):
    """A PNG file with correct checksums, as far as its chunks can be followed; other files unchanged."""
    at = 8
    while data.startswith(b'\x89PNG') and at + 12 <= len(data):
        end = at + 8 + struct.unpack('>I', data[at:at + 4])[0]
        if end + 4 > len(data):
            break
        data[end:end + 4] = struct.pack('>I', zlib.crc32(data[at + 4:end]))
        at = end + 4
    return bytes(data)


def mutants(seed, first, count):
    """Yields (index, file name, bytes, None); a mutant depends only on `seed` and its index."""
    files = ordinary_images()
    names, others = list(files), list(files.values())
    for index in range(first, first + count):
        rng = random.Random(f'{seed}-{index}')
        name = names[index % len(names)]
        yield index, name, mutate(files[name], rng, others), None


def cuts(step, first):
    """Yields (index, file name, bytes, hash of the pixels of the whole file), the file cut at every step-th byte."""
    index = 0
    for name, data in ordinary_images().items():
        Path(name).write_bytes(data)
        whole = pixel_hash(decode_image(name))
        os.remove(name)
        for length in range(0, len(data), step):
            if index >= first:
                yield index, name, data[:length], whole
            index += 1


def pixel_hash(image):
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def read_image(path, whole=None):
    """Decodes a file and transforms the image as for evaluation and training. Returns 'read' or 'refused'.

    Raises:
        AssertionError: the message is not as it should be, the image is not the one of hash `whole`, or OpenCV's
            transform (where that is installed) reads what Pillow refuses, or the reverse.
    """
    try:
        image = decode_image(path)
    except DataError as error:
        assert str(error).startswith(f'{path}: ') and '\n' not in str(error), f'message {error!r}'
        assert 'MemoryError' not in str(error), str(error)
        assert OPENCV is None or not _read_by_opencv(path), 'OpenCV reads it'
        return 'refused'
    assert OPENCV is None or _read_by_opencv(path), 'OpenCV refuses it'
    assert whole in (None, pixel_hash(image)), 'a cut file is read as another image'
    assert eval_geometry(image, 32).size == (32, 32)
    assert np.isfinite(train_transform(32)(image, np.random.default_rng(0))).all()
    return 'read'


def _read_by_opencv(path):
    try:
        OPENCV(OPENCV.open(path), np.random.default_rng(0))
    except DataError:
        return False
    return True


def _peak_memory():
    """Most bytes in use since the last call of `_forget_peak`."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) << 10


def _forget_peak():
    Path('/proc/self/clear_refs').write_text('5')
    return _peak_memory()


def _pixels(path):
    """How many pixels the header of a file promises; 0 if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # Pillow raises many types
        return 0


def _child(files):
    """Reads files, given as (index, name, bytes, hash); prints a line of JSON before and after each."""
    warnings.simplefilter('ignore')
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for index, name, data, whole in files:
        Path(name).write_bytes(data)
        print(json.dumps({'start': index}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, TIMEOUT)  # the signals end the process, wherever it is
        signal.alarm(5 * TIMEOUT)
        allowed = SPARE + PER_PIXEL * _pixels(name) + _forget_peak()
        try:
            outcome = read_image(name, whole)
        except BaseException as error:
            outcome = f'{type(error).__name__}: {error}'
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        if _peak_memory() > allowed:
            outcome = f'{(_peak_memory() - allowed + SPARE) >> 20} MB more than in proportion to {_pixels(name)} pixels'
        os.remove(name)
        print(json.dumps({'index': index, 'name': name, 'outcome': outcome}), flush=True)


def fuzz(*arguments):
    """Reads files in child processes, see `main` for the arguments; after a crash, another one goes on.

    Returns:
        ({(name, 'read', 'refused' or 'failed'): number}, [failure, one line each], [outcome]).
    """
    counts, failures, outcomes, first, done = collections.Counter(), [], [], 0, False
    while not done:
        with tempfile.TemporaryDirectory() as folder:
            child = subprocess.run([sys.executable, __file__, *arguments, '-child', f'-skip={first}'], cwd=folder,
                                   capture_output=True)  # libtiff writes pages to standard error
        for line in child.stdout.decode().splitlines():
            record = json.loads(line)
            first = record.get('start', first - 1) + 1
            if 'outcome' in record:
                outcome = record['outcome'] if record['outcome'] in ('read', 'refused') else 'failed'
                counts[record['name'], outcome] += 1
                outcomes.append(outcome)
                if outcome == 'failed':
                    failures.append(f"file {record['index']}, {record['name']}: {record['outcome']}")
        done = child.returncode == 0
        if not done:
            outcomes.append('failed')
            failures.append(f'file {first - 1}: the interpreter ended with status {child.returncode}: '
                            f'{child.stderr.decode()[-300:]}')
            if not child.stdout:
                break
    return counts, failures, outcomes


def load(folder, files, refused):
    """Reads files through DataLoaders with two workers, for training and for evaluation.

    Args:
        folder: where the files are written.
        files: list of (file name, bytes).
        refused: list of bool, whether each must be refused.
    Returns:
        list of failures, one line each.
    """
    from config import get_config  # here, because Paddle takes seconds to import
    from datasets import ImageNet2012Dataset, get_transform
    from loading.loader import DataLoader
    from loading.samplers import EvalBatchSampler
    warnings.simplefilter('ignore')
    os.makedirs(folder, exist_ok=True)
    config = get_config(opts=['DATA.IMAGE_SIZE', 32])
    names = [f'{index}-{name}' for index, (name, _) in enumerate(files)]
    for name, (_, data) in zip(names, files):
        (Path(folder) / name).write_bytes(data)

    def dataset(mode, chosen):
        (Path(folder) / 'list.txt').write_text(''.join(f'{name} 0\n' for name in chosen))
        return ImageNet2012Dataset(folder, 'list.txt', get_transform(config, mode), train=mode == 'train')

    failures = []
    (Path(folder) / 'whole.png').write_bytes(ordinary_images()['rgb.png'])
    training = dataset('train', [*names, *['whole.png'] * 9 * len(names)])  # to find one that can be read in ten tries
    loader = DataLoader(training, EvalBatchSampler(len(names), 50), 2, replace_bad=True)
    images = sum(len(labels) for _, labels in loader)
    if (images, loader.replaced) != (len(files), sum(refused)):
        failures.append(f'training: {images} images of {len(files)}, {loader.replaced} replaced of {sum(refused)}')
    good, bad = ([name for name, refuse in zip(names, refused) if refuse == wanted] for wanted in (False, True))
    images = sum(len(labels) for _, labels in DataLoader(dataset('val', good), EvalBatchSampler(len(good), 50), 2))
    if images != len(good):
        failures.append(f'evaluation: {images} images of {len(good)}')
    for line in range(len(bad)):  # each must end an evaluation; a worker is needed for the first only
        source = dataset('val', ['whole.png', bad[line]])
        try:
            for _ in DataLoader(source, EvalBatchSampler(len(source), 2), int(line == 0)):
                failures.append(f'{bad[line]}: evaluated')
        except DataError as error:
            if bad[line] not in str(error):
                failures.append(f'{bad[line]}: not named in {error}')
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('-count', type=int, default=10000)
    parser.add_argument('-seed', type=int, default=0)
    parser.add_argument('-first', type=int, default=0)
    parser.add_argument('-odd', action='store_true')
    parser.add_argument('-cut', type=int, default=0, help='cut valid files at every CUT-th byte')
    parser.add_argument('-loader', action='store_true')
    parser.add_argument('-child', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('-skip', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    odd = [(index, name, data, None) for index, (name, (data, _)) in enumerate(odd_images().items())]
    if args.child:
        first = max(args.first, args.skip)
        return _child(odd[args.skip:] if args.odd else cuts(args.cut, args.skip) if args.cut
                      else mutants(args.seed, first, args.first + args.count - first))
    counts, failures, outcomes = fuzz(*[argument for argument in sys.argv[1:] if argument != '-loader'])
    for name in sorted({name for name, _ in counts}):
        print(f"{name:28} {counts[name, 'read']:6} read  {counts[name, 'refused']:6} refused")
    print(f'{len(outcomes)} files, {len(failures)} failures')
    if args.loader and not failures:
        files = odd if args.odd else mutants(args.seed, args.first, args.count)
        with tempfile.TemporaryDirectory() as folder:
            failures += load(folder, [file[1:3] for file in files], [outcome == 'refused' for outcome in outcomes])
        print(f'through DataLoaders: {len(failures)} failures')
    print('\n'.join(failures[:50]))
    return bool(failures)


if __name__ == '__main__':
    sys.exit(main())
