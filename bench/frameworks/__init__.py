"""Train MoE models of real frameworks side by side, and time what balancing costs and gains.

``lplb-bench frameworks`` runs on the ranks of a torchrun. For each routing it builds one model for
each method from the same weights, and trains them in turns on the same batches:

========  ======================================================================================
``none``  the framework's own expert parallelism
``even``  copies of experts, whose tokens go to the copies in turn, as EPLB splits them
``lp``    the same copies, filled by the LP of each batch
========  ======================================================================================

`compare` has the loop, `routing` finds the routers' biases, `megatron` and `transformers` build the
models. These two import their framework, so they are imported by name only.
"""
