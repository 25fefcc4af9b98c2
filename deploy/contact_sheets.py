"""Contact sheets: PNG files that show images in a grid, with the file name and the predicted class below each."""
import contextlib
import os

from PIL import Image, ImageDraw, ImageFont, ImageOps

from errors import UserError
from image_files.decode import DataError, decode_image

COLUMNS, ROWS = 6, 5
SIDE, MARGIN, LINE = 160, 10, 16  # pixels: side of an image, space around it, height of a line of text
RIGHT, WRONG, UNKNOWN = (20, 150, 60), (205, 40, 40), (170, 170, 170)  # colours of the frames


class ContactSheets:
    """Writes `sheet_0001.png`, `sheet_0002.png`, ... with 30 images each; a context manager.

    Args:
        folder: where to write them.
        exif: whether to turn images as their EXIF orientation says.
    Raises:
        UserError: the folder cannot be created or is not empty.
    """

    def __init__(self, folder, exif=False):
        try:
            os.makedirs(folder, exist_ok=True)
            taken = os.listdir(folder)
        except OSError as error:
            raise UserError(f'-save_images={folder}: {error.strerror}; name a folder') from None
        if taken:
            raise UserError(f'-save_images={folder}: is not empty; choose another folder, or empty this one')
        self._folder, self._exif, self._tiles, self._count = folder, exif, [], 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._tiles:
            self._write()

    def add(self, prediction, truth=None, truth_name=None):
        """Adds the image of a `Prediction` with its predicted class and, if that is wrong, the true one in red.

        Args:
            truth: number of the true class, or None if it is unknown.
            truth_name: its name.
        """
        if prediction.error:
            lines, frame = ['cannot be read'], UNKNOWN
        else:
            lines = [f'{prediction.names[0]} {prediction.scores[0]:.1%}']
            frame = UNKNOWN if truth is None else RIGHT if prediction.classes[0] == truth else WRONG
            if frame == WRONG:
                lines.append(f'is {truth_name}')
        self._tiles.append((prediction.picture, [os.path.basename(prediction.picture), *lines], frame))
        if len(self._tiles) == COLUMNS * ROWS:
            self._write()

    def _write(self):
        self._count += 1
        sheet = draw_sheet([(self._decoded(path), lines, frame) for path, lines, frame in self._tiles])
        sheet.save(os.path.join(self._folder, f'sheet_{self._count:04d}.png'))
        self._tiles = []

    def _decoded(self, path):
        with contextlib.suppress(DataError):  # the text says so
            return decode_image(path, self._exif)


def draw_sheet(tiles):
    """Draws images in a grid.

    Args:
        tiles: list of (RGB image or None, lines of text, colour of the frame); the first line is black.
    Returns:
        RGB image.
    """
    columns, font = min(COLUMNS, len(tiles)), ImageFont.load_default()
    width, height = SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + 3 * LINE
    sheet = Image.new('RGB', (columns * width, -(-len(tiles) // COLUMNS) * height), 'white')
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines, frame) in enumerate(tiles):
        left, top = index % COLUMNS * width + MARGIN, index // COLUMNS * height + MARGIN
        if image is not None:
            image = ImageOps.contain(image, (SIDE, SIDE))
            sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        draw.rectangle((left - 4, top - 4, left + SIDE + 3, top + SIDE + 3), outline=frame, width=4)
        for line, text in enumerate(lines):
            colour = 'black' if line == 0 or frame == UNKNOWN else frame
            draw.text((left, top + SIDE + 6 + line * LINE), _shortened(text, font), fill=colour, font=font)
    return sheet


def _shortened(text, font):
    text = text.encode('utf-8', 'replace').decode()  # a file name may contain arbitrary bytes
    if font.getlength(text) <= SIDE:
        return text
    while font.getlength(text + '...') > SIDE:
        text = text[:-1]
    return text + '...'
