"""Downloads a file whose digest is known, and continues where an earlier attempt stopped."""
import contextlib
import hashlib
import http.client
import os
import re
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request

from tqdm import tqdm

from atomic_file import lock_file
from errors import Interrupted, UserError

BLOCK = 1 << 16
TIMEOUT = 30  # seconds without data after which a connection counts as broken
TRIES = 5  # attempts in a row that bring nothing new before giving up
PAUSE = 1.0  # seconds before the second attempt; doubles with each further one


class _Broken(Exception):
    """The server is busy or the connection broke; another attempt may succeed."""


def download(url, path, sha256, otherwise=''):
    """Downloads `url` to `path`, through PATH.part, which a later call continues.

    The digest decides whether the file is complete. Several processes may download the same file at the same time:
    one does, the others wait for it. Proxies are taken from the environment (https_proxy, no_proxy).

    Args:
        url: address, http or https.
        path: file to create; its folder is created too.
        sha256: SHA-256 of the file in hexadecimal digits, or the beginning of it.
        otherwise: where else to get the file, for messages.
    Raises:
        UserError: no connection, no such file on the server, another file than the published one, no space, or
            `path` is another file.
        Interrupted: Ctrl-C, or another signal that ends the process.
    """
    part = f'{path}.part'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with _locked(part, path) as file:
            if file is None:
                return _check_existing(path, sha256)
            _fetch(url, file, sha256, otherwise)
            file.flush()
            os.fsync(file.fileno())
            if os.name == 'nt':
                file.close()  # Windows renames no open file; elsewhere the lock must last until the file has its name
            os.replace(part, path)
    except OSError as error:
        raise UserError(f'{error.filename or part}: {error.strerror}; {_kept(part)}') from None
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(getattr(error, 'signal', signal.SIGINT), f'stopped; {_kept(part)}') from None


@contextlib.contextmanager
def _locked(part, path):
    """Opens the partial file, waiting while another process downloads it; yields None once `path` exists."""
    waiting = False
    while not os.path.exists(path):
        with open(part, 'a+b') as file:
            if lock_file(file) and _is_open(part, file):
                try:
                    if not os.path.exists(path):
                        yield file
                        return
                finally:
                    if not file.closed and _size(file) == 0:
                        os.remove(part)
                continue
        if not waiting:
            _say(f'{part}: another process is downloading it; waiting')
        waiting = True
        time.sleep(0.2)
    yield None


def _is_open(part, file):
    """Whether an open file still has its name: the process that had the lock may have renamed or deleted it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(part))
    except FileNotFoundError:
        return False


def _check_existing(path, sha256):
    with open(path, 'rb') as file:
        if not _digest(file).startswith(sha256):
            raise UserError(f'{path}: is another file than the one to download, whose SHA-256 begins with {sha256}; '
                            'use it as it is, or move it away and run the command again')
    _say(f'{path}: there already; its SHA-256 begins with {sha256}')


def _fetch(url, file, sha256, otherwise):
    """Fills the partial file until it has the digest."""
    most, failures, complete = _size(file), 0, False
    while not (_size(file) and _digest(file).startswith(sha256)):
        if complete:
            file.truncate(0)
            raise UserError(f'{url}: sent another file than the published one, whose SHA-256 begins with {sha256}; it '
                            f'is deleted. Run the command again, or {otherwise}')
        try:
            _receive(url, file, otherwise)
            complete = True
        except _Broken as error:
            failures, most = (0, _size(file)) if _size(file) > most else (failures + 1, most)
            if failures == TRIES:
                raise UserError(f'{url}: {error}; {_kept(file.name)}') from None
            pause = PAUSE * 2 ** max(0, failures - 1)
            _say(f'{error}; next attempt in {pause:g} s')
            time.sleep(pause)


def _receive(url, file, otherwise):
    """Appends the rest of `url` to the partial file, or the whole to an emptied one if the server cannot continue.

    Raises:
        _Broken: the file is not complete.
        UserError: another attempt would not help.
    """
    have = _size(file)
    headers = {'User-Agent': 'RepLKNet zoo.py', **({'Range': f'bytes={have}-'} if have else {})}
    with _open(urllib.request.Request(url, headers=headers), file, otherwise) as response:
        if response.headers.get_content_type() == 'text/html':
            raise UserError(f'{url}: sent a web page, perhaps the login page of your network; {_kept(file.name)}')
        total = response.length
        if response.status == 206:
            found = re.match(r'bytes (\d+)-\d+/(\d+|\*)$', response.headers['Content-Range'] or '')
            if not found or int(found[1]) != have:
                file.truncate(0)
                raise _Broken('the server does not continue at the right place, so the download starts again')
            total = None if found[2] == '*' else int(found[2])
        elif have:
            _say('the server cannot continue a download, so it starts again')
            file.truncate(0)
            have = 0
        free = shutil.disk_usage(os.path.dirname(file.name) or '.').free
        if total is not None and total - have > free:
            raise UserError(f'{file.name}: needs another {_megabytes(total - have)}, and {_megabytes(free)} are free '
                            f'on the disk; {_kept(file.name)}')
        with tqdm(total=total, initial=have, unit='B', unit_scale=True, disable=not os.isatty(2)) as bar:
            for block in iter(lambda: _read(response), b''):
                file.write(block)
                bar.update(len(block))
        if total is not None and _size(file) < total:
            raise _Broken(f'the connection broke off after {_megabytes(_size(file))} of {_megabytes(total)}')


def _open(request, file, otherwise):
    try:
        return urllib.request.build_opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        answer = f'the server answers {error.code} {error.reason}'
        if error.code == 416:
            file.truncate(0)
            raise _Broken('the partial file is not the beginning of the published one, so the download starts again'
                          ) from None
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(answer) from None
        raise UserError(f'{request.full_url}: {answer}; {otherwise}') from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f'no connection ({getattr(error, "reason", error)}); check the network, and https_proxy if there '
                      'is a proxy') from None


def _read(response):
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f'the connection broke off ({error})') from None


def _digest(file):
    """The SHA-256 of an open file."""
    file.seek(0)
    sha256 = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b''):
        sha256.update(block)
    return sha256.hexdigest()


def _size(file):
    return file.seek(0, os.SEEK_END)


def _kept(part):
    """What remains of a download that ends early."""
    size = os.path.getsize(part) if os.path.exists(part) else 0
    return (f'{_megabytes(size)} are kept in {part}, where the same command continues' if size else
            'nothing was downloaded')


def _megabytes(size):
    return f'{size / 1e6:.1f} MB'


def _say(message):
    print(message, file=sys.stderr, flush=True)
