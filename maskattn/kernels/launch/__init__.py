"""The launchers' common parts: kernel arguments, positions of rows, the schedule, and steps before and after."""
