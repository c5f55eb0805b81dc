"""One scheduler core, two bodies: a simulated GPU pipeline and the real multi-GPU runtime."""
