// Memory of the kernels' scratch and packed operands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>

namespace maskattn {

// `count` words of 32 bits, aligned to a cache line. Throws std::bad_alloc.
class AlignedWords {
  public:
    explicit AlignedWords(std::size_t count)
        : data_(static_cast<std::uint32_t*>(::operator new(bytes(count), std::align_val_t{64}))) {}
    ~AlignedWords() { ::operator delete(data_, std::align_val_t{64}); }
    AlignedWords(const AlignedWords&) = delete;
    AlignedWords& operator=(const AlignedWords&) = delete;
    std::uint32_t* data() const { return data_; }

  private:
    static std::size_t bytes(std::size_t count) {
        if (count > std::numeric_limits<std::size_t>::max() / 8) throw std::bad_alloc();
        return std::max<std::size_t>(count * 4, 64);
    }
    std::uint32_t* data_;
};

}  // namespace maskattn
