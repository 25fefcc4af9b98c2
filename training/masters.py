"""Float32 master weights for AMP level O2, where a model's own weights are in half precision."""
import paddle


class MasterWeights:
    """Float32 weights and gradients that the optimizer works on in place of those in half precision.

    In half precision small updates round to nothing, and so do small gradients once they are divided by the loss scale.
    Paddle's multi-precision optimizers have masters too, but their gradients stay in half precision, and some lack
    kernels: Momentum of Paddle 2.6 has none for bfloat16.

    Args:
        model: whose weights `cast` changes.
        cast: callable(model) that casts weights to half precision in place; None for a model without such weights.
    Attributes:
        by_name: {structured name: float32 parameter} for each weight in half precision, with its value before the cast.
    """

    def __init__(self, model=None, cast=None):
        self.by_name, self._pairs = {}, []
        if cast is None:
            return
        weights = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()
                   if not parameter.stop_gradient}
        cast(model)
        for name, (parameter, value) in weights.items():
            if parameter.dtype != paddle.float32:
                master = paddle.create_parameter(parameter.shape, 'float32', name=f'{parameter.name}_fp32_master_0')
                master.set_value(value.astype('float32'))
                self.by_name[name] = master
                self._pairs.append((parameter, master))

    @paddle.no_grad()
    def take_gradients(self):
        """Moves the gradients of the half-precision weights to the master weights."""
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.astype('float32')
            parameter.clear_gradient()

    @paddle.no_grad()
    def update_model(self):
        """Rounds the master weights into the model's weights."""
        for parameter, master in self._pairs:
            paddle.assign(master.astype(parameter.dtype), output=parameter)

    def clear_gradients(self):
        """Frees the gradients of the master weights."""
        for _, master in self._pairs:
            master.clear_gradient(False)
