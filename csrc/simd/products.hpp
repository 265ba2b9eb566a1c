// Products of small matrices on a register tile, the one loop that computes all matrix products of this extension.
//
//   C[r][c] (+)= sum over steps t of A[r][t] . B[t][c]
//
// A and B consist of 32-bit words. A word is one float32, or two neighbours in the summed dimension in bfloat16 (the
// even one in the low half), whose two products are added by one instruction.
#pragma once

#include "simd/vectors.hpp"

namespace maskattn {
namespace {

// Arithmetic whose products are computed in vector registers.
struct InVectors {
    static constexpr bool in_tiles = false;
    static constexpr int rows = tile_rows;          // the rows of a product are a multiple of them,
    static constexpr int rows_at_once = tile_rows;  // and it has at most these
    static constexpr int whole_steps = 1;           // its steps are a multiple of them, with zeros after the last
    struct Session {};                              // lives as long as products are computed
    static MASKATTN_INLINE void stay_awake() {}     // called at least every 0.2 µs meanwhile
};

struct SinglePrecision : InVectors {
    using Value = float;             // an element of a word
    static constexpr int depth = 1;  // elements of the summed dimension in a word

    static MASKATTN_INLINE Floats multiply_add(Words left, Words right, Floats sum) {
        return Floats(left) * Floats(right) + sum;
    }
};

#if defined(__AVX512BF16__)
struct Bfloat16Pairs : InVectors {
    using Value = std::uint16_t;
    static constexpr int depth = 2;

    static MASKATTN_INLINE Floats multiply_add(Words left, Words right, Floats sum) {
        return Floats(_mm512_dpbf16_ps(__m512(sum), (__m512bh)left, (__m512bh)right));
    }

    // Rounds two vectors to bfloat16 and concatenates them.
    static MASKATTN_INLINE Words round(Floats first, Floats second) {
        return (Words)_mm512_cvtne2ps_pbh(__m512(second), __m512(first));
    }

    // Reorders the result of `round` to words that pair element i of both vectors.
    static MASKATTN_INLINE Words pair_up(Words rounded) {
        const Words order = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                              0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
        return (Words)_mm512_permutexvar_epi16((__m512i)order, (__m512i)rounded);
    }
};
#endif

// The left operand, with the word of row r and step t at data[r * row + t * step].
struct Left {
    const std::uint32_t* data;
    std::ptrdiff_t row;
    std::ptrdiff_t step;
};

enum class Start { zero, add, scaled };  // sums are added to 0, C, or C times factor[row]

// Computes a register tile and calls take(row, vector, sums) for each of its vectors.
template <class Arithmetic, int rows, int vectors, class Take>
MASKATTN_INLINE void sum_tile(Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps, Take take) {
    Floats total[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) total[r][v] = Floats{};
    const std::uint32_t* left = a.data;
#pragma GCC unroll 4
    for (int t = 0; t < steps; ++t) {
        Words right[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) right[v] = load<Words>(b + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const Words factor_of_row = broadcast(left[r * a.row]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v)
                total[r][v] = Arithmetic::multiply_add(factor_of_row, right[v], total[r][v]);
        }
        left += a.step;
        b += b_step;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) take(r, v, total[r][v]);
}

template <class Arithmetic, int rows, int vectors, Start start>
__attribute__((noinline)) void multiply_tile(Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps, float* c,
                                             std::ptrdiff_t c_row, const float* factor) {
    // C is read last, so that the loop hides the latency of L2.
    sum_tile<Arithmetic, rows, vectors>(a, b, b_step, steps, [&](int r, int v, Floats sums) __attribute__((always_inline)) {
        float* to = c + r * c_row + v * lanes;
        if (start == Start::add) sums += load<Floats>(to);
        if (start == Start::scaled) sums += load<Floats>(to) * factor[r];
        store(to, sums);
    });
}

// Computes the product for any number of column vectors, split evenly over register tiles.
template <class Arithmetic, int rows, Start start>
MASKATTN_INLINE void multiply(Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps, float* c,
                              std::ptrdiff_t c_row, int vectors, const float* factor = nullptr) {
    while (vectors > 0) {
        const int half = (vectors + 1) / 2;
        const int now = vectors <= tile_vectors ? vectors : half < tile_vectors ? half : tile_vectors;
        switch (now) {
            case 1: multiply_tile<Arithmetic, rows, 1, start>(a, b, b_step, steps, c, c_row, factor); break;
            case 2: multiply_tile<Arithmetic, rows, 2, start>(a, b, b_step, steps, c, c_row, factor); break;
            default:
                if constexpr (tile_vectors > 2) {
                    if (now == 3)
                        multiply_tile<Arithmetic, rows, 3, start>(a, b, b_step, steps, c, c_row, factor);
                    else
                        multiply_tile<Arithmetic, rows, 4, start>(a, b, b_step, steps, c, c_row, factor);
                }
        }
        b += now * lanes;
        c += now * lanes;
        vectors -= now;
    }
}

// Computes the product of a multiple of Arithmetic::rows rows, at most rows_at_once.
template <class Arithmetic, Start start>
MASKATTN_INLINE void multiply_rows(int rows, Left a, const std::uint32_t* b, std::ptrdiff_t b_step, int steps, float* c,
                                   std::ptrdiff_t c_row, int vectors, const float* factor = nullptr) {
    if constexpr (Arithmetic::in_tiles)
        Arithmetic::template multiply<start>(rows, a, b, b_step, steps, c, c_row, vectors, factor);
    else
        multiply<Arithmetic, tile_rows, start>(a, b, b_step, steps, c, c_row, vectors, factor);
}

}  // namespace
}  // namespace maskattn
