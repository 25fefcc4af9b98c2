"""What changes in a run, to and from a checkpoint: with it a run continues as if it had never stopped."""
import math
import os

import numpy as np

import utils
from config import config_changes, config_text
from errors import TrainingStopped, UserError
from port_weights.load import load_weights
from run_folder import checkpoint
from training.progress import epoch_sums
from training.running_statistics import gather_statistics, set_statistics
from utils import logger


class RunState:
    """The parts of a run that change. Random draws are none of them: they follow from seed, epoch, sample and step.

    Args:
        config: frozen settings.
        model, ema, optimizer, scaler: ema and scaler may be None.
        steps_per_epoch: optimizer steps.
        global_batch: images per optimizer step, of all ranks.
        own_statistics: whether each rank has running statistics of its own inside an epoch (no SyncBatchNorm).
    Attributes:
        epochs: done, with their evaluation; sums: of the steps of the epoch in work, see `engine.epoch_sums`.
        best: {'model' or 'model_ema': metrics of its best evaluation, with the epoch}.
        numbered: {file: accuracy} of the numbered checkpoints, see `RunFolder.save_evaluated`.
    """

    def __init__(self, config, model, ema, optimizer, scaler, steps_per_epoch, global_batch, own_statistics):
        self.config, self.model, self.ema, self.optimizer, self.scaler = config, model, ema, optimizer, scaler
        self.steps_per_epoch, self.global_batch, self.own_statistics = steps_per_epoch, global_batch, own_statistics
        self.epochs, self.sums, self.best, self.numbered = config.TRAIN.LAST_EPOCH, epoch_sums(), {}, {}

    @property
    def step(self):
        """Optimizer steps done."""
        return self.epochs * self.steps_per_epoch + self.sums['steps']

    @property
    def epoch_trained(self):
        """Whether the epoch in work lacks only its evaluation."""
        return self.sums['steps'] == self.steps_per_epoch

    def end_epoch(self):
        self.epochs += 1
        self.sums = epoch_sums(self.sums['skipped_in_a_row'])

    def capture(self):
        """The state for `checkpoint.save_checkpoint`, None but on rank 0; every rank calls it.

        Raises:
            TrainingStopped: a weight is not finite; such a state must not replace a good one.
        """
        modules = {'model': self.model, **({'model_ema': self.ema.module} if self.ema is not None else {})}
        statistics = {}
        if self.own_statistics and 0 < self.sums['steps'] < self.steps_per_epoch:
            statistics = {key: gather_statistics(module) for key, module in modules.items()}
        if not utils.is_main():
            return None
        state = {key: checkpoint.model_arrays(module) for key, module in modules.items()}
        broken = [name for name, array in state['model'].items() if not np.isfinite(array).all()]
        if broken:
            raise TrainingStopped(f'step {self.step} (epoch {self.epochs + 1}): weights are not finite: '
                                  f'{", ".join(broken[:4])}{", ..." if broken[4:] else ""}; the last checkpoint stays')
        for key, rows in statistics.items():  # where one set is wanted, it is the mean of all ranks'
            state[key].update({name: array.mean(axis=0) for name, array in rows.items()})
        if self.scaler is not None:
            state['scaler'] = self.scaler.state_dict()
        return {**state, 'optimizer': checkpoint.optimizer_arrays(self.optimizer, self.model), 'statistics': statistics,
                'epoch': self.epochs, 'step': self.step, 'sums': dict(self.sums), 'best': dict(self.best),
                'numbered': self.numbered, 'config': config_text(self.config), 'global_batch': self.global_batch,
                'processes': utils.world_size()}

    def restore(self, state, path):
        """Takes over a `capture`, in this order: EMA, optimizer, loss scaler, place; the model has its weights.

        Raises:
            UserError: it is finished.
        """
        if state['epoch'] >= self.config.TRAIN.NUM_EPOCHS:
            raise UserError(f"{path}: all {state['epoch']} epochs are done; for more set TRAIN.NUM_EPOCHS, for another "
                            'run choose another folder')
        if self.ema is not None:
            load_weights(self.ema.module, state['model_ema'], f'{path}: model_ema')
        checkpoint.load_optimizer_arrays(self.optimizer, self.model, state['optimizer'], path)
        if self.scaler is not None and 'scaler' in state:  # else it was trained on a device without
            self.scaler.load_state_dict(state['scaler'])
        self.epochs, self.sums, self.best = state['epoch'], dict(state['sums']), dict(state['best'])
        self.numbered = {name: entry for name, entry in state['numbered'].items()
                         if os.path.exists(os.path.join(self.config.SAVE, name))}
        logger.info(f"resumed from {path}: {self.epochs} epochs, {state['step']} steps"
                    + (f", {self.sums['steps']} of them in epoch {self.epochs + 1}" if self.sums['steps'] else ''))
        if state['processes'] != utils.world_size():
            logger.warning(f"trained by {state['processes']} processes so far, by {utils.world_size()} from here on: "
                           'the order of the images stays, the draws of mixup and drop path differ')
        if state['global_batch'] != self.global_batch:
            # images of the epoch that were seen stay out; of the next step's some may be left out with them
            steps = math.ceil(self.sums['steps'] * state['global_batch'] / self.global_batch)
            self.sums['steps'] = min(steps, self.steps_per_epoch)
        if self.step != state['step']:
            logger.warning(f"the checkpoint has {state['step']} steps; with this global batch its epochs are "
                           f'{self.step}: the learning rate goes on from there')

    def restore_statistics(self, state):
        """Gives each rank its running statistics again; after paddle.DataParallel, which hands out those of rank 0."""
        if state['statistics'] and state['processes'] == utils.world_size():
            set_statistics(self.model, state['statistics']['model'])
            if self.ema is not None:
                set_statistics(self.ema.module, state['statistics']['model_ema'])


def refuse_other_run(config, state, path):
    """Raises UserError where the settings are those of another run than the checkpoint's; logs what else differs."""
    refused, allowed = config_changes(state['config'], config)
    if refused:
        raise UserError(f'{path}: is of a run with other settings: {"; ".join(refused)}; set them back, or start a new '
                        'run from its weights with -pretrained')
    if allowed:
        logger.info(f'settings changed since: {"; ".join(allowed)}')
