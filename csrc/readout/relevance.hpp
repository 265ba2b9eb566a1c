// Token relevance: the derivative of every class's score along every token, for scores that depend only on a readout.
//
//   S_ct = sum_r sum_h p_rht [ (v_th - v0_th).g_crh + ((v_th - o_rh).g_crh) s (k_th - k0_th).q_rh ]
//
// With z_rht = s (k_th - k0_th).q_rh it is one matrix product over r, h and d for all classes:
//
//   u_rhtd = p_rht [ v_thd - v0_thd + z_rht (v_thd - o_rhd) ]     S_ct = sum_rhd u_rhtd g_crhd
#pragma once

#include "readout/readout.hpp"

namespace maskattn {

// out and lse are inputs.
struct Relevance : Readout {
    Strided<const void> key_origin, value_origin;  // one row per token and head; without data: 0
    std::int64_t classes;
    Strided<const void> grad_out;  // for each class, with the axes of q
    std::ptrdiff_t grad_out_class;
    float* relevance;  // for each class, contiguous over keys
    std::ptrdiff_t relevance_class;
};

struct RelevanceKernels {
    // The words of the packed gradients of one head of a sequence, and of the scratch of a run of keys.
    std::size_t (*gradient_words)(const Relevance&);
    std::size_t (*scratch_words)(const Relevance&);
    void (*pack_gradients)(const Relevance&, std::int32_t sequence, int head, std::uint32_t* gradients);
    // gradients: those of all heads of the sequence, in order.
    void (*take_run)(const Relevance&, const KeyRun&, const std::uint32_t* gradients, std::uint32_t* scratch);
};

struct RelevanceKernelsByDtype {
    RelevanceKernels float32, bfloat16;
};

}  // namespace maskattn
