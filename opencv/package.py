"""The optional package OpenCV."""
import functools

from errors import UserError


@functools.lru_cache(maxsize=None)
def import_cv2():
    """The module cv2, with its own threads off, since DataLoader workers already use the cores.

    Raises:
        UserError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise UserError('DATA.BACKEND cv2 needs OpenCV: pip install opencv-python-headless; or set DATA.BACKEND '
                        'pil') from None
    cv2.setNumThreads(0)
    return cv2
