// The list of the terms of the score, as arguments of a call. The bindings fill them from the keywords of these names
// and refuse every other keyword. A new term needs a member here and a line in for_each_term; its formula is in
// score.hpp.
#pragma once

#include "attention/strided.hpp"

namespace maskattn {

struct ScoreTerms {
    float scale = __builtin_nanf("");         // factor of the products
    Strided<const float> key_bias;            // without data: none
    Strided<const float> coords_q, coords_k;  // two floats per row; without data: none
    Strided<const float> slopes;              // one per head; without data: none
};

// The axis over which a term has values; a number belongs to the call.
enum class TermOf { call, keys, query_positions, key_positions, heads };

// Calls visit(name, member, axis of its values) for each term.
template <class Visit>
void for_each_term(ScoreTerms& terms, Visit visit) {
    visit("scale", terms.scale, TermOf::call);
    visit("key_bias", terms.key_bias, TermOf::keys);
    visit("coords_q", terms.coords_q, TermOf::query_positions);
    visit("coords_k", terms.coords_k, TermOf::key_positions);
    visit("slopes", terms.slopes, TermOf::heads);
}

}  // namespace maskattn
