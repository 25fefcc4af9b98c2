"""Settings: defaults < YAML file (with BASE inheritance) < command line flags < `-opts KEY VALUE ...`.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -batch_size=32 -opts TRAIN.BASE_LR 1e-3 SEED 7

`KEYS` declares every setting. To add one, add a row: its default, its help text and the limits of its value. Unknown
keys, wrong types, values out of range and contradictions are refused in one line that names the file and the key.
"""
import argparse
import ast
import contextlib
import copy
import difflib
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml
from yacs.config import CfgNode as CN

from errors import ArgumentParser, UserError
from image_files.folders import class_names
from settings.checks import CHECKS, group_of, setting

# Whether a key may have another value when a run is resumed, see `config_changes`.
SAME = 'same'  # no: it would be another run
MAY_DIFFER = 'may differ'  # yes; the change is logged
PER_CALL = 'per call'  # it belongs to one call of a script and is not saved with the run


@dataclass(frozen=True)
class Key:
    """The declaration of a setting.

    Attributes:
        default: the default value; its type is the type of the setting.
        help: one line, shown by -h where the key has a flag.
        choices: the allowed values, None for any.
        low, high: inclusive bounds of a number.
        length: number of elements of a list, None for any.
        elements: type of a list's elements, needed where the default is empty.
        nullable: whether null is accepted for a number, as 0; for text and lists it always is, as empty.
        flag: name of its command line flag, '' for none (it is then set by -opts).
        path: whether it is a path, in which ~ stands for the home folder.
        resume: SAME, MAY_DIFFER or PER_CALL.
    """
    default: Any
    help: str
    choices: Optional[tuple] = None
    low: float = -math.inf
    high: float = math.inf
    length: Optional[int] = None
    elements: Optional[type] = None
    nullable: bool = False
    flag: str = ''
    path: bool = False
    resume: str = SAME


KEYS = {
    'BASE': Key([], 'YAML files to start from, relative to the file that names them', elements=str),

    # ---- data
    'DATA.DATASET': Key('imagenet2012', "'imagenet2012': list files; 'image_folder': folders train/CLASS and val/CLASS",
                        ('imagenet2012', 'image_folder'), flag='dataset'),
    'DATA.DATA_PATH': Key('', 'folder with train_list.txt and val_list.txt ("relative/path label" per line), or of '
                          'DATASET image_folder', flag='data_path', path=True, resume=MAY_DIFFER),
    'DATA.EXIF': Key(False, 'turn photos as their EXIF orientation says; off in the published protocol'),
    'DATA.MULTI_LABEL': Key(False, 'images may have several labels in the lists, "path 1,4,7", or none, "path -"; for '
                            'TRAIN.LOSS bce or asymmetric'),
    'DATA.ALLOW_CHANGES': Key(False, 'resume a run although its lists or its classes.txt have changed',
                              resume=PER_CALL),
    'DATA.BATCH_SIZE': Key(64, 'images per process and micro-batch', low=1, flag='batch_size', resume=MAY_DIFFER),
    'DATA.BATCH_SIZE_EVAL': Key(64, 'images per process in evaluation', low=1, flag='batch_size_eval',
                                resume=MAY_DIFFER),
    'DATA.IMAGE_SIZE': Key(224, 'side of the input in pixels', low=32, flag='image_size'),
    'DATA.CROP_PCT': Key(0.875, "protocol 'crop' resizes the shorter side to int(IMAGE_SIZE / CROP_PCT)", low=0.01,
                         high=1),
    'DATA.EVAL_PROTOCOL': Key('auto', "'crop' (resize, centre crop), 'warp' (the whole image to a square) or 'auto' "
                              '(warp from 384 pixels up)', ('auto', 'crop', 'warp')),
    'DATA.BACKEND': Key('pil', "what decodes and augments training images: 'pil' (Pillow, as published) or 'cv2' "
                        '(OpenCV, faster)', ('pil', 'cv2'), resume=MAY_DIFFER),
    'DATA.INTERPOLATION': Key('bicubic', 'filter for resizing images', ('bicubic', 'bilinear')),
    'DATA.IMAGENET_MEAN': Key([0.485, 0.456, 0.406], 'mean of each channel, of values in 0..1', length=3),
    'DATA.IMAGENET_STD': Key([0.229, 0.224, 0.225], 'standard deviation of each channel', length=3),
    'DATA.MAX_BAD_FRACTION': Key(0.0, 'share of the training images that may be undecodable; others of their class '
                                 'replace them; 0: stop at the first', low=0, high=0.5, resume=MAY_DIFFER),
    'DATA.NUM_WORKERS': Key(4, 'DataLoader workers per process; 0 loads in the process itself', low=0,
                            flag='num_workers', resume=MAY_DIFFER),

    # ---- model
    'MODEL.NAME': Key('replknet_31b', 'name of the model, the beginning of the default run folder'),
    'MODEL.NUM_CLASSES': Key(1000, 'outputs of the head; where it is not set, the number of classes in the data folder '
                             'if that names them', low=1),
    'MODEL.LARGE_KERNEL_SIZES': Key([31, 29, 27, 13], 'large kernel of each stage, odd'),
    'MODEL.LAYERS': Key([2, 2, 18, 2], 'pairs of RepLKBlock and ConvFFN in each stage'),
    'MODEL.CHANNELS': Key([128, 256, 512, 1024], 'channels of each stage'),
    'MODEL.SMALL_KERNEL': Key(5, 'parallel small depthwise kernel, odd; 0 for none', nullable=True),
    'MODEL.DW_RATIO': Key(1.0, "width of the depthwise convolution relative to the stage's", low=0.01),
    'MODEL.FFN_RATIO': Key(4.0, "width of the ConvFFN relative to the stage's", low=0.01),
    'MODEL.DROPPATH': Key(0.5, 'highest stochastic-depth rate, reached at the last block', low=0, high=0.999),
    'MODEL.RECOMPUTE': Key(False, 'recompute activations in the backward pass: less memory, more time',
                           resume=MAY_DIFFER),
    'MODEL.PRETRAINED': Key('', 'weights to start from or to evaluate: a file, or a zoo name',
                            flag='pretrained', path=True, resume=MAY_DIFFER),
    'MODEL.RESUME': Key('', "run to continue: its folder, a checkpoint, or 'auto' for an unfinished run with the same "
                        'settings', flag='resume', path=True, resume=PER_CALL),

    # ---- training: schedule and optimizer
    'TRAIN.LAST_EPOCH': Key(0, 'epochs already done; 0: as the checkpoint says, or none', low=0, flag='last_epoch',
                            resume=PER_CALL),
    'TRAIN.NUM_EPOCHS': Key(300, 'epochs of the whole run', low=1, resume=MAY_DIFFER),
    'TRAIN.WARMUP_EPOCHS': Key(10.0, 'epochs of linear warm-up', low=0),
    'TRAIN.COOLDOWN_EPOCHS': Key(0.0, 'epochs at END_LR at the end', low=0),
    'TRAIN.BASE_LR': Key(4e-3, 'learning rate after warm-up, for the actual global batch', low=0),
    'TRAIN.WARMUP_START_LR': Key(1e-6, 'learning rate at the first step', low=0),
    'TRAIN.END_LR': Key(1e-6, 'lowest learning rate after warm-up', low=0),
    'TRAIN.LR_SCHEDULER.NAME': Key('cosine', 'schedule between warm-up and cool-down',
                                   ('cosine', 'polynomial', 'step', 'multistep', 'exponential', 'constant')),
    'TRAIN.LR_SCHEDULER.POWER': Key(1.0, "exponent of 'polynomial'; 1 is a straight line", low=0.01),
    'TRAIN.LR_SCHEDULER.DECAY_RATE': Key(0.1, "factor of 'step', 'multistep' and 'exponential'", low=0, high=1),
    'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': Key(30.0, "'step' and 'exponential' decay by DECAY_RATE per this many epochs",
                                           low=0.01),
    'TRAIN.LR_SCHEDULER.MILESTONES': Key([], "epochs at which 'multistep' decays", elements=float),
    'TRAIN.LINEAR_SCALED_LR': Key(0, 'if set, BASE_LR is for this global batch and is scaled to the actual one', low=0),
    'TRAIN.RECIPE': Key('', "published recipe that -dry_run compares the settings with; '' for none",
                        ('', '1k_224', '1k_224_to_384', '22k', '22k_to_1k_224', '22k_to_1k_384', 'mindspore')),
    'TRAIN.RECIPE_BATCH_SIZE': Key(0, 'global batch of the published recipe; the log notes a different one', low=0),
    'TRAIN.ACCUM_ITER': Key(1, 'micro-batches per optimizer step', low=1, flag='accum_iter', resume=MAY_DIFFER),
    'TRAIN.WEIGHT_DECAY': Key(0.05, 'not applied to biases, norms and other 1-D parameters', low=0),
    'TRAIN.WEIGHT_DECAY_END': Key(-1.0, 'weight decay at the end of a cosine over all steps; below 0: constant'),
    'TRAIN.LAYER_DECAY': Key(1.0, 'layer-wise learning-rate decay; 1 for none', low=0.01, high=1),
    'TRAIN.GRAD_CLIP': Key(0.0, 'gradient clipping; 0 for none', low=0),
    'TRAIN.GRAD_CLIP_MODE': Key('norm', "clips the global 'norm' of all gradients, or each 'value'", ('norm', 'value')),
    'TRAIN.OPTIMIZER.NAME': Key('adamw', 'optimizer',
                                ('adamw', 'sgd', 'momentum', 'nadam', 'lion', 'adan', 'lamb')),
    'TRAIN.OPTIMIZER.EPS': Key(1e-8, 'added to denominators', low=0, high=1),
    'TRAIN.OPTIMIZER.BETAS': Key([0.9, 0.999], "'momentum' uses the first; 'adan' takes three: [0.98, 0.92, 0.99]"),
    'TRAIN.FREEZE': Key(0, 'first parts of the model that are not trained: 1 the stem, 2 also the first stage, ...; '
                        '0: none', low=0),
    'TRAIN.PATIENCE': Key(0, 'stop after so many epochs without a better accuracy; 0: never', low=0, resume=MAY_DIFFER),
    'TRAIN.MODEL_EMA': Key(True, 'keep and evaluate an exponential moving average of the weights'),
    'TRAIN.MODEL_EMA_DECAY': Key(0.9999, 'decay per optimizer step', low=0, high=1),
    'TRAIN.SYNC_BN': Key(True, 'synchronised batch norm on several GPUs'),

    # ---- training: loss and augmentation, see docs/augmentation.md
    'TRAIN.LOSS': Key('auto', "loss; 'auto' is cross-entropy, with DATA.MULTI_LABEL 'bce'", (
        'auto', 'soft_target', 'label_smoothing', 'bce', 'jsd', 'asymmetric', 'asymmetric_single')),
    'TRAIN.CLASS_WEIGHTS': Key('', "weights of the classes in the cross-entropy: 'balanced' (inverse to their number "
                               "of images), 'sqrt' (to its square root) or '' for none", ('', 'balanced', 'sqrt')),
    'TRAIN.SAMPLER': Key('shuffle', "'shuffle': each image once in an epoch; 'balanced': each class equally often",
                         ('shuffle', 'balanced')),
    'TRAIN.SMOOTHING': Key(0.1, 'label smoothing', low=0, high=0.999),
    'TRAIN.BCE_THRESHOLD': Key(0.0, "above 0, 'bce' turns targets above it into 1 and the others into 0", low=0,
                               high=0.999),
    'TRAIN.JSD_ALPHA': Key(12.0, "weight of the divergence in 'jsd'", low=0),
    'TRAIN.ASYMMETRIC.GAMMA_NEG': Key(4.0, "focusing of the negatives in 'asymmetric' and 'asymmetric_single'", low=0),
    'TRAIN.ASYMMETRIC.GAMMA_POS': Key(0.0, 'focusing of the positives', low=0),
    'TRAIN.ASYMMETRIC.CLIP': Key(0.05, "probability margin of the negatives in 'asymmetric'", low=0, high=0.999),
    'TRAIN.MIXUP_PROB': Key(1.0, 'share of batches with mixup or cutmix; 0 switches both off', low=0, high=1),
    'TRAIN.MIXUP_ALPHA': Key(0.8, 'Beta parameter of mixup; 0 for no mixup', low=0),
    'TRAIN.CUTMIX_ALPHA': Key(1.0, 'Beta parameter of cutmix; 0 for no cutmix', low=0),
    'TRAIN.CUTMIX_MINMAX': Key([], "[low, high] share of each side of cutmix's box, instead of CUTMIX_ALPHA's",
                               elements=float),
    'TRAIN.MIXUP_SWITCH_PROB': Key(0.5, 'probability of cutmix where both are on', low=0, high=1),
    'TRAIN.MIXUP_MODE': Key('batch', 'what shares one draw', ('batch', 'pair', 'elem')),
    'TRAIN.RANDOM_RESIZED_CROP.SCALE': Key([0.08, 1.0], "[low, high] share of the image's area", length=2),
    'TRAIN.RANDOM_RESIZED_CROP.RATIO': Key([3 / 4, 4 / 3], '[low, high] of width / height', length=2),
    'TRAIN.HFLIP': Key(0.5, 'probability of a horizontal flip', low=0, high=1),
    'TRAIN.VFLIP': Key(0.0, 'probability of a vertical flip', low=0, high=1),
    'TRAIN.REPEATED_AUG': Key(0, 'differently augmented copies of each image in an epoch of unchanged length; 0 for '
                              'none', low=0),
    'TRAIN.AUG_SPLITS': Key(0, "views of each image for LOSS 'jsd', the first one without augmentation; 0 for none",
                            low=0),
    'TRAIN.AUTO_AUGMENT': Key('rand-m9-mstd0.5-inc1', "policy such as 'original', 'v0' or 'augmix-m3-w3', see "
                              "auto_augment.py; '' for none"),
    'TRAIN.COLOR_JITTER': Key(0.4, 'strength of colour jitter, used only without AUTO_AUGMENT', low=0, high=1),
    'TRAIN.RANDOM_ERASE_PROB': Key(0.25, 'probability of random erasing', low=0, high=1),
    'TRAIN.RANDOM_ERASE_MODE': Key('pixel', 'what fills erased boxes', ('const', 'rand', 'pixel')),
    'TRAIN.RANDOM_ERASE_COUNT': Key(1, 'boxes erased in an image', low=1),

    # ---- mixed precision
    'AMP': Key(False, 'automatic mixed precision, in evaluation too', flag='amp'),
    'AMP_DTYPE': Key('float16', "half-precision type; 'float16' uses dynamic loss scaling", ('float16', 'bfloat16')),
    'AMP_LEVEL': Key('O1', "Paddle's level of mixed precision", ('O1', 'O2')),
    'AMP_LOSS_SCALE': Key(65536.0, 'initial loss scale; halved by every step that overflows in float16', low=1),
    'AMP_LOSS_SCALE_STEPS': Key(2000, 'consecutive steps without overflow after which the loss scale doubles', low=1),

    # ---- the run
    'EVAL': Key(False, 'evaluate and stop', flag='eval', resume=PER_CALL),
    'EVAL_REPORT': Key('', 'with -eval: new folder for a report with report.html; needs matplotlib', flag='report',
                       path=True, resume=PER_CALL),
    'EVAL_TTA': Key('', "with -eval: 'flip' averages the probabilities of each image and its mirror image",
                    ('', 'flip'), flag='tta', resume=PER_CALL),
    'DEVICE': Key('auto', 'auto, gpu, cpu, npu or xpu', ('auto', 'gpu', 'cpu', 'npu', 'xpu'), flag='device',
                  resume=PER_CALL),
    'NPROCS': Key(0, 'processes of main_multi_gpu.py; 0: one per device, or 2 on a machine without devices', low=0,
                  flag='nprocs', resume=PER_CALL),
    'SAVE': Key('', "run folder; '': output/<MODEL.NAME>-<time>", flag='output', path=True, resume=PER_CALL),
    'SAVE_STEPS': Key(0, 'save every so many optimizer steps; 0: at the end of each epoch', low=0, resume=MAY_DIFFER),
    'SAVE_MINUTES': Key(15.0, 'save also after so many minutes; 0: never for that reason', low=0, resume=MAY_DIFFER),
    'SAVE_FREQ': Key(0, 'keep a numbered checkpoint every so many epochs; 0: only last and best', low=0,
                     resume=MAY_DIFFER),
    'SAVE_LATEST_K': Key(0, 'keep also the numbered checkpoints of this many latest epochs', low=0, resume=MAY_DIFFER),
    'SAVE_TOP_K': Key(0, 'keep also this many of the most accurate numbered checkpoints', low=0, resume=MAY_DIFFER),
    'SAVE_MAX_GB': Key(0.0, "limit for all of a run's checkpoints: the least accurate numbered ones are deleted first; "
                       '0 for none', low=0, resume=MAY_DIFFER),
    'REPORT_FREQ': Key(20, 'optimizer steps between progress lines, in the log and in metrics.jsonl', low=1,
                       resume=MAY_DIFFER),
    'SCALARS': Key('', 'write scalars to the run folder too: visualdl, tensorboard (needs tensorboardX) or both',
                   ('', 'visualdl', 'tensorboard', 'both'), resume=MAY_DIFFER),
    'CURVES': Key(True, 'draw curves.png at the end of a run, if matplotlib is installed', resume=MAY_DIFFER),
    'VALIDATE_FREQ': Key(1, 'epochs between evaluations; 0 for none during training', low=0, resume=MAY_DIFFER),
    'SEED': Key(42, 'seed of all random draws', low=0, high=2**31 - 1),

    # ---- dry run
    'DRY_RUN': Key(False, 'print what the run would do, with warnings, and stop', flag='dry_run', resume=PER_CALL),
    'PLAN.NODES': Key(0, 'with -dry_run: machines of the cluster to plan for', low=0, flag='nodes', resume=PER_CALL),
    'PLAN.GPUS_PER_NODE': Key(0, 'with -dry_run: GPUs of each machine', low=0, flag='gpus_per_node', resume=PER_CALL),
    'PLAN.IMAGES_PER_S': Key('', 'with -dry_run: measured images/s of one process, or a run folder to read it from',
                             flag='images_per_s', path=True, resume=PER_CALL),
}

# Keys of earlier versions with the only value they could have: still accepted in files and saved runs, and ignored.
RETIRED_KEYS = {'DATA.IMAGE_CHANNELS': 3, 'MODEL.TYPE': 'RepLKNet'}

VISUALDL = 'VISUALDL'  # a boolean of earlier versions, still accepted: whether SCALARS includes VisualDL

_FLAGS = {declared.flag: key for key, declared in KEYS.items() if declared.flag}


class ConfigError(UserError):
    """A setting that cannot be used; the message names its origin, the key and what to do."""


def get_config(cfg_file=None, opts=(), flags=None):
    """The settings of a YAML file over the defaults, overridden by `flags`, and these by `opts`.

    Args:
        cfg_file: path of a YAML file, or None for the defaults.
        opts: [KEY, VALUE, KEY, VALUE, ...], values as text or as Python values.
        flags: {flag of `get_arguments`: value}; None and False mean that the flag was not given.
    Returns:
        a CfgNode, not frozen.
    Raises:
        ConfigError: unknown key, wrong type, value out of range, contradiction, unreadable file.
    """
    config = _defaults()
    origins = {}  # {key: where it was set}, for messages
    if cfg_file:
        _merge_file(config, Path(cfg_file).expanduser(), origins, ())
    for flag, value in (flags or {}).items():
        if value is not None and value is not False:
            _set(config, _FLAGS[flag], value, f'-{flag}', origins)
    if len(opts) % 2:
        raise ConfigError(f'-opts: {opts[-1]} has no value; give KEY VALUE pairs')
    for key, value in zip(opts[::2], opts[1::2]):
        _set(config, key, _parse(key, value), '-opts', origins)
    if 'MODEL.NUM_CLASSES' not in origins and config.DATA.DATA_PATH:
        with contextlib.suppress(UserError):  # reading the data will report it
            config.MODEL.NUM_CLASSES = len(
                class_names(config.DATA.DATA_PATH, config.DATA.DATASET) or range(KEYS['MODEL.NUM_CLASSES'].default))
    problem = next(itertools.chain.from_iterable(check(config) for check in (_check_values, *CHECKS)), None)
    if problem:
        key, reason, *others = problem
        origin = next((origins[k] for k in (key, *others) if k in origins), 'defaults')
        raise ConfigError(f'{origin}: {key} {reason}')
    return config


def get_arguments(description, argv=None):
    """Parses the flags shared by the main scripts; one dash, as in PaddleViT, or two.

    Returns:
        a Namespace with `cfg`, `opts` and `flags`, the arguments of `get_config`.
    """
    parser = ArgumentParser(description)
    parser.add_argument('-cfg', '--cfg', metavar='FILE', help='YAML file of settings')
    for flag, key in _FLAGS.items():
        declared, kind = KEYS[key], type(KEYS[key].default)
        options = {'action': 'store_true'} if kind is bool else {'type': kind, 'metavar': 'X'}
        parser.add_argument(f'-{flag}', f'--{flag}', help=f'{declared.help} ({key})', **options)
    parser.add_argument('-opts', '--opts', nargs='+', default=[], metavar='KEY VALUE', help='any key of config.py')
    args = parser.parse_args(argv)
    return argparse.Namespace(cfg=args.cfg, opts=args.opts, flags={flag: getattr(args, flag) for flag in _FLAGS})


def config_text(config):
    """The settings as YAML that `-cfg` reads back; those that belong to one call only have their defaults."""
    saved = config.clone()
    saved.defrost()
    for key, declared in KEYS.items():
        if declared.resume == PER_CALL:
            group, name = group_of(saved, key)
            group[name] = declared.default
    return saved.dump()


def config_changes(text, config):
    """How `config` differs from the `config_text` of the run to be resumed.

    Returns:
        two lists of 'KEY old -> new': changes that make it another run, and those that do not.
    """
    old = dict(_flat(yaml.safe_load(text)))
    if VISUALDL in old:
        old['SCALARS'] = _with_visualdl(old.get('SCALARS', ''), old.pop(VISUALDL))
    old = {**{key: declared.default for key, declared in KEYS.items()},  # for keys that the run did not have yet
           **{key: value for key, value in old.items() if (key, value) not in RETIRED_KEYS.items()}}
    new = dict(_flat(yaml.safe_load(config_text(config))))
    changes = {key: f'{key} {value!r} -> {new.get(key)!r}' for key, value in old.items() if value != new.get(key)}
    allowed = [key for key in changes if key in KEYS and KEYS[key].resume == MAY_DIFFER]
    return [line for key, line in changes.items() if key not in allowed], [changes[key] for key in allowed]


# ---- from a source of settings to their values

def _defaults():
    config = CN()
    for key, declared in KEYS.items():
        *groups, name = key.split('.')
        node = config
        for group in groups:
            node = node.setdefault(group, CN())
        node[name] = copy.copy(declared.default)
    return config


def _flat(group, prefix=''):
    """Yields (dotted key, value) of nested dicts."""
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses repeated keys, of which PyYAML would silently use the last one."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(f'{self.name}:{line}: {key.value} is set in line {lines[key.value]} already; '
                                  'put its values in one place')
            lines[key.value] = line
        return node


def _merge_file(config, path, origins, including):
    if path.resolve() in including:
        raise ConfigError(f'{path}: BASE: the files include each other')
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.load(file, _UniqueKeyLoader) or {}
    except FileNotFoundError:
        raise ConfigError(f'{path}: no such config file') from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f'{path}: cannot be read as YAML: {" ".join(str(err).split())}') from None
    if not isinstance(values, dict):
        raise ConfigError(f'{path}: a config file holds KEY: value lines, this one a {type(values).__name__}')
    bases = values.pop('BASE', None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f'{path}: BASE takes a file name or a list of them, not {bases!r}')
    for base in bases:
        _merge_file(config, path.parent / os.path.expanduser(base), origins, including + (path.resolve(),))
    _merge_dict(config, values, str(path), origins, '')


def _merge_dict(config, values, origin, origins, prefix):
    for name, value in values.items():
        key = f'{prefix}{name}'
        if not _keys_of_group(key):
            _set(config, key, value, origin, origins)
        elif isinstance(value, dict):
            _merge_dict(config, value, origin, origins, key + '.')
        else:
            raise ConfigError(f'{origin}: {key} is a group of keys, not {value!r}')


def _keys_of_group(key):
    return [known for known in KEYS if known.startswith(key + '.')]


def _with_visualdl(scalars, on):
    """The value of SCALARS after VisualDL is switched on or off, with TensorBoard as it was."""
    return {(False, False): '', (True, False): 'visualdl', (False, True): 'tensorboard', (True, True): 'both'}[
        bool(on), scalars in ('tensorboard', 'both')]


def _set(config, key, value, origin, origins):
    if key == VISUALDL:
        if not isinstance(value, bool):
            raise ConfigError(f'{origin}: {key} takes True or False, not {value!r}; SCALARS is its new name')
        key, value = 'SCALARS', _with_visualdl(config.SCALARS, value)
    if key in RETIRED_KEYS:
        if value != RETIRED_KEYS[key]:
            raise ConfigError(f'{origin}: {key} is {value!r}; only {RETIRED_KEYS[key]!r} is supported, so leave it out')
        return
    if key not in KEYS:
        inner = _keys_of_group(key)
        if inner:
            raise ConfigError(f'{origin}: {key} is a group of keys; set one of {", ".join(inner)}')
        last = '.' + key.split('.')[-1]
        near = difflib.get_close_matches(key, KEYS, n=1) or [known for known in KEYS if known.endswith(last)][:1]
        hint = f'did you mean {near[0]}?' if near else 'config.py lists them all'
        raise ConfigError(f'{origin}: unknown key {key}; {hint}')
    group, name = group_of(config, key)
    group[name] = _converted(value, KEYS[key], key, origin)
    origins[key] = origin


def _parse(key, value):
    """A value typed on the command line: text stays text where the setting is text."""
    if not isinstance(value, str) or (key in KEYS and isinstance(KEYS[key].default, str)):
        return value
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False', 'null': 'None'}.get(value.lower(), value))
    except (ValueError, SyntaxError):
        return value


_TYPES = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}
_LISTS = {int: 'whole numbers', float: 'numbers', str: 'strings'}


def _converted(value, declared, key, origin):
    """`value` in the type of its key; floats may be whole numbers, and '4e-3', which YAML reads as text."""
    kind = type(declared.default)
    if value is None and (kind in (str, list) or declared.nullable):
        return kind()

    def convert(value, kind):
        if kind is float and type(value) in (int, float, str):
            with contextlib.suppress(ValueError):
                if math.isfinite(float(value)):
                    return float(value)
        elif type(value) is kind:
            return value
        raise ConfigError(f'{origin}: {key} takes {_TYPES[kind]}, not {value!r}')

    if kind is not list:
        value = convert(value, kind)
        return os.path.expanduser(value) if declared.path else value
    element = declared.elements or type(declared.default[0])
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f'{origin}: {key} takes a list of {_LISTS[element]}, not {value!r}')
    return [convert(v, element) for v in value]


def _check_values(config):
    for key, declared in KEYS.items():
        value = setting(config, key)
        if declared.choices and value not in declared.choices:
            yield key, f'is {value!r}; choose from {", ".join(choice or repr(choice) for choice in declared.choices)}'
        if declared.length is not None and len(value) != declared.length:
            yield key, f'has {len(value)} values; it takes {declared.length}'
        if isinstance(value, (int, float)) and not declared.low <= value <= declared.high:
            bounds = (f'at least {declared.low}' if declared.high == math.inf
                      else f'from {declared.low} to {declared.high}')
            hint = f'; it is a share, not a percentage: {value / 100:g}' if declared.high <= 1 < value <= 100 else ''
            yield key, f'is {value}; it must be {bounds}{hint}'
