#include "python/options.hpp"

#include <algorithm>

namespace maskattn {
namespace {

struct ArrayOption {
    const char* name;
    py::object Options::* member;
};

const ArrayOption score_terms[] = {
    {"key_bias", &Options::key_bias},
    {"coords_q", &Options::coords_q},
    {"coords_k", &Options::coords_k},
    {"slopes", &Options::slopes},
};
const ArrayOption own_arrays[] = {
    {"lse_rest", &Options::lse_rest},     {"rows", &Options::rows},
    {"grad_lse", &Options::grad_lse},     {"grad_rows", &Options::grad_rows},
    {"dbias", &Options::dbias},           {"dslopes", &Options::dslopes},
    {"key_origin", &Options::key_origin}, {"value_origin", &Options::value_origin},
};

template <class Value>
Value value_of(const Arguments& arguments, const std::string& name, const py::handle& given, const char* type) {
    try {
        return given.cast<Value>();
    } catch (const py::cast_error&) {
        arguments.refuse_type(name + " as " + type, py::repr(given).cast<std::string>(), "convert it first");
    }
}

// Whether the keyword is one of the table.
template <std::size_t count>
bool fill_array(const ArrayOption (&table)[count], const std::string& name, const py::handle& given, Options& options) {
    const auto option = std::find_if(table, table + count, [&](const ArrayOption& o) { return name == o.name; });
    if (option == table + count) return false;
    options.*(option->member) = py::reinterpret_borrow<py::object>(given);
    return true;
}

[[noreturn]] void refuse_keyword(const Arguments& arguments, const std::string& name,
                                 std::initializer_list<const char*> own) {
    std::string known = "threads, instruction_set";
    for (const ArrayOption& option : score_terms) known += std::string(", ") + option.name;
    for (const char* option : own) known += std::string(", ") + option;
    arguments.refuse_type("keywords among " + known, name, "leave it out");
}

}  // namespace

Options options_of(const Arguments& arguments, const py::kwargs& keywords, std::initializer_list<const char*> own) {
    Options options;
    for (const auto& [key, given] : keywords) {
        const auto name = key.cast<std::string>();
        if (name == "threads") {
            options.threads = value_of<int>(arguments, name, given, "an int");
        } else if (name == "instruction_set") {
            options.instruction_set = value_of<std::string>(arguments, name, given, "a str");
        } else if (!fill_array(score_terms, name, given, options)) {
            if (std::find(own.begin(), own.end(), name) == own.end()) refuse_keyword(arguments, name, own);
            if (name == "skip_queries")
                options.skip_queries = value_of<bool>(arguments, name, given, "a bool");
            else
                fill_array(own_arrays, name, given, options);
        }
    }
    return options;
}

}  // namespace maskattn
