// Scaled dot-product attention of many sequences as plain data, shared by the bindings, the driver that splits it into
// items of work, and the kernels of each instruction set.
//
//   score_ij = s q_i.k_j + b_j - slope ||x_i - x_j||     p_ij = exp(score_ij - lse_i)     out_i = sum_j p_ij v_j
//
// With dO and dlse the gradients of the outputs, delta_i = sum_d dO_id out_id - dlse_i and
// dS_ij = p_ij (dO_i.v_j - delta_i):
//
//   dq_i = s sum_j dS_ij k_j     dk_j = s sum_i dS_ij q_i     dv_j = sum_i p_ij dO_i     dbias_j = sum_i dS_ij
//   dslope = -sum_ij dS_ij ||x_i - x_j||
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/terms.hpp"

namespace maskattn {

// The head widths that the kernels support.
constexpr std::ptrdiff_t least_head_width = 16, most_head_width = 256, head_width_step = 8;

struct Attention : ScoreTerms {
    bool bfloat16;  // dtype of q, k, v, out and their gradients; everything else is float32
    int head_width;
    Strided<const void> q, k, v;
    Strided<void> out;  // forward writes out and lse, backward reads them
    Strided<float> lse;
    Strided<float> lse_rest;  // the rest of lse, lost to rounding; without data: not wanted, or zeros
};

struct Gradients {
    Strided<const void> grad_out;
    Strided<const float> grad_lse;  // without data: zeros
    Strided<void> dq, dk, dv;
    Strided<float> dbias;  // without data: not wanted
};

// A sequence's keys are processed in blocks of eight AVX-512 vectors, each with six rows of a query tile at a time. At
// head width 64 the block's K and V take 32 KiB in bfloat16, which just fits L1, and 64 KiB in float32. Blocks of 64
// keys were 8 % slower in bfloat16 and 3 % in float32: the work per row and block costs more than the misses in L1.
constexpr int block_keys = 128;
// Queries of an item of work. Their output (24 KiB at head width 64) stays in L2 during the loop over all keys, and
// each block of keys, which comes from L2 or L3, is used 16 times.
constexpr int tile_queries = 96;
// The largest number of key blocks of an item of the backward pass. Each item loops over all queries, which come from
// L3, so that more keys per item are better: at head width 64, items of 1,024 keys took 0.86 of the time of items of
// 256 in bfloat16 and 0.9 in float32, although dk and dv of so many keys do not stay in L2.
static constexpr int most_chunk_blocks(int head_width) {
    return (head_width <= 64 ? 1024 : head_width <= 128 ? 512 : 256) / block_keys;
}

// Static like all functions here: of an inline one shared by the units, the linker could keep the newest processor's.
static inline std::int64_t ceil_divide(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// Entry points of one instruction set for one dtype. Sizes are in 32-bit words, multiples of 16; every buffer is
// aligned to 64 bytes.
struct ForwardKernels {
    std::size_t (*block_words)(int head_width);
    std::size_t (*scratch_words)(int head_width);
    // Packs blocks [first, last) of the head's keys into `blocks`, which has space for all of its blocks.
    void (*pack_keys)(const Attention&, const Head&, std::int64_t first, std::int64_t last, std::uint32_t* blocks);
    void (*attend)(const Attention&, const Head&, std::int64_t tile, const std::uint32_t* blocks,
                   std::uint32_t* scratch);
};

// The numbers of query tiles that the previous chunk of keys and this one have completed; nullptr: all.
struct TilesDone {
    const std::int64_t* before;
    std::int64_t* own;
};

// Consecutive blocks of a head's keys.
struct KeyChunk {
    std::int64_t first;
    int blocks;
};

struct BackwardKernels {
    int (*tile_queries)(int head_width);
    std::size_t (*tile_words)(int head_width);
    std::size_t (*scratch_words)(int head_width, int chunk_blocks);
    // Packs a tile of queries for the chunks into `tiles`, which has space for all of the head's tiles.
    void (*pack_queries)(const Attention&, const Gradients&, const Head&, std::int64_t tile, std::uint32_t* tiles);
    // Writes dk, dv and dbias of the chunk's keys and adds to dq of each tile after the previous chunk has; the last
    // chunk writes dq. dslope: by block of the head. The results do not depend on how blocks are divided into chunks.
    void (*take_chunk)(const Attention&, const Gradients&, const Head&, const KeyChunk&, std::uint32_t* tiles,
                       const TilesDone&, double* dslope, std::uint32_t* scratch);
};

struct AttentionKernels {
    ForwardKernels forward_float32, forward_bfloat16;
    BackwardKernels backward_float32, backward_bfloat16;
};

}  // namespace maskattn
