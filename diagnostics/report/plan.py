"""Whether a network is diagnosed exactly or by estimates, and at which nodes: by its size, and with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from diagnostics.blocks.cost import predict_cost
from diagnostics.blocks.layout import Layout
from diagnostics.blocks.memory_plan import planned_bytes
from diagnostics.errors import MemoryBudgetError
from diagnostics.graph.graph import Graph

MOST_OPERATIONS = 20_000_000_000
"""Multiplications up to which blocks are computed exactly: some seconds of one core."""
MOST_NODES = 12
"""Nodes of an estimate that were not asked for: there are as many products as nodes times probes."""
STAGES_ABOVE = 6
"""Number of layers from which an estimate takes the stages that hold them."""


@dataclass(frozen=True)
class Plan:
    """How the blocks between nodes are found.

    Attributes:
        exact: Blocks themselves, or estimates from products.
        reason: Why, in words.
        bytes: Memory that exact blocks take, by plan.
        operations: Multiplications that exact blocks and their eigenvalues take, by plan.
    """

    exact: bool
    reason: str
    bytes: int
    operations: int


def choose(graph: Graph, exact: bool | None, memory_limit: int) -> Plan:
    """Exact where blocks fit into the memory and take at most :data:`MOST_OPERATIONS`.

    Args:
        graph: The network.
        exact: None: by size. True or False: as asked for.
        memory_limit: Bytes.

    Raises:
        MemoryBudgetError: ``exact=True``, and blocks do not fit.
    """
    layout = Layout.of(graph)
    needed = planned_bytes(graph, layout, by_source=True)
    means = layout.mean()
    entries = sum(means.sizes[name] for name in graph.chosen)
    sources = len(graph)
    needed += (sources + 6) * entries**2 * graph.loss.element_size()
    operations = predict_cost(graph).total + (10 + 3 * sources) * entries**3
    size = f"{_bytes(needed)} and {operations:.2g} multiplications"
    limits = f"{_bytes(memory_limit)} and {MOST_OPERATIONS:.2g} multiplications"
    if exact is None:
        fits = needed <= memory_limit and operations <= MOST_OPERATIONS
        verb = "fit into" if fits else "exceed"
        return Plan(fits, f"exact blocks would take {size}, which {verb} {limits}", needed, operations)
    if exact and needed > memory_limit:
        raise MemoryBudgetError(
            f"exact blocks of {len(graph.chosen)} nodes take {_bytes(needed)}, more than the limit of "
            f"{_bytes(memory_limit)}. Use exact=None, fewer nodes, a smaller batch or a larger memory_limit."
        )
    return Plan(exact, f"asked for; exact blocks would take {size}", needed, operations)


def coarser(model: nn.Module, graph: Graph) -> tuple[list[str], str] | None:
    """Fewer nodes than the layers of ``graph``, and how they were chosen; None where these are few already.

    More than :data:`STAGES_ABOVE` layers are replaced by the children of the model that hold them, where these are
    ``Sequential`` and at least three. Of more than :data:`MOST_NODES` nodes, as many are kept, evenly spaced.
    """
    modules = list(dict.fromkeys(name.partition("@")[0].partition("[")[0] for name in graph.chosen))
    if len(modules) <= STAGES_ABOVE:
        return None
    stages = list(dict.fromkeys(_stage(model, name) for name in modules))
    how = f"the {len(stages)} stages that hold the {len(modules)} layers"
    if not 3 <= len(stages) < len(modules):
        stages, how = modules, f"{len(modules)} layers"
    if len(stages) > MOST_NODES:
        steps = [round(i * (len(stages) - 1) / (MOST_NODES - 1)) for i in range(MOST_NODES)]
        return [stages[i] for i in steps], f"{MOST_NODES} of {how}, evenly spaced"
    return None if stages is modules else (stages, how)


def _stage(model: nn.Module, name: str) -> str:
    top = name.partition(".")[0]
    return top if type(model.get_submodule(top)).forward is nn.Sequential.forward else name


def _bytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**28 else f"{count / 2**20:.3g} MiB"
