"""Gangs: jobs that run on all of their GPUs or on none."""
