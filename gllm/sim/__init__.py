"""The simulator's shell: simpy makes time pass, the shared engine decides. Runs without torch."""
