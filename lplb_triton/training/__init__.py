"""What `lplb_triton.Replicas` is built from; import that one."""
