"""GPU kernels: one operation, one file - Triton kernel, launcher, plain-torch reference."""
