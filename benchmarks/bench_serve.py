"""Measures serve.py on this machine: images per second against bare Predictor, and the times of requests.

    python benchmarks/bench_serve.py -model=output/RUN
    python benchmarks/bench_serve.py -cfg=configs/replknet_31b_1k_224.yaml -images=32   # random weights

Both get the same JPEG files of 500 x 375 pixels and the same largest batch. Predictor reads them from paths. The
service gets them over loopback from this script, which keeps a number of connections busy with one image per request.
The two take turns, round after round; the share is the median over the rounds of service / Predictor in the same round.
The processor time of all their processes, per image, depends less on what else the machine does.
With more connections than -queue, the rest is refused with 503, and this script tries again after 0.1 s.
"""
import asyncio
import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import harness
import numpy as np
from harness import ROOT, ArgumentParser, UserError
from PIL import Image

QUEUE = 64


def make_images(folder, count):
    """Writes JPEG files with the size and the detail of photographs; returns their paths."""
    rng = np.random.default_rng(0)
    paths = [os.path.join(folder, f'{number:04}.jpg') for number in range(count)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noise = rng.normal(0, 6, (375, 500, 3))
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def save_random(cfg, size, folder):
    """Saves a model of a settings file with random weights in a new run folder; returns its path."""
    import paddle_env  # noqa: F401, I001
    from config import config_text, get_config
    from replknet import build_replknet
    from run_folder.checkpoint import model_arrays, save_checkpoint
    config = get_config(cfg, ['DATA.IMAGE_SIZE', size] if size else ())
    run = os.path.join(folder, 'run')
    os.makedirs(run)
    with open(os.path.join(run, 'config.yaml'), 'w') as file:
        file.write(config_text(config))
    save_checkpoint(os.path.join(run, 'best.pdparams'), {
        'model': model_arrays(build_replknet(config)), 'weights_key': 'model', 'optimizer': {}, 'epoch': 0, 'step': 0,
        'best': {}, 'config': config_text(config)})
    return run


def child():
    """The process of bare Predictor."""
    sys.path.insert(0, ROOT)

    def make(case):
        from deploy.predictor import Predictor
        predictor = Predictor(case['model'], device='cpu', batch_size=case['batch_size'], features=True)
        return (lambda: [np.stack([p.logits for p in predictor(case['paths'])])]), {'version': predictor.backend}

    harness.serve(make)


@contextlib.contextmanager
def service(model, batch_size):
    """A running service: yields its port and the numbers of its processes."""
    # making random weights has imported paddle, which sets OMP_NUM_THREADS to 1
    environment = {key: value for key, value in os.environ.items() if key != 'OMP_NUM_THREADS'}
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'serve.py'), f'-model={model}', '-device=cpu', '-port=0',
         f'-batch_size={batch_size}', f'-queue={QUEUE}', '-max_requests=1000', '-timeout=600'],
        stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        if not line:
            raise UserError('serve.py did not start, see above')
        with open(f'/proc/{process.pid}/task/{process.pid}/children') as file:
            numbers = [process.pid, *map(int, file.read().split())]
        yield int(re.search(r':(\d+)$', line).group(1)), numbers
    finally:
        process.terminate()
        process.wait()


def processor_seconds(numbers):
    """Processor time that processes have used so far."""
    ticks = 0
    for number in numbers:
        with open(f'/proc/{number}/stat') as file:
            ticks += sum(map(int, file.read().rpartition(')')[2].split()[11:13]))
    return ticks / os.sysconf('SC_CLK_TCK')


def as_request(path):
    with open(path, 'rb') as file:
        image = file.read()
    body = (b'--edge\r\nContent-Disposition: form-data; name="image"; filename="x.jpg"\r\n\r\n' + image
            + b'\r\n--edge--\r\n')
    return (f'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=edge\r\n'
            f'Content-Length: {len(body)}\r\n\r\n').encode() + body


async def load(port, requests, connections):
    """Sends requests over some connections; returns (seconds for all, seconds of each that was answered, refusals)."""
    waiting, times, refused = list(requests), [], 0

    async def one():
        nonlocal refused
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        while waiting:
            request = waiting.pop()
            start = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b'\r\n\r\n')
            await reader.readexactly(int(re.search(rb'content-length: (\d+)', head).group(1)))
            status = int(head[9:12])
            if status == 200:
                times.append(time.perf_counter() - start)
                continue
            if status != 503:
                raise UserError(f'the service answered with status {status}')
            refused += 1
            waiting.append(request)
            writer.close()
            await asyncio.sleep(0.1)
            reader, writer = await asyncio.open_connection('127.0.0.1', port)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(connections)))
    return time.perf_counter() - start, times, refused


def measure(arguments, model, folder):
    """Yields a row for Predictor and for each number of connections."""
    paths = make_images(folder, arguments.images)
    requests = [as_request(path) for path in paths]
    case = {'model': model, 'batch_size': arguments.batch_size, 'paths': paths}
    bare = harness.System('predictor', [os.path.abspath(__file__), '-child'], os.cpu_count(), {})
    with contextlib.closing(bare), service(model, arguments.batch_size) as (port, numbers):
        version, own = bare.ask(setup=case)['version'], [bare.number]
        asyncio.run(load(port, requests[:2 * arguments.batch_size], arguments.batch_size))
        rates, used, found = [], [], {int(count): ([], [], [], []) for count in arguments.connections.split(',')}
        for _ in range(arguments.rounds):
            before = processor_seconds(own)
            rates.append(len(paths) / (bare.ask(calls=1, warm_up=False)['ms'][0] / 1000))
            used.append(processor_seconds(own) - before)
            for count, (shares, times, refusals, seconds_used) in found.items():
                before = processor_seconds(numbers)
                seconds, answered, refused = asyncio.run(load(port, requests, count))
                seconds_used.append(processor_seconds(numbers) - before)
                shares.append(len(paths) / seconds / rates[-1])
                times += answered
                refusals.append(refused)
    rate, images = statistics.median(rates), len(paths)
    yield row('Predictor', '', [1], rate, [arguments.batch_size / rate], used, images), version
    for count, (shares, times, refusals, used) in found.items():
        values = row('serve.py', count, shares, rate, times, used, images)
        yield {**values, 'answers': len(times), 'refused': sum(refusals)}, version


def row(system, connections, shares, rate, times, used, images):
    milliseconds, share = [1000 * value for value in times], statistics.median(shares)
    return {'system': system, 'connections': connections, 'images_per_s': round(share * rate, 2),
            'share': round(share, 3), 'cpu_ms': round(1000 * statistics.median(used) / images, 1),
            'median_ms': round(statistics.median(milliseconds), 1), 'p99_ms': round(np.percentile(milliseconds, 99), 1),
            'max_ms': round(max(milliseconds), 1), 'answers': '', 'refused': ''}


def main():
    if sys.argv[1:] == ['-child']:
        return child()
    parser = ArgumentParser(__doc__.splitlines()[0])
    for flag, default, text in (
            ('model', '', 'see serve.py'), ('cfg', '', 'instead of -model: a settings file, for random weights'),
            ('image_size', 0, 'with -cfg: pixels, instead of those of the file'),
            ('images', 64, 'images per round'), ('rounds', 5, 'interleaved rounds'), ('batch_size', 8, 'largest batch'),
            ('connections', '1,8,16,128', 'numbers of connections that are kept busy'),
            ('output', '', 'CSV file to write')):
        parser.add_argument(f'-{flag}', f'--{flag}', default=default, type=type(default), help=f'{text} (%(default)s)')
    arguments = parser.parse_args()
    if bool(arguments.model) == bool(arguments.cfg):
        raise UserError('give either -model or -cfg')
    arguments.threads = os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or save_random(arguments.cfg, arguments.image_size, folder)
        harness.report(measure(arguments, model, folder), arguments, lambda rows: print('\n' + harness.table(
            list(rows[0]), [list(values.values()) for values in rows])))


if __name__ == '__main__':
    sys.exit(harness.exit_status(main))
