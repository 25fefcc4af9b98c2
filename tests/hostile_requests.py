"""Sends hostile requests to a service and valid ones beside them: `python tests/hostile_requests.py -model=RUN`.

    python tests/hostile_requests.py -model=output/RUN -requests=10000

It starts serve.py, sends mutated images, wrong types, malformed forms and JSON, broken HTTP, huge headers, slow senders
and connections that are cut, and checks: every answer is one of the documented ones and names nothing of the machine,
each valid request beside them gets the answer of an undisturbed service, no process ends, and nothing is left behind:
requests, memory, files.
"""
import asyncio
import base64
import collections
import io
import json
import os
import random
import re
import struct
import sys
import time
import zlib

import numpy as np
from PIL import Image

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
from service import Service, form, raw_request  # noqa: E402

from errors import ArgumentParser, exit_status  # noqa: E402

ANSWERS = {200, 400, 401, 404, 405, 408, 411, 413, 414, 415, 422, 431, 503}  # never 500: that is a defect of ours
SECRETS = re.compile(rb'/tmp|/home|/root|/usr|Traceback|site-packages|\.py\b|0x[0-9a-f]{6}|uvicorn|starlette|127\.0',
                     re.IGNORECASE)
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF')
SIDE_BY_SIDE = 24  # connections
PATHS = ('/predict', '/batch')
NO_IMAGES = (b'', b'GIF89a', b'%!PS-Adobe-3.0 EPSF', b'<svg xmlns="http://www.w3.org/2000/svg"/>', b'RIFF\0\0\0\0WEBP',
             b'II*\0\xff\xff\xff\xff', b'BM' * 50)
NO_JSON = ('{"image": 5}', '[' * 100000, '{"image": "http://127.0.0.1:1/x.png"}', '{"url": "file:///etc/passwd"}',
           'null', '{"image": ["a"], "topk": 1e999}', '{"images": [null]}', '\ud800', '{"image": "ab\\u0000"}')
CHUNKED = b'POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n'
NO_HTTP = (*(CHUNKED + rest for rest in (b'FFFFFFFFFFFFFFFF\r\n', b'-1\r\n', b'5\r\nab', b'zz\r\n\r\n')),
           b'GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n',
           b'PRI * HTTP/2.0\r\n\r\nSM\r\n')
FLAGS = ('-slow=3', '-max_mb=0.2', '-max_megapixels=0.1', '-max_images=8', '-max_requests=256', '-queue=256')


def images(rng):
    """A valid file of each format."""
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    files = []
    for name in FORMATS:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((80, 60), Image.BICUBIC).save(file, format=name)
        files.append(file.getvalue())
    return files


def mutated(rng, data):
    """Bytes with some changed, cut out, repeated or set to extreme values."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(5)
        if kind == 0:
            data[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at:at + 4] = rng.choice((b'\0\0\0\0', b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\x80\0\0\0'))
        elif kind == 2:
            del data[at:at + rng.randrange(1, 64)]
        elif kind == 3:
            data[at:at] = data[at:at + rng.randrange(1, 64)]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def bomb(rng):
    """A PNG file whose header claims a huge image."""
    file = io.BytesIO()
    Image.new('1', (8, 8)).save(file, format='PNG')
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack('>II', rng.choice((2, 1001, 30000, 2**31 - 1)), rng.choice((1000, 40000, 2**31 - 1)))
    data[29:33] = struct.pack('>I', zlib.crc32(data[12:29]))
    return bytes(data)


def post(body, kind, path='/predict', extra=b''):
    return (f'POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n').encode() \
        + extra + b'\r\n' + body


def request(rng, files):
    """(name of the kind, bytes to send) of a hostile request."""
    file, kind = rng.choice(files), rng.randrange(12)
    text = base64.b64encode(file).decode()
    if kind <= 3:
        data = mutated(rng, file)
        return 'mutated image', raw_request([data], cam=rng.choice(('true', 'false')), upright=rng.choice('01'))
    if kind == 4:
        return 'bomb', raw_request([bomb(rng)])
    if kind == 5:
        return 'no image', raw_request([rng.choice((*NO_IMAGES, rng.randbytes(rng.randrange(3000))))])
    if kind == 6:
        body, header = form([file] * rng.choice((1, 1, 9)), rng.choice(('image', 'images', '../x', '')),
                            topk=rng.choice((-1, 0, 'x', 10**30, '')), cam=rng.choice(('maybe', 'true', 'é')))
        header = rng.choice((header, 'multipart/form-data', header + '\u00e9', header[:-3]))
        return 'malformed form', post(mutated(rng, body), header, rng.choice(PATHS))
    if kind == 7:
        value = rng.choice((
            *NO_JSON, f'{{"image": "{text}", "topk": NaN}}', json.dumps({'image': text[:-3]}),
            json.dumps({'image': text, 'topk': [1], 'a' * 999: 1}), json.dumps({'images': [text] * 9}),
            json.dumps({'image': 'data:image/png;base64,' + text[5:]})))
        return 'malformed JSON', post(value.encode('utf-8', 'surrogatepass'), 'application/json', rng.choice(PATHS))
    if kind == 8:
        return 'huge headers', raw_request([file]).replace(
            b'Host: x', b'X-%d: ' % rng.randrange(9) + b'h' * rng.choice((1000, 20000, 200000)) + b'\r\nHost: x', 1)
    if kind == 9:
        path = rng.choice(('/../../etc/passwd', '/%2e%2e/x', '//host/', '/predict/', '/\u00e9', '/x' * 3000, '*',
                           '/?a=%ff'))
        method = rng.choice(('GET', 'PUT', 'OPTIONS', 'HEAD', 'TRACE', 'CONNECT', 'X'))
        return 'wrong path', f'{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n'.encode()
    if kind == 10:
        return 'broken HTTP', rng.choice((
            *NO_HTTP, b'\x16\x03\x01' + rng.randbytes(200), mutated(rng, raw_request([file])),
            raw_request([file], length=rng.choice((-1, 1, 10**9, 10**25, 'x')))))
    return 'wrong type', post(file, rng.choice(('image/png', 'text/html', '', 'application/xml', 'a' * 500)))


async def send(port, data, rng, how):
    """The bytes of the answer to a request; b'' if there is none or it was not awaited."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    try:
        if how == 'cut':
            writer.write(data[:rng.randrange(len(data) + 1)])
            await writer.drain()
            if rng.random() < 0.5:
                writer.transport.abort()
            return b''
        if how == 'slow':
            for at in range(0, len(data), len(data) // 20 + 1):
                writer.write(data[at:at + len(data) // 20 + 1])
                await writer.drain()
                await asyncio.sleep(rng.choice((0.01, 0.5)))
        writer.write(b'' if how == 'slow' else data)
        await writer.drain()
        return await asyncio.wait_for(read_answer(reader), 60)
    except (ConnectionError, asyncio.TimeoutError) as error:
        assert not isinstance(error, asyncio.TimeoutError), f'no answer and no end in 60 seconds: {data[:300]}'
        return b''
    finally:
        writer.close()


async def read_answer(reader):
    """The bytes of an answer with a Content-Length; b'' if the connection is closed instead."""
    head = b''
    try:
        head = await reader.readuntil(b'\r\n\r\n')
        length = re.search(rb'content-length: (\d+)', head, re.IGNORECASE)
        return head + (await reader.readexactly(int(length.group(1))) if length else await reader.read())
    except asyncio.IncompleteReadError as error:
        return head + error.partial


def check(kind, data, answer):
    """The status of an answer, 0 for none. AssertionError if it is not one that we document, or tells too much."""
    if not answer:
        return 0
    match = re.match(rb'HTTP/1\.[01] (\d{3}) ', answer)
    assert match, f'{kind}: the answer is not HTTP: {answer[:200]}'
    status = int(match.group(1))
    assert status in ANSWERS, f'{kind}: status {status}: {data[:300]} -> {answer[:500]}'
    head, _, body = answer.partition(b'\r\n\r\n')
    assert not SECRETS.search(head), head
    if not body.startswith(b'<!DOCTYPE html>') and b'"png"' not in body:
        assert not SECRETS.search(body), body[:500]
    return status


async def attack(service, count, seed=0):
    """Sends `count` hostile requests and a valid one after every tenth.

    Returns:
        Counter of (kind, status); the status 0 is a connection that was closed without an answer.
    """
    rng = random.Random(seed)
    files = images(rng)
    valid = [post(json.dumps({'image': base64.b64encode(file).decode(), 'features': True}).encode(), 'application/json',
                  extra=b'Connection: close\r\n') for file in files]
    expected = [await send(service.port, data, rng, 'whole') for data in valid]
    assert all(answer.startswith(b'HTTP/1.1 200') for answer in expected)
    expected = [json.loads(answer.partition(b'\r\n\r\n')[2]) for answer in expected]
    seen, gate = collections.Counter(), asyncio.Semaphore(SIDE_BY_SIDE)

    async def one(number):
        async with gate:
            own = random.Random(f'{seed} {number}')
            if number % 11 == 10:
                which = own.randrange(len(valid))
                answer = await send(service.port, valid[which], own, 'whole')
                assert answer.startswith(b'HTTP/1.1 200'), answer[:300]
                same(json.loads(answer.partition(b'\r\n\r\n')[2]), expected[which])
                seen['valid', 200] += 1
                return
            kind, data = request(own, files)
            how = own.choices(('whole', 'cut', 'slow'), (85, 12, 3))[0]
            answer = await send(service.port, data, own, how)
            seen[kind if how == 'whole' else how, check(kind, data, answer)] += 1

    tasks = [asyncio.create_task(one(number)) for number in range(count * 11 // 10)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return seen


def same(found, expected):
    """AssertionError unless two answers agree; in a batch of another size the last digits may differ."""
    assert [entry['class'] for entry in found['top']] == [entry['class'] for entry in expected['top']]
    assert np.allclose(found['features'], expected['features'], rtol=1e-4, atol=1e-5)
    scores = [[entry['score'] for entry in answer['top']] for answer in (found, expected)]
    assert np.allclose(*scores, atol=1e-5)


def resources(service):
    """(MiB of memory, open files) of all processes of a service."""
    numbers = [service.process.pid, *service.workers()]
    memory = sum(int(re.search(r'VmRSS:\s+(\d+)', open(f'/proc/{number}/status').read()).group(1))
                 for number in numbers)
    return memory / 1024, sum(len(os.listdir(f'/proc/{number}/fd')) for number in numbers)


def attacked(service, count, seed=0, warm_up=0):
    """Attacks a service, and checks that nothing is left behind.

    Args:
        service: `Service` with a model and FLAGS.
        count: hostile requests; `warm_up` others before memory is measured first.
        seed: for the requests.
    Returns:
        (Counter of (kind, status), memory before and after in MiB).
    """
    workers, restarts = service.workers(), service.metric('worker_restarts_total')
    if warm_up:
        asyncio.run(attack(service, warm_up, seed + 1))
        time.sleep(2)  # until connections that were cut late are closed
    before, files = resources(service)
    seen = asyncio.run(attack(service, count, seed))
    service.until(lambda: service.metric('requests_in_progress') == service.metric('queue_images') == 0)
    service.until(lambda: resources(service)[1] <= files)
    assert service.metric('held_bytes') == 0
    assert service.workers() == workers and service.metric('worker_restarts_total') == restarts, service.errors()
    assert 'Traceback' not in service.errors() and 'an image failed' not in service.errors(), service.errors()
    return seen, before, resources(service)[0]


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('-model', required=True, help='see serve.py')
    parser.add_argument('-requests', type=int, default=10000, help='hostile requests')
    parser.add_argument('-seed', type=int, default=0, help='for the requests')
    args = parser.parse_args()
    start = time.monotonic()
    with Service(f'-model={args.model}', *FLAGS) as service:
        seen, before, after = attacked(service, args.requests, args.seed, warm_up=args.requests // 10)
    for (kind, status), count in sorted(seen.items()):
        print(f'{kind:16} {status or "closed":>6} {count:6}')
    print(f'{sum(seen.values())} requests in {time.monotonic() - start:.0f} s, '
          f'memory {before:.0f} MiB before and {after:.0f} MiB after')


if __name__ == '__main__':
    sys.exit(exit_status(main))
