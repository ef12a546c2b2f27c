"""What a run shows while it goes: numbers to sinks, rollouts to human eyes."""
