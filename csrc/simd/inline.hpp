// Functions of the headers that several units include, each under its own compiler flags.
#pragma once

// Inside an unnamed namespace: what is inlined always, and linked to from nowhere.
#define MASKATTN_INLINE inline __attribute__((always_inline))
