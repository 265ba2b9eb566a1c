"""The contract of a slide head, which maps a slide's tile embeddings to logits, differentiably.

Dimension key: T tiles, C channels of their embeddings, K classes, A attention rows, H·W cells of the slide's grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from maskattn.distributed.agreement import agree
from maskattn.packing import Packing
from maskattn.shapes import Bool, Float, Int

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SlideHead", "TileGrid"]


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The cell of each tile in the slide's grid of tiles.

    Attributes:
        rows_T: (T,) int64, row indices from the top.
        columns_T: (T,) int64, column indices from the left.
        shape_HW: numbers of rows and columns of the grid.
        group: the process group over which the slide's tiles are divided: these T tiles are this process's, and the
            slide model is called by all its processes. None if this process has all tiles.
    """

    rows_T: Int[Tensor, "T"]
    columns_T: Int[Tensor, "T"]
    shape_HW: tuple[int, int]
    group: ProcessGroup | None = None

    @classmethod
    def from_keep(cls, keep_HW: Bool[Tensor, "H W"]) -> TileGrid:
        """Return the grid of the kept cells, row-major."""
        rows_T, columns_T = keep_HW.nonzero().unbind(1)
        return cls(rows_T, columns_T, (keep_HW.shape[0], keep_HW.shape[1]))

    def packing(self) -> tuple[Packing, Int[Tensor, "T"]]:
        """Pack the tiles as one sequence of H·W cells.

        Returns:
            The packing, and (T,), the tile index of each packed token, in row-major order of the cells.

        Raises:
            ValueError: two tiles have the same cell.
        """
        cell_T, order_T = (self.rows_T * self.shape_HW[1] + self.columns_T).sort()
        if shared := int((cell_T.diff() == 0).sum()):
            raise ValueError(f"every tile must have a cell of its own, got {shared} that share one; drop duplicates")
        starts = torch.tensor([0, len(cell_T)], dtype=torch.int32, device=cell_T.device)
        cells = self.shape_HW[0] * self.shape_HW[1]
        return Packing(cell_T, starts, len(cell_T), 1, cells), order_T


class SlideHead(nn.Module, ABC):
    """A slide head, which turns the embeddings of a slide's tiles into logits.

    Args:
        in_dim: C.
        num_classes: K.

    Attributes:
        kind: the kind's name in model folders.
        reads_grid: whether the logits depend on the cells of the tiles.
        reads_um: whether the logits depend on the tiles' positions in µm.
        has_layers: whether it has attention layers whose weights sum to 1, as :meth:`rollout` needs them.
        why_no_rollout: the reason if it has no such layers, as a relative clause about the model.
        reads_divided_tiles: whether a slide's tiles may be divided among processes, see :class:`TileGrid`.
    """

    kind: ClassVar[str]
    reads_grid: bool = False
    reads_um: bool = False
    has_layers: bool = False
    why_no_rollout: str = "which has no layers of attention"
    reads_divided_tiles: bool = False

    def __init__(self, in_dim: int, num_classes: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.num_classes = num_classes

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return the arguments that rebuild the head, as JSON values."""

    @abstractmethod
    def logits(
        self, embeddings_TC: Float[Tensor, "T C"], coords_um_T2: Float[Tensor, "T 2"] | None, grid: TileGrid | None
    ) -> Float[Tensor, "K"]:
        """Compute the result of :meth:`forward` for arguments that :meth:`check` has accepted."""

    def forward(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        coords_um_T2: Float[Tensor, "T 2"] | None = None,
        grid: TileGrid | None = None,
    ) -> Float[Tensor, "K"]:
        """Compute the slide's logits.

        Args:
            embeddings_TC: (T, C), one row per tile, in any order.
            coords_um_T2: (T, 2), x and y of each tile's top left corner on the slide, in µm; None if unknown.
            grid: the tiles' cells; None if the tiles are not on a grid.

        Returns:
            (K,) logits; the same in all processes if the tiles are divided.

        Raises:
            ValueError: there are no embeddings, their width is not C, positions that the head reads are missing, or the
                tiles are divided and the head needs them all.
            GroupError: the tiles are divided, and another process refuses its input or has ended.
        """
        if grid is None or grid.group is None:
            self.check(embeddings_TC, coords_um_T2, grid)
        else:
            self._check_in_all(grid.group, embeddings_TC, coords_um_T2, grid)
        return self.logits(embeddings_TC, coords_um_T2, grid)

    def attention(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        coords_um_T2: Float[Tensor, "T 2"] | None = None,
        grid: TileGrid | None = None,
    ) -> Float[Tensor, "A T"] | None:
        """Return the attention over the tiles, one row per attention head or class; None if there is no such row."""
        return None

    def rollout(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        coords_um_T2: Float[Tensor, "T 2"] | None = None,
        grid: TileGrid | None = None,
    ) -> Float[Tensor, "T"] | None:
        """Return attention propagated through all layers to the tiles; None if no layer has weights that sum to 1."""
        return None

    def along_path(
        self,
        embeddings_TC: Float[Tensor, "T C"],
        coords_um_T2: Float[Tensor, "T 2"] | None,
        grid: TileGrid | None,
    ) -> Callable[[Tensor], Float[Tensor, "K"]]:
        """Return the logits as a function along a path to these embeddings, with discrete choices as at its end."""
        return lambda at_TC: self(at_TC, coords_um_T2, grid)

    def contributions(self, embeddings_TC: Float[Tensor, "T C"]) -> Float[Tensor, "K T"] | None:
        """Return each tile's term of each logit; None if the logits are not sums over tiles."""
        return None

    def linear_form(self, embeddings_TC: Float[Tensor, "T C"]) -> Float[Tensor, "K T C"] | None:
        """Return γ (K, T, C) with z_t·γ_kt = :meth:`contributions`; None if there is no such form."""
        return None

    def check(self, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid | None) -> None:
        """Refuse input that the head cannot read; arguments and errors are those of :meth:`forward`."""
        divided = grid is not None and grid.group is not None
        if divided and not self.reads_divided_tiles:
            raise ValueError(
                f"a slide's tiles can be divided among processes for transformers over tiles, got a TileGrid with a "
                f"group for a head of kind {self.kind!r}; give every process all tiles, in a grid without a group"
            )
        empty = not len(embeddings_TC) and not divided
        if embeddings_TC.ndim != 2 or embeddings_TC.shape[1] != self.in_dim or empty:
            raise ValueError(
                f"a slide model reads (T, {self.in_dim}) embeddings of T ≥ 1 tiles, got {tuple(embeddings_TC.shape)}; "
                f"take the encoder that it was trained with, whose features have {self.in_dim} channels"
            )
        if self.reads_grid and grid is None:
            raise ValueError(
                f"this slide model ({self.kind}) reads the tiles' cells on a grid, got none; give tiles of one grid"
            )
        if self.reads_um and coords_um_T2 is None:
            raise ValueError(
                f"this slide model ({self.kind}) reads distances between tiles in µm, got no positions; give the "
                "slides, or features that record their spacing"
            )
        for positions in (coords_um_T2, None if grid is None else grid.rows_T):
            if positions is not None and len(positions) != len(embeddings_TC):
                raise ValueError(
                    f"there must be a position for each tile, got {len(positions)} for {len(embeddings_TC)} embeddings"
                )

    def _check_in_all(
        self, group: ProcessGroup, embeddings_TC: Tensor, coords_um_T2: Tensor | None, grid: TileGrid
    ) -> None:
        """Check the input in all processes of a group, so that an error in one of them is an error in all."""
        problem: Exception | None = None
        try:
            self.check(embeddings_TC, coords_um_T2, grid)
            grid.packing()
        except ValueError as error:
            problem = error
        described = {"kind of head": self.kind, "dtype": str(embeddings_TC.dtype), "training mode": self.training}
        agree("a slide model", described, problem, group, embeddings_TC.device)
