"""DATA.BACKEND cv2 against Pillow: the same random draws, the same operations, nearly the same pixels."""
import io
import sys

import numpy as np
import pytest
from PIL import Image

import image_files.decode
from auto_augment import OPS
from config import get_config
from datasets import get_dataloader, get_dataset
from errors import UserError
from image_files.decode import DataError, decode_image
from opencv.operations import operation, resize
from opencv.package import import_cv2
from opencv.source import ImageSource
from transforms import train_transform

FILL = (124, 116, 104)
BLENDS = {'Color', 'Sharpness'}
GEOMETRY = {'Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY'}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def cv2():
    return pytest.importorskip('cv2', reason='pip install opencv-python-headless')


@pytest.fixture
def simplejpeg():
    return pytest.importorskip('simplejpeg')


@pytest.fixture
def photo_path(golden):
    return golden / 'preprocess' / 'rocket.jpg'


def difference(first, second):
    return np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64))


def test_without_opencv_a_line_says_what_to_install(monkeypatch, list_dataset):
    monkeypatch.setitem(sys.modules, 'cv2', None)
    import_cv2.cache_clear()
    config = get_config(opts=['DATA.DATA_PATH', str(list_dataset), 'DATA.BACKEND', 'cv2', 'MODEL.NUM_CLASSES', 4])
    with pytest.raises(UserError, match='DATA.BACKEND cv2 needs OpenCV: pip install opencv-python-headless; or set'):
        get_dataset(config, 'train')
    assert len(get_dataset(config, 'val')) == 11, 'evaluation does not use it'


@pytest.mark.parametrize('name', sorted(OPS))
def test_operations_have_the_definition_and_strength_of_pillows(cv2, name, photo_path):
    image = Image.open(photo_path).resize((96, 80), Image.BICUBIC)
    for level in (0, 0.1, 0.5, 0.9, 1.0):
        for seed in (0, 2):  # both signs
            argument = OPS[name].argument(level, rng(seed))
            expected = OPS[name].apply(image, argument, FILL, Image.BICUBIC)
            found = operation(name)(np.asarray(image), argument, FILL, Image.BICUBIC)
            assert found.dtype == np.uint8 and found.shape == (80, 96, 3)
            wrong = difference(found, expected)
            if any(map(name.startswith, GEOMETRY)):
                assert wrong.mean() < 2 and np.abs(found.mean() - np.asarray(expected).mean()) < 1
            else:
                assert wrong.max() <= any(map(name.startswith, BLENDS)), (level, argument)


@pytest.mark.parametrize('image', [np.full((8, 9, 3), 7, np.uint8), np.arange(3, dtype=np.uint8).reshape(1, 1, 3),
                                   np.arange(60, dtype=np.uint8).reshape(2, 10, 3)])
def test_operations_on_flat_and_tiny_images(cv2, image):
    for name in set(OPS) - {name for name in OPS if any(map(name.startswith, GEOMETRY))}:
        argument = OPS[name].argument(0.9, rng())
        expected = OPS[name].apply(Image.fromarray(image), argument, FILL, Image.BICUBIC)
        assert difference(operation(name)(image, argument, FILL, Image.BICUBIC), expected).max() <= 1, name


@pytest.mark.parametrize('settings', [
    {}, {'auto_augment': ''}, {'auto_augment': '', 'color_jitter': 0}, {'auto_augment': 'original-mstd0.5'},
    {'auto_augment': 'augmix', 'views': 2}, {'vflip': 0.5, 'interpolation': 'bilinear', 're_mode': 'rand'}])
def test_the_random_draws_are_those_of_pillow_and_the_pixels_nearly(cv2, settings, photo_path):
    pillow, opencv = (train_transform(96, backend=backend, **settings) for backend in ('pil', 'cv2'))
    decoded, wrong = decode_image(photo_path), []
    for seed in range(12):
        first, second = rng(seed), rng(seed)
        expected, found = pillow(decoded, first), opencv(ImageSource(photo_path), second)
        assert first.bit_generator.state == second.bit_generator.state
        assert found.dtype == np.float32 and found.shape == expected.shape
        wrong.append(difference(found, expected).mean())
    assert np.mean(wrong) < 0.08 and max(wrong) < 0.2  # of values with a standard deviation of about 1


@pytest.mark.parametrize('side', [40, 60, 96, 110, 130, 150, 210, 300, 427])
def test_resizing_is_as_close_to_pillows_bicubic_filter_as_pillows_bilinear_one(cv2, side, photo_path):
    image = decode_image(photo_path).crop((100, 0, 100 + side, side))
    expected = image.resize((96, 96), Image.BICUBIC)
    bound = difference(image.resize((96, 96), Image.BILINEAR), expected).mean()
    assert difference(resize(np.asarray(image), 96, Image.BICUBIC), expected).mean() <= 1.2 * bound + 0.1


@pytest.mark.parametrize('with_simplejpeg', [True, False])
def test_large_crops_are_decoded_at_a_reduced_size(cv2, monkeypatch, photo_path, with_simplejpeg, request):
    if with_simplejpeg:
        request.getfixturevalue('simplejpeg')
    else:
        monkeypatch.setattr('opencv.source.simplejpeg_decoder', lambda: None)
    whole = decode_image(photo_path)  # 640 x 427
    for box, side, shape in (((0, 0, 640, 427), 96, (107, 160)), ((10, 20, 400, 400), 96, (107, 160)),
                             ((1, 3, 401, 387), 150, (214, 320)), ((5, 7, 200, 190), 150, (427, 640))):
        source = ImageSource(photo_path)
        assert (source.width, source.height) == whole.size
        crop = source.crop(box, side)
        assert source._pixels.shape[:2] == shape and min(crop.shape[:2]) >= side
        left, top, width, height = box
        expected = whole.crop((left, top, left + width, top + height)).resize((side, side), Image.BICUBIC)
        assert difference(resize(crop, side, Image.BICUBIC), expected).mean() < 4


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, 'JPEG', **options)
    return file.getvalue()


@pytest.mark.parametrize('count', [150, pytest.param(1200, marks=pytest.mark.long)])
def test_simplejpeg_gives_the_pixels_of_pillow(simplejpeg, tmp_path, monkeypatch, count):
    path, used = tmp_path / 'a.jpg', []
    decode = image_files.decode.simplejpeg_decoder()
    assert decode, 'the builds agree on this machine'
    draw = rng(4)
    for number in range(count):
        width, height = draw.integers(1, 90, 2)
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(
            'L' if number % 5 == 0 else 'RGB')
        if number % 3:
            image = image.resize((int(width) * 2, int(height) * 3), Image.BICUBIC)
        data = jpeg(image, quality=int(draw.integers(5, 101)), progressive=number % 4 == 0, optimize=number % 7 == 0,
                    **({} if image.mode == 'L' else {'subsampling': int(number % 3)}))
        if number % 6 == 5:  # damaged
            data = data[:len(data) * 4 // 5] + bytes(draw.integers(0, 256, 30, dtype=np.uint8))
        path.write_bytes(data)
        results = []
        for function in (lambda: lambda *args: used.append(1) or decode(*args), lambda: None):
            monkeypatch.setattr(image_files.decode, 'simplejpeg_decoder', function)
            try:
                results.append(decode_image(path).tobytes())
            except DataError as error:
                results.append(str(error))
        assert results[0] == results[1], number
    assert len(used) > count * 2 / 3


def test_exif_orientation_is_the_same_in_all_ways_to_decode(cv2, tmp_path, photo_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo_path).resize((60, 40)).save(tmp_path / 'a.jpg', exif=exif)
    for turned in (False, True):
        image = decode_image(tmp_path / 'a.jpg', turned)
        with Image.open(tmp_path / 'a.jpg') as opened:
            expected = image_files.decode.to_rgb(opened, turned)
        assert image.tobytes() == expected.tobytes() and image.size == expected.size
        source = ImageSource(tmp_path / 'a.jpg', turned)
        assert (source.width, source.height) == image.size
        assert np.array_equal(source.crop((0, 0, *image.size), 1000), np.asarray(image))


def batches(folder, workers, *opts):
    config = get_config(opts=['DATA.DATA_PATH', str(folder), 'DATA.IMAGE_SIZE', 32, 'DATA.BATCH_SIZE', 4,
                              'DATA.NUM_WORKERS', workers, 'MODEL.NUM_CLASSES', 4, 'DATA.BACKEND', 'cv2', *opts])
    return [images.numpy() for images, _ in get_dataloader(config, get_dataset(config, 'train'), 'train')]


def test_training_batches_do_not_depend_on_the_workers(cv2, list_dataset):
    alone, by_workers = batches(list_dataset, 0), batches(list_dataset, 2)
    assert len(alone) == 3 and all(map(np.array_equal, alone, by_workers))


def test_a_damaged_image_is_named(cv2, tmp_path, photo_path):
    (tmp_path / 'a.jpg').write_bytes(photo_path.read_bytes()[:9000])
    (tmp_path / 'train_list.txt').write_text('a.jpg 0\n' * 4)
    with pytest.raises(DataError, match=r'train_list.txt:\d: .*a.jpg: cannot read the image: image file is truncated'):
        batches(tmp_path, 0)
