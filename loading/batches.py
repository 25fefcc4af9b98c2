"""Batches of images as uint8, which are normalised where they are used: a quarter of the memory on the way there."""
import functools

import numpy as np
import paddle

from transforms import Levels, normalize_planes


def collate(images):
    """A batch of images.

    Args:
        images: of one kind: `Levels` of one or of several views, or float32 arrays that are normalised already.
    Returns:
        array [n, 3, H, W], or [views x n, 3, H, W] with the first view of all images before the second, of the dtype of
        the images' pixels; and [] or, of what random erasing overwrites, flat indices into it and values.
    """
    levels = isinstance(images[0], Levels)
    pixels = np.stack([image.pixels for image in images] if levels else images)
    count, views = len(pixels), pixels.shape[1] if pixels.ndim == 5 else 1
    if pixels.ndim == 5:
        pixels = pixels.swapaxes(0, 1).reshape(-1, *pixels.shape[2:])
    if not levels or not any(image.positions.size for image in images):
        return pixels, []
    size = pixels[0].size
    positions = [image.positions + (image.positions // size * (count - 1) + index) * size
                 for index, image in enumerate(images)]
    return pixels, [np.concatenate(positions).astype(np.int32 if views * count * size < 1 << 31 else np.int64),
                    np.concatenate([image.values for image in images])]


def normalized(pixels, erased, transform):
    """The images of `collate`, now tensors, as float32 on their device, bit for bit as `transform` returns each.

    Args:
        pixels, erased: see `collate`.
        transform: has `levels`, `mean` and `std`, unless the images are as it returns them already.
    """
    if pixels.dtype != paddle.uint8 or not hasattr(transform, 'levels'):
        return pixels
    if not pixels.place.is_cpu_place():
        return _look_up(pixels, erased, tuple(transform.mean), tuple(transform.std))
    planes = pixels.numpy()
    images = np.empty(planes.shape, np.float32)
    for image, levels in zip(images, planes):  # each fits into the processor's cache
        normalize_planes(levels, transform.mean, transform.std, out=image)
    if erased:
        positions, values = (tensor.numpy() for tensor in erased)
        images.reshape(-1)[positions] = values
    # A copy: a tensor that only refers to the array would free a Python object from Paddle's threads.
    return paddle.to_tensor(images, place=paddle.CPUPlace())


def _look_up(pixels, erased, mean, std):
    """`normalized` with a table of the CPU's results, since a GPU may round arithmetic in another way."""
    table, offsets = _table(mean, std, str(pixels.place))
    images = paddle.gather(table, (pixels.astype('int32') + offsets).flatten())
    if erased:
        images.scatter_(*erased)
    return images.reshape(pixels.shape)


@functools.lru_cache(maxsize=4)
def _table(mean, std, _):
    """Normalised values of each level of each channel, float32 [768], and where each channel's start, [3, 1, 1]."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 256).repeat(3, 0).reshape(3, 256, 1)
    return (paddle.to_tensor(normalize_planes(levels, mean, std).ravel()),
            paddle.to_tensor(256 * np.arange(3, dtype=np.int32).reshape(3, 1, 1)))
