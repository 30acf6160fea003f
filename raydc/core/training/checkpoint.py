"""Training state as safetensors and JSON: no pickle, and nothing that depends on the number of ranks."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = 3
"""Version of the names of tensors and values.

2: the best head of temi and icon is `last_best`, before `judged`. 3: `within`, how far an epoch has come."""


def save(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write `state.safetensors` and `state.json` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / "state.safetensors"
    )
    (folder / "state.json").write_text(json.dumps({"format": FORMAT} | values))


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save` wrote.

    Raises:
        ValueError: the files are damaged, or of another format.
    """
    try:
        # Read, not mapped: mapped tensors would change under our hands when the next checkpoint replaces the file.
        tensors = safetensors.torch.load((folder / "state.safetensors").read_bytes())
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (safetensors.SafetensorError, ValueError, RecursionError, FileNotFoundError) as error:
        raise ValueError(f"the last checkpoint is damaged ({type(error).__name__}: {error})") from None
    if (known := values.pop("format", 1)) != FORMAT:
        raise ValueError(
            f"the last checkpoint has format {known}, this version of raydc reads format {FORMAT}: go on with the "
            "version that wrote it, or fit again"
        )
    return tensors, values


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with `prefix.` before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix.`, without it."""
    return {n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix + ".")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as flat tensors, `<parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, slots in state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer of the same parameters the state that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, slot = name.partition(".")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
