"""Maps at a thumbnail's resolution, painted tile by tile, so that memory does not grow with the slide.

A thumbnail pixel belongs to the token that contains its centre. The canvas keeps the token of each pixel, the same for
all maps, and the values of these tokens: colours and limits are then computed for tokens, which are fewer than pixels.

Dimension key: M maps, (Y, X) thumbnail pixels, V painted tokens and nothing before them, B tiles of a batch, (h, w)
tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maskattn.shapes import Bool, Float, Int

__all__ = ["MapCanvas", "PaintedMap"]


@dataclass(frozen=True, eq=False)
class PaintedMap:
    """One map of a canvas.

    Attributes:
        values_V: (V,) the value of each token; the first is NaN and stands for pixels without a kept token.
        token_YX: (Y, X) an index into ``values_V`` for each pixel.
        pixels_V: (V,) the number of pixels of each token.
    """

    values_V: Float[np.ndarray, " V"]
    token_YX: Int[np.ndarray, "Y X"]
    pixels_V: Int[np.ndarray, " V"]

    def of_pixels(self, of_tokens_V: np.ndarray) -> np.ndarray:
        """Return for each pixel what belongs to its token: (V,) to (Y, X)."""
        return of_tokens_V.take(self.token_YX)


class MapCanvas:
    """Maps at the thumbnail's resolution, painted tile by tile; NaN in pixels without a kept token.

    Args:
        maps: M, the number of maps, which are painted together.
        thumbnail_px: (height, width) of the thumbnail.
        slide_px: (height, width) of the slide at level 0.
        tile_lv0: side of a tile in level-0 pixels.
    """

    def __init__(self, maps: int, thumbnail_px: tuple[int, int], slide_px: tuple[int, int], tile_lv0: int) -> None:
        self._token_YX: Int[np.ndarray, "Y X"] = np.zeros(thumbnail_px, np.int32)
        self._values: list[Float[np.ndarray, "M v"]] = [np.full((maps, 1), np.nan, np.float32)]
        self._tokens = 1
        self._lv0_per_px = (slide_px[0] / thumbnail_px[0], slide_px[1] / thumbnail_px[1])
        self._tile_lv0 = tile_lv0

    def paint(
        self,
        coords_B2: Int[np.ndarray, "B 2"],
        values_MBhw: Float[np.ndarray, "M B h w"],
        keep_Bhw: Bool[np.ndarray, "B h w"],
    ) -> None:
        """Paint the kept tokens of some tiles.

        Args:
            coords_B2: (B, 2) level-0 x, y of the tiles' top left corners.
            values_MBhw: (M, B, h, w) one value per token, or (M, B, 1, 1) one per tile.
            keep_Bhw: (B, h, w) bool, True for kept tokens.
        """
        for tile, (x_lv0, y_lv0) in enumerate(coords_B2.tolist()):
            rows, row_of_pixel = self._pixels(0, y_lv0, keep_Bhw.shape[1])
            columns, column_of_pixel = self._pixels(1, x_lv0, keep_Bhw.shape[2])
            painted = keep_Bhw[tile].take(row_of_pixel, axis=0).take(column_of_pixel, axis=1)
            # Tokens between the centres of pixels are left out: there are never more tokens than pixels.
            seen_rows, row_of_pixel = np.unique(row_of_pixel % values_MBhw.shape[2], return_inverse=True)
            seen_columns, column_of_pixel = np.unique(column_of_pixel % values_MBhw.shape[3], return_inverse=True)
            values_Mhw = values_MBhw[:, tile].take(seen_rows, axis=1).take(seen_columns, axis=2)
            token = self._tokens + row_of_pixel[:, None] * len(seen_columns) + column_of_pixel
            np.copyto(self._token_YX[rows, columns], token, where=painted)
            self._values.append(values_Mhw.reshape(len(values_Mhw), -1).astype(np.float32))
            self._tokens += self._values[-1].shape[1]

    def maps(self) -> list[PaintedMap]:
        """Return the maps."""
        self._values = [np.concatenate(self._values, axis=1)]
        pixels_V = np.bincount(self._token_YX.reshape(-1), minlength=self._tokens)
        return [PaintedMap(values_V, self._token_YX, pixels_V) for values_V in self._values[0]]

    def values_of_pixels(self) -> Float[np.ndarray, "M Y X"]:
        """Return the maps' values at each pixel, (M, Y, X) float32."""
        return np.stack([one.of_pixels(one.values_V) for one in self.maps()])

    def _pixels(self, axis: int, start_lv0: int, tokens: int) -> tuple[slice, np.ndarray]:
        """Return the thumbnail pixels whose centres are in a tile along one axis, and the token of each centre."""
        step = self._lv0_per_px[axis]
        limit = self._token_YX.shape[axis]
        first, last = (
            min(max(int(np.ceil(edge / step - 0.5)), 0), limit) for edge in (start_lv0, start_lv0 + self._tile_lv0)
        )
        centres_lv0 = (np.arange(first, last) + 0.5) * step - start_lv0
        token = np.floor(centres_lv0 * tokens / self._tile_lv0).astype(np.intp)
        return slice(first, last), token.clip(0, tokens - 1)
