"""The worker processes: one a GPU, launched by torchrun's machinery; each computes its part of every step."""
