"""Starts serve.py as its users do, and sends it requests."""
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A worker without Paddle. An image is a text: what to do, and then anything. Its answer has the text as a name.
FAKE = r'''
import json, os, sys, time
sys.path[0] = sys.argv[1]
from serving.frames import frame, read_frame
def send(header):
    os.write(1, frame(header))
if json.loads(sys.argv[2])['cfg'] == 'missing':
    send({'fatal': '-cfg=missing: no such file'})
    sys.exit()
send({'ready': {'name': 'fake', 'classes': ['a', 'b'], 'backend': 'none', 'image_size': 8, 'cam': True,
                'features': True, 'exif': False}})
try:
    while True:
        request, data = read_frame(sys.stdin.buffer)
        text = data.decode()
        if text.startswith('die'):
            os._exit(9)
        if text.startswith('garble'):
            send([1, 2])
        if text.startswith('hang'):
            time.sleep(1000)
        if text.startswith('sleep'):
            time.sleep(float(text.split()[1]))
        name = text * 4000000 if text == 'long' else text
        send({'id': request['id'], 'top': [{'class': 0, 'name': name, 'score': 1.0}]})
        send({'batch': 1, 'seconds': 0.1})
except EOFError:
    pass
'''
WITH_FAKE = 'import sys; sys.path[0] = {root!r}; import serving.pool, serve; from errors import exit_status; ' \
    'serving.pool.START = {fake!r}; sys.exit(exit_status(serve.main))'


class Service:
    """A running service; a context manager.

    Args:
        flags: of serve.py, besides -port. Without -model a worker that needs no Paddle takes part, see FAKE.
        environment: environment variables to set.
    Attributes:
        port; process: that of the command.
    """

    def __init__(self, *flags, **environment):
        program = [str(ROOT / 'serve.py')]
        if not any('-model' in flag for flag in flags):
            program, flags = ['-c', WITH_FAKE.format(root=str(ROOT), fake=FAKE)], ('-model=none', *flags)
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, *program, '-port=0', *flags], stdout=subprocess.PIPE,
                                        stderr=self._errors, text=True, env={**os.environ, **environment})
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f'{self.process.wait()}: {self.errors()}')
        self.port = int(re.search(r':(\d+)$', line).group(1))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def errors(self):
        self._errors.seek(0)
        return self._errors.read().decode()

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, body); a JSON body is decoded."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            data = response.read()
            if response.headers.get_content_type() == 'application/json':
                data = json.loads(data)
            return response.status, response.headers, data
        finally:
            connection.close()

    def post(self, images, path='/predict', headers=None, **options):
        """The (status, headers, answer) to a form with files."""
        body, kind = form(images, 'images' if path == '/batch' else 'image', **options)
        return self.request('POST', path, body, {'Content-Type': kind, **(headers or {})})

    def metric(self, name):
        text = self.request('GET', '/metrics')[2].decode()
        return float(re.search(rf'^replknet_{re.escape(name)} (.*)$', text, re.MULTILINE).group(1))

    def workers(self):
        """Process numbers of the workers."""
        return [int(number) for number in Path(
            f'/proc/{self.process.pid}/task/{self.process.pid}/children').read_text().split()]

    def kill_worker(self):
        os.kill(self.workers()[0], signal.SIGKILL)

    def until(self, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.02)


def raw_request(images, length=None, **options):
    """The bytes of a request to /predict; `length` is a wrong Content-Length."""
    body, kind = form(images, **options)
    return (f'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n'
            f'Content-Length: {len(body) if length is None else length}\r\n\r\n').encode() + body


def form(images, field='image', **options):
    """(body, content type) of a form with files."""
    parts = [f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{number}.jpg"\r\n\r\n'.encode()
             + image + b'\r\n' for number, image in enumerate(images)]
    parts += [f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
              for name, value in options.items()]
    return b''.join(parts) + b'--edge--\r\n', 'multipart/form-data; boundary=edge'
