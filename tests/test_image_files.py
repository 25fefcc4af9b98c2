"""Finding and decoding image files: what counts as an image, pixel types, very thin images, fonts for names."""
import os
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFont

import image_files.decode
from deploy.contact_sheets import ContactSheets
from deploy.predictor import Prediction
from errors import UserError
from image_files import fonts
from image_files.decode import DataError, decode_image, to_rgb
from image_files.find import find_images, images_in
from transforms import eval_geometry


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr('utils.logger.propagate', True)
    return caplog


# ---- finding

def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_only_decodable_images_are_found_and_the_others_counted(tmp_path, log):
    touch(tmp_path, 'b.JPG', 'a/c.png', 'a/d.webp', 'x.pdf', 'x.h5', 'x.mpg', 'x.eps', 'raw.CR2', 'phone.HEIC',
          'raw2.cr2', 'README', '._a.png', '.DS_Store', '.ipynb_checkpoints/e.png', '__MACOSX/f.png')
    assert [os.path.relpath(path, tmp_path) for path in images_in(tmp_path)] == ['a/c.png', 'a/d.webp', 'b.JPG']
    line, = log.messages
    assert line.startswith(f'{tmp_path}: not images that can be read, left out: 2 .cr2, ')
    assert '1 .heic (pip install pillow-heif to read them)' in line and line.endswith(', 1 others')
    for hidden in ('DS_Store', '._a', 'ipynb', 'MACOSX'):
        assert hidden not in line


def test_links_are_followed_and_no_folder_is_visited_twice(tmp_path):
    touch(tmp_path, 'photos/a/1.png', 'elsewhere/2.png')
    (tmp_path / 'photos/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'photos/again').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'photos/a/loop').symlink_to(tmp_path / 'photos')
    (tmp_path / 'photos/3.png').symlink_to(tmp_path / 'elsewhere/2.png')
    names = [os.path.relpath(path, tmp_path / 'photos') for path in find_images([str(tmp_path / 'photos')])[0]]
    assert names == ['3.png', 'a/1.png', 'again/2.png']


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    touch(tmp_path, 'a.cr2', 'b.heic')
    with pytest.raises(UserError, match=r'no images in this folder, only 1 .cr2, 1 .heic \(pip install pillow-heif'):
        images_in(tmp_path)


def test_heic_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    touch(tmp_path, 'a.heic')
    with pytest.raises(DataError, match='a.heic: .*needs the package pillow-heif: pip install pillow-heif'):
        decode_image(tmp_path / 'a.heic')
    calls = []
    fake = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, 'pillow_heif', fake)
    assert images_in(tmp_path) == [str(tmp_path / 'a.heic')] and calls


# ---- pixels

@pytest.mark.parametrize(('array', 'words'), [
    (np.arange(256, dtype=np.int32).reshape(16, 16), '32-bit integer pixels have no known range'),
    (np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16), 'floating-point pixels have no known range'),
    (np.linspace(0, 65535, 256, dtype=np.float32).reshape(16, 16), 'scale them to 0..255')])
def test_pixels_without_a_known_range_are_refused(tmp_path, array, words):
    Image.fromarray(array).save(tmp_path / 'a.tif')
    with pytest.raises(DataError, match=f'a.tif: .*{words}'):
        decode_image(tmp_path / 'a.tif')


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.pgm'])
def test_16_bits_keep_their_high_byte_and_12_bits_are_noticed_once(tmp_path, name, log, monkeypatch):
    monkeypatch.setattr(image_files.decode, '_warned', [])
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp * 257).save(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / name))[:, :, 1], ramp)
    assert not log.messages
    for _ in range(2):
        Image.fromarray(ramp * 16).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / name))[:, :, 1], ramp // 16)
    line, = log.messages
    assert 'at most 4080 are nearly black; if the data have 12 bits, multiply them by 16' in line


def test_premultiplied_alpha_and_images_without_pixels(tmp_path):
    grey = Image.new('LA', (4, 4), (100, 255))
    assert np.asarray(to_rgb(grey.convert('La'))).tolist() == np.full((4, 4, 3), 100).tolist()
    with pytest.raises(DataError, match='the image has no pixels, its size is 0 x 5'):
        to_rgb(Image.new('RGB', (0, 5)))


def test_the_image_of_the_caller_is_not_changed():
    palette = Image.new('P', (4, 4))
    palette.info['transparency'] = bytes(range(256))
    to_rgb(palette)
    assert palette.info == {'transparency': bytes(range(256))} and palette.mode == 'P'


def test_over_the_limit_of_pixels_the_message_says_how_to_raise_it(tmp_path, monkeypatch):
    Image.new('L', (100, 100)).save(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4000)
    with pytest.raises(DataError, match='a.png: is too large: .*; if you trust the file, set REPLKNET_MAX_PIXELS'):
        decode_image(tmp_path / 'a.png')


# ---- very thin images

def test_a_tiny_file_of_a_very_thin_image_is_evaluated(tmp_path):
    header = b'\x89PNG\r\n\x1a\n'
    rows = zlib.compress(b'\0\0' * 20000, 9)
    size = (1).to_bytes(4, 'big') + (20000).to_bytes(4, 'big')
    chunks = [(b'IHDR', size + b'\x08\0\0\0\0'), (b'IDAT', rows), (b'IEND', b'')]
    (tmp_path / 'thin.png').write_bytes(header + b''.join(
        len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
        for kind, data in chunks))
    assert eval_geometry(decode_image(tmp_path / 'thin.png'), 224).size == (224, 224)


# ---- fonts

def test_a_font_has_all_characters_or_is_not_taken(tmp_path):
    assert fonts.font_for(['cat', 'a dog']).getname() == ImageFont.load_default().getname()
    assert not fonts.has(ImageFont.load_default(), '猫')
    (tmp_path / 'no.ttf').write_bytes(b'no font')
    with pytest.raises(UserError, match='-font=.*no.ttf: is not a font that can be read'):
        fonts.font_for(['cat'], str(tmp_path / 'no.ttf'))


def test_names_that_no_font_has_are_replaced_by_numbers_with_one_line(tmp_path, log, monkeypatch):
    monkeypatch.setattr(fonts, '_system_fonts', lambda: iter([ImageFont.load_default()]))
    written = []
    monkeypatch.setattr('PIL.ImageDraw.ImageDraw.text', lambda self, at, text, **kwargs: written.append(text))
    Image.new('RGB', (8, 8)).save(tmp_path / '猫.png')
    with ContactSheets(tmp_path / 'sheets', ['猫', '狗']) as sheets:
        sheets.add(Prediction(str(tmp_path / '猫.png'), [1], ['狗'], [0.9]), 0, '猫')
    assert written == ['\\u732b.png', 'class 1 90.0%', 'is class 0']
    line, = log.messages
    assert line.startswith('every font of this system lacks characters of the names') and '-font=FILE' in line
