"""The former name of `lplb_triton.integrations`."""
