"""A single block between two nodes as a linear operator."""

from __future__ import annotations

from torch import Tensor

from diagnostics.estimators.linear_operator import LinearOperator
from diagnostics.graph.graph import Graph, Part
from diagnostics.matrix_free.injections import Injections
from diagnostics.matrix_free.node_products import NodeProducts


class BlockOperator(LinearOperator):
    """The batch-mean block H[v,w], ``(d_v, d_w)``, or a part of it, as a linear operator, without forming it.

    ``BlockOperator(graph, v, w) @ x`` is ``hessian_blocks(graph).mean().total[v, w] @ x``: one injection x at w, shared
    by all samples, and the response at v, summed over them (averaged, for a summed loss). A product passes through the
    part of the network behind w and v twice, however large the block is. Symmetric where v is w.

    Products take the columns of a matrix together, in as many at a time as ``memory_limit`` allows. The adjoint is the
    block of (w, v).

    Args:
        graph: A captured network.
        v: Name of the node of the rows.
        w: Name of the node of the columns.
        part: ``"total"``, ``"gn"`` or ``"tensor"``.
        memory_limit: Bytes that the tangents of the columns multiplied at one time may take, by plan.

    Raises:
        KeyError: there is no such node.
        DiagnosticsError: a node has no second derivative, named in the message.
        StaleGraphError: a parameter changed since the capture; also when the operator is used.
    """

    def __init__(self, graph: Graph, v: str, w: str, part: Part = "total", *, memory_limit: int = 2**30) -> None:
        if part not in ("total", "gn", "tensor"):
            raise ValueError(f'part must be "total", "gn" or "tensor", got {part!r}.')
        self.graph, self.part, self.memory_limit = graph, part, memory_limit
        self.v, self.w = graph[v].name, graph[w].name
        self._injections = Injections(graph)
        shape = self._injections.size(v), self._injections.size(w)
        super().__init__(shape, graph.loss.dtype, graph.loss.device, symmetric=v == w)

    def matmat(self, vectors: Tensor) -> Tensor:
        """``H[v,w] X``, ``(d_w, k) -> (d_v, k)``."""
        return self._multiply(self.v, self.w, vectors)

    def adjoint_matmat(self, vectors: Tensor) -> Tensor:
        """``H[v,w]ᵀ X = H[w,v] X``, ``(d_v, k) -> (d_w, k)``."""
        return self._multiply(self.w, self.v, vectors)

    def _multiply(self, v: str, w: str, vectors: Tensor) -> Tensor:
        products = NodeProducts.of(self.graph)
        result = vectors.new_empty(self._injections.size(v), vectors.shape[1])
        chunk = products.columns_in(self.memory_limit)
        for start in range(0, vectors.shape[1], chunk):
            columns = slice(start, start + chunk)
            tangents = {w: self._injections.spread(w, vectors[:, columns].unsqueeze(0))}
            match self.part:
                case "total":
                    response = products.total(tangents, [v])
                case "gn":
                    response = products.gauss_newton(tangents, [v])
                case "tensor":
                    response, _ = products.tensor(tangents, [v])
            result[:, columns] = self._injections.gather(v, response[v])[0]
        return result
