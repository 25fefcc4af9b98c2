"""Writes photographs of clothes, Fashion-MNIST (28x28 pixels, grey, 10 classes), as an ImageNet-style dataset.

    apt-get install dataset-fashion-mnist
    python benchmarks/prepare_fashion.py -output=data/fashion

writes data/fashion/{train,val}/NUMBER.png and the lists: the first 12,000 images of the training set and the first
2,000 of the test set, or as many as -train and -val say. The files are those of Debian's package; -source names another
folder.

Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv:1708.07747 (MIT license).
"""
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import ArgumentParser, UserError, exit_status  # noqa: E402

SIDE = 28


def read(folder, name, count):
    """The first `count` images of a part, uint8 [N, 28, 28], and their labels."""
    try:
        images, labels = (gzip.decompress((Path(folder) / f'{name}-{kind}-ubyte.gz').read_bytes())
                          for kind in ('images-idx3', 'labels-idx1'))
    except FileNotFoundError as error:
        raise UserError(f'{error.filename}: no such file; install Debian\'s package dataset-fashion-mnist, or name the '
                        'folder of the data set with -source') from None
    images = np.frombuffer(images, np.uint8, offset=16).reshape(-1, SIDE, SIDE)
    return images[:count], np.frombuffer(labels, np.uint8, offset=8)[:count]


def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument('-output', '--output', required=True, metavar='DIR', help='new data folder')
    parser.add_argument('-source', '--source', default='/usr/share/datasets/fashion-mnist', metavar='DIR')
    parser.add_argument('-train', '--train', type=int, default=12000, metavar='N', help='images to train on')
    parser.add_argument('-val', '--val', type=int, default=2000, metavar='N', help='images to evaluate')
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists():
        raise UserError(f'-output={output}: exists')
    parts = {part: read(args.source, name, count)
             for part, name, count in (('train', 'train', args.train), ('val', 't10k', args.val))}
    for part, (images, labels) in parts.items():
        (output / part).mkdir(parents=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(output / part / f'{index:05d}.png')
        (output / f'{part}_list.txt').write_text(
            ''.join(f'{part}/{index:05d}.png {label}\n' for index, label in enumerate(labels)))
    print(f'{len(parts["train"][0]):,} images to train on and {len(parts["val"][0]):,} to evaluate in {output}')
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
