"""What a killed training needs to go on and end with the same weights.

One safetensors file for the model and the optimiser's momentum, one JSON for the epoch and the
history, in a scratch folder named by the stage's key. The JSON is written last and names the
tensors' file and its hash, so neither half of a checkpoint nor a damaged one is taken for a whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from wsss_core.store import file_sha256, write_atomically

_STATE = "checkpoint.json"


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
) -> None:
    """Write the state after `len(history)` epochs and remove the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    epochs = len(history)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, momentum in _momenta(optimizer).items():
        tensors[f"momentum.{index}"] = momentum
    file = f"epoch-{epochs:04d}.safetensors"
    scratch = folder / f".{file}.tmp"
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch
    )
    with scratch.open("rb+") as handle:
        os.fsync(handle.fileno())
    state = {"file": file, "sha256": file_sha256(scratch), "history": history}
    scratch.replace(folder / file)
    write_atomically(folder / _STATE, json.dumps(state).encode())
    for old in folder.glob("epoch-*.safetensors"):
        if old.name != file:
            old.unlink()


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> list[dict[str, float]]:
    """Restore the last state into the model and, if given, the optimiser.

    Returns:
        The history of the finished epochs; [], and nothing restored, if there is no whole state.
    """
    try:
        state = json.loads((folder / _STATE).read_text())
        if file_sha256(folder / state["file"]) != state["sha256"]:
            return []
        tensors = load_file(folder / state["file"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError):
        return []
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    if optimizer is not None:
        momenta = {n: t for n, t in tensors.items() if n.startswith("momentum.")}
        _restore_momenta(optimizer, momenta)
    history: list[dict[str, float]] = state["history"]
    return history


def _restore_momenta(optimizer: torch.optim.Optimizer, momenta: dict[str, torch.Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in momenta.items():
        parameter = parameters[int(name.removeprefix("momentum."))]
        momentum = torch.empty_like(parameter).copy_(tensor)
        optimizer.state[parameter]["momentum_buffer"] = momentum


def _momenta(optimizer: torch.optim.Optimizer) -> dict[int, torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {}
    for index, parameter in enumerate(parameters):
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            found[index] = momentum
    return found
