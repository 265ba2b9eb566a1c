// GELU, in its exact form and in the one with tanh.
#pragma once

#include "encoder/encoder.hpp"
#include "simd/vectors.hpp"

namespace maskattn {
namespace {

// Evaluates c0 + c1 t + c2 t^2 + ...
template <int count>
MASKATTN_INLINE Floats polynomial(const float (&c)[count], Floats t) {
    Floats y = broadcast(c[count - 1]);
#pragma GCC unroll 8
    for (int i = count - 2; i >= 0; --i) y = y * t + c[i];
    return y;
}

// Computes a / b. For results that are rounded to bfloat16, a reciprocal to 6e-5 is quicker than a division.
template <bool rounded>
MASKATTN_INLINE Floats quotient(Floats a, Floats b) {
#if defined(__AVX512F__)
    if constexpr (rounded) return a * Floats(_mm512_rcp14_ps(__m512(b)));
#endif
    return a / b;
}

// Computes x / (1 + 2^-u).
template <bool rounded>
MASKATTN_INLINE Floats logistic_share(Floats x, Floats u) {
    return quotient<rounded>(x, power_of_two<rounded>(-maximum(broadcast(-126.0f), u)) + 1.0f);
}

// Computes x Phi(x) for results that are rounded to bfloat16, as x / (1 + 2^(-x g(x^2))), whose relative error is small
// for x < 0 too. g was fitted for the least error in units of 2^-9 |x Phi(x)| + 2e-5, half of what rounding may take;
// it is at most a fifth of one. Beyond |x| = 6.9, where Phi is 0 or 1 to 3e-12, g no longer grows.
MASKATTN_INLINE Floats rounded_gelu(Floats x) {
    const Floats t = -maximum(broadcast(-48.0f), -(x * x));
    return logistic_share<true>(x, x * ((t * -0.00111961563f + 0.107552275f) * t + 2.3001225f));
}

// Computes x Phi(x). Phi(x) - 1/2 is x P(x^2) / Q(x^2) for |x| up to 5.3, where it is 1/2 to 6e-8. The quotient was
// fitted for the least absolute error, which is 4.1e-9; with the roundings of float32 the result is off by at most
// 2.0e-7 |x|, beside 2.3e-7 |x| of torch's.
MASKATTN_INLINE Floats gelu(Floats x) {
    constexpr float most = 5.3f;
    constexpr float p[] = {0.3989422619342804f,    0.032935820519924164f,  0.004627995193004608f,
                           0.0001603348064236343f, 6.379051228577737e-06f, 2.4050178737411443e-08f};
    constexpr float q[] = {1.0f,                    0.24922409653663635f,   0.028138844296336174f,
                           0.0018365733558312058f, 7.135235500754789e-05f, 1.2371640423225472e-06f};
    const Floats bounded = maximum(broadcast(-most), x);  // NaN stays NaN
    const Floats near = -maximum(broadcast(-most), -bounded);
    const Floats t = near * near;
    return bounded * (near * polynomial(p, t) / polynomial(q, t) + 0.5f);
}

// Computes x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2.
template <bool rounded>
MASKATTN_INLINE Floats gelu_tanh(Floats x) {
    return logistic_share<rounded>(x, x * (x * x * 0.10294324f + 2.3022082f));
}

// Computes the activation of values that are stored as Value.
template <Activation activation, class Value>
MASKATTN_INLINE Floats activated(Floats x) {
    constexpr bool rounded = sizeof(Value) == 2;
    if constexpr (activation == Activation::gelu) return rounded ? rounded_gelu(x) : gelu(x);
    if constexpr (activation == Activation::gelu_tanh) return gelu_tanh<rounded>(x);
    return x;
}

// Calls compute with the activation as a type.
template <Activation activation>
struct Activating {
    static constexpr Activation value = activation;
};

template <class Compute>
MASKATTN_INLINE void with_activation(Activation activation, Compute compute) {
    switch (activation) {
        case Activation::none: return compute(Activating<Activation::none>{});
        case Activation::gelu: return compute(Activating<Activation::gelu>{});
        case Activation::gelu_tanh: return compute(Activating<Activation::gelu_tanh>{});
    }
}

}  // namespace
}  // namespace maskattn
