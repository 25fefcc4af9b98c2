"""Images in folders with a folder for each class, as DATA.DATASET image_folder and tools/make_lists.py read them."""
import os

import numpy as np

from image_files.decode import DataError
from image_files.entries import Paths
from image_files.find import find_images
from image_files.lists import IMAGENET_NAMES, is_imagenet_1k, names_file, read_class_names


def subfolders(folder):
    """Sorted names of the folders in a folder; hidden ones and those that macOS adds to archives do not count.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries
                          if entry.is_dir() and not entry.name.startswith('.') and entry.name != '__MACOSX')
    except OSError as error:
        raise DataError(f'{folder}: cannot be read: {error.strerror}') from None


def class_folders(folder):
    """The same, where each folder is a class.

    Raises:
        DataError: there is no folder, or one whose name cannot be a line of classes.txt.
    """
    names = subfolders(folder)
    if not names:
        raise DataError(f'{folder}: has no folders; put the images of each class into a folder with its name')
    for name in names:
        if name != name.strip() or len(name.splitlines()) != 1 or not name.isprintable():
            raise DataError(f'{os.path.join(folder, name)!r}: rename this folder: the name of a class begins and ends '
                            'with a visible character, and is UTF-8 text in one line')
    return names


def images_by_class(folder, classes):
    """The images in the folders of the classes.

    Args:
        folder: it contains a folder for each class, or for some of them.
        classes: names of all classes; the position of a name is its label.
    Returns:
        (list of paths, sorted within each class; list of labels, ascending).
    Raises:
        DataError: a folder is none of the classes, or there are no images.
    """
    present = class_folders(folder)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise DataError(f'{os.path.join(folder, unknown[0])}: is not one of the {len(classes):,} classes of the '
                        'training images; move or rename this folder')
    paths, labels = [], []
    for label, name in enumerate(classes):
        if name in present:
            found, _ = find_images([os.path.join(folder, name)])
            paths += found
            labels += [label] * len(found)
    return paths, labels


def data_classes(root):
    """Names of the class folders of a data folder: those in train/, or in val/ if there is no train/.

    Raises:
        DataError: see `class_folders`.
    """
    train = os.path.join(root, 'train')
    return class_folders(train if os.path.isdir(train) else os.path.join(root, 'val'))


def read_folder(root, mode, num_classes=None):
    """Reads the images of root/train or root/val as if they were in a list.

    Args:
        root: data folder.
        mode: 'train' or 'val'.
        num_classes: largest number of classes; None for no limit.
    Returns:
        see `lists.read_list`; the paths are relative to `root`.
    Raises:
        DataError: a folder is missing, empty or of no known class, or there are more classes than `num_classes`.
    """
    classes = data_classes(root)
    if num_classes is not None and len(classes) > num_classes:
        raise DataError(f'{root}: has folders of {len(classes):,} classes, but the model has {num_classes:,} outputs; '
                        f'set MODEL.NUM_CLASSES to {len(classes)}')
    paths, labels = images_by_class(os.path.join(root, mode), classes)
    relative = [os.fsencode(os.path.relpath(path, root)) for path in paths]
    return Paths.of(relative), np.array(labels, dtype=np.int64)


def class_names(root, dataset, num_classes=None):
    """Names of the classes of a data folder.

    Args:
        root: data folder, '' for none.
        dataset: DATA.DATASET.
        num_classes: outputs of the model; None for any.
    Returns:
        for 'image_folder' the names of the folders, otherwise those of `lists.names_file`; None if there are none.
    Raises:
        DataError: see `data_classes` and `lists.read_class_names`.
    """
    if dataset != 'image_folder':
        file = names_file(root, num_classes)
        return read_class_names(file, num_classes) if file else None
    names = names_of_folders(data_classes(root))
    if num_classes not in (None, len(names)):
        raise DataError(f'{root}: has folders of {len(names):,} classes, but the model has {num_classes:,}; set '
                        f'MODEL.NUM_CLASSES to {len(names)}, or leave it out')
    return names


def names_of_folders(classes):
    """Names to show for class folders: ImageNet's if these are its 1,000 synsets, otherwise the folders' own."""
    synsets = np.array([os.fsencode(f'{name}/') for name in classes])
    if len(classes) == 1000 and is_imagenet_1k(synsets, np.arange(1000)):
        return read_class_names(IMAGENET_NAMES)
    return list(classes)
