"""The contents of a slide model's checkpoint for the readers of layouts, and the head that they build from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from maskattn.nn.adapters.conversion import UnsupportedModelError
from maskattn.nn.fitting import joined, misfits
from maskattn.nn.slide_models.head import SlideHead

__all__ = ["MOST_NAMED", "Checkpoint", "HeadFile", "filled"]

MOST_NAMED = 6


@dataclass(frozen=True)
class HeadFile:
    """A slide head, and what its checkpoint says of it.

    Attributes:
        head: in eval mode.
        layout: whose checkpoint it was.
        classes: names of the K logits; None where the checkpoint has none.
        facts: what else it says, for the model's card.
    """

    head: SlideHead
    layout: str
    classes: tuple[str, ...] | None = None
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the readers of layouts receive it."""

    name: str
    state: dict[str, Tensor]
    hyper: Mapping[str, Any]
    options: Mapping[str, Any]

    def width(self, key: str, axis: int = 0) -> int:
        """Return one dimension of a tensor that the layout requires."""
        if key not in self.state:
            raise UnsupportedModelError(f"{self.name} must have the key {key}, and has none of that name")
        return int(self.state[key].shape[axis])

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose keys start with a prefix, under keys without it."""
        return {key.removeprefix(prefix): x for key, x in self.state.items() if key.startswith(prefix)}


def filled(head: SlideHead, state: Mapping[str, Tensor], layout: str, name: str) -> SlideHead:
    """The head with these weights, in their dtype.

    Raises:
        UnsupportedModelError: keys or shapes do not fit; they are named.
    """
    if wrong := misfits(state, head.state_dict()):
        raise UnsupportedModelError(
            f"{name} does not fit the layout of {layout}: {joined(wrong, MOST_NAMED)}; is it another version's?"
        )
    head = head.to(next(x.dtype for x in state.values() if x.is_floating_point()))
    head.load_state_dict(dict(state))
    return head
