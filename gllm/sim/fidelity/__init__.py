"""`fidelity`: how far the simulator is from a recorded run, in its decisions, its metrics and its stage times."""
