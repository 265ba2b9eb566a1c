"""The independent training loop of :mod:`bench.evidence.independent_abmil`, and its two models, with torch alone.

Dimension key: T tiles, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskattn.evaluation import Predictions
from maskattn.evaluation.splits import Split

__all__ = ["PlainABMIL", "PlainViT", "plain_loop", "trained_plainly"]

CHANNELS, WIDTH, DROPOUT = 32, 32, 0.1
EPOCHS, PATIENCE, BATCH = 16, 4, 8

Logits = Callable[[nn.Module, dict[str, Tensor], Sequence[str]], Tensor]


class PlainABMIL(nn.Module):
    """Gated attention pooling, after the paper's formula."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, WIDTH)
        self.v, self.u, self.w = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH // 2, 1)
        self.classes = nn.Linear(WIDTH, 2)

    def forward(self, tiles_TC: Tensor) -> Tensor:
        """Map the tiles of a slide (T, C) to logits (2,)."""
        hidden = F.dropout(torch.relu(self.first(tiles_TC)), DROPOUT, self.training)
        attention = torch.softmax(self.w(torch.tanh(self.v(hidden)) * torch.sigmoid(self.u(hidden))), dim=0)
        return self.classes((attention * hidden).sum(0))


class PlainViT(nn.Module):
    """torch's own pre-norm transformer encoder with a class token, of the size that `train` gives a ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, WIDTH)
        self.class_token = nn.Parameter(torch.randn(1, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 1, 4 * WIDTH, dropout=DROPOUT, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.classes = nn.Linear(WIDTH, 2)

    def forward(self, tiles_TC: Tensor) -> Tensor:
        """(T, C) tiles of a slide → (2,) logits."""
        tokens = torch.cat([self.class_token, self.first(tiles_TC)])
        return self.classes(self.blocks(tokens[None])[0, 0])


def one_by_one(model: nn.Module, bags: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Compute the logits of patients."""
    return torch.stack([model(bags[name]) for name in names])


def plain_loop(
    make: Callable[[], nn.Module], bags: dict[str, Tensor], labels: dict[str, int], split: Split, rate: float, seed: int
) -> Predictions:
    """Train a model, and predict the test part with the epoch whose validation loss is lowest."""
    model, _ = trained_plainly(make, bags, labels, split, rate, seed)
    return predicted_plainly(model, bags, labels, split.test)


def predicted_plainly(
    model: nn.Module,
    bags: dict[str, Tensor],
    labels: dict[str, int],
    names: Sequence[str],
    logits_of: Logits = one_by_one,
) -> Predictions:
    """Predict patients."""
    model.eval()
    with torch.no_grad():
        scores = torch.softmax(logits_of(model, bags, names).double(), dim=1).numpy()
    return Predictions("binary", "tumour", tuple(names), scores, [labels[name] for name in names], ("0", "1"))


def trained_plainly(
    make: Callable[[], nn.Module],
    bags: dict[str, Tensor],
    labels: dict[str, int],
    split: Split,
    rate: float,
    seed: int,
    clip: float = float("inf"),
    logits_of: Logits = one_by_one,
) -> tuple[nn.Module, float]:
    """Return a model with the weights of the epoch whose validation loss is lowest, and that loss."""
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    best_epoch, best_loss, best_state = 0, float("inf"), model.state_dict()
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(split.train)).tolist()
        for start in range(0, len(order), BATCH):
            batch = [split.train[index] for index in order[start : start + BATCH]]
            loss = F.cross_entropy(logits_of(model, bags, batch), torch.tensor([labels[name] for name in batch]))
            optimizer.zero_grad()
            loss.backward()
            if clip < float("inf"):
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = logits_of(model, bags, split.validation)
        loss = float(F.cross_entropy(logits, torch.tensor([labels[name] for name in split.validation])))
        if loss < best_loss:
            best_epoch, best_loss = epoch, loss
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        if epoch - best_epoch >= PATIENCE:
            break
    model.load_state_dict(best_state)
    return model, best_loss
