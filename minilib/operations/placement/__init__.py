"""Placement: which GPUs of a cluster run which job, from when on."""
