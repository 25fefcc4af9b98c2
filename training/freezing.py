"""Freezes the first layers of a model, for fine-tuning on few images."""
import itertools


def freeze(model, parts):
    """Freezes the first parts of a RepLKNet: the stem, then its stages, each with the transition before it.

    Their weights get no gradients. They are to be kept in evaluation mode while the rest of the model trains, which
    also keeps the statistics of their batch norms.

    Args:
        model: RepLKNet.
        parts: number of parts; 0 freezes nothing, 1 the stem, 2 also the first stage, and so on.
    Returns:
        tuple of the frozen layers.
    """
    stages = [[model.stages[0]], *([before, stage] for before, stage in zip(model.transitions, model.stages[1:]))]
    frozen = tuple(itertools.chain.from_iterable([[model.stem], *stages][:parts]))
    for layer in frozen:
        for parameter in layer.parameters():
            parameter.stop_gradient = True
    return frozen
