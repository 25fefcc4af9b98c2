"""The run that the settings would start on these or planned devices: processes, batches, steps and memory."""
import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Dict, Optional

import numpy as np

import utils
from datasets import ImageNet2012Dataset, TrainBatchSampler, get_dataset
from dry_run.cost import model_cost, training_memory
from errors import UserError
from image_files.entries import Paths
from training.data import read_class_names_of
from training.schedules import Schedule, build_schedule

IMAGENET_IMAGES = {1000: 1_281_167, 21841: 14_197_122}  # {classes: training images}, assumed without data


@dataclass(frozen=True)
class Plan:
    """A run that has not started.

    Attributes:
        config: settings, with the batch size and accumulation that fit a planned cluster.
        device: kind of device, such as 'gpu'.
        nodes, processes: numbers of machines, and of processes on all of them.
        labels: {'train' or 'val': labels} of the datasets that could be read.
        train: dataset of the training images, or None.
        paths: {'train' or 'val': paths in them, `image_files.entries.Paths`}.
        problems: {'data', 'train', 'val', 'classes' or 'batch': one line about what is wrong with it}.
        images: number of training images; that of ImageNet if the list could not be read, None if it is unknown too.
        steps_per_epoch: optimizer steps, or None if unknown.
        schedule: of the learning rate; it assumes 1000 steps per epoch if they are unknown.
    """
    config: object
    device: str
    nodes: int
    processes: int
    labels: Dict[str, np.ndarray]
    train: Optional[ImageNet2012Dataset]
    paths: Dict[str, Paths]
    problems: Dict[str, str]
    images: Optional[int]
    steps_per_epoch: Optional[int]
    schedule: Schedule

    @cached_property
    def cost(self):
        return model_cost(self.config)

    @property
    def global_batch(self):
        return self.config.DATA.BATCH_SIZE * self.config.TRAIN.ACCUM_ITER * self.processes

    @property
    def elsewhere(self):
        """Whether the run is planned for other machines."""
        return bool(self.config.PLAN.NODES or self.config.PLAN.GPUS_PER_NODE)

    @property
    def half(self):
        """Whether the run computes in half precision."""
        return self.config.AMP and self.device != 'cpu'

    def memory(self, recompute):
        """Memory of one process, {part: bytes}: see `cost.training_memory`."""
        return training_memory(self.config, self.cost, recompute, self.half, self.processes)


def planned_device(config):
    """The kind of device that a dry run assumes: that of the settings, whether this machine has it or not."""
    if config.DEVICE != 'auto':
        return config.DEVICE
    return 'gpu' if config.PLAN.NODES or config.PLAN.GPUS_PER_NODE or utils.device_count('gpu') else 'cpu'


def make_plan(config, device, processes):
    """The `Plan` of a run with `processes` processes on this machine, or on the cluster described by `config.PLAN`."""
    nodes = max(1, config.PLAN.NODES)
    if config.PLAN.NODES or config.PLAN.GPUS_PER_NODE:
        processes = nodes * (config.PLAN.GPUS_PER_NODE or processes)
        config = _keep_global_batch(config, processes)
    datasets, problems = _read_lists(config)
    labels = {mode: dataset.labels for mode, dataset in datasets.items()}
    paths = {mode: dataset.paths for mode, dataset in datasets.items()}
    images = len(labels['train']) if 'train' in labels else IMAGENET_IMAGES.get(config.MODEL.NUM_CLASSES)
    steps_per_epoch = None
    if images is not None:
        try:
            batches = len(TrainBatchSampler(images, config.DATA.BATCH_SIZE, 0, processes))
            steps_per_epoch = math.ceil(batches / config.TRAIN.ACCUM_ITER)
        except UserError as error:
            problems['batch'] = str(error)
    return Plan(config, device, nodes, processes, labels, datasets.get('train'), paths, problems, images,
                steps_per_epoch, build_schedule(config, steps_per_epoch or 1000, processes))


def _keep_global_batch(config, processes):
    """The settings with a batch size and accumulation that give the recipe's global batch, if there are any."""
    target = config.TRAIN.RECIPE_BATCH_SIZE
    if not target or config.TRAIN.LINEAR_SCALED_LR:
        return config
    config = config.clone()
    config.defrost()
    share, remainder = divmod(target, processes)
    if remainder or not share:
        config.TRAIN.ACCUM_ITER = max(1, round(target / processes / config.DATA.BATCH_SIZE))
    else:
        batch = max(size for size in range(1, min(share, config.DATA.BATCH_SIZE) + 1) if share % size == 0)
        config.DATA.BATCH_SIZE, config.TRAIN.ACCUM_ITER = batch, share // batch
    config.freeze()
    return config


def _read_lists(config):
    """{mode: dataset} of the lists, including labels beyond the classes of the head, and problems with them."""
    any_label = config.clone()
    any_label.defrost()
    if not config.DATA.MULTI_LABEL:  # otherwise, the labels take a byte for each class of each image
        any_label.MODEL.NUM_CLASSES = 2**31
    folder, datasets, problems = config.DATA.DATA_PATH, {}, {}
    if not os.path.isdir(folder):
        missing = f'{folder}: no such data folder' if folder else 'no data folder is given (-data_path)'
        return datasets, {'data': missing}
    for mode in (() if config.EVAL else ('train',)) + (('val',) if config.EVAL or config.VALIDATE_FREQ else ()):
        try:
            datasets[mode] = get_dataset(any_label, mode)
        except (UserError, FileNotFoundError) as error:
            problems[mode] = str(error)
    try:
        read_class_names_of(config)
    except UserError as error:
        problems['classes'] = str(error)
    return datasets, problems
