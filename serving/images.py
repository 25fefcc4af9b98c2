"""Decodes untrusted image files."""
import io
import warnings

from PIL import Image, UnidentifiedImageError

from image_files.decode import DataError, enable_heif, to_rgb
from serving.limits import Refusal

# Pillow reads many more, among them EPS, for which it runs Ghostscript.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'HEIF')
NAMES = 'JPEG, PNG, WebP, GIF, BMP or TIFF'


def formats():
    """The formats of FORMATS that this installation of Pillow reads: HEIF needs the package pillow-heif."""
    enable_heif()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decode(data, accepted, pixels, exif):
    """Decodes an image file in memory, as `decode_image` decodes a file with this content.

    Args:
        data: bytes of the file.
        accepted: result of `formats`.
        pixels: largest number of pixels of an image; larger ones are refused before they are decoded.
        exif: whether to rotate it according to its EXIF orientation.
    Returns:
        RGB image.
    Raises:
        Refusal: it cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Pillow's warnings about odd files
            image = Image.open(io.BytesIO(data), formats=accepted)
            if image.width * image.height > pixels:
                raise Image.DecompressionBombError
            return to_rgb(image, exif)
    except Image.DecompressionBombError:
        raise Refusal(413, f'the image has more than {pixels / 1e6:g} million pixels; make it smaller') from None
    except UnidentifiedImageError:
        raise Refusal(415, f'this is not an image in one of the formats {NAMES}') from None
    except DataError as error:
        raise Refusal(422, str(error)) from None
    except Exception:  # Pillow raises many types for damaged files, with texts that name objects of this process
        raise Refusal(422, 'the image is damaged') from None
