"""Instruments of a training job, and detectors that find from their records what is wrong, and on which rank.

    on a rank      recorder.py: steps; heartbeat.py; links.py: messages
    anywhere       stragglers.py, links.py, numbers.py, replicas.py, liveness.py, collectives.py: records → findings
    for a figure   breakdown.py: where the steps of each rank go

Nothing is imported here: a rank that beats needs no detector, and a detector no figure.
"""
