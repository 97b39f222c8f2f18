"""The kernels that solve the linear program, and what they are made of."""
