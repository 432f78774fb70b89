"""Kubernetes objects as plain data: pods, Jobs and JobSets, gangs, queues, replicas over hosts, device claims."""
