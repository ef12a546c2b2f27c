"""Samplers: a policy and prompts in, rollouts out."""
