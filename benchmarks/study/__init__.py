"""A study: which size of model wins under a sampling budget, before and after distillation to few steps (docs/study.md)."""
