"""One call of the eager model, operator by operator, under the names that its values have in the graph.

The exporter turns a traced kind of call into ONNX node by node, and both keep the names of values: what an operator of
PyTorch computes here is what the function of the standard graph calls by that name, where a fusion has left it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mmdit_deploy.graph.trace import export_kind
from mmdit_deploy.model import Kind

# What an operator made, by the name of its value; what comes back takes its place.
Tap = Callable[[fx.Node, Tensor], Tensor]
# An operator, its arguments as tensors; None lets it compute itself.
Replace = Callable[[fx.Node, Sequence[Any]], Tensor | None]


class Program:
    """A kind of call as operators of PyTorch, in fp32 whatever it was traced in.

    Args:
        kind: of call.
        dtype: the compute type that the graph is traced in: it says which operators, and which names, there are. They
            compute in fp32 all the same; casts to the compute type and fp16's clips do nothing.
    """

    def __init__(self, kind: Kind, dtype: torch.dtype):
        program, names = export_kind(kind, dtype)
        exported = program.exported_program
        if exported is None or exported.graph_signature.input_specs[0].kind.name != "USER_INPUT":
            raise ValueError(f"{kind.function} is a function of activations and weights alone")
        self.module = exported.graph_module
        self.dtype = dtype
        self._activations = [t.name for t in kind.inputs]
        self._weights = names
        with torch.device("meta"):
            self._buffers = dict(kind.build().named_buffers())  # made on the CPU
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        self.names = dict(zip([n.name for n in placeholders], [*self._activations, *names], strict=True))
        """What each placeholder stands for: an activation of the kind, or a parameter by its name in the module."""
        (output,) = (n for n in self.module.graph.nodes if n.op == "output")
        made = pytree.tree_leaves(output.args)
        self.outputs = dict(zip([n.name for n in made], [t.name for t in kind.outputs], strict=True))
        """The operators whose values leave the call, and what they are called there."""

    def run(
        self,
        activations: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        *,
        tap: Tap | None = None,
        replace: Replace | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the call.

        Args:
            activations: by name; computed with in fp32.
            weights: parameters in fp32, by name in the module.
            tap: gets each tensor that an operator makes, and gives what the others read.
            replace: may compute an operator in its place.

        Returns:
            The outputs of the kind, in order, fp32.
        """
        values = {**self._buffers, **weights, **activations}
        wide = [_wide(values[name]) for name in self.names.values()]
        with torch.inference_mode():
            out = _Interpreter(self.module, self.dtype, tap, replace).run(*wide)
        return tuple(pytree.tree_leaves(out))


_CLIPS = (torch.ops.aten.clamp.default, torch.ops.aten.clamp.Tensor)  # the exporter's decompositions make the second


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, tap: Tap | None, replace: Replace | None):
        super().__init__(module)
        self._dtype, self._tap, self._replace = dtype, tap, replace

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        made = self._replace(n, args) if self._replace is not None else None
        if made is None:
            if kwargs.get("dtype") == self._dtype:
                kwargs = {**kwargs, "dtype": torch.float32}
            clips = self._dtype == torch.float16 and n.target in _CLIPS
            made = args[0] if clips else self.call_function(n.target, args, kwargs)
        return self._tap(n, made) if self._tap is not None and isinstance(made, Tensor) else made


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
