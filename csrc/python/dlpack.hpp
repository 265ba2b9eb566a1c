// Tensors as DLPack capsules hand them over (https://dmlc.github.io/dlpack/latest/c_api.html), as far as they are read
// here. A capsule keeps its tensor as long as it lives, and is not consumed.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

namespace maskattn::dlpack {

constexpr std::int32_t cpu = 1;

struct Device {
    std::int32_t type;
    std::int32_t number;
};

struct Dtype {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t axes;
    Dtype dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null if there are no gaps
    std::uint64_t byte_offset;
};

// Returns numpy's letter for the kind of a dtype, "u" for bfloat16, whose bits numpy has as uint16; 0 for others.
inline char kind_of(const Dtype& dtype) {
    switch (dtype.code) {
        case 0: return 'i';
        case 1: return 'u';
        case 2: return 'f';
        case 4: return 'u';
        case 6: return 'b';
        default: return 0;
    }
}

inline std::string text_of(const Tensor& tensor) {
    static const char* const names[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    const bool known = tensor.dtype.code < sizeof names / sizeof *names;
    const std::string name = known ? names[tensor.dtype.code] : "dtype " + std::to_string(tensor.dtype.code) + " of ";
    const bool here = tensor.device.type == cpu;
    return name + std::to_string(tensor.dtype.bits) + (here ? "" : " on device " + std::to_string(tensor.device.type));
}

// Returns the tensor of an unconsumed capsule; null for any other object.
inline const Tensor* tensor_of(PyObject* object) {
    constexpr const char* name = "dltensor";
    if (!PyCapsule_IsValid(object, name)) return nullptr;
    return static_cast<const Tensor*>(PyCapsule_GetPointer(object, name));
}

}  // namespace maskattn::dlpack
