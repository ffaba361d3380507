"""What latency means: a stated piece of work, and how a model is made to do it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from apportion.errors import InvalidInput
from apportion.spaces.batches import Batch, call

PHASES = ("prefill", "decode", "forward")
TOKEN_SEED = 0


@dataclass(frozen=True)
class RequestItem:
    """One piece of work and how often a request does it.

    Args:
        phase: "prefill": `tokens` tokens at once, no cache; "decode": one token after `context`
            cached ones; "forward": one call on the study's own sample.
        batch: sequences (or images) at once.
        tokens: of a prefill.
        context: cached tokens of a decode step.
        count: how often.

    Raises:
        InvalidInput: parts that do not fit each other.
    """

    phase: str
    batch: int = 1
    tokens: int | None = None
    context: int | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise InvalidInput(f'request: phase "{self.phase}" is unknown; {", ".join(PHASES)}')
        wanted = {"prefill": "tokens", "decode": "context"}.get(self.phase)
        for name in ("tokens", "context"):
            if name != wanted and getattr(self, name) is not None:
                raise InvalidInput(f"request: {self.phase} takes no {name}")
        for name in ("batch", "count", *([wanted] if wanted else [])):
            if (getattr(self, name) or 0) < 1:
                raise InvalidInput(f"request: {self.phase} needs {name}, at least 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises InvalidInput on keys it does not know."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise InvalidInput(f'request: unknown key "{unknown[0]}"; known: {", ".join(known)}')
        return cls(**value)


def runner(model: nn.Module, item: RequestItem, sample: Batch) -> Callable[[], object]:
    """A callable that does the item's work once (`count` is not applied).

    A decode step leaves the cache as it found it; filling it is done here, once.

    Args:
        model: runs it.
        item: the work.
        sample: a batch of the study's data; only "forward" uses it.

    Raises:
        InvalidInput: a language model's phase for a model that is none.
    """
    if item.phase == "forward":
        batch = resized(sample, item.batch)
        return lambda: _run(model, batch)
    generator = torch.Generator().manual_seed(TOKEN_SEED)
    length = item.tokens if item.phase == "prefill" else item.context
    size = (item.batch, length or 1)
    ids = torch.randint(_vocabulary(model, item), size, generator=generator)
    if item.phase == "prefill":
        return lambda: _run(model, {"input_ids": ids}, use_cache=False)
    return _decode_step(model, ids)


def resized(sample: Batch, batch: int) -> Batch:
    """The sample repeated and cut along its first dimension to `batch` entries."""
    if isinstance(sample, Tensor):
        if sample.ndim == 0 or not len(sample):
            return sample
        repeats = -(-batch // len(sample))
        return torch.cat([sample] * repeats)[:batch]
    if isinstance(sample, dict):
        return {name: _tensor(resized(value, batch)) for name, value in sample.items()}
    return tuple(_tensor(resized(value, batch)) for value in sample)


def _tensor(value: Batch) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidInput(f"sample: a batch holds tensors, not {type(value).__name__}")
    return value


# Not inference mode: its tensors have no versions, so fused groups would run once per member.
@torch.no_grad()
def _run(model: nn.Module, batch: Batch, **keywords: Any) -> object:
    return call(model, {**batch, **keywords} if isinstance(batch, dict) else batch)


def _decode_step(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """One step after `ids` [batch, context]; the new entry of the cache is cropped again."""
    filled = _run(model, {"input_ids": ids}, use_cache=True)
    cache = getattr(filled, "past_key_values", None)
    if cache is None or not hasattr(cache, "crop"):
        raise InvalidInput(
            f"request: decode needs a cache that can be cropped; {type(model).__name__} has none"
        )
    step = {"input_ids": ids[:, -1:]}
    place = torch.full((len(ids), 1), ids.shape[1])

    def once() -> object:
        output = _run(model, step, past_key_values=cache, use_cache=True, position_ids=place)
        cache.crop(-1)
        return output

    return once


def _vocabulary(model: nn.Module, item: RequestItem) -> int:
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        raise InvalidInput(
            f'request: phase "{item.phase}" needs a language model with config.vocab_size; '
            f'{type(model).__name__} has none, use phase "forward"'
        )
    return size
