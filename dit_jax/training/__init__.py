"""Training: one step, its state, optimizer and guard, and the loop."""
