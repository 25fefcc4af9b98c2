"""Files that are whole or not there."""
import contextlib
import os
import secrets


@contextlib.contextmanager
def atomic_file(path):
    """Binary file that becomes `path`, flushed to disk, when the block ends well; else the old one stays whole.

    Processes that write the same path at once each write a file of their own; the last one to end stays.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f'.{name}.{secrets.token_hex(4)}.tmp')
    try:
        with open(temporary, 'xb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
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
