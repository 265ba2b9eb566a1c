// The pieces of memory released last are kept for later calls if they are large, since the system clears fresh pages.
#include "runtime/aligned_words.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>
#include <mutex>
#include <new>
#include <utility>

namespace maskattn {
namespace {

constexpr std::size_t cache_line = 64, huge_page = std::size_t{1} << 21;
// malloc reuses smaller pieces by itself; larger ones would withhold too much memory, and calls that need them take long
// anyway.
constexpr std::size_t least_kept = std::size_t{1} << 18, most_kept = std::size_t{24} << 20;
constexpr int kept_pieces = 2;  // operands and scratch of one call

struct Piece {
    std::size_t bytes;
    void* data;
};

std::mutex mutex;  // only with try_lock: in a child of fork() it may stay locked for ever
Piece kept[kept_pieces] = {};

std::align_val_t alignment_of(std::size_t bytes) {
    return std::align_val_t{bytes < 2 * huge_page ? cache_line : huge_page};
}

void release(const Piece& piece) {
    if (piece.data != nullptr) ::operator delete(piece.data, alignment_of(piece.bytes));
}

// Rounds up by at most an eighth, so that a piece serves later calls of about its size.
std::size_t rounded(std::size_t bytes) {
    std::size_t step = cache_line;
    while (step * 16 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

bool fits(const Piece& piece, std::size_t bytes) { return piece.bytes >= bytes && piece.bytes / 2 <= bytes; }

Piece take(std::size_t bytes) {
    if (bytes >= least_kept) {
        const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
        for (Piece& piece : kept)
            if (lock.owns_lock() && piece.data != nullptr && fits(piece, bytes)) return std::exchange(piece, Piece{});
    }
    const Piece piece{bytes, ::operator new(bytes, alignment_of(bytes))};
#if defined(__linux__)
    if (bytes >= 2 * huge_page) madvise(piece.data, bytes, MADV_HUGEPAGE);
#endif
    return piece;
}

void give_back(Piece piece) {
    if (piece.bytes >= least_kept && piece.bytes <= most_kept) {
        const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
        // The newest piece comes first, and the oldest is released.
        for (Piece& slot : kept)
            if (lock.owns_lock() && piece.data != nullptr) std::swap(slot, piece);
    }
    release(piece);
}

}  // namespace

AlignedWords::AlignedWords(std::size_t count) {
    if (count > std::numeric_limits<std::size_t>::max() / 8) throw std::bad_alloc();
    const Piece piece = take(rounded(std::max(count * 4, cache_line)));
    bytes_ = piece.bytes;
    data_ = static_cast<std::uint32_t*>(piece.data);
}

AlignedWords::~AlignedWords() { give_back({bytes_, data_}); }

}  // namespace maskattn
