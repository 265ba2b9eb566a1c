"""Between a call and its kernels: arguments, where rows lie, the schedule, and what runs before and after."""
