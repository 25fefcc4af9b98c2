"""Finds the images that a command line names."""
import logging
import os
from collections import Counter

from PIL import Image

from errors import UserError
from image_files.decode import HEIF, enable_heif
from image_files.lists import read_any_list
from image_files.shards import open_shards

logger = logging.getLogger('replknet')
# Formats that Pillow recognises but cannot decode by itself.
STUBS = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}
MOST_KINDS = 6  # shown in the line about files that are left out


def find_images(sources):
    """Finds the images that the sources refer to; files in folders that are none are counted in one line of the log.

    Args:
        sources: paths of images, folders and lists (.txt).
    Returns:
        (list of paths, list of their labels); a label is -1 where it is unknown, and a tuple in a list in which images
        have several.
    Raises:
        UserError: a folder without images, or a list that cannot be used.
    """
    paths, labels = [], []
    for source in sources:
        if os.path.isdir(source):
            found = images_in(source)
            found_labels = [-1] * len(found)
        elif source.lower().endswith('.txt'):
            names, found_labels = read_any_list(source)
            shards, folder = open_shards(source, names), os.path.dirname(source)
            found = [shards.image(index, os.fsdecode(name)) if shards else os.path.join(folder, os.fsdecode(name))
                     for index, name in enumerate(names)]
        else:
            found, found_labels = [source], [-1]
        paths += found
        labels += (label if isinstance(label, tuple) else int(label) for label in found_labels)
    return paths, labels


def images_in(folder):
    """Sorted paths of the images in a folder and its subfolders, by their extensions.

    Symbolic links are followed, but no folder is visited twice. Hidden files and folders are skipped, and __MACOSX,
    in which macOS's archives keep the hidden ones.

    Raises:
        UserError: there are none.
    """
    extensions, found, others, visited = decodable_extensions(), [], Counter(), set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith('.') and name != '__MACOSX')
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith('.'):
                continue
            if extension in extensions:
                found.append(os.path.join(parent, name))
            else:
                others[extension or 'without extension'] += 1
    left_out = _left_out(others)
    if not found:
        raise UserError(f'{folder}: no images in this folder' + (f', only {left_out}' if left_out else ''))
    if left_out:
        logger.warning(f'{folder}: not images that can be read, left out: {left_out}')
    return sorted(found)


def decodable_extensions():
    """Lower-case extensions, with the dot, of the formats that can be decoded here."""
    heif = enable_heif()
    Image.init()
    return {extension for extension, name in Image.registered_extensions().items()
            if name in Image.OPEN and name not in STUBS} | (HEIF if heif else set())


def _left_out(counts):
    """Counts by extension as text, '' for none."""
    kinds = [f'{count:,} {kind}' + (' (pip install pillow-heif to read them)' if kind in HEIF else '')
             for kind, count in counts.most_common(MOST_KINDS)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(MOST_KINDS))
    return ', '.join(kinds + [f'{rest:,} others'] * bool(rest))
