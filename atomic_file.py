"""Atomic file writes, locks, and a SHA-256 at the end of files that reveals damage."""
import contextlib
import errno
import glob
import hashlib
import os
import secrets
import tempfile

from errors import DISK_FULL, UserError

try:
    import fcntl
except ImportError:  # on Windows nothing keeps a second process from writing the same file
    fcntl = None

DIGEST_MARK = b'\nsha256:'  # comes before the digest, at the end of a file that has one
DIGEST_BYTES = len(DIGEST_MARK) + hashlib.sha256().digest_size


@contextlib.contextmanager
def atomic_file(path, keep_old_as=None):
    """Opens a binary file that replaces `path` when the block ends, or is discarded if the block raises.

    The data is flushed to disk before the replacement. If several processes write the same path at the same time, the
    last one to finish wins.

    Args:
        path: file name.
        keep_old_as: new name, in the same folder, for the file that `path` names so far; None overwrites that file.
    Raises:
        OSError: the disk is full, the folder cannot be written, and so on; its `filename` is set. The old file remains;
            if the failure came between the two renames of `keep_old_as`, under its new name.
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
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL and error.filename is None:
            error.filename = path
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    if os.name == 'posix':  # flushing the folder makes the rename durable
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def append_whole(file, data, flush=False):
    """Appends all of the data to an unbuffered binary file, or nothing; `flush` also flushes it to disk.

    Raises:
        OSError: the disk is full; the file is as before.
    """
    size = file.tell()
    try:
        while data:
            data = data[file.write(data):]
        if flush:
            os.fsync(file.fileno())
    except BaseException:
        file.truncate(size)
        file.seek(size)
        raise
def refuse_taken(path, flag):
    """Refuses a folder of results that has contents, or that cannot be written.

    Raises:
        UserError: the message names `flag`, the flag that it was given with.
    """
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f'-{flag}={path}: is a file; name a new folder')
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(f'-{flag}={path}: is not empty; choose another folder')
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f'-{flag}={path}: cannot be created in {existing}; choose another folder')


@contextlib.contextmanager
def atomic_folder(path):
    """Yields a temporary folder whose contents move to `path` when the block ends; if it raises, they are discarded.

    Args:
        path: a folder that is empty or does not exist.
    Raises:
        OSError: the disk is full, the folder cannot be written, and so on.
    """
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    existed = os.path.isdir(path)  # it may be a mount point, which cannot be replaced
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{name}.', suffix='.tmp', dir=path if existed else parent) as scratch:
        folder = os.path.join(scratch, 'new')
        os.mkdir(folder)
        yield folder
        if existed:
            for entry in sorted(os.listdir(folder)):
                os.rename(os.path.join(folder, entry), os.path.join(path, entry))
        else:
            os.rename(folder, path)


def remove_leftovers(folder):
    """Deletes the temporary files of processes killed inside `atomic_file`; no other process may be writing there."""
    for path in glob.glob(os.path.join(glob.escape(folder), f'.*.{"[0-9a-f]" * 8}.tmp')):
        os.remove(path)


def lock_file(file):
    """Locks a file open for writing until this process ends or closes it; False if another process holds the lock."""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # otherwise the file system does not support locks
    return True


class DigestWriter:
    """Writes to a binary file and appends the SHA-256 of the data at the end."""

    def __init__(self, file):
        self._file, self._size, self._sha256 = file, DIGEST_BYTES, hashlib.sha256()

    def write(self, data):
        self._sha256.update(data)
        self._size += memoryview(data).nbytes
        return self._file.write(data)

    def end(self):
        """Appends the digest.

        Raises:
            OSError: the file is shorter than the data that was written.
        """
        self._file.write(DIGEST_MARK + self._sha256.digest())
        self._file.flush()
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise OSError(errno.EIO, 'the disk took less than was written')


def check_digest(file, size):
    """Verifies the digest at the end of a file, if it has one, and rewinds the file.

    Args:
        file: binary file.
        size: its size in bytes.
    Returns:
        number of bytes before the digest, `size` if the file has none, or None if the digest does not match.
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
