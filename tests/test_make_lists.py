"""From folders of images to lists: tools/make_lists.py, DATA.DATASET image_folder, MODEL.NUM_CLASSES, DATA.EXIF."""
import os
import shutil
import sys
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from config import config_text, get_config
from datasets import DataError, get_dataset
from deploy.predictor import Predictor
from dry_run.report import report
from errors import exit_status
from export import ExportOptions, comparison_images
from image_files.decode import decode_image
from image_files.devkit import META, TRUTH
from image_files.duplicates import THUMBNAIL, duplicate_groups
from image_files.folders import names_of_folders
from image_files.inspection import groups_of, inspect_image
from image_files.lists import IMAGENET_NAMES, read_class_names, read_list
from image_files.split import stratified_split
from tools import make_lists


def picture(number, size=(48, 40)):
    """A smooth image, different for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC)


def fill(folder, **classes):
    """Writes as many pictures as given into the folder of each class."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(1000 * len(name) + ord(name[0]) * 100 + number).save(folder / name / f'{number:02d}.png')
    return folder


@pytest.fixture
def make(monkeypatch, capsys):
    """Runs the command; returns exit status, standard output and standard error."""

    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['make_lists.py', *map(str, args)])
        status = exit_status(make_lists.main)
        return (status, *capsys.readouterr())

    return call


def entries(path):
    paths, labels = read_list(path)
    return [os.fsdecode(entry) for entry in paths], labels


def test_lists_of_folders_are_stratified_complete_and_used_as_they_are(make, tmp_path):
    folder = fill(tmp_path / 'my photos', dog=10, cat=5, owl=2)
    (folder / '.hidden').mkdir()
    picture(77).save(folder / 'stray.png')
    status, out, _ = make(folder)
    assert status == 0 and '1 images outside the class folders' in out
    (folder / 'stray.png').unlink()
    assert read_class_names(folder / 'classes.txt') == ['cat', 'dog', 'owl']
    train, val = entries(folder / 'train_list.txt'), entries(folder / 'val_list.txt')
    assert np.bincount(val[1]).tolist() == [1, 2, 1] and np.bincount(train[1]).tolist() == [4, 8, 1]
    assert sorted(train[0] + val[0]) == sorted(str(p.relative_to(folder)) for p in folder.rglob('*.png'))
    config = get_config(opts=['DATA.DATA_PATH', str(folder), 'DATA.IMAGE_SIZE', 32])
    assert config.MODEL.NUM_CLASSES == 3 and len(get_dataset(config, 'train')) == 13


def test_the_choice_depends_on_the_seed_not_on_the_file_system(make, tmp_path):
    folder = fill(tmp_path / 'a', dog=20, cat=20)
    copy = tmp_path / 'b'
    for path in sorted(folder.rglob('*.png'), reverse=True):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.parent.name)
    lists = []
    for source, output, seed in ((folder, 'o1', 1), (copy, 'o2', 1), (folder, 'o3', 2)):
        assert make(source, '-output', tmp_path / output, f'--seed={seed}')[0] == 0
        paths, labels = entries(tmp_path / output / 'val_list.txt')
        lists.append([os.path.relpath(path, source) for path in paths])  # absolute: the images are elsewhere
        assert labels.tolist() == [0] * 4 + [1] * 4
    assert lists[0] == lists[1] != lists[2]


def test_copies_are_on_one_side_and_broken_files_left_out(make, tmp_path):
    folder = fill(tmp_path / 'photos', cat=6, dog=6)
    for number in range(6):  # all of them three times: the same, compressed again, half the size
        image = Image.open(folder / 'cat' / f'{number:02d}.png')
        image.save(folder / 'cat' / f'{number:02d}_copy.bmp')
        image.save(folder / 'cat' / f'{number:02d}_jpeg.jpg', quality=60)
        image.resize((24, 20), Image.BICUBIC).save(folder / 'cat' / f'{number:02d}_small.png')
    whole = (folder / 'dog' / '00.png').read_bytes()
    (folder / 'dog' / 'cut.png').write_bytes(whole[:len(whole) // 2])
    (folder / 'dog' / 'text.jpg').write_text('not an image')
    status, out, _ = make(folder, '-val=0.3')
    assert status == 0 and '6 groups of copies or near copies, 24 images' in out
    assert out.count('left out: ') == 2 and 'cut.png' in out and 'text.jpg' in out
    train, val = (entries(folder / f'{part}_list.txt')[0] for part in ('train', 'val'))
    sides = [{path[:6] for path in part if path.startswith('cat')} for part in (train, val)]
    assert len(sides[0]) + len(sides[1]) == 6 and not sides[0] & sides[1] and all(sides)
    assert not any('cut' in path or 'text' in path for path in train + val) and len(train + val) == 30


def test_train_and_val_folders_are_kept(make, tmp_path):
    fill(tmp_path / 'data' / 'train', cat=4, dog=3)
    fill(tmp_path / 'data' / 'val', dog=2)
    (tmp_path / 'data' / 'test').mkdir()
    shutil.copy(tmp_path / 'data/train/dog/00.png', tmp_path / 'data/val/dog/again.png')
    status, out, _ = make(tmp_path / 'data')
    assert status == 0 and 'not used: test' in out and 'images in train/ and in val/' in out and 'none of cat' in out
    assert entries(tmp_path / 'data/val_list.txt')[0] == ['val/dog/00.png', 'val/dog/01.png', 'val/dog/again.png']
    assert entries(tmp_path / 'data/val_list.txt')[1].tolist() == [1, 1, 1]
    shutil.rmtree(tmp_path / 'data/val')
    shutil.rmtree(tmp_path / 'data/test')
    assert make(tmp_path / 'data', '-overwrite')[0] == 0
    assert entries(tmp_path / 'data/val_list.txt')[1].tolist() == [0, 1]  # train/ alone is divided
    fill(tmp_path / 'vehicles', train=3, bus=3)
    assert make(tmp_path / 'vehicles')[0] == 0
    assert read_class_names(tmp_path / 'vehicles/classes.txt') == ['bus', 'train']


@pytest.mark.parametrize(('case', 'words'), [
    ('no folders', 'has no folders'), ('one class', 'there must be a folder for each'), ('empty class', 'no images'),
    ('all broken', 'none of its images can be decoded'), ('single images', 'no image is left for val_list.txt'),
    ('line break', 'rename this file'), ('blank name', 'rename this folder'), ('unknown class', 'none of the'),
    ('missing', 'cannot be read'), ('share', 'above 0 and below 1'), ('exists', 'exists; replace')])
def test_mistakes_are_one_line_and_nothing_is_written(make, tmp_path, case, words):
    folder, extra = tmp_path / 'data', []
    if case == 'no folders':
        folder.mkdir()
    elif case != 'missing':
        fill(folder, **({'cat': 2} if case == 'one class' else dict.fromkeys(('cat', 'dog'), 1 + (
            case != 'single images'))))
    if case == 'empty class':
        (folder / 'elk').mkdir()
    elif case == 'all broken':
        for file in (folder / 'dog').iterdir():
            file.write_bytes(b'')
    elif case == 'line break':
        picture(1).save(folder / 'dog' / 'a\nb.png')
    elif case == 'blank name':
        (folder / 'dog').rename(folder / ' dog')
    elif case == 'unknown class':
        words = 'is not one of the 2 classes'
        fill(tmp_path / 'both' / 'val', cow=1)
        folder = folder.rename(tmp_path / 'both' / 'train').parent
    elif case == 'share':
        extra = ['-val=20']
    elif case == 'exists':
        (folder / 'val_list.txt').write_text('mine')
    status, out, err = make(folder, *extra)
    assert status == 2 and err.count('\n') == 1 and words in err, err
    assert not (folder / 'train_list.txt').exists() and not (folder / 'classes.txt').exists()
    if case == 'exists':
        assert (folder / 'val_list.txt').read_text() == 'mine'


def imagenet(tmp_path, meta):
    """Two synsets, whose ILSVRC2012_IDs are in the other order, and a flat folder of validation images."""
    folder = fill(tmp_path / 'imagenet' / 'train', n01440764=2, n15075141=2).parent
    (folder / 'val').mkdir()
    for number in (1, 2, 3):
        picture(number).save(folder / 'val' / f'ILSVRC2012_val_{number:08d}.JPEG')
    devkit = folder / 'ILSVRC2012_devkit_t12' / 'data'
    devkit.mkdir(parents=True)
    (devkit / TRUTH).write_text('1\n2\n1\n')
    if meta:
        table = np.zeros(3, [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O'), ('num_children', 'O')])
        for row, values in enumerate([(1, 'n15075141', 'tissue', 0), (2, 'n01440764', 'tench', 0),
                                      (3, 'n00001740', 'entity', 2)]):
            table[row] = values
        pytest.importorskip('scipy.io').savemat(devkit / META, {'synsets': table})
    else:
        (devkit / 'synsets.txt').write_text('n15075141\nn01440764\n')
    return folder


@pytest.mark.parametrize('meta', [True, False])
def test_imagenet_gets_its_standard_lists(make, tmp_path, meta):
    folder = imagenet(tmp_path, meta)
    assert make(folder, '-no_check')[0] == 0
    assert (folder / 'val_list.txt').read_text().splitlines() == [
        'val/ILSVRC2012_val_00000001.JPEG 1', 'val/ILSVRC2012_val_00000002.JPEG 0',
        'val/ILSVRC2012_val_00000003.JPEG 1']
    assert (folder / 'train_list.txt').read_text().splitlines()[::2] == ['train/n01440764/00.png 0',
                                                                       'train/n15075141/00.png 1']


def test_imagenet_without_a_usable_development_kit(make, tmp_path):
    folder = imagenet(tmp_path, meta=False)
    devkit = folder / 'ILSVRC2012_devkit_t12' / 'data'
    for change, words in ((lambda: (devkit / TRUTH).write_text('1\n7\n1\n'), f"{TRUTH}:2: '7' is not"),
                          (lambda: (devkit / TRUTH).write_text('1\n'), 'has 1 lines'),
                          (lambda: (devkit / TRUTH).unlink(), 'cannot be read'),
                          (lambda: (devkit / 'synsets.txt').rename(devkit / META), 'is not the meta.mat'),
                          (lambda: (devkit / META).unlink(), 'ILSVRC2012_devkit_t12.tar.gz'),
                          (lambda: shutil.rmtree(devkit.parent), 'give -devkit=DIR')):
        change()
        status, _, err = make(folder)
        assert status == 2 and words in err and err.count('\n') == 1


def test_the_split_keeps_groups_and_gives_every_class_both_parts():
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = np.repeat(np.arange(8), rng.integers(1, 30, 8))
        groups = labels * 100 + rng.integers(0, 12, len(labels))
        is_val = stratified_split(labels, groups, 0.2, 3)
        for group in np.unique(groups):
            assert len(set(is_val[groups == group])) == 1
        for label in range(8):
            own, several = is_val[labels == label], len(np.unique(groups[labels == label])) > 1
            assert own.any() == several and not own.all()


def test_different_images_are_no_near_copies(tmp_path):
    assert duplicate_groups([], np.zeros((0, *THUMBNAIL), np.uint8)).tolist() == []
    for number, image in enumerate([*map(picture, range(40)), *(Image.new('RGB', (40, 40), (v, v, v)) for v in
                                                               range(0, 256, 32))]):
        image.save(tmp_path / f'{number}.png')
    inspections = [inspect_image(str(tmp_path / f'{number}.png')) for number in range(48)]
    assert groups_of(inspections).tolist() == list(range(48))


def test_image_folder_is_the_same_dataset_as_its_lists(make, tmp_path):
    folder = tmp_path / 'data'
    fill(folder / 'train', cat=3, dog=4)
    fill(folder / 'val', cat=1, dog=2)
    opts = ['DATA.DATA_PATH', str(folder), 'DATA.IMAGE_SIZE', 32]
    config = get_config(opts=opts, flags={'dataset': 'image_folder'})
    assert config.MODEL.NUM_CLASSES == 2  # from the folders
    assert make(folder)[0] == 0
    for mode in ('train', 'val'):
        ours, theirs = get_dataset(config, mode), get_dataset(get_config(opts=opts), mode)
        assert ours.paths.tolist() == theirs.paths.tolist() and ours.labels.tolist() == theirs.labels.tolist()
        for index in range(len(ours)):
            assert np.array_equal(ours[(3, index)][0], theirs[(3, index)][0])
    (folder / 'val' / 'dog' / '00.png').write_bytes(b'x')
    with pytest.raises(DataError, match='^[^:]*val/dog/00.png: cannot read'):
        get_dataset(config, 'val')[1]
    config.MODEL.NUM_CLASSES = 1
    with pytest.raises(DataError, match='set MODEL.NUM_CLASSES to 2'):
        get_dataset(config, 'train')


def test_a_run_on_class_folders_has_their_names_and_can_be_resumed(run_script, tiny_yaml, tmp_path):
    folder, run = tmp_path / 'data', tmp_path / 'run'
    fill(folder / 'train', **dict.fromkeys('abcd', 3))
    fill(folder / 'val', **dict.fromkeys('abcd', 1))
    flags = [f'-cfg={tiny_yaml}', f'-data_path={folder}', '-dataset=image_folder', '-device=cpu', f'-output={run}']
    opts = ['-opts', 'TRAIN.NUM_EPOCHS', '1']
    done = run_script('main_single_gpu.py', *flags, *opts)
    assert done.returncode == 0, done.stderr
    assert read_class_names(run / 'classes.txt') == list('abcd')
    shutil.rmtree(folder / 'val' / 'd')
    done = run_script('main_single_gpu.py', *flags)
    assert done.returncode == 2 and 'val had 4 entries and now has 3' in done.stderr, done.stderr
    fill(folder / 'val', d=1)
    done = run_script('main_single_gpu.py', *flags)
    assert done.returncode == 0, done.stderr
    (folder / 'train' / 'e').mkdir()
    shutil.copy(folder / 'train' / 'd' / '00.png', folder / 'train' / 'e')
    done = run_script('main_single_gpu.py', *flags[:3], '-device=cpu', f'-pretrained={run}', '-eval')
    assert done.returncode == 2 and 'has folders of 5 classes, but the model has 4' in done.stderr


def test_the_number_of_classes_follows_from_the_data_only_where_it_is_not_set(tmp_path):
    (tmp_path / 'classes.txt').write_text('a\nb\nc\n')
    path = ['DATA.DATA_PATH', str(tmp_path)]
    config = get_config(opts=path)
    assert config.MODEL.NUM_CLASSES == 3 and 'NUM_CLASSES: 3' in config_text(config)
    assert get_config(opts=[*path, 'MODEL.NUM_CLASSES', 7]).MODEL.NUM_CLASSES == 7
    (tmp_path / 'c.yaml').write_text('MODEL: {NUM_CLASSES: 1000}')
    assert get_config(tmp_path / 'c.yaml', path).MODEL.NUM_CLASSES == 1000
    (tmp_path / 'saved.yaml').write_text(config_text(config))
    (tmp_path / 'classes.txt').write_text('a\nb\n')
    assert get_config(tmp_path / 'saved.yaml').MODEL.NUM_CLASSES == 3  # that of the run
    (tmp_path / 'classes.txt').write_text('a\n\nb\n')  # reported when the names are read
    assert get_config(opts=path).MODEL.NUM_CLASSES == 1000 == get_config().MODEL.NUM_CLASSES


def test_folders_of_all_synsets_are_shown_with_imagenets_names():
    synsets = ['n01440764', *(f'n0{number}' for number in range(2000000, 2000998)), 'n15075141']
    assert names_of_folders(synsets) == read_class_names(IMAGENET_NAMES)
    assert names_of_folders(synsets[:5]) == synsets[:5]


def test_many_flat_images_are_compared_in_seconds():
    thumbnails = np.zeros((4_000, *THUMBNAIL), np.uint8)
    thumbnails[:, 0, 0, 0] = np.arange(len(thumbnails)) % 7
    thumbnails[2_000:] = 255 - thumbnails[2_000:]
    start = time.process_time()
    groups = duplicate_groups([number.to_bytes(4, 'big') for number in range(len(thumbnails))], thumbnails)
    assert groups.tolist() == [0] * 2_000 + [2_000] * 2_000 and time.process_time() - start < 60


def test_the_dry_run_reads_class_folders_and_offers_the_check(tmp_path):
    folder = tmp_path / 'my data'
    for part in ('train', 'val'):
        fill(folder / part, **dict.fromkeys('abc', 4))
    config = get_config(opts=['DATA.DATA_PATH', str(folder), 'DATA.DATASET', 'image_folder', 'DRY_RUN', True,
                              'MODEL.NUM_CLASSES', 2])
    text = report(config, 'cpu', 1)
    assert f"python tools/check_images.py '{folder}'" in text and 'train               12 images' in text
    assert 'but the model has 2' in text and 'train has 1 classes for which the head' in text


@pytest.mark.parametrize('orientation', range(10))
def test_exif_orientation_is_followed_where_it_is_set(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(1).save(tmp_path / 'a.png', exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'a.png')))
    assert np.array_equal(decode_image(tmp_path / 'a.png', exif=True), upright)
    assert np.array_equal(decode_image(tmp_path / 'a.png'), picture(1))


def test_exif_applies_to_training_evaluation_and_prediction(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    for part in ('train', 'val'):
        fill(tmp_path / part, cat=1, dog=1)
        picture(5).save(tmp_path / part / 'cat' / '00.png', exif=exif)
    opts = ['DATA.DATA_PATH', str(tmp_path), 'DATA.DATASET', 'image_folder', 'DATA.IMAGE_SIZE', 32,
            'TRAIN.AUTO_AUGMENT', '', 'TRAIN.COLOR_JITTER', 0, 'TRAIN.RANDOM_ERASE_PROB', 0, 'TRAIN.HFLIP', 0]
    on, off = get_config(opts=[*opts, 'DATA.EXIF', True]), get_config(opts=opts)
    assert not np.array_equal(get_dataset(on, 'train')[0][0], get_dataset(off, 'train')[0][0])
    expected = get_dataset(on, 'val')[0][0]
    assert not np.array_equal(expected, get_dataset(off, 'val')[0][0])
    for pictures in (None, str(tmp_path / 'val' / 'cat')):  # what an export is compared on
        assert np.array_equal(comparison_images(on, ExportOptions(pictures=pictures)).one[0], expected)
    predictor = Predictor.__new__(Predictor)
    predictor._configure(on, None, None)
    path = tmp_path / 'val' / 'cat' / '00.png'
    assert np.array_equal(predictor._preprocess(path, path), expected)
    assert np.array_equal(predictor._preprocess(Image.open(path), path), expected)
