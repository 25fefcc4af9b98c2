"""Inference with a trained model: prediction, exported programs and their equivalence."""
