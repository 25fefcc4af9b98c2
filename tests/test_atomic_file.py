"""Atomic file writes and the digest at the end of a file."""
import errno
import os

import pytest

from atomic_file import DIGEST_BYTES, DigestWriter, atomic_file, check_digest, remove_leftovers


def write(path, data, **kwargs):
    with atomic_file(path, **kwargs) as file:
        file.write(data)


def test_the_old_file_is_replaced_or_kept_under_another_name(tmp_path):
    path = tmp_path / 'last'
    for data in (b'1', b'2', b'3'):
        write(path, data, keep_old_as='previous')
    assert (path.read_bytes(), (tmp_path / 'previous').read_bytes()) == (b'3', b'2')
    write(path, b'4')
    assert (path.read_bytes(), (tmp_path / 'previous').read_bytes()) == (b'4', b'2')
    assert sorted(os.listdir(tmp_path)) == ['last', 'previous']


@pytest.mark.parametrize('operation', ['fsync', 'replace'])
def test_a_disk_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, operation):
    path = tmp_path / 'last'
    write(path, b'old')

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(OSError, match='No space left'):
        write(path, b'new')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['last']


def test_a_file_shorter_than_the_data_written_is_an_error(tmp_path):
    path = tmp_path / 'last'
    write(path, b'old')
    with pytest.raises(OSError, match='took less'), atomic_file(path) as file:
        writer = DigestWriter(file)
        writer.write(b'some data')
        file.flush()
        file.truncate(4)
        file.seek(4)
        writer.end()
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['last']


def test_only_leftovers_of_killed_processes_are_deleted(tmp_path):
    for name in ('.last.pdparams.12ab34cd.tmp', 'mine.tmp', '.hidden'):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['.hidden', 'mine.tmp']


def test_the_digest_detects_any_changed_bit_and_is_optional(tmp_path):
    path = tmp_path / 'file'
    with atomic_file(path) as file:
        writer = DigestWriter(file)
        writer.write(b'some')
        writer.write(b' data')
        writer.end()
    whole = path.read_bytes()
    assert len(whole) == 9 + DIGEST_BYTES

    def checked(data):
        path.write_bytes(data)
        with open(path, 'rb') as file:
            return check_digest(file, len(data)), file.tell()

    assert checked(whole) == (9, 0)
    for index in range(9):
        assert checked(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1:])[0] is None
    assert checked(whole[:-1] + bytes([whole[-1] ^ 1]))[0] is None
    for other in (b'', b'some data', b'x' * 1000):
        assert checked(other) == (len(other), 0)
