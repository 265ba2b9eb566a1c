// Memory of the kernels' scratch and packed operands.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>

namespace maskattn {

// `count` words of 32 bits, aligned to a cache line, or, where there are many, to a huge page: faulting small pages in
// costs attention a few percent. Throws std::bad_alloc.
class AlignedWords {
  public:
    explicit AlignedWords(std::size_t count)
        : bytes_(bytes(count)),
          alignment_{bytes_ < 2 * huge_page ? cache_line : huge_page},
          data_(static_cast<std::uint32_t*>(::operator new(bytes_, alignment_))) {
#if defined(__linux__)
        if (bytes_ >= 2 * huge_page) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    }
    ~AlignedWords() { ::operator delete(data_, alignment_); }
    AlignedWords(const AlignedWords&) = delete;
    AlignedWords& operator=(const AlignedWords&) = delete;
    std::uint32_t* data() const { return data_; }

  private:
    static constexpr std::size_t cache_line = 64, huge_page = std::size_t{1} << 21;

    static std::size_t bytes(std::size_t count) {
        if (count > std::numeric_limits<std::size_t>::max() / 8) throw std::bad_alloc();
        return std::max<std::size_t>(count * 4, cache_line);
    }
    std::size_t bytes_;
    std::align_val_t alignment_;
    std::uint32_t* data_;
};

// A piece of memory for each worker.
class WordsByWorker {
  public:
    WordsByWorker(std::size_t words, int threads) : words_(words), memory_(words * static_cast<std::size_t>(threads)) {}
    std::uint32_t* of(int worker) const { return memory_.data() + words_ * static_cast<std::size_t>(worker); }

  private:
    std::size_t words_;
    AlignedWords memory_;
};

}  // namespace maskattn
