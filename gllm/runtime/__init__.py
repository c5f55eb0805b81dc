"""The torch shell: workers, executor, models and server drive `gllm.core` on real GPUs."""
