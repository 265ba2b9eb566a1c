// The attention score. Forward, backward, readout, its gradient and token relevance compute scores, probabilities and
// their gradients only by these functions, so that a new term is added in terms.hpp and here.
//
//   score = s q.k + b - slope ||x - y||     p = e^(score - lse)     dscore = p (dp - delta)
//
// Attention without bias or positions keeps scores in units of ln 2, s log2(e) q.k, so that scaling them and
// subtracting the largest take one instruction. With a bias or positions, scores are natural, s q.k + b - slope
// ||x - y||, and their difference from the largest is converted to units of ln 2: a bias that many keys share then costs
// no more digits than float32 must, and the largest and lowest floats do not overflow. Readout's scores, whose scale is
// in the queries already, are always natural.
#pragma once

#include "attention/attention.hpp"
#include "simd/vectors.hpp"

namespace maskattn {
namespace {

constexpr float infinity = __builtin_inff();

// Returns the distances of a position from `lanes` others, 0 where either is missing (NaN).
MASKATTN_INLINE Floats distances(float x, float y, const float* others_x, const float* others_y) {
    const Floats across = x - load<Floats>(others_x), down = y - load<Floats>(others_y);
    const Floats squared = across * across + down * down;
    return squared > 0.0f ? square_root(squared) : Floats{};
}

// The factors of products and distances in a head's scores, and of differences of scores in exponents of two.
struct ScoreUnits {
    float product;
    float distance;
    float difference;
};

MASKATTN_INLINE bool only_products(const Attention& a) { return !a.key_bias.data && !a.slopes.data; }

// Returns whether the largest score must be found among scores instead of products: with a bias or a negative scale,
// the largest product need not have the largest score.
MASKATTN_INLINE bool forms_scores(const Attention& a) { return a.key_bias.data || a.scale < 0.0f; }

MASKATTN_INLINE ScoreUnits units_of(const Attention& a, const Head& head) {
    if (only_products(a)) return {a.scale * log2_e, 0.0f, 1.0f};
    return {a.scale, a.slopes.data ? *row_of(a.slopes, head, 0) : 0.0f, log2_e};
}

// The units for products with queries that include the scale already.
MASKATTN_INLINE ScoreUnits units_of_scaled(const Attention& a, int head) {
    return {1.0f, a.slopes.data ? *row_of(a.slopes, 0, head, 0) : 0.0f, log2_e};
}

// A query's scores of `lanes` keys, and the distances in them.
struct Score {
    Floats value, distance;
};

// Computes scores from a query's products with `lanes` keys, with a bias if `biased` and distances if `distanced`.
template <bool biased, bool distanced>
MASKATTN_INLINE Score score(Floats product, Floats bias, Floats distance, const ScoreUnits& units) {
    Floats value = product * units.product;
    if constexpr (biased) value += bias;
    if constexpr (distanced) value -= distance * units.distance;
    return {value, distance};
}

// Multiplies x by the derivative of scores by their scaled products, which is 1, since the other terms are added.
MASKATTN_INLINE Floats along_product(const Score&, Floats x) { return x; }

// The gradients of the scaled products, of the bias, and of the slope with its sign changed, given those of the
// probabilities, whose mean over the query's keys is delta.
struct ScoreGradient {
    Floats product, bias, slope;
};

MASKATTN_INLINE ScoreGradient score_gradient(const Score& of, Floats p, Floats grad_p, float delta) {
    const Floats ds = p * (grad_p - delta);
    return {along_product(of, ds), ds, ds * of.distance};
}

// Returns lse, or +inf for a query without keys, so that its probabilities are 0.
MASKATTN_INLINE float lse_to_subtract(float lse) { return lse == -infinity ? infinity : lse; }

// Computes the probabilities of natural scores.
MASKATTN_INLINE Floats probability(Floats score, float lse, float rest) { return exponential(score - lse - rest); }

// Computes the probabilities of scores in these units, in which lse is too; its rest is in units of ln 2. Scores that
// are bare products have no rest.
template <bool bare>
MASKATTN_INLINE Floats probability(Floats score, float lse, float rest, ScoreUnits units) {
    const Floats beyond = score - lse;
    return power_of_two(bare ? beyond : beyond * units.difference - rest);
}

// A query's largest score so far, and the base that is subtracted from scores, which is 0 without a key so far.
struct Largest {
    float score, base;
};

MASKATTN_INLINE Largest larger_of(float before, float found) {
    const float now = found > before ? found : before;
    return {now, now == -infinity ? 0.0f : now};
}

// Writes lse = log(`total` e^largest), -inf without keys, and its rest, which rounding took from it. The sum of both
// shows how many keys share the largest score, however large it is.
MASKATTN_INLINE void write_lse(double largest, float total, float* lse, float* rest) {
    const double logarithm = __builtin_log(static_cast<double>(total));
    *lse = total == 0.0f ? -infinity : static_cast<float>(largest + logarithm);
    if (rest) *rest = total == 0.0f ? 0.0f : static_cast<float>(largest - static_cast<double>(*lse) + logarithm);
}

}  // namespace
}  // namespace maskattn
