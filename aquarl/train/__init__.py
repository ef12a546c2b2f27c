"""The supervised stages: base, mid, sft."""
