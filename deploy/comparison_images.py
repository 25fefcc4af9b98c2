"""The images on which export.py compares an exported program with the model that it comes from."""
import os
from dataclasses import dataclass
from typing import Tuple

import numpy as np

from datasets import get_dataset, get_transform, source_name
from image_files.decode import decode_image
from image_files.find import images_in
from image_files.generated import generated_image

IMAGES = 8  # compared images, and as many random inputs of each size
BATCH = 4


class ImageSource:
    """Preprocessed images from a folder, from the validation list, or if there is none, a few generated ones.

    Attributes:
        name: of the folder or the list, or 'generated'.
        labels: int64 [len], or with several labels per image uint8 [len, classes]; None if they are unknown.

    Args:
        config: settings of the model and its data.
        pictures: folder of images; None for the validation list.
        rng: for generated images.
    """

    def __init__(self, config, pictures, rng):
        transform, val = get_transform(config, 'val'), os.path.join(config.DATA.DATA_PATH, source_name(config, 'val'))
        self.labels = None
        if pictures:
            if not os.path.isdir(pictures):
                raise FileNotFoundError(f'-pictures={pictures}: no such folder')
            self.name, paths = pictures, images_in(pictures)
            self._load, self._count = lambda i: transform(decode_image(paths[i], config.DATA.EXIF)), len(paths)
        elif config.DATA.DATA_PATH and os.path.exists(val):
            dataset = get_dataset(config, 'val')
            self.name, self.labels = val, dataset.labels
            self._load, self._count = lambda i: dataset[i][0], len(dataset)
        else:
            images = [transform(generated_image(rng)) for _ in range(IMAGES)]
            self.name, self._load, self._count = 'generated', images.__getitem__, IMAGES

    def __len__(self):
        return self._count

    def batches(self, indices):
        """Arrays [N, 3, H, W] of images, N up to BATCH."""
        images = [self._load(int(i)) for i in indices]
        return tuple(np.stack(images[i:i + BATCH]) for i in range(0, len(images), BATCH))


@dataclass(frozen=True)
class ComparisonImages:
    """Batches of inputs, float32 [N, 3, H, W], to compare two forms of a model on, and a description of them.

    Attributes:
        source: all images that there are to choose from.
    """
    batches: Tuple[np.ndarray, ...]
    description: str
    source: ImageSource

    @property
    def one(self):
        """The first image, [1, 3, H, W]."""
        return self.batches[0][:1]


def comparison_images(config, options):
    """Preprocessed images from a folder, from the validation list, or generated; then as many random inputs.

    Args:
        config: settings of the model and its data.
        options: `export.ExportOptions`.
    """
    size, rng = config.DATA.IMAGE_SIZE, np.random.default_rng(0)
    source = ImageSource(config, options.pictures, rng)
    batches = source.batches(evenly_spaced(len(source), IMAGES))
    sizes = [(size, size)] + [(size + 13, size + 37)] * options.dynamic
    arrays = [rng.standard_normal((IMAGES, 3, *s)).astype('float32') for s in sizes]
    batches += tuple(array[i:i + BATCH] for array in arrays for i in range(0, IMAGES, BATCH))
    return ComparisonImages(batches, f'{min(len(source), IMAGES)} images ({source.name}) and {IMAGES * len(sizes)} '
                            'random inputs', source)


def evenly_spaced(count, most):
    """Up to `most` indices below `count`, int [N]."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)
