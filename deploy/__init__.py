"""Inference with trained models: prediction, exported programs and the check that they match the original model."""
