"""Suites, as package data."""
