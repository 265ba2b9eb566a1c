// The attributes of functions in headers that several units include, each under its own compiler flags.
#pragma once

// For functions in an unnamed namespace, which are always inlined and never linked to.
#define MASKATTN_INLINE inline __attribute__((always_inline))
