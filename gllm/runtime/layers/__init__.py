"""The layers that all models are made of; each holds one rank's slices and says where they lie in a checkpoint."""
