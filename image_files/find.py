"""Finds the images that a command line names."""
import os

from PIL import Image

from errors import UserError
from image_files.lists import read_list


def find_images(sources):
    """Finds the images that the sources refer to.

    Args:
        sources: paths of images, folders and lists (.txt).
    Returns:
        (list of paths, list of their labels); a label is -1 where it is unknown.
    Raises:
        UserError: a folder without images, or a list that cannot be used.
    """
    paths, labels = [], []
    for source in sources:
        if os.path.isdir(source):
            found = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names
                     if os.path.splitext(name)[1].lower() in Image.registered_extensions()]
            if not found:
                raise UserError(f'{source}: no images in this folder')
            found, found_labels = sorted(found), [-1] * len(found)
        elif source.lower().endswith('.txt'):
            names, found_labels = read_list(source, unlabelled=True)
            found = [os.path.join(os.path.dirname(source), os.fsdecode(name)) for name in names]
        else:
            found, found_labels = [source], [-1]
        paths += found
        labels += map(int, found_labels)
    return paths, labels
