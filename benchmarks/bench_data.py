"""Measures the input pipeline: images per second by stage and by number of workers, beside timm and torchvision.

    taskset -c 1 python benchmarks/bench_data.py                  # one core: pipelines and their stages
    python benchmarks/bench_data.py -workers=0,1,2                # DataLoaders, Paddle's and PyTorch's
    python benchmarks/bench_data.py -images=/data/val/n01440764 -size=384

What is not installed is left out: other libraries, and Paddle for its DataLoader. Each pipeline has its own process and
takes its turn, round after round, on the same files. The figures are medians of the rounds and come from CPU time, so
that other processes on the machine disturb them less; those of the DataLoaders come from elapsed time. Memory is freed
as in DataLoader workers, see `keep_freed_memory`.
"""
import contextlib
import ctypes
import functools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import numpy as np
from harness import ROOT, ArgumentParser, UserError, exit_status
from PIL import Image

from auto_augment import build_auto_augment
from image_files.decode import decode_image, to_rgb
from opencv.operations import resize
from opencv.source import ImageSource
from transforms import (
    draw_crop,
    eval_geometry,
    eval_transform,
    normalize,
    random_erasing,
    random_resized_crop,
    train_transform,
)

POLICY, MEAN, STD = 'rand-m9-mstd0.5-inc1', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = 24  # generated files
OTHERS = ('timm', 'torchvision')


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
    """{name: function that returns the pipeline, or raises ImportError or UserError if it is not installed}."""
    if training:
        makers = {f'DATA.BACKEND {backend}': functools.partial(ours, size, backend) for backend in ('pil', 'cv2')}
    else:
        makers = {'this project': functools.partial(ours_for_evaluation, size)}
    return {**makers, 'timm': functools.partial(of_timm, size, training),
            'torchvision': functools.partial(of_torchvision, size, training)}


# ---- stages: callable(index) on prepared inputs

def stages(paths, size):
    """{name: callable(index)} of the parts of the pipelines."""
    whole = [decode_image(path) for path in paths]
    cropped = [random_resized_crop(image, size, np.random.default_rng(index)) for index, image in enumerate(whole)]
    policy, pixels = build_auto_augment(POLICY), normalize(cropped[0], MEAN, STD)
    sequence = {
        'read and decode': lambda i: decode_image(paths[i]),
        'read and decode, Pillow alone': lambda i: to_rgb(Image.open(paths[i])),
        'evaluation: resize and crop': lambda i: eval_geometry(whole[i], size),
        'normalise': lambda i: normalize(cropped[i], MEAN, STD),
        'erase': lambda i: random_erasing(pixels, np.random.default_rng(i)),
        'pil: crop and resize': lambda i: random_resized_crop(whole[i], size, np.random.default_rng(i)),
        'pil: augment': lambda i: policy(cropped[i], np.random.default_rng(i)),
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

def keep_freed_memory():
    """Lets glibc keep 64 MB of freed memory, as it does in workers: the frameworks free large blocks while they start.

    A process that has not done so returns the memory of each image to the system, which then clears it for the next.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


class Pipeline:
    """A pipeline in a process of its own; `error` is the reason why it is not available, or ''.

    Args:
        make: function that returns the pipeline.
        paths: image files.
    """

    def __init__(self, make, paths):
        self._questions, other = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=_serve, args=(make, paths, other), daemon=True)
        self._process.start()
        self.error = self._questions.recv()

    def seconds(self, start, count):
        """CPU time of the images number `start` to `start` + `count`."""
        self._questions.send((start, count))
        return self._questions.recv()

    def close(self):
        self._questions.send(None)
        self._process.join()


def _serve(make, paths, questions):
    keep_freed_memory()
    try:
        call = make()
    except (ImportError, UserError) as error:
        questions.send(str(error))
        return
    if 'torch' in sys.modules:
        sys.modules['torch'].set_num_threads(1)
    questions.send('')
    for start, count in iter(questions.recv, None):
        began = time.process_time()
        for number in range(start, start + count):
            call(paths[number % len(paths)], number)
        questions.send(time.process_time() - began)


def compared(makers, paths, count, rounds):
    """Images per second of CPU time of each pipeline: {name: (median, lowest, highest of the rounds)}."""
    jobs = {name: Pipeline(make, paths) for name, make in makers.items()}
    for name, job in jobs.items():
        if job.error:
            print(f'{name} is left out: {job.error}')
    calls = {name: job.seconds for name, job in jobs.items() if not job.error}
    try:
        return rates(calls, count, rounds)
    finally:
        for name in calls:
            jobs[name].close()


def rates(calls, count, rounds):
    """Images per second: {name: (median, lowest, highest of the rounds)}.

    Args:
        calls: {name: callable(number of the first image, count) -> seconds}.
    """
    seconds = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            passed = call(round_ * count, count) / count
            if round_:  # the first one warms up
                seconds[name].append(passed)
    return {name: (1 / statistics.median(s), 1 / max(s), 1 / min(s)) for name, s in seconds.items()}


def timed(call, files):
    """The argument of `rates` for a callable(index of a file)."""
    def seconds(start, count):
        began = time.process_time()
        for number in range(start, start + count):
            call(number % files)
        return time.process_time() - began
    return seconds


def show(title, found):
    print(f'\n{title}: images/s of CPU time on one core (lowest, highest of the rounds)')
    for name, (median, low, high) in found.items():
        print(f'  {name:30} {median:8.0f}   ({low:.0f}, {high:.0f})   {1000 / median:6.2f} ms')
    if 'timm' in found:
        for name in found:
            if name not in OTHERS:
                print(f'  {name}: {found[name][0] / found["timm"][0]:.2f} times as many as timm')


# ---- DataLoaders

def loaders(folder, images, size, workers):
    """{name: function that returns batches of 64}, of the libraries that are installed."""
    own, found = functools.partial(_own_loader, folder, size, workers), {}
    for mode, backend in (('train', 'pil'), ('train', 'cv2'), ('val', 'pil')):
        found[f'{mode:5} this project, {backend}'] = functools.partial(own, mode, backend)
    for mode in ('train', 'val'):
        for name, make in (('timm', of_timm), ('torchvision', of_torchvision)):
            found[f'{mode:5} {name}'] = functools.partial(_torch_loader, images, make, size, workers, mode == 'train')
    return found


def _own_loader(folder, size, workers, mode, backend):
    from config import get_config
    from datasets import get_dataloader, get_dataset
    config = get_config(opts=['DATA.DATA_PATH', folder, 'DATA.BACKEND', backend, 'DATA.IMAGE_SIZE', size,
                              'DATA.BATCH_SIZE', 64, 'DATA.BATCH_SIZE_EVAL', 64, 'DATA.NUM_WORKERS', workers,
                              'MODEL.NUM_CLASSES', 1])
    return get_dataloader(config, get_dataset(config, mode), mode)


def _torch_loader(images, make, size, workers, training):
    from torch.utils.data import DataLoader
    pipeline = make(size, training)

    class Samples:
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            pixels = pipeline(images[index], index)
            return pixels if pixels is not None else self[(index + 1) % len(images)]
    return DataLoader(Samples(), 64, num_workers=workers, drop_last=True)


def measure_workers(paths, size, numbers, batches):
    """Prints images per second of DataLoaders, and the CPU time of the main process, for numbers of workers."""
    images = [paths[i % len(paths)] for i in range(64 * batches)]
    with tempfile.TemporaryDirectory() as folder:
        for mode in ('train', 'val'):
            with open(os.path.join(folder, f'{mode}_list.txt'), 'w') as file:
                file.writelines(f'{path} 0\n' for path in images)
        print(f'DataLoaders, batches of 64, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}: '
              'images/s of elapsed time; CPU time per image in ms, of the workers and of the main process\n'
              f'{"":39}{"images/s":>10}{"workers":>10}{"main":>8}{"main busy":>12}')
        for workers in numbers:
            for name, make in loaders(folder, images, size, workers).items():
                try:
                    loader = make()
                except (ImportError, UserError) as error:
                    print(f'{workers:2} workers  {name:28} is left out: {error}')
                    continue
                start, before = time.perf_counter(), os.times()
                for _ in loader:
                    pass
                passed, after = time.perf_counter() - start, os.times()
                own, theirs = (sum(after[k] - before[k] for k in pair) for pair in ((0, 1), (2, 3)))
                print(f'{workers:2} workers  {name:28}{len(images) / passed:10.0f}{1000 * theirs / len(images):10.2f}'
                      f'{1000 * own / len(images):8.2f}{100 * own / passed:10.0f} %', flush=True)


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
        for training, title in ((True, 'training'), (False, 'evaluation')):
            show(title, compared(pipelines(args.size, training), paths, args.count, args.rounds))
        keep_freed_memory()
        calls = {name: timed(call, len(paths)) for name, call in stages(paths, args.size).items()}
        show('stages', rates(calls, args.count, args.rounds))


if __name__ == '__main__':
    sys.exit(exit_status(main))
