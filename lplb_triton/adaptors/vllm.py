"""The former name of `lplb_triton.integrations.vllm`."""

from lplb_triton.integrations.vllm import LplbEplbPolicy

__all__ = ["LplbEplbPolicy"]
