// Forward attention in tiles, which are multiplied beside the softmax: both units of the processor work at once, and the
// unit of tiles never rests, since it takes 0.3 µs to wake up after a rest as long as one softmax.
//
// Dimension key as in forward.hpp.
#pragma once

#include "attention/forward.hpp"
#include "simd/tiles.hpp"

namespace maskattn {
namespace {

// A step is 16 queries and a block of keys. Beside its softmax, the products of the next step's queries and keys are
// computed, and those of the probabilities of the step before with its values.
template <bool distanced, class KeysOf>
MASKATTN_INLINE void take_blocks(const QueryRows<Bfloat16Tiles>& of, std::int64_t block_count, KeysOf keys_of) {
    constexpr int M = Bfloat16Tiles::rows, p_stride = block_keys / Bfloat16Tiles::depth;
    alignas(64) float product_MN[2][M * block_keys];
    alignas(64) std::uint32_t p_MN[2][M * p_stride];
    alignas(64) float factor_M[2][M];
    const int groups = of.rows / M;
    const auto q_of = [&](std::int64_t step) { return static_cast<int>(step % groups) * M; };
    const auto scores_of = [&](std::int64_t step) __attribute__((always_inline)) {
        const PackedKeys keys = keys_of(step / groups);
        return ProductByColumns<Start::zero, 0>{of.queries(q_of(step)), keys.k,    block_keys,
                                                of.steps,               product_MN[step % 2], block_keys,
                                                keys.terms.columns / tile_side};
    };
    const auto output_of = [&](std::int64_t step) __attribute__((always_inline)) {
        const PackedKeys keys = keys_of(step / groups);
        return ProductByColumns<Start::add, 4>{{p_MN[step % 2], p_stride, 1},
                                               keys.v,
                                               of.out_stride,
                                               keys.terms.columns / Bfloat16Tiles::depth,
                                               of.out_QD + q_of(step) * of.out_stride,
                                               of.out_stride,
                                               of.out_stride / tile_side};
    };
    const std::int64_t steps = block_count * groups;
    if (steps == 0) return;
    scores_of(0).multiply(0, scores_of(0).columns);
    for (std::int64_t step = 0; step < steps; ++step) {
        const auto scores = scores_of(step + 1 < steps ? step + 1 : step);
        const auto output = output_of(step > 0 ? step - 1 : step);
        const int score_columns = step + 1 < steps ? scores.columns : 0, output_columns = step > 0 ? output.columns : 0;
        if (step > 0) scale_rows(output.c, of.out_stride, output_columns, factor_M[(step + 1) % 2]);
        softmax_step<Bfloat16Tiles, distanced>(
            of.state, q_of(step), product_MN[step % 2], keys_of(step / groups).terms, of.units, p_MN[step % 2],
            factor_M[step % 2], [&](int m) __attribute__((always_inline)) {
                scores.multiply(m * score_columns / M, (m + 1) * score_columns / M);
                output.multiply(m * output_columns / M, (m + 1) * output_columns / M);
            });
    }
    const auto output = output_of(steps - 1);
    scale_rows(output.c, of.out_stride, output.columns, factor_M[(steps - 1) % 2]);
    output.multiply(0, output.columns);
}

}  // namespace
}  // namespace maskattn
