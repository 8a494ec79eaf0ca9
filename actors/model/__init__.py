"""The model: weights, batches and the forward pass; knows nothing of other ranks."""
