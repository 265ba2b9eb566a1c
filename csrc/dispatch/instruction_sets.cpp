#include "dispatch/instruction_sets.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace maskattn {
namespace {

struct InstructionSet {
    const char* name;
    bool (*usable)();
    const Kernels* kernels;
};

#if defined(__x86_64__)
// Linux saves tiles only for processes that have asked for it, since they take 8 KiB a thread. It refuses where a signal
// stack is too small for them.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
#else
    return false;
#endif
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx_bf16() {
    constexpr unsigned features = 7, bfloat16 = 1u << 22, tiles = 1u << 24;  // in EDX; older compilers have no names
    unsigned a = 0, b = 0, c = 0, d = 0;
    static const bool usable = has_avx512_bf16() && __get_cpuid_count(features, 0, &a, &b, &c, &d) != 0 &&
                               (d & bfloat16) != 0 && (d & tiles) != 0 && may_use_tiles();
    return usable;
}
#endif

bool always() { return true; }

// Best first.
const InstructionSet known[] = {
#if defined(__x86_64__)
    {"amx_bf16", &has_amx_bf16, &kernels_amx_bf16},
    {"avx512_bf16", &has_avx512_bf16, &kernels_avx512_bf16},
    {"avx512", &has_avx512, &kernels_avx512},
    {"avx2", &has_avx2, &kernels_avx2},
#endif
    {"portable", &always, &kernels_portable},
};

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& set : known)
        if (set.usable()) names.emplace_back(set.name);
    return names;
}

const Kernels* kernels_of(const std::string& instruction_set) {
    for (const InstructionSet& set : known)
        if ((instruction_set.empty() || instruction_set == set.name) && set.usable()) return set.kernels;
    return nullptr;
}

}  // namespace maskattn
