"""The report of a dry run: what a run would do, where it differs from the published recipe, and likely mistakes.

    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -data_path=/dataset/imagenet -dry_run
    python main_multi_gpu.py -cfg=./configs/replknet_31b.yaml -dry_run -nodes 2 -gpus_per_node 8 -images_per_s 100

Nothing is trained or written. Neither a GPU nor the data is needed.
"""
import math
import os
import shlex

import numpy as np

import utils
from config import setting
from datasets import eval_protocol
from dry_run.cost import lazy_model
from dry_run.likely_mistakes import warnings
from dry_run.loading_speed import loading_rows, measure_loading
from dry_run.plan import make_plan
from dry_run.recipes import RECIPES
from errors import UserError
from image_files.histogram import class_rows
from run_folder.layout import METRICS
from run_folder.metrics import read_metrics
from training.optim import parameter_groups

GPU_MEMORY = (16, 24, 40, 80)  # GiB


def report(config, device, processes):
    """The report as text of several lines.

    Args:
        config: settings.
        device: result of `planned_device`.
        processes: number of processes that would start on this machine.
    Raises:
        UserError: no run could start with these settings.
    """
    plan = make_plan(config, device, processes)
    sections = [('run', _run(plan))]
    if not config.EVAL:
        sections += [('schedule', _schedule(plan)), ('speed', _speed(plan))]
    sections += [('model', _model(plan)), ('data', _data(plan))]
    if not config.EVAL:
        sections += [('memory', _memory(plan)), ('recipe', _recipe(plan))]
    found = list(warnings(plan))
    lines = [f'{config.MODEL.NAME}: a dry run, nothing is trained or written']
    for title, rows in sections:
        if rows:
            lines += ['', title, *(f'  {label:<20}{text}'.rstrip() for label, text in rows)]
    lines += ['', 'warnings' if found else 'no warnings', *(f'  - {text}' for text in found)]
    return '\n'.join(lines)


def _run(plan):
    config, train = plan.config, plan.config.TRAIN
    here = '' if utils.device_count(plan.device) else ', none on this machine'
    where = f' = {plan.nodes} machines x {plan.processes // plan.nodes}' if plan.nodes > 1 else ''
    precision = f'{config.AMP_DTYPE}, {config.AMP_LEVEL}' if plan.half else 'float32'
    rows = [('device', plan.device + here), ('processes', f'{plan.processes}{where}'), ('precision', precision)]
    if not config.EVAL:
        rows.append(('global batch', f'{plan.global_batch} = {config.DATA.BATCH_SIZE} images x {plan.processes} '
                                     f'process{"es" * (plan.processes > 1)} x {train.ACCUM_ITER} accumulated'))
        if plan.elsewhere:
            rows.append(('flags for this', f'-batch_size={config.DATA.BATCH_SIZE} -accum_iter={train.ACCUM_ITER}'))
    rows.append(('run folder', config.SAVE or 'none'))
    return rows


def _schedule(plan):
    config, train, schedule = plan.config, plan.config.TRAIN, plan.schedule
    groups = parameter_groups(lazy_model(config), train.WEIGHT_DECAY, train.LAYER_DECAY)
    scales = sorted(group['learning_rate'] for group in groups)
    decay = f'weight decay {train.WEIGHT_DECAY:g}'
    if train.LAYER_DECAY < 1:
        decay += f', layer decay {train.LAYER_DECAY:g}: rates multiplied by {scales[0]:.2g} to {scales[-1]:g}'
    rows = [('optimizer', f'{train.OPTIMIZER.NAME}, {decay}')]
    steps = plan.steps_per_epoch
    known = f'{steps:,} per epoch, {schedule.total_steps:,} in total' if steps else 'unknown without the data'
    scaled = f' x batch / {train.LINEAR_SCALED_LR}' if train.LINEAR_SCALED_LR else ''
    rows += [('optimizer steps', f'{known} ({train.NUM_EPOCHS} epochs)'),
             ('learning rate', train.LR_SCHEDULER.NAME + scaled)]
    total = schedule.total_steps
    for label, step in (('start', 0), ('peak', schedule.warmup_steps), ('middle', total // 2), ('end', total - 1)):
        epoch = step * train.NUM_EPOCHS / total
        rows.append((f'  {label}', f'{schedule(step):<12.4g}epoch {epoch:<9.2f}' + (f'step {step:,}' if steps else '')))
    return rows


def _speed(plan):
    rows, speed = [], None
    if plan.config.PLAN.IMAGES_PER_S:
        speed = _images_per_s(plan.config.PLAN.IMAGES_PER_S)
        rows.append(('images/s', f'{speed:,.1f} per process, {speed * plan.processes:,.1f} in total'))
    if speed and plan.steps_per_epoch:
        epoch = plan.images / (speed * plan.processes)
        run = epoch * plan.config.TRAIN.NUM_EPOCHS
        rows += [('one epoch', f'{_duration(epoch)}, {86400 / epoch:.1f} epochs per day'),
                 ('whole run', f'{_duration(run)}, without evaluation')]
    loading = measure_loading(plan.train) if plan.train is not None else None
    if loading is not None:
        rows += loading_rows(loading, plan.config, speed, None if plan.elsewhere else plan.processes)
    return rows


def _images_per_s(text):
    """Images per second of one process, from a number or as the median over the epochs of a run folder."""
    try:
        speed = float(text)
    except ValueError:
        try:
            records = read_metrics(text)
        except FileNotFoundError:
            raise UserError(f'-images_per_s={text}: neither a number nor a run folder with {METRICS}') from None
        speeds = [r['images_per_s'] / r['processes'] for r in records if r['event'] == 'train']
        if not speeds:
            raise UserError(f'-images_per_s={text}: the run has not completed an epoch yet') from None
        speed = float(np.median(speeds))
    if not 0 < speed < math.inf:
        raise UserError(f'-images_per_s={text}: must be greater than 0')
    return speed


def _model(plan):
    cost, size = plan.cost, plan.config.DATA.IMAGE_SIZE
    return [('', f'{"training form":>16}{"merged":>16}'),
            ('parameters', f'{cost.parameters:>16,}{cost.merged_parameters:>16,}'),
            ('GMACs per image', f'{cost.macs / 1e9:>16.3f}{cost.merged_macs / 1e9:>16.3f}    at {size}x{size} pixels'),
            ('classes', f'{plan.config.MODEL.NUM_CLASSES:>16,}')]


def _data(plan):
    config = plan.config
    protocol = f'crop of {config.DATA.CROP_PCT:g}' if eval_protocol(config) == 'crop' else 'warp to a square'
    rows = [('folder', config.DATA.DATA_PATH or 'none')]
    if 'train' not in plan.labels and plan.images and not config.EVAL:
        rows.append(('train', f'not read; {plan.images:,} images assumed, as in ImageNet'))
    if config.DATA.MULTI_LABEL:
        loss = 'bce' if config.TRAIN.LOSS == 'auto' else config.TRAIN.LOSS
        rows.append(('labels', f'several per image: loss {loss}, sigmoid scores, the best checkpoint by mAP'))
    for mode, labels in plan.labels.items():
        rows += class_rows(mode, labels, config.MODEL.NUM_CLASSES, bars=mode != 'val')
    if os.path.isdir(config.DATA.DATA_PATH):
        rows.append(('check of the images', f'python tools/check_images.py {shlex.quote(config.DATA.DATA_PATH)}'))
    return rows + [('evaluation', f'{config.DATA.IMAGE_SIZE} pixels, {protocol}, {config.DATA.INTERPOLATION}')]


def _memory(plan):
    config = plan.config
    recompute = config.MODEL.RECOMPUTE
    parts = plan.memory(recompute)
    total, other = sum(parts.values()), sum(plan.memory(not recompute).values())
    rows = [(part, f'{_size(count):>12}') for part, count in parts.items() if count]
    how = ('with recomputation', 'without it') if recompute else ('without recomputation', 'with it')
    rows.append(('each process', f'{_size(total):>12} {how[0]}, {_size(other)} {how[1]}'))
    if plan.device != 'cpu':
        image = parts['activations'] / config.DATA.BATCH_SIZE
        fixed = total - parts['activations']
        fits = ', '.join(f'{max(0, int((gib * 0.9 * 2**30 - fixed) / image))} in {gib} GiB' for gib in GPU_MEMORY)
        rows.append(('images that fit', f'{fits} (a tenth left free)'))
    return rows + [('', 'tensors only; the libraries need more memory')]


def differences(plan):
    """[(key, value here, value in the published recipe)] where they differ; [] without a recipe."""
    if not plan.config.TRAIN.RECIPE:
        return []
    recipe = RECIPES[plan.config.TRAIN.RECIPE]
    pairs = [('global batch', plan.global_batch, recipe.global_batch)]
    pairs += [(key, setting(plan.config, key), value) for key, value in recipe.settings.items()]
    return [(key, here, there) for key, here, there in pairs if here != there]


def _recipe(plan):
    if not plan.config.TRAIN.RECIPE:
        return [('published', 'none for these settings')]
    recipe, found = RECIPES[plan.config.TRAIN.RECIPE], differences(plan)
    width = max((len(key) for key, _, _ in found), default=0)
    return [('published', f'{recipe.title}; starts from {recipe.start or "random weights"}'),
            ('differences', f'{len(found)} (here, published)' if found else 'none')] + [
        ('', f'{key:<{width}}  {_text(here):<24}{_text(there)}') for key, here, there in found]


def _text(value):
    return f'{value:g}' if isinstance(value, float) else repr(value) if value == '' else str(value)


def _size(count):
    return f'{count / 2**30:.2f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'


def _duration(seconds):
    days, hours = seconds / 86400, seconds / 3600
    return f'{days:.1f} days' if days >= 2 else f'{hours:.1f} hours' if hours >= 2 else f'{seconds / 60:.1f} minutes'
