"""Probing: k-sparse probes and the comparison with a dense model."""
