// Memory for the kernels' scratch and packed operands.
#pragma once

#include <cstddef>
#include <cstdint>

namespace maskattn {

// `count` words of 32 bits, uninitialised and aligned to a cache line, or to a huge page if there are many, since page
// faults of small pages cost attention a few percent. Throws std::bad_alloc.
class AlignedWords {
  public:
    explicit AlignedWords(std::size_t count);
    ~AlignedWords();
    AlignedWords(const AlignedWords&) = delete;
    AlignedWords& operator=(const AlignedWords&) = delete;
    std::uint32_t* data() const { return data_; }

  private:
    std::size_t bytes_;
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
