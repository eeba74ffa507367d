"""Evaluation: held-out loss per domain, and text generation."""
