"""A cluster over simulated time: traces, failures, policies compared, fragmentation and moves against it."""
