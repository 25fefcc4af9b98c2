"""Measures the input pipeline: images per second by stage, beside timm and torchvision, and by number of workers.

    taskset -c 1 python benchmarks/bench_transforms.py                  # stages, and other libraries if installed
    python benchmarks/bench_transforms.py -workers=0,1,2                # the DataLoader; needs Paddle

The pipelines take turns, round after round, on the same files. The figures are medians of the rounds and come from CPU
time, so that other processes on the machine disturb them less; those of the DataLoader come from elapsed time.
"""
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time

import numpy as np
from harness import ROOT, ArgumentParser, UserError, exit_status
from PIL import Image

from auto_augment import build_auto_augment
from image_files.decode import decode_image
from opencv.operations import resize
from opencv.source import ImageSource
from transforms import draw_crop, eval_geometry, eval_transform, normalize, random_resized_crop, train_transform

POLICY, MEAN, STD = 'rand-m9-mstd0.5-inc1', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = 24  # generated files


def generated(folder, width, height):
    """JPEG files of a size, cut from a photo; their paths."""
    with Image.open(os.path.join(ROOT, 'tests', 'golden', 'preprocess', 'rocket.jpg')) as photo:
        photo = photo.convert('RGB')
    rng = np.random.default_rng(0)
    paths = []
    for index in range(IMAGES):
        share = rng.uniform(0.7, 1)
        box_width, box_height = min(photo.width, photo.height * width / height), min(photo.height,
                                                                                   photo.width * height / width)
        left, top = rng.uniform(0, photo.width - share * box_width), rng.uniform(0, photo.height - share * box_height)
        image = photo.resize((width, height), Image.LANCZOS, (left, top, left + share * box_width,
                                                              top + share * box_height))
        paths.append(os.path.join(folder, f'{index}.jpg'))
        image.save(paths[-1], quality=90)
    return paths


# ---- pipelines: callable(path, seed)

def ours(size, backend):
    transform = train_transform(size, auto_augment=POLICY, backend=backend)
    read = getattr(transform, 'open', decode_image)
    return lambda path, seed: transform(read(path), np.random.default_rng(seed))


def ours_for_evaluation(size):
    transform = eval_transform(size)
    return lambda path, _: transform(decode_image(path))


def _of_pillow(transform):
    def pipeline(path, _):
        with Image.open(path) as image, contextlib.suppress(ValueError):  # Pillow refuses timm's posterizing to 0 bits
            return transform(image.convert('RGB'))
    return pipeline


def of_timm(size, training):
    from timm.data import create_transform
    if training:
        return _of_pillow(create_transform(size, is_training=True, auto_augment=POLICY, interpolation='bicubic',
                                           re_prob=0.25, re_mode='pixel'))
    return _of_pillow(create_transform(size, interpolation='bicubic', crop_pct=0.875))


def of_torchvision(size, training):
    from torchvision import transforms as tv
    bicubic = tv.InterpolationMode.BICUBIC
    to_tensor = [tv.ToTensor(), tv.Normalize(MEAN, STD)]
    if training:  # its RandAugment applies both operations always
        return _of_pillow(tv.Compose([tv.RandomResizedCrop(size, interpolation=bicubic), tv.RandomHorizontalFlip(),
                                      tv.RandAugment(interpolation=bicubic), *to_tensor, tv.RandomErasing(0.25)]))
    return _of_pillow(tv.Compose([tv.Resize(int(size / 0.875), bicubic), tv.CenterCrop(size), *to_tensor]))


def pipelines(size, training):
    """{name: pipeline} of those whose packages are installed."""
    if training:
        makers = {"DATA.BACKEND pil": functools.partial(ours, size, 'pil'),
                  "DATA.BACKEND cv2": functools.partial(ours, size, 'cv2')}
    else:
        makers = {'this project': functools.partial(ours_for_evaluation, size)}
    makers.update({'timm': functools.partial(of_timm, size, training),
                   'torchvision': functools.partial(of_torchvision, size, training)})
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, UserError) as error:
            print(f'{name} is left out: {error}')
    return found


# ---- stages: callable(index) on prepared inputs

def stages(paths, size):
    """{name: callable(index)} of the parts of the pipelines."""
    whole = [decode_image(path) for path in paths]
    cropped = [random_resized_crop(image, size, np.random.default_rng(index)) for index, image in enumerate(whole)]
    policy = build_auto_augment(POLICY)
    sequence = {
        'pil: read and decode': lambda i: decode_image(paths[i]),
        'pil: crop and resize': lambda i: random_resized_crop(whole[i], size, np.random.default_rng(i)),
        'pil: augment': lambda i: policy(cropped[i], np.random.default_rng(i)),
        'normalise': lambda i: normalize(cropped[i], MEAN, STD),
        'evaluation: resize and crop': lambda i: eval_geometry(whole[i], size),
    }
    try:
        train_transform(size, backend='cv2')
    except UserError:
        return sequence
    arrays, small = [np.asarray(image) for image in whole], [np.asarray(image) for image in cropped]

    def crop(index):
        left, top, width, height = draw_crop(*whole[index].size, np.random.default_rng(index))
        return resize(arrays[index][top:top + height, left:left + width], size, Image.BICUBIC)

    def decode(index):
        source = ImageSource(paths[index])
        return source.crop(draw_crop(source.width, source.height, np.random.default_rng(index)), size)

    return {**sequence, 'cv2: read and decode': decode, 'cv2: crop and resize': crop,
            'cv2: augment': lambda i: policy(small[i], np.random.default_rng(i))}


# ---- measurement

def rates(calls, count, rounds):
    """Images per second of CPU time of each callable(number): {name: (median, lowest, highest of the rounds)}."""
    seconds = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            for number in range(count):
                call(number + round_ * count)
            if round_:  # the first one warms up
                seconds[name].append((time.process_time() - start) / count)
    return {name: (1 / statistics.median(s), 1 / max(s), 1 / min(s)) for name, s in seconds.items()}


def show(title, found):
    print(f'\n{title}: images/s of CPU time on one core (lowest, highest of the rounds)')
    for name, (median, low, high) in found.items():
        print(f'  {name:30} {median:8.0f}   ({low:.0f}, {high:.0f})   {1000 / median:6.2f} ms')
    if 'timm' in found:
        for name in found:
            if name not in ('timm', 'torchvision'):
                print(f'  {name}: {found[name][0] / found["timm"][0]:.2f} times as many as timm')


def measure_workers(paths, size, numbers, batches):
    """Prints images per second of the DataLoader, and the CPU time of the main process, for numbers of workers."""
    from config import get_config
    from datasets import get_dataloader, get_dataset
    with tempfile.TemporaryDirectory() as folder:
        images = [paths[i % len(paths)] for i in range(64 * batches)]
        for mode in ('train', 'val'):
            with open(os.path.join(folder, f'{mode}_list.txt'), 'w') as file:
                file.writelines(f'{path} 0\n' for path in images)
        print(f'\nDataLoader, batches of 64, {len(os.sched_getaffinity(0))} cores: images/s of elapsed time; '
              'CPU time in ms per image, of the main process and of its workers')
        for workers in numbers:
            for mode, backend in (('train', 'pil'), ('train', 'cv2'), ('val', 'pil')):
                config = get_config(opts=['DATA.DATA_PATH', folder, 'DATA.BACKEND', backend, 'DATA.IMAGE_SIZE', size,
                                          'DATA.NUM_WORKERS', workers, 'MODEL.NUM_CLASSES', 1])
                loader = get_dataloader(config, get_dataset(config, mode), mode)
                start, before = time.perf_counter(), os.times()
                for _ in loader:
                    pass
                passed, after = time.perf_counter() - start, os.times()
                own, theirs = (sum(after[k] - before[k] for k in pair) / len(images) for pair in ((0, 1), (2, 3)))
                print(f'  {workers} workers, {mode:5} {backend}: {len(images) / passed:6.0f}   {1000 * own:.2f}, '
                      f'{1000 * theirs:.2f}')


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument('-images', default='', help='folder of JPEG files; otherwise they are generated')
    parser.add_argument('-width', type=int, default=500, help='of generated images')
    parser.add_argument('-height', type=int, default=375, help='of generated images')
    parser.add_argument('-size', type=int, default=224, help='side of the result')
    parser.add_argument('-rounds', type=int, default=7)
    parser.add_argument('-count', type=int, default=48, help='images per round')
    parser.add_argument('-workers', default='', help='numbers of DataLoader workers, as in 0,1,2: measures only these')
    parser.add_argument('-batches', type=int, default=4, help='batches of 64 per number of workers')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.images:
            paths = sorted(entry.path for entry in os.scandir(args.images) if entry.is_file())[:500]
            if not paths:
                raise UserError(f'-images={args.images}: has no files')
        else:
            paths = generated(folder, args.width, args.height)
        if args.workers:
            return measure_workers(paths, args.size, [int(n) for n in args.workers.split(',')], args.batches)
        if 'torch' in sys.modules or _importable('torch'):
            import torch
            torch.set_num_threads(1)
        for training, title in ((True, 'training'), (False, 'evaluation')):
            calls = {name: lambda i, call=call: call(paths[i % len(paths)], i)
                     for name, call in pipelines(args.size, training).items()}
            show(title, rates(calls, args.count, args.rounds))
        calls = {name: lambda i, call=call: call(i % len(paths)) for name, call in stages(paths, args.size).items()}
        show('stages', rates(calls, args.count, args.rounds))


def _importable(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


if __name__ == '__main__':
    sys.exit(exit_status(main))
