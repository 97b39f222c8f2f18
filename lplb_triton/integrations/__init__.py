"""The interfaces of serving engines, with this library behind them.

Import the engine's module: `lplb_triton.integrations.vllm` or
`lplb_triton.integrations.sglang`. Neither imports its engine; see docs/serving.md.
"""

__all__: list[str] = []
