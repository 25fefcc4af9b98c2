"""ImageNet-style list datasets: decoding, samplers and loaders.

A data folder contains `train_list.txt` and `val_list.txt` with one 'relative/path label' per line; paths may contain
spaces. With DATA.DATASET image_folder it contains folders train/CLASS and val/CLASS instead. Predictions show the class
names in `classes.txt`, if the folder has one: a name per line, class 0 first.

Every random draw depends only on (seed, epoch, image) or (seed, epoch), not on the worker or the process.
"""
import errno
import os

import numpy as np
import paddle

from errors import UserError, why_unreadable
from image_files.decode import DataError, decode_image, to_rgb  # noqa: F401 - also imported from here
from image_files.folders import read_folder
from image_files.lists import read_class_names, read_list  # noqa: F401 - also imported from here
from image_files.shards import open_shards
from loading.loader import PREFETCH_FACTOR, DataLoader, clear_shared_memory, free_shared_memory
from loading.samplers import EvalBatchSampler, TrainBatchSampler
from transforms import eval_transform, train_transform
from utils import STREAM_AUGMENT, STREAM_REPLACE, device_count, logger, random_generator, require_locks

DATASETS = ('imagenet2012', 'image_folder')
MODES = ('train', 'val')
CHECK_FILES_UP_TO = 20_000  # lines; in longer lists a missing image is reported when it is read, for a quick start


class ImageNet2012Dataset(paddle.io.Dataset):
    """Images and labels of a list file. The images are read from shards if the list has any: see image_files/shards.py.

    Args:
        root: data folder.
        list_file: path of the list, relative to root.
        transform: callable(image), or callable(image, rng) with `train`, -> float32 array [3, H, W] or
            [views, 3, H, W].
        num_classes: labels must be in [0, num_classes); None for no limit.
        train: bool, whether the transform takes a random generator.
        seed: int >= 0, seed of the augmentation.
        exif: bool, whether to turn images as their EXIF orientation says.
        multi_label: bool, whether an image may have several labels or none.

    Attributes:
        labels: int64 array [len(dataset)]; with `multi_label` uint8 [len(dataset), num_classes], 1 for each label.

    Raises:
        FileNotFoundError: the list does not exist.
        DataError: a line is blank or malformed, its label is out of range or (in lists of up to CHECK_FILES_UP_TO
            lines) its image is missing; ShardError, if its shards are.
    """

    def __init__(self, root, list_file, transform, num_classes=None, train=False, seed=0, exif=False,
                 multi_label=False):
        super().__init__()
        self.root, self.transform, self.train, self.seed, self.exif = root, transform, train, seed, exif
        self.multi_label = multi_label
        self.list_file = os.path.join(root, list_file)
        # arrays, not lists of objects, whose reference counts would make workers copy the shared memory
        self._paths, self.labels = self._read(list_file, num_classes)
        self._shards = open_shards(self.list_file, self._paths)
        if len(self) <= CHECK_FILES_UP_TO and self._shards is None:
            for index in range(len(self)):
                if not os.path.isfile(self.path(index)):
                    reason = why_unreadable(self.path(index))
                    problem = 'no such image' if reason in ('', os.strerror(errno.ENOENT)) else reason
                    raise DataError(f'{self.name(index)}: {problem}')

    def _read(self, _, num_classes):
        return read_list(self.list_file, num_classes, multi_label=self.multi_label)

    def _where(self, index):
        """Where an image is named, for messages about it."""
        return f'{self.list_file}:{index + 1}: '

    @property
    def paths(self):
        """Paths of the images as in the list, `image_files.entries.Paths`."""
        return self._paths

    def path(self, index):
        """Path of an image file; that of an image in a shard is an `image_files.decode.ImageInside`."""
        if self._shards is not None:
            return self._shards.image(index, os.fsdecode(self._paths[index]))
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def name(self, index):
        """An image in messages: where it is listed, and its path."""
        return self._where(index) + self.path(index)

    def stand_ins(self, key):
        """Keys of up to ten other images of the same class, drawn from a generator of the seed and the key.

        With several labels per image, those that differ in the fewest labels.
        """
        epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
        if self.multi_label:
            rng = random_generator(self.seed, STREAM_REPLACE, epoch, index, *copy)
            others = rng.permutation(np.delete(np.arange(len(self)), index))
            differing = (self.labels[others] != self.labels[index]).sum(1)
            return [(epoch, int(other), *copy) for other in others[np.argsort(differing, kind='stable')[:10]]]
        same_class = np.flatnonzero(self.labels == self.labels[index])
        rng = random_generator(self.seed, STREAM_REPLACE, epoch, index, *copy)
        return [(epoch, int(other), *copy) for other in rng.permutation(same_class[same_class != index])[:10]]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        """Returns the transformed image and its label, int64, or with `multi_label` its labels, uint8 [num_classes].

        Args:
            key: (epoch, index), (epoch, index, copy), or index alone for epoch 0; the transform's random draws depend
                only on the seed and the key.

        Raises:
            DataError: the image is missing or corrupt.
        """
        return self._sample(key, self.transform)

    def levels(self, key):
        """The same with the image as `transforms.Levels`; as it is, if the transform does not have `levels`."""
        return self._sample(key, getattr(self.transform, 'levels', self.transform))

    def _sample(self, key, transform):
        epoch, index, *copy = key if isinstance(key, tuple) else (0, key)
        try:
            image = getattr(self.transform, 'open', decode_image)(self.path(index), self.exif)
            if self.train:
                pixels = transform(image, random_generator(self.seed, STREAM_AUGMENT, epoch, index, *copy))
            else:
                pixels = transform(image)
        except DataError as error:
            raise type(error)(f'{self._where(index)}{error}') from error
        return pixels, self.labels[index]


class ImageFolderDataset(ImageNet2012Dataset):
    """The same for images in folders root/MODE/CLASS, labelled by the sorted names of the class folders.

    Args:
        root: data folder; `list_file` is 'train' or 'val', see `folders.read_folder`.
    """

    def _read(self, mode, num_classes):
        return read_folder(self.root, mode, num_classes)

    def _where(self, _):
        return ''


def eval_protocol(config):
    """'crop' or 'warp', after DATA.EVAL_PROTOCOL; 'auto' warps from 384 pixels up, for the published checkpoints."""
    if config.DATA.EVAL_PROTOCOL == 'auto':
        return 'warp' if config.DATA.IMAGE_SIZE >= 384 else 'crop'
    return config.DATA.EVAL_PROTOCOL


def get_transform(config, mode):
    """The transform for mode 'train' or 'val' with the settings in `config`, see transforms.py."""
    common = dict(interpolation=config.DATA.INTERPOLATION, mean=config.DATA.IMAGENET_MEAN,
                  std=config.DATA.IMAGENET_STD)
    if mode == 'val':
        return eval_transform(config.DATA.IMAGE_SIZE, crop_pct=config.DATA.CROP_PCT, protocol=eval_protocol(config),
                              **common)
    train = config.TRAIN
    return train_transform(config.DATA.IMAGE_SIZE, scale=train.RANDOM_RESIZED_CROP.SCALE,
                           ratio=train.RANDOM_RESIZED_CROP.RATIO, hflip=train.HFLIP, vflip=train.VFLIP,
                           color_jitter=train.COLOR_JITTER, auto_augment=train.AUTO_AUGMENT,
                           re_prob=train.RANDOM_ERASE_PROB, re_mode=train.RANDOM_ERASE_MODE,
                           re_count=train.RANDOM_ERASE_COUNT, views=max(1, train.AUG_SPLITS),
                           backend=config.DATA.BACKEND, **common)


def source_name(config, mode):
    """What in the data folder names the images for mode 'train' or 'val': a list, or a folder of class folders."""
    return mode if config.DATA.DATASET == 'image_folder' else f'{mode}_list.txt'


def get_dataset(config, mode='train'):
    """The dataset for mode 'train' or 'val' in the folder DATA.DATA_PATH.

    Raises:
        UserError: the name of the dataset or the mode is unknown.
        ValueError: a setting is out of range.
        FileNotFoundError, DataError: see ImageNet2012Dataset.
    """
    if config.DATA.DATASET not in DATASETS:
        raise UserError(f'unknown dataset {config.DATA.DATASET!r}: -dataset must be one of {", ".join(DATASETS)}')
    _check_mode(mode)
    kind = ImageFolderDataset if config.DATA.DATASET == 'image_folder' else ImageNet2012Dataset
    return kind(config.DATA.DATA_PATH, source_name(config, mode), get_transform(config, mode),
                num_classes=config.MODEL.NUM_CLASSES, train=mode == 'train', seed=config.SEED, exif=config.DATA.EXIF,
                multi_label=config.DATA.MULTI_LABEL)


def get_dataloader(config, dataset, mode='train', rank=0, world_size=1):
    """The DataLoader of one process: batches of DATA.BATCH_SIZE shuffled images, or of DATA.BATCH_SIZE_EVAL in order.

    For training, call `loader.set_epoch(epoch)` before each epoch.

    Raises:
        UserError: the mode is unknown, or the dataset is smaller than one global training batch.
    """
    _check_mode(mode)
    if mode == 'train':
        sampler = TrainBatchSampler(len(dataset), config.DATA.BATCH_SIZE, rank, world_size, config.SEED,
                                    config.TRAIN.REPEATED_AUG,
                                    dataset.labels if config.TRAIN.SAMPLER == 'balanced' else None)
    else:
        sampler = EvalBatchSampler(len(dataset), config.DATA.BATCH_SIZE_EVAL, rank, world_size)
    workers = config.DATA.NUM_WORKERS
    views = max(1, config.TRAIN.AUG_SPLITS) if mode == 'train' else 1
    erasing = mode == 'train' and config.TRAIN.RANDOM_ERASE_PROB > 0  # takes 8 bytes for up to a third of the values
    image_bytes = (4 if erasing else 1) * 3 * config.DATA.IMAGE_SIZE ** 2 * views
    processes = min(world_size, device_count('gpu') or world_size)  # on this machine
    # each worker fills one batch in addition to those prefetched
    needed = processes * workers * (PREFETCH_FACTOR + 1) * sampler.batch_size * image_bytes
    if workers:
        require_locks('or use -num_workers=0')
        clear_shared_memory()
    shared = free_shared_memory() > needed
    if workers and not shared:
        logger.warning(
            'the DataLoader needs %d MB of /dev/shm, but %d MB are free: batches go through pipes, which is slower '
            '(in Docker, raise --shm-size)', needed >> 20, free_shared_memory() >> 20)
    return DataLoader(dataset, sampler, workers, use_shared_memory=shared,
                      replace_bad=mode == 'train' and config.DATA.MAX_BAD_FRACTION > 0)


def _check_mode(mode):
    if mode not in MODES:
        raise UserError(f'unknown mode {mode!r}: use one of {", ".join(MODES)}')
