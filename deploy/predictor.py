"""Classifies images with a trained model.

    from predict import Predictor

    predictor = Predictor('output/RUN', batch_size=16)   # or a zoo name, a checkpoint, an exported model
    for prediction in predictor(['cat.jpg', 'dog.png']):
        print(prediction.picture, prediction.names[0], prediction.scores[0])
"""
import itertools
import json
import os
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, List, Optional

import paddle_env

import paddle  # isort: skip

import numpy as np

import utils
from config import get_config
from datasets import get_transform
from deploy.equivalence import dygraph_program
from deploy.flip import flip_averaged
from deploy.layout import CERTIFICATE, PRECISIONS, is_export
from deploy.runtimes import load_paddle_program, save_paddle_program
from errors import UserError, one_line
from fuse import WithFeatures, fuse, pack
from image_files.decode import DataError
from image_files.lists import read_class_names
from image_files.memory import check_type, described, listed, read_picture, snapshot
from large_kernel import build, fastest_precision, operator_in_use
from run_folder.layout import CONFIG
from run_folder.metrics import best_checkpoint
from zoo import ZOO, build_model, class_names_file, pretrained_weights, require_path, settings_file

BACKENDS = ('auto', 'dygraph', 'inference')
NOT_FINITE = "the model's logits are not finite"


@dataclass
class Prediction:
    """The classes of an image, most probable first. If there is an `error`, the other fields are empty.

    Probabilities are a softmax over the classes, or for a model with several labels per image (DATA.MULTI_LABEL) the
    sigmoid of each class by itself; there may then be no class that reaches the threshold.

    Attributes:
        picture: the image as it was passed in: a path, a Pillow image or an array.
        classes, names, scores: numbers, names and probabilities of the `topk` most probable classes.
        logits: float32 [num_classes].
        features: float32 [C], the input of the head, if the predictor returns features.
        error: why the image cannot be read, or that the model's logits for it are not finite, in one line.
    """
    picture: Any
    classes: List[int] = field(default_factory=list)
    names: List[str] = field(default_factory=list)
    scores: List[float] = field(default_factory=list)
    logits: Optional[np.ndarray] = None
    features: Optional[np.ndarray] = None
    error: Optional[str] = None


class Predictor:
    """A model with its image decoding, its transform and its class names.

    Images are preprocessed as in an evaluation. Threads decode the next batches while the model computes.

    Args:
        model: a zoo name, a checkpoint, a run folder (for its best checkpoint) or a folder that export.py wrote.
        cfg: settings file of the model, if there is none next to its weights.
        device: 'auto', 'gpu', 'cpu', 'npu' or 'xpu'.
        batch_size: images per forward pass.
        topk: number of classes in each prediction; at most all classes are returned.
        features: also return the pooled features.
        backend: 'dygraph', 'inference' (Paddle Inference, CPU only) or 'auto'. 'auto' is 'inference' for
            an export, and on a CPU without the C++ operator, where it is faster; otherwise 'dygraph'.
        workers: number of decoding threads; None for one per core, at most 16.
        tta: 'flip' averages the probabilities of each image and its mirror image, see deploy/flip.py; the `logits` are
            then log-probabilities, and the features those of the image itself.
        threshold: for a model with several labels per image: leave out classes with a score below; None for 0.5.
        precision: of the dense convolutions on the CPU: 'fp32', 'bf16' (weights and feature maps in bfloat16, sums in
            float32; needs the C++ operator) or 'auto', the fastest of both here. None is 'fp32' for weights, and for
            an export what it was exported in, which may also be 'int8'.
    Attributes:
        multi_label: whether the model has several labels per image: its scores are then sigmoids, otherwise a softmax.
        origin: path or zoo name of the weights, or path of the exported program.
        settings: those of the model.
        names: names of all classes.
        exif: whether images are turned as their EXIF orientation says (DATA.EXIF).
        transform: function from an RGB Pillow image to the model's input, float32 [3, H, W].
        features: whether predictions have features.
        network: the model in dygraph, for `evaluation.activation_maps`; None with Paddle Inference.
        device, backend, precision: the ones in use.
    Raises:
        UserError, FileNotFoundError: an argument or a file cannot be used.
    """

    def __init__(self, model, cfg=None, device='auto', batch_size=16, topk=5, features=False, backend='auto',
                 workers=None, tta='', threshold=None, precision=None):
        if backend not in BACKENDS:
            raise UserError(f'-backend={backend}: choose from {", ".join(BACKENDS)}')
        if min(batch_size, topk, 1 if workers is None else workers) < 1:
            raise UserError('-batch_size, -topk and -num_workers must be at least 1')
        if precision not in (None, 'auto', *PRECISIONS):
            raise UserError(f'-precision={precision}: choose from {", ".join(PRECISIONS)}, auto')
        if tta not in ('', 'flip'):
            raise UserError(f'-tta={tta}: choose flip, or leave it out')
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f'-threshold={threshold}: a score is from 0 to 1')
        self.batch_size, self.topk, self.tta, self.features, self.network = batch_size, topk, tta, features, None
        self._workers = workers or min(16, os.cpu_count() or 1)
        exported = is_export(model)
        self.device = 'cpu' if exported and device == 'auto' else utils.resolve_device(device)
        self.backend = self._fastest_backend(exported) if backend == 'auto' else backend
        if self.backend == 'inference' and self.device != 'cpu':
            raise UserError(f'{model}: Paddle Inference is supported on the CPU only, not on {self.device}; '
                            'use -device=cpu')
        if self.backend == 'dygraph' and exported:
            raise UserError(f'{model}: an exported program cannot run in dygraph; name its weights instead')
        paddle.set_device(self.device)
        if self.device == 'cpu':
            paddle_env.set_threads()
        if exported:
            self._load_export(model, cfg, precision)
        else:
            self.precision = _precision_of_weights(precision, self.device)
            self._load_weights(model, cfg)
        if threshold is not None and not self.multi_label:
            raise UserError(f'-threshold={threshold}: {model} has one label per image, so its scores add up to 1; '
                            'leave it out')
        self.threshold = 0.5 if threshold is None else threshold
        if tta:
            self._compute = flip_averaged(self._compute, len(self.names), self.multi_label)

    def _fastest_backend(self, exported):
        # With the operator, Paddle Inference is a few per cent faster than dygraph (docs/benchmarks.md), but tracing
        # and loading a model takes seconds. Without it, dygraph is several times slower.
        if exported or (self.device == 'cpu' and build.reason_unavailable() is not None):
            return 'inference'
        return 'dygraph'

    def _load_weights(self, model, cfg):
        network, config = load_model(model, cfg)
        self.origin = config.MODEL.PRETRAINED
        self._configure(config, None if self.origin in ZOO else os.path.dirname(self.origin) or '.', cfg)
        network = fuse(network, final_norm=self.features)
        if operator_in_use():
            pack(network, self.precision)
        if self.backend == 'dygraph':
            self.network = network
        if self.features:
            network = WithFeatures(network)
        self._compute = (dygraph_program(network) if self.backend == 'dygraph' else
                         _traced(network, config.DATA.IMAGE_SIZE))

    def _load_export(self, folder, cfg, precision):
        name, self.precision = _fastest_program(folder, self.features, precision)
        self.origin = os.path.join(folder, name)
        self._configure(get_config(cfg or os.path.join(folder, CONFIG)), folder, cfg)
        if name == 'model':
            build.load_operator()  # registers the operator with Paddle Inference
        self._compute = load_paddle_program(self.origin, paddle_env.set_threads())

    def _configure(self, config, folder, cfg):
        """Sets the transform and the class names, see `zoo.class_names_file`."""
        self.settings, self.transform, self.exif = config, get_transform(config, 'val'), config.DATA.EXIF
        self.multi_label = config.DATA.MULTI_LABEL
        count, path = config.MODEL.NUM_CLASSES, class_names_file(config, folder, cfg)
        self.names = read_class_names(path, count) if path else [str(number) for number in range(count)]

    def __call__(self, pictures):
        """Predicts the classes of images. Nothing of the caller's is changed.

        Args:
            pictures: paths, Pillow images and RGB arrays (uint8 [H, W, 3]; OpenCV's arrays are BGR), or a single one.
        Returns:
            list of `Prediction` in the same order; those of images that cannot be used have an error.
        Raises:
            TypeError: an item is something else; the text says what is accepted.
        """
        pictures = list(listed(pictures))
        for picture in pictures:
            check_type(picture)
        return list(self.stream(pictures))

    def stream(self, pictures):
        """Yields the predictions of any number of images in their order, batch by batch.

        See `__call__`; a TypeError comes after the predictions of the items before.
        """
        samples = self._samples(listed(pictures))
        while True:
            batch = list(itertools.islice(samples, self.batch_size))
            if not batch:
                return
            predictions = iter(self.predictions(*zip(*(
                (picture, result) for picture, result in batch if not isinstance(result, Exception)))))
            for picture, result in batch:
                if isinstance(result, TypeError):
                    raise result
                if isinstance(result, Exception):
                    yield Prediction(picture, error=str(result))
                else:
                    yield next(predictions)

    def predictions(self, pictures=(), arrays=()):
        """The predictions of preprocessed images, in one forward pass.

        Args:
            pictures: what each `Prediction` names as its picture.
            arrays: results of `transform`, as many.
        Returns:
            list of `Prediction`.
        """
        outputs = self._compute(np.stack(arrays)) if arrays else ()
        return [self._prediction(picture, output) for picture, output in zip(pictures, outputs)]

    def _samples(self, pictures):
        """Yields (picture, preprocessed array or its error) in order; threads decode two batches ahead."""
        pending = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for picture in pictures:
                    pending.append((picture, self._submitted(pool, picture)))
                    if len(pending) > 2 * self.batch_size:
                        picture, future = pending.popleft()
                        yield picture, future.result()
                while pending:
                    picture, future = pending.popleft()
                    yield picture, future.result()
            finally:
                for _, future in pending:
                    future.cancel()

    def _submitted(self, pool, picture):
        """The future of a preprocessed picture; the caller may change the picture, or give it twice, from now on."""
        try:
            check_type(picture)
            return pool.submit(self._preprocess, snapshot(picture), described(picture))
        except Exception as error:
            failed = Future()
            failed.set_result(error if isinstance(error, TypeError) else _unreadable(described(picture), error))
            return failed

    def _preprocess(self, picture, name):
        """Array [3, H, W] of a picture; a DataError that begins with `name` is returned, not raised."""
        try:
            return self.transform(read_picture(picture, self.exif))
        except Exception as error:
            return error if isinstance(error, DataError) and name == str(picture) else _unreadable(name, error)

    def _prediction(self, picture, output):
        logits, features = np.split(output, [len(self.names)])
        if not np.isfinite(output).all():
            return Prediction(picture, error=f'{described(picture)}: {NOT_FINITE}')
        classes = np.argsort(-logits, kind='stable')[:self.topk]
        scores = class_scores(logits, self.multi_label)
        if self.multi_label:
            classes = classes[scores[classes] >= self.threshold]
        return Prediction(picture, classes.tolist(), [self.names[c] for c in classes], scores[classes].tolist(), logits,
                          features if self.features else None)


def class_scores(logits, multi_label=False):
    """The softmax of logits [K], or with `multi_label` their sigmoids; float64."""
    if multi_label:
        return utils.sigmoid(logits)
    exponentials = np.exp(logits - logits.max(), dtype=np.float64)
    return exponentials / exponentials.sum()


def _unreadable(name, error):
    return DataError(f'{name}: cannot read the image: {one_line(error)}')


def _traced(network, size):
    """The network as a Paddle Inference program for images of `size` x `size` pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'model')
        save_paddle_program(network, path, (size, size))
        return load_paddle_program(path, paddle_env.set_threads())


def _precision_of_weights(precision, device):
    """The precision to load weights in, 'fp32' or 'bf16', from the argument of `Predictor`."""
    reason = (f'on {device} it is not supported; use -device=cpu' if device != 'cpu' else
              None if operator_in_use() else 'it needs the C++ operator: ' + (
                  build.reason_unavailable() or 'LARGE_KERNEL_CONV_IMPL excludes it'))
    if precision == 'auto':
        return 'fp32' if reason else fastest_precision()
    if precision == 'int8':
        raise UserError('-precision=int8: needs images to calibrate on; export the model with `export.py '
                        '-precision=int8 -pictures=DIR`, and name the export with -model')
    if precision == 'bf16' and reason:
        raise UserError(f'-precision=bf16: {reason}')
    return precision or 'fp32'


def _fastest_program(folder, features, precision=None):
    """(name, precision) of the exported Paddle program that was the fastest at export, among those that run here.

    Args:
        precision: None for `model` if it runs here, where it was exported in another precision than float32; 'auto'
            for any; or one of PRECISIONS.
    """
    with open(os.path.join(folder, CERTIFICATE), encoding='utf-8') as file:
        certificate = json.load(file)
    if features and not certificate.get('features'):
        raise UserError(f'{folder}: this exported program returns no features; export it with -features, or name its '
                        'weights instead')
    programs, current = certificate['programs'], certificate.get('operators') == build.OPERATORS
    precisions = {name: program.get('precision', 'fp32') for name, program in programs.items()}
    if 'model' in programs and not current:
        utils.logger.warning('%s: `model` was exported for another version of the operators and is not used; '
                             'export it again', folder)
    paddle_programs = names = [name for name in ('model', 'model_native') if name in programs]
    if precision in PRECISIONS:
        names = [name for name in names if precisions[name] == precision]
        if not names:
            found = ', '.join(precisions[name] for name in paddle_programs) or 'none for Paddle'
            raise UserError(f'-precision={precision}: {folder} contains no such program ({found}); export one with '
                            f'`export.py -precision={precision}`')
    if not current or build.reason_unavailable() is not None:
        names = [name for name in names if name != 'model']
    if not names:
        if precision in PRECISIONS:
            reason = build.reason_unavailable() or 'it needs another version of the operators; export it again'
            raise UserError(f'-precision={precision}: `model` in {folder} does not run here: {reason}')
        raise UserError(f'{folder}: none of its programs ({", ".join(programs)}) runs here; export it again')
    if precision is None and precisions.get('model', 'fp32') != 'fp32':
        if names[0] != 'model':
            utils.logger.warning('%s: `model`, in %s, does not run here; `model_native` is used, in float32', folder,
                                 precisions['model'])
        return names[0], precisions[names[0]]
    name = min(names, key=lambda name: programs[name]['latency_ms'])
    return name, precisions[name]


def model_settings(model, cfg=None):
    """The settings of a trained model, MODEL.PRETRAINED being its weights; arguments and errors as in `load_model`."""
    if model not in ZOO:
        require_path(model, flag='-model=')
    weights = best_checkpoint(model) if os.path.isdir(model) else model
    cfg = cfg or settings_file(weights)
    if cfg is None:
        raise UserError(f'-model={model}: there is no {CONFIG} next to it; name its settings file with -cfg')
    return get_config(cfg, flags={'pretrained': weights, 'eval': True})


def load_model(model, cfg=None):
    """Loads a trained model in eval mode.

    Args:
        model: a zoo name, a checkpoint, or a run folder for its best checkpoint.
        cfg: YAML file of settings, if there is none next to the weights.
    Returns:
        (model, its settings).
    Raises:
        UserError, FileNotFoundError: an argument or a file cannot be used.
    """
    config = model_settings(model, cfg)
    network = build_model(config, *pretrained_weights(config.MODEL.PRETRAINED))
    network.eval()
    return network, config
