"""The endpoints of the service."""
import asyncio
import contextlib
import hmac
import json
import sys
import time
import traceback

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from serving.bodies import Held, parse, read_body, read_options
from serving.limits import Refusal
from serving.page import page

SAFE = {'X-Content-Type-Options': 'nosniff', 'Cache-Control': 'no-store', 'Referrer-Policy': 'no-referrer'}
PATHS = ('/', '/predict', '/batch', '/model', '/health', '/ready', '/metrics')
DRAINED = 2  # seconds for which the rest of a refused body is read, so that the client sees the response


class Service:
    """The application, without the server.

    Args:
        pool: `serving.pool.WorkerPool` that has started.
        limits: `Limits`.
        metrics: `Metrics`.
        key: the API key that clients must send, or '' for none.
    """

    def __init__(self, pool, limits, metrics, key=''):
        self._pool, self._limits, self._metrics, self._key = pool, limits, metrics, key
        self._running, self._held = 0, {'bytes': 0}
        self._html, self._policy = page(pool.model, limits, bool(key))
        self._router = Starlette(routes=[
            Route('/', self._page), Route('/predict', self._predict, methods=['POST']),
            Route('/batch', self._batch, methods=['POST']), Route('/model', self._model),
            Route('/health', self._health), Route('/ready', self._ready), Route('/metrics', self._text)],
            exception_handlers={404: _not_found, 405: _wrong_method, Refusal: _refused})
        self._router.router.redirect_slashes = False  # the redirect would repeat the Host header

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return
        start, status = time.monotonic(), 0

        async def send_and_note(message):
            nonlocal status
            status = message.get('status', status)
            await send(message)

        try:
            await self._router(scope, receive, send_and_note)
        except Exception:
            print('serve.py: ' + traceback.format_exc().rstrip(), file=sys.stderr, flush=True)
            if not status:
                with contextlib.suppress(Exception):
                    await _error(500, 'internal error')(scope, receive, send_and_note)
        path = scope['path'] if scope['path'] in PATHS else 'other'
        self._metrics.requests[path, status] += 1
        if path in ('/predict', '/batch'):
            self._metrics.seconds.add(time.monotonic() - start)

    async def _predict(self, request):
        return await self._answer(request, 'image', 1)

    async def _batch(self, request):
        return await self._answer(request, 'images', self._limits.images)

    async def _answer(self, request, field, most):
        unread = True
        try:
            with self._turn(), Held(self._held, self._limits.memory) as held:
                self._check_key(request)
                self._pool.check_queue()
                body = await asyncio.wait_for(
                    read_body(request, self._limits.body_bytes(most), held), self._limits.slow)
                unread = False
                images, options = await parse(request, body, field, most)
                options = read_options(options, self._pool.model)
                if any(len(image) > self._limits.image_bytes for image in images):
                    raise Refusal(413, f'an image has more than {self._limits.image_bytes / 2**20:.3g} MiB')
                results = await self._results(images, options)
        except Refusal:
            if unread and 'expect' not in request.headers:
                await _drain(request)
            raise
        except asyncio.TimeoutError:
            return _error(408, f'the request did not arrive within {self._limits.slow:g} seconds')
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; the number is that of nginx
        if field == 'images':
            return JSONResponse({'results': results}, headers=SAFE)
        if 'error' in results[0]:
            return _error(results[0]['status'], results[0]['error'])
        return JSONResponse(results[0], headers=SAFE)

    async def _results(self, images, options):
        """The answers of the workers, in the order of the images."""
        answers = self._pool.submit(images, options)
        _, late = await asyncio.wait(answers, timeout=self._limits.timeout)
        for answer in late:
            answer.cancel()
        results = [{'status': 504, 'error': f'there was no response within {self._limits.timeout:g} seconds'}
                   if answer in late else answer.result() for answer in answers]
        for result in results:
            self._metrics.images['error' if 'error' in result else 'ok'] += 1
        return results

    @contextlib.contextmanager
    def _turn(self):
        if self._running >= self._limits.requests:
            raise Refusal(503, 'too many requests at the same time; try again later', retry_after=1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _check_key(self, request):
        kind, _, sent = request.headers.get('authorization', '').partition(' ')
        sent = sent if kind.lower() == 'bearer' else request.headers.get('x-api-key', '')
        if self._key and not hmac.compare_digest(sent.encode(), self._key.encode()):
            raise Refusal(401, 'the API key is missing or wrong; send it as Authorization: Bearer KEY')

    async def _page(self, _):
        return HTMLResponse(self._html, headers={**SAFE, 'Content-Security-Policy': self._policy})

    async def _model(self, request):
        self._check_key(request)
        model, limits = self._pool.model, self._limits
        return JSONResponse({**model, 'limits': {
            'image_bytes': limits.image_bytes, 'pixels': limits.pixels, 'images': limits.images}}, headers=SAFE)

    async def _health(self, _):
        return JSONResponse({'status': 'ok'}, headers=SAFE)

    async def _ready(self, _):
        if self._pool.ready:
            return JSONResponse({'status': 'ready'}, headers=SAFE)
        return _error(503, 'no worker is ready', retry_after=1)

    async def _text(self, request):
        self._check_key(request)
        text = self._metrics.text(
            requests_in_progress=(self._running, 'Requests being read or processed.'),
            held_bytes=(self._held['bytes'], 'Bytes of the bodies of these requests.'),
            queue_images=(self._pool.accepted, 'Images accepted and not yet answered.'),
            ready=(int(self._pool.ready), 'Whether a worker is ready.'))
        return PlainTextResponse(text, media_type='text/plain; version=0.0.4', headers=SAFE)


def _error(status, message, retry_after=None):
    headers = {**SAFE, 'Connection': 'close'} if status in (401, 405, 408, 413, 503) else dict(SAFE)
    if retry_after:
        headers['Retry-After'] = str(retry_after)
    if status == 401:
        headers['WWW-Authenticate'] = 'Bearer'
    return Response(json.dumps({'error': message}), status, headers, 'application/json')


async def _drain(request):
    """Reads the rest of a refused body for a moment: many clients read the response only once they have sent all."""
    async def rest():
        async for _ in Request(request.scope, request.receive).stream():
            pass

    with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):
        await asyncio.wait_for(rest(), DRAINED)


async def _refused(_, error):
    return _error(error.status, str(error), error.retry_after)


async def _not_found(*_):
    return _error(404, f'unknown path; the paths are {" ".join(PATHS)}')


async def _wrong_method(_, error):
    response = _error(405, 'this path needs another method')
    response.headers['Allow'] = (error.headers or {}).get('Allow', 'GET')
    return response
