// Exact area coverage of tokens by a piecewise constant mask.
//
//   fraction(r, c) = 1 / (h w) * sum_y overlap(r, y) * sum_x overlap(c, x) * [mask(y, x) != 0]
//
// where overlap(i, p) is the length that token i and mask pixel p share on that axis. The sum over y is computed once
// for each row of tokens, so that no integral image is stored: work is O(mask + tokens), scratch O(width of the mask).
// Sums of overlaps, unlike differences of an integral image, give exactly 0 without tissue and exactly 1 within it.
#include "packing/coverage.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/threads.hpp"

namespace maskattn {
namespace {

// The mask pixels [first, last] that a token overlaps on one axis, and the lengths that it shares with these two.
struct Overlap {
    std::ptrdiff_t first;
    std::ptrdiff_t last;  // < first: no overlap
    double head;
    double tail;
    double length;  // of the token, including what is outside the mask
};

// Snaps a position to a pixel's edge that it misses only by rounding.
double snapped(double position) {
    const double nearest = std::nearbyint(position);
    return std::abs(position - nearest) < 1e-9 ? nearest : position;
}

std::vector<Overlap> overlaps_of(const Axis& axis, std::ptrdiff_t pixels) {
    std::vector<Overlap> overlaps(static_cast<std::size_t>(axis.count));
    const double end = static_cast<double>(pixels);
    for (std::ptrdiff_t i = 0; i < axis.count; ++i) {
        const double begin_px = snapped(axis.origin + static_cast<double>(i) * axis.size);
        const double end_px = snapped(axis.origin + static_cast<double>(i + 1) * axis.size);
        const double from = std::clamp(begin_px, 0.0, end);
        const double to = std::clamp(end_px, 0.0, end);
        Overlap& overlap = overlaps[static_cast<std::size_t>(i)];
        overlap.length = end_px - begin_px;
        if (!(to > from)) {
            overlap = {0, -1, 0.0, 0.0, overlap.length};
            continue;
        }
        overlap.first = static_cast<std::ptrdiff_t>(std::floor(from));
        overlap.last = static_cast<std::ptrdiff_t>(std::ceil(to)) - 1;
        overlap.head = std::min(to, static_cast<double>(overlap.first) + 1.0) - from;
        overlap.tail = overlap.last > overlap.first ? to - static_cast<double>(overlap.last) : 0.0;
    }
    return overlaps;
}

// Computes the length of tissue in each mask column within a row of tokens, for the columns [begin, end).
void sum_columns(const Mask& mask, const Overlap& row, std::ptrdiff_t begin, std::ptrdiff_t end, std::uint32_t* inner_W,
                 double* column_W) {
    std::fill(inner_W + begin, inner_W + end, 0u);
    for (std::ptrdiff_t y = row.first + 1; y < row.last; ++y) {
        const std::uint8_t* line = mask.bytes + y * mask.cols;
        for (std::ptrdiff_t x = begin; x < end; ++x) inner_W[x] += line[x] != 0;
    }
    const std::uint8_t* head = mask.bytes + row.first * mask.cols;
    const std::uint8_t* tail = mask.bytes + row.last * mask.cols;
    for (std::ptrdiff_t x = begin; x < end; ++x)
        column_W[x] = inner_W[x] + (head[x] != 0 ? row.head : 0.0) + (tail[x] != 0 ? row.tail : 0.0);
}

float fraction_of(const Overlap& row, const Overlap& col, const double* column_W) {
    if (col.last < col.first) return 0.0f;
    double area = col.head * column_W[col.first] + col.tail * column_W[col.last];
    for (std::ptrdiff_t x = col.first + 1; x < col.last; ++x) area += column_W[x];
    return static_cast<float>(std::min(area / (row.length * col.length), 1.0));
}

int useful_threads(int asked, std::ptrdiff_t rows, double work) {
    constexpr double work_worth_a_thread = 1 << 18;
    const double wanted = thread_count(asked);
    const double bound = std::min({wanted, static_cast<double>(rows), 1.0 + work / work_worth_a_thread});
    return std::max(1, static_cast<int>(bound));
}

}  // namespace

void token_coverage(const Mask& mask, const Axis& y, const Axis& x, int threads, float* fraction_RC) {
    const std::vector<Overlap> rows = overlaps_of(y, mask.rows);
    const std::vector<Overlap> cols = overlaps_of(x, mask.cols);
    std::ptrdiff_t begin = mask.cols, end = 0;  // the mask columns that any token overlaps
    for (const Overlap& col : cols) {
        if (col.last < col.first) continue;
        begin = std::min(begin, col.first);
        end = std::max(end, col.last + 1);
    }

    const double lines = std::max<double>(static_cast<double>(mask.rows), static_cast<double>(y.count));
    const int workers = useful_threads(threads, y.count, lines * static_cast<double>(mask.cols));
    const auto width = static_cast<std::size_t>(mask.cols);
    std::vector<std::uint32_t> inner(width * static_cast<std::size_t>(workers));
    std::vector<double> column(width * static_cast<std::size_t>(workers));

    auto work = [&](std::int64_t item, int worker) noexcept {
        const std::size_t offset = width * static_cast<std::size_t>(worker);
        double* column_W = column.data() + offset;
        const std::ptrdiff_t share = (y.count + workers - 1) / workers;
        const std::ptrdiff_t stop = std::min(y.count, share * (item + 1));
        for (std::ptrdiff_t r = share * item; r < stop; ++r) {
            const Overlap& row = rows[static_cast<std::size_t>(r)];
            float* out = fraction_RC + r * x.count;
            if (row.last < row.first || begin >= end) {
                std::fill(out, out + x.count, 0.0f);
                continue;
            }
            sum_columns(mask, row, begin, end, inner.data() + offset, column_W);
            for (std::ptrdiff_t c = 0; c < x.count; ++c)
                out[c] = fraction_of(row, cols[static_cast<std::size_t>(c)], column_W);
        }
    };
    for_each_item(workers, workers, work);
}

}  // namespace maskattn
