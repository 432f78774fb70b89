"""What a machine can do, one question a function. `minilib.machine` asks them all and keeps the answers."""
