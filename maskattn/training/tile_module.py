"""The Lightning module that fine-tunes a tile encoder with a linear layer on its features.

The learning rate decreases from the top to the lowest layer.

Dimension key: B patches or tiles, P cases, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskattn.nn.blocks import Block, DropPath
from maskattn.nn.encoders.tile_encoder import TileEncoder
from maskattn.nn.optimizer_groups import layer_groups
from maskattn.nn.slide_models.ordinal import ordinal_logits
from maskattn.training.cohort import Case, Cohort
from maskattn.training.encoder_to_tune import packed_of
from maskattn.training.judged_module import JudgedModule, added
from maskattn.training.patches import PatchItem
from maskattn.training.settings import TrainSettings
from maskattn.training.tasks import TrainedTask

__all__ = ["TileTraining", "prepared"]


class TileTraining(JudgedModule):
    """An encoder with a linear layer, its task, and its validation cases.

    Args:
        encoder: a packed transformer that :func:`prepared` returned.
        task: the task.
        settings: the settings of the training.
        cohort: the cohort, for the task's name and classes.
        validation: the validation cases.
        case_of_bag: index of the case of each bag of averaged tiles; None: each bag is a case.
    """

    def __init__(
        self,
        encoder: TileEncoder,
        task: TrainedTask,
        settings: TrainSettings,
        cohort: Cohort,
        validation: Sequence[Case],
        case_of_bag: Sequence[int] | None = None,
    ) -> None:
        super().__init__(settings, task, cohort, validation)
        self.encoder = encoder
        self._settings = settings
        self._case_of_bag = list(range(len(validation)) if case_of_bag is None else case_of_bag)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(encoder.embed_dim, task.num_classes - (cohort.task == "ordinal"))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the encoder's layers, each with its learning rate, and the linear layer with the full one."""
        settings, vit = self._settings, self.encoder.vit
        assert vit is not None, "a packed transformer"
        lr, decay = settings.lr, settings.weight_decay
        groups = layer_groups(vit, lr, layer_decay=settings.layer_decay, weight_decay=decay)
        return [*groups, {"params": list(self.head.parameters()), "lr": lr, "weight_decay": decay}]

    def transfer_batch_to_device(self, batch: list[PatchItem], device: torch.device, dataloader_idx: int) -> Any:
        """Return the patches on the model's device."""
        return [
            PatchItem(
                one.index,
                one.pixels_3XY.to(device, non_blocking=True),
                None if one.keep_HW is None else one.keep_HW.to(device, non_blocking=True),
                one.truth,
            )
            for one in batch
        ]

    def logits(self, batch: list[PatchItem]) -> Tensor:
        """Compute the linear layer's outputs for some patches."""
        pixels = torch.stack([one.pixels_3XY for one in batch])
        masks = [one.keep_HW for one in batch if one.keep_HW is not None]
        features_BC = self.encoder.encode_tiles(pixels, torch.stack(masks) if masks else None)
        return cast(Tensor, self.head(self.dropout(features_BC)))

    def batch_loss(self, batch: list[PatchItem]) -> Tensor:
        """Return the mean loss of some patches."""
        return self.task.loss(self._of_classes(self.logits(batch)), [one.truth for one in batch])

    def validation_step(self, batch: list[PatchItem], batch_idx: int) -> None:
        """Add the logits of some patches to the sums of their bags, whose last element counts the patches."""
        for one, logits in zip(batch, self.logits(batch).double().cpu(), strict=True):
            counted = torch.cat([logits, logits.new_ones(1)])
            self.validation_outputs[one.index] = self.validation_outputs.get(one.index, 0) + counted

    def all_outputs(self) -> Tensor:
        """Return the (P, K) outputs of the cases; a bag's are those of the mean of its tiles, as in the slide model."""
        sums = torch.stack([one for _, one in sorted(added(self.validation_outputs).items())])
        bags = self._of_classes((sums[:, :-1] / sums[:, -1:]).float())
        case_of_bag = torch.tensor(self._case_of_bag)
        return torch.stack([self.task.fuse(bags[case_of_bag == index]) for index in range(len(self.validation))])

    @torch.no_grad()
    def outputs_of(self, batches: Iterable[list[PatchItem]], device: torch.device) -> Tensor:
        """Compute the (P, K) outputs of the validation cases without Lightning."""
        self.to(device).eval()
        self.on_validation_epoch_start()
        for index, batch in enumerate(batches):
            self.validation_step(self.transfer_batch_to_device(batch, device, 0), index)
        return self.all_outputs()

    def _of_classes(self, logits: Tensor) -> Tensor:
        return ordinal_logits(logits) if self.cohort.task == "ordinal" else logits

    def network(self) -> nn.Module:
        """Return the encoder."""
        return self.encoder


def prepared(encoder: TileEncoder, settings: TrainSettings) -> TileEncoder:
    """Prepare an encoder for fine-tuning, in place: stochastic depth, frozen blocks, recomputation.

    Raises:
        ValueError: it is not a packed transformer, or has fewer blocks than are to be frozen.
    """
    vit = packed_of(encoder)
    blocks = [cast(Block, block) for block in vit.blocks]
    if settings.freeze > len(blocks):
        raise ValueError(f"--freeze may be at most the encoder's {len(blocks)} blocks, got {settings.freeze}")
    for index, block in enumerate(blocks):
        share = settings.drop_path * index / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)
    vit.requires_grad_(True)
    if settings.freeze:
        above = tuple(f"blocks.{index}." for index in range(settings.freeze, len(blocks)))
        for name, weight in vit.named_parameters():
            weight.requires_grad_(name.startswith((*above, "norm.", "fc_norm.", "attn_pool.", "head.")))
    vit.grad_checkpointing = settings.recompute
    return encoder.train()
