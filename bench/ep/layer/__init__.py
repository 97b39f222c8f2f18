"""Section ``live``: one MoE layer, forward and backward, by every way to balance it.

``none``, EPLB's even split, the LP on static copies, live slots and a perfectly even routing are
run in turns on the same batches, after their outputs and gradients have been held against those of
``none``. Under ``changing`` a few experts are hot that no history foresees, others in every batch;
under ``steady`` the loads are near those that the copies were placed by.
"""
