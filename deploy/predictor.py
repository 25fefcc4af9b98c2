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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, List, Optional

import paddle_env

import paddle  # isort: skip

import numpy as np
from PIL import Image

import utils
from config import get_config
from datasets import get_transform
from deploy.equivalence import dygraph_program
from deploy.layout import CERTIFICATE, is_export
from deploy.runtimes import load_paddle_program, save_paddle_program
from errors import UserError
from fuse import WithFeatures, fuse, pack
from image_files.decode import DataError, decode_image, to_rgb
from image_files.lists import read_class_names
from large_kernel import build, operator_in_use
from run_folder.layout import CONFIG, find_classes
from run_folder.metrics import best_checkpoint
from zoo import ZOO, build_model, pretrained_weights, require_path, settings_file

IMAGENET = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'imagenet1k.txt')
BACKENDS = ('auto', 'dygraph', 'inference')


@dataclass
class Prediction:
    """The classes of an image, most probable first. If the image cannot be read, only `error` is set.

    Attributes:
        picture: the image as it was passed in, a path or a Pillow image.
        classes, names, scores: numbers, names and probabilities of the `topk` most probable classes.
        logits: float32 [num_classes].
        features: float32 [C], the input of the head, if the predictor returns features.
        error: why the image cannot be read, in one line.
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
        backend: 'dygraph', 'inference' (Paddle Inference with oneDNN, CPU only) or 'auto'. 'auto' is 'inference' for
            an export, and on a CPU without the C++ operator, where it is faster; otherwise 'dygraph'.
        workers: number of decoding threads; None for one per core, at most 16.
    Attributes:
        origin: path or zoo name of the weights, or path of the exported program.
        names: names of all classes.
        device, backend: the ones in use.
    Raises:
        UserError, FileNotFoundError: an argument or a file cannot be used.
    """

    def __init__(self, model, cfg=None, device='auto', batch_size=16, topk=5, features=False, backend='auto',
                 workers=None):
        if backend not in BACKENDS:
            raise UserError(f'-backend={backend}: choose from {", ".join(BACKENDS)}')
        if min(batch_size, topk, 1 if workers is None else workers) < 1:
            raise UserError('-batch_size, -topk and -num_workers must be at least 1')
        self.batch_size, self.topk, self._features = batch_size, topk, features
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
            self._load_export(model, cfg)
        else:
            self._load_weights(model, cfg)

    def _fastest_backend(self, exported):
        # With the operator, Paddle Inference is a few per cent faster than dygraph (docs/benchmarks.md), but tracing
        # and loading a model takes seconds. Without it, dygraph is several times slower.
        if exported or (self.device == 'cpu' and build.reason_unavailable() is not None):
            return 'inference'
        return 'dygraph'

    def _load_weights(self, model, cfg):
        network, config = load_model(model, cfg)
        self.origin = config.MODEL.PRETRAINED
        self._configure(config, None if self.origin in ZOO else os.path.dirname(self.origin) or '.')
        network = fuse(network, final_norm=self._features)
        if operator_in_use():
            pack(network)
        if self._features:
            network = WithFeatures(network)
        self._compute = (dygraph_program(network) if self.backend == 'dygraph' else
                         _traced(network, config.DATA.IMAGE_SIZE))

    def _load_export(self, folder, cfg):
        name = _fastest_program(folder, self._features)
        self.origin = os.path.join(folder, name)
        self._configure(get_config(cfg or os.path.join(folder, CONFIG)), folder)
        if name == 'model':
            build.load_operator()  # registers the operator with Paddle Inference
        self._compute = load_paddle_program(self.origin, paddle_env.set_threads())

    def _configure(self, config, folder):
        """Sets the transform and the class names; `folder`, or else the data folder, may hold the names."""
        self._transform = get_transform(config, 'val')
        count, path = config.MODEL.NUM_CLASSES, find_classes(folder, config.DATA.DATA_PATH)
        if path or count == 1000:
            self.names = read_class_names(path or IMAGENET)
        else:
            self.names = [str(number) for number in range(count)]
        if len(self.names) != count:
            raise DataError(f'{path}: names {len(self.names)} classes, the model has {count}')

    def __call__(self, pictures):
        """Predicts the classes of images.

        Args:
            pictures: paths or Pillow images, or a single one.
        Returns:
            list of `Prediction` in the same order.
        """
        return list(self.stream([pictures] if isinstance(pictures, (str, os.PathLike, Image.Image)) else pictures))

    def stream(self, pictures):
        """Yields the predictions of any number of images in their order, batch by batch."""
        samples = self._samples(pictures)
        while True:
            batch = list(itertools.islice(samples, self.batch_size))
            if not batch:
                return
            arrays = [result for _, result in batch if not isinstance(result, DataError)]
            outputs = iter(self._compute(np.stack(arrays)) if arrays else ())
            for image, result in batch:
                if isinstance(result, DataError):
                    yield Prediction(image, error=str(result))
                else:
                    yield self._prediction(image, next(outputs))

    def _samples(self, images):
        """Yields (image, preprocessed array or DataError) in order; threads decode two batches ahead."""
        pending = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for image in images:
                    pending.append((image, pool.submit(self._preprocess, image)))
                    if len(pending) > 2 * self.batch_size:
                        image, future = pending.popleft()
                        yield image, future.result()
                while pending:
                    image, future = pending.popleft()
                    yield image, future.result()
            finally:
                for _, future in pending:
                    future.cancel()

    def _preprocess(self, image):
        """Array [3, H, W] of a path or a Pillow image; a DataError is returned, not raised."""
        try:
            decoded = to_rgb(image) if isinstance(image, Image.Image) else decode_image(image)
        except DataError as error:
            return error
        return self._transform(decoded)

    def _prediction(self, image, output):
        logits, features = np.split(output, [len(self.names)])
        classes = np.argsort(-logits, kind='stable')[:self.topk]
        exponentials = np.exp(logits - logits.max(), dtype=np.float64)
        return Prediction(image, classes.tolist(), [self.names[c] for c in classes],
                          (exponentials / exponentials.sum())[classes].tolist(), logits,
                          features if self._features else None)


def _traced(network, size):
    """The network as a Paddle Inference program for images of `size` x `size` pixels."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'model')
        save_paddle_program(network, path, (size, size))
        return load_paddle_program(path, paddle_env.set_threads())


def _fastest_program(folder, features):
    """Name of the exported Paddle program that was the fastest at export, among those that run here."""
    with open(os.path.join(folder, CERTIFICATE), encoding='utf-8') as file:
        certificate = json.load(file)
    if features and not certificate.get('features'):
        raise UserError(f'{folder}: this exported program returns no features; export it with -features, or name its '
                        'weights instead')
    programs, current = certificate['programs'], certificate.get('operators') == build.OPERATORS
    if 'model' in programs and not current:
        utils.logger.warning('%s: `model` was exported for another version of the operators and is not used; '
                             'export it again', folder)
    names = [name for name in ('model', 'model_native') if name in programs]
    if not current or build.reason_unavailable() is not None:
        names = [name for name in names if name != 'model']
    if not names:
        raise UserError(f'{folder}: none of its programs ({", ".join(programs)}) runs here; export it again')
    return min(names, key=lambda name: programs[name]['latency_ms'])


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
    if model not in ZOO:
        require_path(model, flag='-model=')
    weights = best_checkpoint(model) if os.path.isdir(model) else model
    cfg = cfg or settings_file(weights)
    if cfg is None:
        raise UserError(f'-model={model}: there is no {CONFIG} next to it; name its settings file with -cfg')
    config = get_config(cfg, flags={'pretrained': weights, 'eval': True})
    network = build_model(config, *pretrained_weights(config.MODEL.PRETRAINED))
    network.eval()
    return network, config
