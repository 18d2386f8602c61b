"""The reproduction of the paper's tables: protocol, storage, verdicts, and what needs no data."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import diagnostics
from examples.studies.paper.comparison import TABLES, published_rows, within
from examples.studies.paper.experiments import EXPERIMENTS, Experiment
from examples.studies.paper.images import Data, generated, toy_regression
from examples.studies.paper.measurement import Batch, by_index, log_linear, squared_second_derivative
from examples.studies.paper.networks import (
    ACTIVATIONS,
    ConvolutionalNetwork,
    Diamond,
    ToyAttention,
    plain_mlp,
    residual_mlp,
)
from examples.studies.paper.run import crop_and_flip, measure, run
from examples.studies.paper.store import Store
from examples.studies.paper.tables import table
from examples.studies.paper.training import Schedule, train, train_alone

BRANCHES = ("R_within_A", "R_within_B", "R_cross_AB")


def quick(name: str, **variant: Any) -> Experiment:
    """The experiment with the variants that agree with what is given."""
    whole = EXPERIMENTS[name]
    kept = [v for v in whole.variants if all(v[key] == value for key, value in variant.items())]
    assert kept
    fields = {**vars(whole), "variants": kept}
    return Experiment(**fields)


def values(store: Store, quantity: str, **variant: Any) -> list[float]:
    return [
        row["value"]
        for row in store.rows
        if row["quantity"] == quantity and all(row["variant"][key] == value for key, value in variant.items())
    ]


def test_every_table_names_columns_of_its_file_and_variants_of_its_experiment() -> None:
    assert set(TABLES) == set(EXPERIMENTS)
    for name, tables in TABLES.items():
        for published in tables:
            assert set(published.variant) <= set(next(iter(published_rows(published))))
            assert set(published.variant) == set(EXPERIMENTS[name].variants[0])
            first = next(iter(published_rows(published)))
            assert all(f"{quantity}_mean" in first or quantity in BRANCHES for quantity in published.quantities)


@pytest.mark.parametrize(("activation", "published"), [("softplus", 0.122), ("silu", 0.225), ("gelu", 0.358)])
def test_gap_at_initialisation_is_the_published_one(activation: str, published: float, tmp_path: Path) -> None:
    """Table 5, init, within 15 %: on generated images whose measured labels are those of the test set."""
    store = Store(tmp_path / "results.jsonl")
    run(quick("exp3", activation=activation), (42, 43, 44), store)
    assert statistics.fmean(values(store, "gap_global")) == pytest.approx(published, rel=0.15)


def test_gap_of_relu_is_zero_and_its_second_derivative_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    run(quick("exp3", activation="relu"), (42,), store)
    assert max(values(store, "gap_global")) < 1e-6
    assert values(store, "sigma_pp_sq") == [0.0]


def test_jacobian_norms_at_initialisation_are_the_published_ones(tmp_path: Path) -> None:
    """Table 2, init, within 15 %."""
    store = Store(tmp_path / "results.jsonl")
    run(quick("exp1", L=8), (42, 43), store)
    assert statistics.fmean(values(store, "rho_max", arch="plain")) == pytest.approx(2.59, rel=0.15)
    assert statistics.fmean(values(store, "rho_max", arch="residual")) == pytest.approx(1.25, rel=0.15)
    # λ₁ < 0 at initialisation by QR only
    assert statistics.fmean(values(store, "lyapunov1", arch="plain")) < 0
    assert statistics.fmean(values(store, "lyapunov_eq8", arch="plain")) > 0


@pytest.mark.parametrize("name", sorted(set(EXPERIMENTS) - {"exp6", "exp2", "exp1_deep"}))
def test_experiment_runs_without_data(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    experiment = quick(name, **EXPERIMENTS[name].variants[0])
    run(experiment, (42,), store, epochs=0)
    assert {row["phase"] for row in store.rows} == {"init", "final"}  # final: the seconds of training
    compared = [table(name, published, store.rows) for published in TABLES[name]]
    assert any("within 2 σ" in text for text in compared)


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    experiment = quick("exp3", activation="gelu")
    run(experiment, (42,), Store(path))
    before = path.read_text()
    with path.open("a") as file:
        file.write('{"experiment": "exp3", "vari')  # cut off
    monkeypatch.setattr("examples.studies.paper.run.measure", lambda *_: pytest.fail("measured again"))
    run(experiment, (42,), Store(path))
    assert path.read_text() == before


def test_results_are_those_of_seeds_alone(tmp_path: Path) -> None:
    together, alone = Store(tmp_path / "a.jsonl"), Store(tmp_path / "b.jsonl")
    experiment = quick("exp5", model="attention")
    run(experiment, (42, 43), together, epochs=2)
    run(experiment, (43,), alone, epochs=2)
    wanted = {(r["phase"], r["quantity"]): r["value"] for r in alone.rows if r["quantity"] != "training_seconds"}
    found = {(r["phase"], r["quantity"]): r["value"] for r in together.rows if r["seed"] == 43}
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-7)


def test_training_together_is_training_one_by_one() -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(3)]
    data = []
    for _ in range(3):
        x, y = torch.randn(50, 5, dtype=torch.float64), torch.randint(3, (50,))
        data.append(Data(x, y, x, y, "random"))
    schedule, seeds = Schedule(epochs=4, lr=0.5, batch=16), (1, 2, 3)
    together = train(copy.deepcopy(networks), data, cross_entropy, schedule, seeds)
    for i, seed in enumerate(seeds):
        alone = train_alone(copy.deepcopy(networks[i]), data[i], cross_entropy, schedule, seed)
        for phase, network in alone.items():
            for p, q in zip(network.parameters(), together[phase][i].parameters(), strict=True):
                assert torch.allclose(p, q, rtol=1e-5, atol=1e-8)  # the clipping adds 1e-6 to the norm


def test_distances_by_index_are_means_over_pairs() -> None:
    network, data = plain_mlp(3, width=6, activation="gelu"), generated(4, 8)
    batch = Batch(data.x_test, data.y_test)
    graph = diagnostics.capture(
        network, batch.x, lambda z: cross_entropy(z, batch.y), nodes=list(reversed(network.nodes))
    )
    blocks = diagnostics.hessian_blocks(graph).mean()
    rows = {(r["quantity"], r["distance"]): r["value"] for r in by_index(diagnostics.metrics(blocks), network.nodes)}
    a, b, c = network.nodes
    expected = (blocks.total[a, b].norm() + blocks.total[b, c].norm()) / 2
    assert rows["R", 1] == pytest.approx(expected.item(), rel=1e-5)
    gap = blocks.tensor[a, c].norm() / blocks.gn[a, c].norm()
    assert rows["gap", 2] == pytest.approx(gap.item(), rel=1e-4)


@pytest.mark.parametrize(("activation", "exact"), [("relu", 0.0), ("softplus", None), ("gelu", None)])
def test_squared_second_derivative(activation: str, exact: float | None) -> None:
    """Against central differences at the pre-activations."""
    network = plain_mlp(1, width=4, activation=activation)
    x, seen = generated(1, 5).x, list[Tensor]()
    for module in (network.projection, network.blocks[0]):
        module.activation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double()))  # type: ignore[union-attr, operator]
    network(x)
    z, h = torch.cat([part.flatten() for part in seen]), 1e-4
    f = ACTIVATIONS[activation]()
    second = (f(z + h) - 2 * f(z) + f(z - h)) / h**2 if exact is None else torch.zeros_like(z)
    assert squared_second_derivative(network, x) == pytest.approx(second.square().mean().item(), rel=1e-4, abs=1e-12)


def test_tensor_part_of_a_diamond_needs_a_curved_merge(tmp_path: Path) -> None:
    """Table 6: between the branches of a sum it vanishes, also with SiLU."""
    store = Store(tmp_path / "results.jsonl")
    run(quick("exp4", k=1, activation="silu"), (42,), store)
    assert max(values(store, "gap", merge="sum")) < 1e-5
    assert min(values(store, "gap", merge="cat")) > 0.1


def test_bottleneck_bounds_the_rank_across_it(tmp_path: Path) -> None:
    network = plain_mlp(4, width=12, bottleneck=4, classes=10)
    data = generated(1, 16)
    rows = measure(EXPERIMENTS["exp2"], {"L": 4, "d_u": 4}, network, data, 0)
    assert 1 <= next(r["value"] for r in rows if r["quantity"] == "D_far") <= 4 + 1e-5


def test_skips_are_gone_from_the_plain_network() -> None:
    torch.manual_seed(0)
    network = ConvolutionalNetwork("silu", skips=False).eval()
    block = network.body.layer1[0]
    x = torch.randn(2, 64, 4, 4)
    y = block.relu(block.bn1(block.conv1(x)))
    assert torch.equal(block(x), block.relu(block.bn2(block.conv2(y))))


def test_residual_blocks_have_no_norm_and_are_scaled() -> None:
    network, x = residual_mlp(4, width=3), torch.randn(2, 3)
    block = network.blocks[0]
    assert torch.allclose(block(x), x + block.linear(x).relu() / 2)


def test_attention_is_the_formula() -> None:
    network, x = ToyAttention(4), torch.randn(2, 3, 4)
    q, k, v = (layer(x) for layer in (network.q, network.k, network.v))
    weights = (torch.einsum("bid,bjd->bij", q, k) / 2).softmax(-1)
    assert torch.allclose(network.mix(q, k, v), torch.einsum("bij,bjd->bid", weights, v), atol=1e-6)


def test_diamond_reads_both_branches() -> None:
    network, x = Diamond(2, "sum", "relu", width=4), generated(1, 3).x_test
    stem = network.stem(x.flatten(1))
    a, b = network.a[1](network.a[0](stem)), network.b[1](network.b[0](stem))
    assert torch.allclose(network(x), network.head((a + b) / 2**0.5))


def test_crops_are_parts_of_the_padded_image() -> None:
    x = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).reshape(2, 3, 32, 32) + 1
    seen = crop_and_flip(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for i in range(2):
        crops = [padded[i, :, t : t + 32, u : u + 32] for t in range(9) for u in range(9)]
        assert any(torch.equal(seen[i], c) or torch.equal(seen[i], c.flip(2)) for c in crops)


def test_toy_targets_are_standardised_by_the_training_set() -> None:
    data = toy_regression(3)
    assert data.y.mean().abs() < 1e-5
    assert data.y.std() == pytest.approx(1, abs=1e-5)
    assert data.x_test.shape == (512, 8, 16)


@pytest.mark.parametrize(
    ("ours", "spread", "expected"), [(1.0, 0.0, True), (1.19, 0.0, True), (1.21, 0.0, False), (1.25, 0.1, True)]
)
def test_verdict_is_two_standard_deviations_of_both(ours: float, spread: float, expected: bool) -> None:
    assert within(1.0, 0.1, ours, spread) is expected


def test_gaps_that_are_zero_to_rounding_agree() -> None:
    assert within(9e-8, 6e-9, 0.0, 0.0)
    assert not within(9e-8, 6e-9, 0.1, 0.0)


def test_log_linear_fit() -> None:
    slope, r2 = log_linear([2.0 * 0.5**i for i in range(6)])
    assert slope == pytest.approx(-0.6931471805599453)
    assert r2 == pytest.approx(1)


def test_store_keeps_rows_as_json(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "r.jsonl")
    key = {"experiment": "e", "variant": {"L": 8}, "seed": 1, "epochs": 0, "data": "none"}
    assert not store.has(key)
    rows = [
        {"phase": "init", "quantity": "R", "distance": 0, "value": 0.5},
        {"phase": "init", "quantity": "R", "distance": 11, "value": 1 / 3},
        {"phase": "final", "quantity": "rho", "distance": None, "value": 2.0},
    ]
    store.add(key, rows)
    assert store.has({**key})
    assert not store.has({**key, "epochs": 1})
    assert json.loads(store.path.read_text())["values"]["init"] == {"R": {"0": 0.5, "11": 0.333333}}
    expected = [{**key, **row, "value": pytest.approx(row["value"], rel=1e-5)} for row in rows]
    assert store.rows == Store(store.path).rows == expected
