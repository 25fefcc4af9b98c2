"""RepLKNet ("Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", arXiv 2203.06717).

    model = replknet_31b(num_classes=1000)          # or build_replknet(config)
    logits = model(images)                          # [N, 3, H, W] -> [N, num_classes], H and W from 32 up
    model.eval()
    model.structural_reparam()                      # merges the small kernels into the large ones, in place

    backbone = replknet_31b(num_classes=None, out_indices=(0, 1, 2, 3))
    features = backbone(images)                     # four maps at strides 4, 8, 16, 32
"""
import contextlib
import itertools

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from drop_path import DropPath, draw_masks
from large_kernel import DepthwiseConv2D, accepts_nchw16c, as_planes, computed, conv_block, map_layout, operator_in_use
from large_kernel.autotune import measuring_for_training
from large_kernel.conv_norm_act import NORMS
from large_kernel.cuda import autocast_dtype
from large_kernel.products import bf16_products, is_active

MIN_SIZE = 32  # pixels per side: the network's total stride


def _uniform(fan_in):
    """Initial values uniform in +-1/sqrt(fan_in): PyTorch's default, which the official code uses."""
    bound = fan_in ** -0.5
    return paddle.ParamAttr(initializer=nn.initializer.Uniform(-bound, bound))


def _batch_norm(channels):
    return nn.BatchNorm2D(channels, momentum=0.9, epsilon=1e-5)


@accepts_nchw16c()
class ConvBN(nn.Layer):
    """Convolution without bias, batch norm and an activation; padded so that stride 1 keeps the size.

    Args:
        in_channels, out_channels: equal for a depthwise convolution.
        kernel_size: odd.
        stride: 1 or 2.
        depthwise: one filter per channel instead of a dense convolution.
        activation: 'relu', 'gelu' or ''.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, depthwise=False, activation=''):
        super().__init__()
        if depthwise:
            self.conv = DepthwiseConv2D(in_channels, kernel_size, stride,
                                        weight_attr=_uniform(kernel_size ** 2), bias_attr=False)
        else:
            self.conv = nn.Conv2D(in_channels, out_channels, kernel_size, stride, kernel_size // 2,
                                  weight_attr=_uniform(in_channels * kernel_size ** 2), bias_attr=False)
        self.norm = _batch_norm(out_channels)
        self.activation = activation

    def forward(self, x, pre_norm=None, residual=None, to_blocks=False):
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)].

        Args:
            pre_norm: batch norm to apply to x first.
            residual: map of the result's shape to add at the end.
            to_blocks: whether the result may be in the NCHW16c layout where x is not, see `conv_block`.
        """
        return conv_block(x, self.conv, self.norm, self.activation, pre_norm, residual, to_blocks)


@accepts_nchw16c(may_defer=lambda layer: layer.merged)  # else the branches are added in Python
class ReparamLargeKernelConv(nn.Layer):
    """Large depthwise convolution with a parallel small one, and a ReLU; the two can be merged (section 3.3).

    Args:
        channels: input and output channels.
        large_kernel, small_kernel: odd sizes; `small_kernel` 0 for no parallel branch.
        merged: build the merged form, one convolution with a bias.
    """

    def __init__(self, channels, large_kernel, small_kernel, merged=False):
        super().__init__()
        if small_kernel > large_kernel:
            raise ValueError(f'small_kernel {small_kernel} is larger than large_kernel {large_kernel}; '
                             'it must fit inside')
        self.merged = merged
        if merged:
            self.large_kernel_reparam = _merged_conv(channels, large_kernel)
            return
        self.large_kernel_origin = ConvBN(channels, channels, large_kernel, depthwise=True)
        self.small_kernel_conv = ConvBN(channels, channels, small_kernel, depthwise=True) if small_kernel else None

    def forward(self, x):
        """[N, channels, H, W] -> the same shape."""
        if self.merged:
            return conv_block(x, self.large_kernel_reparam, activation='relu')
        y = self.large_kernel_origin(x)
        return F.relu(y if self.small_kernel_conv is None else y + self.small_kernel_conv(x))

    def merge(self):
        """Replaces the branches by one depthwise convolution with a bias that computes their eval-mode sum."""
        if self.merged:
            return
        weight, bias = _fold_batch_norm(self.large_kernel_origin)
        if self.small_kernel_conv is not None:
            small_weight, small_bias = _fold_batch_norm(self.small_kernel_conv)
            margin = (weight.shape[-1] - small_weight.shape[-1]) // 2
            weight += np.pad(small_weight, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
            bias += small_bias
        origin = self.large_kernel_origin.conv
        merged = _merged_conv(weight.shape[0], weight.shape[-1])
        merged.to(dtype=origin.weight.dtype)
        merged.weight.set_value(paddle.to_tensor(weight, dtype=origin.weight.dtype))
        merged.bias.set_value(paddle.to_tensor(bias, dtype=origin.weight.dtype))
        del self.large_kernel_origin, self.small_kernel_conv
        self.large_kernel_reparam = merged
        self.merged = True


def _merged_conv(channels, kernel_size):
    return DepthwiseConv2D(channels, kernel_size, weight_attr=_uniform(kernel_size ** 2),
                           bias_attr=_uniform(kernel_size ** 2))


def batch_norm_affine(norm):
    """(scale, shift), float64 arrays [C], of an eval-mode batch norm, which computes scale * x + shift."""
    gamma, beta, mean, variance = (as_float64(t) for t in (norm.weight, norm.bias, norm._mean, norm._variance))
    scale = gamma / np.sqrt(variance + norm._epsilon)
    return scale, beta - mean * scale


def _fold_batch_norm(conv_bn):
    """Weight and bias, in float64, of the convolution that equals the eval-mode convolution and batch norm."""
    scale, shift = batch_norm_affine(conv_bn.norm)
    return as_float64(conv_bn.conv.weight) * scale[:, None, None, None], shift


def as_float64(tensor):
    """A parameter of any precision as a float64 array; NumPy has no bfloat16."""
    return tensor.astype('float32').numpy().astype('float64')


@accepts_nchw16c()
class RepLKBlock(nn.Layer):
    """Residual block: BN, 1x1, large depthwise convolution, 1x1 (figure 2 of the paper).

    Args:
        channels: channels of the input and output.
        dw_channels: channels of the depthwise convolution.
        large_kernel, small_kernel, merged: as in `ReparamLargeKernelConv`.
        drop_path: rate of stochastic depth.
    """

    def __init__(self, channels, dw_channels, large_kernel, small_kernel, drop_path, merged=False):
        super().__init__()
        self.pre_large_kernel_bn = _batch_norm(channels)
        self.pw_conv_1 = ConvBN(channels, dw_channels, 1, activation='relu')
        self.large_kernel = ReparamLargeKernelConv(dw_channels, large_kernel, small_kernel, merged)
        self.pw_conv_2 = ConvBN(dw_channels, channels, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, mask=None):
        """[N, channels, H, W] -> the same shape; `mask` is that of `DropPath`."""
        y = self.large_kernel(self.pw_conv_1(x, self.pre_large_kernel_bn))
        return x + self.drop_path(self.pw_conv_2(y), mask) if self.training else self.pw_conv_2(y, residual=x)


@accepts_nchw16c()
class ConvFFN(nn.Layer):
    """Residual block: BN, 1x1 to `hidden_channels`, GELU, 1x1 back."""

    def __init__(self, channels, hidden_channels, drop_path):
        super().__init__()
        self.pre_ffn_bn = _batch_norm(channels)
        self.pw_conv_1 = ConvBN(channels, hidden_channels, 1, activation='gelu')
        self.pw_conv_2 = ConvBN(hidden_channels, channels, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, mask=None):
        """[N, channels, H, W] -> the same shape; `mask` is that of `DropPath`."""
        y = self.pw_conv_1(x, self.pre_ffn_bn)
        return x + self.drop_path(self.pw_conv_2(y), mask) if self.training else self.pw_conv_2(y, residual=x)


@accepts_nchw16c()
class RepLKNetStage(nn.Layer):
    """A stage: pairs of RepLKBlock and ConvFFN in one flat list, and optionally a norm for its feature map.

    Args:
        channels: channels of the stage.
        large_kernel, small_kernel, merged: as in `ReparamLargeKernelConv`.
        dw_ratio, ffn_ratio: widths of the depthwise convolution and of the ConvFFN relative to `channels`.
        drop_paths: rate of stochastic depth of each pair.
        norm: whether to build the norm, which the model applies to the feature map it returns.
        recompute: recompute the blocks' activations in the backward pass.
    """

    def __init__(self, channels, *, large_kernel, small_kernel, dw_ratio, ffn_ratio, drop_paths, norm, merged,
                 recompute):
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.LayerList()
        for rate in drop_paths:
            self.blocks.append(RepLKBlock(channels, int(channels * dw_ratio), large_kernel, small_kernel, rate, merged))
            self.blocks.append(ConvFFN(channels, int(channels * ffn_ratio), rate))
        if norm:
            self.norm = _batch_norm(channels)

    def forward(self, x):
        """[N, channels, H, W] -> the same shape; the norm is not applied."""
        if not self.training:
            for block in self.blocks:
                x = block(x)
            return x
        masks = [None] * len(self.blocks)
        if paddle.in_dynamic_mode():  # a traced batch may have any size
            masks = draw_masks([block.drop_path for block in self.blocks], x.shape[0])
        for block, mask in zip(self.blocks, masks):
            x = _recompute(block, x, mask) if self.recompute else block(x, mask)
        return x


def _recompute(block, x, mask):
    """`block(x, mask)`, with activations that are recomputed for the gradients instead of kept."""
    from paddle.distributed.fleet.utils import recompute

    passes = itertools.count()
    random_state = paddle.get_rng_state()
    seen = block.__dict__.setdefault('recomputed_kinds', set())
    kind = tuple(x.shape), x.dtype, autocast_dtype()
    if kind not in seen and not operator_in_use():  # then the convolutions may be measured
        with _as_in_first_pass(block, random_state), measuring_for_training(), paddle.no_grad():
            block(x, mask)
        seen.add(kind)

    products = is_active()

    def forward(x):
        with _as_in_first_pass(block, random_state) if next(passes) else contextlib.nullcontext():
            with bf16_products(products):
                return block(x, mask)

    # The reentrant kind runs a backward pass inside the backward pass, which DataParallel does not support, and Paddle
    # 2.6 cannot preserve the random state on the CPU.
    return recompute(forward, x, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def _as_in_first_pass(layer, random_state):
    """In a second pass, repeats the random draws of the first and does not update the running statistics again."""
    norms = [m for m in layer.sublayers() if isinstance(m, NORMS)]
    momenta = [norm._momentum for norm in norms]
    current = paddle.get_rng_state()
    paddle.set_rng_state(random_state)
    for norm in norms:
        norm._momentum = 1.0  # running = 1 * running + 0 * batch
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm._momentum = momentum
        paddle.set_rng_state(current)


class RepLKNet(nn.Layer):
    """RepLKNet for classification, or as a backbone.

    Args:
        large_kernel_sizes, layers, channels: one value per stage; `layers` counts pairs of RepLKBlock and ConvFFN.
        small_kernel: size of the parallel small depthwise kernel; 0 or None for none.
        dw_ratio, ffn_ratio: widths of the depthwise convolution and of the ConvFFN relative to the stage's.
        drop_path: stochastic-depth rate of the last pair; the rates rise linearly from 0.
        in_channels: channels of the images.
        num_classes: outputs of the head; None builds neither the final norm nor the head.
        out_indices: any subset of the stages, whose feature maps `forward` returns instead of logits; None for logits.
        norm_intermediate_features: apply a separate norm to each returned feature map (XL backbones).
        merged: build the re-parameterised form, for merged weights.
        recompute: recompute the blocks' activations in the backward pass: less memory, more time.
    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(self, large_kernel_sizes, layers, channels, small_kernel=5, dw_ratio=1.0, ffn_ratio=4.0,
                 drop_path=0.0, in_channels=3, num_classes=1000, out_indices=None, norm_intermediate_features=False,
                 merged=False, recompute=False):
        super().__init__()
        stages = len(layers)
        if not len(large_kernel_sizes) == len(channels) == stages:
            raise ValueError(f'large_kernel_sizes {list(large_kernel_sizes)}, layers {list(layers)} and channels '
                             f'{list(channels)} must have one value per stage')
        if out_indices is not None:
            out_indices = sorted(out_indices)
            if len(set(out_indices)) < len(out_indices) or not set(out_indices) <= set(range(stages)):
                raise ValueError(f'out_indices {out_indices} must be different stages out of 0 to {stages - 1}')
        self.in_channels, self.out_indices = in_channels, out_indices

        width = channels[0]
        self.stem = nn.LayerList([
            ConvBN(in_channels, width, 3, stride=2, activation='relu'),
            ConvBN(width, width, 3, depthwise=True, activation='relu'),
            ConvBN(width, width, 1, activation='relu'),
            ConvBN(width, width, 3, stride=2, depthwise=True, activation='relu')])
        rates = iter(np.linspace(0, drop_path, sum(layers)).tolist())
        self.stages = nn.LayerList([
            RepLKNetStage(channels[s], large_kernel=large_kernel_sizes[s], small_kernel=small_kernel or 0,
                          dw_ratio=dw_ratio, ffn_ratio=ffn_ratio, drop_paths=[next(rates) for _ in range(layers[s])],
                          norm=norm_intermediate_features and out_indices is not None and s in out_indices,
                          merged=merged, recompute=recompute)
            for s in range(stages)])
        self.transitions = nn.LayerList([
            nn.LayerList([ConvBN(channels[s], channels[s + 1], 1, activation='relu'),
                          ConvBN(channels[s + 1], channels[s + 1], 3, stride=2, depthwise=True, activation='relu')])
            for s in range(stages - 1)])
        self.num_classes = num_classes
        if num_classes is not None:
            self.norm = _batch_norm(channels[-1])
            self.head = nn.Linear(channels[-1], num_classes, weight_attr=_uniform(channels[-1]),
                                  bias_attr=_uniform(channels[-1]))

    def forward_features(self, x):
        """[N, in_channels, H, W] -> list of the stages' feature maps [N, channels[s], ~H / 2^(s+2), ~W / 2^(s+2)].

        They are the maps that the next stage takes, without the norms of `norm_intermediate_features`. Stages after
        the last one in `out_indices` are not computed.
        """
        return [as_planes(features, x.dtype) for features in self._features(x)]

    def _features(self, x):
        """As `forward_features`; the maps may be in the NCHW16c layout."""
        self._check_input(x)
        layout = map_layout(self, [self.stem, self.stages, self.transitions])
        x = layout.begin(x)
        for layer in self.stem:
            x = layer(x, to_blocks=layout.nchw16c)
        last = len(self.stages) - 1 if self.out_indices is None else max(self.out_indices, default=-1)
        features = []
        for s in range(last + 1):
            features.append(computed(self.stages[s](x)))
            if s < last:
                x = layout.begin(features[-1])
                for layer in self.transitions[s]:
                    x = layer(x)
        return features

    def forward(self, x):
        """Images [N, in_channels, H, W] to logits [N, num_classes].

        With `out_indices` the result is the list of those stages' feature maps, shallowest first; without a head, it
        is the last stage's feature map.
        """
        # a model may override `forward_features`; else its conversion to NCHW is skipped for maps that stay inside
        overridden = getattr(self.forward_features, '__func__', None) is not RepLKNet.forward_features
        features = self.forward_features(x) if overridden else self._features(x)
        if self.out_indices is not None:
            maps = {s: as_planes(features[s], x.dtype) for s in self.out_indices}
            return [self.stages[s].norm(x) if hasattr(self.stages[s], 'norm') else x for s, x in maps.items()]
        last = as_planes(features[-1], x.dtype)
        return last if self.num_classes is None else self.head(self.pool(last))

    def pool(self, x):
        """The last stage's feature map [N, C, H, W] -> the head's input [N, C]."""
        return self.norm(x).mean([2, 3])

    def num_parameters(self):
        """Number of trainable parameters; running statistics, which Paddle lists as parameters, are not counted."""
        return sum(p.size for p in self.parameters() if not p.stop_gradient)

    def structural_reparam(self):
        """Merges every small kernel and its batch norms into the large kernel, in place; eval-mode outputs stay the
        same."""
        for layer in self.sublayers():
            if isinstance(layer, ReparamLargeKernelConv):
                layer.merge()

    @paddle.jit.not_to_static  # translated to a graph, the sizes would become tensors
    def _check_input(self, x):
        channels = self.in_channels
        # dynamic sizes are -1 in a traced program
        if x.ndim != 4 or x.shape[1] not in (channels, -1) or any(0 <= side < MIN_SIZE for side in x.shape[2:]):
            raise ValueError(f'input of shape {list(x.shape)}; RepLKNet takes [N, {channels}, H, W] with H and W '
                             f'from {MIN_SIZE} up')


# Table 4 and section 4 of the paper; 13B is from the kernel-size ablation (table 5).
_BASE = {'layers': [2, 2, 18, 2], 'channels': [128, 256, 512, 1024], 'large_kernel_sizes': [31, 29, 27, 13]}
VARIANTS = {
    'replknet_31b': _BASE,
    'replknet_31l': {**_BASE, 'channels': [192, 384, 768, 1536]},
    'replknet_xl': {**_BASE, 'channels': [256, 512, 1024, 2048], 'large_kernel_sizes': [27, 27, 27, 13],
                    'dw_ratio': 1.5, 'small_kernel': 0},
    'replknet_13b': {**_BASE, 'large_kernel_sizes': [13, 13, 13, 13]},
}


def replknet_31b(**kwargs):
    """RepLKNet-31B: 79.9 M parameters in training form; arguments as in `RepLKNet`."""
    return RepLKNet(**{**VARIANTS['replknet_31b'], **kwargs})


def replknet_31l(**kwargs):
    """RepLKNet-31L: 172.7 M parameters in training form; arguments as in `RepLKNet`."""
    return RepLKNet(**{**VARIANTS['replknet_31l'], **kwargs})


def replknet_xl(**kwargs):
    """RepLKNet-XL: 335.4 M parameters; arguments as in `RepLKNet`."""
    return RepLKNet(**{**VARIANTS['replknet_xl'], **kwargs})


def replknet_13b(**kwargs):
    """RepLKNet-13B, the ablation with 13x13 kernels throughout; arguments as in `RepLKNet`."""
    return RepLKNet(**{**VARIANTS['replknet_13b'], **kwargs})


def build_replknet(config, merged=False):
    """The model of the settings `config.MODEL` (see config.py); `merged` builds the re-parameterised form."""
    model = config.MODEL
    return RepLKNet(large_kernel_sizes=model.LARGE_KERNEL_SIZES, layers=model.LAYERS, channels=model.CHANNELS,
                    small_kernel=model.SMALL_KERNEL, dw_ratio=model.DW_RATIO, ffn_ratio=model.FFN_RATIO,
                    drop_path=model.DROPPATH, num_classes=model.NUM_CLASSES, merged=merged,
                    recompute=model.RECOMPUTE)
