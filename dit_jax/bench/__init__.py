"""How fast a machine trains and samples: ours, and a peer beside it."""
