# %% [markdown]
# # From a model to a report
#
# A walk from a model of transformers to a trace of its own expert loads, to a report of what
# balancing would gain, and to advice. Nothing is downloaded, no GPU is needed, and it takes about
# ten seconds. Run it as a script, `python examples/walkthrough.py`, or as a page,
# `python examples/render.py examples/walkthrough.py walkthrough.html`.

# %%
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lplb_triton.bench.cli import main
from lplb_triton.integrations.transformers import record

torch.manual_seed(0)

# %% [markdown]
# ## The model
#
# A small Qwen3-MoE made from a configuration: 4 layers of 64 experts, of which each token takes 4.
# Your own model would come from `from_pretrained`. Fresh weights use all experts alike, which no
# trained model does, so the routers are skewed: experts with larger rows are chosen more often.

# %%
config = Qwen3MoeConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=2, intermediate_size=64, moe_intermediate_size=32,
                        num_experts=64, num_experts_per_tok=4)  # fmt: skip
model = AutoModelForCausalLM.from_config(config)
for layer in model.model.layers:
    layer.mlp.gate.weight.data *= (0.7 * torch.randn(64, 1)).exp()

# %% [markdown]
# ## The trace
#
# `record` counts which experts the tokens of each forward pass go to. Every batch has 2,048
# tokens and a topic of its own, 200 words of the vocabulary, so that loads change from batch to
# batch as those of text do.

# %%
with record(model, "trace.npz"), torch.no_grad():
    for _ in range(40):
        model(torch.randint(2048, (200,))[torch.randint(200, (16, 128))])

# %% [markdown]
# ## The report
#
# The first half of the batches decides where experts are copied to, and the other half is
# balanced, on 8 ranks with one and two redundant slots each. The page says what is gained, from
# which batch size on, and what to change.

# %%
main(["report", "trace.npz", "--ep", "8", "--slots", "1,2"])

# %% [markdown]
# ## The advice
#
# The experts of this model are too small for balancing to pay. With the same loads and experts as
# wide as those of Qwen3-235B-A22B, 4,096 tokens on each rank:

# %%
main(["advise", "--trace", "trace.npz", "--hidden", "4096", "--inner", "1536", "--ep", "8"])
