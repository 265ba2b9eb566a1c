# The compiler's flags, for every build of csrc/: setup.py and csrc/tests/Makefile read this list.
# One line each, NAME := flags, all of them written out. FLAGS_x is given to csrc/dispatch/x.cpp alone, on x86-64.

CXX_STANDARD := 17

# Neither of the last two changes a value: products are fused with sums, and sqrt need not set errno.
FLAGS := -pthread -Wall -Wextra -ffp-contract=fast -fno-math-errno

FLAGS_avx2 := -mavx2 -mfma
# GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for mistakes of ours.
FLAGS_avx512 := -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized -Wno-maybe-uninitialized
FLAGS_avx512_bf16 := -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -Wno-uninitialized -Wno-maybe-uninitialized
