"""Benchmark of training and sampling speed, with another implementation (a peer) beside ours."""
