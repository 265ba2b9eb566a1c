// Rows by index and the positions of kept tokens against plain loops.
#include <cstdio>
#include <vector>

#include "packing/row_moves.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {
namespace {

using Bytes = std::vector<unsigned char>;

constexpr unsigned char untouched = 0xee;

struct Case {
    std::ptrdiff_t source_rows, rows, row_bytes, source_gap, result_gap;
};

const std::vector<Case> cases{{0, 9, 5, 0, 0},     {7, 0, 5, 0, 0},        {7, 9, 0, 0, 0},         {1, 50, 1, 0, 0},
                              {40, 90, 3, 2, 1},   {300, 700, 4097, 0, 0}, {300, 700, 4096, 64, 7}, {2, 7, 700000, 0, 0},
                              {99, 999, 3000, -1, 0}};  // -1: all rows are the same

std::ptrdiff_t below(Random& random, std::ptrdiff_t count) {
    return static_cast<std::ptrdiff_t>((random.uniform() + 1.0) / 2.0 * static_cast<double>(count));
}

// Runs, zeros and single rows.
template <class Index>
std::vector<Index> some_index(Random& random, const Case& c) {
    std::vector<Index> index;
    while (static_cast<std::ptrdiff_t>(index.size()) < c.rows) {
        std::ptrdiff_t row = c.source_rows == 0 ? -1 : below(random, c.source_rows + 1) - 1;
        const std::ptrdiff_t run = 1 + below(random, 6);
        for (std::ptrdiff_t i = 0; i < run && static_cast<std::ptrdiff_t>(index.size()) < c.rows; ++i) {
            index.push_back(static_cast<Index>(row));
            if (row >= 0 && row + 1 < c.source_rows) ++row;
        }
    }
    return index;
}

template <class Index>
bool moves(const Case& c, int threads) {
    Random random(static_cast<std::uint64_t>(c.rows * 31 + c.row_bytes));
    const std::ptrdiff_t source_stride = c.source_gap < 0 ? 0 : c.row_bytes + c.source_gap;
    const std::ptrdiff_t result_stride = c.row_bytes + c.result_gap;
    Bytes source(static_cast<std::size_t>(c.source_rows * source_stride + c.row_bytes));
    for (unsigned char& byte : source) byte = static_cast<unsigned char>(below(random, 256));
    // The buffer ends with the last row, so that a read past it is out of bounds.
    Bytes result(static_cast<std::size_t>(c.rows ? (c.rows - 1) * result_stride + c.row_bytes : 0), untouched);
    const Bytes before = result;
    Bytes expected = result;
    std::vector<Index> index = some_index<Index>(random, c);
    for (std::ptrdiff_t i = 0; i < c.rows; ++i)
        for (std::ptrdiff_t b = 0; b < c.row_bytes; ++b) {
            const std::ptrdiff_t from = static_cast<std::ptrdiff_t>(index[static_cast<std::size_t>(i)]);
            expected[static_cast<std::size_t>(i * result_stride + b)] =
                from < 0 ? 0 : source[static_cast<std::size_t>(from * source_stride + b)];
        }
    const maskattn::RowMove move{source.data(), c.source_rows, source_stride, result.data(),
                                 c.rows,        result_stride, c.row_bytes};
    bool right = maskattn::move_rows(move, index.data(), threads) == c.rows && result == expected;
    if (c.rows < 3) return right;
    // The first of several wrong indices is reported, and the row that it points to is not read.
    index[static_cast<std::size_t>(c.rows - 1)] = -2;
    index[static_cast<std::size_t>(c.rows / 2)] = static_cast<Index>(c.source_rows);
    result = before;
    right = right && maskattn::move_rows(move, index.data(), threads) == c.rows / 2;
    return right;
}

bool lists(std::ptrdiff_t batch, std::ptrdiff_t tokens, double share) {
    Random random(static_cast<std::uint64_t>(batch * 100 + tokens));
    std::vector<std::uint8_t> keep;
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(batch)), expected_lengths(lengths.size()), expected;
    std::vector<std::int32_t> expected_rows;
    for (std::ptrdiff_t i = 0; i < batch * tokens; ++i) {
        keep.push_back((random.uniform() + 1.0) / 2.0 < share ? static_cast<std::uint8_t>(1 + i % 255) : 0);
        expected_rows.push_back(keep.back() ? static_cast<std::int32_t>(expected.size()) : -1);
        if (!keep.back()) continue;
        expected.push_back(i);
        ++expected_lengths[static_cast<std::size_t>(i / tokens)];
    }
    const std::ptrdiff_t kept = maskattn::count_kept(keep.data(), batch, tokens, lengths.data());
    if (kept != static_cast<std::ptrdiff_t>(expected.size()) || lengths != expected_lengths) return false;
    std::vector<std::int64_t> indices(expected.size());
    std::vector<std::int32_t> rows(keep.size());
    maskattn::list_kept(keep.data(), batch * tokens, kept, indices.data(), rows.data());
    return indices == expected && rows == expected_rows;
}

}  // namespace

bool packing_is_right() {
    bool all = true;
    for (std::size_t i = 0; i < cases.size(); ++i)
        for (const int threads : {1, 2, 7}) {
            const bool right = moves<std::int32_t>(cases[i], threads) && moves<std::int64_t>(cases[i], threads);
            if (!right) std::fprintf(stderr, "rows, case %zu of %d threads: wrong\n", i, threads);
            all = all && right;
        }
    for (const double share : {0.0, 0.3, 1.0})
        for (const auto& [batch, tokens] : {std::pair<int, int>{0, 5}, {3, 0}, {1, 1}, {3, 131}}) {
            const bool right = lists(batch, tokens, share);
            if (!right) std::fprintf(stderr, "kept tokens, %d x %d: wrong\n", batch, tokens);
            all = all && right;
        }
    return all;
}

}  // namespace maskattn_tests
