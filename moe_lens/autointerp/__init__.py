"""Autointerp: labels for experts, and scores of labels."""
