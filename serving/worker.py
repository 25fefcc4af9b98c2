"""A worker process: decodes images and computes predictions in batches. serving/pool.py starts it.

It reads messages from standard input and ends when the input ends. A damaged image that crashes a decoder ends only
this process.
"""
import os

os.environ.setdefault('GLOG_minloglevel', '2')
import paddle_env  # noqa: E402, F401, I001 - sets the environment, so before paddle

import base64
import io
import json
import queue
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from deploy.layout import CERTIFICATE, is_export
from deploy.predictor import Predictor
from errors import UserError, one_line
from evaluation.activation_maps import class_overlays
from serving.frames import frame, read_frame
from serving.images import decode, formats
from serving.limits import Refusal


class Worker:
    """Answers the messages of the service.

    A message {id, topk, cam, features, upright} has the bytes of an image; its answer is {id, top, ...} or
    {id, status, error}. After each batch comes {batch: images, seconds}. Threads decode while the model computes. A
    batch starts when it is full, or `delay` seconds after the first of its images was taken.

    Args:
        settings: dict of arguments of `Predictor` and of 'pixels' and 'delay'.
        send: function that takes a header.
    """

    def __init__(self, settings, send):
        self._pixels, self._delay, self._send = settings.pop('pixels'), settings.pop('delay'), send
        self._predictor = Predictor(features=gives_features(settings['model']), **settings)
        self._formats, self._decoded = formats(), queue.Queue()
        size = self._predictor.settings.DATA.IMAGE_SIZE
        self._predictor([np.zeros((size, size, 3), np.uint8)])  # the first call allocates and chooses kernels
        Image.MAX_IMAGE_PIXELS = self._pixels

    def description(self):
        predictor = self._predictor
        return {'name': predictor.settings.MODEL.NAME, 'classes': predictor.names, 'backend': predictor.backend,
                'image_size': predictor.settings.DATA.IMAGE_SIZE, 'cam': predictor.network is not None,
                'features': predictor.features, 'exif': predictor.exif}

    def run(self, file):
        threading.Thread(target=self._receive, args=(file,), daemon=True).start()
        while True:
            self._answer(self._next_batch())

    def _receive(self, file):
        with ThreadPoolExecutor(cores()) as pool:
            try:
                while True:
                    pool.submit(self._decode, *read_frame(file))
            except EOFError:
                os._exit(0)  # the service has ended, or no longer needs this process

    def _decode(self, request, data):
        try:
            image = decode(data, self._formats, self._pixels, request['upright'])
            self._decoded.put((request, data, self._predictor.transform(image)))
        except Refusal as error:
            self._send({'id': request['id'], 'status': error.status, 'error': str(error)})
        except Exception as error:
            self._fail(request, error)

    def _next_batch(self):
        batch = [self._decoded.get()]
        deadline = time.monotonic() + self._delay
        while len(batch) < self._predictor.batch_size:
            try:
                batch.append(self._decoded.get(timeout=max(0, deadline - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def _answer(self, batch):
        start = time.monotonic()
        self._predictor.topk = max(request['topk'] for request, _, _ in batch)
        try:
            predictions = self._predictor.predictions([None] * len(batch), [array for _, _, array in batch])
        except Exception as error:
            for request, _, _ in batch:
                self._fail(request, error)
            return
        self._send({'batch': len(batch), 'seconds': time.monotonic() - start})
        for (request, data, _), prediction in zip(batch, predictions):
            try:
                self._send(self._result(request, data, prediction))
            except Exception as error:
                self._fail(request, error)

    def _result(self, request, data, prediction):
        if prediction.error:
            return {'id': request['id'], 'status': 500, 'error': "the model's logits are not finite"}
        top = zip(prediction.classes, prediction.names, prediction.scores)
        result = {'id': request['id'], 'top': [{'class': number, 'name': name, 'score': score} for (
            number, name, score), _ in zip(top, range(request['topk']))]}
        if request['features']:
            result['features'] = prediction.features.tolist()
        if request['cam']:
            guess = int(np.argmax(prediction.logits))  # with several labels per image, none may reach the threshold
            image = decode(data, self._formats, self._pixels, request['upright'])
            _, (overlay,) = class_overlays(self._predictor.network, self._predictor.settings, image, [guess])
            file = io.BytesIO()
            overlay.save(file, format='PNG')
            result['cam'] = {'class': guess, 'name': self._predictor.names[guess],
                             'png': base64.b64encode(file.getvalue()).decode()}
        return result

    def _fail(self, request, error):
        print(f'serve.py: an image failed: {type(error).__name__}: {one_line(error)}', file=sys.stderr, flush=True)
        self._send({'id': request['id'], 'status': 500, 'error': 'internal error'})


def gives_features(model):
    """Whether a model gives pooled features: all do, except programs exported without them."""
    if not is_export(model):
        return True
    with open(os.path.join(model, CERTIFICATE), encoding='utf-8') as file:
        return bool(json.load(file).get('features'))


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def share(number, workers):
    """Binds worker `number` to its share of the cores; it has as many threads as cores."""
    if workers > 1 and hasattr(os, 'sched_setaffinity'):
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, own[number::workers] or own[number % len(own):][:1])


def main():
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a terminal or a systemd unit
        signal.signal(number, signal.SIG_IGN)  # this process ends with its standard input, after its last answer
    output = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # a library that prints would break the messages
    lock = threading.Lock()

    def send(header):
        with lock:
            output.write(frame(header))
            output.flush()

    try:
        settings = json.loads(sys.argv[2])
        share(*settings.pop('share'))
        worker = Worker(settings, send)
    except (UserError, OSError) as error:
        send({'fatal': one_line(error)})
        return
    send({'ready': worker.description()})
    worker.run(sys.stdin.buffer)
