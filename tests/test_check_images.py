"""tools/check_images.py and tools/show_images.py, on images with everything that can be wrong or unusual."""
import csv
import sys

import numpy as np
import pytest
from PIL import Image

from config import get_config
from datasets import get_dataset
from errors import exit_status
from image_files.lists import read_list
from tools import check_images, show_images


def picture(number, size=(48, 40)):
    """A smooth image, different for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Lists of 10 and 5 sound images of two classes, '0.png' to '14.png'."""
    for part, numbers in (('train', range(10)), ('val', range(10, 15))):
        for number in numbers:
            picture(number).save(tmp_path / f'{number}.png')
        (tmp_path / f'{part}_list.txt').write_text(''.join(f'{number}.png {number % 2}\n' for number in numbers))
    (tmp_path / 'classes.txt').write_text('even\nodd\n')
    return tmp_path


def add(folder, part, name, label):
    with open(folder / f'{part}_list.txt', 'a') as file:
        file.write(f'{name} {label}\n')


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the command; returns exit status, standard output and standard error."""

    def call(*args, tool=check_images):
        monkeypatch.setattr(sys, 'argv', ['check_images.py', *map(str, args)])
        status = exit_status(tool.main)
        return (status, *capsys.readouterr())

    return call


def kinds(folder, check):
    """{kind: names of the files}, from the CSV file; and the exit status."""
    status = check(folder, f'-output={folder}/f.csv')[0]
    found = {}
    with open(folder / 'f.csv', newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            found.setdefault(row['kind'], set()).add(row['image'].split('/')[-1])
    return found, status


def test_sound_lists_have_no_findings(folder, check):
    status, out, _ = check(folder)
    assert status == 0 and out.count('nothing') == 2 and '10 images, 2 classes' in out
    assert check(folder / 'train_list.txt')[0] == check(folder / 'train_list.txt', folder / 'val_list.txt')[0] == 0


def unusual(folder, kind):
    """Writes one unusual image; returns its name."""
    path = folder / 'x.png'
    if kind == 'extension':
        picture(99).save(path, 'BMP')
    elif kind == 'CMYK':
        path = folder / 'x.jpg'
        picture(99).convert('CMYK').save(path)
    elif kind == 'palette':
        picture(99).convert('P').save(path)
    elif kind == '16-bit':
        Image.fromarray(np.asarray(picture(99).convert('L')).astype(np.uint16) * 257).save(path)
    elif kind == 'float':
        path = folder / 'x.tif'
        Image.fromarray(np.asarray(picture(99).convert('L'), np.float32)).save(path)
    elif kind == 'EXIF':
        exif = Image.Exif()
        exif[0x0112] = 6
        picture(99).save(path, exif=exif)
    else:
        picture(99, {'tiny': (40, 31), 'thin': (500, 40), 'huge': (10000, 5001)}[kind]).save(path)
    return path.name


@pytest.mark.parametrize('kind', ['extension', 'CMYK', 'palette', '16-bit', 'float', 'EXIF', 'tiny', 'thin',
                                  pytest.param('huge', marks=pytest.mark.long)])
def test_unusual_images_are_named(folder, check, kind):
    name = unusual(folder, kind)
    add(folder, 'train', name, 0)
    found, status = kinds(folder, check)
    assert found[kind] == {name}
    assert set(found) - {kind} <= {'broken'} if kind == 'float' else (set(found), status) == ({kind}, 0)


@pytest.mark.parametrize(('content', 'kind'), [('cut', 'truncated'), ('text', 'broken'), ('', 'broken'),
                                               (None, 'missing')])
def test_images_that_cannot_be_decoded_are_serious(folder, check, content, kind):
    if content == 'cut':
        picture(0, (400, 400)).save(folder / 'x.jpg')
        data = (folder / 'x.jpg').read_bytes()
        (folder / 'x.jpg').write_bytes(data[:len(data) // 2])
    elif content is not None:
        (folder / 'x.jpg').write_text(content)
    add(folder, 'val', 'x.jpg', 1)
    assert kinds(folder, check) == ({kind: {'x.jpg'}}, 1)


def test_copies_within_and_across_lists_and_under_two_labels(folder, check):
    (folder / 'same.png').write_bytes((folder / '1.png').read_bytes())
    Image.open(folder / '2.png').save(folder / 'lossless.bmp')  # other bytes, the same pixels
    Image.open(folder / '3.png').resize((96, 80), Image.BICUBIC).save(folder / 'near.jpg', quality=70)
    Image.open(folder / '4.png').save(folder / 'near4.jpg', quality=70)
    Image.open(folder / '5.png').save(folder / 'other.bmp')
    for name, part, label in (('same.png', 'train', 1), ('lossless.bmp', 'val', 0), ('near.jpg', 'val', 1),
                              ('near4.jpg', 'train', 0), ('other.bmp', 'train', 0), ('7.png', 'train', 1)):
        add(folder, part, name, label)
    found, status = kinds(folder, check)
    assert status == 1 and found == {
        'copy': {'same.png', '7.png', 'other.bmp'}, 'in two lists': {'2.png', 'lossless.bmp'},
        'near copy in two lists': {'3.png', 'near.jpg'}, 'near copy': {'4.png', 'near4.jpg'},
        'two labels': {'5.png', 'other.bmp'}}
    status, out, _ = check(folder, f'-write_clean={folder}/clean')
    assert status == 1 and '8 of 14 images' in out, out
    names = [[name.decode().split('/')[-1] for name in read_list(folder / 'clean' / f'{part}_list.txt')[0]]
             for part in ('train', 'val')]
    assert names[0] == ['0.png', '1.png', '4.png', '6.png', '7.png', '8.png', '9.png', 'near4.jpg']
    assert names[1] == [*(f'{n}.png' for n in range(10, 15)), 'lossless.bmp', 'near.jpg']
    assert check(folder / 'clean')[0] == 0
    config = get_config(opts=['DATA.DATA_PATH', str(folder / 'clean')])
    assert len(get_dataset(config, 'train')) == 8 and config.MODEL.NUM_CLASSES == 2


def test_folders_and_images_without_labels(folder, check):
    for name in (*(path.name for path in folder.glob('*.txt')),):
        (folder / name).unlink()
    status, out, _ = check(folder)
    assert status == 0 and '15 images without labels' in out
    for label, name in enumerate(('even', 'odd')):
        (folder / name).mkdir()
        for number in range(label, 15, 2):
            (folder / f'{number}.png').rename(folder / name / f'{number}.png')
    status, out, _ = check(folder, f'-write_clean={folder}/clean')
    assert status == 0 and '15 images, 2 classes' in out and '15 of 15' in out
    assert (folder / 'clean' / 'classes.txt').read_text() == 'even\nodd\n'


def test_mistakes_are_one_line(folder, check):
    (folder / 'empty').mkdir()
    (folder / 'clean').mkdir()
    (folder / 'clean' / 'val_list.txt').write_text('mine')
    for args, words in ((['none'], 'is neither a folder nor a list'), ([folder / 'none.txt'], 'no such list'),
                        ([folder / 'empty'], 'no images'), ([folder, '-output=a.xlsx'], 'ends with .csv'),
                        ([folder, '-output=none/a.csv'], 'there is no folder'),
                        ([folder, folder, f'-write_clean={folder}/new'], 'the same name'),
                        ([folder, '-num_workers=0'], 'at least 1'),
                        ([folder, f'-write_clean={folder}/clean'], 'exists; name another folder')):
        status, _, err = check(*args)
        assert status == 2 and words in err and err.count('\n') == 1, err
    add(folder, 'val', '0.png', 2)
    status, _, err = check(folder)
    assert status == 2 and 'has the label 2, but' in err
    assert (folder / 'clean' / 'val_list.txt').read_text() == 'mine'


@pytest.mark.parametrize('opts', [[], ['TRAIN.MIXUP_PROB', 0], ['TRAIN.REPEATED_AUG', 2],
                                  ['TRAIN.LOSS', 'jsd', 'TRAIN.AUG_SPLITS', 3, 'TRAIN.MIXUP_PROB', 0]])
def test_sheets_of_training_images_and_crops(folder, check, tiny_yaml, opts, tmp_path):
    args = [f'-cfg={tiny_yaml}', f'-data_path={folder}', '-batch_size=8', f'-output={tmp_path}/sheets', '-opts',
            'MODEL.NUM_CLASSES', 2, *opts]
    contents = []
    for _ in range(2):
        assert check(*args, tool=show_images)[0] == 0
        contents.append((tmp_path / 'sheets' / 'train.png').read_bytes())
    assert contents[0] == contents[1]
    sheet = np.asarray(Image.open(tmp_path / 'sheets' / 'train.png'))
    tiles = 8 * (3 if 'jsd' in opts else 1)
    assert sheet.shape == (-(-tiles // 6) * 228, 6 * 180, 3)
    crop = np.asarray(Image.open(tmp_path / 'sheets' / 'val.png'))[10:170, 10:170]
    expected = show_images.to_image(get_dataset(get_config(tiny_yaml, [
        'DATA.DATA_PATH', str(folder)]), 'val')[0][0], get_config(tiny_yaml)).resize((160, 160), Image.BICUBIC)
    assert np.array_equal(crop, expected)


def test_the_sheet_shows_the_batch_that_the_run_trains_on(folder, tiny_yaml):
    from datasets import get_dataloader
    from training.setup import build_mixup
    from utils import STREAM_MIXUP, random_generator
    config = get_config(tiny_yaml, ['DATA.DATA_PATH', str(folder), 'MODEL.NUM_CLASSES', 2, 'DATA.BATCH_SIZE', 6])
    loader = get_dataloader(config, get_dataset(config, 'train'), 'train')
    loader.set_epoch(1)
    images, targets = build_mixup(config)(*next(iter(loader)), random_generator(config.SEED, STREAM_MIXUP, 1, 0, 0))
    tiles = show_images.train_tiles(config, ['even', 'odd'], 1)
    for index, (image, lines, _) in enumerate(tiles):
        assert np.array_equal(image, show_images.to_image(images[index].numpy(), config))
        shares = dict(line.rsplit(' ', 1) for line in lines[1:])
        smooth = [0.9 * float(shares.get(name, '0%')[:-1]) / 100 + 0.05 for name in ('even', 'odd')]
        assert np.allclose(smooth, targets[index].numpy(), atol=0.01)


def test_sheets_of_data_that_cannot_be_used(folder, check, tiny_yaml):
    (folder / '3.png').write_bytes(b'x')
    args = [f'-cfg={tiny_yaml}', '-opts', 'MODEL.NUM_CLASSES', 2, 'DATA.BATCH_SIZE', 10]
    for more, words in (([f'-data_path={folder}'], '3.png: cannot read the image'),
                        ([f'-data_path={folder}/none'], 'no such list'), ([], '-data_path is missing'),
                        (['-epoch=0'], 'at least 1')):
        status, _, err = check(args[0], f'-output={folder}/sheets', *more, *args[1:], tool=show_images)
        assert status == 2 and words in err and err.count('\n') == 1, err
    assert not (folder / 'sheets').exists()
