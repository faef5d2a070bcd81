"""Coding rates, and the closed loop that is played on them, over any number of processes."""
