"""Federated self-supervised learning: simulate, deploy, compare."""
