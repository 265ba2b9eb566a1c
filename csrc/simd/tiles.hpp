// Products of bfloat16 on AMX, whose eight tile registers hold 16 rows of 16 words each. One instruction adds the
// product of two of them to a third, 16,384 operations in 16 cycles, where a unit of vectors needs 256 or more.
//
// The instructions are written out, since GCC's intrinsics do not say that they read and write memory.
#pragma once

#include "simd/products.hpp"

namespace maskattn {
namespace {

constexpr int tile_side = 16;  // rows of a tile, and words in a row

struct alignas(64) TileShapes {
    std::uint8_t palette, first_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
};

MASKATTN_INLINE void set_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }

// Gives all tiles their full size as long as it lives. Other libraries of the process, such as oneDNN, expect the shapes
// that they have set on this thread, which are restored.
class FullTiles {
  public:
    FullTiles() {
        asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
        TileShapes full{};
        full.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            full.row_bytes[tile] = 4 * tile_side;
            full.rows[tile] = tile_side;
        }
        set_shapes(full);
    }
    ~FullTiles() { set_shapes(before_); }
    FullTiles(const FullTiles&) = delete;
    FullTiles& operator=(const FullTiles&) = delete;

  private:
    TileShapes before_;
};

// Reads or writes a tile whose rows are `stride` words apart.
template <int tile>
MASKATTN_INLINE void load_tile(const void* from, std::ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(tile) : "memory");
}
template <int tile>
MASKATTN_INLINE void store_tile(void* to, std::ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(4 * stride), "i"(tile) : "memory");
}
template <int tile>
MASKATTN_INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile) : "memory");
}
template <int sums, int left, int right>
MASKATTN_INLINE void multiply_add_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(left), "i"(right) : "memory");
}

template <int number>
struct Tile {
    static constexpr int value = number;
};

// Calls visit with each of the first `count` tiles, at most four.
template <int count, class Visit>
MASKATTN_INLINE void for_each_tile(Visit visit) {
    visit(Tile<0>{});
    if constexpr (count > 1) visit(Tile<1>{});
    if constexpr (count > 2) visit(Tile<2>{});
    if constexpr (count > 3) visit(Tile<3>{});
}

// Computes 16 rows of up to four tiles of C. The right operand's tiles take turns in two registers.
template <Start start, int columns>
__attribute__((noinline)) void multiply_tiles(Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps,
                                              float* c, std::ptrdiff_t c_row) {
    constexpr int left = 4, right = 5;
    for_each_tile<columns>([&](auto tile) __attribute__((always_inline)) {
        constexpr int sums = decltype(tile)::value;
        if constexpr (start == Start::zero)
            clear_tile<sums>();
        else
            load_tile<sums>(c + sums * tile_side, c_row);
    });
    for (int t = 0; t < steps; t += tile_side) {
        load_tile<left>(a.data + t, a.row);
        for_each_tile<columns>([&](auto tile) __attribute__((always_inline)) {
            constexpr int sums = decltype(tile)::value;
            load_tile<right + sums % 2>(b + t * b_step + sums * tile_side, b_step);
            multiply_add_tiles<sums, left, right + sums % 2>();
        });
    }
    for_each_tile<columns>([&](auto tile) __attribute__((always_inline)) {
        constexpr int sums = decltype(tile)::value;
        store_tile<sums>(c + sums * tile_side, c_row);
    });
}

// The words of operands in bfloat16, multiplied in tiles: 16 rows at a time, of steps that neighbour each other and are
// a multiple of 16, with zeros after the last of a product.
struct Bfloat16Tiles : Bfloat16Pairs {
    static constexpr bool in_tiles = true;
    static constexpr int rows = tile_side;
    static constexpr int whole_steps = tile_side;
    using Session = FullTiles;

    template <int rows_at_once, Start start>
    static MASKATTN_INLINE void multiply(Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps, float* c,
                                         std::ptrdiff_t c_row, int vectors, const float* factor) {
        static_assert(rows_at_once == tile_side && lanes == tile_side, "a product is a row of tiles");
        if constexpr (start == Start::scaled) {
            for (int r = 0; r < tile_side; ++r)
                if (factor[r] != 1.0f)
                    for (int v = 0; v < vectors; ++v)
                        store(c + r * c_row + v * lanes, load<Floats>(c + r * c_row + v * lanes) * factor[r]);
        }
        constexpr Start begin = start == Start::zero ? Start::zero : Start::add;
        for (; vectors >= 4; vectors -= 4, b += 4 * tile_side, c += 4 * tile_side)
            multiply_tiles<begin, 4>(a, b, b_step, steps, c, c_row);
        if (vectors == 3) multiply_tiles<begin, 3>(a, b, b_step, steps, c, c_row);
        if (vectors == 2) multiply_tiles<begin, 2>(a, b, b_step, steps, c, c_row);
        if (vectors == 1) multiply_tiles<begin, 1>(a, b, b_step, steps, c, c_row);
    }
};

}  // namespace
}  // namespace maskattn
