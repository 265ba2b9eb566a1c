// The compressed rows of pictures, read back by a plain inflater, and maps laid over them against a plain loop.
#include <cstdio>
#include <optional>
#include <vector>

#include "pictures/deflate.hpp"
#include "pictures/overlay.hpp"
#include "tests/cases.hpp"

namespace maskattn_tests {
namespace {

using Bytes = std::vector<std::uint8_t>;

class Bits {
  public:
    Bits(const std::uint8_t* from, std::size_t bytes) : from_(from), bits_(8 * bytes) {}

    int next(int count) {  // the first one lowest
        int value = 0;
        for (int i = 0; i < count; ++i) value |= bit() << i;
        return value;
    }
    int bit() {
        if (at_ == bits_) return 0;
        const int value = from_[at_ / 8] >> (at_ % 8) & 1;
        ++at_;
        return value;
    }
    std::size_t whole_bytes() const { return (at_ + 7) / 8; }

  private:
    const std::uint8_t* from_;
    std::size_t bits_, at_ = 0;
};

// The symbol that comes next, by trying the codes of each length in turn.
int symbol_of(Bits& bits, const std::vector<int>& lengths) {
    int code = 0, first = 0;
    for (int length = 1; length <= 15; ++length) {
        code = code << 1 | bits.bit();
        first <<= 1;
        int count = 0;
        for (std::size_t symbol = 0; symbol < lengths.size(); ++symbol)
            if (lengths[symbol] == length && first + count++ == code) return static_cast<int>(symbol);
        first += count;
    }
    return -1;
}

// Reads blocks with codes of their own, whose lengths use no runs; nothing if the stream is damaged.
std::optional<Bytes> inflated(const std::uint8_t* stream, std::size_t size) {
    if (size < 6 || stream[0] != 0x78 || (stream[0] * 256 + stream[1]) % 31 != 0) return std::nullopt;
    Bits bits(stream + 2, size - 6);
    Bytes out;
    for (bool last = false; !last;) {
        last = bits.next(1) != 0;
        if (bits.next(2) != 2) return std::nullopt;
        const int literals = bits.next(5) + 257, distances = bits.next(5) + 1, given = bits.next(4) + 4;
        std::vector<int> of_lengths(19);
        for (int i = 0; i < given; ++i) {
            const int order[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
            of_lengths[static_cast<std::size_t>(order[i])] = bits.next(3);
        }
        std::vector<int> literal_lengths, distance_lengths;
        for (int i = 0; i < literals; ++i) literal_lengths.push_back(symbol_of(bits, of_lengths));
        for (int i = 0; i < distances; ++i) distance_lengths.push_back(symbol_of(bits, of_lengths));
        for (int symbol = symbol_of(bits, literal_lengths); symbol != 256; symbol = symbol_of(bits, literal_lengths)) {
            if (symbol < 0) return std::nullopt;
            if (symbol < 256) {
                out.push_back(static_cast<std::uint8_t>(symbol));
                continue;
            }
            const int of_length = symbol - 257, of_extra = of_length < 8 || of_length == 28 ? 0 : of_length / 4 - 1;
            const int start = of_length == 28 ? 258
                              : of_length < 8 ? 3 + of_length
                                              : 3 + ((4 + of_length % 4) << of_extra);
            const int length = start + bits.next(of_extra);
            const int far = symbol_of(bits, distance_lengths), far_extra = far < 4 ? 0 : far / 2 - 1;
            if (far < 0) return std::nullopt;
            const int away = 1 + (far < 4 ? far : (2 + far % 2) << far_extra) + bits.next(far_extra);
            if (static_cast<std::size_t>(away) > out.size()) return std::nullopt;
            for (int i = 0; i < length; ++i) out.push_back(out[out.size() - static_cast<std::size_t>(away)]);
        }
    }
    if (bits.whole_bytes() != size - 6) return std::nullopt;
    std::uint32_t sum = 1, sum_of_sums = 0;
    for (const std::uint8_t value : out) {
        sum = (sum + value) % 65521;
        sum_of_sums = (sum_of_sums + sum) % 65521;
    }
    for (std::size_t i = 0; i < 4; ++i)
        if (stream[size - 4 + i] != ((sum_of_sums << 16 | sum) >> (24 - 8 * i) & 255)) return std::nullopt;
    return out;
}

std::uint8_t byte_below(Random& random, int count) {
    return static_cast<std::uint8_t>((random.uniform() + 1.0) / 2.0 * count);
}

// Of noise, of few values, of repeated pixels and of values of which each is half as frequent as the one before.
Bytes some_pixels(Random& random, std::size_t count, int kind) {
    Bytes pixels(count);
    for (std::size_t i = 0; i < count; ++i) {
        std::uint8_t value = byte_below(random, kind == 0 ? 256 : 3);
        if (kind == 2 && i >= 21) value = pixels[i - 3 * (1 + i / 300 % 7)];
        if (kind == 3)
            for (value = 0; value < 40 && random.uniform() < 0.0;) ++value;
        pixels[i] = value;
    }
    return pixels;
}

bool reads_back(std::ptrdiff_t height, std::ptrdiff_t width, int kind) {
    Random random(static_cast<std::uint64_t>(height * 31 + width * 7 + kind));
    const auto row_bytes = static_cast<std::size_t>(3 * width);
    const Bytes pixels = some_pixels(random, row_bytes * static_cast<std::size_t>(height), kind);
    const maskattn::Stream stream = maskattn::compressed_rows({pixels.data(), height, width});
    const std::optional<Bytes> rows = inflated(stream.bytes.get(), stream.size);
    bool same = rows && rows->size() == pixels.size() + static_cast<std::size_t>(height);
    for (std::size_t i = 0; same && i < pixels.size(); ++i) {
        const std::size_t row = i / row_bytes;
        const std::uint8_t above = row > 0 ? pixels[i - row_bytes] : std::uint8_t{0};
        same = (*rows)[row * (row_bytes + 1)] == 2 && (*rows)[i + row + 1] == static_cast<std::uint8_t>(pixels[i] - above);
    }
    if (!same) std::printf("a picture of %td x %td px, kind %d, does not read back\n", height, width, kind);
    return same;
}

bool is_laid_over() {
    constexpr std::size_t height = 37, width = 53, tokens = 9, colours = 5, row_bytes = 3 * width + 7;
    Random random(1);
    const Bytes picture = some_pixels(random, height * width * 3, 0), grey = some_pixels(random, height * width, 0);
    const Bytes mixtures = some_pixels(random, colours * 256 * 3, 0);
    std::vector<std::int32_t> token(height * width), colour(tokens);
    for (std::size_t i = 0; i < token.size(); ++i) token[i] = static_cast<std::int32_t>(i / 5 % tokens);
    for (std::size_t i = 0; i < tokens; ++i) colour[i] = static_cast<std::int32_t>(i % (colours + 1)) - 1;
    Bytes result(height * row_bytes - 7, 0xee), expected = result;  // ends with the last row
    for (std::size_t i = 0; i < token.size(); ++i)
        for (std::size_t channel = 0; channel < 3; ++channel) {
            const std::int32_t of_token = colour[static_cast<std::size_t>(token[i])];
            const std::size_t mixture = (static_cast<std::size_t>(of_token < 0 ? 0 : of_token) * 256 + grey[i]) * 3;
            expected[i / width * row_bytes + i % width * 3 + channel] =
                of_token < 0 ? picture[3 * i + channel] : mixtures[mixture + channel];
        }
    maskattn::Overlay overlay{picture.data(),  grey.data(), token.data(),  colour.data(), tokens, mixtures.data(),
                              colours,         result.data(), row_bytes, height,        width};
    bool right = maskattn::lay_over(overlay) && result == expected;
    token.back() = tokens;
    right = !maskattn::lay_over(overlay) && right;
    token.back() = -1;
    right = !maskattn::lay_over(overlay) && right;
    token.back() = 1;
    colour[1] = colours;
    right = !maskattn::lay_over(overlay) && right;
    if (!right) std::printf("a map is laid over a picture wrongly\n");
    return right;
}

}  // namespace

bool pictures_are_right() {
    bool right = is_laid_over();
    for (int kind = 0; kind < 4; ++kind)
        for (const auto& [height, width] : {std::pair<std::ptrdiff_t, std::ptrdiff_t>{1, 1}, {1, 2}, {5, 1}, {3, 200},
                                            {67, 131}, {300, 400}})
            right = reads_back(height, width, kind) && right;
    return right;
}

}  // namespace maskattn_tests
