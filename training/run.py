"""A run from its settings to its last checkpoint: evaluation, or training with evaluation after each epoch."""
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Optional

import utils
from datasets import get_dataloader
from deploy.flip import FlipAveraged
from errors import TrainingStopped, UserError
from fuse import pack
from large_kernel import autotune, operator_in_use
from replknet import RepLKNet
from run_folder.curves import curves_line
from run_folder.metrics import main_metric
from run_folder.resume import out_of_patience, read_resumed
from run_folder.writer import RunFolder
from training.agreement import agree, agree_on_settings, data_facts, first_measures, model_facts
from training.amp import Amp, check_card
from training.data import RunData, read_data, refuse_other_data
from training.engine import evaluate, train_one_epoch
from training.progress import duration
from training.run_state import refuse_other_run
from training.running_statistics import average_statistics
from training.setup import build_training
from training.signals import stop
from utils import accuracy_line, logger
from zoo import build_model, pretrained_weights


def run(config, device):
    """Trains or, with -eval, evaluates a model. Every rank calls it.

    Args:
        config: frozen settings; `config.SAVE` names the run folder.
        device: kind of device in use ('gpu', 'cpu', ...).
    Returns:
        the metrics of an evaluation, or for training {'last', 'best'}: {'model' or 'model_ema': metrics}.
    Raises:
        UserError, FileNotFoundError: the settings or the files they name cannot be used.
        TrainingStopped: training cannot continue.
        Interrupted: a signal arrived; within an epoch, the state was saved after the current step.
    """
    amp = Amp(config, device)
    config = agree_on_settings(config, device)
    prepared, problem, facts = None, None, {}
    try:
        check_card(config, device)
        prepared = _prepare(config)
        if utils.world_size() > 1:
            facts = {**data_facts(prepared.data), **model_facts(prepared.start.model, prepared.start.checkpoint),
                     **amp.facts()}
    except (UserError, FileNotFoundError) as error:
        problem = str(error)
    if utils.world_size() > 1:
        autotune.share = first_measures
    agree(facts, problem)  # before anything that would wait for a rank that has met a problem
    folder, start, data, changed = prepared
    if config.EVAL:
        return _evaluate_only(config, amp, folder, start, data)
    loader = _loader(config, data.train, 'train')
    parts, state = build_training(config, device, amp, start, loader, data)
    if folder is not None:
        folder.claim(start.checkpoint['metrics_bytes'] if folder.own and start.checkpoint is not None else 0)
        if changed:
            folder.record(event='data', epoch=state.epochs, step=state.step, changed=changed)
    del start, prepared  # the checkpoint is as large as the model, its moving average and the optimizer together
    return _Training(config, folder, parts, state, data).run(loader)


class _Prepared(NamedTuple):
    """What a run needs before it starts: see `_prepare`."""
    folder: Optional[RunFolder]
    start: 'Start'
    data: RunData
    changed: list


def _prepare(config):
    """Locks the run folder and reads weights, checkpoint and data. The ranks do not communicate in it.

    Raises:
        UserError, FileNotFoundError: something cannot be used.
    """
    folder = RunFolder(config) if utils.is_main() and config.SAVE else None
    if folder is not None and folder.own:
        folder.lock()
    if config.EVAL_REPORT and utils.is_main():
        from evaluation.report import check_report  # imported only where used
        check_report(config.EVAL_REPORT)
    start = choose_start(config)
    data = read_data(config)
    training = start.checkpoint is not None and not config.EVAL
    changed = refuse_other_data(config, data, start.checkpoint, start.origin) if training else []
    return _Prepared(folder, start, data, changed)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Args:
        model: with the weights to start from.
        origin: where these come from, a file or the name of a model; None for initial weights.
        checkpoint: contents of the checkpoint to resume, or None.
    """
    model: RepLKNet
    origin: Optional[str]
    checkpoint: Optional[dict]


def choose_start(config):
    """Chooses where a run starts; the first of these that applies:

    1. resume: the checkpoint of -resume. Training continues from it; evaluation takes its weights.
    2. pretrained: the weights of -pretrained. Training drops a head for another number of classes.
    3. scratch: initial weights, drawn from SEED. Training only.

    Returns:
        a Start.
    Raises:
        UserError, FileNotFoundError: there is no such checkpoint or weights, or they do not fit the settings.
    """
    weights = origin = checkpoint = None
    if config.TRAIN.LAST_EPOCH and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        raise UserError(f'-last_epoch={config.TRAIN.LAST_EPOCH}: there is nothing to continue from; give -resume=RUN, '
                        'or -pretrained with the weights after that epoch')
    if config.MODEL.RESUME:
        origin, checkpoint = read_resumed(config.MODEL.RESUME)
        if not config.EVAL:
            refuse_other_run(config, checkpoint, origin)
        weights = checkpoint[checkpoint['weights_key'] if config.EVAL else 'model']
        if config.TRAIN.LAST_EPOCH not in (0, checkpoint['epoch']):
            raise UserError(f"{origin}: the checkpoint is of epoch {checkpoint['epoch']}, but -last_epoch is "
                            f'{config.TRAIN.LAST_EPOCH}')
    elif config.MODEL.PRETRAINED:
        weights, origin = pretrained_weights(config.MODEL.PRETRAINED)
    elif config.EVAL:
        raise UserError('-eval needs weights: give -pretrained=FILE, or a name that `python zoo.py` lists')
    utils.seed_paddle(config.SEED, utils.STREAM_INIT)  # the same initial weights on every rank
    model = build_model(config, weights, origin, drop_head=checkpoint is None and not config.EVAL)
    return Start(model, origin, checkpoint)


def _loader(config, dataset, mode):
    """This rank's batches of a dataset."""
    return get_dataloader(config, dataset, mode, utils.rank(), utils.world_size())


def _evaluate_only(config, amp, folder, start, data):
    """Evaluates the model of -eval, records its metrics and writes the report, if there is to be one."""
    if folder is not None:
        folder.claim()
    amp.cast_weights(start.model)
    model = pack(start.model) if operator_in_use() else start.model
    if config.EVAL_TTA:
        model = FlipAveraged(model, config.DATA.MULTI_LABEL)
    predictions, scores = None, _scores(config)
    if config.EVAL_REPORT and scores is None:
        from evaluation.predictions import Predictions  # imported only where used
        predictions = Predictions()
    metrics = _evaluate(config, model, data.val, amp, 'eval', None if predictions is None else predictions.add, scores)
    if folder is not None:
        folder.record(event='eval', **metrics, **({'tta': config.EVAL_TTA} if config.EVAL_TTA else {}))
    if config.EVAL_REPORT:
        from evaluation.report import report_of_run  # imported only where used
        report_of_run(config, scores or predictions, metrics, start.origin, data)
    return metrics


def _scores(config):
    """What collects the scores of an evaluation where images have several labels; else None."""
    if not config.DATA.MULTI_LABEL:
        return None
    from evaluation.multi_label import Scores  # imported only where used
    return Scores()


def _evaluate(config, model, val_set, amp, name, on_batch=None, scores=None):
    """Evaluates a model on the validation set and prints its accuracy; `name` is 'eval', 'model' or 'model_ema'."""
    metrics = evaluate(model, _loader(config, val_set, 'val'), len(val_set), amp, name, on_batch,
                       scores or _scores(config))
    if name != 'eval':
        label, value = main_metric(metrics)
        logger.info(f"evaluated {'the model' if name == 'model' else 'its moving average (EMA)'}: {label} {value:.3f}")
    if utils.is_main():
        try:
            print(accuracy_line(metrics, {'eval': '', 'model': 'model', 'model_ema': 'EMA'}[name]), flush=True)
        except OSError:  # a closed pipe or a full disk; training goes on, and metrics.jsonl has the figures
            if name == 'eval':
                raise
    return metrics


class _Training:
    """Trains, saves and evaluates epoch by epoch.

    Args:
        config: frozen settings.
        folder: the RunFolder of rank 0; None on the other ranks, and for a run that saves nothing.
        parts, state: see `build_training`.
        data: RunData.
    """

    def __init__(self, config, folder, parts, state, data):
        self.config, self.folder, self.parts, self.state, self.val_set = config, folder, parts, state, data.val
        self.images, self.replaced = len(data.train), 0  # in an epoch; how many of them could not be decoded
        self.models = {'model': parts.bare_model, **({'model_ema': parts.ema.module} if parts.ema is not None else {})}

    def run(self, loader):
        """Trains up to the last epoch; returns the metrics of the last and of the best evaluation.

        A signal takes effect after the current step or save. During an evaluation, which a resumed run repeats, it ends
        the process at once.
        """
        last = {}
        while self.state.epochs < self.config.TRAIN.NUM_EPOCHS:
            if out_of_patience(self.config, self.state.epochs, self.state.best):
                logger.info(f'stopped after epoch {self.state.epochs}: no better accuracy for '
                            f'{self.config.TRAIN.PATIENCE} epochs (TRAIN.PATIENCE)')
                break
            epoch = self.state.epochs + 1
            if not self.state.epoch_trained:
                with stop.deferred():
                    self._train(epoch, loader)
                    self._save()  # before the evaluation, which a damaged image may end
            metrics = self._evaluate(epoch)
            with stop.deferred():
                self._end_epoch(epoch, metrics)
            last.update(metrics)
        if self.folder is not None:
            self._finish()
        return {'last': last, 'best': self.state.best}

    def _train(self, epoch, loader):
        """Trains for one epoch, or for the rest of it, and averages the running statistics over the ranks."""
        state, parts, epochs = self.state, self.parts, self.config.TRAIN.NUM_EPOCHS
        loader.set_epoch(epoch, start_batch=state.sums['steps'] * parts.settings.accum_iter)
        self.replaced = 0
        trained = train_one_epoch(
            parts, loader, epoch=epoch, first_step=state.epochs * state.steps_per_epoch, sums=state.sums,
            on_report=None if self.folder is None else partial(self.folder.record, event='step'),
            votes=partial(self._votes, loader), after_step=self._after_step)
        logger.info(f"epoch {epoch}/{epochs} loss {trained['loss']:.4f} lr {trained['lr']:.3g} "
                    f"images/s {trained['images_per_s']:.1f} data wait {100 * trained['data_wait']:.0f}% "
                    f"time {duration(trained['seconds'])} eta {duration(trained['seconds'] * (epochs - epoch))}"
                    + (f" skipped {trained['skipped']}" if trained['skipped'] else '')
                    + (f' replaced {self.replaced}' if self.replaced else ''))
        self._record(event='train', epoch=epoch, step=state.step, processes=utils.world_size(), **trained,
                     **({'replaced': self.replaced} if self.replaced else {}))
        if state.own_statistics:
            for model in self.models.values():
                average_statistics(model)

    def _votes(self, loader):
        """Whether this rank has received a signal, whether it is time to save, and how many images of this epoch were
        replaced; summed over the ranks."""
        minutes = self.config.SAVE_MINUTES
        due = self.folder is not None and minutes and time.monotonic() - self.folder.saved_at > 60 * minutes
        return stop.received, due, loader.replaced

    def _after_step(self, stopped, due, replaced):
        """Saves every SAVE_STEPS steps or when a rank has voted for it; a signal stops all ranks at the same step.

        Raises:
            UserError: more images could not be decoded than DATA.MAX_BAD_FRACTION allows.
        """
        state, every, allowed = self.state, self.config.SAVE_STEPS, self.config.DATA.MAX_BAD_FRACTION
        self.replaced = int(replaced)
        if replaced > allowed * self.images:
            raise UserError(f'{self.replaced:,} of {self.images:,} training images could not be decoded in epoch '
                            f'{state.epochs + 1}, more than DATA.MAX_BAD_FRACTION {allowed:g} allows; the log names '
                            'them')
        if state.epoch_trained:  # the end of the epoch saves
            return
        if stopped or due or (every and state.step % every == 0):
            self._save()
        if stopped:
            saved = 'not saved' if self.folder is not None and self.folder.unsaved else 'saved'
            stop.interrupt(f' after step {state.step} (epoch {state.epochs + 1}), {saved}; resume with '
                           f'-resume={self.config.SAVE}')

    def _save(self):
        """Saves the state to resume from. No rank runs ahead while rank 0 writes."""
        state = self.state.capture()
        if self.folder is not None:
            self.folder.save_last(state)
        utils.barrier()

    def _evaluate(self, epoch):
        """Evaluates the model and its moving average, in epochs of VALIDATE_FREQ; returns {name: metrics}."""
        every, metrics = self.config.VALIDATE_FREQ, {}
        if every and (epoch % every == 0 or epoch == self.config.TRAIN.NUM_EPOCHS):
            for name, model in self.models.items():
                try:
                    metrics[name] = _evaluate(self.config, model, self.val_set, self.parts.amp, name)
                except TrainingStopped as error:
                    saved = f'; the state before this evaluation is in {self.config.SAVE}' if self.config.SAVE else ''
                    raise TrainingStopped(f'epoch {epoch}: {error}{saved}') from None
                self._record(event='eval', epoch=epoch, step=self.state.step, weights=name, **metrics[name])
        return metrics

    def _end_epoch(self, epoch, metrics):
        """Updates the best metrics, counts the epoch as done and saves what it changed."""
        best = self.state.best
        accuracies = {name: main_metric(metrics[name])[1] for name in metrics}
        improved = [name for name in metrics if name not in best or accuracies[name] > main_metric(best[name])[1]]
        best.update({name: {'epoch': epoch, **metrics[name]} for name in improved})
        self.state.end_epoch()
        captured = self.state.capture()
        if self.folder is not None:
            self.folder.save_evaluated(captured, accuracies, improved)
        utils.barrier()

    def _finish(self):
        """Logs the results, draws the curves, and reports a state that could not be saved."""
        self.folder.summary(self.state.best, self.state.numbered)
        if self.config.CURVES:
            logger.info(curves_line(self.folder.path))
        if self.folder.unsaved:
            raise TrainingStopped(f'training is complete, but its end could not be saved: {self.folder.unsaved}')

    def _record(self, **values):
        if self.folder is not None:
            self.folder.record(**values)
