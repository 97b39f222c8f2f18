"""Times of the library and of its peers; nothing here prints.

Kernels of a few microseconds are timed as replays of CUDA graphs, so that the host's launches
stay out of the figure. No answer is timed before it has been checked: every plan is
compared with HiGHS's optimum, every rewritten id with the plan.

On the CPU the same code runs with the torch twins and any `Timer`, which is for tests only.
"""
