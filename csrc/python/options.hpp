// The keywords of a call, which an operation takes in addition to its tensors.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "python/arrays.hpp"

namespace maskattn {

class Options {
  public:
    // Every operation takes the terms of the score (attention/terms.hpp), threads and instruction_set; `own` names the
    // further keywords of this one. Throws TypeError for any other keyword. The keywords must outlive the object.
    Options(const Arguments& arguments, const py::kwargs& keywords, std::initializer_list<const char*> own);

    // Returns the keyword of this name, or None if it was not given.
    py::object operator[](std::string_view name) const;

    // Returns a value that is not an array, or `otherwise` if it was not given. Throws TypeError for a value of another
    // type, which the message calls `type`, e.g. "a bool".
    template <class Value>
    Value value(std::string_view name, Value otherwise, const char* type) const {
        const py::handle given = find(name);
        if (!given) return otherwise;
        try {
            return given.cast<Value>();
        } catch (const py::cast_error&) {
            arguments_.refuse_type(std::string(name) + " as " + type, py::repr(given).cast<std::string>(),
                                   "convert it first");
        }
    }

  private:
    py::handle find(std::string_view name) const;  // null if it was not given

    const Arguments& arguments_;
    std::vector<std::pair<std::string_view, py::handle>> given_;
};

}  // namespace maskattn
