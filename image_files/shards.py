"""Shards: the images of a list in tar files with an index, for file systems that are slow with small files.

Beside the list NAME.txt, the folder NAME.shards holds 00000.tar, 00001.tar, ..., index.npy and index.json. The images
are in the order of the list. They are read by their position, so the tar files are never searched; any tar program
unpacks them. tools/make_shards.py writes them.
"""
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from image_files.decode import ImageInside, ShardError
from image_files.lists import paths_identity

INDEX, ENTRIES = 'index.json', 'index.npy'
ENTRY = np.dtype([('offset', '<u8'), ('size', '<u4'), ('crc32', '<u4')])  # of an image file in its shard
VERSION = 1
_AGAIN = 'copy it again, or rewrite the shards with tools/make_shards.py'
_SPARE_FILES = 256  # that a process may open besides the shards


def shards_folder(list_file):
    """The folder that holds the shards of a list, if there are any: NAME.shards for NAME.txt."""
    return os.path.splitext(os.fspath(list_file))[0] + '.shards'


def shard_name(number):
    return f'{number:05d}.tar'


class Shards:
    """The shards of a list. Several threads, and processes that are forked, may read from one object.

    At the start, the size of each shard is compared with the index, and its first and last image are read. Afterwards
    each image is checked when it is read.

    Args:
        list_file: the list.
        paths: the paths in it.
    Raises:
        ShardError: a file is missing, cut or changed, or the list has other paths than when the shards were written.
    """

    def __init__(self, list_file, paths):
        self.folder = shards_folder(list_file)
        written, self._sizes, images, crc32 = self._read_index()
        if written != paths_identity(paths):
            raise ShardError(f'{list_file}: its paths have changed since its shards were written, when it had '
                             f'{written["length"]:,} entries; restore the list, or rewrite the shards with '
                             'tools/make_shards.py')
        self._first = np.cumsum([0, *images])
        self._entries = self._read_entries(crc32)
        self._files = {}
        self._allow_open_files()
        with ThreadPoolExecutor(16) as pool:  # on a network file system, each waits for its answer
            list(pool.map(self._check, range(len(self._sizes))))

    def _read_index(self):
        """Identity of the list, sizes of the shards in bytes and in images, and CRC-32 of the entries."""
        path = os.path.join(self.folder, INDEX)
        try:
            with open(path, encoding='utf-8') as file:
                index = json.load(file)
            version = index['version']
            if version == VERSION:
                return ({key: index['list'][key] for key in ('digest', 'length')},
                        *([int(shard[key]) for shard in index['shards']] for key in ('size', 'images')), index['crc32'])
        except OSError as error:
            raise ShardError(f'{path}: cannot be read: {error.strerror}; {_AGAIN}') from None
        except (ValueError, KeyError, TypeError):
            raise ShardError(f'{path}: is damaged; {_AGAIN}') from None
        raise ShardError(f'{path}: is of version {version}; only version {VERSION} can be read')

    def _read_entries(self, crc32):
        path = os.path.join(self.folder, ENTRIES)
        try:
            entries = np.load(path, mmap_mode='r')  # the processes of a machine share its memory
            intact = entries.dtype == ENTRY and len(entries) == self._first[-1] and zlib.crc32(entries) == crc32
        except OSError as error:
            raise ShardError(f'{path}: cannot be read: {error.strerror or error}; {_AGAIN}') from None
        except (ValueError, EOFError):
            intact = False
        if not intact:
            raise ShardError(f'{path}: is cut or changed; {_AGAIN}')
        return entries

    def _allow_open_files(self):
        """Raises the limit of open files, so that all shards can stay open."""
        try:
            import resource
        except ImportError:  # on Windows there is no such limit
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = len(self._sizes) + _SPARE_FILES
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ShardError(f'{self.folder}: {len(self._sizes):,} shards, but a process may open only {hard:,} '
                             'files; raise the limit (ulimit -n), or write larger shards (-shard_mb)')
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

    def _check(self, number):
        """Compares the size of a shard and its first and last image with the index."""
        path = self.path_of(number)
        try:
            size = os.fstat(self._open(number).fileno()).st_size
        except OSError as error:
            raise ShardError(f'{path}: cannot be read: {error.strerror}; {_AGAIN}') from None
        if size != self._sizes[number]:
            raise ShardError(f'{path}: has {size:,} bytes instead of {self._sizes[number]:,}; {_AGAIN}')
        self.read(int(self._first[number]))
        self.read(int(self._first[number + 1]) - 1)

    def _open(self, number):
        if number not in self._files:
            self._files[number] = open(self.path_of(number), 'rb', buffering=0)  # noqa: SIM115 - stays open
        return self._files[number]

    def path_of(self, number):
        """Path of a shard."""
        return os.path.join(self.folder, shard_name(number))

    def shard_of(self, index):
        """Number of the shard that holds an image."""
        return int(np.searchsorted(self._first, index, side='right')) - 1

    def read(self, index):
        """The contents of an image file, bytes.

        Args:
            index: its number in the list.
        Raises:
            ShardError: its shard cannot be read, or is not the one that was written.
        """
        number, entry = self.shard_of(index), self._entries[index]
        offset, left, parts = int(entry['offset']), int(entry['size']), []
        try:
            file = self._open(number).fileno()
            while left:
                part = os.pread(file, left, offset)
                if not part:
                    break
                parts.append(part)
                offset, left = offset + len(part), left - len(part)
        except OSError as error:
            raise ShardError(f'{self.path_of(number)}: cannot be read: {error.strerror}; {_AGAIN}') from None
        data = parts[0] if len(parts) == 1 else b''.join(parts)
        if left or zlib.crc32(data) != entry['crc32']:
            what = 'is cut' if left else 'has changed'
            raise ShardError(f'{self.path_of(number)}: {what} since it was written; {_AGAIN}')
        return data

    def image(self, index, path):
        """The image with this number in the list as a path.

        Args:
            path: the path in the list.
        """
        return ShardImage(self, index, path)

    def __del__(self):
        for file in getattr(self, '_files', {}).values():
            file.close()


class ShardImage(ImageInside):
    """The path of an image in a shard, as if the shard were a folder; see `Shards.image`."""

    def __new__(cls, shards, index, path):
        self = super().__new__(cls, f'{shards.path_of(shards.shard_of(index))}/{path}')
        self.shards, self.index = shards, index
        return self

    def read(self):
        return self.shards.read(self.index)


def open_shards(list_file, paths):
    """The `Shards` of a list (.txt), or None if it has none.

    Args:
        paths: the paths in it.
    """
    is_list = os.fspath(list_file).endswith('.txt')
    return Shards(list_file, paths) if is_list and os.path.isdir(shards_folder(list_file)) else None
