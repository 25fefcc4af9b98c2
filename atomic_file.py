"""Files that are whole or not there, and that tell when they are damaged."""
import contextlib
import errno
import glob
import hashlib
import os
import secrets

DIGEST_MARK = b'\nsha256:'  # before the digest, at the end of a file that has one
DIGEST_BYTES = len(DIGEST_MARK) + hashlib.sha256().digest_size


@contextlib.contextmanager
def atomic_file(path, keep_old_as=None):
    """Binary file that becomes `path`, flushed to disk, when the block ends well; else the old one stays whole.

    Processes that write the same path at once each write a file of their own; the last one to end stays.

    Args:
        path: file name.
        keep_old_as: name in the same folder that the file which is there gets; None replaces it.
    Raises:
        OSError: the disk is full, the folder cannot be written, ...; nothing has changed, or between the two moves of
            `keep_old_as` only the old file's name.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(4)}.tmp')
    try:
        with open(temporary, 'xb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_old_as and os.path.exists(path):
            os.replace(path, os.path.join(folder, keep_old_as))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    if os.name == 'posix':  # the move itself reaches the disk with the folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder):
    """Deletes what processes killed inside `atomic_file` have left; only while no other process writes there."""
    for path in glob.glob(os.path.join(glob.escape(folder), f'.*.{"[0-9a-f]" * 8}.tmp')):
        os.remove(path)


class DigestWriter:
    """Writes to a binary file and ends it with the SHA-256 of what was written."""

    def __init__(self, file):
        self._file, self._size, self._sha256 = file, DIGEST_BYTES, hashlib.sha256()

    def write(self, data):
        self._sha256.update(data)
        self._size += memoryview(data).nbytes
        return self._file.write(data)

    def end(self):
        """Raises OSError where the file is shorter than what was written."""
        self._file.write(DIGEST_MARK + self._sha256.digest())
        self._file.flush()
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise OSError(errno.EIO, 'the disk took less than was written')


def check_digest(file, size):
    """Compares a file that ends with a digest with it.

    Args:
        file: binary file; its position afterwards is the beginning.
        size: its bytes.
    Returns:
        the bytes before the digest, all where there is none; or None where the digest differs.
    """
    file.seek(max(0, size - DIGEST_BYTES))
    end = file.read(DIGEST_BYTES)
    file.seek(0)
    if not end.startswith(DIGEST_MARK):
        return size
    left, sha256 = size - DIGEST_BYTES, hashlib.sha256()
    while left:
        block = file.read(min(left, 1 << 20))
        if not block:
            return None
        sha256.update(block)
        left -= len(block)
    file.seek(0)
    return size - DIGEST_BYTES if end[len(DIGEST_MARK):] == sha256.digest() else None
