"""Settings: defaults < YAML file (with BASE inheritance) < command line flags < `-opts KEY VALUE ...`.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -batch_size=32 -opts TRAIN.BASE_LR 1e-3 SEED 7

Every key stands below with its default; a key that does not is refused, and so are wrong types and contradictions,
with one line that names the file and the key. Scripts freeze the result and write it to the run folder.
"""
import argparse
import ast
import math
from pathlib import Path

import yaml
from yacs.config import CfgNode as CN

from dry_run.recipes import RECIPES
from errors import ArgumentParser, UserError

_C = CN()
_C.BASE = []  # YAML files to start from, relative to the file that names them

_C.DATA = CN()
_C.DATA.DATASET = 'imagenet2012'  # ImageNet-style lists: DATA_PATH/{train,val}_list.txt, "relative/path label" per line
_C.DATA.DATA_PATH = ''
_C.DATA.BATCH_SIZE = 64  # per process and micro-batch
_C.DATA.BATCH_SIZE_EVAL = 64  # per process
_C.DATA.IMAGE_SIZE = 224
_C.DATA.IMAGE_CHANNELS = 3
_C.DATA.CROP_PCT = 0.875  # protocol 'crop' resizes the shorter side to int(IMAGE_SIZE / CROP_PCT)
_C.DATA.EVAL_PROTOCOL = 'auto'  # 'crop', 'warp' (whole image to a square) or 'auto': warp at 384 and above
_C.DATA.INTERPOLATION = 'bicubic'
_C.DATA.IMAGENET_MEAN = [0.485, 0.456, 0.406]
_C.DATA.IMAGENET_STD = [0.229, 0.224, 0.225]
_C.DATA.NUM_WORKERS = 4  # per process; 0 loads in the process itself

_C.MODEL = CN()
_C.MODEL.TYPE = 'RepLKNet'
_C.MODEL.NAME = 'replknet_31b'
_C.MODEL.NUM_CLASSES = 1000
_C.MODEL.LARGE_KERNEL_SIZES = [31, 29, 27, 13]  # per stage, odd
_C.MODEL.LAYERS = [2, 2, 18, 2]  # per stage: pairs of (RepLKBlock, ConvFFN)
_C.MODEL.CHANNELS = [128, 256, 512, 1024]
_C.MODEL.SMALL_KERNEL = 5  # parallel small depthwise kernel, odd; 0 for none
_C.MODEL.DW_RATIO = 1.0  # width of the depthwise convolution over the stage's width
_C.MODEL.FFN_RATIO = 4.0
_C.MODEL.DROPPATH = 0.5  # highest stochastic-depth rate, reached at the last block
_C.MODEL.RECOMPUTE = False  # recompute activations in the backward pass: less memory, more time
_C.MODEL.PRETRAINED = ''  # file of weights, or a name of the zoo
_C.MODEL.RESUME = ''  # run folder or checkpoint to continue; 'auto': an unfinished run of these settings, if any

_C.TRAIN = CN()
_C.TRAIN.LAST_EPOCH = 0  # epochs already done; 0: from the checkpoint, or none
_C.TRAIN.NUM_EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 10.0
_C.TRAIN.COOLDOWN_EPOCHS = 0.0  # last epochs, at END_LR
_C.TRAIN.BASE_LR = 4e-3  # for the global batch as it is
_C.TRAIN.WARMUP_START_LR = 1e-6
_C.TRAIN.END_LR = 1e-6
_C.TRAIN.LR_SCHEDULER = CN()  # between warm-up and cool-down; never below END_LR
_C.TRAIN.LR_SCHEDULER.NAME = 'cosine'  # 'cosine', 'polynomial', 'step', 'multistep', 'exponential' or 'constant'
_C.TRAIN.LR_SCHEDULER.POWER = 1.0  # of 'polynomial'; 1 is a straight line
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # of 'step', 'multistep' and 'exponential'
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30.0  # 'step' and 'exponential' decay by DECAY_RATE in so many epochs
_C.TRAIN.LR_SCHEDULER.MILESTONES = []  # epochs of the run at which 'multistep' decays
_C.TRAIN.LINEAR_SCALED_LR = 0  # if set: BASE_LR is for this global batch and is scaled to the actual one
_C.TRAIN.RECIPE = ''  # published recipe that -dry_run compares with, a name of recipes.py; '': none
_C.TRAIN.RECIPE_BATCH_SIZE = 0  # global batch of the published recipe; another one is pointed out in the log
_C.TRAIN.ACCUM_ITER = 1  # micro-batches per optimizer step
_C.TRAIN.WEIGHT_DECAY = 0.05  # not on biases, norms and other 1-D parameters
_C.TRAIN.WEIGHT_DECAY_END = -1.0  # reached along a cosine over the run's steps; below 0: WEIGHT_DECAY throughout
_C.TRAIN.LAYER_DECAY = 1.0  # layer-wise learning-rate decay; 1 for none
_C.TRAIN.GRAD_CLIP = 0.0  # 0 for none
_C.TRAIN.GRAD_CLIP_MODE = 'norm'  # GRAD_CLIP is the 'norm' of all gradients together, or the size of each 'value'
_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = 'adamw'  # 'adamw', 'sgd', 'momentum', 'nadam', 'lion', 'adan' or 'lamb'
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]  # 'momentum' uses the first; 'adan' takes three, such as [0.98, 0.92, 0.99]
_C.TRAIN.MODEL_EMA = True
_C.TRAIN.MODEL_EMA_DECAY = 0.9999  # per optimizer step
_C.TRAIN.SYNC_BN = True  # on GPUs with several processes

_C.TRAIN.LOSS = 'auto'  # 'auto' (cross-entropy), 'soft_target', 'label_smoothing', 'bce', 'jsd', 'asymmetric', ...
_C.TRAIN.SMOOTHING = 0.1
_C.TRAIN.BCE_THRESHOLD = 0.0  # above 0, 'bce' turns targets above it into 1 and the others into 0
_C.TRAIN.JSD_ALPHA = 12.0  # weight of the divergence in 'jsd'
_C.TRAIN.ASYMMETRIC = CN()  # of 'asymmetric' and 'asymmetric_single'
_C.TRAIN.ASYMMETRIC.GAMMA_NEG = 4.0
_C.TRAIN.ASYMMETRIC.GAMMA_POS = 0.0
_C.TRAIN.ASYMMETRIC.CLIP = 0.05  # probability margin of negatives, not in 'asymmetric_single'
_C.TRAIN.MIXUP_PROB = 1.0  # share of batches with mixup or cutmix; 0 switches both off
_C.TRAIN.MIXUP_ALPHA = 0.8
_C.TRAIN.CUTMIX_ALPHA = 1.0
_C.TRAIN.CUTMIX_MINMAX = []  # [low, high] share of each side; replaces CUTMIX_ALPHA's box size
_C.TRAIN.MIXUP_SWITCH_PROB = 0.5
_C.TRAIN.MIXUP_MODE = 'batch'  # 'batch', 'pair' or 'elem'
_C.TRAIN.RANDOM_RESIZED_CROP = CN()
_C.TRAIN.RANDOM_RESIZED_CROP.SCALE = [0.08, 1.0]
_C.TRAIN.RANDOM_RESIZED_CROP.RATIO = [3 / 4, 4 / 3]
_C.TRAIN.HFLIP = 0.5
_C.TRAIN.VFLIP = 0.0
_C.TRAIN.REPEATED_AUG = 0  # copies of each picture in an epoch of the same length, each augmented anew; 0 for none
_C.TRAIN.AUG_SPLITS = 0  # views of each picture for TRAIN.LOSS 'jsd', the first without augmentation; 0 for none
_C.TRAIN.AUTO_AUGMENT = 'rand-m9-mstd0.5-inc1'  # or 'original', 'v0', 'augmix-m3-w3', see auto_augment.py; '' for none
_C.TRAIN.COLOR_JITTER = 0.4  # only where AUTO_AUGMENT is empty
_C.TRAIN.RANDOM_ERASE_PROB = 0.25
_C.TRAIN.RANDOM_ERASE_MODE = 'pixel'  # 'const', 'rand' or 'pixel'
_C.TRAIN.RANDOM_ERASE_COUNT = 1

_C.AMP = False  # automatic mixed precision, in evaluation too
_C.AMP_DTYPE = 'float16'  # 'float16' (with dynamic loss scaling) or 'bfloat16'
_C.AMP_LEVEL = 'O1'  # 'O1' or 'O2'
_C.AMP_LOSS_SCALE = 65536.0  # the first; halved by every step that overflows under float16
_C.AMP_LOSS_SCALE_STEPS = 2000  # steps in a row without overflow after which the loss scale doubles
_C.EVAL = False
_C.DEVICE = 'auto'  # 'auto', 'gpu', 'cpu', 'npu' or 'xpu'
_C.NPROCS = 0  # processes of main_multi_gpu.py; 0: one per device, 2 on a machine without
_C.SAVE = ''  # run folder; '': output/<config name>-<time>
_C.SAVE_STEPS = 0  # save every so many optimizer steps; 0: at the end of an epoch
_C.SAVE_MINUTES = 15.0  # and when this much time has gone by; 0: never for that reason
_C.SAVE_FREQ = 0  # keep a numbered checkpoint every so many epochs; 0 keeps only last and best
_C.SAVE_LATEST_K = 0  # and those of so many epochs before
_C.SAVE_TOP_K = 0  # and the most accurate ones
_C.SAVE_MAX_GB = 0.0  # of all checkpoints of a run: the least accurate numbered ones go first; 0: no limit
_C.REPORT_FREQ = 20  # optimizer steps between progress lines, in the log and in metrics.jsonl
_C.VISUALDL = False  # scalars for VisualDL as well, in the run folder; needs the package visualdl
_C.CURVES = True  # draw curves.png at the end of a run, where matplotlib is installed
_C.VALIDATE_FREQ = 1  # epochs between evaluations; 0 for none while training
_C.SEED = 42
_C.DRY_RUN = False  # print what the run would do, and stop: see doctor.py
_C.PLAN = CN()  # for DRY_RUN: a cluster that is not here
_C.PLAN.NODES = 0
_C.PLAN.GPUS_PER_NODE = 0
_C.PLAN.IMAGES_PER_S = ''  # per process, measured: a number, or a run folder to take it from

# how wide the values of a key may be; one line of refusal comes out of each
_CHOICES = {
    'DATA.DATASET': ('imagenet2012',),
    'DATA.EVAL_PROTOCOL': ('auto', 'crop', 'warp'),
    'DATA.INTERPOLATION': ('bicubic', 'bilinear'),
    'MODEL.TYPE': ('RepLKNet',),
    'TRAIN.LR_SCHEDULER.NAME': ('cosine', 'polynomial', 'step', 'multistep', 'exponential', 'constant'),
    'TRAIN.OPTIMIZER.NAME': ('adamw', 'sgd', 'momentum', 'nadam', 'lion', 'adan', 'lamb'),
    'TRAIN.GRAD_CLIP_MODE': ('norm', 'value'),
    'TRAIN.RECIPE': ('', *RECIPES),
    'TRAIN.LOSS': ('auto', 'soft_target', 'label_smoothing', 'bce', 'jsd', 'asymmetric', 'asymmetric_single'),
    'TRAIN.MIXUP_MODE': ('batch', 'pair', 'elem'),
    'TRAIN.RANDOM_ERASE_MODE': ('const', 'rand', 'pixel'),
    'AMP_DTYPE': ('float16', 'bfloat16'),
    'AMP_LEVEL': ('O1', 'O2'),
    'DEVICE': ('auto', 'gpu', 'cpu', 'npu', 'xpu'),
}
_RANGES = {  # inclusive
    'DATA.BATCH_SIZE': (1, math.inf), 'DATA.BATCH_SIZE_EVAL': (1, math.inf), 'DATA.IMAGE_SIZE': (32, math.inf),
    'DATA.IMAGE_CHANNELS': (3, 3), 'DATA.CROP_PCT': (0.01, 1), 'DATA.NUM_WORKERS': (0, math.inf),
    'MODEL.NUM_CLASSES': (1, math.inf), 'MODEL.DW_RATIO': (0.01, math.inf), 'MODEL.FFN_RATIO': (0.01, math.inf),
    'MODEL.DROPPATH': (0, 0.999), 'TRAIN.LAST_EPOCH': (0, math.inf), 'TRAIN.NUM_EPOCHS': (1, math.inf),
    'TRAIN.WARMUP_EPOCHS': (0, math.inf), 'TRAIN.BASE_LR': (0, math.inf), 'TRAIN.WARMUP_START_LR': (0, math.inf),
    'TRAIN.COOLDOWN_EPOCHS': (0, math.inf), 'TRAIN.LR_SCHEDULER.POWER': (0.01, math.inf),
    'TRAIN.LR_SCHEDULER.DECAY_RATE': (0, 1), 'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': (0.01, math.inf),
    'TRAIN.END_LR': (0, math.inf), 'TRAIN.LINEAR_SCALED_LR': (0, math.inf), 'TRAIN.RECIPE_BATCH_SIZE': (0, math.inf),
    'TRAIN.ACCUM_ITER': (1, math.inf), 'TRAIN.WEIGHT_DECAY': (0, math.inf), 'TRAIN.LAYER_DECAY': (0.01, 1),
    'TRAIN.OPTIMIZER.EPS': (0, 1), 'TRAIN.GRAD_CLIP': (0, math.inf), 'TRAIN.MODEL_EMA_DECAY': (0, 1),
    'TRAIN.SMOOTHING': (0, 0.999), 'TRAIN.BCE_THRESHOLD': (0, 0.999), 'TRAIN.JSD_ALPHA': (0, math.inf),
    'TRAIN.ASYMMETRIC.GAMMA_NEG': (0, math.inf), 'TRAIN.ASYMMETRIC.GAMMA_POS': (0, math.inf),
    'TRAIN.ASYMMETRIC.CLIP': (0, 0.999), 'TRAIN.REPEATED_AUG': (0, math.inf), 'TRAIN.AUG_SPLITS': (0, math.inf),
    'TRAIN.MIXUP_PROB': (0, 1), 'TRAIN.MIXUP_ALPHA': (0, math.inf), 'TRAIN.CUTMIX_ALPHA': (0, math.inf),
    'TRAIN.MIXUP_SWITCH_PROB': (0, 1), 'TRAIN.HFLIP': (0, 1), 'TRAIN.VFLIP': (0, 1),
    'TRAIN.COLOR_JITTER': (0, 1), 'TRAIN.RANDOM_ERASE_PROB': (0, 1), 'TRAIN.RANDOM_ERASE_COUNT': (1, math.inf),
    'AMP_LOSS_SCALE': (1, math.inf), 'AMP_LOSS_SCALE_STEPS': (1, math.inf),
    'NPROCS': (0, math.inf), 'SAVE_STEPS': (0, math.inf), 'SAVE_MINUTES': (0, math.inf),
    'SAVE_FREQ': (0, math.inf), 'SAVE_LATEST_K': (0, math.inf), 'SAVE_TOP_K': (0, math.inf),
    'SAVE_MAX_GB': (0, math.inf), 'REPORT_FREQ': (1, math.inf), 'VALIDATE_FREQ': (0, math.inf),
    'SEED': (0, 2**31 - 1), 'PLAN.NODES': (0, math.inf), 'PLAN.GPUS_PER_NODE': (0, math.inf),
}
_LENGTHS = {'DATA.IMAGENET_MEAN': 3, 'DATA.IMAGENET_STD': 3,
            'TRAIN.RANDOM_RESIZED_CROP.SCALE': 2, 'TRAIN.RANDOM_RESIZED_CROP.RATIO': 2}
_NUMBERS = ('TRAIN.CUTMIX_MINMAX', 'TRAIN.LR_SCHEDULER.MILESTONES')  # lists of them whose default is empty


class ConfigError(UserError):
    """A setting that cannot be used; the text names its origin, the key and what to do."""


def get_config(cfg_file=None, opts=(), flags=None):
    """The settings of a YAML file over the defaults, of `flags` over both, and of `opts` over all.

    Args:
        cfg_file: path of a YAML file, or None for the defaults.
        opts: [KEY, VALUE, KEY, VALUE, ...], values as text or as Python values.
        flags: {flag of `get_arguments`: value}; those that were not given, None or False, change nothing.
    Returns:
        a CfgNode, not frozen.
    Raises:
        ConfigError: unknown key, wrong type, value out of range, contradiction, unreadable file.
    """
    config = _C.clone()
    origins = {}  # where each key was set, for messages
    if cfg_file:
        _merge_file(config, Path(cfg_file), origins, ())
    for flag, value in (flags or {}).items():
        if value is not None and value is not False:
            _set(config, _FLAGS[flag], value, f'-{flag}', origins)
    if len(opts) % 2:
        raise ConfigError(f'-opts: {opts[-1]} has no value; give KEY VALUE pairs')
    for key, value in zip(opts[::2], opts[1::2]):
        _set(config, key, _parse(value, _get(_C, key, '-opts')), '-opts', origins)
    _check(config, origins)
    return config


# flag -> key of the settings that have a flag of their own
_FLAGS = {
    'dataset': 'DATA.DATASET', 'data_path': 'DATA.DATA_PATH', 'output': 'SAVE', 'batch_size': 'DATA.BATCH_SIZE',
    'batch_size_eval': 'DATA.BATCH_SIZE_EVAL', 'image_size': 'DATA.IMAGE_SIZE', 'num_workers': 'DATA.NUM_WORKERS',
    'accum_iter': 'TRAIN.ACCUM_ITER', 'pretrained': 'MODEL.PRETRAINED', 'resume': 'MODEL.RESUME',
    'last_epoch': 'TRAIN.LAST_EPOCH', 'eval': 'EVAL', 'amp': 'AMP', 'device': 'DEVICE', 'nprocs': 'NPROCS',
    'dry_run': 'DRY_RUN', 'nodes': 'PLAN.NODES', 'gpus_per_node': 'PLAN.GPUS_PER_NODE',
    'images_per_s': 'PLAN.IMAGES_PER_S',
}
_FLAG_HELP = {
    'dataset': 'kind of dataset', 'data_path': 'folder with train_list.txt and val_list.txt',
    'output': 'folder of the run', 'batch_size': 'images per process and micro-batch',
    'batch_size_eval': 'images per process in evaluation', 'image_size': 'side of the input, pixels',
    'num_workers': 'loading processes per process', 'accum_iter': 'micro-batches per optimizer step',
    'pretrained': 'weights to start from or evaluate', 'resume': 'run to continue: its folder, a checkpoint, or auto',
    'last_epoch': 'epochs already done', 'eval': 'evaluate and stop', 'amp': 'automatic mixed precision',
    'device': 'auto, gpu, cpu, npu or xpu', 'nprocs': 'processes (main_multi_gpu.py)',
    'dry_run': 'print what the run would do, with warnings, and stop',
    'nodes': 'with -dry_run: machines of a cluster to plan', 'gpus_per_node': 'with -dry_run: GPUs of each of them',
    'images_per_s': 'with -dry_run: measured speed of one process, or a run folder to take it from',
}


def get_arguments(description, argv=None):
    """Parses the flags shared by the main scripts: PaddleViT's one-dash form, two dashes as well.

    Returns:
        a Namespace with `cfg`, `opts` and `flags`, the arguments of `get_config`.
    """
    parser = ArgumentParser(description)
    parser.add_argument('-cfg', '--cfg', metavar='FILE', help='YAML file of settings')
    for flag, key in _FLAGS.items():
        default = _get(_C, key, flag)
        kind = {'action': 'store_true'} if isinstance(default, bool) else {'type': type(default), 'metavar': 'X'}
        parser.add_argument(f'-{flag}', f'--{flag}', help=f'{_FLAG_HELP[flag]} ({key})', **kind)
    parser.add_argument('-opts', '--opts', nargs='+', default=[], metavar='KEY VALUE', help='any key of config.py')
    args = parser.parse_args(argv)
    return argparse.Namespace(cfg=args.cfg, opts=args.opts, flags={flag: getattr(args, flag) for flag in _FLAGS})


# what belongs to one call of a script and not to the run it starts
_PER_CALL = ('SAVE', 'EVAL', 'DEVICE', 'NPROCS', 'MODEL.RESUME', 'TRAIN.LAST_EPOCH', 'DRY_RUN', 'PLAN')


def config_text(config):
    """The settings as YAML that `-cfg` reads back, without those that belong to one call only."""
    lasting = config.clone()
    lasting.defrost()
    for key in _PER_CALL:
        group, name = _group(lasting, key)
        group[name] = _get(_C, key, '')
    return lasting.dump()


# what the parts of one run may differ in, beside _PER_CALL; the last line changes the run, and is said in the log
_MAY_DIFFER = ('DATA.DATA_PATH', 'DATA.NUM_WORKERS', 'DATA.BATCH_SIZE_EVAL', 'MODEL.PRETRAINED', 'MODEL.RECOMPUTE',
               'SAVE_STEPS', 'SAVE_MINUTES', 'SAVE_FREQ', 'SAVE_LATEST_K', 'SAVE_TOP_K', 'SAVE_MAX_GB', 'REPORT_FREQ',
               'VISUALDL', 'CURVES',
               'DATA.BATCH_SIZE', 'TRAIN.ACCUM_ITER', 'TRAIN.NUM_EPOCHS', 'VALIDATE_FREQ')


def config_changes(text, config):
    """What `config` sets otherwise than the `config_text` of the run it is to continue.

    Returns:
        two lists of 'KEY old -> new': changes that make it another run, and those that do not.
    """
    def flat(group, prefix=''):
        for name, value in group.items():
            if isinstance(value, dict):
                yield from flat(value, f'{prefix}{name}.')
            else:
                yield prefix + name, value

    old = {**dict(flat(_C)), **dict(flat(yaml.safe_load(text)))}  # keys that are younger than the run have defaults
    new = dict(flat(yaml.safe_load(config_text(config))))
    changes = {key: f'{key} {value!r} -> {new.get(key)!r}' for key, value in old.items() if value != new.get(key)}
    return ([line for key, line in changes.items() if key not in _MAY_DIFFER],
            [line for key, line in changes.items() if key in _MAY_DIFFER])


def _merge_file(config, path, origins, including):
    if path.resolve() in including:
        raise ConfigError(f'{path}: BASE: the files include each other')
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.safe_load(file) or {}
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
        _merge_file(config, path.parent / base, origins, including + (path.resolve(),))
    _merge_dict(config, values, str(path), origins, '')


def _merge_dict(config, values, origin, origins, prefix):
    for name, value in values.items():
        key = f'{prefix}{name}'
        if isinstance(_get(_C, key, origin), CN):
            if not isinstance(value, dict):
                raise ConfigError(f'{origin}: {key} is a group of keys, not {value!r}')
            _merge_dict(config, value, origin, origins, key + '.')
        else:
            _set(config, key, value, origin, origins)


def setting(config, key):
    """The value of a dotted key."""
    group, name = _group(config, key)
    return group[name]


def _get(config, key, origin):
    """Value of a dotted key; raises ConfigError, with the closest known key, when there is none."""
    node = config
    for part in key.split('.'):
        if not isinstance(node, CN) or part not in node:
            import difflib
            known = list(_keys(_C))
            near = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.endswith('.' + part)][:1]
            hint = f'; did you mean {near[0]}?' if near else '; config.py lists them all'
            raise ConfigError(f'{origin}: unknown key {key}{hint}')
        node = node[part]
    return node


def _keys(node, prefix=''):
    for name, value in node.items():
        if isinstance(value, CN):
            yield from _keys(value, f'{prefix}{name}.')
        else:
            yield prefix + name


def _set(config, key, value, origin, origins):
    default = _get(_C, key, origin)
    if isinstance(default, CN):
        raise ConfigError(f'{origin}: {key} is a group of keys; set one of {", ".join(_keys(default, key + "."))}')
    group, name = _group(config, key)
    group[name] = _coerce(value, default, key, origin)
    origins[key] = origin


def _group(config, key):
    """The node that holds a dotted key, and the key's last part."""
    *groups, name = key.split('.')
    for group in groups:
        config = config[group]
    return config, name


def _parse(value, default):
    """A value typed on the command line: text stays text where the key is text."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False', 'null': 'None'}.get(value.lower(), value))
    except (ValueError, SyntaxError):
        return value


def _coerce(value, default, key, origin):
    """`value` in the type of the key's default; whole numbers and '4e-3', which YAML reads as text, serve as floats."""
    wrong = ConfigError(f'{origin}: {key} takes {_describe(default)}, not {value!r}')
    if value is None and (isinstance(default, (str, list)) or key == 'MODEL.SMALL_KERNEL'):
        return type(default)()  # null in YAML: none
    if isinstance(default, bool) or isinstance(value, bool):
        if isinstance(default, bool) and isinstance(value, bool):
            return value
        raise wrong
    if isinstance(default, float) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            raise wrong from None
        if not math.isfinite(number):
            raise wrong
        return number
    if isinstance(default, list) and isinstance(value, (list, tuple)):
        # an empty default list takes numbers; no element of a list is a bool
        element = default[0] if default else (0.0 if key in _NUMBERS else '')
        return [_coerce(v, element, key, origin) for v in value]
    if type(value) is not type(default):
        raise wrong
    return value


def _describe(default):
    names = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', list: 'a list'}
    if isinstance(default, list) and default:
        return f'a list of {type(default[0]).__name__}s'
    return names[type(default)]


def _check(config, origins):
    """Raises ConfigError for a value out of range and for settings that contradict each other."""

    def refuse(key, reason, *others):
        origin = next((origins[k] for k in (key, *others) if k in origins), 'defaults')
        raise ConfigError(f'{origin}: {key} {reason}')

    for key, choices in _CHOICES.items():
        value = _get(config, key, '')
        if value not in choices:
            refuse(key, f'is {value!r}; choose from {", ".join(choices)}')
    for key, (low, high) in _RANGES.items():
        value = _get(config, key, '')
        if not low <= value <= high:
            bounds = f'at least {low}' if high == math.inf else f'from {low} to {high}'
            refuse(key, f'is {value}; it must be {bounds}')
    for key, length in _LENGTHS.items():
        value = _get(config, key, '')
        if len(value) != length:
            refuse(key, f'has {len(value)} values; it takes {length}')

    for key, value in config.PLAN.items():
        if value and not config.DRY_RUN:
            refuse(f'PLAN.{key}', 'plans a run that is not started; it goes with -dry_run')
    model, train = config.MODEL, config.TRAIN
    for key in ('MODEL.LAYERS', 'MODEL.CHANNELS', 'MODEL.LARGE_KERNEL_SIZES'):
        values = _get(config, key, '')
        if not values or min(values) < 1:
            refuse(key, f'is {values}; it takes whole numbers from 1 up, one per stage')
        if len(values) != len(model.LAYERS):
            refuse(key, f'has {len(values)} stages and MODEL.LAYERS {len(model.LAYERS)}; give one value per stage')
    for kernel in model.LARGE_KERNEL_SIZES:
        if kernel % 2 == 0:
            refuse('MODEL.LARGE_KERNEL_SIZES', f'has the even kernel {kernel}; kernels are odd')
        if kernel > 63:
            refuse('MODEL.LARGE_KERNEL_SIZES', f'has the kernel {kernel}; the largest is 63')
    for key in ('MODEL.DW_RATIO', 'MODEL.FFN_RATIO'):
        if int(min(model.CHANNELS) * _get(config, key, '')) < 1:
            refuse(key, f'is {_get(config, key, "")}: {min(model.CHANNELS)} channels times that are none')
    if model.SMALL_KERNEL and (model.SMALL_KERNEL < 0 or model.SMALL_KERNEL % 2 == 0):
        refuse('MODEL.SMALL_KERNEL', f'is {model.SMALL_KERNEL}; it is odd, or 0 for none')
    if model.SMALL_KERNEL > min(model.LARGE_KERNEL_SIZES):
        refuse('MODEL.SMALL_KERNEL', f'is {model.SMALL_KERNEL}, larger than the smallest of '
                                     f'MODEL.LARGE_KERNEL_SIZES {model.LARGE_KERNEL_SIZES}')
    if any(std <= 0 for std in config.DATA.IMAGENET_STD):
        refuse('DATA.IMAGENET_STD', 'must be above 0')
    for key in ('TRAIN.RANDOM_RESIZED_CROP.SCALE', 'TRAIN.RANDOM_RESIZED_CROP.RATIO'):
        low, high = _get(config, key, '')
        if not 0 < low <= high:
            refuse(key, f'is {[low, high]}; it takes [low, high] with 0 < low <= high')
    if train.RANDOM_RESIZED_CROP.SCALE[1] > 1:
        refuse('TRAIN.RANDOM_RESIZED_CROP.SCALE', 'reaches above 1, the whole picture')
    if config.SAVE_TOP_K and not config.VALIDATE_FREQ:
        refuse('SAVE_TOP_K', 'keeps the most accurate checkpoints, but VALIDATE_FREQ 0 measures none', 'VALIDATE_FREQ')
    if train.CUTMIX_MINMAX and not (len(train.CUTMIX_MINMAX) == 2 and
                                    0 < train.CUTMIX_MINMAX[0] < train.CUTMIX_MINMAX[1] <= 1):
        refuse('TRAIN.CUTMIX_MINMAX', f'is {train.CUTMIX_MINMAX}; it takes [] or [low, high] with 0 < low < high <= 1')
    if train.MIXUP_PROB > 0 and train.MIXUP_ALPHA == 0 and train.CUTMIX_ALPHA == 0 and not train.CUTMIX_MINMAX:
        refuse('TRAIN.MIXUP_PROB', 'asks for mixup, but TRAIN.MIXUP_ALPHA and TRAIN.CUTMIX_ALPHA are both 0; '
                                   'set TRAIN.MIXUP_PROB to 0 to switch mixup off', 'TRAIN.MIXUP_ALPHA',
               'TRAIN.CUTMIX_ALPHA')
    if train.LOSS == 'soft_target' and train.MIXUP_PROB == 0:
        refuse('TRAIN.LOSS', 'is soft_target, for the targets of mixup, but TRAIN.MIXUP_PROB is 0; use label_smoothing',
               'TRAIN.MIXUP_PROB')
    if train.LOSS in ('label_smoothing', 'jsd', 'asymmetric_single') and train.MIXUP_PROB > 0:
        refuse('TRAIN.LOSS', f'is {train.LOSS}, for one label per picture; set TRAIN.MIXUP_PROB to 0',
               'TRAIN.MIXUP_PROB')
    if train.LOSS == 'jsd' and train.AUG_SPLITS < 2:
        refuse('TRAIN.LOSS', f'is jsd, which compares views; set TRAIN.AUG_SPLITS to 3, it is {train.AUG_SPLITS}',
               'TRAIN.AUG_SPLITS')
    if train.AUG_SPLITS and train.LOSS != 'jsd':
        refuse('TRAIN.AUG_SPLITS', f'is {train.AUG_SPLITS}, for TRAIN.LOSS jsd; with {train.LOSS} use '
                                   'TRAIN.REPEATED_AUG', 'TRAIN.LOSS')
    if train.AUG_SPLITS and not (train.AUTO_AUGMENT or train.COLOR_JITTER or train.RANDOM_ERASE_PROB):
        refuse('TRAIN.AUG_SPLITS', 'asks for augmented views, but TRAIN.AUTO_AUGMENT, TRAIN.COLOR_JITTER and '
                                   'TRAIN.RANDOM_ERASE_PROB are all off', 'TRAIN.AUTO_AUGMENT')
    betas = 3 if train.OPTIMIZER.NAME == 'adan' else 2
    if len(train.OPTIMIZER.BETAS) != betas:
        refuse('TRAIN.OPTIMIZER.BETAS', f'has {len(train.OPTIMIZER.BETAS)} values; {train.OPTIMIZER.NAME} takes '
                                        f'{betas}', 'TRAIN.OPTIMIZER.NAME')
    if not all(0 <= beta < 1 for beta in train.OPTIMIZER.BETAS):
        refuse('TRAIN.OPTIMIZER.BETAS', f'is {train.OPTIMIZER.BETAS}; each is from 0 up to, not including, 1')
    if train.BASE_LR == 0:
        refuse('TRAIN.BASE_LR', 'is 0; nothing would be learned')
    if train.END_LR > train.BASE_LR:
        refuse('TRAIN.END_LR', f'is {train.END_LR}, above TRAIN.BASE_LR {train.BASE_LR}', 'TRAIN.BASE_LR')
    if train.WARMUP_START_LR > train.BASE_LR:
        refuse('TRAIN.WARMUP_START_LR', f'is {train.WARMUP_START_LR}, above TRAIN.BASE_LR {train.BASE_LR}',
               'TRAIN.BASE_LR')
    if train.WARMUP_EPOCHS > train.NUM_EPOCHS:
        refuse('TRAIN.WARMUP_EPOCHS', f'is {train.WARMUP_EPOCHS}, more than TRAIN.NUM_EPOCHS {train.NUM_EPOCHS}',
               'TRAIN.NUM_EPOCHS')
    if train.COOLDOWN_EPOCHS > train.NUM_EPOCHS - train.WARMUP_EPOCHS:
        refuse('TRAIN.COOLDOWN_EPOCHS', f'is {train.COOLDOWN_EPOCHS}, more than TRAIN.WARMUP_EPOCHS '
                                        f'{train.WARMUP_EPOCHS} leaves of TRAIN.NUM_EPOCHS {train.NUM_EPOCHS}',
               'TRAIN.WARMUP_EPOCHS', 'TRAIN.NUM_EPOCHS')
    milestones = train.LR_SCHEDULER.MILESTONES
    if train.LR_SCHEDULER.NAME == 'multistep' and not milestones:
        refuse('TRAIN.LR_SCHEDULER.MILESTONES', 'is empty; multistep takes the epochs to decay at',
               'TRAIN.LR_SCHEDULER.NAME')
    if milestones and not all(a < b for a, b in zip([0, *milestones], [*milestones, train.NUM_EPOCHS])):
        refuse('TRAIN.LR_SCHEDULER.MILESTONES', f'is {milestones}; it takes ascending epochs between 0 and '
                                                f'TRAIN.NUM_EPOCHS {train.NUM_EPOCHS}', 'TRAIN.NUM_EPOCHS')
    if train.LAST_EPOCH and train.LAST_EPOCH >= train.NUM_EPOCHS:
        refuse('TRAIN.LAST_EPOCH', f'is {train.LAST_EPOCH}: all TRAIN.NUM_EPOCHS {train.NUM_EPOCHS} epochs are done')
