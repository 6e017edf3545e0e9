"""Tests of moe_lens.autointerp."""
