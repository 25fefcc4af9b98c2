"""Batches travel as uint8 and are normalised in the main process, with the bits that a worker would have computed."""
import math

import numpy as np
import paddle
import pytest
from PIL import Image
from test_datasets import write_lists

import loading.loader
from config import get_config
from datasets import get_dataloader, get_dataset
from loading import batches
from transforms import eval_transform, random_erasing, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERY_LEVEL = np.arange(256, dtype=np.uint8).reshape(16, 16)


def formula(levels, mean=MEAN, std=STD):
    """Float32 operations in the order of earlier versions: checkpoints and published figures rest on their bits."""
    mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (mean, std))
    return (levels.astype(np.float32) / np.float32(255) - mean) / std


@pytest.mark.parametrize('statistics', [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3), ((0.0, 1.0, 0.3), (1, 3, 0.1))])
def test_every_level_of_every_channel_keeps_its_bits(statistics):
    transform = train_transform(16, mean=statistics[0], std=statistics[1])
    pixels = np.stack([np.stack([EVERY_LEVEL] * 3), np.stack([EVERY_LEVEL.T, EVERY_LEVEL[::-1], EVERY_LEVEL])])
    right = np.stack([formula(image, *statistics) for image in pixels])
    for found in (batches.normalized(paddle.to_tensor(pixels), [], transform),
                  batches._look_up(paddle.to_tensor(pixels), [], *statistics)):  # as on a GPU
        assert found.dtype == paddle.float32 and found.stop_gradient
        assert found.numpy().tobytes() == right.tobytes()
    ready = paddle.rand([2, 3, 4, 4])
    assert batches.normalized(ready, [], None) is ready


@pytest.mark.parametrize(('views', 'settings'), [
    (1, {}), (1, {'re_count': 4}), (3, {'re_prob': 0.7}), (2, {'re_mode': 'const'}), (1, {'re_mode': 'rand'})])
def test_erasing_keeps_the_draws_and_bits_of_each_image(views, settings):
    settings = {'re_prob': 0.5, 'auto_augment': '', 'color_jitter': 0.0, 'scale': (1, 1), 'ratio': (1, 1), 'hflip': 0,
                **settings}
    transform, plain = train_transform(24, views=views, **settings), eval_transform(24, protocol='warp')
    rng = np.random.default_rng(0)
    images, found, right = [], [], []
    for seed in range(12):
        image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        images.append(transform.levels(image, np.random.default_rng(seed)))
        found.append(transform(image, np.random.default_rng(seed)))
        draws = np.random.default_rng(seed)
        for _ in range(2):  # area and aspect of the crop, then its corner
            draws.uniform()
        draws.integers(1), draws.integers(1), draws.random(), draws.random()
        expected = [plain(image) for _ in range(views)]
        for pixels in expected[views > 1:]:  # earlier versions normalised, then overwrote
            if draws.random() < settings['re_prob']:
                random_erasing(pixels, draws, mode=settings.get('re_mode', 'pixel'), count=settings.get('re_count', 1))
        right.append(np.stack(expected) if views > 1 else expected[0])
    assert np.stack(found).tobytes() == np.stack(right).tobytes()
    assert 0 < sum(levels.positions.size > 0 for levels in images) < 12 * max(1, views - 1) + (views > 1)

    pixels, erased = batches.collate(images)
    assert pixels.dtype == np.uint8 and erased[0].dtype == np.int32
    joined = np.concatenate(np.split(np.stack(right), views, axis=1))[:, 0] if views > 1 else np.stack(right)
    tensors = paddle.to_tensor(pixels), [paddle.to_tensor(array) for array in erased]
    assert batches.normalized(*tensors, transform).numpy().tobytes() == joined.tobytes()
    assert batches._look_up(*tensors, MEAN, STD).numpy().tobytes() == joined.tobytes()


def test_positions_of_large_batches_do_not_overflow():
    levels = train_transform(8).levels(eval_image(), np.random.default_rng(0))._replace(
        pixels=np.broadcast_to(np.uint8(0), (3, 1 << 14, 1 << 14)), positions=np.array([3 << 28]) - 1,
        values=np.ones(1, np.float32))
    stack = np.stack
    try:
        np.stack = lambda images: np.broadcast_to(images[0], (len(images), *images[0].shape))
        _, (positions, _) = batches.collate([levels] * 3)
    finally:
        np.stack = stack
    assert positions.tolist() == [(3 << 28) * n - 1 for n in (1, 2, 3)] and positions.dtype == np.int64


def eval_image():
    return Image.new('RGB', (9, 8), (1, 2, 3))


@pytest.mark.parametrize('workers', [0, 1])
def test_workers_pass_on_bytes(tmp_path, workers, monkeypatch):
    sizes, normalized = {'train': 0, 'val': 0}, batches.normalized

    def watched(pixels, erased, transform):
        sizes[mode] += sum(math.prod(part.shape) * part.element_size() for part in (pixels, *erased))
        return normalized(pixels, erased, transform)
    monkeypatch.setattr(loading.loader, 'normalized', watched)
    config = get_config(opts=['DATA.DATA_PATH', str(write_lists(tmp_path, 8, 8)), 'DATA.IMAGE_SIZE', 32,
                              'DATA.BATCH_SIZE', 4, 'DATA.BATCH_SIZE_EVAL', 4, 'DATA.NUM_WORKERS', workers,
                              'MODEL.NUM_CLASSES', 3, 'TRAIN.RANDOM_ERASE_PROB', 1.0])
    for mode in sizes:
        dataset = get_dataset(config, mode)
        loader = get_dataloader(config, dataset, mode)
        for keys, (images, _) in zip(loader.batch_sampler, loader):
            assert images.numpy().tobytes() == np.stack([dataset[key][0] for key in keys]).tobytes()
    assert sizes['val'] == 8 * 3 * 32 * 32 and sizes['val'] < sizes['train'] < 4 * sizes['val']
