"""What a machine can do, one question a function. `minilib.numbers.machine` asks them all and keeps the answers."""
