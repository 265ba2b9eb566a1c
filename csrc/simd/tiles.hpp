// Products of bfloat16 on AMX, whose eight tile registers hold 16 rows of 16 words each. One instruction adds the
// product of two of them to a third, 16,384 operations in 16 cycles, where a unit of vectors needs 256 or more.
//
// The instructions are written out, since GCC's intrinsics do not say that they read and write memory.
#pragma once

#include "simd/products.hpp"

namespace maskattn {
namespace {

constexpr int tile_side = 16;  // rows of a tile, and words in a row

#if defined(MASKATTN_TILES_IN_SOFTWARE)

// The same in plain loops, for the tests on processors without AMX.
thread_local std::uint32_t tiles_in_software[8][tile_side][tile_side];

struct FullTiles {
    FullTiles() {}  // not trivial, as that of AMX
};

template <int tile>
void load_tile(const void* from, std::ptrdiff_t stride) {
    for (int r = 0; r < tile_side; ++r)
        __builtin_memcpy(tiles_in_software[tile][r], static_cast<const std::uint32_t*>(from) + r * stride, 4 * tile_side);
}
template <int tile>
void store_tile(void* to, std::ptrdiff_t stride) {
    for (int r = 0; r < tile_side; ++r)
        __builtin_memcpy(static_cast<std::uint32_t*>(to) + r * stride, tiles_in_software[tile][r], 4 * tile_side);
}
template <int tile>
void clear_tile() {
    __builtin_memset(tiles_in_software[tile], 0, sizeof tiles_in_software[tile]);
}
template <int sums, int left, int right>
void multiply_add_tiles() {
    for (int r = 0; r < tile_side; ++r)
        for (int t = 0; t < tile_side; ++t) {
            const Words factor = broadcast(tiles_in_software[left][r][t]);
            std::uint32_t* to = tiles_in_software[sums][r];
            store(to, Bfloat16Pairs::multiply_add(factor, load<Words>(tiles_in_software[right][t]), load<Floats>(to)));
        }
}

#else

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

#endif

// Computes a square of C, `down` by `across` tiles, 1 or 2, so that a tile that is read is multiplied twice.
template <Start start, int down, int across>
__attribute__((noinline)) void multiply_square(Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps,
                                               float* c, std::ptrdiff_t c_row) {
    float* c_below = c + tile_side * c_row;
    if constexpr (start == Start::zero) {
        clear_tile<0>();
        if constexpr (across > 1) clear_tile<1>();
        if constexpr (down > 1) clear_tile<2>();
        if constexpr (down > 1 && across > 1) clear_tile<3>();
    } else {
        load_tile<0>(c, c_row);
        if constexpr (across > 1) load_tile<1>(c + tile_side, c_row);
        if constexpr (down > 1) load_tile<2>(c_below, c_row);
        if constexpr (down > 1 && across > 1) load_tile<3>(c_below + tile_side, c_row);
    }
    for (int t = 0; t < steps; t += tile_side, b += tile_side * b_step) {
        load_tile<4>(a.data + t, a.row);
        load_tile<6>(b, b_step);
        multiply_add_tiles<0, 4, 6>();
        if constexpr (across > 1) {
            load_tile<7>(b + tile_side, b_step);
            multiply_add_tiles<1, 4, 7>();
        }
        if constexpr (down > 1) {
            load_tile<5>(a.data + tile_side * a.row + t, a.row);
            multiply_add_tiles<2, 5, 6>();
        }
        if constexpr (down > 1 && across > 1) multiply_add_tiles<3, 5, 7>();
    }
    store_tile<0>(c, c_row);
    if constexpr (across > 1) store_tile<1>(c + tile_side, c_row);
    if constexpr (down > 1) store_tile<2>(c_below, c_row);
    if constexpr (down > 1 && across > 1) store_tile<3>(c_below + tile_side, c_row);
}

// Computes columns of C, 1 or 2 tiles across.
template <Start start, int across>
MASKATTN_INLINE void multiply_columns(int rows, Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps,
                                      float* c, std::ptrdiff_t c_row) {
    int r = 0;
    for (; r + 2 * tile_side <= rows; r += 2 * tile_side)
        multiply_square<start, 2, across>({a.data + r * a.row, a.row, 1}, b, b_step, steps, c + r * c_row, c_row);
    if (r < rows)
        multiply_square<start, 1, across>({a.data + r * a.row, a.row, 1}, b, b_step, steps, c + r * c_row, c_row);
}

// Words of operands in bfloat16, multiplied in tiles. The rows of a product are a multiple of 16, and so are its steps,
// with zeros after the last. The steps of the left operand are neighbours.
struct Bfloat16Tiles : Bfloat16Pairs {
    static constexpr bool in_tiles = true;
    static constexpr int rows = tile_side;
    static constexpr int rows_at_once = 2 * tile_side;
    static constexpr int whole_steps = tile_side;
    using Session = FullTiles;

    // The unit of tiles takes 0.3 µs to wake up after a rest of as long, so that longer work in vectors calls this.
    static MASKATTN_INLINE void stay_awake() { multiply_add_tiles<0, 4, 6>(); }

    template <Start start>
    static MASKATTN_INLINE void multiply(int rows, Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps,
                                         float* c, std::ptrdiff_t c_row, int vectors, const float* factor) {
        static_assert(lanes == tile_side, "a column of tiles is a vector");
        if constexpr (start == Start::scaled)
            for (int r = 0; r < rows; ++r)
                if (factor[r] != 1.0f)
                    for (int v = 0; v < vectors; ++v)
                        store(c + r * c_row + v * lanes, load<Floats>(c + r * c_row + v * lanes) * factor[r]);
        constexpr Start begin = start == Start::zero ? Start::zero : Start::add;
        int v = 0;
        for (; v + 2 <= vectors; v += 2)
            multiply_columns<begin, 2>(rows, a, b + v * lanes, b_step, steps, c + v * lanes, c_row);
        if (v < vectors) multiply_columns<begin, 1>(rows, a, b + v * lanes, b_step, steps, c + v * lanes, c_row);
    }
};

}  // namespace
}  // namespace maskattn
