// Deflate (RFC 1951) for rows of pixels. What makes it fast: it searches for repetitions of whole pixels only, at one
// earlier position, and three bytes are written at once. Noise hardly repeats, and Huffman's codes do most of the work.
#include "pictures/deflate.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "pictures/prefix_codes.hpp"

namespace maskattn {
namespace {

using Byte = std::uint8_t;

constexpr std::ptrdiff_t channels = 3;
constexpr Byte above = 2;  // PNG's filter "Up"
constexpr int literals = 286, distances = 30, end_of_block = 256, first_length = 257;
constexpr std::ptrdiff_t most_distance = 32768, most_length = 258, least_length = 2 * channels;
constexpr std::ptrdiff_t read_ahead = 16;  // bytes that may be read after the last row
constexpr int hash_bits = 12;
constexpr std::size_t tokens_in_block = 1 << 16;

constexpr std::array<std::uint16_t, 29> length_starts{3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                                      31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};

int extra_bits_of_length(int code) { return code < 8 || code == 28 ? 0 : code / 4 - 1; }

constexpr std::array<Byte, most_length + 1> codes_of_lengths() {
    std::array<Byte, most_length + 1> result{};
    for (std::size_t code = 0; code < length_starts.size(); ++code)
        for (std::size_t length = length_starts[code]; length < result.size(); ++length)
            result[length] = static_cast<Byte>(code);
    return result;
}

constexpr std::array<Byte, most_length + 1> length_codes = codes_of_lengths();  // counted from the first

// The code of a distance less 1: two codes for each power of two.
int distance_code(std::uint32_t distance) {
    if (distance < 4) return static_cast<int>(distance);
    const int top = 31 - __builtin_clz(distance);
    return 2 * top + static_cast<int>((distance >> (top - 1)) & 1);
}

// What a block consists of, in the two highest bits: a pixel, a byte, or a repetition of (length, distance less 1).
enum Kind : std::uint32_t { pixel = 0, byte = 1, repetition = 2 };
constexpr int kind_shift = 30, length_shift = 15;

std::uint64_t eight_bytes(const Byte* from) {
    std::uint64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

class BitWriter {
  public:
    explicit BitWriter(Byte* to) : to_(to) {}

    // At most 57 bits may be put between two flushes.
    void put(std::uint64_t bits, int count) {
        waiting_ |= bits << count_;
        count_ += count;
    }
    void flush() {
        std::memcpy(to_, &waiting_, sizeof waiting_);
        to_ += count_ / 8;
        waiting_ >>= count_ / 8 * 8;
        count_ %= 8;
    }
    Byte* end() {
        put(0, (8 - count_) % 8);
        flush();
        return to_;
    }

  private:
    Byte* to_;
    std::uint64_t waiting_ = 0;
    int count_ = 0;
};

// The tokens of one block, and how often each symbol occurs.
struct Block {
    std::vector<std::uint32_t> tokens = std::vector<std::uint32_t>(tokens_in_block + 1);  // one more after a row's start
    std::size_t size = 0;
    std::array<std::uint32_t, most_symbols> literal_counts;
    std::array<std::uint32_t, most_symbols> distance_counts;

    void clear() {
        size = 0;
        literal_counts.fill(0);
        distance_counts.fill(0);
        literal_counts[end_of_block] = literal_counts[0] = 1;
        distance_counts[0] = distance_counts[1] = 1;  // some readers take no code of a single symbol
    }

    // Count the symbols of a token, and return the token.
    std::uint32_t of_byte(Byte value) {
        ++literal_counts[value];
        return byte << kind_shift | value;
    }
    std::uint32_t of_pixel(std::uint32_t value) {
        ++literal_counts[value & 255];
        ++literal_counts[value >> 8 & 255];
        ++literal_counts[value >> 16];
        return pixel << kind_shift | value;
    }
    std::uint32_t of_repetition(std::ptrdiff_t length, std::ptrdiff_t distance) {
        const auto away = static_cast<std::uint32_t>(distance - 1);
        ++literal_counts[first_length + length_codes[static_cast<std::size_t>(length)]];
        ++distance_counts[distance_code(away)];
        return repetition << kind_shift | static_cast<std::uint32_t>(length) << length_shift | away;
    }
};

// Divides filtered rows into tokens, block by block.
class Tokens {
  public:
    Tokens(const Byte* rows, std::ptrdiff_t height, std::ptrdiff_t row_bytes)
        : rows_(rows), end_(height * row_bytes), row_bytes_(row_bytes) {}

    // Fills a block; returns whether it is the last.
    bool fill(Block& block) {
        std::uint32_t* next = block.tokens.data();
        const std::uint32_t* full = next + tokens_in_block;
        std::ptrdiff_t position = position_;  // what changes with each token is kept in registers, unlike members
        while (position < end_ && next < full) {
            if (position == end_of_row_) {
                *next++ = block.of_byte(rows_[position++]);
                end_of_row_ += row_bytes_;
            }
            for (const std::ptrdiff_t end_of_row = end_of_row_; position < end_of_row && next < full;)
                position += add_next(block, position, end_of_row, *next++);
        }
        position_ = position;
        block.size = static_cast<std::size_t>(next - block.tokens.data());
        return position == end_;
    }

  private:
    // Writes a repetition or a pixel as a token, and returns the number of its bytes.
    std::ptrdiff_t add_next(Block& block, std::ptrdiff_t position, std::ptrdiff_t end_of_row, std::uint32_t& token) {
        const Byte* here = rows_ + position;
        const std::uint64_t coming = eight_bytes(here), two_pixels = coming << 16;
        std::uint32_t& last = last_seen_[two_pixels * 0x9E3779B97F4A7C15u >> (64 - hash_bits)];
        const auto distance = static_cast<std::ptrdiff_t>(static_cast<std::uint32_t>(position) - last);
        last = static_cast<std::uint32_t>(position);
        const bool repeats = eight_bytes(here - distance) << 16 == two_pixels;
        if (repeats && distance > 0 && distance <= most_distance && end_of_row - position >= least_length) {
            const std::ptrdiff_t length = length_of_repetition(here, distance, end_of_row - position);
            token = block.of_repetition(length, distance);
            return length;
        }
        token = block.of_pixel(static_cast<std::uint32_t>(coming) & 0xffffff);
        return channels;
    }

    // The number of bytes, in whole pixels, that are the same from here and from this far before; the first two are.
    static std::ptrdiff_t length_of_repetition(const Byte* here, std::ptrdiff_t distance, std::ptrdiff_t limit) {
        limit = std::min(most_length, limit);
        std::ptrdiff_t length = least_length;
        while (length < limit) {
            const std::uint64_t differing = eight_bytes(here + length) ^ eight_bytes(here + length - distance);
            if (differing != 0) {
                length += __builtin_ctzll(differing) / 8;
                break;
            }
            length += 8;
        }
        return std::min(length, limit) / channels * channels;
    }

    const Byte* rows_;
    std::ptrdiff_t end_, row_bytes_, position_ = 0, end_of_row_ = 0;
    std::array<std::uint32_t, 1 << hash_bits> last_seen_{};  // the latest position of two pixels, by their hash
};

void write_codes(BitWriter& writer, const PrefixCodes& literal, const PrefixCodes& distance) {
    writer.put(literals - 257, 5);
    writer.put(distances - 1, 5);
    writer.put(19 - 4, 4);
    writer.flush();
    // The lengths from 0 to 15 are given by four bits each. First come the three codes for runs, which are not used.
    for (int code = 0; code < 19; ++code) {
        writer.put(code < 3 ? 0 : 4, 3);
        writer.flush();
    }
    const auto write_lengths = [&](const PrefixCodes& codes, int symbols) {
        for (int symbol = 0; symbol < symbols; ++symbol) {
            const int length = codes.lengths[symbol];
            const int first_bit_lowest = (length & 1) << 3 | (length & 2) << 1 | (length & 4) >> 1 | (length & 8) >> 3;
            writer.put(static_cast<std::uint64_t>(first_bit_lowest), 4);
            writer.flush();
        }
    };
    write_lengths(literal, literals);
    write_lengths(distance, distances);
}

void write_repetition(BitWriter& writer, std::uint32_t token, const PrefixCodes& literal, const PrefixCodes& distance) {
    const std::uint32_t length = token >> length_shift & 511, away = token & (most_distance - 1);
    const int code = length_codes[length];
    writer.put(literal.bits[first_length + code], literal.lengths[first_length + code]);
    writer.put(length - length_starts[static_cast<std::size_t>(code)], extra_bits_of_length(code));
    const int far = distance_code(away);
    writer.put(distance.bits[far], distance.lengths[far]);
    const int extra = far < 4 ? 0 : far / 2 - 1;
    writer.put(away & ((1u << extra) - 1), extra);
}

void write_block(BitWriter& writer, const Block& block, bool is_last) {
    const PrefixCodes literal = prefix_codes(block.literal_counts, literals);
    const PrefixCodes distance = prefix_codes(block.distance_counts, distances);
    writer.put(is_last, 1);
    writer.put(2, 2);  // with codes of its own
    write_codes(writer, literal, distance);
    std::array<std::uint32_t, 256> codes;  // of bytes, each after its length, so that one read gives both
    for (std::size_t value = 0; value < codes.size(); ++value)
        codes[value] = static_cast<std::uint32_t>(literal.lengths[value]) << 16 | literal.bits[value];
    for (std::size_t i = 0; i < block.size; ++i) {
        const std::uint32_t token = block.tokens[i];
        const std::uint32_t first = token & 255;
        if (token >> kind_shift == pixel) {
            for (int shift = 0; shift < 24; shift += 8) {
                const std::uint32_t code = codes[token >> shift & 255];
                writer.put(code & 0xffff, static_cast<int>(code >> 16));
            }
        } else if (token >> kind_shift == byte) {
            writer.put(literal.bits[first], literal.lengths[first]);
        } else {
            write_repetition(writer, token, literal, distance);
        }
        writer.flush();
    }
    writer.put(literal.bits[end_of_block], literal.lengths[end_of_block]);
    writer.flush();
}

// Writes the differences of all pixels from those above them, each row after the number of the filter.
void filter_rows(const Pixels& image, Byte* to) {
    const std::ptrdiff_t row_bytes = image.width * channels;
    for (std::ptrdiff_t y = 0; y < image.height; ++y) {
        const Byte* row = image.bytes + y * row_bytes;
        *to++ = above;
        if (y == 0)
            std::copy(row, row + row_bytes, to);
        else
            for (std::ptrdiff_t x = 0; x < row_bytes; ++x) to[x] = static_cast<Byte>(row[x] - row[x - row_bytes]);
        to += row_bytes;
    }
}

std::uint32_t adler32(const Byte* bytes, std::ptrdiff_t count) {
    constexpr std::uint32_t prime = 65521;
    constexpr std::ptrdiff_t group = 64, between_divisions = 64 * group;
    std::uint32_t sum = 1, sum_of_sums = 0;
    for (std::ptrdiff_t i = 0; i < count;) {
        const std::ptrdiff_t end = std::min(count, i + between_divisions);
        for (; i + group <= end; i += group) {
            std::uint32_t of_group = 0, weighted = 0;
            for (std::ptrdiff_t k = 0; k < group; ++k) {
                of_group += bytes[i + k];
                weighted += static_cast<std::uint32_t>(group - k) * bytes[i + k];
            }
            sum_of_sums += static_cast<std::uint32_t>(group) * sum + weighted;
            sum += of_group;
        }
        for (; i < end; ++i) sum_of_sums += sum += bytes[i];
        sum %= prime;
        sum_of_sums %= prime;
    }
    return sum_of_sums << 16 | sum;
}

}  // namespace

Stream compressed_rows(const Pixels& image) {
    const std::ptrdiff_t row_bytes = 1 + image.width * channels, all = image.height * row_bytes;
    const std::unique_ptr<Byte[]> rows(new Byte[static_cast<std::size_t>(all + read_ahead)]);
    filter_rows(image, rows.get());
    std::fill(rows.get() + all, rows.get() + all + read_ahead, Byte{0});

    // Huffman's codes are never longer, all together, than eight bits a byte and the lengths of the codes.
    const std::ptrdiff_t blocks = 1 + all / static_cast<std::ptrdiff_t>(tokens_in_block);
    Stream stream{std::unique_ptr<Byte[]>(new Byte[static_cast<std::size_t>(all + all / 8 + 512 * blocks)]), 0};
    stream.bytes[0] = 0x78;  // deflate with a window of 32 KiB, compressed fast
    stream.bytes[1] = 0x01;
    BitWriter writer(stream.bytes.get() + 2);
    Tokens tokens(rows.get(), image.height, row_bytes);
    Block block;
    for (bool is_last = false; !is_last;) {
        block.clear();
        is_last = tokens.fill(block);
        write_block(writer, block, is_last);
    }
    Byte* end = writer.end();
    const std::uint32_t checksum = adler32(rows.get(), all);
    for (int shift = 24; shift >= 0; shift -= 8) *end++ = static_cast<Byte>(checksum >> shift);
    stream.size = static_cast<std::size_t>(end - stream.bytes.get());
    return stream;
}

}  // namespace maskattn
