"""The published training recipes as data. `-dry_run` lists where the settings of a run differ from its recipe.

Sources: the paper (arXiv 2203.06717, appendix A), its official code, and MindSpore's model zoo.
"""
from dataclasses import dataclass
from typing import Any, Dict, Optional


@dataclass(frozen=True)
class Recipe:
    """A published training run.

    Attributes:
        title: model, data and image size.
        global_batch: images per optimizer step, for which the learning rate is meant.
        start: zoo name of the weights that the run starts from, or None for random weights.
        settings: {key of config.py: value}; a key that is not listed was not published.
    """
    title: str
    global_batch: int
    start: Optional[str]
    settings: Dict[str, Any]


_COMMON = {
    'DATA.IMAGE_SIZE': 224, 'DATA.CROP_PCT': 0.875, 'DATA.INTERPOLATION': 'bicubic',
    'DATA.IMAGENET_MEAN': [0.485, 0.456, 0.406], 'DATA.IMAGENET_STD': [0.229, 0.224, 0.225], 'MODEL.NUM_CLASSES': 1000,
    'TRAIN.OPTIMIZER.NAME': 'adamw', 'TRAIN.OPTIMIZER.BETAS': [0.9, 0.999], 'TRAIN.OPTIMIZER.EPS': 1e-8,
    'TRAIN.LR_SCHEDULER.NAME': 'cosine', 'TRAIN.COOLDOWN_EPOCHS': 0.0, 'TRAIN.END_LR': 1e-6, 'TRAIN.LAYER_DECAY': 1.0,
    'TRAIN.GRAD_CLIP': 0.0, 'TRAIN.MODEL_EMA': True, 'TRAIN.MODEL_EMA_DECAY': 0.9999,
    'TRAIN.LOSS': 'auto', 'TRAIN.SMOOTHING': 0.1, 'TRAIN.REPEATED_AUG': 0, 'TRAIN.HFLIP': 0.5,
    'TRAIN.AUTO_AUGMENT': 'rand-m9-mstd0.5-inc1', 'TRAIN.RANDOM_RESIZED_CROP.SCALE': [0.08, 1.0],
    'TRAIN.RANDOM_ERASE_PROB': 0.25, 'TRAIN.RANDOM_ERASE_MODE': 'pixel', 'TRAIN.RANDOM_ERASE_COUNT': 1,
}
_FROM_SCRATCH = {
    **_COMMON, 'TRAIN.BASE_LR': 4e-3, 'TRAIN.WEIGHT_DECAY': 0.05, 'TRAIN.MIXUP_PROB': 1.0, 'TRAIN.MIXUP_ALPHA': 0.8,
    'TRAIN.CUTMIX_ALPHA': 1.0, 'TRAIN.MIXUP_SWITCH_PROB': 0.5, 'TRAIN.MIXUP_MODE': 'batch',
}
_FINE_TUNING = {
    **_COMMON, 'TRAIN.BASE_LR': 4e-4, 'TRAIN.NUM_EPOCHS': 30, 'TRAIN.WARMUP_EPOCHS': 1.0, 'TRAIN.WEIGHT_DECAY': 1e-8,
    'TRAIN.LAYER_DECAY': 0.7, 'TRAIN.MIXUP_PROB': 0.0,
}
_MINDSPORE = {key: value for key, value in _FROM_SCRATCH.items() if not key.startswith('TRAIN.MODEL_EMA')}

RECIPES = {
    '1k_224': Recipe('31B, ImageNet-1K, 224', 2048, None, {
        **_FROM_SCRATCH, 'TRAIN.NUM_EPOCHS': 300, 'TRAIN.WARMUP_EPOCHS': 10.0, 'MODEL.DROPPATH': 0.5}),
    '1k_224_to_384': Recipe('31B, ImageNet-1K, 224 to 384', 1024, 'replknet_31b_1k_224', {
        **_FINE_TUNING, 'DATA.IMAGE_SIZE': 384, 'MODEL.DROPPATH': 0.8}),
    '22k': Recipe('31B and 31L, ImageNet-22K, 224', 4096, None, {
        **_FROM_SCRATCH, 'TRAIN.NUM_EPOCHS': 90, 'TRAIN.WARMUP_EPOCHS': 5.0, 'MODEL.DROPPATH': 0.1,
        'MODEL.NUM_CLASSES': 21841, 'TRAIN.MODEL_EMA': False, 'VALIDATE_FREQ': 0}),
    '22k_to_1k_224': Recipe('31B, ImageNet-22K to 1K, 224', 512, 'replknet_31b_22k', {
        **_FINE_TUNING, 'MODEL.DROPPATH': 0.2}),
    '22k_to_1k_384': Recipe('31B and 31L, ImageNet-22K to 1K, 384', 512, 'replknet_31b_22k or replknet_31l_22k', {
        **_FINE_TUNING, 'DATA.IMAGE_SIZE': 384, 'TRAIN.END_LR': 3e-4, 'MODEL.DROPPATH': 0.3}),
    'mindspore': Recipe("31B, ImageNet-1K, 224, MindSpore's", 512, None, {
        **_MINDSPORE, 'TRAIN.BASE_LR': 5e-4, 'TRAIN.NUM_EPOCHS': 300, 'TRAIN.WARMUP_EPOCHS': 20.0,
        'MODEL.DROPPATH': 0.4, 'TRAIN.GRAD_CLIP': 5.0, 'TRAIN.AUTO_AUGMENT': 'randaug-m9-mstd0.5'}),
}
