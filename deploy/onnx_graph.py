"""Writes a RepLKNet as an ONNX graph of standard operators.

    write_onnx(fuse(model), 'model.onnx', (224, 224))

The opset is 17. GELU is written as its definition with Erf, a pattern that ONNX Runtime, OpenVINO and TensorRT
recognise and fuse.
"""
import math

from paddle import nn

from errors import UserError
from replknet import RepLKBlock

OPSET, IR_VERSION = 17, 8


def write_onnx(model, path, size=None):
    """Writes a classifier in eval mode; its input is `images` [N, 3, H, W], its output `logits` [N, num_classes].

    Args:
        model: float32 RepLKNet with a head, in training, merged or fused form.
        path: file to write.
        size: (H, W) in pixels; None leaves both free.
    Raises:
        UserError: the onnx package is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        raise UserError('writing an ONNX file needs the onnx package: pip install onnx') from None
    graph = _Graph(onnx, model)
    x = 'images'
    for layer in model.stem:
        x = graph.conv_bn(x, layer)
    for index, stage in enumerate(model.stages):
        for block in stage.blocks:
            x = graph.add(x, graph.rep_lk_branch(x, block) if isinstance(block, RepLKBlock) else
                          graph.ffn_branch(x, block))
        for layer in model.transitions[index] if index < len(model.transitions) else ():
            x = graph.conv_bn(x, layer)
    x = graph.node('Flatten', [graph.node('GlobalAveragePool', [graph.norm(x, model.norm)])])
    graph.node('Gemm', [x, *graph.parameters(model.head, 'weight', 'bias')], 'logits')
    shapes = {'images': ['N', model.in_channels, *(size or ('H', 'W'))],
              'logits': ['N', model.num_classes]}
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
                       for name, shape in shapes.items())
    onnx_model = helper.make_model(helper.make_graph(graph.nodes, 'replknet', inputs, outputs, graph.initializers),
                                   opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(onnx_model)
    onnx.save(onnx_model, path)


class _Graph:
    """Collects nodes and weights. Each method appends the nodes of one layer and returns the name of their output."""

    def __init__(self, onnx, model):
        self.onnx = onnx
        self.names = {layer: name for name, layer in model.named_sublayers()}
        self.nodes = []
        self.initializers = [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [], [value])
                             for name, value in (('half', 0.5), ('one', 1.0), ('sqrt2', math.sqrt(2)))]

    def node(self, kind, inputs, output=None, **attributes):
        output = output or f'{kind}_{len(self.nodes)}'
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def parameters(self, layer, *names):
        """Adds parameters of a layer; unlike the other methods, returns their names."""
        for name in names:
            array = getattr(layer, name).numpy()
            self.initializers.append(self.onnx.numpy_helper.from_array(array, f'{self.names[layer]}.{name}'))
        return [f'{self.names[layer]}.{name}' for name in names]

    def add(self, x, y):
        return self.node('Add', [x, y])

    def relu(self, x):
        return self.node('Relu', [x])

    def gelu(self, x):
        erf = self.node('Erf', [self.node('Div', [x, 'sqrt2'])])
        return self.node('Mul', [self.node('Mul', [x, self.add(erf, 'one')]), 'half'])

    def conv(self, x, layer):
        names = ['weight'] if layer.bias is None else ['weight', 'bias']
        return self.node('Conv', [x, *self.parameters(layer, *names)], kernel_shape=layer.weight.shape[2:],
                         strides=layer._stride, pads=[layer.weight.shape[-1] // 2] * 4, group=layer._groups)

    def norm(self, x, layer):
        if layer is None or isinstance(layer, nn.Identity):
            return x
        return self.node('BatchNormalization', [x, *self.parameters(layer, 'weight', 'bias', '_mean', '_variance')],
                         epsilon=layer._epsilon)

    def conv_bn(self, x, layer):
        x = self.norm(self.conv(x, layer.conv), layer.norm)
        return {'': lambda x: x, 'relu': self.relu, 'gelu': self.gelu}[layer.activation](x)

    def large_kernel(self, x, layer):
        if layer.merged:
            return self.relu(self.conv(x, layer.large_kernel_reparam))
        y = self.conv_bn(x, layer.large_kernel_origin)
        if layer.small_kernel_conv is not None:
            y = self.add(y, self.conv_bn(x, layer.small_kernel_conv))
        return self.relu(y)

    def rep_lk_branch(self, x, block):
        x = self.conv_bn(self.norm(x, block.pre_large_kernel_bn), block.pw_conv_1)
        return self.conv_bn(self.large_kernel(x, block.large_kernel), block.pw_conv_2)

    def ffn_branch(self, x, block):
        x = self.conv_bn(self.norm(x, block.pre_ffn_bn), block.pw_conv_1)
        return self.conv_bn(x, block.pw_conv_2)
