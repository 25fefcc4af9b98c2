"""What a RepLKNet costs: parameters, multiply-accumulates and memory, counted from its layers without computing.

    cost = model_cost(config)
    memory = training_memory(config, cost)
"""
import math
from dataclasses import dataclass

import paddle

from replknet import RepLKBlock, build_replknet

# float32 values that an optimizer keeps for each parameter
OPTIMIZER_STATES = {'adamw': 2, 'nadam': 2, 'lamb': 2, 'lion': 1, 'momentum': 1, 'adan': 4, 'sgd': 0}


@dataclass(frozen=True)
class Cost:
    """Per image, in numbers of values; see `model_cost`."""
    parameters: int
    merged_parameters: int
    statistics: int
    macs: int
    merged_macs: int
    activations: int
    recompute_activations: int


def lazy_model(config, merged=False):
    """The model of the settings with parameters that have shapes but no values: no time and no memory."""
    with paddle.LazyGuard():
        return build_replknet(config, merged)


def model_cost(config):
    """Counts for one image of DATA.IMAGE_SIZE.

    Returns:
        Cost: trained parameters and multiply-accumulates of convolutions and head, in training form and merged;
        running statistics of batch norm; values that a forward pass keeps for the gradients, without and with
        recomputation.
    """
    size = config.DATA.IMAGE_SIZE
    model, merged = lazy_model(config), lazy_model(config, merged=True)
    macs, kept, recomputed = _walk(model, size)
    parameters = model.num_parameters()
    return Cost(parameters, merged.num_parameters(), sum(p.size for p in model.parameters()) - parameters, macs,
                _walk(merged, size)[0], kept, recomputed)


def _walk(model, size):
    """Multiply-accumulates, and values held for the gradients without and with recomputation."""
    macs = kept = inside = recomputed = 0

    def conv_bn_relu(layer, size):
        nonlocal macs, kept
        size = math.ceil(size / layer.conv._stride[0])
        macs += layer.conv.weight.size * size ** 2
        # batch norm keeps its input, the ReLU after it its output
        kept += 2 * layer.conv.weight.shape[0] * size ** 2
        return size

    for layer in model.stem:
        size = conv_bn_relu(layer, size)
    for s, stage in enumerate(model.stages):
        for block in stage.blocks:
            macs += sum(p.size for p in block.parameters() if p.ndim == 4) * size ** 2
            values, output, working = _kept_by_block(block, size)
            kept, inside = kept + values + output, inside + values
            # when a block is computed again, what later blocks kept is gone
            recomputed = max(recomputed, kept - inside + values + working)
        if s < len(model.transitions):
            for layer in model.transitions[s]:
                size = conv_bn_relu(layer, size)
    macs += model.head.weight.size
    return macs, kept, max(recomputed, kept - inside)


def _kept_by_block(block, size):
    """Values kept inside a block and by its output, and the gradients at hand when its backward pass begins.

    Convolution, batch norm, GELU and drop path keep their input, ReLU its output; a sum keeps nothing.
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
    """Bytes of tensors that one process holds when it holds most, in a backward pass: see docs/dry_run.md.

    Args:
        config: settings.
        cost: of `model_cost`.
        recompute: as MODEL.RECOMPUTE; `half`: mixed precision.
        processes: of the run.
    Returns:
        {what: bytes}: weights, gradients, exchange (DataParallel's copy of the gradients), optimizer, EMA, activations
        (of a micro-batch, its images among them).
    """
    weights = cost.parameters + cost.statistics
    masters = half and config.AMP_LEVEL == 'O2'
    states = OPTIMIZER_STATES[config.TRAIN.OPTIMIZER.NAME]
    kept = cost.recompute_activations if recompute else cost.activations
    images = config.DATA.BATCH_SIZE * max(1, config.TRAIN.AUG_SPLITS)
    pixels = 3 * config.DATA.IMAGE_SIZE ** 2
    gradients = (2 if masters else 4) * cost.parameters
    return {
        # under O1 autocast keeps a half copy of each weight, under O2 the optimizer a single one
        'weights': 4 * weights + (2 * cost.parameters if half else 0),
        'gradients': gradients,
        'exchange': gradients if processes > 1 else 0,
        'optimizer': 4 * states * cost.parameters,
        'EMA': 4 * weights if config.TRAIN.MODEL_EMA else 0,
        'activations': images * (kept * (2 if half else 4) + 4 * pixels),
    }
