"""Contact sheets: PNG files that show images in a grid, with the file name and the predicted class below each."""
import os

from PIL import Image, ImageDraw, ImageFont, ImageOps

from atomic_file import atomic_file
from errors import UserError
from image_files.memory import described, read_picture, snapshot

COLUMNS, ROWS = 6, 5
SIDE, MARGIN, LINE = 160, 10, 16  # pixels: side of an image, space around it, height of a line of text
RIGHT, WRONG, UNKNOWN = (20, 150, 60), (205, 40, 40), (170, 170, 170)  # colours of the frames


class ContactSheets:
    """Writes `sheet_0001.png`, `sheet_0002.png`, ... with 30 images each; a context manager.

    Raises:
        UserError: the folder cannot be created or is not empty.
    """

    def __init__(self, folder):
        try:
            os.makedirs(folder, exist_ok=True)
            taken = os.listdir(folder)
        except OSError as error:
            raise UserError(f'-save_images={folder}: {error.strerror}; name a folder') from None
        if taken:
            raise UserError(f'-save_images={folder}: is not empty; choose another folder, or empty this one')
        self._folder, self._tiles, self._count = folder, [], 0
        self._font = ImageFont.load_default()

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
            lines, frame = ['no prediction'], UNKNOWN
        else:
            lines = [f'{prediction.names[0]} {prediction.scores[0]:.1%}']
            frame = UNKNOWN if truth is None else RIGHT if prediction.classes[0] == truth else WRONG
            if frame == WRONG:
                lines.append(f'is {truth_name}')
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
        rows = -(-len(self._tiles) // COLUMNS)
        width, height = SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + 3 * LINE
        sheet = Image.new('RGB', (min(COLUMNS, len(self._tiles)) * width, rows * height), 'white')
        draw = ImageDraw.Draw(sheet)
        for index, (picture, lines, frame) in enumerate(self._tiles):
            left, top = index % COLUMNS * width + MARGIN, index // COLUMNS * height + MARGIN
            try:
                image = ImageOps.contain(read_picture(picture), (SIDE, SIDE))
                sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
            except Exception:  # Pillow raises many types for pictures in memory
                pass  # the text below says so
            draw.rectangle((left - 4, top - 4, left + SIDE + 3, top + SIDE + 3), outline=frame, width=4)
            for line, text in enumerate(lines):
                colour = 'black' if line == 0 or frame == UNKNOWN else frame
                draw.text((left, top + SIDE + 6 + line * LINE), self._shortened(text), fill=colour, font=self._font)
        self._count += 1
        with atomic_file(os.path.join(self._folder, f'sheet_{self._count:04d}.png')) as file:
            sheet.save(file, 'png')
        self._tiles = []

    def _shortened(self, text):
        text = text.encode('utf-8', 'replace').decode()  # a file name may contain arbitrary bytes
        if self._font.getlength(text) <= SIDE:
            return text
        while self._font.getlength(text + '...') > SIDE:
            text = text[:-1]
        return text + '...'
