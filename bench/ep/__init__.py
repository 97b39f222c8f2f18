"""Verify and time load sync, the whole run and training on the GPUs of one host.

``lplb-bench ep`` runs these sections. Every section runs in processes of its own, one per GPU, and
within a time limit: a section that fails or hangs is reported as such, and the others still run. No
answer is timed before it has passed its check. On the CPU the sections run over gloo with small
sizes, which tests their code, not the speed.

============  ==================================================================================
``verify``    sums of many epochs with random delays, eagerly and under graph replay
``time``      an exchange of 256 counts beside a plain all-reduce
``pipeline``  whole runs with sync: a fixed topology, EPLB with one and two slots per rank
``kill``      a rank dies between two batches
``weights``   weights of one layer's slots, and gradients back
``live``      one MoE layer, forward and backward, with static copies and with live slots
``train``     examples/train_moe_ep.py: losses, step and MoE-layer times
============  ==================================================================================
"""
