// Vectors of the instruction set that the including translation unit is compiled for.
//
// One source serves every instruction set, since each unit has its own compiler flags. All names have internal linkage,
// and nothing here instantiates a template of std, so that the linker never keeps code compiled for a newer processor in
// place of code for an older one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/inline.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace maskattn {
namespace {

// lanes: floats in a vector. tile_vectors: vectors in a row of a register tile of `tile_rows` rows, as many as fit the
// registers together with the operands: 6 x 4 of 32 registers, 6 x 2 of 16.
#if defined(__AVX512F__)
constexpr int lanes = 16;
constexpr int tile_vectors = 4;
#elif defined(__AVX2__)
constexpr int lanes = 8;
constexpr int tile_vectors = 2;
#else
constexpr int lanes = 4;
constexpr int tile_vectors = 2;
#endif
constexpr int tile_rows = 6;

typedef float Floats __attribute__((vector_size(lanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(lanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(lanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(lanes * 2)));

// Rounds a count up to whole vectors.
constexpr int padded(int count) { return (count + lanes - 1) / lanes * lanes; }

template <class Vector>
MASKATTN_INLINE Vector load(const void* from) {
    Vector x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

template <class Vector>
MASKATTN_INLINE void store(void* to, Vector x) {
    __builtin_memcpy(to, &x, sizeof x);
}

// Loads the first `count` elements, with zeros after them, without reading past them.
template <class Vector>
MASKATTN_INLINE Vector load_first(const void* from, int count) {
    Vector x{};
    __builtin_memcpy(&x, from, static_cast<std::size_t>(count) * sizeof x[0]);
    return x;
}

MASKATTN_INLINE Floats broadcast(float x) { return Floats{} + x; }
MASKATTN_INLINE Words broadcast(std::uint32_t x) { return Words{} + x; }

template <int... index>
struct Indices {};

#if defined(__AVX512F__)
using EachLane = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using EachLane = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using EachLane = Indices<0, 1, 2, 3>;
#endif

template <int distance, int... lane>
MASKATTN_INLINE Floats swap_lanes(Floats x, Indices<lane...>) {
    return __builtin_shufflevector(x, x, (lane ^ distance)...);
}

// Returns b where either is NaN; a NaN among the scores still shows in their sum.
MASKATTN_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
    return Floats(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
    return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#else
    return a > b ? a : b;
#endif
}

template <int distance = lanes / 2>
MASKATTN_INLINE float largest(Floats x) {
    x = maximum(x, swap_lanes<distance>(x, EachLane{}));
    if constexpr (distance > 1) return largest<distance / 2>(x);
    return x[0];
}

template <int distance = lanes / 2>
MASKATTN_INLINE float sum(Floats x) {
    x += swap_lanes<distance>(x, EachLane{});
    if constexpr (distance > 1) return sum<distance / 2>(x);
    return x[0];
}

MASKATTN_INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
    return Floats(_mm512_sqrt_ps(__m512(x)));
#elif defined(__AVX2__)
    return Floats(_mm256_sqrt_ps(__m256(x)));
#elif defined(__SSE2__)
    return Floats(_mm_sqrt_ps(__m128(x)));
#else
    for (int i = 0; i < lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

constexpr float log2_e = 1.44269504088896340736f;
constexpr double ln_2 = 0.69314718055994530942;

// Computes 2^x for x < 127, 0 below about -126. With n = floor(x) and f = x - n the result is 2^n times a polynomial of
// degree 5 for 2^f, 1 at f = 0, whose relative error is at most 8.3e-8 over [0, 1], 1.7e-7 with the roundings of
// float32. For results that are rounded to bfloat16 its degree is 3, and its error 8.6e-5.
template <bool rounded = false>
MASKATTN_INLINE Floats power_of_two(Floats x) {
#if defined(__AVX512F__)
    constexpr int fraction_below = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const Floats f = Floats(_mm512_reduce_ps(__m512(x), fraction_below));
#else
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits; subtracting a half first makes it the floor, or at a
    // tie one less with f = 1. At -126.5 n is -127, for which the bits of the exponent are 0.
    x = maximum(broadcast(-126.5f), x);
    const Floats shifted = (x - 0.5f) + 12582912.0f;
    const Floats f = x - (shifted - 12582912.0f);
#endif
    Floats p;
    if constexpr (rounded) {
        p = (f * 7.706699e-02f + 0.22764505f) * f + 0.69511677f;
    } else {
        p = f * 1.8671300495043397e-03f + 9.017030708491802e-03f;
        p = p * f + 5.579991266131401e-02f;
        p = p * f + 0.24016444385051727f;
        p = p * f + 0.6931512951850891f;
    }
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return Floats(_mm512_scalef_ps(__m512(p), __m512(x)));
#else
    return p * Floats((Ints(shifted) << 23) + (127 << 23));
#endif
}

// Computes e^x for x < 88, 0 below about -87; the rounding of x log2 e adds 8e-8 |x| to the relative error of 2^x.
MASKATTN_INLINE Floats exponential(Floats x) { return power_of_two(x * log2_e); }

// Rounds to nearest, ties to even; NaN stays NaN. A unit in bfloat16's last place is 2^16 in the bits of float32.
MASKATTN_INLINE Halves to_bfloat16(Floats x) {
#if defined(__AVX512BF16__)
    return Halves(_mm512_cvtneps_pbh(__m512(x)));
#else
    const Words bits = Words(x);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words quiet = bits | 0x400000u;
    return __builtin_convertvector((x == x ? rounded : quiet) >> 16, Halves);
#endif
}

MASKATTN_INLINE Floats from_bfloat16(Halves x) {
#if defined(__AVX512F__)
    return Floats(Words(_mm512_cvtepu16_epi32(__m256i(x))) << 16);  // GCC 12 splits the conversion below in halves
#else
    return Floats(__builtin_convertvector(x, Words) << 16);
#endif
}

template <int distance, int... lane>
MASKATTN_INLINE void exchange(Words& a, Words& b, Indices<lane...>) {
    const Words low = __builtin_shufflevector(a, b, ((lane & distance) ? lanes + lane - distance : lane)...);
    const Words high = __builtin_shufflevector(a, b, ((lane & distance) ? lanes + lane : lane + distance)...);
    a = low;
    b = high;
}

// Transposes a square of lanes x lanes words.
template <int distance = lanes / 2>
MASKATTN_INLINE void transpose(Words (&square)[lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
        if ((i & distance) == 0) exchange<distance>(square[i], square[i + distance], EachLane{});
    if constexpr (distance > 1) transpose<distance / 2>(square);
}

}  // namespace
}  // namespace maskattn
