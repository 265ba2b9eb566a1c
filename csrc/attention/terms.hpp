// What makes scores of products, as a call gives it: the one list of the terms of the score. The bindings fill them from
// the keywords of these names and refuse every other keyword. A new term is a member here and its line in for_each_term;
// its formula is in score.hpp.
#pragma once

#include "attention/strided.hpp"

namespace maskattn {

struct ScoreTerms {
    float scale = __builtin_nanf("");         // of the products
    Strided<const float> key_bias;            // without data: none
    Strided<const float> coords_q, coords_k;  // two floats a row; without data: none
    Strided<const float> slopes;              // by head; without data: none
};

// What a term has values of; a number is of the call.
enum class TermOf { call, keys, query_positions, key_positions, heads };

// Calls visit(name, member, what it has values of) for each term.
template <class Visit>
void for_each_term(ScoreTerms& terms, Visit visit) {
    visit("scale", terms.scale, TermOf::call);
    visit("key_bias", terms.key_bias, TermOf::keys);
    visit("coords_q", terms.coords_q, TermOf::query_positions);
    visit("coords_k", terms.coords_k, TermOf::key_positions);
    visit("slopes", terms.slopes, TermOf::heads);
}

}  // namespace maskattn
