// Prefetching of tokens that are read head after head, in the order of memory while earlier tokens are processed.
#pragma once

#include "readout/readout.hpp"
#include "simd/vectors.hpp"

namespace maskattn {
namespace {

constexpr int group_keys = 16;  // keys whose rows are read head after head before those of the next group

// Prefetches the cache lines of a group of rows of one tensor, a few at a time. A head's piece of a row is too short for
// the hardware prefetcher: a thread read 12 heads of width 64 at 14 to 23 GB/s without this class; at 30 GB/s, as in the
// order of memory, with up to 16 lines of the next group prefetched at a time; and no faster than without with 64.
class ComingLines {
  public:
    ComingLines(const Strided<const void>& x, const Readout& a) : data_(static_cast<const char*>(x.data)) {
        const std::ptrdiff_t item = a.bfloat16 ? 2 : 4, piece = a.head_width * item;
        head_ = x.head * item;
        row_ = x.row * item;
        const bool heads_adjoin = head_ == piece;
        pieces_ = heads_adjoin ? 1 : a.heads;
        bytes_ = heads_adjoin ? piece * a.heads : piece;
    }

    // Selects the rows in [first, first + count) that belong to the run.
    MASKATTN_INLINE void expect(const KeyRun& run, std::int64_t first, int count) {
        const std::int64_t left = run.first + run.count - first;
        const int rows = left < 0 ? 0 : left < count ? static_cast<int>(left) : count;
        start_ = data_ + first * row_;
        piece_ = 0;
        if (row_ == bytes_) {  // contiguous memory
            rows_left_ = rows > 0;
            begin_stretch(bytes_ * rows);
        } else {
            rows_left_ = rows;
            begin_stretch(bytes_);
        }
        if (rows == 0) lines_left_ = 0;
    }

    template <int lines>
    MASKATTN_INLINE void ask() {
        if (lines_left_ >= lines) {
#pragma GCC unroll 16
            for (int i = 0; i < lines; ++i) __builtin_prefetch(line_ + 64 * i);
            line_ += 64 * lines;
            lines_left_ -= lines;
        } else {
            ask_across(lines);
        }
    }

  private:
    void begin_stretch(std::ptrdiff_t bytes) {
        line_ = start_ + piece_ * head_;
        lines_left_ = static_cast<int>((bytes + 63) / 64);
    }

    __attribute__((noinline)) void ask_across(int lines) {
        for (; rows_left_ > 0 && lines > 0; --lines) {
            if (lines_left_ == 0) {
                if (++piece_ == pieces_) {
                    piece_ = 0;
                    start_ += row_;
                    if (--rows_left_ == 0) return;
                }
                begin_stretch(bytes_);
            }
            __builtin_prefetch(line_);
            line_ += 64;
            --lines_left_;
        }
    }

    const char *data_, *start_ = nullptr, *line_ = nullptr;
    std::ptrdiff_t head_, row_, bytes_;  // bytes of a piece, which has all heads of a row if these adjoin
    int pieces_, piece_ = 0, rows_left_ = 0, lines_left_ = 0;
};

}  // namespace
}  // namespace maskattn
