// Runs every kernel of every instruction set of this machine on small odd sizes and many threads, for the sanitizers
// (`make sanitize`).
#include <cmath>
#include <cstdio>

#include "packing/coverage.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {

bool coverage_is_right() {
    const std::ptrdiff_t rows = 701, cols = 515;
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(rows * cols), 1);
    const maskattn::Axis y{-3.5, 7.25, 97}, x{0.5, 5.5, 94};
    std::vector<float> fraction(97 * 94);
    maskattn::token_coverage({mask.data(), rows, cols}, y, x, 7, fraction.data());
    Comparison comparison("coverage", 1e-6);
    for (std::size_t r = 1; r + 1 < 97; ++r) comparison.add(static_cast<double>(fraction[r * 94 + 10]), 1.0);
    comparison.add(static_cast<double>(fraction[0]), (7.25 - 3.5) / 7.25);
    return comparison.passes();
}

}  // namespace maskattn_tests

int main() {
    using namespace maskattn_tests;
    bool all = true;
    for (const auto& [name, is_right] : {std::pair<const char*, bool (*)()>{"attention", &attention_is_right},
                                         {"readout", &readout_is_right},
                                         {"relevance", &relevance_is_right},
                                         {"coverage", &coverage_is_right},
                                         {"packing", &packing_is_right},
                                         {"encoder", &encoder_is_right},
                                         {"pictures", &pictures_are_right},
                                         {"chains", &chains_are_right}}) {
        const bool right = is_right();
        std::printf("%s: %s\n", name, right ? "right" : "WRONG");
        all = all && right;
    }
    return all ? 0 : 1;
}
