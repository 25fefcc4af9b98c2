"""Warnings of a dry run: what in the settings, the data or the weights is likely a mistake, one line each."""
import os

import numpy as np
import paddle

import utils
from config import get_config
from datasets import eval_protocol, source_name
from dry_run.recipes import RECIPES
from errors import UserError
from replknet import VARIANTS
from training.amp import bf16_on_cpu, on_cpu
from zoo import ZOO, settings_file

# keys of config.MODEL that determine the shapes of all weights but those of the head
ARCHITECTURE = ('LAYERS', 'CHANNELS', 'LARGE_KERNEL_SIZES', 'SMALL_KERNEL', 'DW_RATIO', 'FFN_RATIO')


def warnings(plan):
    """Yields one line of text for each likely mistake in a `plan.Plan`, also for what would end a run at its start."""
    if not plan.elsewhere and not utils.device_count(plan.device):
        yield f'-device={plan.device}: there is none on this machine'
    if plan.config.DEVICE == 'auto' and plan.device == 'cpu' and utils.unused_gpus():
        yield utils.unused_gpus()
    yield from plan.problems.values()
    yield from warnings_of_a_run(plan)


def warnings_of_a_run(plan):
    """The same for a run that starts, which reports by itself what ends it."""
    yield from _classes(plan)
    yield from _images(plan)
    yield from _evaluation(plan)
    yield from _variant(plan)
    yield from _weights(plan)
    if not plan.config.EVAL:
        yield from _rate(plan)
        yield from _training(plan)
        yield from _memory(plan)


def _classes(plan):
    """The classes of the lists against those of the head."""
    head = plan.config.MODEL.NUM_CLASSES
    if head == 1 and not plan.config.DATA.MULTI_LABEL:
        yield 'MODEL.NUM_CLASSES is 1: a head with one output cannot tell classes apart; give the number of classes'
    for mode, labels in plan.labels.items():
        source = source_name(plan.config, mode)
        if plan.config.DATA.MULTI_LABEL:
            if (labels.sum(1) == 1).all():
                yield (f'DATA.MULTI_LABEL is True, but each image of {source} has one label: without it, the scores '
                       'are a softmax, which suits such lists better')
            labels = np.flatnonzero(labels.any(0))
        beyond = labels[labels >= head]
        if len(beyond):
            yield (f'{source} has {len(np.unique(beyond)):,} classes for which the head of {head:,} classes has '
                   f'no output, such as {beyond.min()}: set MODEL.NUM_CLASSES to {labels.max() + 1}')
        absent = np.setdiff1d(np.arange(head), labels)
        if len(absent):
            names = ', '.join(map(str, absent[:5])) + (', ...' if len(absent) > 5 else '')
            yield f'{source} has no image of {len(absent):,} of the {head:,} classes of the head: {names}'
    if len(plan.labels) == 2 and plan.steps_per_epoch and len(plan.labels['train']) < len(plan.labels['val']):
        yield 'there are fewer images for training than for evaluation: are the lists swapped?'


def _images(plan):
    """Images that are listed more than once or not used."""
    distinct = {}  # {mode: sorted hashes of its images}
    for mode, paths in plan.paths.items():
        ordered = distinct[mode] = paths.hashes()
        ordered.sort()  # in place: a list may have 14 million lines
        again = ordered[1:] == ordered[:-1]
        if not again.any():
            continue
        distinct[mode], hashes = ordered[np.concatenate([[True], ~again])], paths.hashes()
        rows = np.flatnonzero(np.isin(hashes, ordered[1:][again]))  # of all images that are listed more than once
        rows = rows[np.argsort(hashes[rows], kind='stable')]
        named, labels = hashes[rows], plan.labels[mode][rows].reshape(len(rows), -1)
        conflicting = np.flatnonzero((named[1:] == named[:-1]) & (labels[1:] != labels[:-1]).any(1))
        if len(conflicting):
            example = min(paths[rows[position]] for position in conflicting).decode(errors='backslashreplace')
            yield (f'{mode}_list.txt has {len(np.unique(named[conflicting])):,} images under more than one label, '
                   f'such as {example}')
        else:
            yield f'{mode}_list.txt lists {again.sum():,} images more than once'
    if len(distinct) == 2:
        train, val = distinct['train'], distinct['val']
        shared = np.count_nonzero(train[np.searchsorted(train, val).clip(max=len(train) - 1)] == val)
        if shared:
            yield (f'{shared:,} of the {len(val):,} images of val_list.txt are in train_list.txt too: the accuracy '
                   'will be too high')
    if plan.steps_per_epoch and 'train' in plan.labels:
        batch = plan.config.DATA.BATCH_SIZE * plan.processes
        dropped = plan.images % batch
        if dropped > 0.1 * plan.images:
            yield (f'each epoch leaves out {dropped:,} of the {plan.images:,} training images, other ones each time, '
                   f'which do not fill a batch of {batch:,}: lower -batch_size')


def _evaluation(plan):
    """The evaluation against that of the published accuracies."""
    config, size = plan.config, plan.config.DATA.IMAGE_SIZE
    if size >= 384 and eval_protocol(config) == 'crop':
        yield (f'evaluation crops at {size} pixels, but the published accuracies at 384 are with the whole image '
               "warped to a square; cropping costs about 0.2 points: set DATA.EVAL_PROTOCOL to 'auto'")
    if size < 384 and eval_protocol(config) == 'warp':
        yield (f'evaluation warps at {size} pixels, but the published accuracies below 384 are with a centre crop: set '
               "DATA.EVAL_PROTOCOL to 'auto'")
    if config.EVAL_TTA == 'flip' and config.TRAIN.HFLIP == 0:
        yield ('-tta=flip evaluates mirror images, but TRAIN.HFLIP is 0: the model was trained without them, perhaps '
               'because they are of another class; leave -tta out')
    if config.DATA.INTERPOLATION != 'bicubic':
        yield f'DATA.INTERPOLATION is {config.DATA.INTERPOLATION}; the published accuracies are with bicubic'


def _variant(plan):
    """The model against the published one of the same name."""
    model = plan.config.MODEL
    for key, value in VARIANTS.get(model.NAME, {}).items():
        if model[key.upper()] != value:
            yield f'MODEL.{key.upper()} is {model[key.upper()]}; in the published {model.NAME} it is {value}'


def _weights(plan):
    """The weights to start from or to evaluate: their presence, and the settings they were trained with."""
    config = plan.config
    start = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if not start:
        if config.EVAL:
            yield '-eval needs weights: give -pretrained=FILE, or a name that `python zoo.py` lists'
        return
    if start not in ZOO and not os.path.exists(start):
        yield f'{start}: no such file, and no name that `python zoo.py` lists'
    settings = settings_file(start)
    if not settings:
        return
    try:
        origin = get_config(settings)
    except UserError as error:
        yield str(error)
        return
    fixed = (*ARCHITECTURE, 'NUM_CLASSES') if config.EVAL else ARCHITECTURE  # training may replace the head
    wrong = [key for key in fixed if config.MODEL[key] != origin.MODEL[key]]
    if wrong:
        yield (f'the weights of {start} do not fit: MODEL.{wrong[0]} is {config.MODEL[wrong[0]]}, but they have '
               f'{origin.MODEL[wrong[0]]}')
    theirs, ours = origin.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE
    if ours < theirs or ours != theirs and config.EVAL:
        yield f'DATA.IMAGE_SIZE is {ours}; the weights of {start} were trained at {theirs}'
    for key in ('IMAGENET_MEAN', 'IMAGENET_STD'):
        if config.DATA[key] != origin.DATA[key]:
            yield f'DATA.{key} is {config.DATA[key]}; the weights of {start} were trained with {origin.DATA[key]}'


def _rate(plan):
    """The learning rate for the global batch, its warm-up, and the decay of the moving average."""
    train, schedule = plan.config.TRAIN, plan.schedule
    batch, recipe_batch, scaled = plan.global_batch, train.RECIPE_BATCH_SIZE, train.LINEAR_SCALED_LR
    recipe = RECIPES.get(train.RECIPE)
    recipe_lr = recipe and recipe.settings['TRAIN.BASE_LR']
    if scaled and recipe_batch and scaled != recipe_batch:
        yield (f'the learning rate is scaled twice: TRAIN.BASE_LR {train.BASE_LR:g} is already for a global batch of '
               f'{recipe_batch}, and TRAIN.LINEAR_SCALED_LR {scaled} changes it to {schedule.base_lr:.4g}; set '
               f'TRAIN.LINEAR_SCALED_LR to {recipe_batch}, or to 0 with a global batch of {recipe_batch}')
    elif scaled and recipe_lr and batch != recipe_batch and train.BASE_LR != recipe_lr and \
            0.8 < train.BASE_LR / (recipe_lr * batch / recipe_batch) < 1.25:
        yield (f"the learning rate is scaled twice: TRAIN.BASE_LR {train.BASE_LR:g} is already the recipe's "
               f'{recipe_lr:g} scaled to this global batch of {batch}, and TRAIN.LINEAR_SCALED_LR changes it to '
               f'{schedule.base_lr:.4g}; set TRAIN.BASE_LR to {recipe_lr:g}, or TRAIN.LINEAR_SCALED_LR to 0')
    elif recipe_batch and not scaled and batch != recipe_batch:
        yield (f'the global batch is {batch}, but TRAIN.BASE_LR {train.BASE_LR:g} is for {recipe_batch}: change '
               f'-batch_size or -accum_iter, or scale the rate with -opts TRAIN.LINEAR_SCALED_LR {recipe_batch}')
    if schedule.warmup_steps > schedule.total_steps / 3:
        yield (f'the warm-up takes {train.WARMUP_EPOCHS:g} of {train.NUM_EPOCHS} epochs; '
               'set TRAIN.WARMUP_EPOCHS to a tenth of them or less')
    if train.WARMUP_EPOCHS and not schedule.warmup_steps:
        yield f'TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS:g} is less than one optimizer step: there is no warm-up'
    if train.BASE_LR > 0.1 and train.OPTIMIZER.NAME not in ('sgd', 'momentum'):
        yield f'TRAIN.BASE_LR {train.BASE_LR:g} is very high for {train.OPTIMIZER.NAME}, whose rates are below 0.1'
    if train.WEIGHT_DECAY >= 1:
        yield f'TRAIN.WEIGHT_DECAY {train.WEIGHT_DECAY:g} is very high: it is a factor, not a percentage'
    if train.MODEL_EMA and train.MODEL_EMA_DECAY < 0.5:
        yield (f'TRAIN.MODEL_EMA_DECAY {train.MODEL_EMA_DECAY:g} keeps little of the average: it is the share that is '
               f'kept at each step, such as {1 - train.MODEL_EMA_DECAY:g}')
    left = train.MODEL_EMA_DECAY ** schedule.total_steps
    if train.MODEL_EMA and plan.steps_per_epoch and left > 0.05:
        yield (f'TRAIN.MODEL_EMA_DECAY {train.MODEL_EMA_DECAY:g} is too slow for {schedule.total_steps:,} steps: '
               f'{100 * left:.0f} % of the average would still come from the initial weights; '
               f'about {max(0.0, 1 - 10 / schedule.total_steps):.4g} would fit')


def _training(plan):
    """Settings of the training that do not go together, or not with the device."""
    config, train = plan.config, plan.config.TRAIN
    recipe, fine_tuning = RECIPES.get(train.RECIPE), train.LAYER_DECAY < 1
    if fine_tuning and not config.MODEL.PRETRAINED and not config.MODEL.RESUME:
        start = recipe and recipe.start
        yield (f'TRAIN.LAYER_DECAY {train.LAYER_DECAY:g} is for fine-tuning, but the run starts from random weights: '
               f'give -pretrained={start or "WEIGHTS"}')
    if fine_tuning and train.MIXUP_PROB > 0:
        yield f'mixup is on (TRAIN.MIXUP_PROB {train.MIXUP_PROB:g}); the published fine-tuning runs train without it'
    synced = train.SYNC_BN and plan.device == 'gpu' and plan.processes > 1
    if config.DATA.BATCH_SIZE < 8 and not synced:
        yield (f'batch norm computes its statistics over only {config.DATA.BATCH_SIZE} images; a larger -batch_size '
               'with a smaller -accum_iter, or TRAIN.SYNC_BN on GPUs, makes them more stable')
    if config.AMP and not plan.half and not bf16_on_cpu(config):
        yield f'-amp has no effect on the CPU: {on_cpu(config)}'
    if not config.VALIDATE_FREQ and not (recipe and recipe.settings.get('VALIDATE_FREQ') == 0):
        yield 'VALIDATE_FREQ is 0: the run measures no accuracy and keeps no best checkpoint'


def _memory(plan):
    """The estimated memory against that of this machine."""
    here = _memory_here(plan)
    if here is None:
        return
    needed = sum(plan.memory(plan.config.MODEL.RECOMPUTE).values()) * plan.processes
    if needed > here:
        yield (f'all processes together need about {needed / 2**30:.1f} GiB, but the devices here have only '
               f'{here / 2**30:.1f}: lower -batch_size and raise -accum_iter, or set MODEL.RECOMPUTE True')


def _memory_here(plan):
    """Memory in bytes of the planned devices of this machine, or None if it is unknown or they are elsewhere."""
    if plan.elsewhere:
        return None
    if plan.device == 'cpu' and hasattr(os, 'sysconf'):
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if plan.device == 'gpu' and utils.device_count('gpu'):
        return plan.processes * paddle.device.cuda.get_device_properties(0).total_memory
    return None
