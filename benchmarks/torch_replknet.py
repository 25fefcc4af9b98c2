"""RepLKNet in PyTorch for comparison: the parameter names and the computation of replknet.py, without its options."""
import torch
import torch.nn.functional as F
from torch import nn


class ConvBN(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, groups=1, relu=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class LargeKernel(nn.Module):
    def __init__(self, channels, kernel, small_kernel, merged):
        super().__init__()
        self.merged = merged
        if merged:
            self.large_kernel_reparam = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
            return
        self.large_kernel_origin = ConvBN(channels, channels, kernel, groups=channels)
        self.small_kernel_conv = ConvBN(channels, channels, small_kernel, groups=channels) if small_kernel else None

    def forward(self, x):
        if self.merged:
            return self.large_kernel_reparam(x)
        y = self.large_kernel_origin(x)
        return y if self.small_kernel_conv is None else y + self.small_kernel_conv(x)


class RepLKBlock(nn.Module):
    def __init__(self, channels, dw_channels, kernel, small_kernel, merged):
        super().__init__()
        self.pre_large_kernel_bn = nn.BatchNorm2d(channels)
        self.pw_conv_1 = ConvBN(channels, dw_channels, 1, relu=True)
        self.large_kernel = LargeKernel(dw_channels, kernel, small_kernel, merged)
        self.pw_conv_2 = ConvBN(dw_channels, channels, 1)

    def forward(self, x):
        y = F.relu(self.large_kernel(self.pw_conv_1(self.pre_large_kernel_bn(x))))
        return x + self.pw_conv_2(y)


class ConvFFN(nn.Module):
    def __init__(self, channels, hidden_channels):
        super().__init__()
        self.pre_ffn_bn = nn.BatchNorm2d(channels)
        self.pw_conv_1 = ConvBN(channels, hidden_channels, 1)
        self.pw_conv_2 = ConvBN(hidden_channels, channels, 1)

    def forward(self, x):
        return x + self.pw_conv_2(F.gelu(self.pw_conv_1(self.pre_ffn_bn(x))))


class RepLKNet(nn.Module):
    """Images [N, 3, H, W] -> logits [N, num_classes]; the arguments are those of replknet.RepLKNet."""

    def __init__(self, *, large_kernel_sizes, layers, channels, small_kernel, dw_ratio, ffn_ratio, num_classes, merged):
        super().__init__()
        width = channels[0]
        self.stem = nn.Sequential(ConvBN(3, width, 3, 2, relu=True), ConvBN(width, width, 3, groups=width, relu=True),
                                  ConvBN(width, width, 1, relu=True), ConvBN(width, width, 3, 2, width, relu=True))
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for pairs, channel, kernel in zip(layers, channels, large_kernel_sizes):
            if channel != width:
                self.transitions.append(nn.Sequential(ConvBN(width, channel, 1, relu=True),
                                                      ConvBN(channel, channel, 3, 2, channel, relu=True)))
            stage = nn.Module()
            stage.blocks = nn.Sequential(*(block for _ in range(pairs) for block in (
                RepLKBlock(channel, int(channel * dw_ratio), kernel, small_kernel, merged),
                ConvFFN(channel, int(channel * ffn_ratio)))))
            self.stages.append(stage)
            width = channel
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward_features(self, x):
        """The feature maps of the stages."""
        x, features = self.stem(x), []
        for index, stage in enumerate(self.stages):
            x = stage.blocks(x)
            features.append(x)
            if index < len(self.transitions):
                x = self.transitions[index](x)
        return features

    def forward(self, x):
        x = self.forward_features(x)[-1]
        return self.head(torch.mean(self.norm(x), (2, 3)))
