"""Random networks as hypothesis strategies: any DAG, with merges, shared weights, dead ends, smooth or kinked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "gelu": nn.functional.gelu,
    "relu": torch.relu,
    "square": lambda x: 0.5 * x * x,
}


@dataclass(frozen=True)
class Vertex:
    """``activation(linear(merge(parents)))``; parent −1 is the input; ``shares`` names an earlier linear map."""

    parents: tuple[int, ...]
    merge: str
    activation: str
    width: int
    chosen: bool
    shares: int | None


@dataclass(frozen=True)
class Plan:
    vertices: tuple[Vertex, ...]
    input_width: int
    batch: int
    seed: int


class Merge(nn.Module):
    """A vertex of the DAG as a module: what a user's merge block looks like."""

    def __init__(self, vertex: Vertex, widths: list[int], linear: nn.Linear | None) -> None:
        super().__init__()
        self.kind, self.activation = vertex.merge, ACTIVATIONS[vertex.activation]
        joined = sum(widths) if vertex.merge == "cat" else min(widths)
        reuse = linear is not None and linear.in_features == joined and linear.out_features == vertex.width
        self.linear = linear if reuse else nn.Linear(joined, vertex.width)

    def forward(self, *parents: Tensor) -> Tensor:
        if self.kind == "cat":
            merged = torch.cat(parents, -1)
        else:
            width = min(p.shape[-1] for p in parents)
            first, *rest = (p[..., :width] for p in parents)
            merged = first
            for p in rest:
                merged = merged + p if self.kind == "sum" else merged * p
        return self.activation(self.linear(merged))


class DAG(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        widths = [vertex.width for vertex in plan.vertices]
        self.nodes = nn.ModuleList()
        for vertex in plan.vertices:
            incoming = [plan.input_width if p < 0 else widths[p] for p in vertex.parents]
            shared = self.nodes[vertex.shares].linear if vertex.shares is not None else None
            self.nodes.append(Merge(vertex, incoming, shared))

    def forward(self, x: Tensor) -> Tensor:
        values: list[Tensor] = []
        for vertex, node in zip(self.plan.vertices, self.nodes, strict=True):
            values.append(node(*(x if p < 0 else values[p] for p in vertex.parents)))
        return values[-1]


@st.composite
def plans(draw: st.DrawFn, most: int = 6) -> Plan:
    count = draw(st.integers(2, most))
    vertices = []
    for i in range(count):
        earlier = st.integers(-1, i - 1) if i == 0 else st.integers(max(-1, i - 4), i - 1)
        parents = tuple(sorted(set(draw(st.lists(earlier, min_size=1, max_size=3)))))
        if i == count - 1 and parents == (-1,):
            parents = (i - 1,)  # the output must depend on some node
        vertices.append(
            Vertex(
                parents=parents,
                merge=draw(st.sampled_from(["cat", "sum", "product"])),
                activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
                width=draw(st.integers(1, 4)),
                chosen=draw(st.booleans()) or i == count - 2,
                shares=draw(st.none() | st.integers(0, i - 1)) if i else None,
            )
        )
    return Plan(tuple(vertices), draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2**16)))


def build(plan: Plan) -> tuple[DAG, Tensor, list[str]]:
    """The network and a batch in float64, and the names of the chosen nodes."""
    generator = torch.Generator().manual_seed(plan.seed)
    model = DAG(plan).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    x = torch.randn(plan.batch, plan.input_width, generator=generator, dtype=torch.float64)
    chosen = [f"nodes.{i}" for i, vertex in enumerate(plan.vertices[:-1]) if vertex.chosen]
    return model, x, chosen
