"""Images per second of the DataLoader where each image has to be waited for, as on a network file system.

    python benchmarks/bench_read_delay.py
    python benchmarks/bench_read_delay.py -delays_ms 10 -workers 4 -prefetch 1 2 4 -random

Nothing is read or computed: a worker waits for the delay of each image and returns an empty one of 32 pixels, so that
the figures are those of the DataLoader. The column "expected" is the number of workers divided by the delay. With
-random, delays are exponentially distributed with this mean.
"""
import sys
import time

import numpy as np
import paddle
from harness import ArgumentParser, UserError, exit_status

import loading.loader
from config import get_config
from datasets import get_dataloader


class SlowImages(paddle.io.Dataset):
    """Empty images that come after a delay.

    Args:
        count: number of images.
        delay: mean delay of an image, in seconds.
        random: whether delays are exponentially distributed.
    """

    def __init__(self, count, delay, random):
        super().__init__()
        self.count, self.delay, self.random = count, delay, random

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        time.sleep(self.delay * (np.random.default_rng(key).exponential() if self.random else 1))
        return np.zeros((3, 32, 32), np.float32), np.int64(0)


def images_per_s(config, dataset, prefetch):
    """Images per second after the first batch of each worker."""
    loading.loader.PREFETCH_FACTOR = prefetch
    loader = get_dataloader(config, dataset, 'val')
    start, seen, skip = None, 0, max(1, config.DATA.NUM_WORKERS)
    for number, (images, _) in enumerate(loader):
        if number < skip:
            start = time.perf_counter()
        else:
            seen += images.shape[0]
    return seen / (time.perf_counter() - start)


def read_arguments():
    parser = ArgumentParser(__doc__)
    for flag, kind, default, text in (
            ('delays_ms', float, [5, 20, 80], 'delays of an image in ms'),
            ('workers', int, [1, 2, 4, 8, 16, 32], 'numbers of workers'),
            ('prefetch', int, [2], 'batches that each worker loads ahead')):
        parser.add_argument(f'-{flag}', f'--{flag}', type=kind, nargs='+', default=default, help=text)
    parser.add_argument('-batch_size', '--batch_size', type=int, default=16, help='images in a batch')
    parser.add_argument('-batches', '--batches', type=int, default=6, help='batches per worker in a measurement')
    parser.add_argument('-random', '--random', action='store_true', help='delays of random length')
    args = parser.parse_args()
    if min(args.workers + args.prefetch) < 1 or min(args.delays_ms) <= 0 or args.batch_size < 1 or args.batches < 2:
        raise UserError('-workers, -prefetch and -batch_size must be at least 1, -batches 2, and -delays_ms above 0')
    return args


def main():
    args = read_arguments()
    print(f'{"delay":>8}{"workers":>9}{"prefetch":>10}{"images/s":>10}{"expected":>10}')
    for delay in args.delays_ms:
        for workers in args.workers:
            for prefetch in args.prefetch:
                config = get_config(opts=['DATA.IMAGE_SIZE', 32, 'DATA.BATCH_SIZE_EVAL', args.batch_size,
                                          'DATA.NUM_WORKERS', workers])
                dataset = SlowImages(workers * args.batch_size * args.batches, delay / 1000, args.random)
                print(f'{delay:>5g} ms{workers:>9}{prefetch:>10}{images_per_s(config, dataset, prefetch):>10,.0f}'
                      f'{1000 * workers / delay:>10,.0f}', flush=True)


if __name__ == '__main__':
    sys.exit(exit_status(main))
