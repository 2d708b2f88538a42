"""Engines: generate text with given weights."""
