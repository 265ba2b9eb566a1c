// The attention score, written once: forward, backward, readout, its gradient and token relevance make scores,
// probabilities and their gradients here and nowhere else, so a new term of the score is added here, after terms.hpp.
//
//   score = s q.k + b - slope ||x - y||     p = e^(score - lse)     dscore = p (dp - delta)
//
// Attention keeps scores of products alone in units of ln 2, s log2(e) q.k, so that scaling them and subtracting the
// largest is one instruction, whatever is subtracted. With a bias or positions they are s q.k + b - slope ||x - y||,
// which is all that float32 knows of them, and the largest is subtracted before the difference is turned into units of
// ln 2: a bias that many keys share costs no more digits than it must, and the largest and lowest floats do not
// overflow. Readout's scores, whose scale is in the queries already, always have the unit of e.
#pragma once

#include "attention/attention.hpp"
#include "simd/vectors.hpp"

namespace maskattn {
namespace {

constexpr float infinity = __builtin_inff();

// Distance of a position from `lanes` others, 0 where either has none (NaN).
MASKATTN_INLINE Floats distances(float x, float y, const float* others_x, const float* others_y) {
    const Floats across = x - load<Floats>(others_x), down = y - load<Floats>(others_y);
    const Floats squared = across * across + down * down;
    return squared > 0.0f ? square_root(squared) : Floats{};
}

// What products and distances count in a head's scores, and a score's difference from another in powers of two.
struct ScoreUnits {
    float product;
    float distance;
    float difference;
};

MASKATTN_INLINE bool only_products(const Attention& a) { return !a.key_bias.data && !a.slopes.data; }

// Whether scores must be formed before the largest is known: the largest product is not the largest score's where a bias
// is added or the scale is below 0.
MASKATTN_INLINE bool forms_scores(const Attention& a) { return a.key_bias.data || a.scale < 0.0f; }

MASKATTN_INLINE ScoreUnits units_of(const Attention& a, const Head& head) {
    if (only_products(a)) return {a.scale * log2_e, 0.0f, 1.0f};
    return {a.scale, a.slopes.data ? *row_of(a.slopes, head, 0) : 0.0f, log2_e};
}

// Of products with queries that have the scale in them already.
MASKATTN_INLINE ScoreUnits units_of_scaled(const Attention& a, int head) {
    return {1.0f, a.slopes.data ? *row_of(a.slopes, 0, head, 0) : 0.0f, log2_e};
}

// One query's scores of `lanes` keys, and the distances that entered them.
struct Score {
    Floats value, distance;
};

// Scores of one query's products with `lanes` keys. What is not `biased` or not `distanced` has no such term.
template <bool biased, bool distanced>
MASKATTN_INLINE Score score(Floats product, Floats bias, Floats distance, const ScoreUnits& units) {
    Floats value = product * units.product;
    if constexpr (biased) value += bias;
    if constexpr (distanced) value -= distance * units.distance;
    return {value, distance};
}

// x times the derivative of scores by their scaled products, which is 1: all other terms are added to these.
MASKATTN_INLINE Floats along_product(const Score&, Floats x) { return x; }

// What comes back to scores from what came back to their probabilities (delta is the query's mean of it), and from there
// to each term: to the scaled products, to the bias, and to the slope with its sign changed.
struct ScoreGradient {
    Floats product, bias, slope;
};

MASKATTN_INLINE ScoreGradient score_gradient(const Score& of, Floats p, Floats grad_p, float delta) {
    const Floats ds = p * (grad_p - delta);
    return {along_product(of, ds), ds, ds * of.distance};
}

// lse, +inf for a query without keys so that its probabilities are 0.
MASKATTN_INLINE float lse_to_subtract(float lse) { return lse == -infinity ? infinity : lse; }

// Probabilities of scores in units of e.
MASKATTN_INLINE Floats probability(Floats score, float lse, float rest) { return exponential(score - lse - rest); }

// Probabilities of scores in these units; lse is in them too, its rest in units of ln 2. Scores of products alone have
// no rest.
template <bool bare>
MASKATTN_INLINE Floats probability(Floats score, float lse, float rest, ScoreUnits units) {
    const Floats beyond = score - lse;
    return power_of_two(bare ? beyond : beyond * units.difference - rest);
}

// A query's largest score so far, and what scores are taken relative to: 0 where there is no key so far.
struct Largest {
    float score, base;
};

MASKATTN_INLINE Largest larger_of(float before, float found) {
    const float now = found > before ? found : before;
    return {now, now == -infinity ? 0.0f : now};
}

// The logarithm of `total` e^largest, -inf where there is nothing, and what rounding took from it. Large as the score
// may be, their sum tells how many keys share it.
MASKATTN_INLINE void write_lse(double largest, float total, float* lse, float* rest) {
    const double logarithm = __builtin_log(static_cast<double>(total));
    *lse = total == 0.0f ? -infinity : static_cast<float>(largest + logarithm);
    if (rest) *rest = total == 0.0f ? 0.0f : static_cast<float>(largest - static_cast<double>(*lse) + logarithm);
}

}  // namespace
}  // namespace maskattn
