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

// Computes a / b. For results that are rounded to bfloat16, a reciprocal to 6e-5 is refined once, to about 1e-7, which is
// quicker than a division. It must be refined, since GELU of x < 0 is the small difference of a quotient and 1/2.
template <bool rounded>
MASKATTN_INLINE Floats quotient(Floats a, Floats b) {
#if defined(__AVX512F__)
    if constexpr (rounded) {
        const Floats rough = Floats(_mm512_rcp14_ps(__m512(b)));
        return a * (rough * (2.0f - b * rough));
    }
#endif
    return a / b;
}

// Computes x Phi(x). Phi(x) - 1/2 is x P(x^2) / Q(x^2) for |x| up to 5.3, where it is 1/2 to 6e-8. The quotient was
// fitted for the least absolute error, which is 4.1e-9; with the roundings of float32 the result is off by at most
// 2.0e-7 |x|, beside 2.3e-7 |x| of torch's.
template <bool rounded>
MASKATTN_INLINE Floats gelu(Floats x) {
    constexpr float most = 5.3f;
    constexpr float p[] = {0.3989422619342804f,    0.032935820519924164f,  0.004627995193004608f,
                           0.0001603348064236343f, 6.379051228577737e-06f, 2.4050178737411443e-08f};
    constexpr float q[] = {1.0f,                    0.24922409653663635f,   0.028138844296336174f,
                           0.0018365733558312058f, 7.135235500754789e-05f, 1.2371640423225472e-06f};
    const Floats bounded = maximum(broadcast(-most), x);  // NaN stays NaN
    const Floats near = -maximum(broadcast(-most), -bounded);
    const Floats t = near * near;
    return bounded * (quotient<rounded>(near * polynomial(p, t), polynomial(q, t)) + 0.5f);
}

// Computes x / (1 + e^(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2.
template <bool rounded>
MASKATTN_INLINE Floats gelu_tanh(Floats x) {
    const Floats twice_u = x * (x * x * 0.07135481282553375f + 1.5957691216057308f);
    return quotient<rounded>(x, exponential(-maximum(broadcast(-80.0f), twice_u)) + 1.0f);
}

// Computes the activation of values that are stored as Value.
template <Activation activation, class Value>
MASKATTN_INLINE Floats activated(Floats x) {
    constexpr bool rounded = sizeof(Value) == 2;
    if constexpr (activation == Activation::gelu) return gelu<rounded>(x);
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
