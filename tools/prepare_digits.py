"""Writes the 1,797 handwritten digits of scikit-learn (8x8 pixels, 10 classes) as an ImageNet-style dataset.

    python tools/prepare_digits.py -output data/digits

writes data/digits/{train,val}/LABEL/NUMBER.png, train_list.txt (1,437 lines) and val_list.txt (360 lines). With the
images ordered by class, every fifth one goes to validation. The folder appears only when it is complete. An existing
folder is checked and kept, so the command can be run again, even twice at the same time.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import ArgumentParser, UserError, exit_status  # noqa: E402

SIZES = {'train': 1437, 'val': 360}


def load_images():
    """The images as uint8 [1797, 8, 8], 0 to 255, and their labels [1797].

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('prepare_digits.py needs scikit-learn for the images: pip install scikit-learn') from None
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target


def split(labels):
    """Stratified split: {'train': indices, 'val': indices}, each ascending."""
    by_class = np.argsort(labels, kind='stable')
    val = np.sort(by_class[::5])
    return {'train': np.setdiff1d(by_class, val), 'val': val}


def write_dataset(folder):
    """Writes the images and the lists into an existing folder."""
    images, labels = load_images()
    for part, indices in split(labels).items():
        lines = []
        for index in indices:
            path = f'{part}/{labels[index]}/{index:04d}.png'
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(folder / path)
            lines.append(f'{path} {labels[index]}\n')
        (folder / f'{part}_list.txt').write_text(''.join(lines))


def check_dataset(folder):
    """Raises UserError unless the folder contains every image and both lists."""
    for part, size in SIZES.items():
        path = folder / f'{part}_list.txt'
        lines = path.read_text().splitlines() if path.is_file() else []
        missing = [line for line in lines if not (folder / line.rsplit(' ', 1)[0]).is_file()]
        if len(lines) != size or missing:
            what = f'{missing[0].rsplit(" ", 1)[0]} is missing' if missing else f'{path.name} should have {size} lines'
            raise UserError(f'{folder}: is not the complete digits dataset, {what}; delete the folder and run '
                            'again, or choose another -output')


def prepare_digits(output):
    """Writes the dataset unless it exists.

    Returns:
        bool: whether this call has written it.
    Raises:
        UserError: scikit-learn is not installed, or `output` is something else or incomplete.
    """
    output = Path(output)
    written = False
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f'.{output.name}-') as scratch:
            folder = Path(scratch) / output.name
            folder.mkdir()
            write_dataset(folder)
            try:
                folder.rename(output)
                written = True
            except OSError:
                if not output.is_dir():
                    raise
                shutil.rmtree(folder)  # another process has written it in the meantime
    check_dataset(output)
    return written


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('-output', '--output', default='data/digits', help='folder to write (default: %(default)s)')
    output = parser.parse_args().output
    try:
        written = prepare_digits(output)
    except OSError as error:
        raise UserError(f'{output}: cannot be written: {error.strerror}; choose another folder with -output, or work '
                        'in a writable copy of this repository') from None
    print(f'{output}: {"written" if written else "exists already"}, '
          f'{SIZES["train"]} training and {SIZES["val"]} validation images')


if __name__ == '__main__':
    sys.exit(exit_status(main))
