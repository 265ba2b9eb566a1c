// Linear layers and blocks against plain loops, in float32 and bfloat16.
#include <array>
#include <cmath>
#include <utility>

#include "encoder/driver.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {
namespace {

using Matrix = std::vector<std::vector<double>>;
using Vector = std::vector<float>;

double tolerance(bool half) { return half ? 2e-2 : 1e-5; }

// Values in the dtype of a layer; `floats` are the same, rounded to it.
struct Values {
    bool half;
    Vector floats;
    std::vector<std::uint16_t> bfloat16;

    Values(bool is_half, Vector values) : half(is_half), floats(std::move(values)) {
        for (float& value : floats) {
            bfloat16.push_back(to_bfloat16(value));
            if (half) value = to_float(bfloat16.back());
        }
    }
    const void* data() const { return half ? static_cast<const void*>(bfloat16.data()) : floats.data(); }
};

struct Layer {
    int inputs, outputs;
    Values weight;
    Vector bias;

    Layer(Random& random, bool half, int from, int to)
        : inputs(from), outputs(to),
          weight(half, random.floats(static_cast<std::size_t>(from * to), 1.0f / std::sqrt(static_cast<float>(from)))),
          bias(random.floats(static_cast<std::size_t>(to), 0.5f)) {}

    maskattn::PackedLinear packed(const maskattn::Kernels& kernels, int threads) const {
        return {kernels, weight.half, {weight.data(), inputs}, bias.data(), inputs, outputs, threads};
    }

    Matrix apply(const Matrix& x) const {
        Matrix y;
        for (const auto& row : x) {
            y.emplace_back();
            for (int o = 0; o < outputs; ++o) {
                double total = static_cast<double>(bias[static_cast<std::size_t>(o)]);
                for (int i = 0; i < inputs; ++i)
                    total += row[static_cast<std::size_t>(i)] *
                             static_cast<double>(weight.floats[static_cast<std::size_t>(o * inputs + i)]);
                y.back().push_back(total);
            }
        }
        return y;
    }
};

Matrix matrix_of(const Vector& x, std::size_t columns) {
    Matrix rows;
    for (std::size_t i = 0; i < x.size(); i += columns)
        rows.emplace_back(x.begin() + static_cast<std::ptrdiff_t>(i), x.begin() + static_cast<std::ptrdiff_t>(i + columns));
    return rows;
}

Matrix activated(Matrix x, maskattn::Activation activation) {
    for (auto& row : x)
        for (double& y : row) {
            if (activation == maskattn::Activation::gelu) y *= 0.5 * (1.0 + std::erf(y / std::sqrt(2.0)));
            if (activation == maskattn::Activation::gelu_tanh)
                y *= 0.5 * (1.0 + std::tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)));
        }
    return x;
}

bool layers_are_right(const maskattn::Kernels& kernels, bool half, int threads) {
    bool all = true;
    for (const auto& [inputs, outputs, rows] :
         {std::array{1, 1, 1}, {2, 1, 1}, {5, 37, 99}, {6, 37, 99}, {600, 17, 50}, {64, 128, 0}}) {
        if (half && inputs % 2 != 0) continue;
        Random random(static_cast<std::uint64_t>(inputs));
        const Layer layer(random, half, inputs, outputs);
        const maskattn::PackedLinear packed = layer.packed(kernels, threads);
        const Values x(half, random.floats(static_cast<std::size_t>(inputs * rows), 3.0f));
        for (const auto activation :
             {maskattn::Activation::none, maskattn::Activation::gelu, maskattn::Activation::gelu_tanh}) {
            Tensor out = unwritten(static_cast<std::size_t>(outputs * rows));
            maskattn::apply_linear_layer(packed.layer(), activation, {x.data(), inputs}, rows, {out.data(half), outputs},
                                         {&kernels, threads});
            Comparison comparison("layer", tolerance(half));
            const Matrix exact = activated(layer.apply(matrix_of(x.floats, static_cast<std::size_t>(inputs))), activation);
            for (std::size_t i = 0; i < static_cast<std::size_t>(outputs * rows); ++i)
                comparison.add(out.value(half, i),
                               exact[i / static_cast<std::size_t>(outputs)][i % static_cast<std::size_t>(outputs)]);
            all = comparison.passes() && all;
        }
    }
    return all;
}

Matrix normalised(Matrix x, const Vector& weight, const Vector& bias, double epsilon) {
    for (auto& row : x) {
        double mean = 0.0, variance = 0.0;
        for (const double y : row) mean += y / static_cast<double>(row.size());
        for (const double y : row) variance += (y - mean) * (y - mean) / static_cast<double>(row.size());
        for (std::size_t c = 0; c < row.size(); ++c)
            row[c] = (row[c] - mean) / std::sqrt(variance + epsilon) * static_cast<double>(weight[c]) +
                     static_cast<double>(bias[c]);
    }
    return x;
}

void add_scaled(Matrix& x, const Matrix& update, const Vector& scale) {
    for (std::size_t r = 0; r < x.size(); ++r)
        for (std::size_t c = 0; c < x[r].size(); ++c) x[r][c] += static_cast<double>(scale[c]) * update[r][c];
}

bool blocks_are_right(const maskattn::Kernels& kernels, bool half, int threads) {
    constexpr int width = 72, heads = 3, hidden = 50;
    constexpr float epsilon = 1e-6f;
    const std::vector<std::int32_t> starts{0, 61, 61, 62, 140};
    Random random(7);
    const Layer qkv(random, half, width, 3 * width), proj(random, half, width, width), fc1(random, half, width, hidden),
        fc2(random, half, hidden, width);
    const auto vector = [&] { return random.floats(width, 1.0f); };
    const Vector weight1 = vector(), bias1 = vector(), weight2 = vector(), bias2 = vector(), scale1 = vector(),
                 scale2 = vector(), x = random.floats(140 * width, 2.0f);
    Matrix expected = matrix_of(x, width);
    const Matrix projected = qkv.apply(normalised(expected, weight1, bias1, epsilon));
    Matrix attended(expected.size(), std::vector<double>(width));
    for (std::size_t s = 0; s + 1 < starts.size(); ++s)
        for (int h = 0; h < heads; ++h) {
            constexpr int D = width / heads;
            PlainHead head{};
            head.scale = 1.0 / std::sqrt(static_cast<double>(D));
            const auto begin = static_cast<std::size_t>(starts[s]), end = static_cast<std::size_t>(starts[s + 1]);
            for (std::size_t r = begin; r < end; ++r) {
                const auto part = [&](int which) {
                    const auto from = projected[r].begin() + which * width + h * D;
                    return std::vector<double>(from, from + D);
                };
                head.q.push_back(part(0)), head.k.push_back(part(1)), head.v.push_back(part(2));
                head.grad_out.emplace_back(D, 0.0), head.grad_lse.push_back(0.0), head.key_bias.push_back(0.0);
                head.distance.emplace_back(end - begin, 0.0), head.grad_rows.emplace_back(end - begin, 0.0);
            }
            const HeadResults results = attend(head);
            for (std::size_t r = begin; r < end; ++r)
                for (int d = 0; d < D; ++d)
                    attended[r][static_cast<std::size_t>(h * D + d)] = results.out[r - begin][static_cast<std::size_t>(d)];
        }
    add_scaled(expected, proj.apply(attended), scale1);
    const Matrix features = activated(fc1.apply(normalised(expected, weight2, bias2, epsilon)), maskattn::Activation::gelu);
    add_scaled(expected, fc2.apply(features), scale2);

    const maskattn::PackedLinear packed[] = {qkv.packed(kernels, threads), proj.packed(kernels, threads),
                                             fc1.packed(kernels, threads), fc2.packed(kernels, threads)};
    const auto padded = [](const Vector& values) { return maskattn::padded_values(values.data(), width, 0.0f); };
    const Vector s1 = padded(scale1), s2 = padded(scale2);
    const maskattn::EncoderBlock block{width,
                                       heads,
                                       {weight1.data(), bias1.data(), epsilon},
                                       {weight2.data(), bias2.data(), epsilon},
                                       packed[0].layer(),
                                       packed[1].layer(),
                                       packed[2].layer(),
                                       packed[3].layer(),
                                       s1.data(),
                                       s2.data(),
                                       maskattn::Activation::gelu};
    Vector out(x.size(), std::nanf(""));
    maskattn::apply_encoder_block(block, {x.data(), width}, starts, {out.data(), width}, {&kernels, threads});
    Comparison comparison("block", tolerance(half));
    for (std::size_t i = 0; i < out.size(); ++i) comparison.add(static_cast<double>(out[i]), expected[i / width][i % width]);
    return comparison.passes();
}

}  // namespace

bool encoder_is_right() {
    bool all = true;
    for (const auto& [set, kernels] : all_kernels())
        for (const int threads : {1, 5})
            for (const bool half : {false, true}) {
                all = layers_are_right(kernels, half, threads) && all;
                all = blocks_are_right(kernels, half, threads) && all;
            }
    return all;
}

}  // namespace maskattn_tests
