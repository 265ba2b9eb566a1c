// Linear layers and blocks of vision transformers as objects that hold their packed weights.
#include <cmath>
#include <memory>

#include "encoder/driver.hpp"
#include "python/bindings.hpp"
#include "python/call.hpp"
#include "runtime/threads.hpp"

namespace maskattn {
namespace {

Activation checked_activation(const Arguments& arguments, const std::string& name) {
    if (name == "none") return Activation::none;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    arguments.refuse("an activation", "activation='" + name + "'", "choose among none, gelu and gelu_tanh");
}

const std::vector<Dtype> value_dtypes{Dtype::float32, Dtype::bfloat16};

ConstRows rows_of(const Array& x) { return {static_cast<const float*>(x.data), x.strides[0]}; }
Rows output_rows_of(const Array& x) { return {static_cast<float*>(x.data), x.strides[0]}; }

// Checks an optional vector of `count` floats; nullptr for None.
const float* vector_of(const Arguments& arguments, const char* name, Object value, std::ptrdiff_t count) {
    if (value.is_none()) return nullptr;
    return static_cast<const float*>(arguments.array(name, value, Dtype::float32, {count}, "(O,)", 1).data);
}

class Linear {
  public:
    Linear(Object weight, Object bias, const std::string& instruction_set, int threads)
        : kernels_(checked_kernels(arguments_, instruction_set)) {
        const Array given = arguments_.array("weight", weight, value_dtypes, 2, 1);
        const std::ptrdiff_t outputs = given.shape[0], inputs = given.shape[1];
        const bool bfloat16 = given.dtype == Dtype::bfloat16;
        if (inputs < 1 || outputs < 1 || inputs > most_features || outputs > most_features)
            arguments_.refuse("1 to " + std::to_string(most_features) + " input and output features",
                              "weight.shape=" + text_of(given.shape), "use torch.nn.functional.linear");
        if (bfloat16 && inputs % 2 != 0)
            arguments_.refuse("an even number of input features in bfloat16", "weight.shape=" + text_of(given.shape),
                              "pass float32, or use torch.nn.functional.linear");
        const float* values = vector_of(arguments_, "bias", bias, outputs);
        const int workers = thread_count(checked_threads(arguments_, threads));
        const py::gil_scoped_release release;
        packed_ = std::make_unique<PackedLinear>(kernels_, bfloat16, ConstValues{given.data, given.strides[0]}, values,
                                                 static_cast<int>(inputs), static_cast<int>(outputs), workers);
    }

    void apply(Object x, Object out, const std::string& activation, int threads) const {
        const Dtype dtype = layer().bfloat16 ? Dtype::bfloat16 : Dtype::float32;
        const Array rows = arguments_.array("x", x, std::vector<Dtype>{dtype}, 2, 1);
        const Shape shape{rows.shape[0], layer().outputs};
        if (rows.shape[1] != layer().inputs)
            arguments_.refuse("x of shape (T, " + std::to_string(layer().inputs) + ")", "x.shape=" + text_of(rows.shape),
                              "pass rows of the layer's input features");
        const Array result = arguments_.output("out", out, dtype, shape, "(T, O)", 1);
        const Activation act = checked_activation(arguments_, activation);
        const EncoderExecution how{&kernels_, thread_count(checked_threads(arguments_, threads))};
        const py::gil_scoped_release release;
        apply_linear_layer(layer(), act, {rows.data, rows.strides[0]}, rows.shape[0], {result.data, result.strides[0]}, how);
    }

    const LinearLayer& layer() const { return packed_->layer(); }
    const Kernels& kernels() const { return kernels_; }

  private:
    static constexpr std::ptrdiff_t most_features = 1 << 16;

    const Arguments arguments_{"LinearLayer"};
    const Kernels& kernels_;
    std::unique_ptr<PackedLinear> packed_;
};

using LinearPointer = std::shared_ptr<Linear>;

class Block {
  public:
    Block(Object norm1_weight, Object norm1_bias, double norm1_eps, LinearPointer qkv, LinearPointer proj, Object scale1,
          Object norm2_weight, Object norm2_bias, double norm2_eps, LinearPointer fc1, LinearPointer fc2, Object scale2,
          int heads, const std::string& activation)
        : layers_{qkv, proj, fc1, fc2} {
        const int width = proj->layer().outputs;
        if (heads < 1 || width % heads != 0)
            arguments_.refuse("a number of heads that divides the width " + std::to_string(width),
                              "heads=" + std::to_string(heads), "pass that of the attention layer");
        check_head_width(arguments_, width / heads);
        check(*qkv, "qkv", width, 3 * width, *proj);
        check(*proj, "proj", width, width, *proj);
        check(*fc1, "fc1", width, fc1->layer().outputs, *proj);
        check(*fc2, "fc2", fc1->layer().outputs, width, *proj);
        const auto norm = [&](const char* name, Object weight, Object bias, double eps) -> LayerNorm {
            if (!(eps >= 0.0) || !std::isfinite(eps))
                arguments_.refuse("a finite eps >= 0 of the norms", std::to_string(eps), "pass that of the layer");
            return {kept(name, weight, width, 1.0f), kept(name, bias, width, 0.0f), static_cast<float>(eps)};
        };
        block_.width = width;
        block_.heads = heads;
        block_.norm1 = norm("norm1", norm1_weight, norm1_bias, norm1_eps);
        block_.norm2 = norm("norm2", norm2_weight, norm2_bias, norm2_eps);
        block_.qkv = qkv->layer();
        block_.proj = proj->layer();
        block_.fc1 = fc1->layer();
        block_.fc2 = fc2->layer();
        block_.scale1 = kept("scale1", scale1, width, 1.0f);
        block_.scale2 = kept("scale2", scale2, width, 1.0f);
        block_.activation = checked_activation(arguments_, activation);
    }

    void apply(Object x, Object cu_seqlens, Object out, int threads) const {
        const Array rows = arguments_.array("x", x, std::vector<Dtype>{Dtype::float32}, 2, 1);
        if (rows.shape[1] != block_.width)
            arguments_.refuse("x of shape (T, " + std::to_string(block_.width) + ")", "x.shape=" + text_of(rows.shape),
                              "pass rows of the block's width");
        if (rows.shape[0] > most_rows) arguments_.refuse("at most 2147483647 rows", text_of(rows.shape), "split the call");
        const std::vector<std::int32_t> starts = checked_starts(arguments_, "cu_seqlens", cu_seqlens, rows.shape[0], "x");
        const Array result = arguments_.output("out", out, Dtype::float32, rows.shape, "(T, C)", 1);
        const EncoderExecution how{&layers_[0]->kernels(), thread_count(checked_threads(arguments_, threads))};
        const py::gil_scoped_release release;
        apply_encoder_block(block_, rows_of(rows), starts, output_rows_of(result), how);
    }

  private:
    void check(const Linear& linear, const char* name, int inputs, int outputs, const Linear& other) const {
        const LinearLayer& layer = linear.layer();
        if (layer.inputs != inputs || layer.outputs != outputs)
            arguments_.refuse(std::string(name) + " of shape (O, I) = " + text_of({outputs, inputs}),
                              text_of({layer.outputs, layer.inputs}), "pass the layers of one block");
        if (&linear.kernels() != &other.kernels())
            arguments_.refuse("layers packed for one instruction set", "several", "pack them for the same");
        if (layer.bfloat16 != other.layer().bfloat16)
            arguments_.refuse("layers of one dtype", "float32 and bfloat16", "pass weights of the same");
    }

    const float* kept(const char* name, Object value, int count, float fill) {
        vectors_.push_back(padded_values(vector_of(arguments_, name, value, count), count, fill));
        return vectors_.back().data();
    }

    const Arguments arguments_{"EncoderBlock"};
    const LinearPointer layers_[4];
    std::vector<std::vector<float>> vectors_;
    EncoderBlock block_{};
};

}  // namespace

void bind_encoder(py::module_& module) {
    py::class_<Linear, LinearPointer>(module, "LinearLayer", "A linear layer with packed weights; see _native.pyi.")
        .def(py::init<Object, Object, const std::string&, int>(), py::arg("weight"), py::arg("bias") = py::none(),
             py::kw_only(), py::arg("instruction_set") = "", py::arg("threads") = 0)
        .def("apply", &Linear::apply, py::arg("x"), py::arg("out"), py::kw_only(), py::arg("activation") = "none",
             py::arg("threads") = 0, "Write activation(x W + b) to out; see _native.pyi.");
    py::class_<Block>(module, "EncoderBlock", "A transformer block with packed weights; see _native.pyi.")
        .def(py::init<Object, Object, double, LinearPointer, LinearPointer, Object, Object, Object, double, LinearPointer,
                      LinearPointer, Object, int, const std::string&>(),
             py::kw_only(), py::arg("norm1_weight"), py::arg("norm1_bias"), py::arg("norm1_eps"), py::arg("qkv").none(false),
             py::arg("proj").none(false), py::arg("scale1"), py::arg("norm2_weight"), py::arg("norm2_bias"), py::arg("norm2_eps"),
             py::arg("fc1").none(false), py::arg("fc2").none(false), py::arg("scale2"), py::arg("heads"), py::arg("activation"))
        .def("apply", &Block::apply, py::arg("x"), py::arg("cu_seqlens"), py::arg("out"), py::kw_only(),
             py::arg("threads") = 0, "Write the block's output on packed sequences to out; see _native.pyi.");
}

}  // namespace maskattn
