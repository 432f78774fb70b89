"""A small durable store, the disks that it runs on, and crashes of every kind: store.py is where to begin."""
