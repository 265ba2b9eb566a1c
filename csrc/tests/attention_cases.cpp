// Attention of packed sequences, and of rows selected by an index as masks select them, against the plain loop.
#include <cmath>
#include <limits>

#include "attention/driver.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {
namespace {

using maskattn::Tokens;

constexpr int heads = 2;
constexpr double tolerances[] = {1e-5, 3e-2};  // of float32 and bfloat16; tests/native checks the accuracy

struct Problem {
    bool half;
    std::size_t rows_q, rows_k, width;
    Tensor q, k, v, grad_out, out, dq, dk, dv;
    std::vector<float> lse, grad_lse, bias, coords_q, coords_k, slopes, dbias;

    Problem(Random& random, bool is_half, std::size_t queries, std::size_t keys, std::size_t head_width)
        : half(is_half), rows_q(queries), rows_k(keys), width(head_width) {
        const std::size_t words_q = queries * heads * width, words_k = keys * heads * width;
        q = random.tensor(words_q, half), grad_out = random.tensor(words_q, half);
        k = random.tensor(words_k, half), v = random.tensor(words_k, half);
        out = unwritten(words_q), dq = unwritten(words_q), dk = unwritten(words_k), dv = unwritten(words_k);
        lse.assign(queries * heads, 0.0f), dbias.assign(keys * heads, 0.0f);
        grad_lse = random.floats(queries * heads, 1.0f), bias = random.floats(keys * heads, 1.0f);
        coords_q = random.floats(queries * 2, 9.0f), coords_k = random.floats(keys * 2, 9.0f);
        slopes = random.floats(heads, 0.2f);
        if (queries > 0) coords_q[0] = std::numeric_limits<float>::quiet_NaN();
    }

    maskattn::Attention attention() {
        const auto D = static_cast<std::ptrdiff_t>(width), row = D * heads, H = std::ptrdiff_t{heads};
        const auto of_lse = static_cast<std::ptrdiff_t>(rows_q);
        maskattn::Attention a{};
        a.bfloat16 = half;
        a.head_width = static_cast<int>(width);
        a.scale = 0.3f;
        a.q = {q.data(half), 0, D, row}, a.k = {k.data(half), 0, D, row}, a.v = {v.data(half), 0, D, row};
        a.out = {out.data(half), 0, D, row};
        a.lse = {lse.data(), 0, of_lse, 1};
        a.key_bias = {bias.data(), 0, 1, H};
        a.coords_q = {coords_q.data(), 0, 0, 2}, a.coords_k = {coords_k.data(), 0, 0, 2};
        a.slopes = {slopes.data(), 0, 1, 0};
        return a;
    }

    maskattn::Gradients gradients() {
        const auto D = static_cast<std::ptrdiff_t>(width), row = D * heads, H = std::ptrdiff_t{heads};
        maskattn::Gradients g{};
        g.grad_out = {grad_out.data(half), 0, D, row};
        g.grad_lse = {grad_lse.data(), 0, static_cast<std::ptrdiff_t>(rows_q), 1};
        g.dq = {dq.data(half), 0, D, row}, g.dk = {dk.data(half), 0, D, row}, g.dv = {dv.data(half), 0, D, row};
        g.dbias = {dbias.data(), 0, 1, H};
        return g;
    }

    std::size_t at(std::size_t row, std::size_t head) const { return (row * heads + head) * width; }

    std::vector<double> row_of(const Tensor& x, std::size_t row, std::size_t head) const {
        const auto begin = x.exact.begin() + static_cast<std::ptrdiff_t>(at(row, head));
        return {begin, begin + static_cast<std::ptrdiff_t>(width)};
    }
};

std::size_t row_of(const Tokens& rows, std::int64_t i) { return static_cast<std::size_t>(maskattn::row_at(rows, i)); }

PlainHead head_of(const Problem& p, const maskattn::Head& of) {
    const auto h = static_cast<std::size_t>(of.index);
    PlainHead head{};
    head.scale = static_cast<double>(0.3f);
    head.slope = static_cast<double>(p.slopes[h]);
    for (std::int64_t j = 0; j < of.keys.count; ++j) {
        const std::size_t row = row_of(of.keys, j);
        head.k.push_back(p.row_of(p.k, row, h));
        head.v.push_back(p.row_of(p.v, row, h));
        head.key_bias.push_back(static_cast<double>(p.bias[row * heads + h]));
    }
    for (std::int64_t i = 0; i < of.queries.count; ++i) {
        const std::size_t row = row_of(of.queries, i);
        head.q.push_back(p.row_of(p.q, row, h));
        head.grad_out.push_back(p.row_of(p.grad_out, row, h));
        head.grad_lse.push_back(static_cast<double>(p.grad_lse[h * p.rows_q + row]));
        std::vector<double> distance;
        for (std::int64_t j = 0; j < of.keys.count; ++j) {
            const std::size_t key = row_of(of.keys, j);
            const double length = std::hypot(static_cast<double>(p.coords_q[row * 2] - p.coords_k[key * 2]),
                                             static_cast<double>(p.coords_q[row * 2 + 1] - p.coords_k[key * 2 + 1]));
            distance.push_back(std::isnan(length) ? 0.0 : length);
        }
        head.distance.push_back(distance);
        head.grad_rows.emplace_back(head.key_bias.size(), 0.0);
    }
    return head;
}

bool agrees(const Problem& p, const std::vector<maskattn::Head>& all_heads, const double* dslopes, const std::string& name) {
    const double tolerance = tolerances[p.half];
    Comparison out(name + " out", tolerance), lse(name + " lse", tolerance), dq(name + " dq", tolerance);
    Comparison dk(name + " dk", tolerance), dv(name + " dv", tolerance), dbias(name + " dbias", tolerance);
    Comparison dslope(name + " dslope", 10 * tolerance);
    double exact_dslopes[heads] = {};
    for (const maskattn::Head& of : all_heads) {
        const HeadResults exact = attend(head_of(p, of));
        const auto h = static_cast<std::size_t>(of.index);
        for (std::int64_t i = 0; i < of.queries.count; ++i) {
            const std::size_t row = row_of(of.queries, i), number = static_cast<std::size_t>(i);
            lse.add(static_cast<double>(p.lse[h * p.rows_q + row]), exact.lse[number]);
            for (std::size_t d = 0; d < p.width; ++d) {
                out.add(p.out.value(p.half, p.at(row, h) + d), exact.out[number][d]);
                dq.add(p.dq.value(p.half, p.at(row, h) + d), exact.dq[number][d]);
            }
        }
        for (std::int64_t j = 0; j < of.keys.count; ++j) {
            const std::size_t row = row_of(of.keys, j), number = static_cast<std::size_t>(j);
            dbias.add(static_cast<double>(p.dbias[row * heads + h]), exact.dbias[number]);
            for (std::size_t d = 0; d < p.width; ++d) {
                dk.add(p.dk.value(p.half, p.at(row, h) + d), exact.dk[number][d]);
                dv.add(p.dv.value(p.half, p.at(row, h) + d), exact.dv[number][d]);
            }
        }
        exact_dslopes[h] += exact.dslope;
    }
    for (int h = 0; h < heads; ++h) dslope.add(dslopes[h], exact_dslopes[h]);
    bool all = true;
    for (const Comparison* each : {&out, &lse, &dq, &dk, &dv, &dbias, &dslope}) all = each->passes() && all;
    return all;
}

// Packed sequences of these lengths.
maskattn::Sequences packed(const std::vector<std::int64_t>& queries, const std::vector<std::int64_t>& keys) {
    maskattn::Sequences sequences;
    std::int64_t first_q = 0, first_k = 0;
    for (std::size_t b = 0; b < queries.size(); ++b) {
        for (std::int32_t h = 0; h < heads; ++h)
            sequences.heads.push_back({0, h, {first_q, queries[b], nullptr}, {first_k, keys[b], nullptr}});
        first_q += queries[b], first_k += keys[b];
    }
    return sequences;
}

// One sequence of which every third row is background.
maskattn::Sequences masked(std::int64_t rows) {
    maskattn::Sequences sequences;
    for (std::int32_t i = 0; i < rows; ++i)
        if (i % 3 != 1) sequences.kept.push_back(i);
    const Tokens kept{0, static_cast<std::int64_t>(sequences.kept.size()), sequences.kept.data()};
    for (std::int32_t h = 0; h < heads; ++h) sequences.heads.push_back({0, h, kept, kept});
    sequences.dense = true;
    sequences.rows_q = sequences.rows_k = rows;
    return sequences;
}

bool run(Problem& p, const maskattn::Sequences& sequences, const maskattn::Kernels& kernels, const std::string& name) {
    bool all = true;
    for (const int threads : {7}) {
        double dslopes[heads] = {};
        const maskattn::Execution how{&kernels.attention, threads};
        maskattn::attention_forward(p.attention(), sequences, how);
        maskattn::attention_backward(p.attention(), p.gradients(), sequences, how, dslopes);
        all = agrees(p, sequences.heads, dslopes, name + ", " + std::to_string(threads) + " threads") && all;
    }
    return all;
}

}  // namespace

bool attention_is_right() {
    bool all = true;
    for (const auto& [set, kernels] : all_kernels())
        for (const bool half : {false, true})
            for (const std::size_t width : {16, 24, 80, 256}) {
                const std::string name = "attention, " + set + (half ? ", bfloat16, " : ", float32, ") + std::to_string(width);
                Random random(width);
                const auto sequences = packed({3, 0, 1, 101, 5}, {7, 4, 1, 267, 0});
                Problem problem(random, half, 110, 279, width);
                all = run(problem, sequences, kernels, name + ", packed") && all;
                Problem dense(random, half, 130, 130, width);
                all = run(dense, masked(130), kernels, name + ", masked") && all;
            }
    return all;
}

}  // namespace maskattn_tests
