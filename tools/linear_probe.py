"""Trains only a new head: computes the pooled features of all images once, and fits a logistic regression to them.

    python tools/linear_probe.py -pretrained=replknet_31b_22k -data_path=photos -output=output/probe
    python predict.py photo.jpg -model=output/probe

Each image is seen once, without augmentation, so this takes about as long as one evaluation of all images. The
regularisation is chosen by the accuracy on the validation list. The output folder has the files of a run folder: it can
be evaluated, exported, or fine-tuned further with -pretrained.
"""
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import paddle_env  # noqa: E402, I001 - sets the environment, so before paddle

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from tqdm import tqdm  # noqa: E402

import utils  # noqa: E402
from atomic_file import atomic_file  # noqa: E402
from config import config_text, get_config  # noqa: E402
from datasets import ImageNet2012Dataset, get_dataloader, get_transform  # noqa: E402
from deploy.equivalence import dygraph_program  # noqa: E402
from errors import ArgumentParser, UserError, exit_status  # noqa: E402
from fuse import WithFeatures, fuse, pack  # noqa: E402
from image_files.lists import CLASSES, is_multi_label, names_file, read_class_names  # noqa: E402
from large_kernel import operator_in_use  # noqa: E402
from run_folder.checkpoint import model_arrays, save_checkpoint  # noqa: E402
from run_folder.layout import BEST, CONFIG  # noqa: E402
from utils import accuracy_line, accuracy_metrics, accuracy_sums  # noqa: E402
from zoo import build_model, pretrained_weights, require_settings_file  # noqa: E402

GRID = '0.001,0.01,0.1,1,10'


def read_arguments(argv=None):
    parser = ArgumentParser(__doc__.splitlines()[0])

    def add(flag, **options):
        parser.add_argument(f'-{flag}', f'--{flag}', **options)

    add('pretrained', required=True, metavar='X', help='weights: a zoo name, a file, or a run folder')
    add('cfg', metavar='FILE', help='settings file (YAML), if there is none next to the weights')
    add('data_path', required=True, metavar='DIR', help='folder with train_list.txt and val_list.txt')
    add('output', required=True, metavar='DIR', help='new folder')
    add('c', default=GRID, metavar='C,...', help='inverse strengths of the regularisation to try (%(default)s)')
    add('image_size', type=int, metavar='N', help='side of the input in pixels (DATA.IMAGE_SIZE)')
    add('batch_size', type=int, default=32, metavar='N', help='images per forward pass (%(default)s)')
    add('num_workers', type=int, metavar='N', help='processes that decode images (DATA.NUM_WORKERS)')
    add('device', default='auto', help='auto, gpu, cpu, npu or xpu')
    args = parser.parse_args(argv)
    try:
        args.c = sorted({float(value) for value in args.c.split(',')})
    except ValueError:
        raise UserError(f'-c={args.c}: give numbers, separated by commas') from None
    if args.c[0] <= 0:
        raise UserError(f'-c={args.c[0]:g}: must be above 0')
    if os.path.exists(args.output) and (not os.path.isdir(args.output) or os.listdir(args.output)):
        raise UserError(f'-output={args.output}: is not empty; name a new folder')
    return args


def read_datasets(config):
    """(training, validation) datasets, both with the transform of evaluations; the labels are one per image."""
    for mode in ('train', 'val'):
        path = os.path.join(config.DATA.DATA_PATH, f'{mode}_list.txt')
        if os.path.isfile(path) and is_multi_label(path):
            raise UserError(f'{path}: has images with several labels, which a linear probe does not support; train '
                            'with DATA.MULTI_LABEL True and TRAIN.FREEZE instead')
    config.DATA.MULTI_LABEL = False  # of the run that the weights come from
    return [ImageNet2012Dataset(config.DATA.DATA_PATH, f'{mode}_list.txt', get_transform(config, 'val'))
            for mode in ('train', 'val')]


def count_classes(train, val, path):
    """Number of classes of the datasets, all of which must have training images."""
    count = 1 + int(max(train.labels.max(), val.labels.max()))
    absent = np.setdiff1d(np.arange(count), train.labels)
    if count < 2:
        raise UserError(f'{path}: has one class only; a classifier needs at least two')
    if len(absent):
        raise UserError(f'{path}: train_list.txt has no image of class {absent[0]}'
                        + (f' and of {len(absent) - 1} others' if len(absent) > 1 else ''))
    return count


def compute_features(model, config, dataset, what):
    """The input of the head for each image, float32 [images, C]."""
    network = fuse(model, final_norm=True)
    if operator_in_use():
        pack(network)
    program, classes, rows = dygraph_program(WithFeatures(network)), model.num_classes, []
    loader = get_dataloader(config, dataset, 'val')
    for images, _ in tqdm(loader, what, total=len(loader), unit='batch', disable=not os.isatty(2)):
        rows.append(program(images)[:, classes:])
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise UserError(f'{dataset.list_file}: the features of some images are not finite; check the weights')
    return features


def fit_head(features, labels, strength):
    """Logistic regression on standardised features.

    Args:
        features: float32 [images, C]; labels: int64 [images], each of 0..K-1 at least once.
        strength: scikit-learn's C, the inverse strength of the regularisation.
    Returns:
        weight [C, K] and bias [K] for the features as they are, float32.
    """
    from sklearn.linear_model import LogisticRegression
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scale[scale == 0] = 1
    found = LogisticRegression(C=strength, max_iter=2000).fit((features - mean) / scale, labels)
    weight, bias = found.coef_.T / scale[:, None], found.intercept_
    if weight.shape[1] == 1:  # with two classes, scikit-learn gives the difference of their logits
        weight, bias = np.concatenate([-weight / 2, weight / 2], axis=1), np.concatenate([-bias / 2, bias / 2])
    return weight.astype('float32'), (bias - mean @ weight).astype('float32')


def evaluate_head(weight, bias, features, labels):
    """Metrics of a head, see `utils.accuracy_metrics`."""
    *sums, _ = accuracy_sums(paddle.to_tensor(features @ weight + bias), paddle.to_tensor(labels))
    return accuracy_metrics(*(float(value) for value in sums), len(labels))


def main():
    args = read_arguments()
    flags = {flag: getattr(args, flag) for flag in ('pretrained', 'data_path', 'image_size', 'num_workers')}
    config = get_config(require_settings_file(args.cfg, args.pretrained), (), {'eval': True, **flags})
    config.DATA.BATCH_SIZE_EVAL = args.batch_size
    train, val = read_datasets(config)
    classes = count_classes(train, val, args.data_path)
    names = names_file(args.data_path, classes)
    if names:
        read_class_names(names, classes)  # refuses a file that does not fit
    device = utils.resolve_device(args.device)
    paddle.set_device(device)
    if device == 'cpu':
        paddle_env.set_threads()
    weights, origin = pretrained_weights(args.pretrained)
    config.MODEL.NUM_CLASSES = classes
    model = build_model(config, weights, origin, drop_head=True)
    model.eval()
    (x, y), (x_val, y_val) = ((compute_features(model, config, data, what), data.labels)
                              for data, what in ((train, 'training images'), (val, 'validation images')))
    best = None
    for strength in args.c:
        weight, bias = fit_head(x, y, strength)
        ours, theirs = evaluate_head(weight, bias, x, y), evaluate_head(weight, bias, x_val, y_val)
        print(f"C {strength:<8g} training Acc@1 {ours['acc1']:7.3f}   validation Acc@1 {theirs['acc1']:7.3f} "
              f"loss {theirs['loss']:.4f}")
        if best is None or theirs['acc1'] > best[0]['acc1']:  # of equals, the most regularised
            best = theirs, weight, bias
    metrics, weight, bias = best
    model.head.weight.set_value(paddle.to_tensor(weight))
    model.head.bias.set_value(paddle.to_tensor(bias))
    os.makedirs(args.output, exist_ok=True)
    config.MODEL.PRETRAINED = ''
    text = config_text(config)
    save_checkpoint(os.path.join(args.output, BEST['model']), {
        'model': model_arrays(model), 'weights_key': 'model', 'epoch': 0, 'config': text,
        'best': {'model': {'epoch': 0, **metrics}}})
    if names:
        shutil.copyfile(names, os.path.join(args.output, CLASSES))
    with atomic_file(os.path.join(args.output, CONFIG)) as file:
        file.write(text.encode())
    print(f'written to {args.output}')
    print(accuracy_line(metrics))
    return 0


if __name__ == '__main__':
    sys.exit(exit_status(main))
