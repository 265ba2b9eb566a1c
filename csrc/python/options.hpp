// What the operations take in addition to their tensors, filled from the keywords of a call.
#pragma once

#include <initializer_list>
#include <string>

#include "python/arrays.hpp"

namespace maskattn {

// Each member has the name of its keyword; arrays that are not given are None. A new option is a member here and a line
// of the tables in options.cpp.
struct Options {
    py::object key_bias = py::none(), coords_q = py::none(), coords_k = py::none(), slopes = py::none();
    py::object lse_rest = py::none(), rows = py::none();
    py::object grad_lse = py::none(), grad_rows = py::none();
    py::object dbias = py::none(), dslopes = py::none();
    py::object key_origin = py::none(), value_origin = py::none();
    bool skip_queries = true;
    int threads = 0;
    std::string instruction_set;
};

// Every operation takes the terms of the score, threads and instruction_set; `own` names what else this one takes.
// Throws TypeError for any other keyword and for a number of the wrong type.
Options options_of(const Arguments& arguments, const py::kwargs& keywords, std::initializer_list<const char*> own);

}  // namespace maskattn
