// The sums of dk or dv of a block of keys, C += A^T B, where A is p or dS of a tile of queries, and B is dO or q.
//
// In vectors A^T is the left operand, and C has a row for each key, [N][D padded]. Tiles read left operands only by
// rows, for which A would have to be transposed; there the sums are transposed instead, C^T += B^T A, [D padded][N].
//
// Dimension key: N keys of a block, D head width, Q queries of a tile.
#pragma once

#include "attention/operands.hpp"

namespace maskattn {
namespace {

template <class Arithmetic>
void clear_sums(float* sums, int columns, int stride) {
    const int keys = Arithmetic::in_tiles ? block_keys : columns;
    __builtin_memset(sums, 0, static_cast<std::size_t>(keys * stride) * sizeof *sums);
}

template <class Arithmetic>
struct KeySums {
    int columns;  // keys that are computed
    int rows;     // queries that are computed
    int stride;   // D padded
    int queries;  // of a whole tile

    // Adds the product of scores [Q / depth][N] and of the queries' operand, as TileLayout has it.
    void add(const std::uint32_t* scores, const std::uint32_t* operand, float* sums) const {
        if constexpr (Arithmetic::in_tiles) {
            const int steps = queries / Arithmetic::depth;
            multiply_rows<Arithmetic, Start::add>(stride, {operand, steps, 1}, scores, block_keys,
                                                  rows / Arithmetic::depth, sums, block_keys, columns / lanes);
        } else {
            static_assert(tile_rows == 6 && lanes % 4 == 0, "4 keys or 2 are left over, if any");
            int n = 0;
            for (; n + tile_rows <= columns; n += tile_rows) add_rows<tile_rows>(scores, n, operand, sums);
            if (n + 4 == columns) add_rows<4>(scores, n, operand, sums);
            if (n + 2 == columns) add_rows<2>(scores, n, operand, sums);
        }
    }

  private:
    template <int keys>
    MASKATTN_INLINE void add_rows(const std::uint32_t* scores, int n, const std::uint32_t* operand, float* sums) const {
        multiply<Arithmetic, keys, Start::add>({scores + n, 1, block_keys}, operand, stride, rows / Arithmetic::depth,
                                               sums + n * stride, stride, stride / lanes);
    }
};

// Returns the rows [D padded] of `lanes` keys from n on, which may be in the buffer.
template <class Arithmetic>
const float* rows_of_sums(const float* sums, int n, int stride, [[maybe_unused]] float* buffer) {
    if constexpr (!Arithmetic::in_tiles) return sums + n * stride;
    for (int d = 0; d < stride; d += lanes) {
        Words square[lanes];
        for (int i = 0; i < lanes; ++i) square[i] = load<Words>(sums + (d + i) * block_keys + n);
        transpose(square);
        for (int i = 0; i < lanes; ++i) store(buffer + i * stride + d, square[i]);
    }
    return buffer;
}

}  // namespace
}  // namespace maskattn
