"""The transformer, its optimizer and its checkpoints."""
