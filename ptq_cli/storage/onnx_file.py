"""model.onnx: a MatMulNBits node for each linear, its weights where they lie in model.safetensors.

The graph's input `<module>` is `[rows, in_features]`, its output `<module>.outputs`
`[rows, out_features]`, biases included. Initializers are ONNX's external data: file, offset and
length of tensors in the safetensors files beside it, so that nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.errors import FileError, import_extra
from ptq_cli.storage.checkpoint import StoredTensor, read_header
from ptq_cli.storage.files import write_file

NAME = "model.onnx"
_MAX_GRAPH = 2**31 - 1  # protobuf's


def library() -> Any:
    """The onnx library. Raises InputError that names the extra where it is not installed."""
    return import_extra("onnx", "--format onnx", "onnx")


def write_graph(out: Path, files: Sequence[str], layers: Mapping[str, Layer], fmt: Format) -> None:
    """Write model.onnx beside the weights files of `out`, then load it and compare."""
    onnx = library()
    stored = {t.spec.name: t for name in files for t in read_header(out / name).tensors}
    nodes, inputs, outputs, initializers = [], [], [], []
    for layer in layers.values():
        names = [spec.name for spec in fmt.specs(layer)]
        bias = f"{layer.module}.bias"
        own = [*names, bias] if bias in stored else names
        initializers += [_external(onnx, stored[name]) for name in own]
        nodes += _nodes(onnx, layer, names, bias if bias in stored else None, stored, fmt)
        kind = _kind(onnx, stored[names[1]])
        rows = f"{layer.module}.rows"
        info = onnx.helper.make_tensor_value_info
        inputs.append(info(layer.module, kind, [rows, layer.shape[1]]))
        outputs.append(info(f"{layer.module}.outputs", kind, [rows, layer.shape[0]]))
    graph = onnx.helper.make_graph(nodes, "linears", inputs, outputs, initializers)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=10, producer_name="ptq",
        producer_version=__version__,
    )  # fmt: skip
    data = model.SerializeToString(deterministic=True)
    if len(data) > _MAX_GRAPH:
        raise FileError(f"{out / NAME}: a graph of {len(data)} bytes is too large for ONNX")
    write_file(out / NAME, data)
    _verify(onnx, out, stored)


def _kind(onnx: Any, tensor: StoredTensor) -> int:
    words = {"U8": "UINT8", "F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "F64": "DOUBLE"}
    return int(onnx.TensorProto.DataType.Value(words[tensor.spec.dtype]))


def _external(onnx: Any, tensor: StoredTensor) -> Any:
    """An initializer that is a piece of a file."""
    kind = _kind(onnx, tensor)
    made = onnx.TensorProto(name=tensor.spec.name, data_type=kind, dims=tensor.spec.shape)
    made.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": tensor.file.name, "offset": tensor.offset, "length": tensor.spec.nbytes}
    for key, value in place.items():
        made.external_data.add(key=key, value=str(value))
    return made


def _nodes(
    onnx: Any,
    layer: Layer,
    names: Sequence[str],
    bias: str | None,
    stored: Mapping[str, StoredTensor],
    fmt: Format,
) -> list[Any]:
    """The linear, and its bias in the dtype of the product."""
    module, make = layer.module, onnx.helper.make_node
    result = f"{module}.outputs"
    product = result if bias is None else f"{module}.product"
    attributes = fmt.metadata([layer])[module]
    nodes = [
        make(
            "MatMulNBits", [module, *names], [product], name=module, domain="com.microsoft",
            **attributes,
        )
    ]  # fmt: skip
    if bias is not None:
        cast = f"{module}.bias.cast"
        kind = _kind(onnx, stored[names[1]])
        nodes.append(make("Cast", [bias], [cast], name=cast, to=kind))
        nodes.append(make("Add", [product, cast], [result], name=f"{module}.add"))
    return nodes


def _verify(onnx: Any, out: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Read the graph again: places and shapes must be those of the headers."""
    model = onnx.load(out / NAME, load_external_data=False)
    for tensor in model.graph.initializer:
        place, there = onnx.external_data_helper.ExternalDataInfo(tensor), stored[tensor.name]
        found = (place.location, place.offset, place.length, tuple(tensor.dims))
        if found != (there.file.name, there.offset, there.spec.nbytes, there.spec.shape):
            raise FileError(f"{out / NAME}: {tensor.name!r} does not lie where the graph says")
