"""One operation, one file: a launcher and its plain-torch reference; Triton kernels join them for GPUs."""
