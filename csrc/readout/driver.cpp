// Each sequence's keys are cut into runs whose length depends only on the sizes, and the partial results of the runs are
// combined in their order, so that the result does not depend on the number of threads.
#include "readout/driver.hpp"

#include <algorithm>

#include "runtime/aligned_words.hpp"
#include "runtime/threads.hpp"

namespace maskattn {
namespace {

constexpr std::int64_t run_bytes = 512 << 10;  // bytes of K and V, enough to repay the partial result of 16 queries
constexpr std::int64_t most_runs = 256;        // runs of a sequence, which bound the memory of the partial results
constexpr std::size_t batch_words = std::size_t{64} << 18;  // 64 MiB of packed gradients, or those of one sequence
constexpr std::int64_t relevance_run_keys = 4 * tile_keys;

std::int64_t keys_of_run(const Readout& a, std::int64_t keys) {
    const std::int64_t key_bytes = std::int64_t{2} * std::max(a.heads, 1) * a.head_width * (a.bfloat16 ? 2 : 4);
    const std::int64_t tiles = std::max(ceil_divide(run_bytes, key_bytes * tile_keys), ceil_divide(keys, most_runs * tile_keys));
    return tiles * tile_keys;
}

// The runs of all sequences, in the order of the sequences.
struct Runs {
    std::vector<KeyRun> all;
    std::vector<std::size_t> first;  // first run of each sequence, and the end

    template <class KeysOfRun>
    Runs(const std::vector<std::int32_t>& starts, KeysOfRun keys_of_run) {
        for (std::size_t b = 0; b + 1 < starts.size(); ++b) {
            first.push_back(all.size());
            const std::int64_t end = starts[b + 1], step = keys_of_run(end - starts[b]);
            for (std::int64_t key = starts[b]; key < end; key += step)
                all.push_back({static_cast<std::int32_t>(b), key, std::min(step, end - key)});
        }
        first.push_back(all.size());
    }

    std::size_t sequences() const { return first.size() - 1; }
    std::size_t count(std::size_t sequence) const { return first[sequence + 1] - first[sequence]; }
    bool is_only_one(const KeyRun& run) const { return count(static_cast<std::size_t>(run.sequence)) == 1; }
};

// The memory of the runs' partial results; that of a sequence with a single run belongs to the worker.
class Partials {
  public:
    Partials(const Runs& runs, std::size_t words, int threads)
        : runs_(runs), words_(words), slot_(runs.all.size()), shared_(shared_words(runs, words, slot_)),
          own_(words * static_cast<std::size_t>(threads)) {}

    float* of(std::size_t run, int worker) const {
        std::uint32_t* words = runs_.is_only_one(runs_.all[run])
                                   ? own_.data() + words_ * static_cast<std::size_t>(worker)
                                   : shared_.data() + words_ * slot_[run];
        return reinterpret_cast<float*>(words);
    }

  private:
    static std::size_t shared_words(const Runs& runs, std::size_t words, std::vector<std::size_t>& slot) {
        std::size_t next = 0;
        for (std::size_t i = 0; i < runs.all.size(); ++i)
            if (!runs.is_only_one(runs.all[i])) slot[i] = next++;
        return next * words;
    }

    const Runs& runs_;
    std::size_t words_;
    std::vector<std::size_t> slot_;
    AlignedWords shared_, own_;
};

// Calls take(run, partial, worker) for every run, and finish(sequence, partials, count) for every sequence once its runs
// are done, also for sequences without runs.
template <class Take, class Finish>
void for_each_run(const Runs& runs, const Partials& partials, int threads, Take take, Finish finish) {
    auto take_run = [&](std::int64_t item, int worker) noexcept {
        const auto i = static_cast<std::size_t>(item);
        const KeyRun& run = runs.all[i];
        float* partial = partials.of(i, worker);
        take(run, partial, worker);
        if (runs.is_only_one(run)) finish(run.sequence, partial, std::int64_t{1});
    };
    for_each_item(threads, static_cast<std::int64_t>(runs.all.size()), take_run);
    auto finish_sequence = [&](std::int64_t item, int) noexcept {
        const auto b = static_cast<std::size_t>(item);
        if (runs.count(b) == 1) return;
        const float* first = runs.count(b) == 0 ? nullptr : partials.of(runs.first[b], 0);
        finish(static_cast<std::int32_t>(b), first, static_cast<std::int64_t>(runs.count(b)));
    };
    for_each_item(threads, static_cast<std::int64_t>(runs.sequences()), finish_sequence);
}

const ReadoutKernels& kernels_for(const Readout& a, const Kernels& kernels) {
    return a.bfloat16 ? kernels.readout.bfloat16 : kernels.readout.float32;
}

}  // namespace

void readout_forward(const Readout& a, const std::vector<std::int32_t>& starts, const Kernels& all_kernels,
                     int threads) {
    const ReadoutKernels& kernels = kernels_for(a, all_kernels);
    const Runs runs(starts, [&](std::int64_t keys) { return keys_of_run(a, keys); });
    const WordsByWorker scratch(kernels.scratch_words(a), threads);
    const Partials partials(runs, kernels.partial_words(a), threads);
    for_each_run(
        runs, partials, threads,
        [&](const KeyRun& run, float* partial, int worker) { kernels.attend(a, run, partial, scratch.of(worker)); },
        [&](std::int32_t b, const float* first, std::int64_t count) { kernels.write_output(a, b, first, count); });
    auto normalize = [&](std::int64_t i, int) noexcept {
        kernels.normalize_rows(a, runs.all[static_cast<std::size_t>(i)]);
    };
    if (a.rows.data) for_each_item(threads, static_cast<std::int64_t>(runs.all.size()), normalize);
}

void readout_backward(const Readout& a, const ReadoutGradients& g, const std::vector<std::int32_t>& starts,
                      const Kernels& all_kernels, int threads, double* dslopes) {
    const ReadoutKernels& kernels = kernels_for(a, all_kernels);
    const Runs runs(starts, [&](std::int64_t keys) { return keys_of_run(a, keys); });
    const std::size_t words = kernels.partial_words(a);
    const WordsByWorker scratch(kernels.scratch_words(a), threads);
    const AlignedWords row_gradients(g.grad_rows.data ? words * runs.all.size() : 0);
    const auto row_gradients_of = [&](std::size_t run) {
        return reinterpret_cast<float*>(row_gradients.data() + words * run);
    };
    auto sum_row_gradients = [&](std::int64_t item, int worker) noexcept {
        const auto i = static_cast<std::size_t>(item);
        kernels.sum_row_gradients(a, g, runs.all[i], row_gradients_of(i), scratch.of(worker));
    };
    if (g.grad_rows.data) for_each_item(threads, static_cast<std::int64_t>(runs.all.size()), sum_row_gradients);

    const auto heads = static_cast<std::size_t>(a.heads);
    const Partials partials(runs, words, threads);
    std::vector<double> dslopes_BH(runs.sequences() * heads);
    for_each_run(
        runs, partials, threads,
        [&](const KeyRun& run, float* partial, int worker) {
            const auto b = static_cast<std::size_t>(run.sequence);
            const float* sums = g.grad_rows.data ? row_gradients_of(runs.first[b]) : nullptr;
            const std::size_t count = g.grad_rows.data ? runs.count(b) : 0;
            kernels.differentiate(a, g, run, sums, static_cast<std::int64_t>(count), partial, scratch.of(worker));
        },
        [&](std::int32_t b, const float* first, std::int64_t count) {
            double* own = dslopes_BH.data() + static_cast<std::size_t>(b) * heads;
            kernels.write_query_gradients(a, g, b, first, count, own);
        });
    if (dslopes == nullptr) return;
    for (std::size_t h = 0; h < heads; ++h) {
        dslopes[h] = 0.0;
        for (std::size_t b = 0; b < runs.sequences(); ++b) dslopes[h] += dslopes_BH[b * heads + h];
    }
}

void token_relevance(const Relevance& a, const std::vector<std::int32_t>& starts, const Kernels& all_kernels,
                     int threads) {
    const RelevanceKernels& kernels = a.bfloat16 ? all_kernels.relevance.bfloat16 : all_kernels.relevance.float32;
    const auto heads = static_cast<std::size_t>(a.heads);
    const std::size_t head_words = kernels.gradient_words(a), sequence_words = heads * head_words;
    if (a.heads == 0 || a.classes == 0) {
        for (std::int64_t c = 0; c < a.classes; ++c)
            std::fill_n(a.relevance + c * a.relevance_class, starts.back(), 0.0f);
        return;
    }
    const WordsByWorker scratch(kernels.scratch_words(a), threads);
    const std::size_t sequences = starts.size() - 1;
    const std::size_t at_once = std::min(sequences, std::max<std::size_t>(batch_words / sequence_words, 1));
    const AlignedWords gradients(at_once * sequence_words);
    for (std::size_t first = 0; first < sequences; first += at_once) {
        const std::size_t count = std::min(at_once, sequences - first);
        const auto begin = starts.begin() + static_cast<std::ptrdiff_t>(first);
        const Runs runs({begin, begin + static_cast<std::ptrdiff_t>(count) + 1},
                        [](std::int64_t) { return relevance_run_keys; });
        auto pack = [&](std::int64_t item, int) noexcept {
            const auto i = static_cast<std::size_t>(item);
            if (runs.count(i / heads) == 0) return;
            kernels.pack_gradients(a, static_cast<std::int32_t>(first + i / heads), static_cast<int>(i % heads),
                                   gradients.data() + i * head_words);
        };
        for_each_item(threads, static_cast<std::int64_t>(count * heads), pack);
        auto take = [&](std::int64_t item, int worker) noexcept {
            KeyRun run = runs.all[static_cast<std::size_t>(item)];
            const std::uint32_t* own = gradients.data() + static_cast<std::size_t>(run.sequence) * sequence_words;
            run.sequence += static_cast<std::int32_t>(first);
            kernels.take_run(a, run, own, scratch.of(worker));
        };
        for_each_item(threads, static_cast<std::int64_t>(runs.all.size()), take);
    }
}

}  // namespace maskattn
