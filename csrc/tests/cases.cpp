#include "tests/cases.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "dispatch/instruction_sets.hpp"

namespace maskattn_tests {

#if defined(__x86_64__)
extern const maskattn::Kernels kernels_in_software;
#endif

namespace {

double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double total = 0.0;
    for (std::size_t d = 0; d < a.size(); ++d) total += a[d] * b[d];
    return total;
}

void add_times(std::vector<double>& to, double factor, const std::vector<double>& x) {
    for (std::size_t d = 0; d < to.size(); ++d) to[d] += factor * x[d];
}

}  // namespace

std::vector<NamedKernels> all_kernels() {
    std::vector<NamedKernels> all;
    for (const std::string& set : maskattn::instruction_sets()) all.push_back({set, *maskattn::kernels_of(set)});
#if defined(__x86_64__)
    if (maskattn::kernels_of("avx512_bf16") != nullptr) all.push_back({"tiles in software", kernels_in_software});
#endif
    return all;
}

std::uint16_t to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float to_float(std::uint16_t bfloat16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

double Tensor::value(bool half, std::size_t i) const {
    return half ? static_cast<double>(to_float(bfloat16[i])) : static_cast<double>(float32[i]);
}

double Random::uniform() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<double>(state_ >> 11) / 4503599627370496.0 - 1.0;
}

Tensor Random::tensor(std::size_t count, bool half) {
    Tensor x;
    for (std::size_t i = 0; i < count; ++i) {
        x.float32.push_back(static_cast<float>(2.0 * uniform()));
        x.bfloat16.push_back(to_bfloat16(x.float32.back()));
        x.exact.push_back(x.value(half, i));
    }
    return x;
}

std::vector<float> Random::floats(std::size_t count, float times) {
    std::vector<float> x(count);
    for (float& value : x) value = times * static_cast<float>(uniform());
    return x;
}

Tensor unwritten(std::size_t count) {
    Tensor x;
    x.float32.assign(count, std::numeric_limits<float>::quiet_NaN());
    x.bfloat16.assign(count, 0x7fc0);
    return x;
}

HeadResults attend(const PlainHead& head) {
    const std::size_t Q = head.q.size(), T = head.k.size(), D = Q ? head.q[0].size() : T ? head.k[0].size() : 0;
    const std::vector<std::vector<double>> rows_Q(Q, std::vector<double>(D)), rows_T(T, std::vector<double>(D));
    const std::vector<std::vector<double>> square(Q, std::vector<double>(T));
    HeadResults x{rows_Q, square, rows_Q, rows_T, rows_T, square, std::vector<double>(Q), std::vector<double>(T), 0.0};
    for (std::size_t i = 0; i < Q; ++i) {
        double most = -std::numeric_limits<double>::infinity(), total = 0.0;
        for (std::size_t j = 0; j < T; ++j) {
            x.score_change[i][j] = head.scale * dot(head.q[i], head.k[j]);
            x.p[i][j] = x.score_change[i][j] + head.key_bias[j] - head.slope * head.distance[i][j];
            most = std::max(most, x.p[i][j]);
        }
        const bool empty = !(most > -std::numeric_limits<double>::infinity());
        for (double& p : x.p[i]) total += p = empty ? 0.0 : std::exp(p - most);
        for (double& p : x.p[i]) p = empty ? 0.0 : p / total;
        x.lse[i] = empty ? most : most + std::log(total);
        std::vector<double> grad_p(T);
        double delta = -head.grad_lse[i];
        for (std::size_t j = 0; j < T; ++j) {
            add_times(x.out[i], x.p[i][j], head.v[j]);
            grad_p[j] = dot(head.grad_out[i], head.v[j]) + head.grad_rows[i][j];
            delta += x.p[i][j] * grad_p[j];
        }
        for (std::size_t j = 0; j < T; ++j) {
            const double ds = x.p[i][j] * (grad_p[j] - delta);
            add_times(x.dq[i], head.scale * ds, head.k[j]);
            add_times(x.dk[j], head.scale * ds, head.q[i]);
            add_times(x.dv[j], x.p[i][j], head.grad_out[i]);
            x.dbias[j] += ds;
            x.dslope -= ds * head.distance[i][j];
        }
    }
    return x;
}

void Comparison::add(double got, double exact) {
    if (std::isinf(exact)) {
        finite_ = finite_ && got == exact;
        return;
    }
    finite_ = finite_ && std::isfinite(got);
    largest_ = std::max(largest_, std::abs(exact));
    error_ = std::max(error_, std::abs(got - exact));
}

bool Comparison::passes() const {
    if (finite_ && error_ <= tolerance_ * std::max(largest_, 1.0)) return true;
    std::fprintf(stderr, "%s: error %.3g, largest %.3g%s\n", name_.c_str(), error_, largest_,
                 finite_ ? "" : ", some not finite");
    return false;
}

}  // namespace maskattn_tests
