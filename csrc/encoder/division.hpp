// The division of a block's work: sequences among workers, those of a worker into groups, and rows into items.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "encoder/encoder.hpp"

namespace maskattn {
namespace {

// Items of rows: long ones, since a weight that is read then serves many rows. Of rows that several workers share, the
// last items are short, so that they end together.
class RowItems {
  public:
    RowItems(std::int64_t count, int workers) {
        for (std::int64_t row = 0; row < count;) {
            starts_.push_back(row);
            const std::int64_t left = count - row, items = (left + most_item_rows - 1) / most_item_rows;
            const std::int64_t equal = (left + items - 1) / items, up = fewest_item_rows - 1;
            const std::int64_t units = (workers > 1 ? left / (2 * workers) : equal + up) / fewest_item_rows;
            row += std::clamp<std::int64_t>(units * fewest_item_rows, fewest_item_rows, most_item_rows);
        }
        starts_.push_back(count);
    }

    std::int64_t count() const { return static_cast<std::int64_t>(starts_.size()) - 1; }
    std::int64_t first(std::int64_t item) const { return starts_[static_cast<std::size_t>(item)]; }
    int rows(std::int64_t item) const { return static_cast<int>(first(item + 1) - first(item)); }

  private:
    std::vector<std::int64_t> starts_;
};

// The consecutive sequences [first, last), their owner, and the number of workers that may take part in them.
struct Group {
    std::size_t first, last;
    int owner, workers;
    bool is_one() const { return last - first == 1; }
};

// Gives each worker an equal share of the rows of sequences, of which b consists of rows starts[b] to starts[b + 1], in
// groups of about so many rows. Other workers help with its last group when they have ended theirs.
inline std::vector<Group> groups_of(const std::vector<std::int32_t>& starts, std::int64_t rows_of_group, int workers) {
    std::vector<Group> groups;
    const std::int64_t rows = starts.back();
    // The end of the sequences from `first` on of which at least half comes before row `end`.
    const auto half_before = [&](std::size_t first, std::int64_t end) {
        while (first + 1 < starts.size() && std::int64_t{starts[first]} + starts[first + 1] <= 2 * end) ++first;
        return first;
    };
    std::size_t first = 0;
    for (int worker = 0; worker < workers; ++worker) {
        const std::size_t last = half_before(first, rows * (worker + 1) / workers);
        const std::int64_t begin = starts[first], own = starts[last] - begin;
        const std::int64_t count = std::max<std::int64_t>((own + rows_of_group / 2) / rows_of_group, 1);
        for (std::int64_t number = 1; number <= count; ++number) {
            const std::size_t end = number == count ? last : half_before(first, begin + own * number / count);
            if (starts[end] > starts[first]) groups.push_back({first, end, worker, 1});
            first = end;
        }
        if (!groups.empty() && groups.back().owner == worker) groups.back().workers = workers;
    }
    return groups;
}

}  // namespace
}  // namespace maskattn
