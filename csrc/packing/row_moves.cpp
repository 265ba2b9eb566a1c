#include "packing/row_moves.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "runtime/threads.hpp"

namespace maskattn {
namespace {

constexpr std::ptrdiff_t item_bytes = 128 * 1024;
// Moves of fewer bytes use one thread.
constexpr std::ptrdiff_t bytes_for_threads = 1024 * 1024;
constexpr std::ptrdiff_t bytes_for_huge_pages = 4 * 1024 * 1024;
constexpr std::ptrdiff_t huge_page = 2 * 1024 * 1024;
// How far ahead rows are prefetched, in rows and in bytes of a row, since hardware cannot predict the next one.
constexpr std::ptrdiff_t rows_ahead = 4;
constexpr std::ptrdiff_t bytes_ahead = 1024;
constexpr std::ptrdiff_t cache_line = 64;

// Asks for huge pages: fresh memory is mapped page by page on first write, which costs more than the copy itself.
void prefer_huge_pages(const RowMove& move) {
#ifdef MADV_HUGEPAGE
    const std::ptrdiff_t bytes = move.result_rows * move.row_bytes;
    if (move.result_stride != move.row_bytes || bytes < bytes_for_huge_pages) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(move.result);
    const std::uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page;
    const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(bytes)) / huge_page * huge_page;
    // Only a hint; without huge pages the call fails and has no effect.
    if (last > first) madvise(move.result + (first - begin), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(move);
#endif
}

void fetch_ahead(const RowMove& move, std::int64_t row) {
    if (row < 0 || row >= move.source_rows) return;
    const unsigned char* bytes = move.source + row * move.source_stride;
    for (std::ptrdiff_t i = 0; i < std::min(move.row_bytes, bytes_ahead); i += cache_line)
        __builtin_prefetch(bytes + i);
}

// Returns the end of the run of rows that are consecutive in both source and result, or of the run of zero rows.
template <class Index>
std::ptrdiff_t end_of_run(const Index* index, std::int64_t first, std::ptrdiff_t begin, std::ptrdiff_t end,
                          std::ptrdiff_t source_rows) {
    std::ptrdiff_t stop = begin + 1;
    if (first < 0) {
        while (stop < end && index[stop] == -1) ++stop;
        return stop;
    }
    const std::ptrdiff_t most = std::min(end, begin + source_rows - first);
    while (stop < most && index[stop] == first + (stop - begin)) ++stop;
    return stop;
}

void copy_run(const RowMove& move, std::ptrdiff_t to, std::int64_t from, std::ptrdiff_t rows) {
    unsigned char* result = move.result + to * move.result_stride;
    const unsigned char* source = move.source + from * move.source_stride;
    if (move.source_stride == move.row_bytes && move.result_stride == move.row_bytes) {
        std::memcpy(result, source, static_cast<std::size_t>(rows * move.row_bytes));
        return;
    }
    for (std::ptrdiff_t i = 0; i < rows; ++i)
        std::memcpy(result + i * move.result_stride, source + i * move.source_stride,
                    static_cast<std::size_t>(move.row_bytes));
}

void clear_run(const RowMove& move, std::ptrdiff_t to, std::ptrdiff_t rows) {
    unsigned char* result = move.result + to * move.result_stride;
    if (move.result_stride == move.row_bytes) {
        std::memset(result, 0, static_cast<std::size_t>(rows * move.row_bytes));
        return;
    }
    for (std::ptrdiff_t i = 0; i < rows; ++i)
        std::memset(result + i * move.result_stride, 0, static_cast<std::size_t>(move.row_bytes));
}

// Moves rows [begin, end) of the result; returns the first of them whose index is out of range, or end.
template <class Index>
std::ptrdiff_t move_some(const RowMove& move, const Index* index, std::ptrdiff_t begin, std::ptrdiff_t end) {
    std::ptrdiff_t first_wrong = end;
    for (std::ptrdiff_t row = begin, stop; row < end; row = stop) {
        const std::int64_t from = index[row];
        if (from < -1 || from >= move.source_rows) {
            first_wrong = std::min(first_wrong, row);
            stop = row + 1;
            continue;
        }
        stop = end_of_run(index, from, row, end, move.source_rows);
        if (move.row_bytes == 0) continue;
        if (row + rows_ahead < end) fetch_ahead(move, index[row + rows_ahead]);
        if (from < 0)
            clear_run(move, row, stop - row);
        else
            copy_run(move, row, from, stop - row);
    }
    return first_wrong;
}

template <class Index>
std::ptrdiff_t move_all(const RowMove& move, const Index* index, int threads) {
    prefer_huge_pages(move);
    const std::ptrdiff_t rows = move.result_rows;
    if (threads == 1 || rows * move.row_bytes < bytes_for_threads) return move_some(move, index, 0, rows);
    const std::ptrdiff_t rows_of_item = std::max<std::ptrdiff_t>(1, item_bytes / move.row_bytes);
    std::atomic<std::ptrdiff_t> first_wrong{rows};
    auto work = [&](std::int64_t item, int) noexcept {
        const std::ptrdiff_t begin = item * rows_of_item, end = std::min(rows, begin + rows_of_item);
        const std::ptrdiff_t wrong = move_some(move, index, begin, end);
        std::ptrdiff_t seen = first_wrong.load(std::memory_order_relaxed);
        while (wrong < end && wrong < seen && !first_wrong.compare_exchange_weak(seen, wrong)) {
        }
    };
    for_each_item(threads, (rows + rows_of_item - 1) / rows_of_item, work);
    return first_wrong.load();
}

}  // namespace

std::ptrdiff_t move_rows(const RowMove& move, const std::int32_t* index, int threads) {
    return move_all(move, index, threads);
}

std::ptrdiff_t move_rows(const RowMove& move, const std::int64_t* index, int threads) {
    return move_all(move, index, threads);
}

std::ptrdiff_t count_kept(const std::uint8_t* keep_BN, std::ptrdiff_t batch, std::ptrdiff_t tokens, std::int64_t* lengths_B) {
    std::int64_t total = 0;
    for (std::ptrdiff_t b = 0; b < batch; ++b) {
        std::int64_t length = 0;
        for (std::ptrdiff_t n = 0; n < tokens; ++n) length += keep_BN[b * tokens + n] != 0;
        lengths_B[b] = length;
        total += length;
    }
    return total;
}

void list_kept(const std::uint8_t* keep, std::ptrdiff_t tokens, std::ptrdiff_t kept, std::int64_t* indices_T,
               std::int32_t* row_of_token) {
    std::ptrdiff_t token = 0;
    // No branch depends on the mask, since it would be mispredicted often; entries of background are overwritten.
    for (std::ptrdiff_t row = 0; row < kept && token < tokens; ++token) {
        indices_T[row] = token;
        row_of_token[token] = keep[token] != 0 ? static_cast<std::int32_t>(row) : -1;
        row += keep[token] != 0;
    }
    std::fill(row_of_token + token, row_of_token + tokens, -1);
}

}  // namespace maskattn
