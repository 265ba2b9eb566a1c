#include "python/call.hpp"

#include <cmath>

#include "dispatch/instruction_sets.hpp"
#include "runtime/threads.hpp"

namespace maskattn {

void check_head_width(const Arguments& arguments, std::ptrdiff_t head_width) {
    if (head_width >= least_head_width && head_width <= most_head_width && head_width % head_width_step == 0) return;
    arguments.refuse("a head width D of 16 to 256 in steps of 8", "D=" + std::to_string(head_width),
                     "pad q, k and v with zeros");
}

const Kernels& checked_kernels(const Arguments& arguments, const std::string& instruction_set) {
    const Kernels* kernels = kernels_of(instruction_set);
    if (kernels != nullptr) return *kernels;
    std::string usable;
    for (const std::string& name : instruction_sets()) usable += (usable.empty() ? "" : ", ") + name;
    arguments.refuse("an instruction set of this machine", "instruction_set='" + instruction_set + "'",
                     "choose among " + usable + ", or '' for the best");
}

std::vector<std::int32_t> checked_starts(const Arguments& arguments, const char* name, Object value, std::ptrdiff_t rows,
                                         const char* of) {
    const Array array = arguments.array(name, value, std::vector<Dtype>{Dtype::int32}, 1);
    const std::string called = name;
    if (array.shape[0] == 0) arguments.refuse(called + " of shape (B + 1,)", "no element", "start it with a 0");
    if (array.shape[0] > most_rows)
        arguments.refuse("at most 2147483646 sequences", called + ".shape=" + text_of(array.shape), "split the call");
    std::vector<std::int32_t> starts;
    starts.reserve(static_cast<std::size_t>(array.shape[0]));
    for (std::ptrdiff_t i = 0; i < array.shape[0]; ++i)
        starts.push_back(static_cast<const std::int32_t*>(array.data)[i * array.strides[0]]);
    const auto element = [&](std::size_t i) {
        return called + "[" + std::to_string(i) + "]=" + std::to_string(starts[i]);
    };
    if (starts[0] != 0) arguments.refuse(called + " that starts at 0", element(0), "put a 0 in front");
    for (std::size_t i = 1; i < starts.size(); ++i)
        if (starts[i] < starts[i - 1])
            arguments.refuse(called + " that never decreases", element(i) + " after " + std::to_string(starts[i - 1]),
                             "sum the lengths of the sequences");
    if (starts.back() != rows)
        arguments.refuse(called + " that ends at the " + std::to_string(rows) + " rows of " + of,
                         element(starts.size() - 1), "sum the lengths of all sequences");
    return starts;
}

Call::Call(const char* operation, const Layout& layout, Object q, Object k, const py::kwargs& keywords,
           std::initializer_list<const char*> own_options)
    : arguments(operation), options(arguments, keywords, own_options), tensors(arguments),
      kernels(checked_kernels(arguments, options.value<std::string>("instruction_set", "", "a str"))),
      threads(thread_count(checked_threads(arguments, options.value("threads", 0, "an int")))), layout_(layout) {
    tensors.measure("q", q, layout.q);
    tensors.measure_rows("k", k, layout.k);
    check_head_width(arguments, head_width());
}

void Call::fill_inputs(Attention& problem, Object q, Object k, Object v) {
    problem.bfloat16 = tensors.dtype() == Dtype::bfloat16;
    problem.head_width = static_cast<int>(head_width());
    problem.q = tensors.input<const void>("q", q, layout_.q);
    problem.k = tensors.input<const void>("k", k, layout_.k);
    problem.v = tensors.input<const void>("v", v, layout_.k);
    const int given = !options["coords_q"].is_none() + !options["coords_k"].is_none() + !options["slopes"].is_none();
    if (given != 0 && given != 3)
        arguments.refuse("coords_q, coords_k and slopes together", std::to_string(given) + " of the three",
                         "pass all of them or none");
    for_each_term(problem, [this](const char* name, auto& term, TermOf of) { fill_term(name, term, of); });
}

void Call::fill_term(const char* name, float& number, TermOf) const {
    const double given = options.value(name, static_cast<double>(number), "a float");
    number = static_cast<float>(given);
    if (!std::isfinite(number))
        arguments.refuse(std::string("a finite ") + name, name + ("=" + std::to_string(given)), "give it a number");
}

void Call::fill_term(const char* name, Strided<const float>& tensor, TermOf of) const {
    tensor = tensors.input_if_given<const float>(name, options[name], axes_of(of));
}

const char* Call::axes_of(TermOf of) const {
    switch (of) {
        case TermOf::keys: return bias_axes();
        case TermOf::query_positions: return layout_.coords_q;
        case TermOf::key_positions: return layout_.coords_k;
        default: return "H";
    }
}

bool Call::heads_share_bias() const {
    const py::object bias = options["key_bias"];
    return axes_of_array(bias).value_or(0) <= Axes(layout_.shared_key_bias).count();
}

void Call::fill_outputs(Attention& problem, Object out, Object lse) const {
    problem.out = tensors.output<void>("out", out, layout_.q);
    problem.lse = tensors.output<float>("lse", lse, layout_.lse);
    problem.lse_rest = tensors.output_if_given<float>("lse_rest", options["lse_rest"], layout_.lse);
}

void Call::fill_saved(Attention& problem, Object out, Object lse) const {
    problem.out = tensors.input<void>("out", out, layout_.q);
    problem.lse = tensors.input<float>("lse", lse, layout_.lse);
    problem.lse_rest = tensors.input_if_given<float>("lse_rest", options["lse_rest"], layout_.lse);
}

void Call::fill_gradients(Gradients& gradients, Object grad_out, Object dq, Object dk, Object dv) {
    gradients.grad_out = tensors.input<const void>("grad_out", grad_out, layout_.q);
    gradients.dq = tensors.output<void>("dq", dq, layout_.q);
    gradients.dk = tensors.output<void>("dk", dk, layout_.k);
    gradients.dv = tensors.output<void>("dv", dv, layout_.k);
    gradients.grad_lse = tensors.input_if_given<const float>("grad_lse", options["grad_lse"], layout_.lse);
    if (!options["dbias"].is_none() && options["key_bias"].is_none())
        arguments.refuse("key_bias to write dbias", "None", "pass what forward was given");
    gradients.dbias = tensors.output_if_given<float>("dbias", options["dbias"], bias_axes());
    if (!options["dslopes"].is_none() && options["slopes"].is_none())
        arguments.refuse("slopes to write dslopes", "None", "pass what forward was given");
    dslopes_ = tensors.output_if_given<float>("dslopes", options["dslopes"], "H");
}

void Call::write_slope_gradients(const std::vector<double>& dslope_H) const {
    if (dslopes_.data == nullptr) return;
    for (std::size_t h = 0; h < dslope_H.size(); ++h)
        dslopes_.data[static_cast<std::ptrdiff_t>(h) * dslopes_.head] = static_cast<float>(dslope_H[h]);
}

std::vector<std::int32_t> Call::starts(const char* name, Object value, std::ptrdiff_t rows, const char* of) const {
    return checked_starts(arguments, name, value, rows, of);
}

}  // namespace maskattn
