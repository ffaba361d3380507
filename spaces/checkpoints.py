"""Checkpoints of a training: weights and AdamW's state, written whole or not at all."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.files import write_whole
from apportion.hashing import canonical_json, content_hash
from apportion.spaces.choice import Choice


@dataclass(frozen=True)
class Checkpoint:
    """A file, what it holds, and what it is of.

    Attributes:
        path: the file.
        model: its parameters and buffers are held.
        weights: the trained parameters by name.
        optimizer: AdamW over them; its state is held.
        identity: `model` and `settings`, as `identity_of` gives them.
    """

    path: Path
    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: Mapping[str, str]

    def write(self, step: int) -> None:
        """Write all after so many steps. Raises OSError where that fails."""
        held = {f"model/{name}": tensor for name, tensor in _tensors(self.model).items()}
        for name, parameter in self.weights.items():
            for key, tensor in self.optimizer.state[parameter].items():
                held[f"optimizer/{key}/{name}"] = tensor
        tensors = {name: tensor.detach().contiguous() for name, tensor in held.items()}
        write_whole(self.path, save(tensors, {**self.identity, "step": str(step)}))

    def read(self) -> int:
        """Take all that the file holds, if there is one; gives the number of steps done.

        Raises:
            InvalidInput: the file is no checkpoint, or one of another model or other settings.
        """
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file, torch.no_grad():
                metadata = file.metadata() or {}
                _refuse_another(self.path, metadata, self.identity)
                own = _tensors(self.model)
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    kind, _, rest = name.partition("/")
                    if kind == "model":
                        own[rest].copy_(file.get_tensor(name))
                    else:
                        self._take_state(rest, file.get_tensor(name))
        except SafetensorError as error:
            raise InvalidInput(f"{self.path} is no checkpoint: {error}; remove it") from error
        return int(metadata["step"])

    def _take_state(self, name: str, stored: Tensor) -> None:
        key, _, of = name.partition("/")
        weight = self.weights[of]
        # AdamW keeps its count of steps on the processor, the rest beside the weight
        place = stored if key == "step" else stored.to(weight.device)
        self.optimizer.state[weight][key] = place


def identity_of(
    model: nn.Module, choices: Mapping[str, Choice], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What a training is of; weights do not count.

    Args:
        model: the model.
        choices: path -> choice block, those that are trained.
        settings: what JSON can hold, by name.

    Returns:
        `model`, 32 hexadecimal digits of modules, shapes and alternatives, and `settings` as JSON.
    """
    modules = [[path, type(module).__name__] for path, module in model.named_modules()]
    tensors = [[name, str(t.dtype), list(t.shape)] for name, t in _tensors(model).items()]
    described = content_hash([modules, tensors, [[p, c.names] for p, c in choices.items()]])
    return {"model": described, "settings": canonical_json(settings)}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _refuse_another(path: Path, metadata: Mapping[str, str], identity: Mapping[str, str]) -> None:
    if not {"step", *identity} <= set(metadata):
        raise InvalidInput(f"{path} is a safetensors file, but no checkpoint of a super-net")
    if metadata["model"] != identity["model"]:
        raise InvalidInput(
            f"{path} is the checkpoint of another model: its modules, shapes or alternatives "
            "differ; name another file, or remove it to begin afresh"
        )
    before, now = json.loads(metadata["settings"]), json.loads(identity["settings"])
    changed = [
        f"{key} {before.get(key, 'none')} -> {now.get(key, 'none')}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise InvalidInput(
            f"{path} was trained with other settings ({', '.join(changed)}); give the same, name "
            "another file, or remove it to begin afresh"
        )
