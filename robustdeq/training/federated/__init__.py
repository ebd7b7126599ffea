"""Federated averaging over clients that can afford different numbers of solver iterations."""
