"""The contents of a slide model's checkpoint as the layout readers receive them, and the head that they build."""

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
    """A slide head, and the metadata of its checkpoint.

    Attributes:
        head: the head, in eval mode.
        layout: the tool and model that the checkpoint's layout belongs to.
        classes: names of the K logits; None if the checkpoint has none.
        facts: further facts for the model's card, name → value.
    """

    head: SlideHead
    layout: str
    classes: tuple[str, ...] | None = None
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as the layout readers receive it.

    Attributes:
        name: the checkpoint's name in messages.
        state: its tensors by key.
        hyper: the hyperparameters stored in it.
        options: options of :func:`maskattn.nn.load_slide_head`.
    """

    name: str
    state: dict[str, Tensor]
    hyper: Mapping[str, Any]
    options: Mapping[str, Any]

    def width(self, key: str, axis: int = 0) -> int:
        """Return one dimension of a tensor that the layout requires."""
        if key not in self.state:
            raise UnsupportedModelError(f"{self.name} must have the key {key}, got a checkpoint without it")
        return int(self.state[key].shape[axis])

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose keys start with a prefix, under keys without it."""
        return {key.removeprefix(prefix): x for key, x in self.state.items() if key.startswith(prefix)}


def filled(head: SlideHead, state: Mapping[str, Tensor], layout: str, name: str) -> SlideHead:
    """Return the head with these weights, in their dtype.

    Raises:
        UnsupportedModelError: keys or shapes do not match; the message lists them.
    """
    if wrong := misfits(state, head.state_dict()):
        raise UnsupportedModelError(
            f"{name} does not fit the layout of {layout}: {joined(wrong, MOST_NAMED)}; is it another version's?"
        )
    head = head.to(next(x.dtype for x in state.values() if x.is_floating_point()))
    head.load_state_dict(dict(state))
    return head
