"""Saves that are broken off anywhere, by SIGKILL on real disks and by power cuts on a simulated one."""
