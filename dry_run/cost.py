"""The cost of a RepLKNet: parameters, multiply-accumulates and memory, counted from its layers without running it.

    cost = model_cost(config)
    memory = training_memory(config, cost)
"""
import math
from dataclasses import dataclass

import paddle

from deploy.equivalence import multiply_accumulates
from replknet import RepLKBlock, build_replknet

# float32 values that an optimizer keeps for each parameter
OPTIMIZER_STATES = {'adamw': 2, 'nadam': 2, 'lamb': 2, 'lion': 1, 'momentum': 1, 'adan': 4, 'sgd': 0}


@dataclass(frozen=True)
class Cost:
    """Numbers of values and operations, those of one image where they depend on images.

    Attributes:
        parameters, merged_parameters: trained parameters in training form, and with the small kernels merged.
        statistics: running statistics of batch norm.
        macs, merged_macs: multiply-accumulates of the convolutions and the head, in both forms.
        activations: values that a forward pass keeps for the backward pass.
        recompute_activations: the same with MODEL.RECOMPUTE.
    """
    parameters: int
    merged_parameters: int
    statistics: int
    macs: int
    merged_macs: int
    activations: int
    recompute_activations: int


def lazy_model(config, merged=False):
    """The model with parameters that have shapes but no values: takes hardly any time and memory."""
    with paddle.LazyGuard():
        return build_replknet(config, merged)


def model_cost(config):
    """The `Cost` of the model with images of DATA.IMAGE_SIZE."""
    size = config.DATA.IMAGE_SIZE
    model, merged = lazy_model(config), lazy_model(config, merged=True)
    parameters = model.num_parameters()
    kept, recomputed = _activations(model, size)
    return Cost(parameters, merged.num_parameters(), sum(p.size for p in model.parameters()) - parameters,
                multiply_accumulates(model, size, size), multiply_accumulates(merged, size, size), kept, recomputed)


def _activations(model, size):
    """Values kept for the backward pass of one image, without and with recomputation."""
    kept = inside = recomputed = 0  # inside: those of blocks, which recomputation does not keep

    def conv_bn_relu(layer, size):
        nonlocal kept
        size = math.ceil(size / layer.conv._stride[0])
        # batch norm keeps its input, the ReLU after it its output
        kept += 2 * layer.conv.weight.shape[0] * size ** 2
        return size

    for layer in model.stem:
        size = conv_bn_relu(layer, size)
    for s, stage in enumerate(model.stages):
        for block in stage.blocks:
            values, output, working = _kept_by_block(block, size)
            kept, inside = kept + values + output, inside + values
            # when a block is recomputed, the values kept by later blocks are already freed
            recomputed = max(recomputed, kept - inside + values + working)
        if s < len(model.transitions):
            for layer in model.transitions[s]:
                size = conv_bn_relu(layer, size)
    return kept, max(recomputed, kept - inside)


def _kept_by_block(block, size):
    """Values kept inside a block, by its output, and as gradients when its backward pass begins.

    A convolution, a batch norm, a GELU and a drop path keep their input, a ReLU its output, and a sum nothing.
    """
    channels = block.pw_conv_2.norm.weight.shape[0]
    width = block.pw_conv_1.norm.weight.shape[0]
    narrow = 2 + (block.drop_path.rate > 0)  # outputs of the first norm, the last convolution and the last norm
    if isinstance(block, RepLKBlock):
        # first convolution, its ReLU, each depthwise convolution, the ReLU of their sum
        wide = 4 if block.large_kernel.merged or block.large_kernel.small_kernel_conv is None else 5
    else:
        wide = 3  # first convolution, its norm, GELU
    return tuple(n * size ** 2 for n in (narrow * channels + wide * width, channels, channels + width))


def training_memory(config, cost, recompute=False, half=False, processes=1):
    """Peak memory of the tensors of one process, which is reached in a backward pass: see docs/dry_run.md.

    Args:
        config: settings.
        cost: result of `model_cost`.
        recompute: whether blocks are recomputed, as with MODEL.RECOMPUTE.
        half: whether the run computes in half precision.
        processes: number of processes of the run.
    Returns:
        {part: bytes} for weights, gradients, exchange (DataParallel's copy of the gradients), optimizer, EMA and
        activations (of one micro-batch, including its images).
    """
    weights = cost.parameters + cost.statistics
    masters = half and config.AMP_LEVEL == 'O2'
    states = OPTIMIZER_STATES[config.TRAIN.OPTIMIZER.NAME]
    kept = cost.recompute_activations if recompute else cost.activations
    images = config.DATA.BATCH_SIZE * max(1, config.TRAIN.AUG_SPLITS)
    pixels = 3 * config.DATA.IMAGE_SIZE ** 2
    gradients = (2 if masters else 4) * cost.parameters
    return {
        # with O1 autocast keeps a half-precision copy of each weight; with O2 the optimizer keeps a float32 one
        'weights': 4 * weights + (2 * cost.parameters if half else 0),
        'gradients': gradients + (4 * cost.parameters if masters else 0),  # with O2 in both types
        'exchange': gradients if processes > 1 else 0,
        'optimizer': 4 * states * cost.parameters,
        'EMA': 4 * weights if config.TRAIN.MODEL_EMA else 0,
        'activations': images * (kept * (2 if half else 4) + 4 * pixels),
    }
