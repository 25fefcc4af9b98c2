"""serve.py as a process, with workers that need no Paddle: limits, timeouts, lost workers, stopping."""
import asyncio
import errno
import importlib.util
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from service import FAKE, Service, raw_request

from errors import UserError
from serving import pool
from serving.limits import Limits
from serving.metrics import Metrics

pytestmark = [
    pytest.mark.skipif(not all(map(importlib.util.find_spec, ('starlette', 'uvicorn', 'python_multipart'))),
                       reason='needs requirements-serve.txt'),
    pytest.mark.skipif(sys.platform != 'linux', reason='finds processes in /proc')]


def name_of(result):
    status, _, answer = result
    assert status == 200, answer
    return answer['top'][0]['name']


def connect(service, sent, timeout=60):
    connection = socket.create_connection(('127.0.0.1', service.port), timeout=timeout)
    connection.sendall(sent)
    return connection


def received(connection):
    parts = []
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            part = b''
        if not part:
            return b''.join(parts)
        parts.append(part)


@pytest.fixture
def crowd():
    with ThreadPoolExecutor(24) as pool:
        yield pool


def test_a_killed_worker_loses_no_request(crowd):
    with Service('-batch_size=4', '-workers=2') as service:
        texts = [f'sleep 0.03 {number}' for number in range(40)]
        answers = [crowd.submit(service.post, [text.encode()]) for text in texts]
        time.sleep(0.2)
        service.kill_worker()
        assert [name_of(answer.result()) for answer in answers] == texts
        service.until(lambda: service.metric('worker_restarts_total') == 1)
        service.until(lambda: len(service.workers()) == 2)


def test_an_image_that_ends_workers_is_refused_and_those_beside_it_are_answered(crowd):
    with Service('-batch_size=8') as service:
        first = crowd.submit(service.post, [b'sleep 0.3'])
        time.sleep(0.1)
        texts = ['a', 'b', 'die', 'c', 'd']
        answers = [crowd.submit(service.post, [text.encode()]) for text in texts]
        assert name_of(first.result()) == 'sleep 0.3'
        status, _, answer = answers.pop(2).result()
        assert status == 500 and 'could not be processed' in answer['error']
        assert [name_of(answer.result()) for answer in answers] == ['a', 'b', 'c', 'd']
        assert service.metric('worker_restarts_total') == 2


def test_a_worker_that_hangs_is_replaced_and_its_request_ends_in_time():
    with Service('-timeout=2') as service:
        start = time.monotonic()
        status, _, answer = service.post([b'hang'])
        assert status == 504 and 'within 2 seconds' in answer['error'] and time.monotonic() - start < 20
        service.until(lambda: service.metric('worker_restarts_total') >= 1)
        service.until(lambda: service.request('GET', '/ready')[0] == 200)
        assert name_of(service.post([b'next'])) == 'next'


def test_a_full_queue_is_answered_with_retry_after(crowd):
    with Service('-queue=4', '-max_images=4', '-batch_size=1') as service:
        answers = [crowd.submit(service.post, [b'sleep 0.2 %d' % number]) for number in range(12)]
        results = [answer.result() for answer in answers]
        assert sorted({status for status, _, _ in results}) == [200, 503]
        assert sum(status == 200 for status, _, _ in results) >= 4
        assert all(1 <= int(headers['Retry-After']) <= 60 for status, headers, _ in results if status == 503)
        busy = crowd.submit(service.post, [b'sleep 1.5'])
        service.until(lambda: service.metric('queue_images') == 1)
        status, headers, answer = service.post([b'x'] * 4, '/batch')  # all or none
        assert status == 503 and 'queue is full' in answer['error'] and name_of(busy.result())
        assert service.metric('queue_images') == 0 and service.metric('held_bytes') == 0


def test_a_worker_that_sends_nonsense_is_replaced():
    with Service() as service:
        status, _, answer = service.post([b'garble'])
        assert status == 500 and 'two worker processes ended on it' in answer['error']
        assert name_of(service.post([b'next'])) == 'next'


@pytest.mark.parametrize('failing', [0, 1])
def test_a_worker_that_cannot_be_started(failing, monkeypatch, capsys):
    start, calls = asyncio.create_subprocess_exec, []

    async def flaky(*arguments, **options):
        calls.append(arguments)
        if len(calls) == failing + 1:
            raise BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable')
        return await start(*arguments, **options)

    async def run():
        workers = pool.WorkerPool({'batch_size': 1, 'cfg': None}, 1, Limits(), Metrics())
        try:
            await workers.start()
            answer, = workers.submit([b'sleep 0.2'], {})
            workers._workers[0].process.kill()
            return await asyncio.wait_for(answer, 30)
        finally:
            await workers.close()

    monkeypatch.setattr(pool, 'START', FAKE)
    monkeypatch.setattr(asyncio, 'create_subprocess_exec', flaky)
    if failing:  # a restart: it is tried again
        assert asyncio.run(run())['top'][0]['name'] == 'sleep 0.2' and len(calls) == 3
        assert 'a worker cannot be started: Resource temporarily unavailable; trying again' in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match='a worker cannot be started: Resource temporarily unavailable'):
            asyncio.run(asyncio.wait_for(run(), 10))


def test_slow_clients_are_cut_off_and_others_are_served_meanwhile():
    with Service('-slow=1') as service:
        upload = raw_request([b'x' * 100000])
        start = time.monotonic()
        connections = [connect(service, sent) for sent in (b'', upload[:40], upload[:5000])]
        reader = connect(service, raw_request([b'long']))  # for an answer of 16 MB
        assert name_of(service.post([b'quick'])) == 'quick'
        assert [received(connection)[:12] for connection in connections] == [b'', b'', b'HTTP/1.1 408']
        assert 0.9 < time.monotonic() - start < 20
        service.until(lambda: service.metric('requests_in_progress') == 0)
        time.sleep(1.5)
        assert len(received(reader)) < 15e6
        assert service.metric('held_bytes') == 0


def test_connections_that_are_cut_leave_nothing_behind():
    with Service() as service:
        whole = raw_request([b'sleep 0.05'])
        for cut in (1, 30, len(whole) - 40, len(whole) - 1, len(whole)):
            connect(service, whole[:cut]).close()
        service.until(lambda: service.metric('requests_in_progress') == service.metric('queue_images') == 0)
        assert service.metric('held_bytes') == 0 and name_of(service.post([b'after'])) == 'after'
        assert len(os.listdir(f'/proc/{service.process.pid}/fd')) < 30


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_accepted_requests_are_answered(crowd, number):
    with Service() as service:
        answers = [crowd.submit(service.post, [b'sleep 0.1 %d' % index]) for index in range(8)]
        service.until(lambda: service.metric('images_total{outcome="ok"}') + service.metric('queue_images') == 8)
        workers = service.workers()
        os.kill(service.process.pid, number)
        assert [name_of(answer.result()) for answer in answers] == [f'sleep 0.1 {index}' for index in range(8)]
        assert service.process.wait(60) == 0 and service.errors() == ''
        assert not any(os.path.exists(f'/proc/{worker}') for worker in workers)


def test_a_worker_ends_with_a_service_that_is_killed():
    with Service() as service:
        worker, = service.workers()
        service.process.kill()
        service.process.wait()
        service.until(lambda: not os.path.exists(f'/proc/{worker}')
                      or open(f'/proc/{worker}/stat').read().split()[2] == 'Z')


def test_an_api_key_is_required_where_it_is_set(tmp_path):
    (tmp_path / 'key.txt').write_text('secret\n')
    with Service(f'-api_key_file={tmp_path}/key.txt') as service:
        for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Authorization': 'Basic secret'},
                        {'X-API-Key': 'sécret'}):
            status, found, _ = service.post([b'x'], headers=headers)
            assert status == 401 and found['WWW-Authenticate'] == 'Bearer'
        for headers in ({'Authorization': 'Bearer secret'}, {'X-API-Key': 'secret'}):
            assert name_of(service.post([b'x'], headers=headers)) == 'x'
            assert service.request('GET', '/metrics', headers=headers)[0] == 200
        statuses = {path: service.request('GET', path)[0] for path in ('/', '/health', '/ready', '/model', '/metrics')}
        assert statuses == {'/': 200, '/health': 200, '/ready': 200, '/model': 401, '/metrics': 401}


def test_limits_on_sizes():
    with Service('-max_mb=0.1', '-max_images=3', '-max_requests=2') as service:
        large = b'x' * 110000
        for result, status, text in (
                (service.post([large]), 413, 'an image has more than 0.1 MiB'),
                (service.post([large * 2]), 413, 'the request has more than'),
                (service.post([b'a', large], '/batch'), 413, 'an image has more'),
                (service.post([b'a'] * 4, '/batch'), 400, 'more than 3 files'),
                (service.request('POST', '/predict', b'', {'Content-Length': '99999999999'}), 413, 'the request has')):
            assert result[0] == status and text in result[2]['error']
        head = b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n'
        waiting = [connect(service, head) for _ in range(2)]
        service.until(lambda: service.metric('requests_in_progress') == 2)
        status, headers, answer = service.post([b'a'])
        assert status == 503 and headers['Retry-After'] == '1' and 'at the same time' in answer['error']
        assert service.request('GET', '/health')[0] == 200
        for connection in waiting:
            connection.close()
        service.until(lambda: service.metric('requests_in_progress') == 0)
        assert b'HTTP/1.1 400' in received(connect(service, b'GET / HTTP/1.1\r\nX: ' + b'x' * 20000 + b'\r\n\r\n'))


def test_a_worker_that_cannot_start_ends_the_service_with_its_reason():
    with pytest.raises(RuntimeError) as error:
        Service('-cfg=missing', '-workers=2')
    assert str(error.value) == '2: -cfg=missing: no such file\n'
