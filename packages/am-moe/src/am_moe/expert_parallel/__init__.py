"""Experts over an axis: found, their tokens dispatched, computed and measured."""
