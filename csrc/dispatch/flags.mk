# The compiler's flags for every build of csrc/, read by setup.py and csrc/tests/Makefile.
# Each line is NAME := flags, without references to others. FLAGS_x applies only to csrc/dispatch/x.cpp, on x86-64.

CXX_STANDARD := 17

# The last two fuse products with sums, and let sqrt leave errno alone.
FLAGS := -pthread -Wall -Wextra -ffp-contract=fast -fno-math-errno

FLAGS_avx2 := -mavx2 -mfma
# GCC 12 warns of the undefined operands inside its own AVX-512 intrinsics.
FLAGS_avx512 := -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized -Wno-maybe-uninitialized
FLAGS_avx512_bf16 := -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -Wno-uninitialized -Wno-maybe-uninitialized
FLAGS_amx_bf16 := -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -Wno-uninitialized -Wno-maybe-uninitialized
