"""List files, decoding, samplers and loaders, on real files and worker processes."""
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

import datasets
from config import get_config
from datasets import (
    DataError,
    EvalBatchSampler,
    ImageNet2012Dataset,
    TrainBatchSampler,
    decode_image,
    get_dataloader,
    get_dataset,
)
from errors import UserError


def write_lists(root, train=13, val=7):
    """A data folder of 9x8 images whose red value is the image's number, with labels of three classes in turn."""
    for mode, count in (('train', train), ('val', val)):
        folder = root / mode / 'a class'
        folder.mkdir(parents=True)
        lines = []
        for number in range(count):
            Image.new('RGB', (9, 8), (number, 100, 200)).save(folder / f'{number}.png')
            lines.append(f'{mode}/a class/{number}.png {number % 3}\n')
        (root / f'{mode}_list.txt').write_text(''.join(lines))
    return root


@pytest.fixture
def root(tmp_path):
    return write_lists(tmp_path / 'data folder')


@pytest.fixture
def config(root):
    return get_config(opts=['DATA.DATA_PATH', str(root), 'DATA.IMAGE_SIZE', 32, 'DATA.BATCH_SIZE', 4,
                            'DATA.BATCH_SIZE_EVAL', 3, 'DATA.NUM_WORKERS', 0, 'MODEL.NUM_CLASSES', 3,
                            'DATA.IMAGENET_MEAN', [0.0, 0.0, 0.0], 'DATA.IMAGENET_STD', [1.0, 1.0, 1.0]])


def numbers(images):
    """The numbers of the images in an evaluation batch."""
    return [int(round(value)) for value in images.numpy()[:, 0, 16, 16] * 255]


def test_paths_with_spaces_tabs_line_ends_and_a_byte_order_mark(root):
    (root / 'list.txt').write_bytes(b'\xef\xbb\xbftrain/a class/0.png 0\r\ntrain/a class/1.png\t2\n'
                                    b'  train/a class/2.png   1  ')
    dataset = ImageNet2012Dataset(root, 'list.txt', np.asarray, num_classes=3)
    assert dataset.labels.tolist() == [0, 2, 1] and dataset.labels.dtype == np.int64
    assert [dataset[i][0][0, 0, 0] for i in range(3)] == [0, 1, 2]
    assert dataset.path(2) == str(root / 'train/a class/2.png')


def test_file_names_that_are_not_ascii(tmp_path):
    Image.new('RGB', (2, 2)).save(tmp_path / 'größe 画像.png')
    (tmp_path / 'list.txt').write_text('größe 画像.png 5\n', encoding='utf-8')
    pixels, label = ImageNet2012Dataset(tmp_path, 'list.txt', np.asarray)[0]
    assert pixels.shape == (2, 2, 3) and label == 5


@pytest.mark.parametrize('line, words', [
    ('', "expected 'relative/path label', got ''"), ('   ', 'expected'), ('train/a class/0.png', 'expected'),
    ('7', 'expected'), ('train/a class/0.png 1.0', 'expected'), ('train/a class/0.png one', 'expected'),
    ('train/a class/0.png 3', 'label 3 is out of range, must be 0 to 2 for 3 classes'),
    ('train/a class/0.png -1', 'label -1 is out of range'),
    ('train/a class/x.png 1', 'x.png: no such image'), ('train/a class 1', 'a class: no such image'),
])
def test_errors_name_list_and_line(root, line, words):
    (root / 'train_list.txt').write_text(f'train/a class/0.png 0\n{line}\ntrain/a class/1.png 1\n')
    with pytest.raises(DataError) as error:
        ImageNet2012Dataset(root, 'train_list.txt', np.asarray, num_classes=3)
    message = str(error.value)
    assert message.startswith(f'{root}/train_list.txt:2: ') and words in message and '\n' not in message


def test_missing_and_empty_lists(root):
    with pytest.raises(FileNotFoundError, match='test_list.txt: no such list file'):
        ImageNet2012Dataset(root, 'test_list.txt', np.asarray)
    (root / 'train_list.txt').write_text('')
    with pytest.raises(DataError, match='train_list.txt: the list is empty'):
        ImageNet2012Dataset(root, 'train_list.txt', np.asarray)


def test_long_lists_report_a_missing_image_when_it_is_read(root, monkeypatch):
    monkeypatch.setattr(datasets, 'CHECK_FILES_UP_TO', 12)
    os.remove(root / 'train/a class/11.png')
    dataset = ImageNet2012Dataset(root, 'train_list.txt', np.asarray)
    with pytest.raises(DataError, match=r'train_list.txt:12: .*11.png: no such image'):
        dataset[11]


@pytest.mark.parametrize('content', [b'', b'no image', 'truncated', 'broken'])
def test_corrupt_images_name_list_line_and_image(root, golden, content):
    rocket = (golden / 'preprocess/rocket.jpg').read_bytes()
    png = (root / 'train/a class/0.png').read_bytes()
    damaged = {'truncated': rocket[:len(rocket) // 2], 'broken': png[:45] + b'\xff' * 9 + png[54:]}
    content = damaged.get(content, content)
    (root / 'train/a class/3.png').write_bytes(content)
    dataset = ImageNet2012Dataset(root, 'train_list.txt', np.asarray)
    with pytest.raises(DataError, match=r'train_list.txt:4: .*a class/3.png: cannot read the image: ') as error:
        dataset[3]
    assert '\n' not in str(error.value)


def saved(image, path, **options):
    image.save(path, **options)
    with Image.open(path) as stored:
        return stored.mode


@pytest.mark.filterwarnings('error')
def test_every_mode_is_decoded_to_rgb(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    grey = Image.fromarray(ramp)
    colour = Image.merge('RGB', (grey, Image.new('L', grey.size, 50), grey.transpose(Image.ROTATE_90)))
    expected = np.asarray(grey.convert('RGB')).astype(int)
    wide = Image.fromarray(ramp.astype(np.uint16) * 257)
    cases = {'L.png': grey, 'I16.png': wide, 'I16.tif': wide, 'I.pgm': wide, 'LA.png': grey.convert('LA'),
             'P.png': grey.convert('P'), 'CMYK.jpg': grey.convert('CMYK')}
    for name, image in cases.items():
        mode = saved(image, tmp_path / name)
        assert mode.startswith(name[0]), (name, mode)
        decoded = decode_image(tmp_path / name)
        assert decoded.mode == 'RGB', name
        assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= (8 if 'jpg' in name else 0), name

    assert saved(grey.convert('1'), tmp_path / '1.png') == '1'
    assert set(np.unique(np.asarray(decode_image(tmp_path / '1.png')))) == {0, 255}
    rgba = colour.copy()
    rgba.putalpha(Image.fromarray(255 - ramp))
    assert saved(rgba, tmp_path / 'RGBA.png') == 'RGBA'
    assert np.array_equal(np.asarray(decode_image(tmp_path / 'RGBA.png')), np.asarray(colour)), 'alpha is dropped'
    palette = colour.convert('P')
    assert saved(palette, tmp_path / 'transparent.png', transparency=bytes(range(256))) == 'P'
    assert np.array_equal(np.asarray(decode_image(tmp_path / 'transparent.png')), np.asarray(palette.convert('RGB')))


def test_exif_orientation_is_ignored(tmp_path):
    image = Image.new('RGB', (20, 10), (200, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / 'rotated.jpg', exif=exif)
    assert Image.open(tmp_path / 'rotated.jpg').getexif()[0x0112] == 6
    assert decode_image(tmp_path / 'rotated.jpg').size == (20, 10)


@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('size, batch', [(1, 4), (7, 3), (12, 4), (13, 4), (30, 5)])
def test_evaluation_counts_every_image_once(size, batch, world):
    samplers = [EvalBatchSampler(size, batch, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(part) for part in batches]
    assert sorted(index for part in batches for indices in part for index in indices) == list(range(size))
    alone = list(EvalBatchSampler(size, batch))
    for number, indices in enumerate(alone):
        assert batches[number % world][number // world] == indices, 'batches do not depend on the process count'


@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('size', [12, 29, 100])
def test_training_uses_each_image_at_most_once_and_equally(size, world):
    batch = 12 // world
    samplers = [TrainBatchSampler(size, batch, rank, world, seed=5) for rank in range(world)]
    orders = []
    for epoch in (0, 1, 7):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(samplers[0])} == {size // 12}
        keys = [key for part in parts for keys in part for key in keys]
        assert len(set(keys)) == len(keys) == size // 12 * 12
        assert all(len(keys) == batch for part in parts for keys in part)
        assert all(epoch == key[0] and 0 <= key[1] < size and type(key[1]) is int for key in keys)
        orders.append([sorted(index for part in parts for _, index in part[number])
                       for number in range(size // 12)])
        alone = TrainBatchSampler(size, 12, seed=5)
        alone.set_epoch(epoch)
        assert orders[-1] == [sorted(index for _, index in keys) for keys in alone], 'the same global batches'
    if size > 12:
        assert orders[0] != orders[1] != orders[2]
        other = TrainBatchSampler(size, 12, seed=6)
        assert [sorted(index for _, index in keys) for keys in other] != orders[0]


def test_training_resumes_inside_an_epoch():
    sampler = TrainBatchSampler(50, 4, seed=1)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, start_batch=5)
    assert list(sampler) == whole[5:] and len(sampler) == len(whole) == 12
    sampler.set_epoch(3)
    assert list(sampler) == whole


@pytest.mark.parametrize('world', [1, 2, 3])
@pytest.mark.parametrize('repeats', [2, 3, 5])
@pytest.mark.parametrize('size', [12, 29, 100])
def test_repeated_augmentation_distributes_the_copies_of_an_image_to_different_processes(size, repeats, world):
    batch = 12 // world
    samplers = [TrainBatchSampler(size, batch, rank, world, seed=5, repeats=repeats) for rank in range(world)]
    alone = TrainBatchSampler(size, 12, seed=5, repeats=repeats)
    for epoch in (0, 4):
        for sampler in [*samplers, alone]:
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(alone)} == {size // 12}, 'an epoch is as long as without'
        keys = [key for part in parts for keys in part for key in keys]
        assert len(set(keys)) == len(keys) == size // 12 * 12 and all(len(keys) == batch for p in parts for keys in p)
        copies = {}
        for rank, part in enumerate(parts):
            for number, index, copy in (key for keys in part for key in keys):
                assert number == epoch and type(index) is int and 0 <= index < size
                copies.setdefault(index, []).append((copy, rank))
        complete = [sorted(each) for each in copies.values() if len(each) == repeats]
        assert len(copies) - len(complete) <= 1 and len(copies) == -(-len(keys) // repeats)
        for each in complete:
            assert [copy for copy, _ in each] == list(range(repeats))
            ranks = Counter(rank for _, rank in each)
            assert len(ranks) == min(repeats, world) and max(ranks.values()) - min(ranks.values()) <= 1
        assert [sorted(key for part in parts for key in part[number]) for number in range(size // 12)] == [
            sorted(keys) for keys in alone], 'the same global batches'
        samplers[0].set_epoch(epoch, start_batch=1)
        assert list(samplers[0]) == parts[0][1:]
    for same in (0, 1):
        assert list(TrainBatchSampler(size, 12, seed=5, repeats=same)) == list(TrainBatchSampler(size, 12, seed=5))


def test_repeated_augmentation_shows_every_image_about_equally_often_over_the_epochs():
    sampler, seen = TrainBatchSampler(30, 5, repeats=3), Counter()
    for epoch in range(600):
        sampler.set_epoch(epoch)
        seen.update(index for keys in sampler for _, index, _ in keys)
    assert sum(seen.values()) == 600 * 30 and min(seen.values()) > 450 and max(seen.values()) < 750


def test_every_image_is_left_out_about_equally_often():
    sampler, seen = TrainBatchSampler(10, 3), Counter()
    for epoch in range(300):
        sampler.set_epoch(epoch)
        seen.update(index for keys in sampler for _, index in keys)
    assert sum(seen.values()) == 2700 and min(seen.values()) > 240


def test_a_training_set_smaller_than_a_global_batch_is_refused():
    with pytest.raises(UserError, match=r'7 training images are fewer than one global batch of 8 \(4 x 2 processes\)'):
        TrainBatchSampler(7, 4, 0, 2)


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_loader(config, workers):
    config.DATA.NUM_WORKERS = workers
    dataset = get_dataset(config, 'val')
    seen = []
    for rank in range(4):  # the last one has no batch
        loader = get_dataloader(config, dataset, 'val', rank, 4)
        for images, labels in loader:
            assert images.dtype == paddle.float32 and labels.dtype == paddle.int64
            assert list(images.shape[1:]) == [3, 32, 32] and list(labels.shape) == [images.shape[0]]
            assert labels.tolist() == [number % 3 for number in numbers(images)]
            seen += numbers(images)
        assert len(loader) == len(list(loader)) == (1 if rank < 3 else 0)
    assert sorted(seen) == list(range(7))


def epoch_of(loader, epoch, start_batch=0):
    loader.set_epoch(epoch, start_batch)
    return [(images.numpy().tobytes(), labels.tolist()) for images, labels in loader]


def test_training_batches_depend_on_seed_epoch_and_image_only(config):
    dataset = get_dataset(config, 'train')
    loader = get_dataloader(config, dataset, 'train')
    first, second = epoch_of(loader, 1), epoch_of(loader, 2)
    assert len(first) == len(loader) == 3 and first != second
    assert epoch_of(loader, 1) == first
    assert epoch_of(loader, 2, start_batch=2) == second[2:]
    config.DATA.NUM_WORKERS = 2
    loader = get_dataloader(config, dataset, 'train')
    assert epoch_of(loader, 2) == second and epoch_of(loader, 1) == first
    config.SEED = 7
    assert epoch_of(get_dataloader(config, get_dataset(config, 'train'), 'train'), 1) != first


def images_by_key(config, epoch):
    """The pixels of each key from the loaders of one and two processes, the latter with workers."""
    dataset = get_dataset(config, 'train')
    images = {}
    for world in (1, 2):
        config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = 4 // world, world - 1
        for rank in range(world):
            loader = get_dataloader(config, dataset, 'train', rank, world)
            loader.set_epoch(epoch)
            for keys, (batch, _) in zip(loader.batch_sampler, loader):
                batch = batch.numpy().reshape(-1, len(keys), 3, 32, 32)
                for key, image in zip(keys, batch.swapaxes(0, 1)):
                    images.setdefault(key, set()).add(image.tobytes())
    return images


@pytest.mark.parametrize('views', [0, 3])
def test_an_image_is_augmented_alike_in_any_number_of_processes(config, views):
    config.TRAIN.AUG_SPLITS = views
    images = images_by_key(config, 1)
    assert len(images) == 12 and all(len(variants) == 1 for variants in images.values())


def test_copies_of_an_image_differ_and_depend_on_seed_epoch_image_and_copy_only(config):
    config.TRAIN.REPEATED_AUG, config.TRAIN.RANDOM_ERASE_PROB = 3, 1.0
    images, other = images_by_key(config, 1), images_by_key(config, 2)
    assert len(images) == 12 and all(len(variants) == 1 for variants in images.values())
    assert len(set.union(*images.values(), *other.values())) == 24, 'each copy in each epoch is another image'


def test_views_are_laid_out_one_after_the_other(config):
    config.TRAIN.AUG_SPLITS, config.TRAIN.HFLIP = 3, 0.0
    dataset = get_dataset(config, 'train')
    loader = get_dataloader(config, dataset, 'train')
    loader.set_epoch(1)
    for keys, (images, labels) in zip(loader.batch_sampler, loader):
        assert list(images.shape) == [12, 3, 32, 32] and list(labels.shape) == [4]
        assert labels.tolist() == [index % 3 for _, index in keys]
        assert numbers(images[:4]) == [index for _, index in keys], 'the clean views come first'
        for position, key in enumerate(keys):
            assert np.array_equal(images.numpy()[position::4], dataset[key][0])


@pytest.mark.parametrize('workers', [0, 2])
def test_an_iteration_left_early_does_not_disturb_the_next(config, workers):
    config.DATA.NUM_WORKERS = workers
    loader = get_dataloader(config, get_dataset(config, 'val'), 'val')
    for images, _ in loader:
        assert numbers(images) == [0, 1, 2]
        break
    assert [numbers(images) for images, _ in loader] == [[0, 1, 2], [3, 4, 5], [6]]


SCRIPT = """
import sys
from config import get_config
from datasets import get_dataloader, get_dataset
config = get_config(opts=['DATA.DATA_PATH', sys.argv[1], 'DATA.NUM_WORKERS', int(sys.argv[2]), 'DATA.IMAGE_SIZE', 32,
                          'DATA.BATCH_SIZE_EVAL', 2, 'MODEL.NUM_CLASSES', 3])
try:
    for images, labels in get_dataloader(config, get_dataset(config, 'val'), 'val'):
        print('batch', images.shape[0])
except ValueError as error:
    sys.exit(f'ERROR {error}')
"""


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_corrupt_image_in_a_worker_reaches_the_user_as_one_line(root, workers):
    (root / 'val/a class/4.png').write_bytes(b'no image')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', SCRIPT, str(root), workers], capture_output=True,
                          text=True, timeout=120, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and done.stdout == 'batch 2\nbatch 2\n', done.stderr
    lines = [line for line in done.stderr.splitlines() if 'Warning' not in line]
    assert len(lines) == 1 and lines[0].startswith('ERROR ') and 'val_list.txt:5: ' in lines[0], done.stderr


def test_batches_go_through_pipes_where_shared_memory_is_short(config, monkeypatch, caplog):
    config.DATA.NUM_WORKERS = 1
    dataset = get_dataset(config, 'val')
    assert get_dataloader(config, dataset, 'val').use_shared_memory
    monkeypatch.setattr(datasets, 'free_shared_memory', lambda: 2 * 3 * 3 * 32 * 32)
    monkeypatch.setattr(datasets.logger, 'propagate', True)
    loader = get_dataloader(config, dataset, 'val')
    assert not loader.use_shared_memory and '/dev/shm' in caplog.text
    assert [numbers(images) for images, _ in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    dataset = get_dataset(config, 'train')
    monkeypatch.setattr(datasets, 'free_shared_memory', lambda: 4 * 4 * 4 * 3 * 32 * 32)
    assert get_dataloader(config, dataset, 'train').use_shared_memory
    config.TRAIN.AUG_SPLITS = 2
    assert not get_dataloader(config, dataset, 'train').use_shared_memory, 'each view takes its share'


def test_protocol_and_transform_follow_the_config(config):
    assert datasets.eval_protocol(config) == 'crop'
    config.DATA.IMAGE_SIZE = 384
    assert datasets.eval_protocol(config) == 'warp'
    config.DATA.EVAL_PROTOCOL = 'crop'
    assert datasets.eval_protocol(config) == 'crop'
    transform = datasets.get_transform(config, 'val')
    assert transform.protocol == 'crop' and transform.crop_pct == 0.875
    train = datasets.get_transform(config, 'train')
    assert train.image_size == 384 and train.views == 1
    assert train.augment.magnitude == 9 and train.re_mode == 'pixel'


def test_unknown_dataset_and_mode(config):
    with pytest.raises(UserError, match="'test'"):
        get_dataset(config, 'test')
    with pytest.raises(UserError, match="'test'"):
        get_dataloader(config, get_dataset(config, 'val'), 'test')
    config.DATA.DATASET = 'cifar10'
    with pytest.raises(UserError, match='-dataset must be one of imagenet2012'):
        get_dataset(config, 'train')


def test_the_data_folder_may_move(root, config, tmp_path):
    shutil.move(root, tmp_path / 'moved')
    config.DATA.DATA_PATH = str(tmp_path / 'moved')
    assert len(get_dataset(config, 'train')) == 13
