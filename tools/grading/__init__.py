"""What tools/release.py and tools/grade.py share: a throw-away nbgrader course, and the checks around it."""
