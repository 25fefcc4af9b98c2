"""Serves a trained model over HTTP: `python serve.py -model=MODEL`, then open http://127.0.0.1:8000.

    python serve.py -model=replknet_31b_1k_224
    python serve.py -model=output/RUN -host=0.0.0.0 -port=8080 -api_key_file=key.txt
    curl -F image=@cat.jpg -F topk=3 http://127.0.0.1:8000/predict

Needs `pip install -r requirements-serve.txt`. Worker processes compute; after SIGTERM or Ctrl-C, the service
answers what it has accepted and stops. docs/serve.md describes the endpoints and the limits.
"""
from errors import default_interrupt  # noqa: I001
if __name__ == '__main__':
    default_interrupt()

import asyncio
import os
import sys

from errors import ArgumentParser, UserError, exit_status
from serving.limits import Limits
from serving.metrics import Metrics

KEY = 'REPLKNET_API_KEY'  # environment variable; on the command line, every user of the machine could read it
NUMBERS = (  # flag, default, least value, help
    ('port', 8000, 0, 'port; 0 for a free one'),
    ('batch_size', 8, 1, 'maximum number of images per forward pass'),
    ('delay', 5, 0, 'milliseconds that a batch waits to fill up'),
    ('workers', 1, 1, 'worker processes, each with its own copy of the model and its share of the cores'),
    ('queue', Limits.queue, 1, 'images accepted and not yet answered; further ones are refused with 503'),
    ('max_images', Limits.images, 1, 'maximum number of images in a request to /batch'),
    ('max_mb', Limits.image_bytes / 2**20, 0.001, 'maximum size of an encoded image, in MiB'),
    ('max_megapixels', Limits.pixels / 1e6, 0.001, 'maximum size of an image, in million pixels'),
    ('max_requests', Limits.requests, 1, 'maximum number of concurrent requests'),
    ('timeout', Limits.timeout, 0.1, 'seconds from the last byte of a request to its response'),
    ('slow', Limits.slow, 0.1, 'seconds for a client to send the headers, to send the body, and to read the response'))


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('-model', '--model', required=True, help='zoo name, run folder, checkpoint or exported model')
    for flag, default, text in (
            ('cfg', None, 'settings file (YAML), if there is none next to the weights'),
            ('host', '127.0.0.1', 'address to listen on; 0.0.0.0 for all'),
            ('device', 'auto', 'auto, gpu, cpu, npu or xpu'),
            ('backend', 'auto', 'auto, dygraph or inference; only dygraph gives class activation maps'),
            ('precision', None, 'fp32 (default), bf16, or auto for the fastest of both on this CPU; an export is '
             'computed in its own'),
            ('api_key_file', None, f'file with the key that clients must send; or set the environment variable {KEY}')):
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, help=text)
    for flag, default, _, text in NUMBERS:
        kind = float if flag in ('delay', 'max_mb', 'max_megapixels', 'timeout', 'slow') else int
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, type=kind, help=f'{text} (default {default:g})')
    args = parser.parse_args(argv)
    for flag, _, least, _ in NUMBERS:
        if not least <= getattr(args, flag) < 1e9:
            raise UserError(f'-{flag}={getattr(args, flag):g}: must be at least {least}, and below 1e9')
    if args.max_images > args.queue:
        raise UserError(f'-max_images={args.max_images}: such a request never fits into -queue={args.queue}')
    return args


def read_key(path):
    """The API key from a file or from the environment; '' for none."""
    source, key = KEY, os.environ.pop(KEY, '')
    if path is not None:
        with open(path, encoding='utf-8') as file:
            source, key = f'-api_key_file={path}', file.read()
    elif not key:
        return ''
    key = key.strip()
    if not key or not key.isascii() or len(key.split()) > 1:
        raise UserError(f'{source}: must contain one word of ASCII characters')
    return key


async def run(args, listener, key):
    from serving.app import Service
    from serving.pool import WorkerPool
    from serving.server import serve, start_listening
    limits = Limits(int(args.max_mb * 2**20), int(args.max_megapixels * 1e6), args.max_images, args.queue,
                    args.max_requests, args.timeout, args.slow)
    metrics = Metrics()
    settings = {'model': args.model, 'cfg': args.cfg, 'device': args.device, 'backend': args.backend,
                'precision': args.precision, 'batch_size': args.batch_size, 'pixels': limits.pixels,
                'delay': args.delay / 1000}
    pool = WorkerPool(settings, args.workers, limits, metrics)
    try:
        await pool.start()
        listener = start_listening(listener, args.host, args.port)
        host, port = listener.getsockname()[:2]
        print(f'{pool.model["name"]} ({pool.model["backend"]}) on http://{f"[{host}]" if ":" in host else host}:{port}',
              flush=True)
        await serve(Service(pool, limits, metrics, key), listener, limits, pool.drain)
    finally:
        await pool.close()


def main():
    args = read_arguments()
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'serve.py needs the package {error.name}: pip install -r requirements-serve.txt') from None
    from serving.server import listen
    key, listener = read_key(args.api_key_file), listen(args.host, args.port)
    if not key and args.host not in ('127.0.0.1', 'localhost', '::1'):
        print(f'serve.py: anyone who can reach {args.host} can use this service; set a key with -api_key_file',
              file=sys.stderr, flush=True)
    asyncio.run(run(args, listener, key))


if __name__ == '__main__':
    sys.exit(exit_status(main))
