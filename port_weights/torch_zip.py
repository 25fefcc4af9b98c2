"""The zip archives that torch.save writes: uncompressed entries, no comment.

`zipfile` would do, were it not for hostile files: here the directory has a limit, entries are never decompressed, and
their bytes are charged to a budget before they are read.
"""
import os
import struct
import zlib
from io import BytesIO

from errors import CheckpointError
from port_weights.arrays import read_bytes

MAX_ENTRIES = 100_000  # a file has one per tensor


class TorchZip:
    """Reads the entries of an archive.

    Args:
        file: binary file; `size`: its bytes.
        budget: `arrays.Budget` that the bytes read are charged to.
    Raises:
        CheckpointError: damaged, truncated, compressed or encrypted.
    """

    def __init__(self, file, size, budget):
        self.file, self.size, self.budget = file, size, budget
        self.entries = {}  # name: (offset of its header, bytes, CRC-32)
        count, length, start = self._end_of_directory()
        if start + length > size or count * 46 > length or count > MAX_ENTRIES:
            raise CheckpointError('damaged zip directory')
        file.seek(start)
        directory = BytesIO(file.read(length))
        for _ in range(count):
            name, entry = _directory_entry(directory)
            if name in self.entries:
                raise CheckpointError(f'zip entry {name!r} occurs twice')
            self.entries[name] = entry

    def read(self, name):
        """Bytes of an entry as a uint8 array; KeyError where there is none of this name."""
        offset, nbytes, crc = self.entries[name]
        if offset > self.size:
            raise CheckpointError(f'zip entry {name!r} is damaged')
        self.file.seek(offset)
        head = self.file.read(30)
        if len(head) < 30 or head[:4] != b'PK\3\4':
            raise CheckpointError(f'zip entry {name!r} is damaged')
        offset += 30 + sum(struct.unpack('<2H', head[26:]))
        if offset + nbytes > self.size:
            raise CheckpointError(f'zip entry {name!r} is cut short: truncated or damaged')
        self.file.seek(offset)
        data = read_bytes(self.file, nbytes, self.budget)
        if zlib.crc32(data) != crc:
            raise CheckpointError(f'zip entry {name!r} is damaged: its checksum differs')
        return data

    def _end_of_directory(self):
        """(number of entries, bytes of the directory, its offset), from the records at the end of the file."""
        *_, count, length, start, _ = self._record('<4s4H2LH', self.size - 22, b'PK\5\6')
        if count == 0xffff or 0xffffffff in (length, start):  # the numbers are in the 64-bit record
            _, _, offset, _ = self._record('<4sLQL', self.size - 42, b'PK\6\7')
            *_, count, length, start = self._record('<4sQ2H2L4Q', offset, b'PK\6\6')
        return count, length, start

    def _record(self, fmt, offset, signature):
        if not 0 <= offset <= self.size - struct.calcsize(fmt):
            raise CheckpointError('damaged or truncated zip archive')
        self.file.seek(offset)
        values = struct.unpack(fmt, self.file.read(struct.calcsize(fmt)))
        if values[0] != signature:
            raise CheckpointError('damaged or truncated zip archive')
        return values


def _directory_entry(directory):
    """Reads the next entry: (name, (offset of its header, bytes, CRC-32))."""
    head = directory.read(46)
    if len(head) < 46 or head[:4] != b'PK\1\2':
        raise CheckpointError('damaged zip directory')
    (flags, method, _, _, crc, packed, nbytes, name_length, extra_length, comment_length, _, _, _,
     offset) = struct.unpack('<4H3L5H2L', head[8:])
    try:
        name = directory.read(name_length).decode()
    except UnicodeDecodeError:
        raise CheckpointError('damaged zip directory') from None
    extra = directory.read(extra_length)
    directory.seek(comment_length, os.SEEK_CUR)
    if 0xffffffff in (packed, nbytes, offset):
        nbytes, packed, offset = _zip64_sizes(extra, [nbytes, packed, offset])
    if method != 0 or packed != nbytes or flags & 1:
        raise CheckpointError(f'zip entry {name!r} is compressed or encrypted; torch.save writes neither')
    return name, (offset, nbytes, crc)


def _zip64_sizes(extra, sizes):
    """`sizes` with those that do not fit 32 bits taken from the extra field, which lists them in this order."""
    while len(extra) >= 4:
        kind, length = struct.unpack('<2H', extra[:4])
        if kind == 1:
            values = list(struct.unpack(f'<{length // 8}Q', extra[4:4 + length // 8 * 8].ljust(length // 8 * 8, b'\0')))
            try:
                return [values.pop(0) if size == 0xffffffff else size for size in sizes]
            except IndexError:
                break
        extra = extra[4 + length:]
    raise CheckpointError('damaged zip directory')
