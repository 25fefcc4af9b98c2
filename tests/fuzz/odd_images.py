"""Hand-made image files that are odd, damaged or hostile.

`odd_images()` returns {file name: (bytes, expected)}, where `expected` is the size of the image that is read, or words
of the message with which the file is refused.
"""
import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageCms

# Written by `cjpeg -arithmetic` of libjpeg-turbo 2.1: Pillow cannot write arithmetic coding. 8 x 8, grey.
ARITHMETIC = bytes.fromhex(
    'ffd8ffe000104a46494600010100000100010000ffdb004300100b0c0e0c0a100e0d0e1211101318281a181616183123251d283a333d3c3933'
    '383740485c4e404457453738506d51575f626768673e4d71797064785c656763ffc9000b080008000801011100ffcc000600101005ffda0008'
    '010100003f00fcd35fbe0078a0ffd9')


def photo(width=40, height=30):
    """An RGB image with smooth areas, edges and noise."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:height, :width]
    waves = 128 + 90 * np.sin(np.stack([x / 5, y / 4, (x + y) / 9], -1))
    waves[height // 3:height // 2, width // 4:width // 2] = (250, 30, 60)
    return Image.fromarray((waves + rng.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8))


def encoded(image, kind, **options):
    """An image as bytes of the file format `kind`."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    """A chunk of a PNG file."""
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, rows, depth=8, colour=0, *chunks):
    """A PNG file of `rows`, the bytes before compression, which need not fit the size in its header."""
    header = chunk(b'IHDR', struct.pack('>2I5B', width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b'IDAT', zlib.compress(rows, 9))
    return b''.join((b'\x89PNG\r\n\x1a\n', header, *chunks, pixels, chunk(b'IEND', b'')))


def tiff(width, height, bits, data):
    """A big-endian TIFF file of grey values without compression, which need not fit its size."""
    tags = ((256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 122), (277, 1), (278, height),
            (279, len(data)))
    directory = b''.join(struct.pack('>2H2I', tag, 4, 1, value) for tag, value in tags)
    return b'MM\0*' + struct.pack('>IH', 8, len(tags)) + directory + bytes(4) + data


def _exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _frames(kind):
    return encoded(photo(), kind, save_all=True, append_images=[photo().rotate(90), photo().rotate(180)])


def _replaced(data, old, new):
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


def _colours():
    """Modes of pixels, colour spaces and profiles."""
    image, size = photo(), (40, 30)
    grey, alpha = image.convert('L'), image.convert('RGBA')
    alpha.putalpha(grey)
    cmyk = encoded(image.convert('CMYK'), 'JPEG')
    adobe = cmyk.index(b'\xff\xee')
    length, = struct.unpack('>H', cmyk[adobe + 2:adobe + 4])
    integers = np.asarray(grey).astype(np.int32) * 1000
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()
    return {
        'cmyk-adobe-inverted.jpg': (cmyk, size),
        'cmyk-not-inverted.jpg': (cmyk[:adobe] + cmyk[adobe + 2 + length:], size),
        'cmyk.tif': (encoded(image.convert('CMYK'), 'TIFF'), size),
        'exif-turned.jpg': (encoded(image, 'JPEG', exif=_exif(6)), size),
        'exif-99.jpg': (encoded(image, 'JPEG', exif=_exif(99)), size),
        'exif-damaged.jpg': (_replaced(encoded(image, 'JPEG', exif=_exif(6)), b'MM\0*', b'MM\xff*'), size),
        'palette-transparent.png': (encoded(alpha.quantize(16), 'PNG'), size),
        'palette-short.png': (png(4, 4, b'\0\xff\xff\xff\xff' * 4, 8, 3, chunk(b'PLTE', b'abc')), (4, 4)),
        'palette-missing.png': (png(4, 4, b'\0\0\0\0\0' * 4, 8, 3), (4, 4)),
        'rgba.webp': (encoded(alpha, 'WEBP'), size),
        'grey-alpha.png': (encoded(alpha.convert('LA'), 'PNG'), size),
        'grey-premultiplied.tif': (
            _replaced(encoded(alpha.convert('LA'), 'TIFF'), struct.pack('<2HI2H', 338, 3, 1, 2, 0),
                      struct.pack('<2HI2H', 338, 3, 1, 1, 0)), size),
        '1-bit.png': (encoded(image.convert('1'), 'PNG'), size),
        '16-bit.png': (encoded(Image.fromarray(integers.astype(np.uint16)), 'PNG'), size),
        '16-bit-big-endian.tif': (tiff(*size, 16, integers.astype('>u2').tobytes()), size),
        '32-bit-integer.tif': (encoded(Image.fromarray(integers), 'TIFF'), '32-bit integer pixels'),
        'floating-point.tif': (encoded(Image.fromarray(integers.astype(np.float32)), 'TIFF'), 'floating-point pixels'),
        'lab.tif': (encoded(Image.new('LAB', size), 'TIFF'), size),
        'icc-lab.jpg': (encoded(image, 'JPEG', icc_profile=profile), size),
        'icc-damaged.png': (encoded(image, 'PNG', icc_profile=profile[:50] + b'\xff' * 90), size),
    }


def _shapes_and_bombs():
    """Very small, very thin and very large images, and little data that claim to be much."""
    return {
        '1x1.png': (encoded(photo(1, 1), 'PNG'), (1, 1)),
        '1x1.gif': (encoded(photo(1, 1), 'GIF'), (1, 1)),
        '1x20000.png': (encoded(photo(1, 20000), 'PNG'), (1, 20000)),
        '20000x1.jpg': (encoded(photo(20000, 1), 'JPEG'), (20000, 1)),
        '0x5.gif': (_replaced(encoded(photo(), 'GIF'), struct.pack('<2H', 40, 30), struct.pack('<2H', 0, 5)), (40, 30)),
        'bomb-30000x30000.png': (png(30000, 30000, bytes(100_000), 1), 'REPLKNET_MAX_PIXELS'),
        'bomb-header.gif': (b'GIF89a' + struct.pack('<2H3B', 65535, 65535, 0x80, 0, 0) + bytes(6)
                            + b',' + struct.pack('<4HB', 0, 0, 65535, 65535, 0) + b'\2\1\0\0;', 'REPLKNET_MAX_PIXELS'),
        'bomb-text.png': (png(4, 4, b'\0abcd' * 4, 8, 0, chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(64 << 20), 9))),
                          'cannot read'),
        'bomb-no-data.png': (png(13000, 13000, b'', 8, 2), 'cannot read'),
        'bomb-no-data.tif': (tiff(13000, 13000, 8, b'abc'), 'cannot read'),
    }


def _files():
    """Wrong names, cut files, several frames, and kinds of JPEG that few programs write."""
    image, size = photo(), (40, 30)
    jpeg = encoded(image, 'JPEG', quality=90)
    return {
        '0-bytes.jpg': (b'', 'the file is empty'),
        'text.jpg': (b'<html>404 not found</html>', 'damaged, or of a kind'),
        'zeros.png': (bytes(1000), 'cannot read'),
        'is-a-png.jpg': (encoded(image, 'PNG'), size),
        'is-a-jpeg.webp': (jpeg, size),
        'animated.gif': (_frames('GIF'), size),
        'animated.png': (_frames('PNG'), size),
        'animated.webp': (_frames('WEBP'), size),
        'pages.tif': (_frames('TIFF'), size),
        'progressive.jpg': (encoded(image, 'JPEG', progressive=True), size),
        'arithmetic.jpg': (ARITHMETIC, (8, 8)),
        '12-bit.jpg': (_replaced(jpeg, b'\xff\xc0\0\x11\x08', b'\xff\xc1\0\x11\x0c'), 'of a kind that'),
        'trailing-bytes.jpg': (jpeg + b'\0' * 500 + b'PK\3\4', size),
        'two-images.jpg': (jpeg + encoded(photo(9, 9), 'JPEG'), size),
        'thumbnail-only.jpg': (jpeg[:2] + b'\xff\xe1\xff\xff' + jpeg[2:], 'cannot read'),
        'cut-in-header.jpg': (jpeg[:200], 'cannot read'),
        'cut-in-pixels.jpg': (jpeg[:-200], 'truncated'),
        'cut-in-pixels.png': (encoded(image, 'PNG')[:-500], 'truncated'),
        'cut-in-pixels.webp': (encoded(image, 'WEBP')[:-50], 'cannot read'),
        'cut-in-pixels.gif': (encoded(image, 'GIF')[:-300], 'cannot read'),
        'cut-in-pixels.tif': (encoded(image, 'TIFF', compression='tiff_lzw')[:300], 'cannot read'),
    }


def odd_images():
    """{file name: (bytes, size of the image or words of the message)}."""
    return {**_colours(), **_shapes_and_bombs(), **_files()}


def ordinary_images():
    """Valid files to damage and to cut: {file name: bytes}."""
    image = photo()
    alpha = image.convert('RGBA')
    alpha.putalpha(image.convert('L'))
    grey16 = Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
    return {
        'baseline.jpg': encoded(image, 'JPEG'), 'grey.jpg': encoded(image.convert('L'), 'JPEG'),
        'progressive.jpg': encoded(image, 'JPEG', progressive=True, exif=_exif(6)),
        'restarts.jpg': encoded(image, 'JPEG', restart_marker_blocks=2, subsampling=0),
        'cmyk.jpg': encoded(image.convert('CMYK'), 'JPEG'), 'arithmetic.jpg': ARITHMETIC,
        'rgb.png': encoded(image, 'PNG'), 'palette.png': encoded(alpha.quantize(16), 'PNG'),
        '16-bit.png': encoded(grey16, 'PNG'), 'animated.png': _frames('PNG'),
        'lossy.webp': encoded(image, 'WEBP'), 'lossless.webp': encoded(alpha, 'WEBP', lossless=True),
        'animated.webp': _frames('WEBP'), 'plain.gif': encoded(image, 'GIF'), 'animated.gif': _frames('GIF'),
        'raw.tif': encoded(image, 'TIFF'), 'lzw.tif': encoded(alpha, 'TIFF', compression='tiff_lzw'),
        'deflate.tif': encoded(grey16, 'TIFF', compression='tiff_adobe_deflate'),
        'jpeg.tif': encoded(image, 'TIFF', compression='jpeg'),
        'fax.tif': encoded(image.convert('1'), 'TIFF', compression='group4'),
    }
