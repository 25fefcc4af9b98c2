"""Checks of settings against each other.

Each yields (key, what is wrong with its value, other keys that may be the cause, ...).
"""
import os


def group_of(config, key):
    """The node that holds a dotted key, and the key's last part."""
    *groups, name = key.split('.')
    for group in groups:
        config = config[group]
    return config, name


def setting(config, key):
    """The value of a dotted key."""
    group, name = group_of(config, key)
    return group[name]


def check_model(config):
    # imported here because it needs Paddle, which `import config` does not
    from large_kernel.conv import MAX_KERNEL

    model = config.MODEL
    for key in ('MODEL.LAYERS', 'MODEL.CHANNELS', 'MODEL.LARGE_KERNEL_SIZES'):
        values = setting(config, key)
        if not values or min(values) < 1:
            yield key, f'is {values}; it takes whole numbers from 1 up, one per stage'
        if len(values) != len(model.LAYERS):
            yield key, f'has {len(values)} stages and MODEL.LAYERS {len(model.LAYERS)}; give one value per stage'
    if config.TRAIN.FREEZE > 1 + len(model.LAYERS):
        yield ('TRAIN.FREEZE', f'is {config.TRAIN.FREEZE}; the stem and {len(model.LAYERS)} stages are '
               f'{1 + len(model.LAYERS)} parts', 'MODEL.LAYERS')
    for kernel in model.LARGE_KERNEL_SIZES:
        if kernel % 2 == 0:
            yield 'MODEL.LARGE_KERNEL_SIZES', f'has the even kernel {kernel}; kernels are odd'
        if kernel > MAX_KERNEL:
            yield 'MODEL.LARGE_KERNEL_SIZES', f'has the kernel {kernel}; the largest is {MAX_KERNEL}'
    for key in ('MODEL.DW_RATIO', 'MODEL.FFN_RATIO'):
        ratio, channels = setting(config, key), min(model.CHANNELS)
        if int(channels * ratio) < 1:
            yield key, f'is {ratio}, which leaves no channel of {channels}; raise it'
    if model.SMALL_KERNEL and (model.SMALL_KERNEL < 0 or model.SMALL_KERNEL % 2 == 0):
        yield 'MODEL.SMALL_KERNEL', f'is {model.SMALL_KERNEL}; it must be odd, or 0 for none'
    if model.SMALL_KERNEL > min(model.LARGE_KERNEL_SIZES):
        yield 'MODEL.SMALL_KERNEL', (f'is {model.SMALL_KERNEL}, larger than the smallest of MODEL.LARGE_KERNEL_SIZES '
                                     f'{model.LARGE_KERNEL_SIZES}')


def check_data(config):
    if config.DATA.MULTI_LABEL and config.DATA.DATASET == 'image_folder':
        yield ('DATA.MULTI_LABEL', 'needs lists, but DATA.DATASET is image_folder, in which an image has one label, '
               'its folder', 'DATA.DATASET')
    for key in ('DATA.IMAGENET_MEAN', 'DATA.IMAGENET_STD'):
        values = setting(config, key)
        if max(values) > 1:
            yield key, f'is {values}; it is for values in 0..1: divide by 255, {[round(v / 255, 4) for v in values]}'
        if min(values) < 0:
            yield key, f'is {values}; it must be at least 0'
    if min(config.DATA.IMAGENET_STD) == 0:
        yield 'DATA.IMAGENET_STD', 'must be above 0'
    for key in ('TRAIN.RANDOM_RESIZED_CROP.SCALE', 'TRAIN.RANDOM_RESIZED_CROP.RATIO'):
        low, high = setting(config, key)
        if not 0 < low <= high:
            yield key, f'is {[low, high]}; it takes [low, high] with 0 < low <= high'
    if config.TRAIN.RANDOM_RESIZED_CROP.SCALE[1] > 1:
        yield 'TRAIN.RANDOM_RESIZED_CROP.SCALE', 'goes above 1, the whole image'


def check_run(config):
    for key in ('PLAN.NODES', 'PLAN.GPUS_PER_NODE', 'PLAN.IMAGES_PER_S'):
        if setting(config, key) and not config.DRY_RUN:
            yield key, 'is for planning a run and is used only with -dry_run'
    for key in ('EVAL_REPORT', 'EVAL_TTA'):
        if setting(config, key) and not config.EVAL:
            yield key, 'is used only with -eval; add it, or leave this out'
    if config.EVAL_REPORT and config.SAVE and os.path.abspath(config.EVAL_REPORT) == os.path.abspath(config.SAVE):
        yield 'EVAL_REPORT', f'is {config.EVAL_REPORT}, which is also the run folder; name another, or one in it'
    if config.SAVE_TOP_K and not config.VALIDATE_FREQ:
        yield ('SAVE_TOP_K', 'keeps the most accurate checkpoints, but with VALIDATE_FREQ 0 no accuracy is measured',
               'VALIDATE_FREQ')


def check_mixup(config):
    train, minmax = config.TRAIN, config.TRAIN.CUTMIX_MINMAX
    if minmax and not (len(minmax) == 2 and 0 < minmax[0] < minmax[1] <= 1):
        yield 'TRAIN.CUTMIX_MINMAX', f'is {minmax}; it takes [] or [low, high] with 0 < low < high <= 1'
    if train.MIXUP_PROB > 0 and train.MIXUP_ALPHA == 0 and train.CUTMIX_ALPHA == 0 and not minmax:
        yield ('TRAIN.MIXUP_PROB', 'switches mixup on, but TRAIN.MIXUP_ALPHA and TRAIN.CUTMIX_ALPHA are both 0; set '
               'TRAIN.MIXUP_PROB to 0 to switch it off', 'TRAIN.MIXUP_ALPHA', 'TRAIN.CUTMIX_ALPHA')


def check_loss(config):
    train = config.TRAIN
    if config.DATA.MULTI_LABEL:
        yield from _check_multi_label(train)
    if train.LOSS == 'soft_target' and train.MIXUP_PROB == 0:
        yield ('TRAIN.LOSS', 'is soft_target, for the targets of mixup, but TRAIN.MIXUP_PROB is 0; use label_smoothing',
               'TRAIN.MIXUP_PROB')
    if train.LOSS in ('label_smoothing', 'jsd', 'asymmetric_single') and train.MIXUP_PROB > 0:
        yield 'TRAIN.LOSS', f'is {train.LOSS}, for one label per image; set TRAIN.MIXUP_PROB to 0', 'TRAIN.MIXUP_PROB'
    if train.LOSS == 'jsd' and train.AUG_SPLITS < 2:
        yield ('TRAIN.LOSS', f'is jsd, which compares views; set TRAIN.AUG_SPLITS to 3, it is {train.AUG_SPLITS}',
               'TRAIN.AUG_SPLITS')
    if train.AUG_SPLITS and train.LOSS != 'jsd':
        yield ('TRAIN.AUG_SPLITS', f'is {train.AUG_SPLITS}, for TRAIN.LOSS jsd; with {train.LOSS} use '
               'TRAIN.REPEATED_AUG', 'TRAIN.LOSS')
    if train.CLASS_WEIGHTS and train.LOSS not in ('auto', 'soft_target', 'label_smoothing'):
        yield ('TRAIN.CLASS_WEIGHTS', f'is {train.CLASS_WEIGHTS}, for cross-entropy; TRAIN.LOSS is {train.LOSS}',
               'TRAIN.LOSS')
    if train.SAMPLER == 'balanced' and train.REPEATED_AUG > 1:
        yield ('TRAIN.SAMPLER', 'is balanced, which repeats images already; set TRAIN.REPEATED_AUG to 0',
               'TRAIN.REPEATED_AUG')
    if train.AUG_SPLITS and not (train.AUTO_AUGMENT or train.COLOR_JITTER or train.RANDOM_ERASE_PROB):
        yield ('TRAIN.AUG_SPLITS', f'is {train.AUG_SPLITS}, for augmented views, but TRAIN.AUTO_AUGMENT, '
               'TRAIN.COLOR_JITTER and TRAIN.RANDOM_ERASE_PROB are all off', 'TRAIN.AUTO_AUGMENT')


def _check_multi_label(train):
    if train.LOSS not in ('auto', 'bce', 'asymmetric'):
        yield ('TRAIN.LOSS', f'is {train.LOSS}, a softmax over the classes for one label per image; with '
               'DATA.MULTI_LABEL use bce or asymmetric', 'DATA.MULTI_LABEL')
    if train.CLASS_WEIGHTS:
        yield ('TRAIN.CLASS_WEIGHTS', f'is {train.CLASS_WEIGHTS}, for one label per image; with DATA.MULTI_LABEL leave '
               'it out, TRAIN.LOSS asymmetric is made for rare labels', 'DATA.MULTI_LABEL')
    if train.SAMPLER == 'balanced':
        yield ('TRAIN.SAMPLER', 'is balanced, for one label per image; with DATA.MULTI_LABEL set it to shuffle',
               'DATA.MULTI_LABEL')


def check_optimizer(config):
    optimizer = config.TRAIN.OPTIMIZER
    betas = 3 if optimizer.NAME == 'adan' else 2
    if len(optimizer.BETAS) != betas:
        yield ('TRAIN.OPTIMIZER.BETAS', f'has {len(optimizer.BETAS)} values; {optimizer.NAME} takes {betas}',
               'TRAIN.OPTIMIZER.NAME')
    if not all(0 <= beta < 1 for beta in optimizer.BETAS):
        yield 'TRAIN.OPTIMIZER.BETAS', f'is {optimizer.BETAS}; each must be at least 0 and below 1'


def check_schedule(config):
    train = config.TRAIN
    if train.BASE_LR == 0:
        yield 'TRAIN.BASE_LR', 'is 0; nothing would be learned'
    for key in ('TRAIN.END_LR', 'TRAIN.WARMUP_START_LR'):
        if setting(config, key) > train.BASE_LR:
            yield key, f'is {setting(config, key)}, above TRAIN.BASE_LR {train.BASE_LR}', 'TRAIN.BASE_LR'
    if train.WARMUP_EPOCHS > train.NUM_EPOCHS:
        yield ('TRAIN.WARMUP_EPOCHS', f'is {train.WARMUP_EPOCHS}, more than TRAIN.NUM_EPOCHS {train.NUM_EPOCHS}',
               'TRAIN.NUM_EPOCHS')
    if train.COOLDOWN_EPOCHS > train.NUM_EPOCHS - train.WARMUP_EPOCHS:
        yield ('TRAIN.COOLDOWN_EPOCHS', f'is {train.COOLDOWN_EPOCHS}, more than TRAIN.WARMUP_EPOCHS '
               f'{train.WARMUP_EPOCHS} leaves of TRAIN.NUM_EPOCHS {train.NUM_EPOCHS}',
               'TRAIN.WARMUP_EPOCHS', 'TRAIN.NUM_EPOCHS')
    if train.PATIENCE and not config.VALIDATE_FREQ:
        yield ('TRAIN.PATIENCE', 'waits for a better accuracy, but with VALIDATE_FREQ 0 none is measured',
               'VALIDATE_FREQ')
    milestones = train.LR_SCHEDULER.MILESTONES
    if train.LR_SCHEDULER.NAME == 'multistep' and not milestones:
        yield ('TRAIN.LR_SCHEDULER.MILESTONES', 'is empty; multistep takes the epochs to decay at',
               'TRAIN.LR_SCHEDULER.NAME')
    if milestones and not all(a < b for a, b in zip([0, *milestones], [*milestones, train.NUM_EPOCHS])):
        yield ('TRAIN.LR_SCHEDULER.MILESTONES', f'is {milestones}; it takes ascending epochs between 0 and '
               f'TRAIN.NUM_EPOCHS {train.NUM_EPOCHS}', 'TRAIN.NUM_EPOCHS')
    if train.LAST_EPOCH and train.LAST_EPOCH >= train.NUM_EPOCHS:
        yield 'TRAIN.LAST_EPOCH', f'is {train.LAST_EPOCH}: all TRAIN.NUM_EPOCHS {train.NUM_EPOCHS} epochs are done'


CHECKS = (check_run, check_model, check_data, check_mixup, check_loss, check_optimizer, check_schedule)
