// Readout and token relevance of packed sequences against the plain loop.
#include <cmath>
#include <limits>

#include "readout/driver.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {
namespace {

constexpr int heads = 4, classes = 21;
constexpr double tolerances[] = {1e-5, 3e-2};  // of float32 and bfloat16; tests/native checks the accuracy

// The longest is cut into several runs at the larger head widths.
const std::vector<std::int32_t> starts{0, 5, 5, 6, 136, 736};
const std::size_t sequences = starts.size() - 1, keys = 736;

struct Problem {
    bool half;
    std::size_t queries, width;
    Tensor q, k, v, grad_out, out, dq, dk, dv, origins, class_gradients;
    std::vector<float> lse, rows, grad_lse, grad_rows, bias, dbias, coords_q, coords_k, slopes, relevance;

    Problem(bool is_half, std::size_t R, std::size_t D) : half(is_half), queries(R), width(D) {
        Random random(R * 1000 + D);
        const std::size_t words_q = sequences * R * heads * D, words_k = keys * heads * D;
        q = random.tensor(words_q, half), grad_out = random.tensor(words_q, half);
        k = random.tensor(words_k, half), v = random.tensor(words_k, half), origins = random.tensor(words_k, half);
        class_gradients = random.tensor(classes * words_q, half);
        out = unwritten(words_q), dq = unwritten(words_q), dk = unwritten(words_k), dv = unwritten(words_k);
        lse.assign(sequences * R * heads, 0.0f), rows.assign(R * heads * keys, 0.0f);
        dbias.assign(keys * heads, 0.0f), relevance.assign(classes * keys, 0.0f);
        grad_lse = random.floats(lse.size(), 1.0f), grad_rows = random.floats(rows.size(), 1.0f);
        bias = random.floats(keys * heads, 1.0f), slopes = random.floats(heads, 0.2f);
        coords_q = random.floats(sequences * R * 2, 9.0f), coords_k = random.floats(keys * 2, 9.0f);
        coords_k[1] = std::numeric_limits<float>::quiet_NaN();
    }

    template <class Value>
    maskattn::Strided<Value> like_q(Value* data) const {
        const auto D = static_cast<std::ptrdiff_t>(width), R = static_cast<std::ptrdiff_t>(queries);
        return {data, R * heads * D, D, heads * D};
    }
    template <class Value>
    maskattn::Strided<Value> like_k(Value* data) const {
        const auto D = static_cast<std::ptrdiff_t>(width);
        return {data, 0, D, heads * D};
    }
    template <class Value>
    maskattn::Strided<Value> like_lse(Value* data) const {
        return {data, static_cast<std::ptrdiff_t>(queries) * heads, 1, heads};
    }
    template <class Value>
    maskattn::Strided<Value> like_rows(Value* data) const {
        return {data, 0, std::ptrdiff_t{keys}, std::ptrdiff_t{keys} * heads};
    }

    maskattn::Readout readout() {
        maskattn::Readout a{};
        a.bfloat16 = half, a.head_width = static_cast<int>(width), a.scale = 0.3f;
        a.heads = heads, a.queries = static_cast<int>(queries);
        a.q = like_q<const void>(q.data(half)), a.k = like_k<const void>(k.data(half));
        a.v = like_k<const void>(v.data(half)), a.out = like_q<void>(out.data(half)), a.lse = like_lse(lse.data());
        a.key_bias = {bias.data(), 0, 1, heads};
        a.coords_q = {coords_q.data(), static_cast<std::ptrdiff_t>(queries) * 2, 0, 2};
        a.coords_k = {coords_k.data(), 0, 0, 2}, a.slopes = {slopes.data(), 0, 1, 0};
        a.rows = like_rows(rows.data());
        return a;
    }

    maskattn::ReadoutGradients gradients() {
        maskattn::ReadoutGradients g{};
        g.grad_out = like_q<const void>(grad_out.data(half)), g.dq = like_q<void>(dq.data(half));
        g.dk = like_k<void>(dk.data(half)), g.dv = like_k<void>(dv.data(half));
        g.grad_lse = like_lse<const float>(grad_lse.data()), g.grad_rows = like_rows<const float>(grad_rows.data());
        g.dbias = {dbias.data(), 0, 1, heads};
        return g;
    }

    // One origin per token, the same for values as for keys.
    maskattn::Relevance all_of_relevance() {
        maskattn::Relevance a{};
        static_cast<maskattn::Readout&>(a) = readout();
        a.key_origin = a.value_origin = like_k<const void>(origins.data(half));
        a.classes = classes;
        a.grad_out = like_q<const void>(class_gradients.data(half));
        a.grad_out_class = static_cast<std::ptrdiff_t>(sequences * queries * heads * width);
        a.relevance = relevance.data(), a.relevance_class = std::ptrdiff_t{keys};
        return a;
    }

    std::size_t q_at(std::size_t b, std::size_t r, std::size_t h) const {
        return ((b * queries + r) * heads + h) * width;
    }
    std::vector<double> row(const Tensor& x, std::size_t at) const {
        const auto begin = x.exact.begin() + static_cast<std::ptrdiff_t>(at);
        return {begin, begin + static_cast<std::ptrdiff_t>(width)};
    }
};

PlainHead head_of(const Problem& p, std::size_t b, std::size_t h) {
    PlainHead head{};
    head.scale = static_cast<double>(0.3f);
    head.slope = static_cast<double>(p.slopes[h]);
    const auto first = static_cast<std::size_t>(starts[b]), end = static_cast<std::size_t>(starts[b + 1]);
    for (std::size_t t = first; t < end; ++t) {
        head.k.push_back(p.row(p.k, (t * heads + h) * p.width));
        head.v.push_back(p.row(p.v, (t * heads + h) * p.width));
        head.key_bias.push_back(static_cast<double>(p.bias[t * heads + h]));
    }
    for (std::size_t r = 0; r < p.queries; ++r) {
        head.q.push_back(p.row(p.q, p.q_at(b, r, h)));
        head.grad_out.push_back(p.row(p.grad_out, p.q_at(b, r, h)));
        head.grad_lse.push_back(static_cast<double>(p.grad_lse[(b * p.queries + r) * heads + h]));
        std::vector<double> distance, grad_row;
        for (std::size_t t = first; t < end; ++t) {
            const float* position = p.coords_q.data() + (b * p.queries + r) * 2;
            const double length = std::hypot(static_cast<double>(position[0] - p.coords_k[t * 2]),
                                             static_cast<double>(position[1] - p.coords_k[t * 2 + 1]));
            distance.push_back(std::isnan(length) ? 0.0 : length);
            grad_row.push_back(static_cast<double>(p.grad_rows[(r * heads + h) * keys + t]));
        }
        head.distance.push_back(distance);
        head.grad_rows.push_back(grad_row);
    }
    return head;
}

bool readout_agrees(const Problem& p, const std::vector<double>& dslopes, const std::string& name) {
    const double tolerance = tolerances[p.half];
    Comparison out(name + " out", tolerance), lse(name + " lse", tolerance), rows(name + " rows", tolerance);
    Comparison dq(name + " dq", tolerance), dk(name + " dk", tolerance), dv(name + " dv", tolerance);
    Comparison dbias(name + " dbias", tolerance), dslope(name + " dslope", 10 * tolerance);
    for (std::size_t h = 0; h < heads; ++h) {
        double exact_dslope = 0.0;
        for (std::size_t b = 0; b < sequences; ++b) {
            const HeadResults exact = attend(head_of(p, b, h));
            const auto first = static_cast<std::size_t>(starts[b]);
            exact_dslope += exact.dslope;
            for (std::size_t r = 0; r < p.queries; ++r) {
                lse.add(static_cast<double>(p.lse[(b * p.queries + r) * heads + h]), exact.lse[r]);
                for (std::size_t d = 0; d < p.width; ++d) {
                    const bool empty = exact.dbias.empty();
                    out.add(p.out.value(p.half, p.q_at(b, r, h) + d), empty ? 0.0 : exact.out[r][d]);
                    dq.add(p.dq.value(p.half, p.q_at(b, r, h) + d), empty ? 0.0 : exact.dq[r][d]);
                }
                for (std::size_t t = 0; t < exact.dbias.size(); ++t)
                    rows.add(static_cast<double>(p.rows[(r * heads + h) * keys + first + t]), exact.p[r][t]);
            }
            for (std::size_t t = 0; t < exact.dbias.size(); ++t) {
                const std::size_t at = ((first + t) * heads + h) * p.width;
                dbias.add(static_cast<double>(p.dbias[(first + t) * heads + h]), exact.dbias[t]);
                for (std::size_t d = 0; d < p.width; ++d) {
                    dk.add(p.dk.value(p.half, at + d), exact.dk[t][d]);
                    dv.add(p.dv.value(p.half, at + d), exact.dv[t][d]);
                }
            }
        }
        dslope.add(dslopes[h], exact_dslope);
    }
    bool all = true;
    for (const Comparison* each : {&out, &lse, &rows, &dq, &dk, &dv, &dbias, &dslope}) all = each->passes() && all;
    return all;
}

bool relevance_agrees(const Problem& p, const std::string& name) {
    std::vector<double> expected(classes * keys, 0.0);
    const std::size_t class_words = sequences * p.queries * heads * p.width;
    for (std::size_t b = 0; b < sequences; ++b)
        for (std::size_t h = 0; h < heads; ++h) {
            const PlainHead head = head_of(p, b, h);
            const HeadResults exact = attend(head);
            const auto first = static_cast<std::size_t>(starts[b]);
            for (std::size_t t = 0; t < head.k.size(); ++t) {
                const std::vector<double> origin = p.row(p.origins, ((first + t) * heads + h) * p.width);
                for (std::size_t r = 0; r < p.queries; ++r) {
                    double z = exact.score_change[r][t];
                    for (std::size_t d = 0; d < p.width; ++d) z -= head.scale * origin[d] * head.q[r][d];
                    for (std::size_t c = 0; c < classes; ++c)
                        for (std::size_t d = 0; d < p.width; ++d) {
                            const double value = head.v[t][d], change = value - origin[d] + z * (value - exact.out[r][d]);
                            const double g = p.class_gradients.exact[c * class_words + p.q_at(b, r, h) + d];
                            expected[c * keys + first + t] += exact.p[r][t] * change * g;
                        }
                }
            }
        }
    Comparison relevance(name, tolerances[p.half]);
    for (std::size_t i = 0; i < expected.size(); ++i) relevance.add(static_cast<double>(p.relevance[i]), expected[i]);
    return relevance.passes();
}

template <class Check>
bool in_all_ways(const char* operation, Check check) {
    bool all = true;
    for (const auto& [set, kernels] : all_kernels())
        for (const bool half : {false, true})
            for (const auto& [queries, width] : {std::pair{1, 16}, {3, 24}, {16, 80}, {2, 256}})
                for (const int threads : {7}) {
                    const std::string name = std::string(operation) + ", " + set + (half ? ", bfloat16, R=" : ", float32, R=") +
                                             std::to_string(queries) + ", D=" + std::to_string(width) + ", " +
                                             std::to_string(threads) + " threads";
                    Problem problem(half, static_cast<std::size_t>(queries), static_cast<std::size_t>(width));
                    all = check(problem, kernels, threads, name) && all;
                }
    return all;
}

}  // namespace

bool readout_is_right() {
    return in_all_ways("readout", [](Problem& p, const maskattn::Kernels& kernels, int threads, const std::string& name) {
        std::vector<double> dslopes(heads);
        maskattn::readout_forward(p.readout(), starts, kernels, threads);
        maskattn::readout_backward(p.readout(), p.gradients(), starts, kernels, threads, dslopes.data());
        return readout_agrees(p, dslopes, name);
    });
}

bool relevance_is_right() {
    return in_all_ways("relevance", [](Problem& p, const maskattn::Kernels& kernels, int threads, const std::string& name) {
        if (p.queries * p.width > 600) return true;  // the plain loop takes long
        maskattn::readout_forward(p.readout(), starts, kernels, threads);
        maskattn::token_relevance(p.all_of_relevance(), starts, kernels, threads);
        return relevance_agrees(p, name);
    });
}

}  // namespace maskattn_tests
