"""Quantises 1x1 convolutions of an ONNX file after training, with ONNX Runtime."""
import logging

from errors import UserError


def write_onnx_int8(source, path, layers, batches):
    """Quantises convolutions of a file that `onnx_graph.write_onnx` wrote: weights per channel, activations calibrated.

    Args:
        source: the float32 file.
        path: file to write.
        layers: names of the convolutions in the Paddle model.
        batches: arrays of images, float32 [N, 3, H, W], to calibrate on.
    Raises:
        UserError: the onnx or the onnxruntime package is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    except ImportError as error:
        package = (error.name or 'onnxruntime').split('.')[0]
        raise UserError(f'-format=onnx-int8 needs the package {package}: pip install onnx onnxruntime') from None

    class Reader(CalibrationDataReader):
        images = iter(batches)

        def get_next(self):
            batch = next(self.images, None)
            return None if batch is None else {'images': batch}

    weights = {f'{layer}.weight' for layer in layers}
    nodes = [node.name for node in onnx.load(source).graph.node if node.op_type == 'Conv' and node.input[1] in weights]
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing in these graphs
    try:
        quantize_static(source, path, Reader(), nodes_to_quantize=nodes, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    finally:
        logging.root.setLevel(level)
