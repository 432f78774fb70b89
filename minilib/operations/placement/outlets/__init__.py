"""Outlets: what was decided here, written out for schedulers that people run: Slurm, Kubernetes, Ray."""
