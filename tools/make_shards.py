"""Writes the images of lists into shards: large tar files, for file systems that are slow with small files.

    python tools/make_shards.py data/train_list.txt data/val_list.txt -output=shards
    python main_multi_gpu.py -cfg=configs/replknet_31b.yaml -data_path=shards
    python tools/make_shards.py shards/train_list.txt -check            # reads all of them and compares checksums

Beside a copy of each list NAME.txt, the output folder then holds NAME.shards: see image_files/shards.py. A run from
shards is the same as one from the files, bit for bit, and either can resume the other. The list is written last: after
an interruption the same command continues with the first missing shard.
"""
import json
import os
import sys
import tarfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from atomic_file import atomic_file, lock_file, remove_leftovers  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from image_files.decode import DataError, ShardError  # noqa: E402
from image_files.lists import CLASSES, paths_identity, read_any_list  # noqa: E402
from image_files.shards import (  # noqa: E402
    ENTRIES,
    ENTRY,
    INDEX,
    VERSION,
    open_shards,
    shard_name,
    shards_folder,
)

PLAN = 'unfinished.json'  # describes the shards that are being written


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument('lists', nargs='+', metavar='LIST', help='list (.txt)')
    for flag, kind, default, text in (
            ('output', str, None, 'folder for the lists and their shards'),
            ('shard_mb', float, 1024, 'size in MB at which a shard is full (default: 1024)'),
            ('num_workers', int, 16, 'number of reading threads (default: 16)')):
        parser.add_argument(f'-{flag}', f'--{flag}', type=kind, default=default, help=text)
    parser.add_argument('-check', '--check', action='store_true', help='check existing shards')
    args = parser.parse_args(argv)
    for path in args.lists:
        if not path.endswith('.txt'):
            raise UserError(f'{path}: is not a list (.txt)')
    if args.num_workers < 1 or not args.shard_mb > 0:
        raise UserError('-num_workers must be at least 1, and -shard_mb above 0')
    if args.check == bool(args.output):
        raise UserError('give either -output=DIR to write shards, or -check to check the shards of the lists')
    if len({os.path.basename(path) for path in args.lists}) < len(args.lists):
        raise UserError('two of the lists have the same name; name another folder with -output for one of them')
    return args


def read_files(list_file, paths, start, workers):
    """Yields the contents of the files in a list from number `start` on; threads read ahead."""
    folder, pending = os.path.dirname(list_file), deque()

    def read(index):
        path = os.path.join(folder, os.fsdecode(paths[index]))
        try:
            with open(path, 'rb') as file:
                data = file.read()
        except OSError as error:
            reason = 'no such image' if isinstance(error, FileNotFoundError) else error.strerror
            raise DataError(f'{list_file}:{index + 1}: {path}: {reason}') from None
        if len(data) >= 1 << 32:
            raise DataError(f'{list_file}:{index + 1}: {path}: an image in a shard must have less than 4 GiB')
        return data

    with ThreadPoolExecutor(workers) as pool:
        try:
            for index in range(start, len(paths)):
                pending.append(pool.submit(read, index))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def member_name(path):
    """Name in a tar file of an image with this path (bytes) in a list; unpacked, it stays in its folder."""
    return '/'.join(part for part in os.fsdecode(path).split('/') if part not in ('', '.', '..')) or 'image'


def write_shard(path, names, files, limit):
    """Writes one shard.

    Args:
        path: the tar file.
        names, files: iterators of the paths (bytes) and contents of images; those that the shard takes are consumed.
        limit: size in bytes at which it is full.
    Returns:
        its part of the index, ENTRY [images].
    """
    entries = []
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode='w', format=tarfile.GNU_FORMAT, encoding='utf-8',
                                                 errors='surrogateescape') as tar:
        for data in files:
            member = tarfile.TarInfo(member_name(next(names)))
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            entries.append((tar.offset - padded, len(data), zlib.crc32(data)))
            if tar.offset >= limit:
                break
    return np.array(entries, dtype=ENTRY)


def unfinished_shards(folder, plan):
    """Prepares the folder for shards, which an interrupted call may have begun.

    Returns:
        (file to keep open, which locks the folder; parts of the index of the complete shards).
    Raises:
        UserError: there is something else in the folder, or another process is writing into it.
    """
    path = os.path.join(folder, PLAN)
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.isfile(path):
        raise UserError(f'{folder}: is not empty; delete it, or name another folder with -output')
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(path):
        with atomic_file(path) as file:
            file.write(json.dumps(plan).encode())
    lock = open(path, 'r+b')  # noqa: SIM115 - the caller keeps it open
    if not lock_file(lock):
        raise UserError(f'{folder}: another process is writing these shards')
    if lock.read() != json.dumps(plan).encode():
        raise UserError(f'{folder}: holds unfinished shards of another list or with another -shard_mb; delete it, or '
                        'name another folder with -output')
    remove_leftovers(folder)
    parts = []
    while os.path.isfile(part_of(folder, len(parts))):
        parts.append(np.load(part_of(folder, len(parts))))
    return lock, parts


def part_of(folder, number):
    """The part of the index for a shard, until all are complete."""
    return os.path.join(folder, shard_name(number).replace('.tar', '.npy'))


def save_array(path, array):
    with atomic_file(path) as file:
        np.save(file, array)


def write_shards(list_file, output, limit, workers):
    """Writes the shards of a list, then the list; returns a line that says so."""
    target = os.path.join(output, os.path.basename(list_file))
    folder = shards_folder(target)
    if os.path.lexists(target):
        raise UserError(f'{target}: exists; name another folder with -output')
    if os.path.isdir(shards_folder(list_file)):
        raise UserError(f'{list_file}: is in shards already')
    paths, _ = read_any_list(list_file)
    identity = paths_identity(paths)
    lock, parts = unfinished_shards(folder, {'list': identity, 'limit': limit})
    with lock, tqdm(total=len(paths), unit='image', disable=not os.isatty(2)) as progress:
        done = sum(map(len, parts))
        if parts:
            print(f'{folder}: continues after {len(parts):,} shards with {done:,} images', flush=True)
        progress.update(done)
        files = read_files(list_file, paths, done, workers)
        names = (paths[index] for index in range(done, len(paths)))
        while done < len(paths):
            part = write_shard(os.path.join(folder, shard_name(len(parts))), names, files, limit)
            save_array(part_of(folder, len(parts)), part)
            parts.append(part)
            done += len(part)
            progress.update(len(part))
        size = finish(folder, target, list_file, identity, parts)
    return f'{target}: {len(paths):,} images in {len(parts):,} shard{"s" * (len(parts) > 1)}, {size / 1e6:,.1f} MB'


def finish(folder, target, list_file, identity, parts):
    """Writes the index and, last, the list; returns the size of all shards in bytes."""
    entries = np.concatenate(parts)
    save_array(os.path.join(folder, ENTRIES), entries)
    sizes = [os.path.getsize(os.path.join(folder, shard_name(number))) for number in range(len(parts))]
    index = {'version': VERSION, 'list': identity, 'crc32': zlib.crc32(entries),
             'shards': [{'size': size, 'images': len(part)} for size, part in zip(sizes, parts)]}
    with atomic_file(os.path.join(folder, INDEX)) as file:
        file.write(json.dumps(index).encode())
    with open(list_file, 'rb') as source:
        content = source.read()
    with atomic_file(target) as file:
        file.write(content)
    for number in range(len(parts)):
        os.remove(part_of(folder, number))
    os.remove(os.path.join(folder, PLAN))
    return sum(sizes)


def check_shards(list_file, workers):
    """Reads all images of the shards of a list; returns lines about the damaged shards."""
    paths, _ = read_any_list(list_file)
    shards = open_shards(list_file, paths)
    if shards is None:
        raise UserError(f'{list_file}: has no shards: there is no folder {shards_folder(list_file)}')

    def problem(index):
        try:
            shards.read(index)
        except ShardError as error:
            return str(error)
        return None

    found = {}
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(paths), unit='image', disable=not os.isatty(2)) as bar:
        for start in range(0, len(paths), 1 << 14):
            rows = range(start, min(start + (1 << 14), len(paths)))
            found.update(dict.fromkeys(filter(None, pool.map(problem, rows))))
            bar.update(len(rows))
    return list(found)


def main():
    args = read_arguments()
    if args.check:
        damaged = [line for path in args.lists for line in check_shards(path, args.num_workers)]
        print('\n'.join(damaged) or f'{", ".join(args.lists)}: all images in the shards are intact')
        return int(bool(damaged))
    os.makedirs(args.output, exist_ok=True)
    for path in args.lists:
        print(write_shards(path, args.output, int(args.shard_mb * 2**20), args.num_workers), flush=True)
    names = os.path.join(os.path.dirname(args.lists[0]), CLASSES)
    copy = os.path.join(args.output, CLASSES)
    if os.path.isfile(names) and not os.path.exists(copy):
        with open(names, 'rb') as source, atomic_file(copy) as file:
            file.write(source.read())
    print(f'use them with -data_path={args.output}')
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
