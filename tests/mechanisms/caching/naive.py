"""Eviction policies written another way: slowly, and as their papers put them.

Each takes the keys asked for and the room for keys, and returns the victim of every miss, None while there is room.
"""

from minilib.mechanisms.caching import Clock, Fifo, Lfu, Lru, S3Fifo, Sieve


def naive_fifo(references, room):
    """A list in order of arrival."""
    held, victims = [], []
    for key in references:
        if key not in held:
            victims.append(held.pop(0) if len(held) == room else None)
            held.append(key)
    return victims


def naive_lru(references, room):
    """Look back through all references for the key whose last use is farthest away."""
    held, victims = set(), []
    for time, key in enumerate(references):
        if key not in held:
            victim = None
            if len(held) == room:
                victim = min(held, key=lambda k: max(t for t in range(time) if references[t] == k))
                held.remove(victim)
            victims.append(victim)
            held.add(key)
    return victims


def naive_clock(references, room):
    """The textbook's ring: keys at fixed places, a hand that moves over them and clears bits."""
    ring, bits, hand, victims = [None] * room, [0] * room, 0, []
    for key in references:
        if key in ring:
            bits[ring.index(key)] = 1
            continue
        while bits[hand]:
            bits[hand] = 0
            hand = (hand + 1) % room
        victims.append(ring[hand])
        ring[hand], bits[hand] = key, 0
        hand = (hand + 1) % room
    return victims


def naive_lfu(references, room):
    """Uses plus age, and all keys looked through for the lowest sum."""
    held, age, victims = {}, 0, []  # key → sum, time of the last use, uses
    for time, key in enumerate(references):
        if key in held:
            uses = held[key][2] + 1
            held[key] = (age + uses, time, uses)
            continue
        victim = None
        if len(held) == room:
            victim = min(held, key=held.__getitem__)
            age = held.pop(victim)[0]
        victims.append(victim)
        held[key] = (age + 1, time, 1)
    return victims


def naive_sieve(references, room):
    """Algorithm 1 of the paper: one list, its head first, and the hand as a place in it, which moves to the head."""
    queue, visited, hand, victims = [], {}, None, []
    for key in references:
        if key in queue:
            visited[key] = True
            continue
        victim = None
        if len(queue) == room:
            place = len(queue) - 1 if hand is None else queue.index(hand)
            while visited[queue[place]]:
                visited[queue[place]] = False
                place = place - 1 if place else len(queue) - 1
            victim = queue[place]
            hand = queue[place - 1] if place else None
            queue.pop(place)
        queue.insert(0, key)
        visited[key] = False
        victims.append(victim)
    return victims


def naive_s3fifo(references, room):
    """Algorithm 1 of the paper, over lists whose head comes first."""
    small, main, ghost, freq, victims = [], [], [], {}, []

    def evict_small():
        while small:
            tail = small.pop()
            if freq[tail] > 1:
                main.insert(0, tail)
                freq[tail] = 0
            else:
                ghost.insert(0, tail)
                del ghost[room - room // 10 :]
                return tail
        return evict()

    def evict_main():
        while True:
            tail = main.pop()
            if not freq[tail]:
                return tail
            freq[tail] -= 1
            main.insert(0, tail)

    def evict():
        return evict_small() if 10 * len(small) >= room else evict_main()

    for key in references:
        if key in small or key in main:
            freq[key] = min(freq[key] + 1, 3)
            continue
        victims.append(evict() if len(small) + len(main) == room else None)
        if key in ghost:
            ghost.remove(key)
            main.insert(0, key)
        else:
            small.insert(0, key)
        freq[key] = 0
    return victims


POLICIES = {
    "fifo": (Fifo, naive_fifo),
    "lru": (Lru, naive_lru),
    "clock": (Clock, naive_clock),
    "lfu": (Lfu, naive_lfu),
    "sieve": (Sieve, naive_sieve),
    "s3fifo": (S3Fifo, naive_s3fifo),
}
