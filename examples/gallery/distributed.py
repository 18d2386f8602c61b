"""One network trained, measured and saved by several processes, with SpectralNewton under DistributedDataParallel.

    torchrun --nproc-per-node 2 -m examples.gallery.distributed [--epochs 8] [--out distributed]

Handwritten digits, divided between the processes; by NCCL where every process has a GPU, else by gloo on the CPU. What
is watched is the curvature on the batches of all processes. The optimizer's state goes to a folder, from which another
number of processes goes on: run it again with ``--resume``. Without ``torchrun`` it is one process, and the same.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import diagnostics
import hessopt

BATCH = 128
"""Samples a step, of all processes."""


def begin() -> tuple[int, int, torch.device]:
    """The rank of this process, how many there are, and its device."""
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return 0, 1, torch.device("cpu")
    local, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= count
    if gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if gpus else "gloo")
    return dist.get_rank(), dist.get_world_size(), torch.device("cuda", local) if gpus else torch.device("cpu")


def data(rank: int, size: int) -> tuple[DataLoader[tuple[torch.Tensor, ...]], torch.Tensor, torch.Tensor]:
    """Batches of this process, and what nobody trains on."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    trained = TensorDataset(x[:1408], y[:1408])
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(trained, size, rank, seed=0)
    return DataLoader(trained, max(1, BATCH // size), sampler=sampler, drop_last=True), x[1408:], y[1408:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--every", type=int, default=22, help="steps between measurements")
    parser.add_argument("--out", type=Path, default=Path("distributed"))
    parser.add_argument("--resume", action="store_true", help="go on from what was saved")
    options = parser.parse_args()
    rank, size, device = begin()
    torch.set_num_threads(max(1, torch.get_num_threads() // size))

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).to(device)
    model = DistributedDataParallel(network)
    optimizer = hessopt.SpectralNewton(model, loss="cross_entropy")
    monitor = diagnostics.Monitor(model, cross_entropy, every=options.every, metrics=("sharpness", "gn_gap"), probes=5)
    if options.resume:
        weights, state = get_state_dict(model, optimizer)
        load({"model": weights, "optimizer": state}, checkpoint_id=options.out)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    batches, x, y = data(rank, size)
    for epoch in range(options.epochs):
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for inputs, labels in batches:
            batch = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            found = monitor.step(batch)
            if rank == 0 and found is not None:
                shown = ", ".join(f"{name} {found.values[name]:.3g}" for name in ("sharpness", "gn_gap"))
                print(f"step {found.step}: loss of the first process {loss.item():.3g}; of all: {shown}")

    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state}, storage_writer=FileSystemWriter(options.out, overwrite=True))
    optimizer.eval()  # the network is the average of the iterates
    with torch.no_grad():
        accuracy = float((network(x.to(device)).argmax(1).cpu() == y).double().mean())
    if rank == 0:
        print(f"{size} process{'es' if size > 1 else ''}: {100 * accuracy:.1f} % of held-out digits are right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
