#include "dispatch/instruction_sets.hpp"

namespace maskattn {
namespace {

struct InstructionSet {
    const char* name;
    bool (*usable)();
    const Kernels* kernels;
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

bool always() { return true; }

// Best first.
const InstructionSet known[] = {
#if defined(__x86_64__)
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
