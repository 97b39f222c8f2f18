"""The interfaces of training frameworks and serving engines, with this library behind them.

Import the module of the framework: `lplb_triton.integrations.transformers` or
`lplb_triton.integrations.megatron` (docs/frameworks.md), `lplb_triton.integrations.vllm` or
`lplb_triton.integrations.sglang` (docs/serving.md). Importing this package imports none of them.
"""

__all__: list[str] = []
