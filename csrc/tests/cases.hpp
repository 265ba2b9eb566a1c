// Small seeded problems and a plain double loop for each operation.
//
// Dimension key: B sequences, R queries of each (all of its queries for attention), T keys, H heads, D head width,
// K classes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dispatch/kernels.hpp"

namespace maskattn_tests {

// Numbers in the form that the kernels take (float32 or bfloat16), and as doubles of the same values.
struct Tensor {
    std::vector<double> exact;
    std::vector<float> float32;
    std::vector<std::uint16_t> bfloat16;

    void* data(bool half) { return half ? static_cast<void*>(bfloat16.data()) : static_cast<void*>(float32.data()); }
    double value(bool half, std::size_t i) const;
};

class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
    double uniform();  // [-1, 1)
    Tensor tensor(std::size_t count, bool half);
    std::vector<float> floats(std::size_t count, float times);

  private:
    std::uint64_t state_;
};

Tensor unwritten(std::size_t count);
std::uint16_t to_bfloat16(float x);
float to_float(std::uint16_t bfloat16);

// The results of the plain loop for one sequence and head, as rows of D.
struct PlainHead {
    std::vector<std::vector<double>> q, k, v, grad_out;
    std::vector<double> key_bias, grad_lse;
    std::vector<std::vector<double>> distance, grad_rows;  // [query][key]
    double scale, slope;
};

struct HeadResults {
    std::vector<std::vector<double>> out, p, dq, dk, dv, score_change;
    std::vector<double> lse, dbias;
    double dslope;
};

HeadResults attend(const PlainHead& head);

// Counts the values that are off by more than `tolerance` times the largest.
class Comparison {
  public:
    Comparison(std::string name, double tolerance) : name_(std::move(name)), tolerance_(tolerance) {}
    void add(double got, double exact);
    bool passes() const;  // prints what failed

  private:
    std::string name_;
    double tolerance_, largest_ = 0.0, error_ = 0.0;
    bool finite_ = true;
};

struct NamedKernels {
    std::string name;
    const maskattn::Kernels& kernels;
};

// Returns the kernels of every instruction set of this machine, and of tiles in software.
std::vector<NamedKernels> all_kernels();

bool attention_is_right();
bool readout_is_right();
bool relevance_is_right();
bool coverage_is_right();
bool packing_is_right();
bool encoder_is_right();
bool pictures_are_right();
bool chains_are_right();

}  // namespace maskattn_tests
