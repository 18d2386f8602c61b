"""The problems of the ablation study: the same for every optimizer of a seed, and the ones they say they are."""

from __future__ import annotations

import itertools
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared.problems import PROBLEMS, autoencoder, common, data, images, language, recurrent, tabular
from examples.shared.task import Task
from hessopt import LeastSquares

every = pytest.mark.parametrize("name", PROBLEMS)
CPU = torch.device("cpu")


def write_images(folder: Path, name: str, shape: tuple[int, ...], train: int = 520, test: int = 30) -> dict[str, Any]:
    random = np.random.default_rng(0)
    found = {
        "x_train": random.integers(0, 256, (train, *shape), np.uint8),
        "y_train": (np.arange(train) % 10).astype(np.uint8),
        "x_test": random.integers(0, 256, (test, *shape), np.uint8),
        "y_test": (np.arange(test) % 10).astype(np.uint8),
    }
    np.savez(folder / f"{name}.npz", **found)
    return found


def write_table(folder: Path, name: str, features: int, split: bool, count: int = 60) -> None:
    (folder / "tabular").mkdir(exist_ok=True)
    random = np.random.default_rng(1)
    x = random.normal(3, 2, (count, features))
    more = {"test_mask": np.arange(count) % 10 == np.arange(20)[:, None] % 10} if split else {}
    np.savez(folder / "tabular" / f"{name}.npz", X=x, y=5 + x[:, 0] * x[:, 1], **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up data of every kind."""
    path = tmp_path_factory.mktemp("data")
    write_images(path, "mnist", (28, 28), train=2060)
    write_images(path, "cifar10", (32, 32, 3))
    for name, features in (("concrete", 8), ("energy", 8), ("yacht", 6)):
        write_table(path, name, features, split=True)
    write_table(path, "california_housing", 8, split=False, count=400)
    (path / "tinyshakespeare.txt").write_text("to be, or not to be\n" * 100)
    return path


def loss_of(task: Task, batch: Any) -> Tensor:
    found = task.evaluate_loss(batch)
    return found.loss if isinstance(found, LeastSquares) else found[0]


def flat(batch: Any) -> list[Tensor]:
    return [] if batch is None else [batch] if isinstance(batch, Tensor) else list(batch)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_names_families_and_sizes() -> None:
    assert all(name == problem.name for name, problem in PROBLEMS.items())
    # No two lists have a problem of the same name, of which the dictionary would keep one.
    modules = {problem.build.__module__ for problem in PROBLEMS.values()}
    assert len(PROBLEMS) == sum(len(sys.modules[module].PROBLEMS) for module in modules)
    families = {"classification", "autoencoder", "pinn", "tabular", "images", "language", "recurrent", "saddles"}
    assert {problem.family for problem in PROBLEMS.values()} == families
    small = [problem for problem in PROBLEMS.values() if problem.size == "small"]
    assert {problem.family for problem in small} == families - {"language"}
    assert all(not problem.needs_data and problem.seconds <= 3 for problem in small)
    assert all(2 <= problem.seconds <= 20 for problem in PROBLEMS.values())


@every
def test_a_seed_fixes_initialisation_and_batches_and_leaves_the_global_generator(name: str, folder: Path) -> None:
    problem = PROBLEMS[name]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = problem.build(3, CPU, folder)
    assert torch.equal(torch.get_rng_state(), before)
    sequence = [flat(batch) for batch in itertools.islice(first.batches, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    start = state(first.model)
    # An optimizer in between that draws random numbers and trains changes nothing for the next.
    torch.rand(7)
    loss_of(first, next(first.batches)).backward()
    torch.optim.SGD(first.model.parameters(), lr=0.1).step()
    second = problem.build(3, CPU, folder)
    assert same(state(second.model), start)
    for expected, batch in zip(sequence, second.batches, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(expected, flat(batch), strict=True))
    assert not same(state(first.model), start)
    assert not same(state(problem.build(4, CPU, folder).model), start)
    constant = all(torch.equal(a, b) for batch in sequence for a, b in zip(batch, sequence[0], strict=True))
    assert constant == first.full_batch
    if not first.full_batch:
        other = flat(next(problem.build(4, CPU, folder).batches))
        assert not all(torch.equal(a, b) for a, b in zip(other, sequence[0], strict=True))


@every
def test_measuring_leaves_no_trace(name: str, folder: Path, device: torch.device) -> None:
    task = PROBLEMS[name].build(0, device, folder)
    modules = list(task.model.modules())
    modules[-1].eval()
    modes = [module.training for module in modules]
    loss_of(task, next(task.batches)).backward()
    gradients = [p.grad.clone() for p in task.model.parameters() if p.grad is not None]
    before, random = state(task.model), torch.get_rng_state()
    found = task.measure()
    assert task.measure() == found
    assert [module.training for module in modules] == modes
    assert same(state(task.model), before)
    assert torch.equal(torch.get_rng_state(), random)
    after = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert len(gradients) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
    assert all(np.isfinite(value) for value in found.values())
    assert "objective" in found
    with_test_set = PROBLEMS[name].family not in ("pinn", "saddles")
    assert any(key.startswith("test_") for key in found) == with_test_set


@every
def test_a_few_steps_of_adamw_reduce_the_loss(name: str, folder: Path, device: torch.device) -> None:
    task = PROBLEMS[name].build(0, device, folder)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3, weight_decay=0.0)
    batch = next(task.batches)
    losses = []
    # Away from a saddle, first along it.
    for _ in range(200 if PROBLEMS[name].family == "saddles" else 8):
        optimizer.zero_grad()
        loss = loss_of(task, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]


@every
def test_loss_of_output_is_the_loss(name: str, folder: Path) -> None:
    task = PROBLEMS[name].build(0, CPU, folder)
    assert (task.loss_of_output is None) == (task.split is None)
    if task.loss_of_output is None or task.split is None:
        assert PROBLEMS[name].family in ("pinn", "autoencoder", "language", "saddles")
        return
    batch = next(task.batches)
    x, y = task.split(batch)
    # Batch-norm takes the statistics of the batch both times. 1e-6: one reduction in float32
    expected = task.loss_of_output(task.model(x), y).item()
    assert loss_of(task, batch).item() == pytest.approx(expected, rel=1e-6)


@every
def test_residuals_of_rows_are_those_of_the_whole_at_these_rows(name: str, folder: Path) -> None:
    """And the whole is that of the full batch, or, of mini-batches, of which all rows have the mean square."""
    task = PROBLEMS[name].build(0, CPU, folder)
    if task.residual_rows is None:
        assert PROBLEMS[name].family not in ("pinn", "tabular")
        assert task.strata == ()
        return
    count = sum(task.strata)
    found = task.residual_rows(torch.arange(count))
    precise = found.residuals.dtype == torch.float64
    # Rounding alone: products of other shapes are summed in another order.
    close = {"rtol": 1e-9, "atol": 1e-11} if precise else {"rtol": 1e-4, "atol": 1e-6}
    if task.full_batch:
        expected = task.evaluate_loss(next(task.batches))
        assert isinstance(expected, LeastSquares)
        torch.testing.assert_close(found.residuals, expected.residuals, **close)
    else:
        assert found.loss.item() == pytest.approx(task.measure()["objective"], rel=1e-9 if precise else 1e-5)
    ends = [sum(task.strata[:i]) for i in range(len(task.strata) + 1)]
    draw = torch.Generator().manual_seed(0)
    some = torch.randperm(count, generator=draw)[: count // 3].sort().values
    # Some of all conditions, the last one alone, both sides of every border, and a single row.
    borders = sorted({row for end in ends for row in (end - 1, end) if 0 <= row < count})
    for rows in (some, torch.arange(ends[-2], ends[-1]), torch.tensor(borders), torch.tensor([count - 1])):
        torch.testing.assert_close(task.residual_rows(rows).residuals, found.residuals[rows], **close)


@pytest.mark.parametrize("name", ["diabetes", "digits-tanh", "digits-autoencoder", "adding-20", "shakespeare"])
def test_objective_is_the_loss_on_the_measured_rows(name: str, folder: Path) -> None:
    task = PROBLEMS[name].build(0, CPU, folder)
    if name == "diabetes":
        x, y = next(task.batches)
        expected = (task.model(x) - y).square().mean()
    elif name == "adding-20":
        x, y = recurrent.sequences(500, 20, torch.Generator().manual_seed(2**40))
        expected = (task.model(x) - y).square().mean()
    elif name == "shakespeare":
        text, _ = data.characters(folder)
        train = text[:1800]
        x, y = language.windows(train, torch.linspace(0, 1735, 64).long())
        expected = F.nll_loss(torch.log_softmax(task.model(x), -1).reshape(-1, 9), y.reshape(-1))
    else:
        batches = list(itertools.islice(task.batches, {"digits-tanh": 11, "digits-autoencoder": 5}[name]))
        # An epoch but for the rows that are left out of it: as good as the means of 1408 and 1280 of 1437 rows.
        losses = [loss_of(task, batch).item() for batch in batches]
        assert task.measure()["objective"] == pytest.approx(float(np.mean(losses)), rel=1e-2)
        return
    assert task.measure()["objective"] == pytest.approx(expected.item(), rel=1e-6)


def test_an_epoch_has_every_row_once() -> None:
    x = torch.arange(10)
    batches = common.minibatches(x, -x, 3, seed=0)
    for _ in range(2):
        rows = [next(batches) for _ in range(3)]
        assert all(torch.equal(b, -a) for a, b in rows)
        assert len(set(torch.cat([a for a, _ in rows]).tolist())) == 9
    with pytest.raises(ValueError, match="11 is more than the 10"):
        common.minibatches(x, x, 11, seed=0)


def test_means_over_chunks_of_different_length() -> None:
    x = torch.arange(7.0)
    found = common.means(nn.Identity(), x, 2 * x, lambda z, y: {"mean": (z + y).mean()}, chunk=3)
    assert found == {"mean": pytest.approx(9.0, rel=1e-6)}


def test_standardised_tables() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(5, 3, (50, 3)), random.normal(-2, 4, 50)
    x[:, 2] = 7.0  # a feature that does not vary
    mask = np.arange(50) % 5 == 0
    (inputs, targets), (test_inputs, test_targets), scale = tabular.standardised(x, y, mask)
    assert inputs.shape == (40, 3)
    assert test_targets.shape == (10, 1)
    expected = torch.tensor([0.0, 0, 0], dtype=torch.float64)
    assert torch.allclose(inputs.mean(0), expected, atol=1e-13)
    assert torch.allclose(inputs.std(0, correction=0), torch.tensor([1.0, 1, 0], dtype=torch.float64), atol=1e-13)
    assert targets.square().mean().item() == pytest.approx(1, rel=1e-13)
    train_mean = y[~mask].mean()
    assert np.allclose(test_targets[:, 0].numpy() * scale + train_mean, y[mask], rtol=1e-13)
    shift, spread = x[~mask, :2].mean(0), x[~mask, :2].std(0)
    assert np.allclose(test_inputs[:, :2].numpy(), (x[mask, :2] - shift) / spread, rtol=1e-12)
    assert (test_inputs[:, 2] == 0).all()


def test_rmse_is_in_the_units_of_the_table(folder: Path) -> None:
    task = PROBLEMS["concrete"].build(0, CPU, folder)
    x, y, mask = data.tabular(folder, "concrete")
    assert mask is not None
    train = ~mask
    inputs = torch.from_numpy((x[mask] - x[train].mean(0)) / x[train].std(0))
    predicted = task.model(inputs).detach().squeeze(1).numpy() * y[train].std() + y[train].mean()
    expected = np.sqrt(np.mean((predicted - y[mask]) ** 2))
    assert task.measure()["test_rmse"] == pytest.approx(expected, rel=1e-12)


def test_adding_problem() -> None:
    x, y = recurrent.sequences(40, 21, torch.Generator().manual_seed(0))
    assert x.shape == (40, 21, 2)
    marks = x[..., 1]
    assert (marks[:, :10].sum(1) == 1).all()
    assert (marks[:, 10:].sum(1) == 1).all()
    for sequence, target in zip(x, y, strict=True):
        assert target.item() == pytest.approx(sum(a.item() for a, m in sequence if m == 1), rel=1e-6)
    _, many = recurrent.sequences(20_000, 4, torch.Generator().manual_seed(1))
    assert many.var().item() == pytest.approx(1 / 6, rel=0.05)  # five standard errors of a variance are 4 %


def test_lstm_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours = recurrent.LongShortTerm(2, 5).double()
    theirs = nn.LSTM(2, 5, batch_first=True, dtype=torch.float64)
    # Ours has its gates in the order input, forget, output, new; theirs in the order input, forget, new, output.
    order = torch.cat([torch.arange(10), torch.arange(15, 20), torch.arange(10, 15)])
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.weight[order])
        theirs.bias_ih_l0.copy_(ours.input.bias[order])
        theirs.weight_hh_l0.copy_(ours.recurrent.weight[order])
        theirs.bias_hh_l0.zero_()
    x = torch.randn(3, 7, 2, dtype=torch.float64)
    assert torch.allclose(ours(x), ours.head(theirs(x)[0][:, -1]), rtol=1e-12, atol=1e-14)
    assert ours.input.bias[5:10].mean() > 0.5


def test_tanh_rnn_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours = recurrent.Recurrent(2, 5).double()
    theirs = nn.RNN(2, 5, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.weight)
        theirs.bias_ih_l0.copy_(ours.input.bias)
        theirs.weight_hh_l0.copy_(ours.recurrent.weight)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(3, 7, 2, dtype=torch.float64)
    assert torch.allclose(ours(x), ours.head(theirs(x)[0][:, -1]), rtol=1e-12, atol=1e-14)
    gram = ours.recurrent.weight @ ours.recurrent.weight.mT
    assert torch.allclose(gram, torch.eye(5, dtype=torch.float64), atol=1e-6)  # made in float32


def test_windows_are_followed_by_the_next_characters() -> None:
    text = torch.arange(200)
    x, y = language.windows(text, torch.tensor([0, 135]))
    assert torch.equal(x, torch.stack([torch.arange(64), torch.arange(135, 199)]))
    assert torch.equal(y, x + 1)
    batches = language.random_windows(text[:66], 0, CPU)
    assert {int(next(batches)[0][0, 0]) for _ in range(20)} == {0, 1}  # both windows that fit, and no other


@pytest.mark.parametrize(("name", "norm"), [("cifar10-groupnorm", nn.GroupNorm), ("cifar10-batchnorm", nn.BatchNorm2d)])
def test_residual_cnn(name: str, norm: type[nn.Module], folder: Path) -> None:
    task = PROBLEMS[name].build(0, CPU, folder)
    kinds = {type(module) for module in task.model.modules()}
    assert norm in kinds
    assert ({nn.GroupNorm, nn.BatchNorm2d} - {norm}).isdisjoint(kinds)
    assert 1e5 < sum(p.numel() for p in task.model.parameters()) < 3e5
    block = images.Block(4, 8, 2, nn.BatchNorm2d).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    y = block.norm1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)).clamp(min=0)
    y = block.norm2(F.conv2d(y, block.conv2.weight, padding=1)) + F.conv2d(x, block.skip.weight, stride=2)
    assert torch.allclose(block(x), y.clamp(min=0), rtol=1e-12, atol=1e-13)


def test_augmented_images_are_windows_of_the_padded_ones_half_of_them_mirrored() -> None:
    x, y = torch.randn(200, 3, 8, 6), torch.arange(200)
    (found, labels), (again, _) = (next(images.cropped_and_flipped(iter([(x, y)]), seed=3)) for _ in range(2))
    assert torch.equal(found, again)
    assert torch.equal(labels, y)
    padded = F.pad(x, (images.SHIFT,) * 4)
    windows = padded.unfold(2, 8, 1).unfold(3, 6, 1)  # (N, C, shifts, shifts, 8, 6)
    plain, mirrored = ((windows == image[:, :, None, None]).all(dim=(1, 4, 5)) for image in (found, found.flip(3)))
    assert ((plain | mirrored).sum(dim=(1, 2)) == 1).all()
    assert 60 < mirrored.any(dim=1).any(dim=1).sum() < 140
    every = (plain | mirrored).any(dim=0)
    assert every.sum() > 60  # of the 81 shifts: 200 draws leave out seven or so


def test_autoencoder_has_a_linear_code_and_linear_outputs() -> None:
    linears = [(8, 6), (6, 5), (5, 2), (2, 5), (5, 6), (6, 8)]
    layers = list(autoencoder.autoencoder([8, 6, 5, 2]))
    assert [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)] == linears
    followed = [
        isinstance(b, nn.Tanh) for a, b in zip(layers, [*layers[1:], None], strict=True) if isinstance(a, nn.Linear)
    ]
    assert followed == [True, True, False, True, True, False]
    logits, pixels = torch.randn(3, 4), torch.rand(3, 4)
    p = torch.sigmoid(logits)
    expected = -(pixels * p.log() + (1 - pixels) * (1 - p).log()).sum() / 3
    assert autoencoder.BernoulliLoss()(logits, pixels).item() == pytest.approx(expected.item(), rel=1e-5)
    squared = ((p - pixels) ** 2).sum(1).mean().item()
    assert autoencoder.squared_error(logits, pixels)["squared_error"].item() == pytest.approx(squared, rel=1e-5)


# Data


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def test_mnist_in_both_layouts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = write_images(tmp_path / "a", "mnist", (28, 28))
    raw = tmp_path / "b" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind, prefix in (("train", "train"), ("test", "t10k")):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", found[f"x_{kind}"])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", found[f"y_{kind}"])
    packed, unpacked = (data.mnist(tmp_path / part, 100, 20) for part in "ab")
    assert all(torch.equal(a, b) for a, b in zip(packed, unpacked, strict=True))
    x, y, x_test, y_test = packed
    assert (x.shape, x_test.shape, y.dtype) == ((100, 784), (20, 784), torch.int64)
    assert np.array_equal((x * 255).round().numpy().astype(np.uint8).reshape(-1, 28, 28), found["x_train"][:100])
    assert torch.equal(y_test, torch.arange(20) % 10)
    assert data.mnist(tmp_path / "a", 100, 20)[0] is x  # shared by the runs of a process
    for part in "ab":
        pixels, digits = data.mnist_pixels(tmp_path / part, 50)
        assert np.array_equal(pixels.numpy(), found["x_train"][:50])
        assert torch.equal(digits, y[:50])
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="not an IDX file"):
        data.mnist(tmp_path / "b", 101, 20)


def test_cifar_in_both_layouts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = write_images(tmp_path / "a", "cifar10", (32, 32, 3), train=500)
    batches = tmp_path / "b" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for i in range(6):
        kind, rows = ("train", slice(100 * i, 100 * (i + 1))) if i < 5 else ("test", slice(None))
        pixels = found[f"x_{kind}"][rows].transpose(0, 3, 1, 2)
        content = {b"data": pixels.reshape(len(pixels), -1), b"labels": found[f"y_{kind}"][rows].tolist()}
        (batches / (f"data_batch_{i + 1}" if i < 5 else "test_batch")).write_bytes(pickle.dumps(content))
    packed, unpacked = (data.cifar10(tmp_path / part, 70, 20) for part in "ab")
    assert all(torch.equal(a, b) for a, b in zip(packed, unpacked, strict=True))
    x, y, x_test, _ = packed
    assert (x.shape, x_test.shape) == ((70, 3, 32, 32), (20, 3, 32, 32))
    pixels = found["x_train"][:70].astype(np.float64) / 255
    mean, deviation = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    expected = ((found["x_test"][:20] / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    assert np.allclose(x_test.numpy(), expected, atol=1e-4)  # float32, deviation with N - 1
    assert torch.equal(y, torch.arange(70) % 10)


def test_all_of_torchvisions_batches_are_read_that_are_needed(tmp_path: Path) -> None:
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    one = np.zeros((10_000, 3072), np.uint8)
    for i in (1, 2):
        content = {b"data": one + np.uint8(i), b"labels": [i] * 10_000}
        (batches / f"data_batch_{i}").write_bytes(pickle.dumps(content))
    (batches / "test_batch").write_bytes(pickle.dumps({b"data": one[:2], b"labels": [0, 0]}))
    _, y, *_ = data.cifar10(tmp_path, 10_001, 2)  # there is no third one, and no need for it
    assert y.bincount().tolist() == [0, 10_000, 1]


def test_slow_archives_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = {"a": np.arange(5), "b": np.ones((2, 2), np.uint8)}
    path = tmp_path / "slow.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for key, value in values.items():
            np.save(tmp_path / f"{key}.npy", value)
            archive.write(tmp_path / f"{key}.npy", f"{key}.npy")
    load = np.load

    def reload(file: Any, **options: Any) -> Any:
        assert Path(file) != path, "unpacked again"
        return load(file, **options)

    for _ in range(2):
        found = data.arrays(path, ("a", "b"))
        assert all(np.array_equal(found[key], value) for key, value in values.items())
        monkeypatch.setattr(np, "load", reload)
    (unpacked,) = (tmp_path / "cache" / "hessopt-ablation").iterdir()
    assert unpacked.name.startswith("slow-")


def test_quick_archives_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    np.savez_compressed(tmp_path / "quick.npz", a=np.arange(5))
    assert data.arrays(tmp_path / "quick.npz", ("a",))["a"].tolist() == [0, 1, 2, 3, 4]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if problem.needs_data])
def test_missing_data_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'{name}' needs real data: .*--data DIR"):
        PROBLEMS[name].build(0, CPU, None)
    with pytest.raises(FileNotFoundError, match=r"exist.*--data DIR"):
        PROBLEMS[name].build(0, CPU, tmp_path)


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if not problem.needs_data])
def test_other_problems_need_no_folder(name: str) -> None:
    assert PROBLEMS[name].build(0, CPU, None).full_batch == (
        PROBLEMS[name].family in ("pinn", "saddles") or name == "diabetes"
    )


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name.startswith("saddle-")])
def test_saddles_start_where_the_gradient_is_small(name: str) -> None:
    task = PROBLEMS[name].build(0, CPU, None)
    loss = loss_of(task, next(task.batches))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(task.model.parameters()))])
    assert gradient.norm() < 0.1 * loss
    assert loss.item() == pytest.approx(task.measure()["objective"], rel=1e-6)
