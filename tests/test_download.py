"""Downloads from a server on this machine that breaks off, lies, is busy or sends something else."""
import contextlib
import hashlib
import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

import port_weights.download
import zoo
from errors import Interrupted, UserError
from port_weights.download import download

ROOT = Path(__file__).resolve().parents[1]
DATA = bytes(range(256)) * 1200  # several blocks
SHA256 = hashlib.sha256(DATA).hexdigest()[:8]
Answer = namedtuple('Answer', 'send length status headers wait')  # one response of the server, see `answer`


def answer(send=None, length=None, status=None, headers=(), wait=0):
    """Sends `send` bytes at most of the requested part and then breaks off, and claims `length` bytes (-1: none)."""
    return Answer(send, length, status, dict(headers), wait)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers['Range'])
        server.paths.append(self.path)
        script = server.script.pop(0) if server.script else answer()
        first = int(re.fullmatch(r'bytes=(\d+)-', self.headers['Range'])[1]) if self.headers['Range'] else 0
        if server.ignores_range:
            first = 0
        status = script.status or (416 if first >= len(server.data) else 206 if first else 200)
        body = server.data[first:] if status < 300 else b'sorry'
        self.send_response(status)
        headers = {'Content-Length': len(body) if script.length is None else script.length, **script.headers}
        if status == 206:
            headers.setdefault('Content-Range', f'bytes {first}-{len(server.data) - 1}/{len(server.data)}')
        for name, value in headers.items():
            if (name, value) != ('Content-Length', -1):
                self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[:script.send])
            self.wfile.flush()
            server.sent.set()
            time.sleep(script.wait)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of DATA; `script` holds its next answers, `ranges` the Range headers it got."""
    monkeypatch.setattr(port_weights.download, 'PAUSE', 0.001)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.daemon_threads = True
        server.data, server.ignores_range, server.sent = DATA, False, threading.Event()
        server.script, server.ranges, server.paths = [], [], []
        server.url = f'http://127.0.0.1:{server.server_address[1]}/weights.pth'
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights' / 'tiny.pth'


def fails(server, path, message, kept=None):
    """Asserts that the download fails with a line that matches `message`, and what is in the partial file then."""
    with pytest.raises(UserError, match=message) as error:
        download(server.url, str(path), SHA256, 'put tiny.pth into ./weights')
    assert '\n' not in str(error.value)
    assert not path.exists()
    part = Path(f'{path}.part')
    assert (part.read_bytes() if part.exists() else None) == kept
    assert (f'are kept in {part}' in str(error.value)) == (kept is not None)


def succeeds(server, path, ranges):
    download(server.url, str(path), SHA256)
    assert path.read_bytes() == DATA and os.listdir(path.parent) == [path.name]
    assert server.ranges == ranges


def test_a_whole_file(server, path, capsys):
    succeeds(server, path, [None])
    assert capsys.readouterr().err == ''


def test_a_file_that_is_there_is_checked_and_kept(server, path, capsys):
    path.parent.mkdir()
    path.write_bytes(DATA)
    succeeds(server, path, [])
    assert capsys.readouterr().err == f'{path}: there already; its SHA-256 begins with {SHA256}\n'
    path.write_bytes(b'the official one')
    with pytest.raises(UserError, match='is another file than the one to download.*move it away'):
        download(server.url, str(path), SHA256)
    assert path.read_bytes() == b'the official one' and server.ranges == []


def test_a_connection_that_breaks_off_is_continued(server, path, capsys):
    server.script = [answer(send=100_000), answer(send=0), answer(send=70_000)]
    succeeds(server, path, [None, 'bytes=100000-', 'bytes=100000-', 'bytes=170000-'])
    assert 'broke off after 0.1 MB of 0.3 MB; next attempt' in capsys.readouterr().err


def test_an_earlier_download_is_continued(server, path):
    path.parent.mkdir()
    Path(f'{path}.part').write_bytes(DATA[:1234])
    succeeds(server, path, ['bytes=1234-'])


def test_a_finished_partial_file_needs_no_server(server, path):
    path.parent.mkdir()
    Path(f'{path}.part').write_bytes(DATA)
    succeeds(server, path, [])


def test_a_server_that_ignores_range(server, path, capsys):
    server.ignores_range, server.script = True, [answer(send=100_000)]
    succeeds(server, path, [None, 'bytes=100000-'])
    assert 'starts again' in capsys.readouterr().err


@pytest.mark.parametrize('content_range', ['bytes 0-9/10', 'bytes 99999-307199/307200', 'nonsense', ''])
def test_a_server_that_continues_at_another_place(server, path, content_range):
    server.script = [answer(send=100_000), answer(headers={'Content-Range': content_range})]
    succeeds(server, path, [None, 'bytes=100000-', None])


def test_a_server_that_sends_a_piece_at_a_time(server, path):
    server.script = [answer(send=100_000), answer(send=50_000, length=50_000)]
    succeeds(server, path, [None, 'bytes=100000-', 'bytes=150000-'])


def test_a_partial_file_that_is_too_long(server, path, capsys):
    path.parent.mkdir()
    Path(f'{path}.part').write_bytes(DATA + b'?')
    succeeds(server, path, [f'bytes={len(DATA) + 1}-', None])
    assert 'starts again' in capsys.readouterr().err


def test_sizes_that_are_wrong_or_missing(server, path):
    server.script = [answer(length=len(DATA) + 5)]  # then it waits for the rest, in vain
    succeeds(server, path, [None])
    path.unlink()
    server.ranges.clear()
    server.script = [answer(length=-1)]
    succeeds(server, path, [None])
    path.unlink()
    server.script = [answer(length=1000)]
    fails(server, path, 'sent another file than the published one.*deleted')


def test_more_bytes_than_the_disk_has(server, path):
    server.script = [answer(length=10**18)]
    fails(server, path, r'needs another 1000000000000.0 MB, and [\d.]+ MB are free on the disk; nothing was downloaded')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk(server, path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: namedtuple('Usage', 'free')(10**9))
    path.parent.mkdir()
    os.symlink('/dev/full', f'{path}.part')
    with pytest.raises(UserError, match='No space left on device; nothing was downloaded'):
        download(server.url, str(path), SHA256)
    assert not path.exists()


def test_another_file(server, path):
    server.data = DATA[:-1] + b'?'
    fails(server, path, f'SHA-256 begins with {SHA256}.*Run the command again, or put tiny.pth into ./weights')


def test_the_rest_of_another_file(server, path):
    path.parent.mkdir()
    Path(f'{path}.part').write_bytes(b'?' * 1000)
    fails(server, path, 'sent another file')
    succeeds(server, path, ['bytes=1000-', None])


def test_a_login_page_in_place_of_the_file(server, path):
    path.parent.mkdir()
    Path(f'{path}.part').write_bytes(DATA[:1234])
    server.script = [answer(status=200, headers={'Content-Type': 'text/html; charset=utf-8'})]
    fails(server, path, 'sent a web page', kept=DATA[:1234])


@pytest.mark.parametrize('status', [404, 403, 410])
def test_a_file_that_is_not_there(server, path, status):
    server.script = [answer(status=status)]
    fails(server, path, f'the server answers {status} .*; put tiny.pth into ./weights')
    assert server.ranges == [None]


@pytest.mark.parametrize('status', [429, 500, 503])
def test_a_server_that_is_busy(server, path, status):
    server.script = [answer(status=status)] * 4
    succeeds(server, path, [None] * 5)
    path.unlink()
    server.script = [answer(send=1234)] + [answer(status=status)] * 5
    fails(server, path, f'the server answers {status}.*same command continues', kept=DATA[:1234])


def test_a_server_that_falls_silent(server, path, monkeypatch):
    monkeypatch.setattr(port_weights.download, 'TIMEOUT', 0.2)
    server.script = [answer(send=100_000, wait=1)]
    succeeds(server, path, [None, 'bytes=65536-'])  # it waited for the rest of the second block


def test_no_server(path, monkeypatch):
    monkeypatch.setattr(port_weights.download, 'PAUSE', 0.001)
    with pytest.raises(UserError, match=r'no connection \(.*\); check the network, and https_proxy.*nothing was'):
        download('http://127.0.0.1:9/weights.pth', str(path), SHA256)
    assert os.listdir(path.parent) == []


def test_a_proxy(server, path, monkeypatch):
    monkeypatch.setenv('http_proxy', server.url.rsplit('/', 1)[0])
    download('http://weights.example/tiny.pth', str(path), SHA256)
    assert server.paths == ['http://weights.example/tiny.pth'] and path.read_bytes() == DATA


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / 'weights').touch()
    with pytest.raises(UserError, match='weights: File exists'):
        download(server.url, str(tmp_path / 'weights' / 'tiny.pth'), SHA256)


# ---- the command

PROGRAM = f'''
import dataclasses, sys
import errors, zoo
class Tiny(zoo.Checkpoint):
    address = sys.argv.pop()
zoo.ZOO['tiny'] = Tiny('tiny', 'replknet_31b', 10, 224, '', None, None, 'Tiny.pth', 'drive', 'baidu', sha256='{SHA256}')
sys.exit(errors.exit_status(zoo.main))
'''


def start(server, folder):
    return subprocess.Popen([sys.executable, '-c', PROGRAM, '-download', 'tiny', server.url], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, 'PYTHONPATH': str(ROOT)},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell may ignore it


def test_ctrl_c_keeps_the_partial_file(server, tmp_path):
    server.script = [answer(send=200_000, wait=60)]
    process = start(server, tmp_path)
    assert server.sent.wait(60)
    part = tmp_path / 'weights' / 'tiny.pth.part'
    while not part.exists() or part.stat().st_size < 3 * 65536:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ''
    assert err.startswith('stopped; 0.2 MB are kept in ./weights/tiny.pth.part') and err.count('\n') == 1
    process = start(server, tmp_path)
    assert process.communicate(timeout=60) == ('./weights/tiny.pth: used for -pretrained=tiny\n', '')
    assert process.returncode == 0 and server.ranges == [None, 'bytes=196608-']


def test_processes_download_at_the_same_time(server, tmp_path):
    server.script = [answer(wait=1, length=len(DATA) + 1)]  # the connection stays open for a second
    processes = [start(server, tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in outputs] == ['./weights/tiny.pth: used for -pretrained=tiny\n'] * 3
    assert len(server.ranges) == 1 and os.listdir(tmp_path / 'weights') == ['tiny.pth']
    assert (tmp_path / 'weights' / 'tiny.pth').read_bytes() == DATA


def test_interruption_has_its_own_error(server, path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(port_weights.download, '_receive', interrupt)
    with pytest.raises(Interrupted, match='stopped; nothing was downloaded'):
        download(server.url, str(path), SHA256)


def test_addresses():
    for name, checkpoint in zoo.ZOO.items():
        assert (checkpoint.address is None) == (checkpoint.remeasured_top1 is None) == (checkpoint.sha256 is None)
        if checkpoint.address:
            row = f'| `{name}` | {checkpoint.address} |'
            assert row in (ROOT / 'docs' / 'weights.md').read_text(encoding='utf-8')
            assert checkpoint.address.endswith(f'-{checkpoint.sha256}.pth') and len(checkpoint.sha256) == 8


def test_a_name_without_an_address(run_script, tmp_path):
    done = run_script('zoo.py', '-download=replknet_31b_22k', cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    for text in ('RepLKNet-31B_ImageNet-22K.pth into ./weights', '1PYJiMszZYNrkZOeYwjccvxX8UHMALB7z', 'pan.baidu.com',
                 'replknet_31b_22k.pdparams'):
        assert text in done.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('flags', [['-download=replknet_31b'], ['-download='], ['-download'], ['-dowload=tiny']])
def test_mistakes_on_the_command_line(run_script, tmp_path, flags):
    done = run_script('zoo.py', *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and not os.listdir(tmp_path)


@pytest.mark.parametrize('file', ['replknet_31b_1k_224.safetensors', 'RepLKNet-31B_ImageNet-1K_224.pth'])
def test_another_file_of_the_name_is_used(server, tmp_path, file):
    (tmp_path / file).touch()
    assert zoo.download_weights('replknet_31b_1k_224', str(tmp_path)) == str(tmp_path / file)
