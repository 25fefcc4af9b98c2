"""The state of a training run, saved to and restored from a checkpoint, so that a resumed run loses nothing."""
import math
import os

import utils
from config import config_changes, config_text
from errors import TrainingStopped, UserError
from large_kernel.autotune import choices
from large_kernel.autotune import restore as restore_choices
from port_weights.load import load_weights, not_finite
from run_folder import checkpoint
from training.progress import epoch_sums
from training.running_statistics import gather_statistics, set_statistics
from utils import logger


class RunState:
    """Everything that changes during a run.

    Random number generators are not part of it: every draw follows from the seed and the epoch, image or step.

    Args:
        config: frozen settings.
        model, ema, optimizer, scaler: ema and scaler may be None.
        steps_per_epoch: optimizer steps.
        own_statistics: whether the running statistics of the ranks differ within an epoch (no SyncBatchNorm).
        data: the `identity` of `data.RunData`.
        masters: {structured name: float32 parameter}, see `MasterWeights`.
        flat: the `FlatParameters` that the optimizer updates as a whole; none if it updates each parameter on its own.
    Attributes:
        epochs: finished epochs, including their evaluation.
        sums: totals over the steps of the current epoch, see `progress.epoch_sums`.
        best: {'model' or 'model_ema': metrics of its best evaluation, with the epoch}.
        numbered: {file name: {'epoch', 'acc1', 'weights'}} of the numbered checkpoints, see `RunFolder.save_evaluated`.
    """

    def __init__(self, config, model, ema, optimizer, scaler, steps_per_epoch, own_statistics, data=None,
                 masters=None, flat=()):
        self.config, self.model, self.ema, self.optimizer, self.scaler = config, model, ema, optimizer, scaler
        self.steps_per_epoch, self.own_statistics, self.data = steps_per_epoch, own_statistics, data or {}
        self.masters, self.flat = masters or {}, flat
        self.epochs, self.sums, self.best, self.numbered = config.TRAIN.LAST_EPOCH, epoch_sums(), {}, {}

    @property
    def global_batch(self):
        """Images per optimizer step, over all ranks."""
        return self.config.DATA.BATCH_SIZE * self.config.TRAIN.ACCUM_ITER * utils.world_size()

    @property
    def step(self):
        """Optimizer steps done in the whole run."""
        return self.epochs * self.steps_per_epoch + self.sums['steps']

    @property
    def epoch_trained(self):
        """Whether only the evaluation of the current epoch is left."""
        return self.sums['steps'] == self.steps_per_epoch

    def end_epoch(self):
        """Counts the current epoch as finished and starts the totals of the next one."""
        self.epochs += 1
        self.sums = epoch_sums(self.sums['skipped_in_a_row'])

    def capture(self):
        """The state for a checkpoint on rank 0, None on the other ranks. Every rank calls it.

        Returns:
            dict with the keys of `run_folder.checkpoint.SCHEMA` that do not concern the file itself.
        Raises:
            TrainingStopped: a weight is not finite; such a state must not replace a good checkpoint.
        """
        modules = {'model': self.model, **({'model_ema': self.ema.module} if self.ema is not None else {})}
        statistics = {}
        if self.own_statistics and 0 < self.sums['steps'] < self.steps_per_epoch:
            statistics = {key: gather_statistics(module) for key, module in modules.items()}
        if not utils.is_main():
            return None
        state = {key: checkpoint.model_arrays(module) for key, module in modules.items()}
        for key, name in (('model', 'weights'), ('model_ema', 'weights of the EMA')):
            broken = not_finite(state.get(key, {}))
            if broken:
                raise TrainingStopped(f'step {self.step} (epoch {self.epochs + 1}): {name} are not finite: {broken}; '
                                      'the last checkpoint is kept')
        for key, rows in statistics.items():  # the weights by themselves get the mean over the ranks
            state[key].update({name: array.mean(axis=0) for name, array in rows.items()})
        if self.scaler is not None:
            state['scaler'] = self.scaler.state_dict()
        return {**state, 'optimizer': checkpoint.optimizer_arrays(self.optimizer, self.model, self.masters, self.flat),
                'statistics': statistics, 'epoch': self.epochs, 'step': self.step, 'sums': dict(self.sums),
                'best': dict(self.best), 'numbered': self.numbered, 'config': config_text(self.config),
                'data': self.data, 'global_batch': self.global_batch, 'processes': utils.world_size(),
                'convolutions': choices()}

    def restore(self, state, path):
        """Restores what `capture` returned: EMA, optimizer, loss scaler and position; the model has its weights.

        Args:
            state: contents of a checkpoint.
            path: its file, for messages.
        Raises:
            UserError: its run is finished, or it does not fit the model or the optimizer.
        """
        if state['epoch'] >= self.config.TRAIN.NUM_EPOCHS:
            raise UserError(f"{path}: all {state['epoch']} epochs are done; to train longer, raise TRAIN.NUM_EPOCHS; "
                            'for a new run, choose another folder')
        if self.ema is not None:
            load_weights(self.ema.module, state['model_ema'], f'{path}: model_ema')
        checkpoint.load_optimizer_arrays(self.optimizer, self.model, state['optimizer'], path, self.masters, self.flat)
        if self.scaler is not None and 'scaler' in state:  # absent when it was trained without loss scaling
            self.scaler.load_state_dict(state['scaler'])
        self.epochs, self.sums, self.best = state['epoch'], dict(state['sums']), dict(state['best'])
        self.data = {**state.get('data', {}), **self.data}  # VALIDATE_FREQ 0, for example, reads no validation list
        self.numbered = {name: entry for name, entry in state['numbered'].items()
                         if os.path.exists(os.path.join(self.config.SAVE, name))}
        logger.info(f"resumed from {path}: {self.epochs} epochs, {state['step']} steps"
                    + (f", {self.sums['steps']} of them in epoch {self.epochs + 1}" if self.sums['steps'] else ''))
        restore_choices(state.get('convolutions', {}))
        self._adapt_position(state)

    def _adapt_position(self, state):
        """Converts the steps of the current epoch to this global batch, and warns about what differs from before."""
        if state['processes'] != utils.world_size():
            logger.warning(f"trained by {state['processes']} processes so far, by {utils.world_size()} from now on: "
                           'the order of the images stays the same, the random draws of mixup and drop path change')
        # no image is seen twice in an epoch; rounding up may leave out some that were not seen
        steps = math.ceil(self.sums['steps'] * state['global_batch'] / self.global_batch)
        self.sums['steps'] = min(steps, self.steps_per_epoch)  # the list may have become shorter
        if self.step != state['step']:
            cause = 'this global batch' if state['global_batch'] != self.global_batch else 'these training images'
            logger.warning(f"the checkpoint has {state['step']} steps, which with {cause} correspond to "
                           f'{self.step}: the learning rate continues from there')

    def restore_statistics(self, state):
        """Restores this rank's running statistics; after paddle.DataParallel, which broadcasts those of rank 0."""
        if state['statistics'] and state['processes'] == utils.world_size():
            set_statistics(self.model, state['statistics']['model'])
            if self.ema is not None:
                set_statistics(self.ema.module, state['statistics']['model_ema'])


def refuse_other_run(config, state, path):
    """Compares the settings with those of the checkpoint to resume, and logs the changes that are allowed.

    Raises:
        UserError: a setting differs that must stay the same throughout a run.
    """
    refused, allowed = config_changes(state['config'], config)
    if refused:
        raise UserError(f'{path}: belongs to a run with other settings: {"; ".join(refused)}; restore these settings, '
                        'or start a new run from its weights with -pretrained')
    if allowed:
        logger.info(f'settings changed since the checkpoint: {"; ".join(allowed)}')
