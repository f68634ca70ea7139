"""Datasets: formats on disk, validation splits, transforms, the sampler, and batches."""
