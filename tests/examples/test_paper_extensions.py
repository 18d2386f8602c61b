"""DenseNet, U-Net, GPT, the labels of the measured batch, trained networks on disk, and every script without data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import diagnostics
from examples.studies.paper.experiments import EXPERIMENTS, Experiment, grid
from examples.studies.paper.extensions.architectures import ARCHITECTURES, characters, measure_sources
from examples.studies.paper.extensions.labels import LABELS
from examples.studies.paper.extensions.networks import ConvolutionalChain, Heads, SmallGPT, UNet
from examples.studies.paper.images import Data, generated
from examples.studies.paper.measurement import Batch
from examples.studies.paper.networks import Network, plain_mlp
from examples.studies.paper.run import GROUPS, main, only, run
from examples.studies.paper.store import Store
from examples.studies.paper.trained import Trained
from examples.studies.paper.training import Schedule

ROOT = Path(__file__).parents[2]


class Curved(Network):
    """Two layers and a product of both: three nodes whose sources are known."""

    nodes = ("first", "second")
    cuts = ("first", "second", "product")

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))
        self.product = Product()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        logits: Tensor = self.head(self.product(a, self.second(a)))
        return logits


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


def test_norms_and_shares_are_those_of_the_hessian_by_double_backpropagation() -> None:
    torch.manual_seed(0)
    network, x, y = Curved().double(), torch.randn(5, 3, dtype=torch.float64), torch.randint(3, (5,))
    rows = {r["quantity"]: r["value"] for r in measure_sources(network, Batch(x, y), cross_entropy, Curved.cuts)
            if r["distance"] is None}  # fmt: skip

    def loss(e: Tensor, f: Tensor) -> Tensor:
        a = network.first(x) + e
        b = network.second(a) + f
        return cross_entropy(network.head(a * b), y)

    zero = torch.zeros(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss, (zero, zero))
    norms = [[hessian[i][j].norm().item() for j in range(2)] for i in range(2)]
    assert rows["R first first"] == pytest.approx(norms[0][0], rel=1e-10)
    assert rows["R first second"] == pytest.approx(norms[0][1], rel=1e-10)
    assert rows["C first second"] == pytest.approx(norms[0][1] / (norms[0][0] * norms[1][1]) ** 0.5, rel=1e-10)
    shares = {name: value for name, value in rows.items() if name.startswith("share ") and "|" not in name}
    assert set(shares) == {"share second", "share product"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    graph = diagnostics.capture(network, x, lambda z: cross_entropy(z, y), nodes=list(Curved.cuts))
    table = diagnostics.curvature_sources(
        diagnostics.hessian_blocks(graph, [("first", "first"), ("first", "second")], by_source=True)
    )
    for source, share, ratio in zip(table.sources, table.share.tolist(), table.norm_ratio.tolist(), strict=True):
        assert rows.get(f"share {source}", 0) == pytest.approx(share, abs=1e-10)
        assert rows.get(f"ratio {source}", 0) == pytest.approx(ratio, abs=1e-10)
    assert rows["share product | first second"] == pytest.approx(1, abs=1e-12)  # tanh bends the first node alone
    assert "share second | first second" not in rows
    assert rows["share second | first first"] + rows["share product | first first"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("wiring", ["plain", "residual", "dense"])
def test_wirings(wiring: str) -> None:
    torch.manual_seed(0)
    network = ConvolutionalChain(wiring, depth=3, width=2)
    x = torch.randn(2, 3, 16, 16)
    a = network.stem(x)
    assert a.shape == (2, 2, 8, 8)
    b = network.layers[0](a)
    if wiring == "dense":
        c = network.layers[1](torch.cat([a, b], 1))
        last = torch.cat([a, b, c, network.layers[2](torch.cat([a, b, c], 1))], 1)
    elif wiring == "residual":
        c = network.layers[1](a + b)
        last = a + b + c + network.layers[2](a + b + c)
    else:
        last = network.layers[2](network.layers[1](b))
    assert torch.allclose(network(x), network.head(last.mean((2, 3))), atol=1e-6)
    graph = diagnostics.capture(network, x, lambda z: z.sum(), nodes=list(network.nodes))
    readers = sum("stem" in node.parents for node in graph.nodes)
    assert readers == {"plain": 1, "residual": 4, "dense": 4}[wiring]  # the output is one of them


@pytest.mark.parametrize("skips", [True, False])
def test_skips_of_the_unet(skips: bool) -> None:
    network, x = UNet(skips), torch.randn(2, 3, 16, 16)
    assert network(x).shape == x.shape
    graph = diagnostics.capture(network, x, lambda z: z.sum(), nodes=list(network.nodes))
    parents = {node.name: set(node.parents) for node in graph.nodes}
    below = {2: "bottom", 1: "decoder.2", 0: "decoder.1"}
    for i, lower in below.items():
        assert parents[f"decoder.{i}"] == ({lower, f"encoder.{i}"} if skips else {lower})


def test_heads_are_causal_attention() -> None:
    q, k, v = torch.randn(3, 2, 5, 6).double()
    split = [t.unflatten(-1, (3, 2)).transpose(1, 2) for t in (q, k, v)]
    expected = scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(2)
    assert torch.allclose(Heads(3)(q, k, v), expected, atol=1e-12)


def test_gpt_predicts_from_the_past_and_names_every_curved_node() -> None:
    torch.manual_seed(0)
    network, tokens = SmallGPT(depth=1, width=8, context=4, vocabulary=7), torch.randint(7, (2, 4))
    logits = network(tokens)
    assert logits.shape == (2, 7, 4)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 7
    assert torch.equal(network(changed)[:, :, :2], logits[:, :, :2])
    rows = measure_sources(network, Batch(tokens, tokens.roll(-1, 1)), cross_entropy, network.cuts)
    sources = {r["quantity"].split()[1] for r in rows if r["quantity"].startswith("ratio ")}
    assert sources == {"h.0.mix", "h.0.ln_2", "h.0.mlp", "ln_f"}
    assert next(r["value"] for r in rows if r["quantity"] == "gap h.0.q h.0.k") > 0


def test_targets_are_the_next_characters(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("abcdefgh" * 100)
    data = characters(tmp_path, 0)
    assert data.origin == "tinyshakespeare"
    for x, y in ((data.x, data.y), (data.x_test, data.y_test)):
        assert x.shape[1] == 16
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal((x + 1) % 8, y)
    assert len(data.x) + len(data.x_test) == (800 - 1) // 16


def test_gap_follows_the_labels(tmp_path: Path) -> None:
    """Three times and more between a batch of one class and a balanced one, on the same images and network."""
    store = Store(tmp_path / "labels.jsonl")
    run(replace(LABELS, variants=[{"activation": "silu"}]), (42,), store)
    found = {(r["quantity"], r["distance"]): r["value"] for r in store.rows}
    assert found["gap one class", None] > 3 * found["gap balanced", None]
    pairs = [(found["error drawn", i], found["gap drawn", i]) for i in range(10)]
    x, y = torch.tensor(pairs).T
    assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.95


def test_trained_networks_are_found_again_by_what_decides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        EXPERIMENTS["exp3"],
        variants=[{"activation": "silu"}],
        build=lambda v: plain_mlp(2, width=4, activation="silu", norm=False),
        load=lambda folder, seed: generated(64, 32),
    )
    first, second = Store(tmp_path / "a.jsonl"), Store(tmp_path / "b.jsonl")
    run(small, (1, 2), first, tmp_path, epochs=2, trained=tmp_path / "trained")
    monkeypatch.setattr("examples.studies.paper.run.train", lambda *_: pytest.fail("trained again"))
    run(replace(small, name="ablation_probes"), (1, 2), second, tmp_path, epochs=2, trained=tmp_path / "trained")
    kept = [[(r["phase"], r["quantity"], r["distance"], r["value"]) for r in s.rows if r["quantity"] != "seconds"]
            for s in (first, second)]  # fmt: skip
    assert kept[0] == kept[1]
    assert {phase for phase, *_ in kept[0]} == {"init", "mid", "final"}
    with pytest.raises(BaseException, match="trained again"):
        run(small, (1, 2), Store(tmp_path / "c.jsonl"), tmp_path, epochs=3, trained=tmp_path / "trained")


@pytest.mark.parametrize("change", ["seed", "values", "schedule", "structure"])
def test_other_networks_are_not_found(change: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, schedule, about = nn.Linear(2, 2), Schedule(epochs=1), {"seed": 1, "data": "d"}
    cache = Trained(tmp_path, [network], schedule, [about])
    cache.save({"init": [network], "final": [nn.Linear(2, 2)]}, 1.5)
    again, seconds = Trained(tmp_path, [network], schedule, [about]).load()
    assert set(again) == {"init", "final"}
    assert seconds == 1.5
    if change == "seed":
        about = {**about, "seed": 2}
    elif change == "schedule":
        schedule = Schedule(epochs=2)
    elif change == "values":
        network = nn.Linear(2, 2)
    else:
        network = nn.Sequential(network)
    assert Trained(tmp_path, [network], schedule, [about]).load() == ({}, 0.0)


def test_only_some_variants() -> None:
    (chosen,) = only([EXPERIMENTS["exp4"]], ["k=2", "merge=sum"])
    assert chosen.variants == grid(k=(2,), merge=("sum",), activation=("relu", "silu"))
    assert [e.name for e in only(tuple(ARCHITECTURES.values()), ["skips=True"])] == ["unet"]
    assert only([EXPERIMENTS["exp1"]], []) == [EXPERIMENTS["exp1"]]
    with pytest.raises(SystemExit, match="no variant has k=9"):
        only([EXPERIMENTS["exp4"]], ["k=9"])


def test_no_name_is_every_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def note(experiment: Experiment, seeds: Sequence[int], store: Store, *_: Any) -> None:
        ran.append((store.path.stem, experiment.name))

    monkeypatch.setattr("examples.studies.paper.run.run", note)
    command = ["--quick", "--out", str(tmp_path)]
    main(None, command)
    assert ran == [(name, experiment.name) for name, group in GROUPS.items() for experiment in group]
    assert {name for name, _ in ran} == {*EXPERIMENTS, "architectures", "labels"}
    ran.clear()
    main(None, ["architectures", *command])
    assert ran == [("architectures", name) for name in ("densenet", "unet", "gpt")]


def test_measured_batch_is_of_the_test_set() -> None:
    data: Data = generated(10, 20)
    assert not torch.equal(data.x[:10], data.x_test[:10])


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_script_runs_without_data(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.studies.paper", name, "--quick", "--seeds", "42", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"{name}.jsonl").exists()
    assert "seeds 42" in result.stdout
