"""Contact sheets: PNG files that show images in a grid, with the file name and the predicted class below each."""
import contextlib
import logging
import os

from PIL import Image, ImageDraw, ImageFont, ImageOps

from atomic_file import atomic_file
from errors import UserError
from image_files.fonts import font_for, has
from image_files.memory import described, read_picture, snapshot

logger = logging.getLogger('replknet')
COLUMNS, ROWS = 6, 5
SIDE, MARGIN, LINE = 160, 10, 16  # pixels: side of an image, space around it, height of a line of text
RIGHT, WRONG, UNKNOWN = (20, 150, 60), (205, 40, 40), (170, 170, 170)  # colours of the frames


class ContactSheets:
    """Writes `sheet_0001.png`, `sheet_0002.png`, ... with 30 images each; a context manager.

    Args:
        folder: new or empty folder.
        names: names of all classes. If no font has their characters, the numbers of the classes are written instead.
        font: font file; None for Pillow's own font or, for names that it cannot write, one of the system's.
        exif: whether to turn images as their EXIF orientation says.
    Raises:
        UserError: the folder cannot be created or is not empty, or the font cannot be read.
    """

    def __init__(self, folder, names=(), font=None, exif=False):
        try:
            os.makedirs(folder, exist_ok=True)
            taken = os.listdir(folder)
        except OSError as error:
            raise UserError(f'-save_images={folder}: {error.strerror}; name a folder') from None
        if taken:
            raise UserError(f'-save_images={folder}: is not empty; choose another folder')
        self._folder, self._exif, self._tiles, self._count = folder, exif, [], 0
        chosen = font_for(names, font)
        self._font, self._names = chosen or ImageFont.load_default(), chosen is not None
        if chosen is None:
            lacking = f'{font} lacks' if font else 'every font of this system lacks'
            logger.warning(f'{lacking} characters of the names of the classes, so contact sheets show their numbers; '
                           'name another font with -font=FILE')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._tiles:
            self._write()

    def add(self, prediction, truth=None, truth_name=None, multi_label=False):
        """Adds the image of a `Prediction` with its predicted class and, if that is wrong, the true one in red.

        Args:
            truth: number of the true class, or None if it is unknown.
            truth_name: its name.
            multi_label: whether `truth` is a tuple of classes, and `truth_name` the names of all of them.
        """
        if prediction.error:
            lines, frame = ['no prediction'], UNKNOWN
        elif multi_label:
            names = prediction.names if self._names else prediction.classes
            lines = [', '.join(f'{name} {score:.0%}' for name, score in zip(names, prediction.scores)) or 'no label']
            frame = UNKNOWN if truth is None else RIGHT if set(prediction.classes) == set(truth) else WRONG
            if frame == WRONG:
                labels = truth_name if self._names else ', '.join(map(str, truth))
                lines.append(f'is {labels}' if truth else 'has no label')
        else:
            name = prediction.names[0] if self._names else f'class {prediction.classes[0]}'
            lines = [f'{name} {prediction.scores[0]:.1%}']
            frame = UNKNOWN if truth is None else RIGHT if prediction.classes[0] == truth else WRONG
            if frame == WRONG:
                lines.append(f'is {truth_name}' if self._names else f'is class {truth}')
        name = os.path.basename(described(prediction.picture))
        self._tiles.append((self._kept(prediction.picture), [name, *lines], frame))
        if len(self._tiles) == COLUMNS * ROWS:
            self._write()

    def _kept(self, picture):
        """The picture as it is now, until its sheet is full; None if it cannot be copied."""
        try:
            return snapshot(picture)
        except Exception:  # Pillow raises many types
            return None

    def _write(self):
        self._count += 1
        tiles = [(self._decoded(picture), lines, frame) for picture, lines, frame in self._tiles]
        sheet = draw_sheet(tiles, self._font)
        with atomic_file(os.path.join(self._folder, f'sheet_{self._count:04d}.png')) as file:
            sheet.save(file, 'png')
        self._tiles = []

    def _decoded(self, picture):
        with contextlib.suppress(Exception):  # Pillow raises many types for pictures in memory; the text says so
            return read_picture(picture, self._exif)


def draw_sheet(tiles, font=None):
    """Draws images in a grid.

    Args:
        tiles: list of (RGB image or None, lines of text, colour of the frame); the first line is black.
        font: Pillow font; None for Pillow's own.
    Returns:
        RGB image.
    """
    columns, font = min(COLUMNS, len(tiles)), font or ImageFont.load_default()
    width, height = SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + 3 * LINE
    sheet = Image.new('RGB', (columns * width, -(-len(tiles) // COLUMNS) * height), 'white')
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines, frame) in enumerate(tiles):
        left, top = index % COLUMNS * width + MARGIN, index // COLUMNS * height + MARGIN
        if image is not None:
            if 2 * SIDE * min(image.size) < max(image.size):  # `contain` would leave no pixel of its short side
                image = image.resize([SIDE if side == max(image.size) else 1 for side in image.size])
            image = ImageOps.contain(image, (SIDE, SIDE))
            sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        draw.rectangle((left - 4, top - 4, left + SIDE + 3, top + SIDE + 3), outline=frame, width=4)
        for line, text in enumerate(lines):
            colour = 'black' if line == 0 or frame == UNKNOWN else frame
            draw.text((left, top + SIDE + 6 + line * LINE), shortened(text, font, SIDE), fill=colour, font=font)
    return sheet


def shortened(text, font, width):
    """The text, cut to `width` pixels."""
    text = ''.join(character if has(font, character) else character.encode('ascii', 'backslashreplace').decode()
                   for character in text)  # a file name may contain any bytes
    if font.getlength(text) <= width:
        return text
    while font.getlength(text + '...') > width:
        text = text[:-1]
    return text + '...'
