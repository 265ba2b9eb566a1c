// What one thread's arithmetic units can do at most: independent chains of fused multiply-adds, and of bfloat16 products,
// in the tiles of AMX or else in vectors, where the processor has them. Prints GFLOP/s, one line a dtype.
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <immintrin.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef __AVX512F__
using Floats = __m512;
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats multiply_add(Floats sum, Floats x) { return _mm512_fmadd_ps(sum, x, x); }
#else
using Floats = __m256;
inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats multiply_add(Floats sum, Floats x) { return _mm256_fmadd_ps(sum, x, x); }
#endif

constexpr int lanes = sizeof(Floats) / sizeof(float);
constexpr int chains = 12;  // more than latency times issue width

template <class Step>
double gflops(double flops_of_lane, Step step) {
    double best = 0;
    for (int round = 0; round < 9; ++round) {
        Floats sum[chains];
#pragma GCC unroll 12
        for (int c = 0; c < chains; ++c) sum[c] = broadcast(1.0f);
        const std::clock_t start = std::clock();  // processor time: others on the machine do not count
        constexpr long steps = 5'000'000;
        for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 12
            for (int c = 0; c < chains; ++c) {
                sum[c] = step(sum[c]);
                asm volatile("" : "+v"(sum[c]));  // not to be folded away
            }
        }
        const double took = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
        const double rate = flops_of_lane * lanes * chains * steps / took / 1e9;
        best = rate > best ? rate : best;
    }
    return best;
}

#ifdef __AMX_BF16__
double gflops_of_tiles() {
    constexpr long ask_for_state = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, ask_for_state, tile_data) != 0) return 0;
    struct alignas(64) {
        std::uint8_t palette = 1, first_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    double best = 0;
    for (int round = 0; round < 9; ++round) {
        const std::clock_t start = std::clock();
        constexpr long steps = 2'000'000;
        for (long i = 0; i < steps; ++i) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        const double took = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
        const double rate = 4.0 * 2 * 16 * 16 * 32 * steps / took / 1e9;
        best = rate > best ? rate : best;
    }
    _tile_release();
    return best;
}
#endif

int main() {
    const Floats factor = broadcast(0.999f);
    std::printf("float32 %.1f\n", gflops(2, [=](Floats sum) { return multiply_add(sum, factor); }));
#ifdef __AMX_BF16__
    std::printf("bfloat16 %.1f\n", gflops_of_tiles());
#elif defined(__AVX512BF16__)
    const __m512bh halves = _mm512_cvtne2ps_pbh(factor, factor);
    std::printf("bfloat16 %.1f\n", gflops(4, [=](Floats sum) { return _mm512_dpbf16_ps(sum, halves, halves); }));
#endif
}
