#include "python/options.hpp"

#include <algorithm>

#include "attention/terms.hpp"

namespace maskattn {
namespace {

std::vector<std::string_view> names_of_terms() {
    std::vector<std::string_view> names;
    ScoreTerms terms{};
    for_each_term(terms, [&](const char* name, auto&, TermOf) { names.push_back(name); });
    return names;
}

}  // namespace

Options::Options(const Arguments& arguments, const py::kwargs& keywords, std::initializer_list<const char*> own)
    : arguments_(arguments) {
    static const std::vector<std::string_view> terms = names_of_terms();
    std::vector<std::string_view> known{"threads", "instruction_set"};
    known.insert(known.end(), terms.begin(), terms.end());
    known.insert(known.end(), own.begin(), own.end());
    given_.reserve(keywords.size());
    for (const auto& [key, given] : keywords) {
        const auto name = key.cast<std::string_view>();
        if (std::find(known.begin(), known.end(), name) == known.end()) {
            std::string all;
            for (const std::string_view each : known) all.append(all.empty() ? "" : ", ").append(each);
            arguments.refuse_type("keywords among " + all, std::string(name), "leave it out");
        }
        given_.emplace_back(name, given);
    }
}

py::object Options::operator[](std::string_view name) const {
    const py::handle given = find(name);
    return given ? py::reinterpret_borrow<py::object>(given) : py::none();
}

py::handle Options::find(std::string_view name) const {
    for (const auto& [known, given] : given_)
        if (known == name) return given;
    return {};
}

}  // namespace maskattn
