"""Finds a font that can draw the names of classes and runs."""
import functools
import glob
import os
import re

from PIL import ImageFont

from errors import UserError

SIZE = 11  # pixels
FOLDERS = ('~/.local/share/fonts', '~/.fonts', '/usr/share/fonts', '/usr/local/share/fonts', '~/Library/Fonts',
           '/Library/Fonts', '/System/Library/Fonts', 'C:/Windows/Fonts')
_MISSING = '\U0010fffe'  # no font has this character


def font_for(texts, path=None):
    """A font that has all characters of some texts.

    Args:
        texts: strings.
        path: the font file to use; None for Pillow's own font, or else one of the system's.
    Returns:
        a Pillow font, or None if no font has them all.
    Raises:
        UserError: `path` is not a font.
    """
    characters = {character for text in texts for character in text if not character.isspace()}
    if path:
        try:
            font = ImageFont.truetype(path, SIZE)
        except OSError as error:
            raise UserError(f'-font={path}: is not a font that can be read: {error}') from None
        return font if _covers(font, characters) else None
    default = ImageFont.load_default()
    return default if _covers(default, characters) else next(
        (font for font in _system_fonts() if _covers(font, characters)), None)


def prepare_texts(figure):
    """Draws the texts of a matplotlib figure as they are, without formulas, and in a font that has their characters."""
    from matplotlib.font_manager import FontProperties
    texts = figure.findobj(lambda artist: hasattr(artist, 'set_parse_math'))
    font = None if all(text.get_text().isascii() for text in texts) else font_for([text.get_text() for text in texts])
    for text in texts:
        text.set_parse_math(False)  # a name with $ is no formula
        if isinstance(getattr(font, 'path', None), str):
            text.set_fontproperties(FontProperties(fname=font.path, size=text.get_fontsize()))


def _system_fonts():
    patterns = (os.path.join(os.path.expanduser(folder), '**', '*.[to]t[fc]') for folder in FOLDERS)
    files = [file for pattern in patterns for file in glob.glob(pattern, recursive=True)]
    for file in sorted(files, key=lambda file: (not re.search('Sans|Hei|Gothic', file),
                                                bool(re.search('Bold|Oblique|Italic|Mono', file)), file)):
        try:
            yield ImageFont.truetype(file, SIZE)
        except OSError:
            continue


def _covers(font, characters):
    return all(has(font, character) for character in characters)


@functools.lru_cache(maxsize=None)
def has(font, character):
    """Whether a font has a character; those it lacks are all drawn alike, as a box for example."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow's bitmap font
        return ord(character) < 256
    return character.isspace() or _drawn(font, character) != _drawn(font, _MISSING)


def _drawn(font, character):
    mask = font.getmask(character)
    return mask.size, bytes(mask)
