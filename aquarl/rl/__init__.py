"""One reinforcement-learning step, no cluster: each file one arrow of the picture."""
