"""serve.py with a model: answers equal to those of Predictor, refusals, hostile requests, the page in a browser."""
import base64
import importlib.util
import io
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from hostile_requests import FLAGS, attacked
from PIL import Image
from service import ROOT, Service

import serve
from deploy.predictor import Predictor
from errors import UserError
from evaluation.activation_maps import class_overlays
from image_files.decode import decode_image
from serving.worker import Worker

pytestmark = [
    pytest.mark.skipif(not all(map(importlib.util.find_spec, ('starlette', 'uvicorn', 'python_multipart'))),
                       reason='needs requirements-serve.txt'),
    pytest.mark.skipif(sys.platform != 'linux', reason='finds processes in /proc')]


@pytest.fixture(scope='module')
def run(random_run, tmp_path_factory):
    """The run of `random_run` with names of classes, in a folder whose name must not be told."""
    folder = tmp_path_factory.mktemp('secret') / 'run'
    shutil.copytree(random_run, folder)
    (folder / 'classes.txt').write_text('ant\nbee\n<b>cow</b>\n鹿\n')
    return folder


@pytest.fixture(scope='module')
def service(run):
    with Service(f'-model={run}', '-device=cpu', *FLAGS) as started:
        yield started


@pytest.fixture(scope='module')
def predictor(run):
    return Predictor(str(run), device='cpu', features=True)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Paths of images in several formats; the last one is to be turned."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(3)
    for number, name in enumerate(('a.jpg', 'b.png', 'c.webp', 'd.gif', 'e.bmp', 'f.tif')):
        pixels = np.kron(rng.integers(0, 256, (5 + number, 7, 3)), np.ones((9, 9, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / 'turned.jpg', exif=exif)
    return sorted(folder.iterdir())


def agrees(answer, prediction, topk=4):
    assert [entry['class'] for entry in answer['top']] == prediction.classes[:topk]
    assert [entry['name'] for entry in answer['top']] == prediction.names[:topk]
    assert np.allclose([entry['score'] for entry in answer['top']], prediction.scores[:topk], atol=1e-6)


def test_answers_equal_those_of_the_predictor(service, predictor, files):
    predictions = predictor([str(path) for path in files])
    assert len({tuple(prediction.classes) for prediction in predictions}) > 1
    for path, prediction in zip(files, predictions):
        data = path.read_bytes()
        status, headers, answer = service.post([data])
        assert status == 200 and set(answer) == {'top'} and 'server' not in headers
        agrees(answer, prediction)
        for text in (base64.b64encode(data).decode(), 'data:image/png;base64,' + base64.b64encode(data).decode()):
            status, _, answer = service.request('POST', '/predict', json.dumps(
                {'image': text, 'topk': 2, 'features': True}), {'Content-Type': 'application/json'})
            agrees(answer, prediction, 2)
            assert np.allclose(answer['features'], prediction.features, atol=1e-5)
    status, _, answer = service.post([*(path.read_bytes() for path in files), b'no image'], '/batch', topk=1)
    assert status == 200 and len(answer['results']) == len(files) + 1
    for result, prediction in zip(answer['results'], predictions):
        agrees(result, prediction, 1)
    assert answer['results'][-1]['status'] == 415
    assert 'upright' not in answer and service.metric('batch_images_count') < service.metric('batch_images_sum')


def test_a_batch_starts_when_it_is_full_or_after_the_delay():
    worker = Worker.__new__(Worker)
    worker._decoded, worker._delay, worker._predictor = queue.Queue(), 1, SimpleNamespace(batch_size=4)
    for number in range(6):
        worker._decoded.put(number)
    start = time.monotonic()
    assert worker._next_batch() == [0, 1, 2, 3] and time.monotonic() - start < 1
    threading.Timer(0.05, worker._decoded.put, [6]).start()
    assert worker._next_batch() == [4, 5, 6] and 1 <= time.monotonic() - start < 20


def test_photos_of_phones_are_turned_on_request(service, predictor, files):
    turned = decode_image(str(files[-1]), exif=True)
    assert turned.size != decode_image(str(files[-1])).size
    status, _, answer = service.post([files[-1].read_bytes()], upright='true', cam='1')
    agrees(answer, predictor(turned)[0])
    shown, (overlay,) = class_overlays(predictor.network, predictor.settings, turned, [answer['cam']['class']])
    found = Image.open(io.BytesIO(base64.b64decode(answer['cam']['png'])))
    assert [answer['cam'][key] for key in ('class', 'name')] == [answer['top'][0][key] for key in ('class', 'name')]
    assert np.abs(np.asarray(found, int) - np.asarray(overlay, int)).max() <= 1


def test_what_cannot_be_used_is_refused_without_a_word_about_the_machine(service, files):
    data, kind = files[0].read_bytes(), {'Content-Type': 'application/json'}
    text = base64.b64encode(data).decode()

    def sent(value, path='/predict'):
        return service.request('POST', path, value if isinstance(value, bytes) else json.dumps(value), kind)

    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    large = io.BytesIO()
    Image.fromarray(noise // 64 * 64).save(large, 'JPEG', quality=20)
    for result, status, words in (
            (service.post([b'text']), 415, 'not an image in one of the formats'), (service.post([b'']), 415, 'formats'),
            (service.post([b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n']), 415, 'formats'),
            (service.post([data[:400]]), 422, 'damaged'), (service.post([large.getvalue()]), 413, '0.1 million pixels'),
            (service.post([]), 400, 'there is no image'), (service.post([data, data]), 400, 'more than 1 files'),
            (service.post([data], topk='many'), 400, 'topk'), (service.post([data], cam='maybe'), 400, 'cam'),
            (service.post([data], stage=1), 400, 'unknown option'), (service.post([], image='x'), 400, 'not a file'),
            (service.post([], url='http://x.y'), 400, 'URLs are not fetched'),
            (sent({'image': 'https://x.y/z.jpg'}), 400, 'URLs are not fetched'),
            (sent({'url': 'x'}), 400, 'URLs are not fetched'), (sent({'image': text[:-1] + '!'}), 400, 'base64'),
            (sent({'images': text}, '/batch'), 400, 'list of strings'), (sent([text]), 400, 'not an object'),
            (sent({'image': text, 'topk': True}), 400, 'topk'), (sent(b'{'), 400, 'not JSON'),
            (sent(b'[' * 99999), 400, 'not JSON'), (service.request('GET', '/predict'), 405, 'another method'),
            (service.request('POST', '/predict', data, {'Content-Type': 'image/jpeg'}), 415, 'multipart/form-data'),
            (service.request('GET', '/x'), 404, '/predict')):
        found, headers, answer = result
        assert found == status and words in answer['error'], result
        shown = f'{headers} {answer}'
        assert not re.search(r'secret|/tmp|Traceback|0x|uvicorn|python', shown, re.IGNORECASE), shown


def test_health_readiness_model_and_metrics(service, run):
    assert service.request('GET', '/health')[0] == service.request('GET', '/ready')[0] == 200
    model = service.request('GET', '/model')[2]
    assert model['classes'] == ['ant', 'bee', '<b>cow</b>', '鹿'] and model['cam'] and model['image_size'] == 32
    status, headers, text = service.request('GET', '/metrics')
    assert headers['Content-Type'].startswith('text/plain; version=0.0.4')
    for line in text.decode().splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) replknet_\w+ .+|replknet_\w+(\{(\w+="[^"]*",?)+\})? [0-9.e+-]+', line), line


def test_hostile_requests(service):
    seen, before, after = attacked(service, 150)
    assert {'mutated image', 'cut', 'malformed JSON', 'broken HTTP'} <= {kind for kind, _ in seen}
    assert seen['valid', 200] == 15 and after < before + 100


@pytest.mark.long
def test_ten_thousand_hostile_requests(service):
    seen, before, after = attacked(service, 10000, warm_up=1000)
    assert seen['valid', 200] == 1000 and after < before + 30


@pytest.mark.long
def test_kills_of_a_worker_lose_no_request(run, predictor, files):
    data, expected = [path.read_bytes() for path in files], predictor([str(path) for path in files])
    with Service(f'-model={run}', '-device=cpu') as own, ThreadPoolExecutor(16) as crowd:
        for kills in (1, 2, 3):
            answers = [crowd.submit(own.post, [data[number % len(data)]]) for number in range(300)]
            own.until(lambda: own.metric('queue_images') > 8)
            own.kill_worker()
            for number, answer in enumerate(answers):
                status, _, body = answer.result()
                assert status == 200
                agrees(body, expected[number % len(data)])
            assert own.metric('worker_restarts_total') == kills


@pytest.mark.parametrize(('flags', 'words'), [
    pytest.param(['-model=nowhere'], '-model=nowhere: no such file', marks=pytest.mark.long),
    (['-model=x', '-queue=0'], '-queue=0: must be at least 1'),
    (['-model=x', '-queue=4'], '-max_images=32'), (['-model=x', '-api_key_file=none.txt'], 'none.txt'),
    (['-model=x', '-host=256.1.1.1'], '-host=256.1.1.1')])
def test_mistakes_are_one_line(run_script, flags, words):
    done = run_script('serve.py', *flags)
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and words in line and done.stdout == ''


def test_a_port_that_is_taken(run_script, service):
    done = run_script('serve.py', '-model=x', f'-port={service.port}')
    assert done.returncode == 2 and 'already in use; choose another' in done.stderr


def test_two_services_that_start_at_the_same_port():
    from serving.server import listen, start_listening
    first = listen('127.0.0.1', 0)
    port = first.getsockname()[1]
    second, third = listen('127.0.0.1', port), listen('127.0.0.1', port)  # nobody listens yet
    with start_listening(first, '127.0.0.1', 0) as own:
        assert own is first
        with pytest.raises(UserError, match=f'-host=127.0.0.1 -port={port}: Address already in use; choose another'):
            start_listening(second, '127.0.0.1', port)
        with start_listening(third, '127.0.0.1', 0) as other:  # the system has chosen a port that was then taken
            assert other.getsockname()[1] != port and third.fileno() == -1


def test_without_the_packages_the_message_names_the_file(run_script, tmp_path):
    (tmp_path / 'uvicorn.py').write_text("raise ImportError('no', name='uvicorn')")
    done = run_script('serve.py', '-model=x', PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr == (
        'serve.py needs the package uvicorn: pip install -r requirements-serve.txt\n')


@pytest.mark.parametrize('key', [' ', 'clé', 'two words'])
def test_keys_that_no_sender_could_present_are_refused(monkeypatch, key):
    monkeypatch.setenv(serve.KEY, key)
    with pytest.raises(UserError, match='one word of ASCII'):
        serve.read_key(None)


def test_the_key_of_the_environment_is_not_left_for_the_workers(monkeypatch, tmp_path):
    monkeypatch.setenv(serve.KEY, 'abc')
    (tmp_path / 'key.txt').write_text('def\n')
    assert serve.read_key(tmp_path / 'key.txt') == 'def' and serve.KEY not in os.environ
    assert serve.read_key(None) == ''


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_the_page_in_a_browser(service, files):
    with Browser(f'http://127.0.0.1:{service.port}/') as page:
        assert page.value('document.documentElement.lang') == 'en'
        assert not page.value('document.querySelector("#secret").offsetParent')
        page.press('Tab')
        assert page.value('document.activeElement.id') == 'choose'
        page.choose('#files', files[0], files[1])
        page.until('document.querySelectorAll("article ol").length == 2')
        page.drop('#drop', files[2])
        page.until('document.querySelectorAll("article ol").length == 3')
        top = service.post([files[2].read_bytes()])[2]['top']
        assert page.value('[...document.querySelector("article").querySelectorAll(".row span:first-child")]'
                          '.map(node => node.textContent)') == [entry['name'] for entry in top]  # and no <b> element
        widths = page.value('[...document.querySelector("article").querySelectorAll(".bar div")]'
                            '.map(node => parseFloat(node.style.width))')
        assert widths == pytest.approx([100 * entry['score'] for entry in top], abs=0.01)
        assert page.value('[...document.images].every(image => image.complete && image.naturalWidth && image.alt)')
        assert page.value('document.images.length') == 6
        names = page.accessible()
        assert ('button', 'Choose images') in names and ('heading', files[2].name) in names
        assert any(role == 'status' for role, _ in names)
        status = page.value('document.querySelector("#status").textContent')
        assert status.startswith(f'{files[2].name}: {top[0]["name"]}')
        page.choose('#files', ROOT / 'serve.py')
        page.until('document.querySelector("article .error")')
        assert 'not an image' in page.value('document.querySelector("article .error").textContent')
        requested = {event['params']['request']['url'].split(':')[0] + event['params']['request']['url'][-8:]
                     for event in page.log if event['method'] == 'Network.requestWillBeSent'}
        assert {url for url in requested if url.startswith('http') and not url.endswith('/')} == {'http/predict'}
        assert not [event for event in page.log if event['method'] == 'Runtime.exceptionThrown'
                    or 'Content Security Policy' in str(event)]


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_a_key_that_no_header_takes_is_answered_like_a_wrong_one(files, tmp_path):
    (tmp_path / 'key').write_text('secret')
    with Service(f'-api_key_file={tmp_path}/key') as own, Browser(f'http://127.0.0.1:{own.port}/') as page:
        page.value('void (document.querySelector("#key").value = "ключ")')
        page.choose('#files', files[0])
        page.until('document.querySelector("article .error")')
        assert 'API key is missing or wrong' in page.value('document.querySelector("article .error").textContent')


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_the_page_on_a_phone_in_chinese(service, files):
    with Browser(f'http://127.0.0.1:{service.port}/', 390, 800, 'zh-CN', touch=True) as page:
        assert page.value('document.documentElement.lang') == 'zh-CN'
        assert page.value('document.title').startswith('图像分类')
        assert page.value('getComputedStyle(document.querySelector("#photo")).display') != 'none'
        assert page.value('document.querySelector("#camera").getAttribute("capture")') == 'environment'
        page.choose('#camera', files[-1])
        page.until('document.querySelector("article ol")')
        assert page.value('document.documentElement.scrollWidth') <= 390
        page.choose('#camera', os.path.abspath(__file__))
        page.until('document.querySelector("article .error")')
        assert page.value('document.querySelector("article .error").textContent') == '不支持此文件格式。'
        page.value('void (window.fetch = async () => new Response(JSON.stringify({top: []})))')  # no label
        page.choose('#camera', files[0])
        page.until('document.querySelectorAll("article").length == 3 && document.querySelector("article p")')
        assert page.value('document.querySelector("article p").outerHTML') == '<p>无标签</p>'
        assert page.value('document.querySelector("#status").textContent') == f'{files[0].name}：无标签'
