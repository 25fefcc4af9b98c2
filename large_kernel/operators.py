"""Python entry points of the C++ operators, for dygraph calls and for programs being traced."""
import paddle

_RUN = (paddle._C_ops if hasattr(paddle._C_ops, '_run_custom_op') else paddle.base.core.eager)._run_custom_op


def run(x, weight, bias, stride, input_grad, weight_grad):
    """The depthwise operator: arguments as in `depthwise_conv2d`, all float32 and on the CPU.

    Args:
        input_grad, weight_grad: which gradients the backward pass computes.
    """
    name = 'large_kernel_conv' if bias is None else 'large_kernel_conv_bias'
    tensors = _without_gradients([x, weight] if bias is None else [x, weight, bias])
    return _call(name, ('X', 'Filter', 'Bias'), tensors, ('stride', 'input_grad', 'weight_grad'),
                 [stride, input_grad, weight_grad])


def run_with_gradients(x, weight, bias, stride):
    """`run` in dygraph with gradients, for arguments that the C++ entry point has checked already."""
    if bias is None:
        return _RUN('large_kernel_conv', x, weight, stride, not x.stop_gradient, not weight.stop_gradient)[0]
    return _RUN('large_kernel_conv_bias', x, weight, bias, stride, not x.stop_gradient,
                not (weight.stop_gradient and bias.stop_gradient))[0]


def run_cuda(x, weight, bias):
    """The depthwise operator on a GPU, at stride 1. Not for tracing.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16.
        weight, bias: [C, 1, K, K] and [C] or None, of any of these dtypes.
    """
    input_grad = not x.stop_gradient
    weight_grad = not (weight.stop_gradient and (bias is None or bias.stop_gradient))
    if bias is None:
        return _RUN('large_kernel_cuda_conv', *_without_gradients([x, weight]), input_grad, weight_grad)[0]
    return _RUN('large_kernel_cuda_conv_bias', *_without_gradients([x, weight, bias]), input_grad, weight_grad)[0]


def run_cuda_gradients(x, weight, dy):
    """Gradients of x and weight of `run_cuda` without a bias, outside of autograd."""
    return _RUN('large_kernel_cuda_backward', x, weight, dy)[:2]


def run_fused(x, weight, bias, residual, in_norm, out_norm, attributes):
    """The operator behind `conv_block`.

    Args:
        in_norm, out_norm: weight, bias, mean and variance of a batch norm, or None.
        attributes: kernel, stride, activation, in_epsilon, out_epsilon, blocked, depthwise; see operator.cc.
    """
    # Paddle recognises optional and list inputs by these suffixes; it drops other missing inputs silently.
    return _call('fused_conv', ('X', 'Filter', 'Bias@OPTIONAL', 'Residual@OPTIONAL', 'InNorm@VECTOR@OPTIONAL',
                                'OutNorm@VECTOR@OPTIONAL'), [x, weight, bias, residual, in_norm, out_norm],
                 ('kernel', 'stride', 'activation', 'in_epsilon', 'out_epsilon', 'blocked', 'depthwise'), attributes)


def run_fused_sequence(x, parameters, kernels, strides, parts, residuals, activations, epsilons):
    """The operator behind `sequence.computed`; operator.cc describes the arguments."""
    return _call('fused_convs', ('X', 'Parameters@VECTOR'), [x, parameters],
                 ('kernels', 'strides', 'parts', 'residuals', 'activations', 'epsilons'),
                 [kernels, strides, parts, residuals, activations, epsilons])


def run_pointwise_bf16(x, weight):
    """A 1x1 convolution with products in bfloat16; all tensors are float32 and on the CPU. Not for tracing.

    Args:
        x: [N, C, H, W]; `weight`: [C_out, C, 1, 1].
    """
    grads = not x.stop_gradient, not weight.stop_gradient
    return _RUN('pointwise_bf16', *_without_gradients([x, weight]), *grads)[0]


def run_batch_norm(x, weight, bias, mean, variance, momentum, epsilon, activation):
    """The operator of a batch norm in training; it updates the running mean and variance. Not for tracing."""
    tensors = _without_gradients([x, weight, bias, mean, variance])
    return _RUN('batch_norm_act', *tensors, momentum, epsilon, activation)[0]


def run_dense(x, weight, stride, padding):
    """Paddle's own convolution without bias or groups; `F.conv2d` takes twice as long around it. Not for tracing."""
    return paddle._C_ops.conv2d(x, weight, stride, padding, 'EXPLICIT', [1, 1], 1, 'NCHW')


def _without_gradients(tensors):
    """The tensors detached under no_grad: Paddle's custom operators would otherwise keep them for a backward pass."""
    if not paddle.in_dynamic_mode() or paddle.is_grad_enabled():
        return tensors
    return [t if t.stop_gradient else t.detach() for t in tensors]


def _call(name, input_names, inputs, attribute_names, attributes):
    if paddle.in_dynamic_mode() or not isinstance(inputs[0], paddle.static.Variable):
        return _RUN(name, *inputs, *attributes)[0]
    from paddle.base.layer_helper import LayerHelper  # Paddle 2.6 traces into a program of operators
    helper = LayerHelper(name)
    y = helper.create_variable_for_type_inference(dtype=inputs[0].dtype)
    helper.append_op(type=name, inputs={k: v for k, v in zip(input_names, inputs) if v is not None}, outputs={'Out': y},
                     attrs=dict(zip(attribute_names, attributes)))
    return y
