"""A frozen network that comes as an ONNX graph, run by onnxruntime: the outputs of its named layers for a batch.

It runs on the CPU, also beside a GPU: the detectors that come so take less time than moving their outputs would save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from acw.storage.errors import UserError

if TYPE_CHECKING:
    import torch

# Under which name a weights file, and a finished model, keep the graph: its bytes, as a tensor.
GRAPH = "graph"
# px, a side of the input by which a loaded graph is tried out; a multiple of what detectors ask for.
PROBE = 128


class OnnxNetwork:
    """A graph of which some layers' outputs are read.

    graph: the model's bytes, whose inputs take any size (`readable`). channels: of each output. strides: input px per
    cell of each output. A copy, as Ray makes it for another process, starts a session of its own.
    """

    def __init__(self, graph: bytes, outputs: Sequence[str]) -> None:
        import torch

        self.graph, self.outputs = graph, list(outputs)
        self._start()
        probe = self(torch.zeros(1, 3, PROBE, PROBE))
        self.channels = [output.shape[3] for output in probe]
        self.strides = [PROBE / output.shape[1] for output in probe]

    def _start(self) -> None:
        import torch

        onnxruntime = _library("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Images come in many sizes, and an arena would keep the memory of each.
        options.enable_cpu_mem_arena = False
        try:
            self._session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
            (self._input,) = (entry.name for entry in self._session.get_inputs())
        except Exception as error:  # of onnxruntime's, which have no class in common
            raise UserError(f"an ONNX graph of {', '.join(self.outputs)} cannot be loaded ({_line(error)})") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()

    def __call__(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """One float32 tensor (B, h_t, w_t, C_t) a layer, contiguous, on the CPU, for inputs (B, 3, h, w)."""
        import torch

        # One image at a time: a result then never depends on which images it was computed with.
        single = [image.contiguous().numpy() for image in inputs.cpu().split(1)]
        try:
            images = [self._session.run(self.outputs, {self._input: image}) for image in single]
        except Exception as error:
            raise UserError(f"an ONNX graph of {', '.join(self.outputs)} does not run ({_line(error)})") from error
        layers = (torch.cat([torch.from_numpy(output) for output in outputs]) for outputs in zip(*images, strict=True))
        return [layer.permute(0, 2, 3, 1).contiguous() for layer in layers]


def readable(content: bytes, source: str, outputs: Sequence[str]) -> bytes:
    """The graph with those layers' outputs as its own, and an input of any size.

    source: where it is from, for errors. Raises UserError for what is no such graph.
    """
    onnx, model = _library("onnx"), parsed(content, source)
    produced = {name for node in model.graph.node for name in node.output}
    if lacking := [name for name in outputs if name not in produced]:
        raise UserError(f"{source}: has no layer {', '.join(lacking)}; give the graph that the table of networks names")
    stored = {tensor.name for tensor in model.graph.initializer}
    for entry in model.graph.input:
        if entry.name not in stored:
            for axis, dimension in enumerate(entry.type.tensor_type.shape.dim):
                if axis != 1:
                    dimension.dim_param = f"axis{axis}"
    del model.graph.output[:]
    float32 = onnx.TensorProto.FLOAT
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, float32, None) for name in outputs)
    return model.SerializeToString()


def parsed(content: bytes, source: str) -> Any:
    """The model of a file's bytes. Raises UserError for what is none, or asks for other files than itself.

    A stranger's could name any file of this machine as the place of its weights.
    """
    onnx = _library("onnx")
    try:
        model = onnx.load_from_string(content)
        waiting = [model.graph]
    except Exception as error:  # of protobuf's, which have no class in common
        raise UserError(f"{source}: is no ONNX graph; give the file as it was published") from error
    while waiting:
        graph = waiting.pop()
        inner = [attribute for node in graph.node for attribute in node.attribute]
        tensors = [*graph.initializer, *(a.t for a in inner), *(tensor for a in inner for tensor in a.tensors)]
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
            raise UserError(f"{source}: keeps weights in another file; give a graph that has all of its own")
        waiting += [a.g for a in inner if a.HasField("g")] + [graph for a in inner for graph in a.graphs]
    return model


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def tensors_of(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """The graph's weights by name, as a state dict.

    A linear layer's, which an export from PyTorch leaves transposed and under a number, is named after its bias.
    """
    import torch

    onnx, graph = _library("onnx"), parsed(content, source).graph
    tensors = {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.endswith(".bias") and name in tensors), None)
        product = next((name for name in node.input if name in products), None)
        if bias and product:
            tensors[bias.removesuffix("bias") + "weight"] = tensors.pop(products[product]).T.contiguous()
    return tensors


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"{name} is not installed, which networks in ONNX need; run: pip install {name}") from None
