"""What a trained model says of pictures.

    from predict import Predictor

    predictor = Predictor('output/RUN', batch_size=16)   # or a name of the zoo, a checkpoint, an exported model
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
from datasets import DataError, decode_image, get_transform, read_class_names, to_rgb
from deploy.equivalence import dygraph_program
from deploy.runtimes import load_paddle_program, save_paddle_program
from errors import UserError
from fuse import WithFeatures, fuse, pack
from large_kernel import build, operator_serves
from run_folder.layout import CONFIG, find_classes
from run_folder.metrics import best_checkpoint
from zoo import ZOO, build_model, pretrained_weights, settings_file

IMAGENET = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'imagenet1k.txt')
CERTIFICATE = 'certificate.json'  # what export.py writes
BACKENDS = ('auto', 'dygraph', 'inference')


@dataclass
class Prediction:
    """A picture's classes, likeliest first; where it cannot be read, `error` says why and the rest is empty.

    Attributes:
        picture: as it was given.
        classes, names, scores: number, name and probability of the `topk` likeliest classes.
        logits: float32 [num_classes].
        features: float32 [channels], what the head takes; None unless asked for.
    """
    picture: Any
    classes: List[int] = field(default_factory=list)
    names: List[str] = field(default_factory=list)
    scores: List[float] = field(default_factory=list)
    logits: Optional[np.ndarray] = None
    features: Optional[np.ndarray] = None
    error: Optional[str] = None


class Predictor:
    """A model with its decoding, its transform and the names of its classes.

    Pictures are decoded and prepared as in an evaluation, by threads, while the model computes.
    Args:
        model: a name of the zoo, a checkpoint, a run folder (for its best checkpoint) or a folder of export.py.
        cfg: settings of the model, for weights that have none beside them.
        device: 'auto', 'gpu', 'cpu', 'npu' or 'xpu'.
        batch_size: pictures that the model computes at once.
        topk: classes told for each picture; at most all.
        features: tell the pooled features as well.
        backend: 'dygraph'; 'inference', Paddle Inference with oneDNN, on the CPU only; or 'auto': dygraph, but for
            exports and where the C++ operator cannot be had, where it is the faster one.
        workers: decoding threads; None for one per core, at most 16.
    Attributes:
        origin: the weights or the program; `names`: of all classes; `device` and `backend`: which were chosen.
    Raises:
        UserError, FileNotFoundError: what was given cannot be used.
    """

    def __init__(self, model, cfg=None, device='auto', batch_size=16, topk=5, features=False, backend='auto',
                 workers=None):
        if backend not in BACKENDS:
            raise UserError(f'-backend={backend}: choose from {", ".join(BACKENDS)}')
        if min(batch_size, topk, 1 if workers is None else workers) < 1:
            raise UserError('-batch_size, -topk and -num_workers are whole numbers from 1 up')
        self.batch_size, self.topk, self._features = batch_size, topk, features
        self._workers = workers or min(16, os.cpu_count() or 1)
        exported = is_export(model)
        self.device = 'cpu' if exported and device == 'auto' else utils.resolve_device(device)
        # Where the operator serves, Paddle Inference is a few per cent faster (docs/benchmarks.md), but takes seconds
        # to trace and load a model. Without the operator dygraph is several times slower.
        if backend == 'auto':
            slow = self.device == 'cpu' and build.reason_unavailable() is not None
            backend = 'inference' if exported or slow else 'dygraph'
        self.backend = backend
        if self.backend == 'inference' and self.device != 'cpu':
            raise UserError(f'{model}: Paddle Inference runs on the CPU here, not on {self.device}: -device=cpu')
        paddle.set_device(self.device)
        if self.device == 'cpu':
            paddle_env.set_threads()
        (self._load_export if exported else self._load_weights)(model, cfg, features)

    def _load_weights(self, model, cfg, features):
        network, config = load_model(model, cfg)
        self.origin = config.MODEL.PRETRAINED
        self._prepare(config, None if self.origin in ZOO else os.path.dirname(self.origin) or '.')
        network = fuse(network, final_norm=features)
        if operator_serves():
            pack(network)
        if features:
            network = WithFeatures(network)
        if self.backend == 'dygraph':
            self._compute = dygraph_program(network)
            return
        with tempfile.TemporaryDirectory() as folder:
            path, size = os.path.join(folder, 'model'), config.DATA.IMAGE_SIZE
            save_paddle_program(network, path, (size, size))
            self._compute = load_paddle_program(path, paddle_env.set_threads())

    def _load_export(self, folder, cfg, features):
        if self.backend == 'dygraph':
            raise UserError(f'{folder}: an exported program has no dygraph form; name its weights')
        with open(os.path.join(folder, CERTIFICATE), encoding='utf-8') as file:
            certificate = json.load(file)
        programs = certificate['programs']
        if features and not certificate.get('features'):
            raise UserError(f'{folder}: this exported program gives no features; export it with -features, or name its '
                            'weights')
        # of those that run here, the one that was the fastest where it was exported
        operator = build.reason_unavailable() is None and certificate.get('operators') == build.OPERATORS
        names = [name for name in ('model', 'model_native') if name in programs and (operator or name != 'model')]
        if 'model' in programs and certificate.get('operators') != build.OPERATORS:
            utils.logger.warning('%s: `model` is for another version of the operators and is left out; export it again',
                                 folder)
        if not names:
            raise UserError(f'{folder}: has no program that runs here, but {", ".join(programs)}; export it again')
        name = min(names, key=lambda name: programs[name]['latency_ms'])
        self.origin = os.path.join(folder, name)
        self._prepare(get_config(cfg or os.path.join(folder, CONFIG)), folder)
        if name == 'model':
            build.load_operator()  # else Paddle Inference does not know it
        self._compute = load_paddle_program(self.origin, paddle_env.set_threads())

    def _prepare(self, config, folder):
        """Sets what belongs to the settings: the transform and the names of the classes."""
        self._transform = get_transform(config, 'val')
        count, path = config.MODEL.NUM_CLASSES, find_classes(folder, config.DATA.DATA_PATH)
        if path or count == 1000:
            self.names = read_class_names(path or IMAGENET)
        else:
            self.names = [str(number) for number in range(count)]
        if len(self.names) != count:
            raise DataError(f'{path}: names {len(self.names)} classes, the model has {count}')

    def __call__(self, pictures):
        """List of `Prediction`, in the order of `pictures`: paths or Pillow images, or one of them."""
        return list(self.stream([pictures] if isinstance(pictures, (str, os.PathLike, Image.Image)) else pictures))

    def stream(self, pictures):
        """Yields the predictions of any number of pictures, batch by batch, in their order."""
        samples = self._samples(pictures)
        while True:
            batch = list(itertools.islice(samples, self.batch_size))
            if not batch:
                return
            pixels = [result for _, result in batch if not isinstance(result, DataError)]
            outputs = iter(self._compute(np.stack(pixels)) if pixels else ())
            for picture, result in batch:
                if isinstance(result, DataError):
                    yield Prediction(picture, error=str(result))
                else:
                    yield self._prediction(picture, next(outputs))

    def _samples(self, pictures):
        """Yields each picture with its pixels or the DataError, in order; reads two batches ahead."""
        pending = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                for picture in pictures:
                    pending.append((picture, pool.submit(self._read, picture)))
                    if len(pending) > 2 * self.batch_size:
                        picture, future = pending.popleft()
                        yield picture, future.result()
                while pending:
                    picture, future = pending.popleft()
                    yield picture, future.result()
            finally:
                for _, future in pending:
                    future.cancel()

    def _read(self, picture):
        try:
            image = to_rgb(picture) if isinstance(picture, Image.Image) else decode_image(picture)
        except DataError as error:
            return error
        return self._transform(image)

    def _prediction(self, picture, output):
        logits, features = np.split(output, [len(self.names)])
        classes = np.argsort(-logits, kind='stable')[:self.topk]
        shares = np.exp(logits - logits.max(), dtype=np.float64)
        return Prediction(picture, classes.tolist(), [self.names[c] for c in classes],
                          (shares / shares.sum())[classes].tolist(), logits,
                          features if self._features else None)


def load_model(model, cfg=None):
    """A trained model in eval mode, and its settings.

    Args:
        model: a name of the zoo, a checkpoint, or a run folder for its best checkpoint.
        cfg: YAML file of settings, for weights that have none beside them.
    Raises:
        UserError, FileNotFoundError: what was given cannot be used.
    """
    if model not in ZOO and not os.path.exists(model):
        raise FileNotFoundError(f'-model={model}: no such file or folder, and no name that `python zoo.py` lists')
    weights = best_checkpoint(model) if os.path.isdir(model) else model
    cfg = cfg or settings_file(weights)
    if cfg is None:
        raise UserError(f'-model={model}: there is no {CONFIG} beside it; name its settings with -cfg')
    config = get_config(cfg, flags={'pretrained': weights, 'eval': True})
    network = build_model(config, *pretrained_weights(config.MODEL.PRETRAINED))
    network.eval()
    return network, config


def is_export(path):
    """Whether this is a folder that export.py wrote."""
    return os.path.isfile(os.path.join(path, CERTIFICATE))
