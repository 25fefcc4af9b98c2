"""Memory and start-up time of a run with a long list, which is generated: ImageNet-22K has 14,197,122 images.

    python benchmarks/bench_lists.py
    python benchmarks/bench_lists.py -count=1281167 -classes=1000 -num_workers=4

The images of the list do not exist; one small image stands for all of them. Memory is the proportional set size (PSS)
of the process and its workers: what they share counts once. The peak is that of the process itself.
"""
import json
import multiprocessing
import os
import sys
import tempfile
import time
import zlib

import numpy as np
from harness import ArgumentParser, UserError, exit_status
from PIL import Image

import paddle_env  # noqa: F401, I001 - before paddle
from config import get_config
from datasets import ImageNet2012Dataset, get_dataloader, get_transform
from dry_run.likely_mistakes import warnings_of_a_run
from dry_run.plan import make_plan
from image_files.lists import list_identity, read_list
from image_files.shards import ENTRIES, ENTRY, INDEX, VERSION, shard_name, shards_folder

PER_CLASS = 650  # about as many images as a class of ImageNet-22K has


class OneImage(ImageNet2012Dataset):
    """A dataset that reads one image for all of its paths."""

    def path(self, index):
        super().path(index)
        return os.path.join(self.root, 'image.jpg')


def write_data(folder, count, classes):
    """Writes the lists and the image."""
    Image.new('RGB', (64, 64)).save(os.path.join(folder, 'image.jpg'))
    with open(os.path.join(folder, 'train_list.txt'), 'w') as file:
        for start in range(0, count, PER_CLASS):
            label = start // PER_CLASS % classes
            file.write(''.join(f'train/n{label:08d}/n{label:08d}_{number}.JPEG {label}\n'
                               for number in range(start, min(start + PER_CLASS, count))))
    with open(os.path.join(folder, 'val_list.txt'), 'w') as file:
        file.write('image.jpg 0\n')


def write_shard(folder):
    """Writes an index whose entries are all the same image, the only one in the only shard of the list."""
    paths, labels = read_list(os.path.join(folder, 'train_list.txt'))
    shards = shards_folder(os.path.join(folder, 'train_list.txt'))
    os.mkdir(shards)
    with open(os.path.join(folder, 'image.jpg'), 'rb') as source, open(
            os.path.join(shards, shard_name(0)), 'wb') as shard:
        data = source.read()
        shard.write(data)
    entries = np.full(len(paths), np.array((0, len(data), zlib.crc32(data)), ENTRY))
    np.save(os.path.join(shards, ENTRIES), entries)
    with open(os.path.join(shards, INDEX), 'w') as file:
        json.dump({'version': VERSION, 'list': list_identity(paths, labels), 'crc32': zlib.crc32(entries),
                   'shards': [{'size': len(data), 'images': len(paths)}]}, file)


def memory(processes):
    """PSS of processes in MB."""
    total = 0
    for process in processes:
        with open(f'/proc/{process}/smaps_rollup') as file:
            total += next(int(line.split()[1]) for line in file if line.startswith('Pss:'))
    return total / 1024


def children():
    with open(f'/proc/self/task/{os.getpid()}/children') as file:
        return file.read().split()


def peak():
    """Largest resident set of this process so far, in MB."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith('VmHWM')) / 1024


def bench(folder, args):
    """Prints a row for each step of the start of a run."""
    config = get_config(opts=['DATA.DATA_PATH', folder, 'DATA.IMAGE_SIZE', 32, 'DATA.BATCH_SIZE', 64,
                              'DATA.NUM_WORKERS', args.num_workers, 'MODEL.NUM_CLASSES', args.classes])
    began, used = time.perf_counter(), time.process_time()

    def row(what, processes=()):
        seconds, busy = time.perf_counter() - began, time.process_time() - used
        print(f'{what:<34}{seconds:>8.1f} s{busy:>8.1f} s{memory([os.getpid(), *processes]):>10,.0f} MB'
              f'{peak():>10,.0f} MB', flush=True)

    print(f'{"until":<34}{"time":>10}{"CPU":>10}{"PSS":>13}{"peak":>13}')
    row('the program is imported')
    if args.warnings:  # as rank 0 of a run does before it reads the data
        list(warnings_of_a_run(make_plan(config, 'cpu', 1)))
        row('likely mistakes are looked for')
    kind = ImageNet2012Dataset if args.shards else OneImage
    dataset = kind(folder, 'train_list.txt', get_transform(config, 'train'), args.classes, train=True)
    row('the list is read')
    loader = get_dataloader(config, dataset)
    loader.set_epoch(1)
    next(iter(loader.batch_sampler))
    row('first batch of keys')
    batches = iter(loader)
    for _ in range(2 * max(1, args.num_workers)):
        next(batches)
    row(f'batches of {args.num_workers} workers', children())
    del batches
    list_identity(dataset.paths, dataset.labels)
    row('digest of the list')


def main():
    parser = ArgumentParser(__doc__)
    for flag, default, text in (('count', 14_197_122, 'lines'), ('classes', 21841, 'classes'),
                                ('num_workers', 8, 'DataLoader workers')):
        parser.add_argument(f'-{flag}', f'--{flag}', type=int, default=default, help=f'{text} (default: {default})')
    parser.add_argument('-warnings', '--warnings', action='store_true', help='look for likely mistakes first')
    parser.add_argument('-shards', '--shards', action='store_true', help='read the image from shards')
    args = parser.parse_args()
    if args.count < 64 or args.classes < 1 or args.num_workers < 0:
        raise UserError('-count must be at least 64, -classes at least 1 and -num_workers at least 0')
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder, args.count, args.classes)
        if args.shards:
            process = multiprocessing.get_context('fork').Process(target=write_shard, args=(folder,))
            process.start()
            process.join()
        bench(folder, args)


if __name__ == '__main__':
    sys.exit(exit_status(main))
